"""SAGAN-div: attention, networks, divergence, rows of the tables, data, figures."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
import sagan_div
import torch
import torch.nn as nn
from conftest import assert_close, restated, state
from PIL import Image
from sagan_div import Attention, Discriminator, Generator, parse
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

MODELS = ["a", "b", "c", "d", "dcgan", "wgan-div", "sngan"]
each_model = pytest.mark.parametrize("model", MODELS)
each_block = pytest.mark.parametrize("block", ["pooled", "full"])


@pytest.fixture(autouse=True)
def seed(alone):
    torch.manual_seed(0)


def flags(text="", **changes):
    """The flags of a command line, for narrow networks unless it says otherwise."""
    small = "--g-ch 4 --d-ch 4 --dataset shapes --batch-size 4"
    return dataclasses.replace(parse([*small.split(), *text.split()]), **changes)


def count(net):
    return sum(p.numel() for p in net.parameters())


# Attention ----------------------------------------------------------------------------------------
def attention(block, channels=16, gamma=0.7):
    torch.manual_seed(0)
    layer = Attention(channels, flags(f"--attn-block {block} --no-attn-sn")).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer.gamma.data.fill_(gamma)
    return layer


def naive_attention(layer, x, scale=1.0):
    """The docstring's formula by loops over samples, queries and keys."""
    pooled = isinstance(layer.out, nn.Conv2d)

    def project(conv, image, pool):
        out = torch.einsum("oc,chw->ohw", conv.weight[:, :, 0, 0], image)
        return out.unfold(1, 2, 2).unfold(2, 2, 2).amax((3, 4)) if pool else out

    out = torch.zeros_like(x)
    for n, image in enumerate(x):
        query = project(layer.query, image, False).flatten(1)
        key, value = (project(c, image, pooled).flatten(1) for c in (layer.key, layer.value))
        for position in range(query.shape[1]):
            logits = [scale * float(query[:, position] @ k) for k in key.T]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            seen = sum(w / sum(weights) * v for w, v in zip(weights, value.T))
            row, column = divmod(position, x.shape[3])
            out[n, :, row, column] = layer.out.weight[:, :, 0, 0] @ seen if pooled else seen
    return x + layer.gamma * out


@each_block
def test_attention_is_the_formula_has_its_gradient_and_starts_as_the_identity(block):
    layer, x = attention(block), torch.randn(2, 16, 4, 6, dtype=torch.double)
    with torch.no_grad():
        wanted = naive_attention(layer, x)
        assert torch.allclose(layer(x), wanted, atol=1e-12)
        scaled = naive_attention(layer, x, scale=layer.query.out_channels**-0.5)
    assert not torch.allclose(scaled, wanted, atol=1e-4)  # PyTorch's own scale is another model
    assert torch.autograd.gradcheck(layer, x[:1, :, :, :4].requires_grad_(), atol=1e-6)
    assert torch.equal(attention(block, gamma=0.0)(x), x) and Attention(16, flags()).gamma == 0


@each_block
def test_attention_never_builds_its_matrix(block):
    class Largest(TorchDispatchMode):
        """The most elements of any tensor made."""

        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            parts = out if isinstance(out, (tuple, list)) else [out]
            sizes = [part.numel() for part in parts if isinstance(part, torch.Tensor)]
            self.elements = max(self.elements, *sizes, 0)
            return out

    layer, x = attention(block).float(), torch.randn(1, 16, 64, 64, requires_grad=True)
    with Largest() as fused:
        layer(x).sum().backward()
    assert fused.elements <= 2 * x.numel() < 4096 * 1024  # of the pooled matrix


# Networks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, wanted", [
    *((f"--model {model}", (4_007_940, 2_761_728)) for model in "abcd"),
    ("--model dcgan", (3_574_656, 2_763_520)), ("--model wgan-div", (3_574_656, 2_763_520)),
    ("--model sngan", (3_574_656, 2_761_728)), ("--attn none", (3_572_736, 2_761_728)),
    ("--attn-block full", (4_007_940, 2_761_728)),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_parameter_counts(argv, wanted, channels):
    args = parse([*argv.split(), "--channels", str(channels), "--dry-run"])
    found = count(Generator(args)), count(Discriminator(args))
    assert found == tuple(n + 1024 * (channels - 1) for n in wanted)


