"""What the blocks of gca_gan.py cost: python tests/benchmarks/bench_gca_gan.py [--small]

1. Time of a training step (D and G update, cross-entropy, Adam) of DCGAN without a block, with the
   NL block and with each variant of GCA, in turns, each as a ratio to the one without.
2. Memory: what autograd keeps for the backward pass of D and G, and on CUDA the peak of a step.
3. The GCA block alone, forward and backward, against a plain transcription of its formulas: D~ as a
   diagonal matrix that is multiplied from both sides.

4. ConSinGAN, iterations/s at each stage, without a block and with GCA, against the plain algorithm:
   fakes anew for each update of D, an image a pass, torch's interpolation, plain Adam, losses read
   at every step. Beside it the time of an iteration on 12x12 pixels: what is not arithmetic.
5. ConSinGAN, seconds for 50 samples of 166x250 pixels.

--small: a quarter of the widths and of the batch, photographs of 80x120 pixels, for a machine
without a GPU. --photo: 4 and 5 only. On the CPU with one thread 4 counts the process's own time,
so that other work on the machine does not matter.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

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


def photo_args(*flags):
    model = ("--model", "consingan", "--log-every", "1000", "--sample-every", "0")
    return gca_gan.parse([*model, *flags])


def clock():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    alone = DEVICE.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def ours(args):
    """Seconds of an iteration at each stage, of train_consingan itself."""
    times, spent, collect = [], [[] for _ in range(args.stages)], gca_gan.Run.collect

    def timed(run, terms):
        out = collect(run, terms)
        times.append(clock())
        if (
            len(times) > 1 and (run.step - 1) % args.niter > 0
        ):  # the first one of a stage sets it up
            spent[(run.step - 1) // args.niter].append(times[-1] - times[-2])
        return out

    gca_gan.Run.collect = timed
    gca_gan.train_consingan(args)
    gca_gan.Run.collect = collect
    return [statistics.median(part) for part in spent]


def naive(args, stage):
    """Seconds of an iteration at a stage, of the algorithm written down as it is described."""
    resize, gca_gan.resize = (
        gca_gan.resize,
        lambda x, size: F.interpolate(x, size, mode="bicubic", align_corners=True),
    )
    G, D = gca_gan.pyramid_nets(args, gca_gan.load_pyramid(args), stage)
    G, D, spent = G.to(DEVICE), D.to(DEVICE), []
    g_opt = torch.optim.Adam(G.groups(args), args.g_lr, (0.5, 0.999))
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, (0.5, 0.999))
    real, fixed = G.stack("real")[-1], G.stack("z")
    for turn in range(args.niter):
        start = clock()
        noise = [z.to(DEVICE).contiguous() for z in G.noise(torch.randn)]
        for _ in range(args.n_critic):
            d_opt.zero_grad()
            fake = G(noise).detach()
            loss_real, loss_fake = -D(real).mean(), D(fake).mean()
            eps = torch.rand(1, 1, 1, 1, device=DEVICE)
            penalty = args.lambda_gp * gca_gan.pixel_penalty(D, real, fake, eps)
            (loss_real + loss_fake + penalty).backward()
            d_opt.step()
        g_opt.zero_grad()
        adv, rec = -D(G(noise)).mean(), F.mse_loss(G(fixed), real)
        (adv + args.lambda_rec * rec).backward()
        for _ in range(args.g_steps):
            g_opt.step()
        [value.item() for value in (loss_real, loss_fake, penalty, adv, rec)]
        spent.append(clock() - start)
    gca_gan.resize = resize
    return statistics.median(spent[1:])


def photo(count=5):
    """Tables of 4, seconds of 5."""
    width, height = (120, 80) if SMALL else (250, 166)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Image.effect_noise((width, height), 80).convert("RGB").save("a.png")
        Image.effect_noise((12, 12), 80).convert("RGB").save("tiny.png")
        tiny = ("--image", "tiny.png", "--stages", "1", "--min-size", "11", "--niter", "20")
        (floor,) = ours(photo_args(*tiny))
        print(f"ConSinGAN ({DEVICE}, {threads} threads): 12x12 pixels {floor * 1e3:.1f} ms")
        for block in ("none", "gca"):
            flags = ("--image", "a.png", "--block", block, "--niter", str(count))
            args = photo_args(*flags)
            sizes = gca_gan.pyramid_shapes(args, height, width)
            for stage, (size, fast) in enumerate(zip(sizes, ours(args))):
                slow = naive(args, stage)
                print(
                    f"  {block:5s} stage {stage} {size[0]:3d}x{size[1]:<3d} {1 / fast:7.2f} steps/s, "
                    f"plain {1 / slow:7.2f}, ratio {slow / fast:.2f}, not arithmetic "
                    f"{floor / fast:.0%}"
                )
        Image.effect_noise((250, 166), 80).convert("RGB").save("a.png")
        for block in ("none", "gca"):
            args = photo_args("--image", "a.png", "--block", block)
            G, _ = gca_gan.pyramid_nets(args, gca_gan.load_pyramid(args), args.stages - 1)
            G.to(DEVICE, memory_format=torch.channels_last)
            gca_gan.photo_samples(args, G, 2)
            spent = seconds(lambda: gca_gan.photo_samples(args, G, 50))
            print(f"  {block}: 50 samples of 166x250 in {spent:.1f} s")
        os.chdir("/")


if __name__ == "__main__":
    if "--photo" in sys.argv:
        photo()
        raise SystemExit
    steps()
    block()
    photo()
