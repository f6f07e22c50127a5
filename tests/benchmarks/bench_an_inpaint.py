"""Cost of the second stage's modules: inference of one image and a training step, against `plain`.

    python tests/benchmarks/bench_an_inpaint.py                     # 256x256, full width, batch 4
    python tests/benchmarks/bench_an_inpaint.py --size 128 --width 8 --repeats 9

All in one process, taking turns; medians; "-" where memory ran out. A training step is one of phase
1, where the module's share is largest: no critic is in it. `module` is the module's own part of it,
forward and backward.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import an_inpaint
from an_inpaint import Args, Generator


def timed(device, work):
    """Seconds of one call, the device's queue drained; None where memory ran out."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return None


def works(refine, options, device):
    """The three things to time for one module, as functions."""
    args = Args(refine=refine, img_size=options.size, g_ch=options.width)
    torch.manual_seed(0)
    G = Generator(args).to(device)
    opt = torch.optim.Adam(G.parameters(), 1e-4, fused=True)
    real = torch.rand(options.batch, 3, options.size, options.size, device=device) * 2 - 1
    mask, quarter = torch.zeros_like(real[:, :1]), options.size // 4
    mask[..., quarter : 3 * quarter, quarter : 3 * quarter] = 1
    box = torch.full((options.batch, 2), quarter, device=device)
    maps = torch.randn(options.batch, 4 * options.width, quarter, quarter, device=device)
    small = torch.nn.functional.interpolate(mask, (quarter, quarter))

    def infer():
        with torch.no_grad():
            G.eval()(real[:1], mask[:1])

    def step():
        loss = an_inpaint.reconstruction_loss(args, *G.train()(real, mask), real, mask, box)
        (loss + an_inpaint.orthogonality(G)).backward()
        opt.step()
        opt.zero_grad()

    def module():
        x = maps.clone().requires_grad_()
        (G.train().module(x, small) if refine == "ca" else G.train().module(x)).sum().backward()
        opt.zero_grad()

    return {"infer": infer, "step": step, **({"module": module} if refine != "plain" else {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("size", 256), ("width", 32), ("batch", 4), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, kinds = torch.device(options.device), ("plain", "an", "sa", "ca")
    all_works = {kind: works(kind, options, device) for kind in kinds}
    times = {(kind, name): [] for kind in kinds for name in all_works[kind]}
    for repeat in range(options.repeats + 1):  # the first warms up
        for kind, name in times:
            times[kind, name] += [timed(device, all_works[kind][name])][: repeat > 0]
    medians = {k: None if None in v else statistics.median(v) for k, v in times.items()}
    print(f"{options.size}x{options.size}, width {options.width}, batch {options.batch}, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print("module  infer ms  / plain   step ms  / plain   module ms  of plain's step")
    for kind in kinds:
        cells = []
        for name in ("infer", "step", "module"):
            value, base = (medians.get((k, name)) for k in (kind, "plain"))
            base = medians["plain", "step"] if name == "module" else base
            cells += ["-" if value is None else f"{1e3 * value:.1f}"]
            cells += ["-" if None in (value, base) else f"{value / base:.3f}"]
        print(f"{kind:6} {cells[0]:>9} {cells[1]:>8} {cells[2]:>9} {cells[3]:>8} "
              f"{cells[4]:>11} {cells[5]:>8}")  # fmt: skip


if __name__ == "__main__":
    main()