def convolutions(net):
    return [layer for layer in net if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


def test_table_1():
    """Weights and output shape of every convolution."""
    args, found = parse([]), []
    G, D = Generator(args).eval(), Discriminator(args).eval()
    for conv in convolutions(G) + convolutions(D):
        conv.register_forward_hook(lambda c, x, y: found.append((c.weight.numel(), *y.shape[1:])))
    with torch.no_grad():
        images = G(torch.randn(2, 100))
        scores = D(images)
    assert images.shape == (2, 1, 64, 64) and scores.shape == (2,) and images.abs().max() <= 1
    assert found == [
        (819_200, 512, 4, 4), (2_097_152, 256, 8, 8), (524_288, 128, 16, 16),
        (131_072, 64, 32, 32), (1_024, 1, 64, 64),
        (1_024, 64, 32, 32), (131_072, 128, 16, 16), (524_288, 256, 8, 8),
        (2_097_152, 512, 4, 4), (8_192, 1, 1, 1),
    ]  # fmt: skip


IN, BN, LN, NONE = nn.InstanceNorm2d, nn.BatchNorm2d, nn.GroupNorm, nn.Identity
PLACES = {  # SN in G, norms of G's four hidden layers, SN in D, norms of D's, SN in attention
    "a": (True, [IN] * 4, True, [IN] * 4, True),
    "b": (True, [NONE] * 4, True, [NONE] * 4, True),
    "c": (False, [IN] * 4, False, [IN] * 4, False),
    "d": (False, [IN] * 4, True, [NONE] * 4, True),
    "dcgan": (False, [BN] * 4, False, [NONE] + [BN] * 3, None),
    "wgan-div": (False, [BN] * 4, False, [NONE] + [LN] * 3, None),
    "sngan": (False, [BN] * 4, True, [NONE] * 4, None),
}


@each_model
def test_where_the_norms_stand(model):
    g_sn, g_norms, d_sn, d_norms, attn_sn = PLACES[model]
    args = flags(f"--model {model}")
    G, D = Generator(args), Discriminator(args)
    assert [is_parametrized(conv) for conv in convolutions(G)] == [g_sn] * 4 + [False]
    assert [is_parametrized(conv) for conv in convolutions(D)] == [d_sn] * 5
    order = ["conv", "norm", "act"] + ["attn"] * (attn_sn is not None)
    assert len(G) == 1 + 4 * len(order) + 2 and len(D) == 4 * 3 + 2
    for i in range(4):
        hidden = dict(zip(order, list(G)[1 + len(order) * i :]))
        assert type(hidden["norm"]) is g_norms[i] and isinstance(hidden["act"], nn.ReLU)
        if "attn" in hidden:
            parts = [m for m in hidden["attn"].children() if isinstance(m, nn.Conv2d)]
            assert [is_parametrized(conv) for conv in parts] == [attn_sn] * 4
        assert type(D[3 * i + 1]) is d_norms[i]
        assert D[3 * i + 2].negative_slope == 0.2
    for module in (*G.modules(), *D.modules()):
        assert not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or module.bias is None
        assert not isinstance(module, IN) or not (module.affine or module.track_running_stats)
        assert not isinstance(module, LN) or module.num_groups == 1


def test_attention_on_the_image_stands_before_the_tanh():
    assert count(Generator(parse(["--attn", "all"]))) == 4_007_945
    G = Generator(flags("--attn all"))
    assert isinstance(G[-2], Attention) and isinstance(G[-1], nn.Tanh)
    G[-2].gamma.data.fill_(1e4)
    assert G(torch.randn(2, 100)).abs().max() <= 1  # cannot leave the range of images


@pytest.mark.parametrize("model", ["b", "c"])
def test_weights_start_normal_also_below_spectral_norm(model):
    G = Generator(flags(f"--model {model} --g-ch 16"))
    for layer in (G[1], G[4].query):
        (weight,) = layer.parameters()  # under spectral norm: what is normalised
        assert abs(weight.std().item() - 0.02) < 1e-3 and abs(weight.mean().item()) < 1e-3


def test_only_the_direction_of_z_counts_with_instance_norm():
    z, change = torch.randn(8, 100), {}
    for model in "db":
        G = Generator(flags(f"--model {model} --g-ch 16")).eval()
        nn.init.normal_(next(G[1].parameters()))
        images, tripled = G(z).detach(), G(3 * z).detach()
        change[model] = ((tripled - images).norm() / images.norm()).item()
    assert change["d"] < 0.02 < 0.5 < change["b"]


# Divergence ---------------------------------------------------------------------------------------
def linear(w):
    """D(x) = <w, x>."""
    return lambda x: (x * w).sum((1, 2, 3))


def real_fake_and_u(points):
    real, fake = torch.randn(2, 4, 3, 6, 6, dtype=torch.double)
    return real, fake, torch.rand(4, 1, 1, 1, dtype=torch.double) if points == "interp" else None


each_place = pytest.mark.parametrize("points", ["endpoints", "interp"])


@each_place
@pytest.mark.parametrize("k, p", [(2.0, 6.0), (10.0, 2.0), (1.0, 1.0)])
def test_the_penalty_of_a_linear_critic_is_k_times_its_slope_to_p(points, k, p):
    real, fake, u = real_fake_and_u(points)
    D, slope = linear(real[0] / 8), real[0].norm() / 8
    real_scores, fake_scores, slopes, found = sagan_div.divergence(D, real, fake, u, k, p)
    assert torch.allclose(found, k * slope**p, rtol=1e-12)
    assert slopes.shape == (8 if points == "endpoints" else 4,)
    assert torch.allclose(real_scores, D(real)) and torch.allclose(fake_scores, D(fake))
    # What it is often mistaken for: the norm of the batch's gradient, WGAN-GP, the root left out.
    for wrong in (4**0.5 * slope, (slope - 1).abs() ** (2 / p), slope**2):
        assert not torch.allclose(found, k * wrong**p, rtol=1e-2)
    w = torch.zeros_like(real[0]).requires_grad_()
    penalty = sagan_div.divergence(linear(w), real, fake, u, k, p)[3]
    assert penalty == 0 and torch.autograd.grad(penalty, w)[0].isfinite().all()  # not NaN


@each_place
def test_the_penalty_and_its_gradient_are_those_of_a_restatement(points):
    """D(x) = <v, tanh(W x)> has the gradient W^T (v (1 - tanh^2)), written out for each sample."""
    W = (torch.randn(7, 108, dtype=torch.double) / 5).requires_grad_()
    v = torch.randn(7, dtype=torch.double, requires_grad=True)
    real, fake, u = real_fake_and_u(points)
    found = sagan_div.divergence(
        lambda x: torch.tanh(x.flatten(1) @ W.T) @ v, real, fake, u, k=2.0, p=6.0
    )[3]
    places = torch.cat([real, fake]) if u is None else real + u * (fake - real)
    powers = []
    for x in places.flatten(1):
        slope = W.T @ (v * (1 - torch.tanh(W @ x) ** 2))
        powers.append((slope * slope).sum() ** 3)
    wanted = 2 * sum(powers) / len(powers)
    assert torch.allclose(found, wanted, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(found, (W, v)), torch.autograd.grad(wanted, (W, v))):
        assert torch.allclose(a, b, rtol=1e-10)


def test_the_critic_is_in_full_precision_under_autocast():
    D, (real, fake) = Discriminator(flags("--model c")), torch.rand(2, 2, 3, 64, 64)
    plain = sagan_div.divergence(D, real, fake, None, 2.0, 6.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = sagan_div.divergence(D, real, fake, None, 2.0, 6.0)
        assert D(real).dtype == torch.bfloat16  # what it would have been
    assert all(torch.equal(a, b) for a, b in zip(found, plain))


@pytest.mark.parametrize("norm, mixes", [("in", False), ("sn", False), ("ln", False), ("bn", True)])
def test_only_batch_norm_mixes_the_slopes_of_samples(norm, mixes):
    D = Discriminator(flags(f"--d-norm {norm}")).double()
    for module in D.modules():
        if is_parametrized(module):
            module.eval()  # its weight stays as it is
    x = torch.randn(3, 3, 64, 64, dtype=torch.double)
    slopes = [sagan_div.divergence(D, part, part, None, 2.0, 6.0)[2] for part in (x, *x[:, None])]
    one_by_one = torch.stack(slopes[1:]).T.flatten()
    assert torch.allclose(slopes[0], one_by_one, rtol=1e-6) == (not mixes)


# Losses -------------------------------------------------------------------------------------------
def test_losses_in_closed_form():
    s = torch.tensor([-3.0, -2.0, 0.0, 0.4, 1.5, 2.0], dtype=torch.double)
    real, fake = torch.sigmoid(s).log(), torch.sigmoid(-s).log()  # log-likelihoods of the labels
    smooth = -0.9 * real - 0.1 * fake
    hinge = [torch.tensor(x, dtype=s.dtype) for x in ([4, 3, 1, 0.6, 0, 0], [0, 0, 1, 1.4, 2.5, 3])]
    wanted = {
        "divergence": (-s, s, -s), "hinge": (*hinge, -s), "bce": (-real, -fake, -real),
        "bce-0.9": (smooth, -fake, smooth),
    }  # fmt: skip
    assert sagan_div.ADVERSARIAL.keys() == wanted.keys()
    for loss, terms in sagan_div.ADVERSARIAL.items():
        for term, values in zip(terms, wanted[loss]):
            torch.testing.assert_close(term(s), values, rtol=0, atol=1e-12)


# Rows and flags -----------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, wanted", [
    ("", dict(g_lr=1e-4, d_lr=4e-4, beta1=0.0, beta2=0.9, batch_size=64, n_critic=5, div_k=2.0,
              div_p=6.0, div_points="endpoints", loss="divergence", attn="hidden", channels=1)),
    ("--recipe author", dict(beta1=0.5, beta2=0.999, div_k=20.0, g_lr=1e-4, batch_size=64)),
    ("--model dcgan", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.5, beta2=0.999, batch_size=128,
                           n_critic=1, loss="bce", attn="none")),
    ("--model wgan-div", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.0, beta2=0.9, batch_size=64,
                              n_critic=4, div_points="interp", div_k=2.0, d_norm="ln")),
    ("--model sngan", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.0, n_critic=5, loss="hinge")),
    ("--model sngan --recipe author", dict(g_lr=1e-4, d_lr=4e-4, beta1=0.5, batch_size=2048,
                                           loss="bce-0.9", n_critic=5)),
    ("--model dcgan --recipe author", dict(g_lr=1e-4, d_lr=4e-4, n_critic=5, batch_size=2048,
                                           loss="bce-0.9")),
    ("--model c --recipe author", dict(attn_sn=True, g_norm="in", div_k=20.0)),
    ("--model wgan-div --recipe author", dict(g_lr=2e-4, d_lr=2e-4, beta2=0.999, n_critic=5,
                                              div_points="endpoints", div_k=2.0, d_norm="bn")),
    # A flag that is given wins, also where it is what another row has.
    ("--model dcgan --g-lr 1e-4 --batch-size 64", dict(g_lr=1e-4, d_lr=2e-4, batch_size=64)),
    ("--model c", dict(attn_sn=False)), ("--model c --attn-sn", dict(attn_sn=True)),
    ("--model dcgan --dataset shapes", dict(channels=3, n_critic=1)),
])  # fmt: skip
def test_rows(argv, wanted):
    args = parse(argv.split())
    assert {flag: getattr(args, flag) for flag in wanted} == wanted


