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
SCRIPTS = [name for name in ORDER if (ROOT / f"{name}.py").exists() and name in ("giu_gan",)]

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
TINY = {"giu_gan": ["--batch-size", "8", "--g-ch", "16", "--d-ch", "16"]}
VARIANTS = {
    "giu_gan": [
        *(["--model", name] for name in ("dcgan", "wgan-gp", "lsgan", "sngan", "sagan")),
        ["--giu", "all", "--no-rbn", "--sn-output", "--sn-giu", "--optimizer", "rmsprop"],
        ["--img-size", "64", "--init", "normal", "--hflip", "--n-critic", "2"],
        ["--no-kernel-norm", "--giu-act-d", "every", "--optimizer", "adagrad", "--amp", "bf16"],
    ]
}


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
    return [*QUICK, *TINY[script], *flags]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main() in this process: (exit code, stdout, stderr)."""

    def run(script: str, *argv: str) -> tuple[int, str, str]:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        code = 0
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
