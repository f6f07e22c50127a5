"""What the training loops cost: steps/s of train(), and the share of its time that is no update.

    python tests/benchmarks/bench_loops.py                                # one row of every script
    python tests/benchmarks/bench_loops.py --rows "giu_gan --model sagan"
    python tests/benchmarks/bench_loops.py --rows giu_gan --against elsewhere/giu_gan.py

Each measurement trains twice, for 2 and for 2 + `--steps` steps, and takes the difference: start,
decoding and the first step, which chooses kernels, do not count. `--against FILE` trains another
version of the script in turns with this one and prints the ratio of their speeds. On a busy machine
--cpu-time counts the process's own time.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    "giu_gan", "giu_gan --model sagan", "sagan_div", "sagan_dogs", "gca_gan --block gca",
    "an_gan --img-size 32 --batch-size 16", "an_inpaint --img-size 64 --batch-size 4",
]  # fmt: skip
ALWAYS = "--dataset shapes --eval-every 0 --sample-every 0 --log-every 1000 --save-every 1000"


def load(path: Path):
    """A script as a module of its own, with the fid.py that lies beside it."""
    for name, file in (("fid", path.with_name("fid.py")), (path.stem, path)):
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def timed(function, clock, spent):
    """The function, with the time of its calls added to spent[0]."""

    def call(*args, **kwargs):
        start = clock()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += clock() - start

    return call


def train(module, flags, steps, clock):
    """Seconds of a training of so many steps, and of its data and log."""
    name = "photo_batches" if hasattr(module, "photo_batches") else "batches"
    spent, batches, log = [0.0], getattr(module, name), module.Run.log

    def watched(*args):
        stream = batches(*args)
        fetch = timed(lambda: next(stream), clock, spent)
        while True:
            yield fetch()

    setattr(module, name, watched)
    module.Run.log = timed(log, clock, spent)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        args = module.parse([*flags, "--total-steps", str(steps), "--out-dir", folder])
        start = clock()
        module.train(args)
        total = clock() - start
    setattr(module, name, batches)
    module.Run.log = log
    return total, spent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another version of the script, lean as well")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as cache:
        for row in options.rows:
            script, *flags = f"{row} {ALWAYS} --cache-dir {cache}".split()
            modules = [load(ROOT / f"{script}.py")]
            modules += [load(options.against)] if options.against else []
            rates, shares = [[] for _ in modules], []
            for module in modules:
                train(module, flags, 1, clock)  # decodes the data set
            for _ in range(options.rounds):
                for module, found in zip(modules, rates):
                    short, long = (train(module, flags, n, clock) for n in (2, 2 + options.steps))
                    found.append(options.steps / (long[0] - short[0]))
                    if module is modules[0]:
                        shares.append((long[1] - short[1]) / (long[0] - short[0]))
            text = f"{statistics.median(rates[0]):.3g} steps/s, data and log "
            text += f"{statistics.median(shares):.1%} of the time"
            if options.against:
                ratio = statistics.median(a / b for a, b in zip(*rates))
                text += f", {ratio:.3f} times the speed of {options.against}"
            print(f"{row}: {text}", flush=True)


if __name__ == "__main__":
    main()
