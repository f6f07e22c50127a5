"""Table 5 of the AN paper: inference time of AN and of self-attention, batch 1, 32 channels.

    python tests/benchmarks/bench_an_gan.py                        # 128^2 to 1024^2
    python tests/benchmarks/bench_an_gan.py --sides 128 256 --device cuda --repeats 50

Median milliseconds of the layers of an_gan.py in this process, one after another at each size:
eval mode without gradient, AN with 16 entities; then AN with self-sampling on, as in training.
"map" is self-attention that writes its attention map out, as the paper's did; "sdpa" the form that
an_gan.py trains, which PyTorch may or may not fuse. "-" stands for what does not fit into memory
(the map takes a quarter of the pixels squared, in fp32), "late" for what would take longer than
--limit seconds a call by the size before. Then ratios to AN, and AN's nanoseconds for a pixel, also
over those of the smallest size.

glibc gives blocks above 32 MB back to the system at once, and the system clears them anew at each
call: at 1024^2 that takes as long as AN itself. Here it is told to keep them, as CUDA's allocator
does; --glibc leaves it as it is.
"""

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import an_gan


def explicit_attention(layer: an_gan.PooledAttention, x: Tensor) -> Tensor:
    """The layer with its attention map (N, H*W, H*W/4) in memory."""
    value = torch.nn.functional.max_pool2d(layer.value(x), 2).flatten(2)
    out = value @ layer.attention_map(x).transpose(1, 2)
    return x + layer.gamma * layer.out(out.unflatten(2, x.shape[2:]))


def free_bytes() -> int:
    """Memory of the computer that can be had without swapping; 8 GB where it does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 << 30
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def keep_memory() -> None:
    """Have malloc serve large blocks from memory that it keeps; does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


@torch.no_grad()
def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two to warm up; fewer calls where one takes seconds."""
    times = []
    for i in range(2 + repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        if sum(times) > 20_000:
            break
    return statistics.median(times[2:] or times[-1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit", type=float, default=120, help="seconds of a call, see above")
    parser.add_argument("--glibc", action="store_true", help="leave malloc as it is, see above")
    options = parser.parse_args()
    if not options.glibc:
        keep_memory()
    device, channels = torch.device(options.device), options.channels
    torch.manual_seed(0)
    an = an_gan.AttentiveNorm(channels, an_gan.Args()).to(device).eval()
    attention = an_gan.PooledAttention(channels, bias=False).to(device).eval()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"torch {torch.__version__}, {device}{threads}, {channels} channels, median ms")
    head = ("size", "AN", "AN sampling", "map", "sdpa", "map/AN", "sdpa/AN", "AN ns/px", "growth")
    print(("{:>12}" * 9).format(*head))
    smallest, last = None, {}
    for side in options.sides:
        x = torch.randn(1, channels, side, side, device=device)
        cells = [milliseconds(lambda: an(x), device, options.repeats)]
        an.train()
        cells.append(milliseconds(lambda: an(x), device, options.repeats))
        an.eval()
        # Logits and their softmax are both in memory for a moment. On the CPU the system would end
        # the process in place of an error: such sizes are not tried there.
        fits = device.type == "cuda" or 2.2 * side**4 < free_bytes()
        for i, run in enumerate((lambda: explicit_attention(attention, x), lambda: attention(x))):
            late = last.get(i, 0) * side**4 > 1e3 * options.limit
            cell = "late" if fits and late else "-"
            if fits and not late:
                with contextlib.suppress(torch.OutOfMemoryError):
                    cell = milliseconds(run, device, options.repeats)
            if isinstance(cell, float):
                last[i] = cell / side**4
            cells.append(cell)
        pixel = 1e6 * cells[0] / side**2
        smallest = smallest or pixel
        cells += [cell / cells[0] if isinstance(cell, float) else cell for cell in cells[2:4]]
        cells += [pixel, pixel / smallest]
        text = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells]
        print(("{:>12}" * 9).format(f"{side}^2", *text), flush=True)


if __name__ == "__main__":
    main()
