"""Shared by all tests: the scripts, how to run one, tiny settings. No network, no GPU."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the CPU's; one takes the first GPU back
os.environ["TORCH_HOME"] = str(ROOT / "tests" / "no-weights-here")  # never a cached download
SCRIPTS = ["giu_gan", "sagan_div", "sagan_dogs", "gca_gan", "an_gan", "an_inpaint"]

# A run of seconds on one core; later flags win.
QUICK = ("--dataset shapes --total-steps 4 --log-every 2 --sample-every 2 --eval-every 0 "
         "--save-every 2 --num-samples 4")  # fmt: skip
TINY = {
    "giu_gan": "--batch-size 8 --g-ch 16 --d-ch 16",
    "sagan_div": "--img-size 32 --batch-size 8 --g-ch 4 --d-ch 4 --n-critic 2",
    "sagan_dogs": "--img-size 32 --batch-size 8 --g-ch 8 --d-ch 8",
    "gca_gan": "--img-size 32 --batch-size 8 --g-ch 8 --d-ch 8 --gca-k 2",
    "an_gan": "--batch-size 8 --g-ch 8 --d-ch 8 --z-dim 16",
    "an_inpaint": (
        "--img-size 32 --batch-size 4 --g-ch 4 --d-ch 4 --n-critic 2 --phase1-steps 2 --eval-num 4"
    ),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "storm: long, only run by `pytest -m storm`")


def pytest_collection_modifyitems(config, items):
    """Leave the long tests out unless -m asks for them."""
    if "storm" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("storm")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A cache folder in which the drawn images are decoded once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Every test in its own folder, with its own signal handlers, one thread."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(shapes):
    """Flags of a quick run of a script; later ones win."""

    def flags(script: str, more: str = "") -> list[str]:
        return f"{QUICK} --cache-dir {shapes} {TINY[script]} {more}".split()

    return flags


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main() in this process: (exit code, stdout, stderr)."""

    def run(script: str, *argv: str) -> tuple[int, str, str]:
        module, code = importlib.import_module(script), 0
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


def state(folder: Path, name: str = "checkpoint.pt") -> dict:
    """The content of a run's checkpoint."""
    return torch.load(folder / name, weights_only=True)


def restated(module, args, d_loss, g_loss, channels=3) -> dict:
    """G and D after `total_steps` of the plain algorithm: d_loss(D, real, fake, noise), g_loss(s)."""
    cpu = torch.device("cpu")
    images, labels, _ = module.load_images(args, cpu, channels)
    torch.manual_seed(args.seed)
    nets = module.build(args, cpu)[0]
    G, D, n = nets["G"], nets["D"], args.batch_size
    adam = {"betas": (args.beta1, args.beta2), "fused": True}
    opts = {net: torch.optim.Adam(net.parameters(), lr, **adam)
            for net, lr in ((G, args.g_lr), (D, args.d_lr))}  # fmt: skip
    data = module.batches(args, images, labels, cpu, 0)

    def descend(net, loss):
        opts[net].zero_grad()
        loss.backward(inputs=list(net.parameters()))
        opts[net].step()

    for step in range(args.total_steps):
        noise = torch.Generator().manual_seed(module.seed_of(args.seed, 1, step))
        for _ in range(args.n_critic):
            real, fake = next(data)[0], G(torch.randn(n, args.z_dim, generator=noise)).detach()
            descend(D, d_loss(D, real, fake, noise))
        descend(G, g_loss(D(G(torch.randn(n, args.z_dim, generator=noise)))).mean())
    return {"G": G.state_dict(), "D": D.state_dict()}


def assert_close(saved: dict, expected: dict) -> None:
    """Compare networks of a checkpoint with their restatement."""
    for name, net in expected.items():
        for key, value in net.items():
            torch.testing.assert_close(saved[name][key], value, rtol=0, atol=1e-5, msg=key)


def same(a, b) -> bool:
    """Whether two checkpoints are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
