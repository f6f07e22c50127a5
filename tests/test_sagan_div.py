"""SAGAN-div: attention, networks, divergence, data, tables."""

import json
import math

import numpy as np
import pytest
import sagan_div
import torch
import torch.nn as nn
import torch.nn.functional as F
from sagan_div import Args, Discriminator, Generator, PooledAttention, SelfAttention, parse
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

import fid

METHODS = ["a", "b", "c", "d", "dcgan", "wgan-div", "sngan"]
BLOCKS = [PooledAttention, SelfAttention]
BASELINES = {"dcgan": (3_574_656, 2_763_520), "wgan-div": (3_574_656, 2_763_520),
             "sngan": (3_574_656, 2_761_728)}  # fmt: skip
each_method = pytest.mark.parametrize("method", METHODS)
each_block = pytest.mark.parametrize("kind", BLOCKS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(method="d", **flags):
    return Args(**{"method": method, "g_ch": 4, "d_ch": 4, "dataset": "shapes"} | flags)


def count(net):
    return sum(p.numel() for p in net.parameters())


# Attention ----------------------------------------------------------------------------------------
def block_of(kind, channels=16, gamma=0.7):
    torch.manual_seed(0)
    block = kind(channels, bias=False).double()
    block.gamma.data.fill_(gamma)
    return block


def naive_attention(block, x, scale=1.0):
    """The block's formula by loops over samples, queries and keys."""
    pooled = isinstance(block, PooledAttention)

    def project(conv, image, pool):
        out = torch.einsum("oc,chw->ohw", conv.weight[:, :, 0, 0], image)
        return out.unfold(1, 2, 2).unfold(2, 2, 2).amax((3, 4)) if pool else out

    out = torch.zeros_like(x)
    for n, image in enumerate(x):
        query = project(block.query, image, False).flatten(1)
        key, value = (project(c, image, pooled).flatten(1) for c in (block.key, block.value))
        for position in range(query.shape[1]):
            logits = [scale * float(query[:, position] @ k) for k in key.T]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            seen = sum(w / sum(weights) * v for w, v in zip(weights, value.T))
            row, column = divmod(position, x.shape[3])
            out[n, :, row, column] = block.out.weight[:, :, 0, 0] @ seen if pooled else seen
    return x + block.gamma * out


@each_block
def test_attention_is_the_formula(kind):
    block, x = block_of(kind), 2 * torch.randn(2, 16, 4, 6, dtype=torch.double)
    with torch.no_grad():
        wanted = naive_attention(block, x)
        assert torch.allclose(block(x), wanted, atol=1e-12)
        scaled = naive_attention(block, x, scale=block.query.out_channels**-0.5)
    assert not torch.allclose(scaled, wanted, atol=1e-4)  # PyTorch's own scale is another model


@each_block
def test_the_map_is_what_the_forward_pass_uses(kind):
    block, x = block_of(kind), torch.randn(2, 16, 8, 8, dtype=torch.double)
    weights, value = block.attention_map(x), block.value(x)
    value = F.max_pool2d(value, 2) if kind is PooledAttention else value
    assert weights.shape == (2, 64, 16 if kind is PooledAttention else 64)
    assert torch.allclose(weights.sum(2), torch.ones(2, 64).to(weights), atol=1e-6)
    out = (value.flatten(2) @ weights.double().transpose(1, 2)).unflatten(2, (8, 8))
    out = block.out(out) if kind is PooledAttention else out
    assert torch.allclose(block(x), x + block.gamma * out, atol=1e-5)


@each_block
def test_attention_starts_as_the_identity_and_has_gradients(kind):
    x = torch.randn(2, 16, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.equal(block_of(kind, gamma=0.0)(x), x)
    assert torch.autograd.gradcheck(block_of(kind), (x[:1],), atol=1e-6)
    assert kind(16, bias=False).gamma.shape == ()


@each_block
def test_attention_never_builds_its_matrix(kind):
    class Largest(TorchDispatchMode):
        """The most elements of any tensor made."""

        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            parts = out if isinstance(out, (tuple, list)) else [out]
            sizes = [part.numel() for part in parts if isinstance(part, torch.Tensor)]
            self.elements = max(self.elements, *sizes, 0)
            return out

    block, x = kind(16, bias=False), torch.randn(1, 16, 64, 64, requires_grad=True)
    block.gamma.data.fill_(0.5)
    with Largest() as fused:
        block(x).sum().backward()
    with Largest() as explicit, torch.no_grad():
        block.attention_map(x)
    assert explicit.elements == 4096 * (1024 if kind is PooledAttention else 4096)
    assert fused.elements <= 2 * x.numel()


@each_block
def test_both_blocks_have_as_many_parameters(kind):
    sizes = [count(kind(channels, bias=False)) for channels in (512, 256, 128, 64)]
    assert sizes == [327_681, 81_921, 20_481, 5_121]


# Networks -----------------------------------------------------------------------------------------
@each_method
@pytest.mark.parametrize("channels", [1, 3])
def test_parameter_counts(method, channels):
    args = parse(["--method", method, "--dataset", "shapes", "--channels", str(channels)])
    found = count(Generator(args)), count(Discriminator(args))
    wanted = BASELINES.get(method, (4_007_940, 2_761_728))
    assert found == tuple(n + 1024 * (channels - 1) for n in wanted)


@pytest.mark.parametrize("flags, size", [
    (["--attn-blocks", "1", "2", "3", "4", "5"], 4_007_945), (["--attn-blocks", "none"], 3_572_736),
    (["--attn-block", "full"], 4_007_940), (["--attn-blocks", "4"], 3_572_736 + 5_121),
])  # fmt: skip
def test_parameter_counts_of_attention_places(flags, size):
    assert count(Generator(parse(flags))) == size


def test_parameter_counts_layer_by_layer():
    """Table 1: shapes and weights of every convolution."""
    args = Args(g_ch=64, d_ch=64)
    nets = {"G": Generator(args).eval(), "D": Discriminator(args).eval()}
    weights = {k: [getattr(net.layers, f"conv{i}").weight.numel() for i in range(1, 6)]
               for k, net in nets.items()}  # fmt: skip
    assert weights["G"] == [819_200, 2_097_152, 524_288, 131_072, 1_024]
    assert weights["D"] == [1_024, 131_072, 524_288, 2_097_152, 8_192]
    shapes = {"G": [], "D": []}
    for key, net in nets.items():
        for i in range(1, 6):
            layer = getattr(net.layers, f"conv{i}")
            layer.register_forward_hook(lambda m, x, y, key=key: shapes[key].append(y.shape[1:]))
    with torch.no_grad():
        scores = nets["D"](nets["G"](torch.randn(2, 100)))
    assert scores.shape == (2,)
    assert shapes["G"] == [(512, 4, 4), (256, 8, 8), (128, 16, 16), (64, 32, 32), (1, 64, 64)]
    assert shapes["D"] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (1, 1, 1)]


PLACES = {  # spectral norm in G, norm in G, spectral norm in D, norms of D's first four layers
    "a": (True, nn.InstanceNorm2d, True, [nn.InstanceNorm2d] * 4),
    "b": (True, nn.Identity, True, [None] + [nn.Identity] * 3),
    "c": (False, nn.InstanceNorm2d, False, [nn.InstanceNorm2d] * 4),
    "d": (False, nn.InstanceNorm2d, True, [None] + [nn.Identity] * 3),
    "dcgan": (False, nn.BatchNorm2d, False, [None] + [nn.BatchNorm2d] * 3),
    "wgan-div": (False, nn.BatchNorm2d, False, [None] + [nn.GroupNorm] * 3),
    "sngan": (False, nn.BatchNorm2d, True, [None] + [nn.Identity] * 3),
}


@each_method
def test_where_the_norms_stand(method):
    g_sn, g_norm, d_sn, d_norms = PLACES[method]
    G, D = Generator(small(method)).layers, Discriminator(small(method)).layers
    for i in range(1, 5):
        assert is_parametrized(getattr(G, f"conv{i}")) == g_sn
        assert type(getattr(G, f"norm{i}")) is g_norm
        norm = getattr(D, f"norm{i}", None)
        assert d_norms[i - 1] is norm if norm is None else type(norm) is d_norms[i - 1]
        assert hasattr(G, f"attn{i}") == (method in "abcd")
    assert [is_parametrized(getattr(D, f"conv{i}")) for i in range(1, 6)] == [d_sn] * 5
    assert not is_parametrized(G.conv5) and not hasattr(G, "norm5") and not hasattr(D, "norm5")
    assert not hasattr(G, "attn5") and not any("attn" in name for name, _ in D.named_modules())
    assert all(module.bias is None for net in (G, D) for module in net.modules()
               if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)))  # fmt: skip
    instance = [m for m in G.modules() if isinstance(m, nn.InstanceNorm2d)]
    assert not any(m.affine or m.track_running_stats or m.eps != 1e-5 for m in instance)
    assert all(m.num_groups == 1 for m in D.modules() if isinstance(m, nn.GroupNorm))


