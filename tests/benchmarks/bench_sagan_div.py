"""Attention of sagan_div.py through scaled_dot_product_attention against the explicit matrix.

    python tests/benchmarks/bench_sagan_div.py [BATCH]     # batch: 64 on a GPU, 2 on the CPU

Forward and backward at 32x32 and 64x64, the two forms alternating in one process; the peak memory
of each beyond its start, in a process of its own; and which kernel PyTorch took.
"""

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from sagan_div import PooledAttention, SelfAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Kernels(TorchDispatchMode):
    """Names of the attention kernels called, and the most elements of any tensor made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "attention" in func.__name__:
            self.names.add(func.__name__.split(".")[0].strip("_"))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return out


def explicit(block, x):
    """The block's formula with its matrix of weights."""
    value = block.value(x)
    value = F.max_pool2d(value, 2) if isinstance(block, PooledAttention) else value
    out = value.flatten(2) @ block.attention_map(x).to(value).transpose(1, 2)
    out = out.unflatten(2, x.shape[2:])
    return x + block.gamma * (block.out(out) if isinstance(block, PooledAttention) else out)


def setting(kind, side, batch):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    block = kind(64, bias=False).to(DEVICE)
    block.gamma.data.fill_(0.5)
    return block, torch.randn(batch, 64, side, side, device=DEVICE)


def step(form, block, x):
    block.zero_grad()
    out = form(block, x)
    out.square().mean().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return out.detach()


FORMS = {"sdpa": lambda block, x: block(x), "explicit": explicit}


def resident(key):
    """Bytes of a line of /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak(form, kind, side, batch, queue):
    """Bytes at the peak of one step beyond those before it."""
    block, x = setting(kind, side, batch)
    step(FORMS[form], *setting(kind, 8, 1))  # libraries are loaded
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(FORMS[form], block, x)
        queue.put(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        step(FORMS[form], block, x)
        queue.put(resident("VmHWM") - before)


def measure(kind, side, batch, rounds=5):
    block, x = setting(kind, side, batch)
    times, outs = {name: [] for name in FORMS}, {}
    for turn in range(rounds + 1):
        for name, form in FORMS.items():
            start = time.perf_counter()
            outs[name] = step(form, block, x)
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    with torch.no_grad(), Kernels() as kernels:
        block(x[:1])
    memory, context = {}, multiprocessing.get_context("spawn")
    for name in FORMS:
        queue = context.Queue()
        child = context.Process(target=peak, args=(name, kind, side, batch, queue))
        child.start()
        memory[name] = queue.get() / 1e6
        child.join()
    ratio = statistics.median(times["explicit"]) / statistics.median(times["sdpa"])
    difference = (outs["sdpa"] - outs["explicit"]).abs().max()
    matrix = side**4 // (4 if kind is PooledAttention else 1)
    print(
        f"{kind.__name__} {side}x{side} batch {batch} ({DEVICE}): {ratio:.2f} x the speed, peak "
        f"{memory['sdpa']:.0f} MB against {memory['explicit']:.0f} MB, difference {difference:.0e}, "
        f"kernel {' '.join(kernels.names) or 'math'}, largest tensor of a sample {kernels.largest} "
        f"elements (its matrix has {matrix})",
        flush=True,
    )


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 64 if DEVICE == "cuda" else 2
    for kind in (PooledAttention, SelfAttention):
        for side in (32, 64):
            measure(kind, side, size)
