"""What the blocks of gca_gan.py cost: python tests/benchmarks/bench_gca_gan.py [--small]

1. Time of a training step (D and G update, cross-entropy, Adam) of DCGAN without a block, with the
   NL block and with each variant of GCA, in turns, each as a ratio to the one without.
2. Memory: what autograd keeps for the backward pass of D and G, and on CUDA the peak of a step.
3. The GCA block alone, forward and backward, against a plain transcription of its formulas: D~ as a
   diagonal matrix that is multiplied from both sides.

--small: a quarter of the widths and a quarter of the batch, for a machine without a GPU.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gca_gan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = "--small" in sys.argv
WIDTH, BATCH = (16, 32) if SMALL else (64, 128)
CASES = {
    "none": {"block": "none"},
    "nl": {"block": "nl"},
    **{f"gca {v}": {"gca_variant": v} for v in ("nodes", "bottleneck", "gram", "gcn")},
}


def seconds(function):
    """Seconds of one call; what runs on the GPU is waited for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def trainer(flags):
    """A function that trains one step and returns the bytes that autograd kept for it."""
    torch.manual_seed(0)
    args = gca_gan.Args(g_ch=WIDTH, d_ch=WIDTH, **flags)
    G, D = gca_gan.Generator(args).to(DEVICE), gca_gan.Discriminator(args).to(DEVICE)
    g_opt, d_opt = (torch.optim.Adam(net.parameters(), 2e-4, fused=True) for net in (G, D))
    d_real, d_fake, g_fake = gca_gan.ADVERSARIAL["bce"]
    real = torch.rand(BATCH, 3, 64, 64, device=DEVICE) * 2 - 1

    def step(count=False):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        def noise():
            return torch.randn(BATCH, args.z_dim, device=DEVICE)

        with torch.no_grad():
            fake = G(noise())
        d_opt.zero_grad()
        (d_real(D(real)).mean() + d_fake(D(fake)).mean()).backward()
        d_opt.step()
        g_opt.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack if count else lambda t: t, lambda t: t):
            loss = g_fake(D(G(noise()))).mean()
        loss.backward()
        g_opt.step()
        return sum(kept.values())

    return step


def steps(rounds=7):
    trainers = {name: trainer(flags) for name, flags in CASES.items()}
    times, memory = {name: [] for name in CASES}, {}
    for turn in range(rounds + 2):
        for name, step in trainers.items():
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spent = seconds(step)
            if turn > 1:  # the first ones warm up
                times[name].append(spent)
            if DEVICE.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated()
    kept = {name: step(count=True) for name, step in trainers.items()}
    threads = torch.get_num_threads()
    print(f"training step ({DEVICE}, {threads} threads, widths {WIDTH}, batch {BATCH})")
    for name, spent in times.items():
        median, base = statistics.median(spent), statistics.median(times["none"])
        peak = f", peak memory ratio {memory[name] / memory['none']:.2f}" if memory else ""
        print(
            f"  {name:15s} {median * 1e3:8.1f} ms, time ratio {median / base:.2f}, kept for "
            f"backward {kept[name] / 1e6:.1f} MB, ratio {kept[name] / kept['none']:.2f}{peak}"
        )


def plain(net, x):
    """The block's formulas (variant nodes) as they are printed."""
    f, g, j, m = (layer(x).flatten(2) for layer in (net.f, net.g, net.j, net.m))
    n = f.shape[2]
    a = torch.exp(torch.einsum("bci,bcj->bji", f, g))
    a = a / a.sum(2, keepdim=True) + torch.eye(n, device=x.device)
    root = torch.diag_embed(a.sum(2) ** -0.5)
    y = root @ a @ root @ j.transpose(1, 2) @ net.theta.weight.T
    return net.alpha * net.v((m @ y).view_as(x)) + x


def block(rounds=15):
    torch.manual_seed(0)
    channels = 4 * WIDTH
    net = gca_gan.GCA(channels, (8, 8), gca_gan.Args()).to(DEVICE)
    torch.nn.init.constant_(net.alpha, 0.5)
    x = torch.randn(BATCH, channels, 8, 8, device=DEVICE)
    times = {"gca_gan.py": [], "as printed": []}
    with torch.no_grad():
        difference = ((net(x) - plain(net, x)).norm() / net(x).norm()).item()
    for turn in range(rounds + 2):
        for name, function in (("gca_gan.py", net), ("as printed", lambda x: plain(net, x))):
            spent = seconds(lambda: function(x).sum().backward())
            if turn > 1:
                times[name].append(spent)
    ours, theirs = (statistics.median(spent) for spent in times.values())
    print(
        f"block: gca_gan.py {ours * 1e3:.1f} ms, as printed {theirs * 1e3:.1f} ms, ratio "
        f"{theirs / ours:.2f}, difference {difference:.1e}"
    )


if __name__ == "__main__":
    steps()
    block()