@pytest.mark.parametrize("method, follow", [("a", True), ("b", True), ("c", False), ("d", False)])
def test_spectral_norm_inside_attention(method, follow):
    for rule, wanted in (("always", True), ("follow", follow)):
        attn = Generator(small(method, attn_sn=rule)).layers.attn2
        assert [is_parametrized(conv) for conv in attn.children()] == [wanted] * 4


def test_spectral_norm_is_one_after_power_iterations():
    D, x = Discriminator(small("d", d_ch=8)), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(100):  # each forward pass in train mode iterates once
            D(x)
        D.eval()
        weights = [getattr(D.layers, f"conv{i}").weight.flatten(1) for i in range(1, 6)]
    assert all(abs(torch.linalg.svdvals(weight)[0] - 1) < 0.05 for weight in weights)


def test_order_of_a_generator_layer_and_attention_before_tanh():
    names = [name for name, _ in Generator(small(attn_blocks=(1, 5))).layers.named_children()]
    assert names[:5] == ["conv1", "norm1", "act1", "attn1", "conv2"]
    assert names[-3:] == ["conv5", "attn5", "tanh"]
    G = Generator(small(attn_blocks=(5,), attn_sn="follow"))
    G.layers.attn5.gamma.data.fill_(1e4)
    assert G(torch.randn(2, 100)).abs().max() <= 1  # cannot leave the range of images


