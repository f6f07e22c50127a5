"""What the training loops cost: steps/s of train(), of the bare updates, and of the naive form.

    python tests/benchmarks/bench_loops.py                       # giu_gan, sagan_dogs, an_gan
    python tests/benchmarks/bench_loops.py --all --steps 12      # every model of every script
    python tests/benchmarks/bench_loops.py --scripts giu_gan --flags="--cuda-graphs --amp bf16"

In one process, in turns, `--rounds` times; medians. The three are the same networks, losses and
optimisers:

bare    the updates alone, on one fixed batch and fixed noise: no data, bookkeeping or log
train   what the script does
compile the same with --compile, and cuda_graphs with --cuda-graphs
naive   what many repositories do: a DataLoader that decodes every image at every step, `.item()` of
        every term at every step, attention with its map in memory, involution by unfold, AN's
        regions one by one

Files are JPEGs of the size that is trained at. Networks are the paper's; 32x32 for giu_gan and
an_gan, 64x64 for the others; of an_inpaint, which has no naive form, phase 2. With --profile, also the share of each kind of operation in the time
of train(), and multiply-adds a second against those of a large matrix product and convolution.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

USUAL = [("giu_gan", ""), ("sagan_dogs", ""), ("an_gan", "--img-size 32")]
ALL = [
    *[("giu_gan", f"--model {m}") for m in "giu wgan-gp dcgan lsgan sngan sagan".split()],
    *[("sagan_div", f"--method {m} --channels 3") for m in "a b c d dcgan wgan-div sngan".split()],
    *[("sagan_dogs", f"--attention {m}") for m in ("full", "none", "no-g", "no-d")],
    *[("gca_gan", f"--model dcgan --block {m}") for m in ("none", "nl", "gca")],
    *[("gca_gan", f"--model sagan --block {m}") for m in ("nl", "gca")],
    *[("an_gan", f"--img-size 32 --model {m}") for m in ("an", "sagan", "sngan-star", "sngan")],
    *[("an_inpaint", f"--img-size 64 --refine {m}") for m in ("an", "ca", "sa", "plain", "none")],
]
MORE = {"an_gan": "--num-classes 10", "an_inpaint": "--phase1-steps 1 --phase2-steps 999"}


def photographs(folder, side, count=512):
    """JPEGs of smooth noise in ten class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        path = folder / f"{i % 10}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((side, side), Image.Resampling.BICUBIC).save(path)
    return folder


def explicit_attention(query, key, value):
    """attend() with its map in memory."""
    weights = (query.flatten(2).transpose(1, 2) @ key.flatten(2)).softmax(-1)
    return (value.flatten(2) @ weights.transpose(1, 2)).unflatten(2, query.shape[2:])