@pytest.mark.parametrize("argv, words", [
    ("--img-size 48", "--img-size must be 32, 64 or 128, got 48"),
    ("--div-p 0.5", "--div-p must be at least 1"),
])  # fmt: skip
def test_bad_input(argv, words, call):
    code, _, err = call("sagan_div", *argv.split())
    assert code == 2 and words in err


# Data ---------------------------------------------------------------------------------------------
def write_idx(folder, n=6, cut=0):
    """Four files in the format of MNIST's; image i is i on its left half, 255 on its right one."""
    folder.mkdir(parents=True)
    pixels = np.full((n, 28, 28), 255, np.uint8)
    pixels[:, :, :14] = np.arange(n)[:, None, None]
    for part in ("train", "t10k"):
        data = np.array([2051, n, 28, 28], ">u4").tobytes() + pixels.tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(data[: len(data) - cut])
        data = np.array([2049, n], ">u4").tobytes() + bytes(range(n))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(data)


@pytest.mark.parametrize("dataset, name", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
@pytest.mark.parametrize("channels", [1, 3])
def test_idx_files(tmp_path, dataset, name, channels):
    write_idx(tmp_path / "data" / name / "raw")
    args = flags(f"--dataset {dataset} --batch-size 2 --channels {channels}")
    images, labels, _ = sagan_div.load_images(args, torch.device("cpu"), args.channels)
    assert images.shape == (6, channels, 64, 64) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert (images[:, :, :, :26] == torch.arange(6)[:, None, None, None]).all()  # not turned
    assert (images[:, :, :, -26:] == 255).all()


def test_damaged_and_missing_idx_files(tmp_path, monkeypatch):
    args, root = flags("--dataset mnist --batch-size 2"), tmp_path / "data" / "MNIST" / "raw"
    write_idx(root, cut=100)
    with pytest.raises(OSError, match="--dataset mnist must be in data: .*data/MNIST/raw"):
        sagan_div.load_images(args, torch.device("cpu"), 1)

    class MNIST:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("Error downloading")

    monkeypatch.setattr(sagan_div.datasets, "MNIST", MNIST)
    with pytest.raises(OSError, match="Error downloading; its four idx files"):
        sagan_div.load_images(args, torch.device("cpu"), 1)


# Training and figures -----------------------------------------------------------------------------
@pytest.fixture
def few(monkeypatch):
    """40 drawn images."""
    source = sagan_div.draw_shape, [i % 8 for i in range(40)], []
    monkeypatch.setattr(sagan_div, "open_dataset", lambda args: source)


def quick(text=""):
    base = "--g-ch 2 --d-ch 2 --batch-size 8 --eval-every 0 --sample-every 0 --log-every 1"
    return flags(f"{base} --num-samples 4 --img-size 32 {text}")


@each_model
def test_training_changes_every_weight_and_logs_the_penalty(model, few, monkeypatch):
    logged = []
    monkeypatch.setattr(sagan_div.Run, "write", lambda run, values: logged.append(values))
    args = quick(f"--total-steps 3 --n-critic 1 --model {model}")
    sagan_div.train(args)
    state = torch.load(sagan_div.find_checkpoint(args), weights_only=True)
    torch.manual_seed(args.seed)
    for name, net in sagan_div.build(args, torch.device("cpu"))[0].items():
        for key, start in net.named_parameters():
            assert state[name][key].isfinite().all() and not torch.equal(state[name][key], start)
    divergence = model in [*"abcd", "wgan-div"]
    assert all(math.isfinite(value) for values in logged for value in values.values())
    assert (logged[-1]["loss/penalty"] > 0) == (logged[-1]["slope/max"] > 0) == divergence
    gaps = [abs(v["logit/fake"] - v["logit/real"] - v["loss/d"]) for v in logged]
    assert max(gaps) < 1e-5 or not divergence  # the critic's alone, as in the other scripts
    assert ("gamma/3" in logged[-1]) == (model in "abcd")


def test_figures_2_and_3_from_run_folders(few, capsys, monkeypatch):
    """Real images, then those of each run from equal noise; best.pt where there is one."""
    folders, wanted = [], []
    for model in "ad":
        args = quick(f"--model {model} --total-steps 1 --data-dir d")
        sagan_div.train(args)
        folders.append(sagan_div.run_folder(args))
        nets, G = sagan_div.build(args, torch.device("cpu"))
        sagan_div.load(folders[-1] / "checkpoint.pt", nets)
        wanted.append(sagan_div.generate(G, sagan_div.eval_noise(args, 4)))
    os.rename(folders[0] / "checkpoint.pt", folders[0] / "best.pt")  # alone, then beside another
    for _ in range(2):
        args = quick(f"--mode sample --out-dir else/new --runs {folders[0]} {folders[1]}")
        assert args.data_dir == "d"
        sagan_div.sample(args)
        assert f"real, {folders[0]}, {folders[1]}" in capsys.readouterr().out
        (folders[0] / "checkpoint.pt").write_bytes((folders[1] / "checkpoint.pt").read_bytes())
    assert not Path("data").exists()
    with Image.open("else/new/sagan_div__shapes.png") as image:
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    images = sagan_div.load_images(args, torch.device("cpu"), 3)[0]
    assert found.shape == (3, 86, 242)  # grids of 2 x 2, 2 pixels between images, 8 between grids
    for left, grid in zip((8, 86, 164), [images, *wanted]):
        for (y, x), image in zip([(10, 2), (10, 36), (44, 2), (44, 36)], grid):
            assert torch.equal(found[:, y : y + 32, left + x : left + x + 32], image)
    monkeypatch.setattr(sagan_div, "open_dataset", lambda args: Path("no data").stat())
    sagan_div.sample(args)
    assert "no real images: [Errno 2]" in capsys.readouterr().out
    assert Image.open("else/new/sagan_div__shapes.png").size == (164, 86)


def test_training_is_the_algorithm(call, tiny):
    """Two steps of two critic updates of method d, restated: 2 E slope^6 at the images."""
    flags = tiny("sagan_div", "--total-steps 2")
    assert call("sagan_div", *flags)[0] == 0

    def d_loss(D, real, fake, noise):
        real, fake = real.requires_grad_(), fake.requires_grad_()
        scores = D(real), D(fake)
        grads = torch.autograd.grad(sum(x.sum() for x in scores), (real, fake), create_graph=True)
        slopes = torch.cat(grads).flatten(1).norm(dim=1)
        return scores[1].mean() - scores[0].mean() + 2 * slopes.pow(6).mean()

    args = parse([*flags, "--resume"])
    saved = state(next(Path("runs").iterdir()))
    assert_close(saved, restated(sagan_div, args, d_loss, lambda s: -s, args.channels))
