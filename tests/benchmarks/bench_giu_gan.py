"""What giu_gan.py's loop and its involution cost, each beside a peer in the same process.

    python tests/benchmarks/bench_giu_gan.py [--steps 40] [--batch-size 64]

loop: steps/s of train() (data, noise, bookkeeping, logging) against the same updates on one fixed
batch and fixed noise with nothing else. involution: shift-and-accumulate against unfold, forward
and backward, and what either keeps for backward.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import giu_gan  # noqa: E402


def unfolded(x, kernel):
    """The usual form: a K*K-fold copy of x."""
    n, c, height, width = x.shape
    groups, taps = kernel.shape[1:3]
    size = int(taps**0.5)
    unfold = F.unfold(x, size, padding=size // 2)
    unfold = unfold.view(n, groups, c // groups, taps, height, width)
    return (kernel[:, :, None] * unfold).sum(3).flatten(1, 2)


def involution(batch):
    for channels, side, size in ((256, 4, 3), (256, 8, 3), (64, 16, 3), (256, 4, 7)):
        x = torch.randn(batch, channels, side, side, requires_grad=True)
        kernel = torch.randn(batch, channels // 16, size**2, side, side, requires_grad=True)
        times, saved = {unfolded: [], giu_gan.involution: []}, {}
        for _ in range(15):
            for form, spent in times.items():
                kept = {}

                def pack(tensor, kept=kept):
                    storage = tensor.untyped_storage()
                    kept[storage.data_ptr()] = storage.nbytes()
                    return tensor

                start = time.perf_counter()
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    y = form(x, kernel)
                y.square().sum().backward()
                spent.append(time.perf_counter() - start)
                saved[form] = sum(kept.values()) / 1e6
        peer, ours = (statistics.median(times[form]) * 1e3 for form in times)
        memory = " / ".join(f"{saved[form]:.1f}" for form in times)
        print(
            f"involution {channels}@{side}x{side} K{size}: unfold / shift {peer:.1f} / {ours:.1f} ms"
            f" = {peer / ours:.2f}x, kept for backward {memory} MB"
        )


def steps_per_second(args, bare):
    """Steps/s of one run of train(); bare: fixed batch and noise, no bookkeeping, no log."""
    whole = {name: getattr(giu_gan.Run, name) for name in ("draw", "collect", "seed")}
    endless, stamps = giu_gan.endless_batches, []

    def collect(self, terms):
        stamps.append(time.perf_counter())
        if not bare:
            return whole["collect"](self, terms)
        self.step += 1
        self.rows, self.keys = [torch.zeros(len(terms))], list(terms)
        return False

    giu_gan.Run.collect = collect
    if bare:
        kept = {}

        def draw(self, sampler, *shape):
            if shape not in kept:
                kept[shape] = whole["draw"](self, sampler, *shape)
            return kept[shape]

        def batches(*a):
            return itertools.repeat(next(endless(*a)))

        giu_gan.Run.draw, giu_gan.endless_batches = draw, batches
    try:
        giu_gan.train(args)
    finally:
        giu_gan.endless_batches = endless
        for name, function in whole.items():
            setattr(giu_gan.Run, name, function)
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


def loop(steps, batch, folder):
    rates = {False: [], True: []}
    for i, bare in enumerate([False, True] * 3):
        args = giu_gan.Args(
            dataset="shapes", data_dir=f"{folder}/data", out_dir=f"{folder}/{i}", batch_size=batch,
            total_steps=steps, eval_every=0, sample_every=0, save_every=10**9, log_every=10,
        )  # fmt: skip
        rates[bare].append(steps_per_second(args, bare))
    full, alone = (statistics.median(rates[bare]) for bare in (False, True))
    print(f"loop: {full:.3f} steps/s, bare updates {alone:.3f} steps/s: {full / alone:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    involution(options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        loop(options.steps, options.batch_size, folder)
