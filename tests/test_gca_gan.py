"""gca_gan.py: the NL and GCA blocks against loops, Table 1's networks, ConSinGAN, its readers."""

import copy
import io
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, same, state
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

import gca_gan
from gca_gan import GCA, Args, Discriminator, Generator, NonLocal, edge_weights, parse

CPU, SIZE = torch.device("cpu"), (2, 3)
KINDS = [*itertools.product(("nodes", "bottleneck"), (False, True)), ("gcn", False)]
ALL = [*KINDS, ("nl", False)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def command(call):
    """Run a command line in this process; return what it says, to stderr where it must fail."""

    def run(*flags, code=0):
        found, out, err = call("gca_gan", "--device", "cpu", *map(str, flags))
        assert found == code, err
        return err if code else out

    return run


def block(variant="nodes", transpose=False, size=SIZE, gain=0.7, **flags):
    """An open block (gain not 0) of 8 channels in float64."""
    args = Args(gca_variant=variant, gca_y_transpose=transpose, gca_k=4, **flags)
    net = (NonLocal(8, args) if variant == "nl" else GCA(8, size, args)).double()
    nn.init.constant_(getattr(net, net.gain_name), gain)
    return net


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---- Sizes and costs -----------------------------------------------------------------------------
@pytest.mark.parametrize(("variant", "channels", "size", "params", "cost"), [
    ("nodes", 256, (8, 8), 167_937, 12_189_696),  # printed: 12.19 M
    ("bottleneck", 256, (8, 8), 157_697, 11_403_264),  # 11.40 M
    ("gcn", 256, (8, 8), 99_329, 6_619_136),  # 6.62 M
    ("nl", 256, (8, 8), 32_769, 2_359_296),  # 2.36 M
    ("nodes", 512, (8, 8), 626_689, 42_729_472),  # C / k = H W: both readings agree
    ("bottleneck", 512, (8, 8), 626_689, 42_729_472),
    ("nodes", 64, (26, 38), 1_048_593, 266_807_424),  # more pixels than channels: from
    ("bottleneck", 64, (26, 38), 17_633, 80_905_344),  # M on, 2.1 G for nodes otherwise
    ("gcn", 64, (26, 38), 6_209, 21_751_808),
])  # fmt: skip
def test_parameters_and_macs_of_the_blocks(variant, channels, size, params, cost):
    for transpose in (False, True):
        args = Args(gca_variant=variant, gca_y_transpose=transpose)
        net = NonLocal(channels, args) if variant == "nl" else GCA(channels, size, args)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.randn(1, channels, *size))
        assert (parameters(net), counter.get_total_flops() / 2) == (params, cost)


@pytest.mark.parametrize(
    ("model", "g", "d"), [("dcgan", 3_576_704, 2_765_568), ("sagan", 3_807_043, 2_764_737)]
)
@pytest.mark.parametrize(("name", "more"), [("none", 0), ("nl", 32_769), ("gca", 167_937)])
def test_parameters_of_every_row(model, g, d, name, more):
    args = parse(["--model", model, "--block", name])
    assert (parameters(Generator(args)), parameters(Discriminator(args))) == (g + more, d + more)


@pytest.mark.parametrize("block_in", ["both", "g", "d"])
@pytest.mark.parametrize("name", ["none", "nl", "gca"])
@pytest.mark.parametrize("size", [32, 128])
def test_shapes_and_place_of_the_block(name, block_in, size):
    args = Args(block=name, block_in=block_in, img_size=size, g_ch=4, d_ch=4, gca_k=1)
    G, D, inputs = Generator(args), Discriminator(args), []
    x = torch.randn(2, args.z_dim)
    for before, layer in itertools.pairwise([None, *G, *D]):
        if isinstance(layer, gca_gan.Gated):
            inputs.append((type(before), x.shape[2:]))
        x = layer(x)
        assert layer is not G[-1] or x.shape == (2, 3, size, size)
    g, d = [(nn.ReLU, (8, 8))], [(nn.LeakyReLU, (8, 8))]
    assert inputs == ([] if name == "none" else {"both": g + d, "g": g, "d": d}[block_in])
    assert x.shape == (2,)