def unfolded(x, kernel):
    """Involution by a K*K-fold copy of x."""
    n, c, height, width = x.shape
    groups, taps = kernel.shape[1:3]
    size = int(taps**0.5)
    unfold = F.unfold(x, size, padding=size // 2)
    unfold = unfold.view(n, groups, c // groups, taps, height, width)
    return (kernel[:, :, None] * unfold).sum(3).flatten(1, 2)


def region_by_region(self, v, s):
    """Eq. 5 of AN, one region after the other, each a map of the size of v."""
    out = 0
    for i in range(s.shape[1]):
        share = s[:, i : i + 1]
        mass = share.sum(2, keepdim=True) + 1e-6
        mean = (share * v).sum(2, keepdim=True) / mass
        var = (share * (v - mean).square()).sum(2, keepdim=True) / mass
        normal = (v - mean) / (var + 1e-5).sqrt()
        out = out + share * (normal * self.beta[i][:, None] + self.alpha[i][:, None])
    return out


@contextlib.contextmanager
def replaced(places):
    """Other functions for (object, name) pairs, for a while; those that do not exist stay away."""
    kept = {(o, name): getattr(o, name) for o, name in places if hasattr(o, name)}
    for o, name in kept:
        setattr(o, name, places[o, name])
    try:
        yield
    finally:
        for (o, name), value in kept.items():
            setattr(o, name, value)


def guise(module, kind, stamps, files):
    """What replaces the functions of a script, with the time of each step noted in `stamps`."""
    run, reader = module.Run, "endless_batches"
    reader = reader if hasattr(module, reader) else "endless_crops"
    endless = getattr(module, reader)
    collect, draw = run.collect, run.draw

    def stamped(self, terms):
        if kind == "naive":
            for term in terms.values():
                term.item()
        if self.device.type == "cuda" and self.step % 8 == 0:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        if kind != "bare":
            return collect(self, terms)
        self.step += 1
        self.rows, self.keys = [torch.zeros(len(terms))], list(terms)
        return False

    places = {(run, "collect"): stamped}
    if kind == "bare":
        noise = {}

        def fixed(self, sampler, *shape):
            if (sampler, shape) not in noise:
                noise[sampler, shape] = draw(self, sampler, *shape)
            return noise[sampler, shape]

        places[run, "draw"] = fixed
        places[module, reader] = lambda *a: itertools.repeat(next(endless(*a)))
    if kind == "naive":

        def loaded(images, labels, args, device, index):
            change = torchvision.transforms.Compose([
                torchvision.transforms.Resize(args.img_size), torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize(0.5, 0.5),
            ])  # fmt: skip
            # Empty: the folder of the cache, which is the last class.
            source = torchvision.datasets.ImageFolder(str(files), change, allow_empty=True)
            loader = DataLoader(source, args.batch_size, shuffle=True, drop_last=True)
            while True:
                for real, y in loader:
                    yield real.to(device), y.to(device)

        places[module, reader] = loaded
        places[module, "attend"] = explicit_attention
        places[module, "involution"] = unfolded
        if hasattr(module, "AttentiveNorm"):
            places[module.AttentiveNorm, "regional_norm"] = region_by_region
    return places


def arguments(module, flags, batch, steps, data, out):
    """The script's Args for a run of so many steps."""
    argv = ["--dataset", "folder", "--data-dir", str(data), "--out-dir", str(out), "--eval-every",
            "0", "--sample-every", "0", "--save-every", str(10**9), "--log-every", "10",
            "--total-steps", str(steps), "--batch-size", str(batch), "--num-workers", "0",
            *shlex.split(flags)]  # fmt: skip
    return tyro.cli(module.Args, args=argv)


def rate(module, kind, args, files):
    """Steps/s of train() in one guise, without its first two steps."""
    stamps = []
    if kind in ("compile", "cuda_graphs"):
        setattr(args, kind, True)
    with replaced(guise(module, kind, stamps, files)), redirect_stdout(io.StringIO()):
        module.train(args)
    return (len(stamps) - 3) / (stamps[-1] - stamps[2])


def peak(device):
    """Multiply-adds a second, in billions, of a matrix product and of a convolution of this size."""
    a = torch.randn(1536, 1536, device=device)
    conv, x = torch.nn.Conv2d(256, 256, 3, padding=1).to(device), torch.randn(32, 256, 16, 16)
    x, best = x.to(device), []
    with torch.no_grad():
        for work, macs in ((lambda: a @ a, 1536**3), (lambda: conv(x), 32 * 256 * 9 * 256 * 256)):
            times = []
            for _ in range(12):
                start = time.perf_counter()
                work()
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            best.append(macs / statistics.median(times) / 1e9)
    return best


class NoTracker(contextlib.nullcontext):
    """For FlopCounterMode, whose own tracker of modules refuses autograd.grad."""

    parents = {"Global"}


def profile(module, args, batch_rate, device):
    """Where the time of train() goes, and how much of the machine's arithmetic it uses."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoTracker()
    with counter, redirect_stdout(io.StringIO()):
        module.train(args("count"))
    macs = counter.get_total_flops() / 2 / 4 * batch_rate / 1e9
    product, convolution = peak(device)
    print(f"  {macs:.0f} G multiply-adds/s: {macs / product:.0%} of a matrix product's {product:.0f},"
          f" {macs / convolution:.0%} of a convolution's {convolution:.0f}")  # fmt: skip
    with torch.profiler.profile() as events, redirect_stdout(io.StringIO()):
        module.train(args("profile"))
    own = sorted(((e.self_cpu_time_total, e.key) for e in events.key_averages()), reverse=True)
    whole = sum(spent for spent, _ in own)
    print("  " + ", ".join(f"{key} {spent / whole:.0%}" for spent, key in own[:8]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=[], help="these alone")
    parser.add_argument("--all", action="store_true", help="every model of every script")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["bare", "train", "naive"])
    parser.add_argument("--flags", default="", help="more flags of the scripts")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}{threads}, batch {options.batch_size}, steps/s")
    print(f"{'':44}" + "".join(f"{kind:>9}" for kind in options.kinds))
    with tempfile.TemporaryDirectory() as folder:
        folder, number = Path(folder), itertools.count()
        for script, model in ALL if options.all else USUAL:
            if options.scripts and script not in options.scripts:
                continue
            module = importlib.import_module(script)
            flags = f"{model} {MORE.get(script, '')} {options.flags}"
            side = arguments(module, flags, 1, 1, folder, folder).img_size
            data = folder / f"photographs-{side}"
            if not data.exists():
                photographs(data, side)

            def args(name, steps=4, flags=flags, module=module, data=data):
                out = folder / f"{name}-{next(number)}"
                return arguments(module, flags, options.batch_size, steps, data, out)

            rates = {kind: [] for kind in options.kinds}
            for _ in range(options.rounds):
                for kind, found in rates.items():
                    found.append(rate(module, kind, args(kind, options.steps + 2), data))
            middle = {kind: statistics.median(found) for kind, found in rates.items()}
            line = f"{script} {model}".ljust(44) + "".join(f"{v:9.2f}" for v in middle.values())
            if "train" in middle and "bare" in middle:
                line += f"  train / bare {middle['train'] / middle['bare']:.1%}"
            for kind in ("naive", "compile", "cuda_graphs"):
                if "train" in middle and kind in middle:
                    line += f"  train / {kind} {middle['train'] / middle[kind]:.2f}"
            print(line, flush=True)
            if options.profile:
                profile(module, args, middle["train"], device)


if __name__ == "__main__":
    main()
