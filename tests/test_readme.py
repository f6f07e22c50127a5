"""The README is true: its commands are understood, its links and pictures are there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from PIL import Image

TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every `python SCRIPT flags` of the page, in blocks, in text and in tables.

    In a table whose head says "command: `python SCRIPT.py` …" the cells hold the flags alone.
    """
    found, prefix = [], ""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    rest = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    for block in blocks:
        found += [line.split("#")[0] for line in block.replace("\\\n", " ").splitlines()]
    for line in rest.splitlines():
        codes = re.findall(r"`([^`]+)`", line)
        if head := re.search(r"command: `(python [^`]+)` …", line):
            prefix = head[1]
        elif not line.startswith("|"):
            prefix = ""
        elif prefix and codes and codes[-1].startswith("--"):
            codes[-1] = f"{prefix} {codes[-1]}"
        elif prefix and line.rstrip("| ").endswith("(defaults)"):
            codes = [prefix]
        found += codes
    known = rf"(?:.*[ /])?python3? ((?:{'|'.join(SCRIPTS)})\.py.*)"
    matches = [re.match(known, " ".join(command.split())) for command in found]
    known = {m[1].strip() for m in matches if m and "…" not in m[1]}
    return sorted(command for command in known if "--help" not in command)


def test_the_page_has_commands_of_every_script():
    counts = {script: sum(c.startswith(f"{script}.py") for c in commands()) for script in SCRIPTS}
    assert min(counts.values()) >= 4 and counts["giu_gan"] >= 30, counts


@pytest.mark.parametrize("command", commands())
def test_every_command_is_understood(command, monkeypatch, call):
    """Its flags are known and fit, its networks are built."""
    for photo in ("photo.jpg", "hole.png"):
        Image.effect_noise((300, 200), 50).convert("RGB").save(photo)
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    if "--mode" in flags:  # there is no checkpoint here: only the flags are parsed
        monkeypatch.setattr(module, "check_args", lambda args: iter(()))
        module.parse(flags)
        return
    code, out, err = call(script.removesuffix(".py"), *flags, "--dry-run")
    assert code == 0, err
    assert min(json.loads(out.splitlines()[-1])["params"].values()) > 0


def test_rows_of_one_table_have_run_folders_of_their_own():
    """Else the second row is refused, or scored by the checkpoint of the first."""
    found = {}
    for command in commands():
        script, *flags = shlex.split(command)
        if not {"--mode", "--resume", "--image"} & {*flags}:
            module = importlib.import_module(script.removesuffix(".py"))
            args = module.parse([*flags, "--dry-run"])
            text = str({**vars(args), "exp_name": ""})
            found.setdefault(module.run_folder(args), set()).add(text)
    assert len(found) > 50 and not [rows for rows in found.values() if len(rows) > 1]


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(targets) > 10
    titles = re.findall(r"^#+ (.+)$", TEXT, re.M) + re.findall(r"<a id=\"([^\"]+)\">", TEXT)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
            if Path(target).suffix == ".png":
                Image.open(ROOT / target).verify()


def test_the_page_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 350 and len(TEXT.encode()) <= 28 * 1024
    prose = [line for line in lines if not line.startswith(("|", "![")) and "](" not in line]
    assert not [line for line in prose if len(line) > 120]