# ---- The blocks against loops --------------------------------------------------------------------
def conv(layer, x):
    """A 1x1 convolution of columns x (C, n)."""
    return layer.weight.detach().numpy()[:, :, 0, 0] @ x


def loop_edges(net, x, axis="i"):
    """A of columns x (C, n) by loops; axis "j" normalises over the wrong index."""
    f, g, n = conv(net.f, x), conv(net.g, x), x.shape[1]
    a = np.zeros((n, n))
    for j in range(n):
        for i in range(n):
            over = [(k, j) for k in range(n)] if axis == "i" else [(i, k) for k in range(n)]
            total = sum(math.exp(f[:, p] @ g[:, q]) for p, q in over)
            a[j, i] = math.exp(f[:, i] @ g[:, j]) / total
    return a


def loop_gca(net, x, axis="i"):
    """o of one sample x (C, H, W), with sums written out."""
    size, x = x.shape[1:], x.reshape(len(x), -1)
    n, a = x.shape[1], loop_edges(net, x, axis)
    a = (a if net.binarize == "off" else (a > 1 / n).astype(float)) + np.eye(n)
    degree = [sum(a[j, i] for i in range(n)) for j in range(n)]
    hat = [[a[j, i] / math.sqrt(degree[j] * degree[i]) for i in range(n)] for j in range(n)]
    J, theta = conv(net.j, x).T, net.theta.weight.detach().numpy().T
    y = np.zeros((n, theta.shape[1]))
    for j in range(n):
        for e in range(theta.shape[1]):
            for i in range(n):
                y[j, e] += hat[j][i] * sum(J[i, d] * theta[d, e] for d in range(len(theta)))
    if net.variant == "gcn":
        z = conv(net.m, y.T)
    else:
        m, z = conv(net.m, x), np.zeros_like(x)
        for c in range(len(z)):
            for q in range(n):
                z[c, q] = sum(m[c, i] * (y[q, i] if net.y_transpose else y[i, q]) for i in range(n))
    return (net.alpha.item() * conv(net.v, z) + x).reshape(-1, *size)