def test_weights_start_normal_also_below_spectral_norm():
    for method in ("b", "c"):
        conv = Generator(small(method, g_ch=16)).layers.conv2
        weight = conv.parametrizations.weight.original if method == "b" else conv.weight
        assert abs(weight.std().item() - 0.02) < 1e-3 and abs(weight.mean().item()) < 1e-3


def test_only_the_direction_of_z_counts_with_instance_norm():
    z, change = torch.randn(8, 100), {}
    for method in "db":
        torch.manual_seed(0)
        G = Generator(small(method, g_ch=16)).eval()
        nn.init.normal_(G.layers.conv1.parametrizations.weight.original if method == "b"
                        else G.layers.conv1.weight)  # fmt: skip
        with torch.no_grad():
            images = G(z)
            change[method] = ((G(3 * z) - images).norm() / images.norm()).item()
    assert change["d"] < 0.02 < 0.5 < change["b"]


@each_method
def test_every_parameter_has_a_finite_gradient(method):
    G, D = Generator(small(method)), Discriminator(small(method))
    for name, parameter in G.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.5)
    D(G(torch.randn(4, 100))).sum().backward()
    for net in (G, D):
        for name, parameter in net.named_parameters():
            # The key's bias-free weight has a zero gradient only where its softmax is saturated.
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if not name.endswith((".bias", "norm4.weight")):
                assert parameter.grad.abs().sum() > 0, name


