"""What giu_gan.py's involution costs: python tests/benchmarks/bench_giu_gan.py [--batch-size 64]

Shift-and-accumulate against unfold in the same process, forward and backward, and what either keeps
for backward. The training loop is bench_loops.py's.
"""

import argparse
import statistics
import sys
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    involution(options.batch_size)
