"""Table 5 of the AN paper: inference time of AN and of self-attention, batch 1, 32 channels.

    python tests/benchmarks/bench_an_gan.py                        # 128^2 to 1024^2
    python tests/benchmarks/bench_an_gan.py --sides 128 256 --device cuda

Median milliseconds of the layers of an_gan.py in this process, in eval mode without gradient: AN
with 16 entities; AN with self-sampling, as in training; self-attention (SA) that writes its map
out, as the paper's did. "-" stands for a map, a quarter of the pixels squared in fp32, that does
not fit into memory. Last, AN's nanoseconds for a pixel, and their ratio to the smallest size's.

glibc gives blocks above 32 MB back to the system at once, and clears them anew at each call: at
1024^2 that takes as long as AN itself. Here it is told to keep them, as CUDA's allocator does.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import an_gan


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free, or of the computer that is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_map(layer: an_gan.PooledAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer with its attention map (N, HW, HW / 4) in memory."""
    key, value = (F.max_pool2d(f(x), 2).flatten(2) for f in (layer.key, layer.value))
    attn = (layer.query(x).flatten(2).mT @ key).softmax(dim=-1)
    return x + layer.gamma * layer.out((value @ attn.mT).unflatten(2, x.shape[2:]))


@torch.no_grad()
def milliseconds(layer: Callable, x: torch.Tensor, repeats: int = 10) -> float:
    """Median time of a call after two to warm up; fewer calls where one takes seconds."""
    times = []
    while len(times) < 2 + repeats and sum(times) < 20_000:
        start = time.perf_counter()
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:] or times[-1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    torch.manual_seed(0)
    device, channels = torch.device(options.device), 32
    an = an_gan.AttentiveNorm(channels, an_gan.Args()).to(device)
    attention = an_gan.PooledAttention(channels).to(device)
    print(("{:>12}" * 6).format("size", "AN", "AN sampling", "SA", "ns/pixel", "growth"))
    sa, smallest = partial(write_map, attention), None
    for side in options.sides:
        x = torch.randn(1, channels, side, side, device=device)
        times = [milliseconds(layer, x) for layer in (an.eval(), an.train())]
        cells = [f"{ms:.2f}" for ms in times]
        fits = 2.2 * side**4 < free_bytes(device)  # the logits and their softmax
        cells.append(f"{milliseconds(sa, x):.2f}" if fits else "-")
        pixel = 1e6 * times[0] / side**2
        smallest = smallest or pixel
        cells += [f"{pixel:.0f}", f"{pixel / smallest:.2f}"]
        print(("{:>12}" * 6).format(f"{side}^2", *cells), flush=True)


if __name__ == "__main__":
    main()