# Divergence ---------------------------------------------------------------------------------------
class Linear(nn.Module):
    """D(x) = <w, x>."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).sum((1, 2, 3))


def images(n=4, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 3, size, size, generator=generator, dtype=torch.double)


def mixing(points, n=4):
    return torch.rand(n, 1, 1, 1, dtype=torch.double) if points == "interp" else None


@pytest.mark.parametrize("points", ["endpoints", "interp"])
@pytest.mark.parametrize("k, p", [(2.0, 6.0), (10.0, 2.0), (1.0, 1.0)])
def test_the_penalty_of_a_linear_critic_is_k_times_its_slope_to_p(points, k, p):
    D, (real, fake) = Linear(images()[0, 0] / 8), images()
    real_scores, fake_scores, slopes = sagan_div.critic(D, real, fake, mixing(points))
    slope = D.w.detach().norm()
    found = sagan_div.divergence_penalty(slopes, k, p)
    assert torch.allclose(found, k * slope**p, rtol=1e-12)
    assert set(slopes) == ({"real", "fake"} if points == "endpoints" else {"mixed"})
    assert torch.allclose(real_scores, D(real)) and torch.allclose(fake_scores, D(fake))
    # What it is often mistaken for: the norm of the batch's gradient, WGAN-GP, the root left out.
    for wrong in (4**0.5 * slope, (slope - 1).abs() ** (2 / p), slope**2):
        assert not torch.allclose(found, k * wrong**p, rtol=1e-2)


def test_where_the_slope_is_taken():
    class Square(nn.Module):
        def forward(self, x):
            return x.square().sum((1, 2, 3)) / 2  # its gradient is x

    (real, fake), u = images(), mixing("interp")
    *_, slopes = sagan_div.critic(Square(), real, fake, None)
    assert torch.allclose(slopes["real"], real.flatten(1).norm(dim=1))
    assert torch.allclose(slopes["fake"], fake.flatten(1).norm(dim=1))
    both = sagan_div.divergence_penalty(slopes, 2.0, 6.0)
    assert torch.allclose(both, slopes["real"].pow(6).mean() + slopes["fake"].pow(6).mean())
    *_, slopes = sagan_div.critic(Square(), real, fake, u)
    assert torch.allclose(slopes["mixed"], (real + u * (fake - real)).flatten(1).norm(dim=1))


@pytest.mark.parametrize("points", ["endpoints", "interp"])
def test_the_gradient_of_the_penalty_is_that_of_finite_differences(points):
    torch.manual_seed(0)
    conv, (real, fake), u = nn.Conv2d(3, 4, 3, 2).double(), images(3), mixing(points, 3)
    norm = nn.InstanceNorm2d(4)

    def penalty(weight, bias):
        def D(x):
            return F.leaky_relu(norm(F.conv2d(x, weight, bias, 2)), 0.2).square().sum((1, 2, 3)) / 9

        return sagan_div.divergence_penalty(sagan_div.critic(D, real, fake, u)[2], 2.0, 6.0)

    weight, bias = (p.detach().clone().requires_grad_() for p in conv.parameters())
    assert torch.autograd.gradcheck(penalty, (weight, bias), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 6.0])
def test_no_slope_is_no_nan(p):
    D, (real, fake) = Linear(torch.zeros(3, 6, 6, dtype=torch.double)), images()
    penalty = sagan_div.divergence_penalty(sagan_div.critic(D, real, fake, None)[2], 2.0, p)
    (grad,) = torch.autograd.grad(penalty, D.w)
    assert penalty == 0 and grad.isfinite().all()


def test_the_penalty_is_in_full_precision_under_autocast():
    D, (real, fake) = Discriminator(small("c")), torch.rand(2, 2, 3, 64, 64)
    plain = sagan_div.critic(D, real, fake, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = sagan_div.critic(D, real, fake, None)
        assert D(real).dtype == torch.bfloat16  # what it would have been
    assert found[0].dtype == torch.float32
    assert torch.equal(found[2]["real"], plain[2]["real"])


@pytest.mark.parametrize("name, norm, mixes", [
    ("instance", "instance", False), ("spectral", "none", False), ("layer", "layer", False),
    ("batch", "batch", True),
])  # fmt: skip
def test_only_batch_norm_mixes_the_slopes_of_samples(name, norm, mixes, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(sagan_div.NORMS, "d", (False, "instance", name == "spectral", norm))
    D = Discriminator(small(channels=1)).double()
    for module in D.modules():
        if is_parametrized(module):
            module.eval()  # its weight stays as it is
    x = torch.randn(3, 1, 64, 64, dtype=torch.double)
    together = sagan_div.score_and_slope(D, x)[1]
    one_by_one = torch.cat([sagan_div.score_and_slope(D, image[None])[1] for image in x])
    assert torch.allclose(together, one_by_one, rtol=1e-6) == (not mixes)


# Losses -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss, s, wanted", [
    ("wasserstein", 0.7, (-0.7, 0.7, -0.7)),
    ("hinge", 0.0, (1, 1, 0)), ("hinge", 2.0, (0, 3, -2)), ("hinge", -2.0, (3, 0, 2)),
    ("bce", 0.0, (math.log(2), math.log(2), math.log(2))),
    ("bce", 1.5, (math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.5)),
                  math.log1p(math.exp(-1.5)))),
])  # fmt: skip
def test_losses_in_closed_form(loss, s, wanted):
    logit = torch.tensor(s, dtype=torch.double)
    found = [term(logit).item() for term in sagan_div.ADVERSARIAL[loss]]
    assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("s", [-3.0, 0.0, 0.4, 5.0])
def test_smoothed_labels(s):
    logit = torch.tensor(s, dtype=torch.double)
    real, fake, generator = (term(logit) for term in sagan_div.ADVERSARIAL["bce-0.9"])
    soft = F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, 0.9))
    hard = F.binary_cross_entropy_with_logits(logit, torch.zeros_like(logit))
    assert torch.allclose(torch.stack([real, fake, generator]), torch.stack([soft, hard, soft]))


def test_d_gains_where_real_scores_rise_and_g_where_fake_ones_do():
    for loss, (d_real, d_fake, g_fake) in sagan_div.ADVERSARIAL.items():
        low, high = torch.tensor(-0.5), torch.tensor(0.5)
        assert d_real(high) < d_real(low), loss
        assert d_fake(low) < d_fake(high) and g_fake(high) < g_fake(low), loss


# Recipes and flags --------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, wanted", [
    ("", dict(g_lr=1e-4, d_lr=4e-4, beta1=0.0, beta2=0.9, batch_size=64, n_critic=5, div_k=2.0,
              div_p=6.0, div_points="endpoints", div_scale=1.0, exp_name="d", channels=1)),
    ("--recipe author", dict(beta1=0.5, beta2=0.999, div_scale=10.0, exp_name="d-author")),
    ("--method dcgan", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.5, beta2=0.999, batch_size=128,
                            n_critic=1)),
    ("--method wgan-div", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.0, beta2=0.9, batch_size=64,
                               n_critic=4, div_points="interp", div_scale=1.0)),
    ("--method sngan", dict(g_lr=2e-4, d_lr=2e-4, beta1=0.0, batch_size=64, n_critic=5)),
    ("--method sngan --recipe author", dict(g_lr=1e-4, d_lr=4e-4, beta1=0.5, batch_size=2048)),
    ("--method dcgan --recipe author", dict(g_lr=1e-4, d_lr=4e-4, n_critic=5, batch_size=2048)),
    ("--method wgan-div --recipe author", dict(g_lr=2e-4, d_lr=2e-4, beta2=0.999, n_critic=5,
                                               div_points="endpoints", div_scale=1.0)),
    # A flag that is given wins, also where it is what another recipe has.
    ("--method dcgan --g-lr 1e-4 --batch-size 64", dict(g_lr=1e-4, d_lr=2e-4, batch_size=64)),
    ("--method dcgan --dataset shapes --exp-name x", dict(channels=3, exp_name="x", n_critic=1)),
])  # fmt: skip
def test_recipes(argv, wanted):
    args = parse(argv.split())
    sagan_div.check_args(args)
    assert {flag: getattr(args, flag) for flag in wanted} == wanted


def test_author_baselines_differ_in_loss_and_norm():
    assert sagan_div.LOSS["paper"].get("sngan") == "hinge"
    assert sagan_div.LOSS["author"].get("sngan") == "bce-0.9" == sagan_div.LOSS["author"]["dcgan"]
    D = Discriminator(small("wgan-div", recipe="author"))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in D.modules()) == 3


# Data ---------------------------------------------------------------------------------------------
def write_idx(folder, n=6, cut=0, labels=None):
    """Four files in the format of MNIST's; image i is i on its left half, 255 on its right one."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.full((n, 28, 28), 255, np.uint8)
    pixels[:, :, :14] = np.arange(n)[:, None, None]
    for part in ("train", "t10k"):
        head = np.array([2051, n, 28, 28], ">u4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes((head + pixels.tobytes())[: -cut or None])
        count = n if labels is None else labels
        head = np.array([2049, count], ">u4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(range(count)))
    return raw


def idx_args(folder, **flags):
    base = dict(data_dir=str(folder), download=False, batch_size=2, num_workers=0)
    return Args(**base | flags)


def test_mnist_in_its_on_disk_format(tmp_path):
    write_idx(tmp_path)
    found, labels, _ = sagan_div.load_images(idx_args(tmp_path), 1)
    assert found.shape == (6, 1, 64, 64) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert (found[:, 0, :, :26] == np.arange(6)[:, None, None]).all()  # enlarged, not turned
    assert (found[:, 0, :, -26:] == 255).all()


@pytest.mark.parametrize("damage, words", [
    (dict(cut=100), "has 4620 bytes, its header .6, 28, 28. asks for 4720"),
    (dict(cut=4710), "has 10 bytes"), (dict(cut=4720), "has 0 bytes"),
    (dict(labels=5), "is of two data sets.*images.*6.*labels.*5"),
])  # fmt: skip
def test_damaged_idx_files_are_named(tmp_path, damage, words):
    write_idx(tmp_path, **damage)
    with pytest.raises(fid.UserError, match=words):
        sagan_div.load_images(idx_args(tmp_path), 1)
    assert not (tmp_path / "cache").exists()


def test_missing_mnist_says_where_and_how(tmp_path):
    words = rf"{tmp_path}.*--download.*MNIST/raw"
    with pytest.raises(fid.UserError, match=words):
        sagan_div.load_images(idx_args(tmp_path), 1)
    with pytest.raises(fid.UserError, match="fashion-mnist.*FashionMNIST/raw"):
        sagan_div.load_images(idx_args(tmp_path, dataset="fashion-mnist"), 1)


# Training -----------------------------------------------------------------------------------------
@pytest.fixture
def few(monkeypatch):
    """40 drawn images, and the order of the updates of both nets."""
    monkeypatch.setattr(fid.Shapes, "targets", [i % 8 for i in range(40)])
    updates, update = [], sagan_div.Run.update

    def counted(run, loss, net):
        updates.append(net)
        return update(run, loss, net)

    monkeypatch.setattr(sagan_div.Run, "update", counted)
    return updates


def quick(**flags):
    base = dict(g_ch=2, d_ch=2, batch_size=16, eval_every=0, num_workers=0, log_every=1, channels=1)
    return small(**base | {"num_samples": 4, "sample_every": 0} | flags)


def test_five_d_steps_to_one_of_g_across_epochs(few, tmp_path):
    sagan_div.train(quick(total_steps=7))  # 2 batches an epoch: 5 steps end within one
    assert "".join(few) == ("D" * 5 + "G") * 7


@pytest.mark.parametrize("epochs, n_critic, steps", [(1, 5, 1), (10, 5, 4), (3, 1, 6)])
def test_epochs_become_steps(few, epochs, n_critic, steps):
    sagan_div.train(quick(epochs=epochs, n_critic=n_critic))
    assert few.count("G") == steps


@each_method
def test_200_steps_stay_finite(method, few, tmp_path):
    tiny = dict(g_ch=1, d_ch=1, batch_size=2, n_critic=1, log_every=50, save_every=200)
    blocks = (1, 2) if method in "abcd" else (1, 2, 3, 4)
    sagan_div.train(quick(method=method, total_steps=200, attn_blocks=blocks, **tiny))
    log = [json.loads(line) for line in next(tmp_path.glob("runs/*/log.jsonl")).open()]
    assert log[-1]["step"] == 200
    assert all(math.isfinite(value) for record in log for value in record.values())
    slopes = {key for key in log[-1] if key.startswith("grad/x_")}
    wanted = {f"grad/x_{where}_{how}" for where in ("real", "fake") for how in ("mean", "max")}
    assert slopes == (wanted if method in (*"abcd", "wgan-div") else set())
    assert ("train/gamma_g_attn2" in log[-1]) == (method in "abcd")


def test_batch_norm_under_a_penalty_is_warned_of(few, capsys):
    fid.warn.cache_clear()
    sagan_div.train(quick(method="wgan-div", recipe="author", total_steps=1))
    assert "WARNING: batch norm in D" in capsys.readouterr().err


# Evaluation ---------------------------------------------------------------------------------------
class Stub:
    """In place of Inception: features from which the images can be told."""

    device = torch.device("cpu")

    def __init__(self):
        self.seen = []

    def __call__(self, batch):
        self.seen.append(batch)
        return F.pad(batch.flatten(1)[:, ::8].double(), (0, 1536)), None


def test_replica_repeats_608_stretched_images(monkeypatch):
    monkeypatch.setattr(fid, "frechet_distance", lambda a, b: (a.n, b.n, a.mu))
    data, stub = np.random.default_rng(0).integers(60, 80, (700, 1, 64, 64), np.uint8), Stub()
    args = small(g_ch=1, channels=1, fid_distinct=608, fid_batch_size=300)
    real, fake, mean = sagan_div.replica_fid(args, stub, Generator(args), data)
    assert real == fake == 10_336 == 17 * 608
    seen = torch.cat(stub.seen)
    assert len(seen) == 2 * 608 and seen.dtype == torch.uint8
    assert (seen[:608].amax((1, 2, 3)) == 255).all() and (seen[:608].amin((1, 2, 3)) == 0).all()
    wanted = torch.tensor(data[-608:]).sub(60).double().mul(255 / 19).flatten(1)[:, ::8].mean(0)
    assert np.allclose(mean[:512], wanted.numpy(), atol=2)


def test_the_attention_figure_shows_what_the_maps_hold():
    args = small(g_ch=8, channels=1, query_pixels=((0, 63), (40, 20)))
    G, z = Generator(args).eval(), torch.randn(2, 100)
    cells, columns = sagan_div.attention_figure(args, G, z)
    assert columns == 5 and cells.shape == (2 * 2 * 5, 3, 128, 128)
    assert cells[0, :, 0, 127].tolist() == [255, 0, 0] == cells[15, :, 80, 40].tolist()
    maps = G.attention_maps(z)
    sizes = [tuple(weights.shape[1:]) for weights in maps.values()]
    assert sizes == [(16, 4), (64, 16), (256, 64), (1024, 256)]
    row = maps["attn4"][1, 20 * 32 + 10].view(16, 16)
    shown = cells[19, 0, ::8, ::8] / 255
    assert torch.allclose(shown, row / row.max(), atol=1 / 254)


def write_run(folder, method, dataset="mnist", fids=(), seed=1, name=None, **flags):
    run = folder / f"sagan_div__{dataset}__{name or method}__s{seed}"
    run.mkdir(parents=True)
    flags = {**sagan_div.DEFAULTS.get(("paper", method), {}), "exp_name": name or method, **flags}
    args = vars(sagan_div.Args(method=method, dataset=dataset, seed=seed, **flags))
    (run / "args.json").write_text(json.dumps({"args": args}))
    lines = [{"step": 100 * i, "metric/fid": value} for i, value in enumerate(fids, 1)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_from_run_folders(tmp_path):
    for method, fids in {"a": [80], "b": [70, 60, 65], "c": [90], "d": [40]}.items():
        write_run(tmp_path, method, fids=fids)
    write_run(tmp_path, "d", fids=[50], seed=2)
    write_run(tmp_path, "d", fids=[1], name="tuned")
    write_run(tmp_path, "d", fids=[3], seed=3, attn_blocks=("none",))  # an ablation is not d
    write_run(tmp_path, "sngan", fids=[2], fid_weights="random")
    write_run(tmp_path, "dcgan", "fashion-mnist")
    with open(tmp_path / "sagan_div__mnist__a__s1" / "log.jsonl", "a") as file:
        file.write('{"step": 200, "metr')  # a run that is writing, or was killed
    text = sagan_div.compare_methods(tmp_path)
    assert "| mnist | d | 55.6425 | 45.0000 (2) |" in text
    assert "| mnist | b | 59.8766 | 60.0000 (1) |" in text
    assert "| mnist | sngan | 26.0231 | not run |" in text
    assert "| fashion-mnist | dcgan | 86.5129 | not run |" in text
    assert "- mnist: published holds; ours holds" in text
    assert "- fashion-mnist: published holds; ours not to be told, missing d b a c" in text
    assert "| sagan_div__mnist__b__s1 | 300 | 64 | 64, 64 | 10000 | 60.0000 | 65.0000 |" in text
    assert "| 1.0000 | 1.0000 |" in text and fid.RANDOM_LABEL in text


def test_order_is_strict():
    assert sagan_div.order(dict(zip("dbac", (1, 2, 3, 4)))) == "holds"
    assert sagan_div.order(dict(zip("dbac", (2, 2, 3, 4)))) == "does not hold"
    assert sagan_div.order(dict(zip("dbac", (1, 3, 2, 4)))) == "does not hold"
    assert "missing c" in sagan_div.order(dict(zip("dba", (1, 2, 3))))
    assert sagan_div.PUBLISHED["sngan"] == (26.0231, 46.9646) and len(sagan_div.PUBLISHED) == 7
