"""The README is true: its commands are understood, its links and pictures are there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from PIL import Image

TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every `python SCRIPT flags` of the page: in blocks, in the text and in the tables."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", TEXT, re.S)
    blocks += re.findall(r"((?:^    \S.*\n)+)", TEXT, re.M)
    rest = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    found = [line.split("#")[0] for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    prefix = ""
    for line in rest.splitlines():
        codes = re.findall(r"`([^`]+)`", line)
        if head := re.search(r"command: `(python \w+\.py)` …", line):
            prefix = head[1]
        elif not line.startswith("|"):
            prefix = ""
        elif prefix and codes and codes[-1].startswith("--"):
            codes[-1] = f"{prefix} {codes[-1]}"
        found += codes
    found = [" ".join(c.split()) for c in found]
    found += [" ".join(c.split()) for c in re.findall(r"`([^`|]+)`", rest) if "\n" in c]
    stands = "python an_gan.py --dataset imagenet --data-dir imagenet"
    found = [re.sub(r"^A\b", stands, c) for c in found]
    known = rf"(?:.*[ /])?python3? ((?:{'|'.join(SCRIPTS)})\.py.*)"
    matches = [re.match(known, c) for c in found]
    return sorted({m[1] for m in matches if m and "…" not in m[1]})


def test_the_page_has_the_commands_of_every_table():
    counts = {script: sum(c.startswith(f"{script}.py") for c in commands()) for script in SCRIPTS}
    assert counts == dict(zip(SCRIPTS, counts.values())) and min(counts.values()) >= 5, counts
    assert counts["giu_gan"] >= 32 and counts["an_gan"] >= 10, counts


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command, call):
    """Its flags are known and fit, its networks are built."""
    Path("paris_views").mkdir()
    for photo in ("photo.jpg", "paris_views/view.jpg"):
        Image.effect_noise((300, 200), 50).convert("RGB").save(photo)
    script, *flags = shlex.split(command)
    code, out, err = call(script.removesuffix(".py"), *flags, "--dry-run")
    assert code == 0, err
    assert min(json.loads(out)["params"].values()) > 0


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(targets) > 10
    titles = re.findall(r"^#+ (.+)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
            if Path(target).suffix == ".png":
                Image.open(ROOT / target).verify()
