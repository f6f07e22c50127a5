"""Shared by all tests: the scripts, how to run one, tiny settings. No network, no GPU."""

import atexit
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TORCH_HOME"] = str(ROOT / "tests" / "no-weights-here")  # never a cached download
ORDER = ["giu_gan", "sagan_div", "sagan_dogs", "gca_gan", "an_gan", "an_inpaint"]
SCRIPTS = [name for name in ORDER if (ROOT / f"{name}.py").exists()]

# The drawn images are decoded once for all tests.
SHAPES = tempfile.mkdtemp(prefix="shapes-")
atexit.register(shutil.rmtree, SHAPES, ignore_errors=True)
# A run of seconds on one core.
QUICK = [
    "--dataset", "shapes", "--total-steps", "4", "--log-every", "2", "--sample-every", "2",
    "--eval-every", "0", "--save-every", "2", "--num-workers", "0", "--num-samples", "4",
    "--data-dir", SHAPES,
]  # fmt: skip
# The flags that make each script's networks small, and its other models and variants.
TINY = {
    "giu_gan": "--batch-size 8 --g-ch 16 --d-ch 16",
    "sagan_div": "--method d --g-ch 4 --d-ch 4 --batch-size 4",
    "sagan_dogs": "--img-size 32 --g-ch 8 --d-ch 8 --batch-size 4",
    "gca_gan": "--img-size 32 --g-ch 4 --d-ch 4 --batch-size 4 --gca-k 2",
    "an_gan": "--g-ch 8 --d-ch 8 --batch-size 4 --z-dim 16 --bn-batches 2",
    "an_inpaint": (
        "--img-size 64 --g-ch 4 --d-ch 4 --batch-size 2 --n-critic 2 --phase1-steps 2 "
        "--phase2-steps 98"
    ),
}
VARIANTS = {
    "giu_gan": [
        "--model dcgan",
        "--model wgan-gp",
        "--model lsgan",
        "--model sngan",
        "--model sagan",
        "--giu all --no-rbn --sn-output --sn-giu --optimizer rmsprop",
        "--img-size 64 --init normal --hflip --n-critic 2",
        "--no-kernel-norm --giu-act-d every --optimizer adagrad --amp bf16",
        "--amp fp16 --seed 20240101",
    ],
    "sagan_div": [
        "--method a",
        "--method b --attn-block full --channels 1",
        "--method c --attn-sn follow --div-points interp --div-p 2",
        "--attn-blocks 1 3 5 --recipe author --hflip",
        "--attn-blocks none --amp bf16",
        "--method dcgan",
        "--method wgan-div",
        "--method wgan-div --recipe author",
        "--method sngan",
        "--method sngan --recipe author",
    ],
    "sagan_dogs": [
        "--attention none",
        "--attention no-g --attn-d 16 4 --loss hinge",
        "--attention no-d --attn-block pooled --sn backbone --loss minimax",
        "--sn none --hflip --n-critic 2 --amp bf16 --milestones 1 2",
    ],
    "gca_gan": [
        "--block none --gca-k 8",
        "--block nl --gca-k 2",
        "--model sagan --block nl --gca-k 2",
        "--model sagan --gca-k 2",
        "--model sagan --gca-k 2 --loss wgan-gp --gca-variant gram",
        "--gca-variant gcn --gca-binarize hard --hflip",
        "--gca-variant bottleneck --gca-binarize ste --gca-y-transpose --block-in d --loss hinge "
        "--n-critic 2",
        "--block nl --nl-variant pooled --loss wgan-gp",
        "--block nl --nl-variant value --amp bf16 --img-size 64",
    ],
    "an_gan": [
        "--model sagan",
        "--model sngan-star",
        "--model sngan --conditioning acgan --n-critic 2 --hflip",
        "--region-stats bn --an-place add --entities 32",
        "--no-self-sampling --no-an-value --an-place tail --lambda-ortho 0",
        "--img-size 64 --g-ch 4 --an-reading official --entity-init xavier",
        "--img-size 128 --g-ch 2 --d-ch 2 --d-blocks 6 --amp bf16",
    ],
    "an_inpaint": [
        "--refine ca",
        "--refine ca --no-fuse",
        "--refine sa",
        "--refine plain --hflip",
        "--refine none --reconstruction full --no-resize",
        "--critics global-patch --train-mask stroke --gp-region hole --phase1-steps 0",
        "--critics global --reconstruction discount --train-mask centre --shared-mask "
        "--region-stats bn",
        "--widths deepfill --an-reading literal --entity-init normal --no-self-sampling "
        "--no-an-value",
    ],
}


def pytest_configure(config):
    config.addinivalue_line("markers", "storm: long, only run by `pytest -m storm`")


def pytest_collection_modifyitems(config, items):
    """Leave the long tests out unless -m asks for them."""
    if "storm" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("storm")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Every test in its own folder, with its own signal handlers, one thread."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(script: str, *flags: str) -> list[str]:
    """Flags of a quick run; later ones win."""
    return [*QUICK, *TINY[script].split(), *flags]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main() in this process: (exit code, stdout, stderr)."""

    def run(script: str, *argv: str) -> tuple[int, str, str]:
        module = importlib.import_module(script)
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *argv])
            try:
                module.main()
            except SystemExit as stop:
                code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def start(script: str, *argv: str, cwd: Path, **env: str) -> subprocess.Popen:
    """Start a script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