@pytest.mark.parametrize("binarize", ["off", "ste", "hard"])
@pytest.mark.parametrize("size", [SIZE, (3, 4)])  # fewer pixels than channels, and more
@pytest.mark.parametrize(("variant", "transpose"), KINDS)
def test_gca_is_the_loops(variant, transpose, size, binarize):
    net = block(variant, transpose, size, gca_binarize=binarize)
    x = torch.randn(1, 8, *size, dtype=torch.float64)
    expected = loop_gca(net, x[0].numpy())
    np.testing.assert_allclose(net(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12)
    # The test sees a softmax over the wrong axis, and the orientation of Y.
    assert abs(loop_gca(net, x[0].numpy(), axis="j") - expected).max() > 1e-4
    net.y_transpose = not transpose
    assert variant == "gcn" or (net(x)[0] - torch.from_numpy(expected)).abs().max() > 1e-3


def test_nl_is_the_loops():
    net, x = block("nl"), torch.randn(1, 8, 2, 4, dtype=torch.float64)
    columns = x[0].flatten(1).numpy()
    out = conv(net.h, columns) @ loop_edges(net, columns).T
    expected = 0.7 * conv(net.v, out).reshape(8, 2, 4) + x[0].numpy()
    np.testing.assert_allclose(net(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("variant", "transpose"), ALL)
def test_gcn_and_nl_commute_with_permutations_and_take_any_size(variant, transpose):
    net, x = block(variant, transpose), torch.randn(2, 8, *SIZE, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    permuted = lambda t: t.flatten(2)[:, :, order].unflatten(2, SIZE)  # noqa: E731
    gap = (net(permuted(x)) - permuted(net(x))).abs().max()
    if variant in ("gcn", "nl"):
        assert gap < 1e-12 and net(x.transpose(2, 3)).shape == (2, 8, 3, 2)
    else:
        assert gap > 1e-3
        with pytest.raises(ValueError, match=r"\(2, 3\), got \(3, 2\); gcn takes any"):
            net(x.transpose(2, 3))


# ---- The gain, the gradients ---------------------------------------------------------------------
@pytest.mark.parametrize(("variant", "transpose"), ALL)
def test_the_identity_at_first_and_the_gradients_of_two_steps(variant, transpose):
    net = block(variant, transpose, gain=0.0)
    x = torch.randn(2, 8, *SIZE, dtype=torch.float64)
    assert torch.equal(net(x), x)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for first in (True, False):
        opt.zero_grad()
        net(x).mul(torch.randn_like(x)).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad.any() == (name == net.gain_name or not first), name
        opt.step()


def test_straight_through_and_hard_edges():
    x = torch.randn(2, 8, *SIZE, dtype=torch.float64)
    net, hard = block(), block(gca_binarize="hard")
    f, g = net.f(x).flatten(2), net.g(x).flatten(2)
    weight, weights = torch.randn(2, 6, 6, dtype=torch.float64), [net.f.weight, net.g.weight]
    loss = lambda binarize: (edge_weights(f, g, binarize) * weight).sum()  # noqa: E731
    pair = [torch.autograd.grad(loss(kind), weights, retain_graph=True) for kind in ("ste", "off")]
    torch.testing.assert_close(*pair)  # backward as if A were soft
    assert pair[0][0].any() and pair[0][1].any()
    hard(x).sum().backward()
    assert [k for k, p in hard.named_parameters() if p.grad is None] == ["f.weight", "g.weight"]


# ---- Networks and losses -------------------------------------------------------------------------
def test_start_of_dcgan_and_sagan():
    for layer in Discriminator(Args()).modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            assert layer.weight.std().item() == pytest.approx(0.02, abs=1e-3) and layer.bias is None
        if isinstance(layer, GCA):
            bound = math.sqrt(6 / 128)  # Glorot's for 64 x 64
            assert 0.9 * bound < layer.theta.weight.abs().max() <= bound and layer.alpha == 0
    args = parse(["--model", "sagan", "--img-size", "32", "--g-ch", "8", "--d-ch", "8"])
    for net, x in ((Generator(args), torch.randn(4, 128)),
                   (Discriminator(args), torch.randn(4, 3, 32, 32))):  # fmt: skip
        for _ in range(100):
            net(x)
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        layers = [layer for layer in net.eval().modules() if isinstance(layer, kinds)]
        assert len(layers) == 4 + 6  # of the block f, g, j, m, v and Theta
        for layer in layers:
            weight = layer.weight.detach()
            weight = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
            assert abs(torch.linalg.matrix_norm(weight.flatten(1), 2) - 1) < 0.05


def test_gcn_starts_with_a_residual_that_counts():
    args = Args(gca_variant="gcn")
    net, x = GCA(64, (26, 38), args), torch.randn(1, 64, 26, 38).relu()
    gca_gan.start_weights(args, net)
    net(x)
    assert net.ratio > 0.05
    for layer in (net.f, net.g, net.j, net.m, net.v):
        nn.init.normal_(layer.weight, std=0.02)
    net(x)
    assert net.ratio < 0.002  # N(0, 0.02), DCGAN's start, would leave it idle


# ---- Command line --------------------------------------------------------------------------------
def test_a_row_brings_its_settings_and_flags_win(recwarn):
    keys = ("loss", "z_dim", "batch_size", "g_lr", "d_lr", "beta1", "beta2", "total_steps")
    settings = lambda *flags: [getattr(parse([*flags]), key) for key in keys]  # noqa: E731
    assert settings() == ["bce", 100, 128, 2e-4, 2e-4, 0.5, 0.999, 39_550]
    assert settings("--dataset", "lsun-church")[-1] == 24_650
    sagan = ["hinge", 128, 64, 1e-4, 4e-4, 0.0, 0.9, 100_000]
    assert settings("--model", "sagan", "--dataset", "lsun-church") == sagan
    assert settings("--beta1", "0.5", "--model", "sagan")[5:7] == [0.5, 0.9]
    photo = parse(["--image", "a.jpg"])  # alone
    assert (photo.model, photo.dataset, photo.block) == ("consingan", "image", "none")
    assert photo == parse(["--image", "a.jpg", "--dataset", "image"])
    assert not recwarn.list  # tyro warns of a default that is not among the choices


def test_rows_have_names_of_their_own():
    names = {
        "": "dcgan-gca",
        "--gca-k 4": "dcgan-gca-k-4",
        "--block nl --block-in g": "dcgan-nl-block_in-g",
        "--model sagan --gca-variant gcn --gca-binarize ste": "sagan-gca-variant-gcn-binarize-ste",
        "--g-ch 128 --d-ch 128": "dcgan-gca-g_ch-128-d_ch-128",
        "--image b/a.jpg": "consingan-none-a",
        "--image gca.jpg --block gca": "consingan-gca-y_transpose-True-gca",
        "--image a.jpg --block gca --no-gca-y-transpose": "consingan-gca-a",
        "--exp-name mine": "mine",
    }
    for flags, name in names.items():
        assert gca_gan.run_folder(parse(flags.split())).name.split("__")[2] == name


@pytest.mark.parametrize(("flags", "message"), [
    ("--img-size 48", "--img-size must be 32, 64 or 128, got 48"),
    ("--d-ch 3", "--gca-k must divide 12 channels, got 8"),
    ("--image a.jpg --block gca --g-ch 12", "--gca-k must divide 12 channels, got 8"),
    ("--model consingan", "--image must go together, got consingan, image, no image"),
    ("--image a.jpg --model dcgan", "must go together, got dcgan, image, a.jpg"),
    ("--image a.jpg --sifid-num 1", "--sifid-num must be at least 2, got 1"),
    ("--image a.jpg --stages 0", "--train-depth must be at least 1, got 0"),
    ("--image nowhere.jpg", "cannot read nowhere.jpg"),
    ("--image small.png", "--min-size must be below 15, the short side at 250x15"),
    ("--image big.png --block gca --min-size 65", "--gca-variant must be bottleneck or gcn"),
    ("--dataset celeba", "pip install gdown"),
    ("--dataset lsun-church", "pip install lmdb"),
])  # fmt: skip
def test_bad_input_ends_with_one_line(flags, message, command, monkeypatch):
    for package in ("gdown", "lmdb"):
        monkeypatch.setitem(sys.modules, package, None)
    Image.new("RGB", (60, 1000)).save("small.png")
    Image.new("RGB", (100, 100)).save("big.png")
    assert message in command(*flags.split(), "--eval-every", "0", code=2)
    assert not Path("runs").exists()


# ---- Data, table and figures of the data-set models ----------------------------------------------
def test_celeba_is_cropped_or_squashed(tmp_path, monkeypatch):
    """Four red images, 178x218, with a green bar of 20 rows at the top, in CelebA's format."""
    base, names = tmp_path / "celeba", [f"{i}.jpg" for i in range(4)]
    (base / "img_align_celeba").mkdir(parents=True)
    for name in names:
        image = Image.new("RGB", (178, 218), (200, 30, 30))
        image.paste((30, 200, 30), (0, 0, 178, 20))
        image.save(base / "img_align_celeba" / name, quality=95)
    rows = "".join(f"{name} 1\n" for name in names)
    for *_, file in datasets.CelebA.file_list[1:]:  # [0] is the archive of the images
        plain = "identity" in file or "partition" in file
        (base / file).write_text(rows if plain else "4\nnames of the columns\n" + rows)
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)  # of the real files
    green = {}
    for name in ("celeba", "celeba-squashed"):
        args = parse(["--dataset", name, "--data-dir", str(tmp_path), "--batch-size", "4"])
        images, _, _ = gca_gan.load_images(args, CPU)
        assert images.shape == (4, 3, 64, 64)
        green[name] = (images[0, 1] > images[0, 0]).float().mean(dim=1)
    assert green["celeba-squashed"][:5].min() == 1 and green["celeba-squashed"][7:].max() == 0
    assert green["celeba"].max() == 0  # the central 178 rows begin at row 20


def test_lsun_church_of_jpeg_and_webp():
    lmdb = pytest.importorskip("lmdb")
    path = "church_outdoor_train_lmdb"
    with lmdb.open(path, map_size=2**24) as database, database.begin(write=True) as writer:
        for i in range(8):
            buffer = io.BytesIO()
            image = Image.new("RGB", (300, 256), (10 * i, 100, 200 - 10 * i))
            image.save(buffer, "WEBP" if i % 2 else "JPEG", quality=95)
            writer.put(f"{9 - i:040x}".encode(), buffer.getvalue())
    args = parse(["--dataset", "lsun-church", "--data-dir", ".", "--batch-size", "4"])
    for row, image in enumerate(gca_gan.load_images(args, CPU)[0].float()):  # in the keys' order
        colour = torch.tensor([10.0 * (7 - row), 100, 200 - 10 * (7 - row)])
        assert (image.mean(dim=(1, 2)) - colour).abs().max() < 4
    assert {*map(str, Path().iterdir())} == {path, "cache"}  # torchvision's reader leaves its keys


def test_table_joins_seeds_and_keeps_rows_and_data_sets_apart(tmp_path):
    fids = [*(("celeba", 39550, value) for value in (30, 32, 37)), ("lsun-church", 24650, 41.5)]
    fids, runs, paths = [*fids, ("celeba", 100, 50)], [], []
    for seed, (dataset, step, value) in enumerate(fids):  # all but 100 are the rows' own lengths
        (folder := tmp_path / str(seed)).mkdir()
        about = {"step": step, "fid": value, "weights": "random", "n_fake": seed // 3 + 9}
        (folder / "evaluate.json").write_text(json.dumps(about))
        paths.append(folder / "checkpoint.pt")
        runs.append(Args(dataset=dataset, seed=seed, gca_k=8 if step > 100 else 4))
    lines = gca_gan.table(runs, paths).splitlines()
    rows = ["dcgan-none", "dcgan-nl", "dcgan-gca", "sagan-nl", "sagan-gca", "dcgan-gca-k-4"]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row}" for row in rows]
    heads = [f"celeba{x}, random features, {n} images" for x, n in (("", 9), (", step 100", 10))]
    heads.insert(1, "lsun-church, random features, 10 images")
    assert lines[0].endswith(f" | {' | '.join(heads)} |")
    assert lines[4] == "| dcgan-gca | 25.75 | 22.15 | 33.00 ± 3.61 (3) | 41.50 | not run |"
    assert lines[7] == "| dcgan-gca-k-4 | not run | not run | not run | not run | 50.00 |"


def test_runs_side_by_side(command, tiny):
    for name in ("none", "gca"):
        command(*tiny("gca_gan", f"--total-steps 1 --block {name}"))
    runs = sorted(map(str, Path("runs").glob("gca_gan__shapes__*")))
    command("--mode", "sample", "--runs", *runs, "--cache-dir", "elsewhere")
    assert Path("elsewhere").exists()
    sizes = {name: Image.open(f"{runs[0]}/{name}.png").size for name in ("samples", "heatmaps")}
    assert sizes == {"samples": (8 * 34 + 2, 2 * 34 + 2), "heatmaps": (5 * 34 + 2, 8 * 34 + 2)}


# ---- ConSinGAN -----------------------------------------------------------------------------------
FEW = ("--image photo.png --g-ch 8 --d-ch 8 --stages 3 --min-size 14 --max-size 36 --niter 5 "
       "--num-samples 4 --gca-k 4 --sample-every 0").split()  # fmt: skip


@pytest.fixture
def photo():
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).resize((60, 40), Image.BICUBIC).save("photo.png")


@pytest.mark.parametrize(("size", "stages", "expected"), [
    ((166, 250), 8, "26x38 29x43 34x50 40x61 51x77 72x108 127x191 166x250"),
    ((166, 250), 6, "26x38 31x47 41x61 60x90 114x172 166x250"),
    ((250, 250), 6, "25x25 33x33 45x45 72x72 158x158 250x250"),
    ((188, 250), 6, "25x34 32x42 42x56 63x84 126x167 188x250"),
    ((166, 250), 1, "166x250"), ((332, 500), 2, "26x38 166x250"),  # brought to --max-size first
    ((1000, 601), 1, "250x151"),  # and rounded up
])  # fmt: skip
def test_sizes_of_the_stages(size, stages, expected):
    args = parse(["--image", "a.jpg", "--stages", str(stages)])
    assert " ".join(f"{h}x{w}" for h, w in gca_gan.pyramid_shapes(args, *size)) == expected


def test_counts_growth_and_levels_of_consingan(photo):
    args = parse(["--image", "photo.png", "--min-size", "14"])
    pyramid = gca_gan.load_pyramid(args)
    whole = np.asarray(Image.open("photo.png"))
    np.testing.assert_array_equal(gca_gan.to_pixels(pyramid[-1])[0].permute(1, 2, 0), whole)
    D, G = gca_gan.build_pyramid(args, pyramid, 0, CPU).values()
    assert [parameters(part) for part in (G.head, G.body[0], G.tail)] == [1_792, 110_784, 1_731]
    for _ in range(5):
        G.grow(torch.randn)
    assert (parameters(G), parameters(D)) == (668_227, 113_153)
    assert G(G.noise(torch.randn)).shape == (1, 3, 40, 60)
    assert D(torch.zeros(1, 3, 11, 14)).shape == (1, 1, 1, 4)  # patches of 11x11


class Restated:
    """ConSinGAN as its paper has it, one step after the other, nothing shared or batched.

    Only the layers and the noise, a function of the seed and the step, are the script's.
    """

    def __init__(self, args, photo):
        torch.manual_seed(args.seed)
        self.args, self.photo = args, photo
        self.D, G = gca_gan.build_pyramid(args, photo, 0, CPU).values()
        self.head, self.tail, self.block, self.body = G.head, G.tail, G.block, [G.body[0]]
        self.step, self.z, self.amps = 0, [photo[0]], [1.0]
        self.noise = torch.Generator().manual_seed(gca_gan.seed_of(args.seed, 1, 0))

    def G(self, noise):
        def up(y, size, more):
            sides = [side + more for side in size]
            return F.interpolate(y, sides, mode="bicubic", align_corners=True)

        y = self.head(F.pad(noise[0], [1] * 4))
        y = self.block(self.body[0](F.pad(up(y, y.shape[2:], 2), [2] * 4)))
        for body, n, amp, real in zip(self.body[1:], noise[1:], self.amps[1:], self.photo[1:]):
            y = body(up(y, real.shape[2:], 6) + amp * n) + up(y, real.shape[2:], 0)
        return self.tail(F.pad(y, [1] * 4))

    def draw(self):
        made = []
        for real in self.photo[: len(self.body)]:
            h, w = real.shape[2:]
            shape = (1, h + 6, w + 6, self.args.g_ch) if made else (1, h, w, 3)
            made.append(torch.randn(shape, generator=self.noise).permute(0, 3, 1, 2))
        return made

    def stage(self, d):
        a = self.args
        if d:
            self.body.append(copy.deepcopy(self.body[-1]))
            self.z.append(self.draw()[d])
            self.amps.append(0.0)
            with torch.no_grad():
                self.amps[d] = 0.1 * (self.G(self.z) - self.photo[d]).square().mean().sqrt().item()
        ages = [(body, d - i) for i, body in enumerate(self.body) if d - i < a.train_depth]
        ages += [(self.tail, 0), *[(self.head, d), (self.block, d)] * (d < a.train_depth)]
        groups = [{"params": [*part.parameters()], "lr": a.g_lr * a.lr_scale**age}
                  for part, age in ages if [*part.parameters()]]  # fmt: skip
        trained = [p for group in groups for p in group["params"]]
        g_opt = torch.optim.Adam(groups, betas=(a.beta1, a.beta2))
        d_opt = torch.optim.Adam(self.D.parameters(), a.d_lr, (a.beta1, a.beta2))
        for i in range(a.niter):
            if i == math.ceil(0.8 * a.niter):
                for group in g_opt.param_groups + d_opt.param_groups:
                    group["lr"] *= 0.1
            real, noise = self.photo[d], self.draw()
            for _ in range(a.n_critic):
                fake, eps = self.G(noise).detach(), torch.rand((), generator=self.noise)
                mixed = (eps * real + (1 - eps) * fake).requires_grad_()
                (grad,) = torch.autograd.grad(self.D(mixed).sum(), mixed, create_graph=True)
                penalty = (grad.square().sum(1).sqrt() - 1).square().mean()
                d_opt.zero_grad()
                loss = self.D(fake).mean() - self.D(real).mean() + 0.1 * penalty
                loss.backward(inputs=[*self.D.parameters()])
                d_opt.step()
            g_opt.zero_grad()
            error = (self.G(self.z) - real).square().mean()
            (10 * error - self.D(self.G(noise)).mean()).backward(inputs=trained)
            for _ in range(3):
                g_opt.step()
            self.step += 1
            self.noise.manual_seed(gca_gan.seed_of(a.seed, 1, self.step))


@pytest.mark.parametrize("name", ["none", "gca"])
def test_training_is_the_algorithm_restated(name, photo, monkeypatch):
    """Four stages of which two are trained, in float64, to the last weight and amplitude."""
    flags = ["--stages", "4", "--train-depth", "2", "--device", "cpu"]
    args, load = parse([*FEW, "--block", name, *flags]), gca_gan.load_pyramid
    monkeypatch.setattr(gca_gan, "load_pyramid", lambda args: [x.double() for x in load(args)])
    torch.set_default_dtype(torch.float64)
    gca_gan.train_consingan(args)
    plain = Restated(args, gca_gan.load_pyramid(args))
    for d in range(4):
        plain.stage(d)
    parts = {"head": plain.head, "tail": plain.tail, "block": plain.block}
    G = nn.ModuleDict(parts | {"body": nn.ModuleList(plain.body)}).state_dict()
    G |= {f"z{i}": z for i, z in enumerate(plain.z)}
    G["amps"] = torch.tensor(plain.amps, dtype=torch.float64)
    assert_close(state(gca_gan.run_folder(args)), {"G": G, "D": plain.D.state_dict()})


def test_kills_inside_and_between_stages_leave_no_trace(photo, command, monkeypatch):
    flags = [*FEW, "--block", "gca", "--save-every", "3", "--log-every", "2"]
    command(*flags, "--out-dir", "whole")
    save = gca_gan.Run.save
    for kill in (3, 5, 12):  # inside the first stage, between two, inside the last

        def stop(self, name, kill=kill):
            save(self, name)
            if self.step == kill and name == "checkpoint.pt":
                raise KeyboardInterrupt  # which nothing catches

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(gca_gan.Run, "save", stop)
            command(*flags, "--out-dir", "parts", "--resume")
    assert "from step 12 to 15" in command(*flags, "--out-dir", "parts", "--resume")
    whole, parts = (next(Path(name).iterdir()) for name in ("whole", "parts"))
    for name in ("checkpoint.pt", "stage0.pt", "stage2.pt"):
        a, b = state(whole, name), state(parts, name)
        assert a.pop("args") != b.pop("args") and same(a, b), name
    assert a["G"]["block.0.alpha"] != 0
    grids = [path.name for path in sorted((whole / "samples").iterdir())]
    assert grids == ["0000005.png", "0000010.png", "0000015.png"]
    Image.new("RGB", (80, 40)).save("photo.png")
    err = command(*flags, "--out-dir", "parts", "--resume", code=2)
    assert f"--image must be the photograph of {parts}/checkpoint.pt, got photo.png" in err


def test_samples_scores_and_figures_of_one_photograph(photo, command):
    out, _ = (command(*FEW, "--block", x, "--exp-name", f"{x} 1") for x in ("none", "gca"))
    assert "5 steps at each of 14x21, 19x28, 24x36; about 0:0" in out
    none, gca = sorted(Path("runs").iterdir(), reverse=True)
    assert f"python gca_gan.py --mode sample --checkpoint '{none}/checkpoint.pt'" in out
    plain, blocked = (["--checkpoint", folder / "checkpoint.pt"] for folder in (none, gca))
    command("--mode", "sample", *plain, "--num-samples", "2", "--scale", "0.8", "1.5")
    assert Image.open(none / "generated/15-19x54/00001.png").size == (54, 19)
    err = command("--mode", "sample", *blocked, "--scale", "1", "2", code=2)
    assert "maps of (14, 21), got (14, 42); gcn takes any" in err
    command("--mode", "evaluate", *blocked, "--fid-weights", "random")
    scores = json.loads((gca / "evaluate.json").read_text())
    assert scores["sifid"] > 0 and scores["diversity"] > 0 and scores["dims"] == 64
    out = command("--mode", "sample", "--runs", none, gca)
    assert out.count("SIFID") == 2 and out.count("no SIFID of this step") == 1
    assert "64 features, random" in out
    assert Image.open(none / "pairs.png").size == (5 * 38 + 2, 2 * 26 + 2)
    assert Image.open(none / "stages.png").size == (4 * 38 + 2, 2 * 26 + 2)


def test_diversity_of_a_copy_and_share_of_a_block(photo, capsys):
    args = parse([*FEW, "--stages", "1", "--block", "gca"])
    G = gca_gan.build_pyramid(args, gca_gan.load_pyramid(args), 0, CPU)["G"]
    assert not capsys.readouterr().err
    nn.init.normal_(G.tail[0].weight)
    scores = gca_gan.photo_scores(args, G)
    assert scores["diversity"] > 0 == scores["block_rms"]  # alpha is 0
    with torch.no_grad():
        G.block[0].alpha.fill_(50)
        G.head[0].bias.fill_(1)
        assert gca_gan.photo_scores(args, G)["block_rms"] > 0.1
        G.head[0].weight.zero_()  # blind to its noise: one image again and again
    assert gca_gan.photo_scores(args, G)["diversity"] == 0
    gca_gan.load_pyramid(parse([*FEW, "--block", "gca", "--no-gca-y-transpose"]))
    assert "Z = M Y copies" in capsys.readouterr().err


def test_strips_of_stages_are_in_order_and_of_one_length(photo, command, monkeypatch):
    for stages in ("02", "11"):
        command(*FEW, "--stages", stages, "--niter", "1", "--exp-name", stages)
    names, load = [], gca_gan.load_nets
    monkeypatch.setattr(gca_gan, "load_nets", lambda *a: names.append(a[1].stem) or load(*a))
    runs = sorted(Path("runs").iterdir())
    command("--mode", "sample", "--runs", *runs)
    stages = ["checkpoint", *(f"stage{i}" for i in range(11))]
    assert names == stages[:3] + stages  # stage10 is the last, not the third
    assert Image.open(runs[0] / "stages.png").size == (12 * 38 + 2, 2 * 26 + 2)
