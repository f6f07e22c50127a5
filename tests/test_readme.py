"""The README is true: its commands are understood, its links and pictures are there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, SCRIPTS
from PIL import Image
from torch.utils.data import Dataset

TEXT = (ROOT / "README.md").read_text()


def commands(text: str = TEXT) -> list[str]:
    """Every `python SCRIPT flags` of the page: in blocks, in the text and in the tables."""
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.S)
    blocks += re.findall(r"((?:^    \S.*\n)+)", text, re.M)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
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


SMALL = (
    "--total-steps 2 --log-every 1 --sample-every 1 --eval-every 2 --save-every 1 --fid-num 10 "
    "--fid-weights random --num-samples 4"
)
SMALLER = {  # of what a command line prints: the long ones with fewer steps
    "consingan": "--stages 2 --niter 1 --max-size 50",
    "an_gan": "--batch-size 2 --fid-real 10 --bn-batches 1 --num-workers 0",
    "an_inpaint": "--batch-size 2 --fid-real 10 --phase1-steps 1 --phase2-steps 1 --num-workers 0",
    "": "--batch-size 4 --fid-real 10 --num-workers 0",
}


class StandIn(Dataset):
    """Images of noise with the number of classes of the data set whose place it takes."""

    def __init__(self, classes: int) -> None:
        self.key, self.targets = classes, [i % classes for i in range(max(20, classes))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        random = np.random.default_rng(index)
        return Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)), index


@pytest.fixture
def data(monkeypatch):
    """What the page's commands read: folders of images, and stand-ins of the data sets."""
    for folder in ("photos", "masks", "imagenet", "cifar10-train", "paris/train", "paris/val",
                   "paris_views"):  # fmt: skip
        Path(folder).mkdir(parents=True)
        for i in range(40 if folder in ("photos", "masks", "imagenet") else 5):
            noise = Image.effect_noise((300, 260), 50 + i)
            noise.point(lambda v: 255 * (v > 128)).convert("RGB").save(f"{folder}/{i}.png")
    for name in ("photo.jpg", "hole.png"):
        Image.open("masks/1.png").save(name, quality=95)
    for script in SCRIPTS:
        sources = getattr(importlib.import_module(script), "SOURCES", {})
        for name in sources.keys() - {"folder", "shapes"}:
            classes = 1000 if name == "imagenet" else 10
            opened = (lambda args, classes=classes: StandIn(classes)), ""
            monkeypatch.setitem(sources, name, opened)


@pytest.mark.storm
@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, call, data):
    """As printed, but for two steps of small batches: trains, then every mode of it."""
    name, *flags = shlex.split(command)
    script = name.removesuffix(".py")
    kind = "consingan" if "consingan" in command else script
    small = f"{SMALL} {SMALLER.get(kind, SMALLER[''])}".split()

    def run(*given: str, last: tuple[str, ...] = ()) -> None:
        code, _, err = call(script, *given, *small, *last)
        assert code == 0, err

    train, mode = list(flags), ""
    if "--mode" in flags:
        at = flags.index("--mode")
        mode, train = flags[at + 1], flags[:at]
    if "--resume" in flags:
        train.remove("--resume")
        run(*train, last=("--total-steps", "1"))
        run(*flags)
    elif mode == "inpaint":
        run("--dataset", "folder", "--data-dir", "photos")
        (folder,) = Path("runs").iterdir()
        folder.rename("runs/RUN")
        run(*flags)
        assert Path("filled").is_dir() or Path("filled.png").exists()
    elif "--runs" in flags:
        run("--dataset", "celeba")
        run(*flags[:-1], *map(str, Path().glob(flags[-1])))
    else:
        # What goes on with a run of photographs does not name their folder again.
        elsewhere = "folder" in flags and "--data-dir" not in flags
        run(*train, *(["--data-dir", "photos"] if elsewhere else []))
        for other in ("evaluate", "sample", "figures"):
            run(*train, "--mode", other)
        run(*train, *flags[len(train) :], *[] if mode else ["--resume"])
        (folder,) = Path("runs").iterdir()
        assert (folder / "evaluate.json").exists() and (folder / "generated.png").exists()
        assert list((folder / "figures").iterdir())


def test_rows_of_one_table_have_run_folders_of_their_own():
    """Else the second row is refused, or scored by the checkpoint of the first."""
    tables = "\n".join(line if line.startswith("|") else "" for line in TEXT.splitlines())
    found = {}
    for name, *flags in map(shlex.split, commands(tables)):
        module = importlib.import_module(name.removesuffix(".py"))
        parse = getattr(module, "parse", lambda argv, kind=module.Args: tyro.cli(kind, args=argv))
        if "--mode" not in flags:
            found.setdefault(module.run_folder(parse(flags)), []).append(flags)
    assert len(found) > 50 and not [flags for flags in found.values() if len(flags) > 1]


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
