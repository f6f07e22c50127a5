"""gca_gan.py: the NL and GCA blocks against loops, Table 1's networks, losses, readers, figures."""

import copy
import dataclasses
import functools
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fid
import gca_gan
from gca_gan import GCA, Args, Discriminator, Generator, NonLocal, edge_weights, normalize

VARIANTS = ("nodes", "bottleneck", "gram", "gcn")
NL_VARIANTS = ("paper", "value", "pooled")
ROWS = [("dcgan", "none"), ("dcgan", "nl"), ("dcgan", "gca"), ("sagan", "nl"), ("sagan", "gca")]
SIZE = (2, 3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block(variant="nodes", channels=8, size=SIZE, dtype=torch.float64, gain=0.7, **flags):
    """An open block (gain not 0) of lively weights, GCA or, by an NL variant's name, NonLocal."""
    if variant in VARIANTS:
        net = GCA(channels, size, Args(gca_variant=variant, gca_k=4, **flags))
    else:
        net = NonLocal(channels, Args(nl_variant=variant, gca_k=4))
    net = net.to(dtype)
    with torch.no_grad():
        getattr(net, net.gain_name).fill_(gain)
    return net


def macs(net, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# --------------------------------------------------------------------------------------------------
# Sizes and costs
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "channels", "params", "cost"),
    [
        ("nodes", 256, 167_937, 12_189_696),
        ("bottleneck", 256, 157_697, 11_403_264),
        ("gram", 256, 159_745, 11_796_480),
        ("gcn", 256, 99_329, 6_619_136),
        ("nodes", 512, 626_689, 42_729_472),
        ("bottleneck", 512, 626_689, 42_729_472),
    ],
)
def test_gca_parameters_and_macs_at_8x8(variant, channels, params, cost):
    net = GCA(channels, (8, 8), Args(gca_variant=variant))
    assert parameters(net) == params
    assert macs(net, torch.randn(1, channels, 8, 8)) == cost


@pytest.mark.parametrize(
    ("variant", "size", "params"),
    [("nodes", (25, 25), 439_842), ("nodes", (26, 38), 1_048_593),
     ("bottleneck", (26, 38), 17_633), ("gcn", (26, 38), 6_209)],
)  # fmt: skip
def test_gca_parameters_at_64_channels_of_other_sizes(variant, size, params):
    assert parameters(GCA(64, size, Args(gca_variant=variant))) == params


@pytest.mark.parametrize(
    ("variant", "params", "cost"),
    [("paper", 32_769, 2_359_296), ("value", 81_921, 6_422_528), ("pooled", 81_921, 5_406_720)],
)
def test_nl_parameters_and_macs_at_8x8(variant, params, cost):
    net = NonLocal(256, Args(nl_variant=variant))
    assert parameters(net) == params
    assert macs(net, torch.randn(1, 256, 8, 8)) == cost


@pytest.mark.parametrize(
    ("model", "name", "g", "d"),
    [
        ("dcgan", "none", 3_576_704, 2_765_568),
        ("dcgan", "nl", 3_576_704 + 32_769, 2_765_568 + 32_769),
        ("dcgan", "gca", 3_576_704 + 167_937, 2_765_568 + 167_937),
        ("sagan", "none", 3_807_043, 2_764_737),
        ("sagan", "nl", 3_807_043 + 32_769, 2_764_737 + 32_769),
        ("sagan", "gca", 3_807_043 + 167_937, 2_764_737 + 167_937),
    ],
)
def test_parameters_of_every_row(model, name, g, d):
    args = Args(model=model, block=name)
    assert parameters(Generator(args)) == g
    assert parameters(Discriminator(args)) == d


@pytest.mark.parametrize("img_size", [32, 64])
@pytest.mark.parametrize("block_in", ["both", "g", "d"])
@pytest.mark.parametrize(("model", "name"), ROWS)
def test_shapes_and_place_of_the_block(model, name, block_in, img_size):
    args = Args(
        model=model, block=name, block_in=block_in, img_size=img_size, g_ch=4, d_ch=4, gca_k=2
    )
    G, D = Generator(args), Discriminator(args)
    z = torch.randn(2, args.z_dim)
    fake = G(z)
    assert fake.shape == (2, 3, img_size, img_size) and fake.abs().max() <= 1
    assert D(fake).shape == (2,)
    for key, net, x in (("g", G, z[:, :, None, None]), ("d", D, fake)):
        before = net.layers[: net.place](x)
        assert before.shape[2:] == (8, 8)
        assert isinstance(net.layers[net.place - 1], (torch.nn.ReLU, torch.nn.LeakyReLU))
        has = name != "none" and block_in in ("both", key)
        assert isinstance(net.layers[net.place], gca_gan.Gated) == has
        assert sum(isinstance(layer, gca_gan.Gated) for layer in net.modules()) == has


# --------------------------------------------------------------------------------------------------
# The blocks against loops
# --------------------------------------------------------------------------------------------------
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
    n = x.shape[1]
    a = loop_edges(net, x, axis)
    if net.binarize != "off":
        a = (a > 1 / n).astype(float)
    a = a + np.eye(n)
    degree = [sum(a[j, i] for i in range(n)) for j in range(n)]
    hat = [[a[j, i] / math.sqrt(degree[j] * degree[i]) for i in range(n)] for j in range(n)]
    u, theta = conv(net.j, x), net.theta.weight.detach().numpy().T
    J = u.T @ u if net.variant == "gram" else u.T
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
@pytest.mark.parametrize(
    ("variant", "transpose"), [*((v, False) for v in VARIANTS), ("nodes", True), ("gram", True)]
)
def test_gca_is_the_loops(variant, transpose, binarize):
    net = block(variant, gca_y_transpose=transpose, gca_binarize=binarize)
    x = torch.randn(2, 8, *SIZE, dtype=torch.float64)
    expected = np.stack([loop_gca(net, sample) for sample in x.numpy()])
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    wrong = np.stack([loop_gca(net, sample, axis="j") for sample in x.numpy()])
    assert abs(wrong - expected).max() > 1e-3  # the test sees a softmax over the wrong axis


@pytest.mark.parametrize("variant", VARIANTS)
def test_gca_of_more_pixels_than_channels_is_the_loops(variant):
    """There the products are taken in another order."""
    net = block(variant, size=(3, 4))
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    expected = np.stack([loop_gca(net, sample) for sample in x.numpy()])
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    if variant == "nodes":  # and cost less: three products of 8 x 12 and 12 x 12, none of 12 x 12
        maps = 12 * 8 * (2 + 2 + 12 + 8 + 8) + 12 * 12 * 2
        assert macs(net.float(), torch.randn(1, 8, 3, 4)) == maps + 3 * 8 * 12 * 12


def test_orientation_of_y_matters():
    x = torch.randn(1, 8, *SIZE, dtype=torch.float64)
    torch.manual_seed(1)
    plain = block("nodes")(x)
    torch.manual_seed(1)
    assert (block("nodes", gca_y_transpose=True)(x) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("variant", NL_VARIANTS)
def test_nl_is_the_loops(variant):
    net = block(variant)
    x = torch.randn(1, 8, 2, 4, dtype=torch.float64)
    maps = {key: layer(x)[0].detach() for key, layer in (("f", net.f), ("g", net.g), ("h", net.h))}
    if variant == "pooled":  # 2x2 blocks of a 2x4 map: columns 0-1 and 2-3
        for key in "fh":
            m = maps[key]
            maps[key] = torch.stack([m[:, :, 0:2].amax((1, 2)), m[:, :, 2:4].amax((1, 2))], 1)
    f, g, h = (maps[key].flatten(1).numpy() for key in "fgh")
    out = np.zeros((len(h), 8))
    for j in range(8):
        weights = np.array([math.exp(f[:, i] @ g[:, j]) for i in range(f.shape[1])])
        for i, weight in enumerate(weights / weights.sum()):
            out[:, j] += weight * h[:, i]
    p = out if variant == "value" else conv(net.v, out)
    expected = 0.7 * p.reshape(8, 2, 4) + x[0].numpy()
    np.testing.assert_allclose(net(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12)


def test_rows_of_the_edges_sum_to_one_and_belong_to_g():
    f, g = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    a = edge_weights(f, g, torch.float32)
    assert a.shape == (2, 4, 6)
    torch.testing.assert_close(a.sum(2), torch.ones(2, 4))
    assert (a.sum(1) - 1).abs().max() > 0.1


def test_height_and_width_keep_their_order():
    net = block("nodes", gain=0.0)
    x = torch.arange(48.0, dtype=torch.float64).view(1, 8, *SIZE)
    assert torch.equal(x.flatten(2).unflatten(2, SIZE), x) and torch.equal(net(x), x)
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3, 2\)"):
        net(x.transpose(2, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_gcn_takes_maps_of_another_size(variant):
    net, x = block(variant), torch.randn(1, 8, 4, 5, dtype=torch.float64)
    if variant == "gcn":
        assert net(x).shape == x.shape
    else:
        with pytest.raises(ValueError, match=r"built for maps of \(2, 3\), got \(4, 5\); gcn"):
            net(x)


@pytest.mark.parametrize("variant", [*VARIANTS, "paper"])
def test_who_commutes_with_permutations_of_the_pixels(variant):
    net, x = block(variant), torch.randn(2, 8, *SIZE, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 2, 4])

    def permuted(t):
        return t.flatten(2)[:, :, order].unflatten(2, SIZE)

    gap = (net(permuted(x)) - permuted(net(x))).abs().max()
    assert gap < 1e-12 if variant in ("gcn", "paper") else gap > 1e-3


# --------------------------------------------------------------------------------------------------
# The facts about A^, alpha and the gradients
# --------------------------------------------------------------------------------------------------
def test_normalize_is_the_mean_of_soft_edges_and_identity_only():
    a = torch.randn(2, 6, 6, dtype=torch.float64).softmax(2)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close((a + eye).sum(2), torch.full((2, 6), 2.0, dtype=torch.float64))
    torch.testing.assert_close(normalize(a), (a + eye) / 2, rtol=0, atol=1e-15)
    b = (a > 1 / 6).double()
    assert (normalize(b) - (b + eye) / 2).abs().max() > 0.05  # degrees differ
    assert torch.equal(normalize(torch.zeros(1, 6, 6)), torch.eye(6)[None])  # no neighbours, no nan


@pytest.mark.parametrize("variant", [*VARIANTS, *NL_VARIANTS])
def test_the_identity_at_first_and_the_gradients_of_two_steps(variant):
    net = block(variant, size=(2, 4), gain=0.0, dtype=torch.float32)
    x = torch.randn(2, 8, 2, 4)
    assert torch.equal(net(x), x)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for first in (True, False):
        opt.zero_grad()
        net(x).mul(torch.randn(2, 8, 2, 4)).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any() == (name == net.gain_name or not first), name
        opt.step()


def detached(a):
    a = a + torch.eye(a.shape[1], dtype=a.dtype)
    d = a.sum(2).detach().rsqrt()
    return d[:, :, None] * a * d[:, None, :]


@pytest.mark.parametrize("binarize", ["off", "ste"])
def test_no_gradient_flows_through_the_degrees(binarize, monkeypatch):
    net = block("nodes", gca_binarize=binarize)
    x = torch.randn(2, 8, *SIZE, dtype=torch.float64)
    grads = []
    for function in (normalize, detached):
        monkeypatch.setattr(gca_gan, "normalize", function)
        grads.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    scale = max(grad.abs().max() for grad in grads[0])
    for ours, theirs in zip(*grads):
        assert (ours - theirs).abs().max() < 1e-14 * scale
    # of edges that are no softmax, the degrees do carry a gradient: the comparison can see one
    raw = torch.rand(1, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 6, dtype=torch.float64)
    one, other = (
        torch.autograd.grad((f(raw) * weight).sum(), raw)[0] for f in (normalize, detached)
    )
    assert (one - other).abs().max() > 1e-2


def test_straight_through_and_hard_edges():
    x = torch.randn(2, 8, *SIZE, dtype=torch.float64)
    ste = block("nodes", gca_binarize="ste")
    edges = ste.edges(x)
    soft = edge_weights(ste.f(x).flatten(2), ste.g(x).flatten(2), torch.float64)
    torch.testing.assert_close(edges, (soft > 1 / 6).double(), rtol=0, atol=1e-15)
    weight = torch.randn(2, 6, 6, dtype=torch.float64)
    for parameter in (ste.f.weight, ste.g.weight):  # backward as if A were soft
        (ours,) = torch.autograd.grad((edges * weight).sum(), parameter, retain_graph=True)
        (theirs,) = torch.autograd.grad((soft * weight).sum(), parameter, retain_graph=True)
        torch.testing.assert_close(ours, theirs)
        assert ours.any()
    hard = block("nodes", gca_binarize="hard")
    hard(x).sum().backward()
    assert [name for name, p in hard.named_parameters() if p.grad is None] == [
        "f.weight",
        "g.weight",
    ]


@pytest.mark.parametrize("variant", [*VARIANTS, *NL_VARIANTS])
def test_first_and_second_derivatives(variant):
    net = block(variant, channels=4, size=(2, 2))
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().requires_grad_() for p in net.parameters()))
    names = [name for name, _ in net.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(net, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("variant", "growth"), [("nodes", 4), ("bottleneck", 4), ("gram", 8)])
def test_growth_of_the_residual(variant, growth):
    """With even edges (f = 0) p is quadratic in x, and cubic for gram."""
    net, x = block(variant), torch.randn(1, 8, *SIZE, dtype=torch.float64)
    torch.nn.init.zeros_(net.f.weight)
    one, two = net(x) - x, net(2 * x) - 2 * x
    torch.testing.assert_close(two, growth * one)


def test_ratio_is_of_rms():
    net, x = block("paper"), torch.randn(2, 8, *SIZE, dtype=torch.float64)
    p = (net(x) - x) / 0.7
    expected = p.square().mean().sqrt() / x.square().mean().sqrt()
    torch.testing.assert_close(net.ratio, expected.detach())
    net(torch.zeros_like(x))
    assert net.ratio == 0  # and not nan: a dead map must not stop a run


# --------------------------------------------------------------------------------------------------
# Mixed precision
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["nodes", "gram"])
def test_a_product_beyond_fp16_survives_autocast(variant):
    net = block(variant, dtype=torch.float32, gain=1e-4)
    x = 200 * torch.randn(2, 8, *SIZE)
    seen = []
    net.v.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    exact = net(x)
    with torch.autocast("cpu", torch.float16):
        half = net(x.half())
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert seen[1][0].dtype == seen[1][1].dtype == torch.float32
    assert seen[1][0].abs().max() > 65_504 and not seen[1][0].half().isfinite().all()
    assert (half.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("variant", ["nodes", "gcn", "paper"])
def test_edges_are_full_precision_under_bf16_autocast(variant, monkeypatch):
    net = block(variant, dtype=torch.float32, channels=64, size=(8, 8))
    seen, function = [], gca_gan.edge_weights
    spy = lambda *inputs: seen.append((inputs, function(*inputs))) or seen[-1][1]  # noqa: E731
    monkeypatch.setattr(gca_gan, "edge_weights", spy)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(2, 64, 8, 8).bfloat16())
    (f, g, _), a = seen[0]
    assert out.dtype == torch.bfloat16 and f.dtype == torch.bfloat16 and a.dtype == torch.float32
    assert (a.sum(2) - 1).abs().max() < 1e-6
    in_bf16 = (g.transpose(1, 2) @ f).softmax(2)
    assert (in_bf16.float().sum(2) - 1).abs().max() > 1e-4  # what bf16 would give


# --------------------------------------------------------------------------------------------------
# Networks and losses
# --------------------------------------------------------------------------------------------------
SMALL = {"img_size": 32, "g_ch": 4, "d_ch": 4, "gca_k": 2, "z_dim": 8}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dcgan_start(variant):
    args = Args(gca_variant=variant, g_ch=16, d_ch=16)
    for net in (Generator(args), Discriminator(args)):
        for name, layer in net.named_modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                deviation = 4 * 0.02 / math.sqrt(2 * layer.weight.numel())
                assert abs(layer.weight.std() - 0.02) < deviation, name
                assert layer.bias is None
            if isinstance(layer, torch.nn.BatchNorm2d):
                assert 0 < layer.weight.std() < 0.04 and (layer.weight.mean() - 1).abs() < 0.03
                assert not layer.bias.any()
        gca = net.layers[net.place]
        bound = math.sqrt(6 / sum(gca.theta.weight.shape))
        assert 0.7 * bound < gca.theta.weight.abs().max() <= bound and gca.alpha == 0


@pytest.mark.parametrize("name", ["none", "nl", "gca"])
def test_sagan_has_spectral_norm_on_every_layer_and_theta(name):
    args = Args(model="sagan", block=name, **SMALL)
    for net, x in (
        (Generator(args), torch.randn(4, 8)),
        (Discriminator(args), torch.randn(4, 3, 32, 32)),
    ):
        for _ in range(60):
            net(x)
        net.eval()
        kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
        layers = [layer for layer in net.modules() if isinstance(layer, kinds)]
        assert len(layers) == 4 + {"none": 0, "nl": 4, "gca": 6}[name]
        for layer in layers:
            weight = layer.weight.detach()
            if isinstance(layer, torch.nn.ConvTranspose2d):
                weight = weight.transpose(0, 1)
            assert abs(torch.linalg.matrix_norm(weight.flatten(1), 2) - 1) < 0.05
            original = layer.parametrizations.weight.original  # Xavier uniform
            fans = torch.nn.init._calculate_fan_in_and_fan_out(original)
            bound = math.sqrt(6 / sum(fans))
            assert 0.75 * bound < original.abs().max() <= bound * (1 + 1e-6)
        inside = [layer for layer in net.layers[net.place].children() if layer in layers]
        assert [layer for layer in layers if layer.bias is None] == inside
        norms = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
        assert norms == (3 if isinstance(net, Generator) else 0)


def test_loss_values():
    s = torch.tensor([-1.5, 0.0, 0.4, 3.0], dtype=torch.float64)
    log = (
        [math.log(1 + math.exp(-v)) for v in s.tolist()],
        [math.log(1 + math.exp(v)) for v in s.tolist()],
    )
    expected = {
        "bce": (log[0], log[1], log[0]),
        "hinge": ([2.5, 1, 0.6, 0], [0, 1, 1.4, 4], (-s).tolist()),
        "wgan-gp": ((-s).tolist(), s.tolist(), (-s).tolist()),
    }
    assert expected.keys() == gca_gan.ADVERSARIAL.keys()
    for name, values in expected.items():
        for function, value in zip(gca_gan.ADVERSARIAL[name], values):
            torch.testing.assert_close(function(s), torch.tensor(value, dtype=torch.float64))


def test_gradient_penalty_of_a_linear_critic():
    weight = torch.randn(3 * 4 * 4)
    critic = lambda x: x.flatten(1) @ weight  # noqa: E731
    real, fake, eps = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5, 1, 1, 1)
    penalty = gca_gan.gradient_penalty(critic, real, fake, eps)
    torch.testing.assert_close(penalty, (weight.norm() - 1) ** 2)
    assert (penalty - (weight.view(3, -1).norm(dim=0) - 1).square().mean()).abs() > 1  # per pixel


@pytest.mark.parametrize("loss", list(gca_gan.ADVERSARIAL))
@pytest.mark.parametrize(("model", "name"), ROWS)
def test_every_parameter_gets_a_finite_gradient_from_every_loss(model, name, loss):
    args = Args(model=model, block=name, loss=loss, **SMALL)
    G, D = Generator(args), Discriminator(args)
    for net in (G, D):
        gated = net.layers[net.place]
        if isinstance(gated, gca_gan.Gated):
            torch.nn.init.constant_(getattr(gated, gated.gain_name), 0.5)
    d_real, d_fake, g_fake = gca_gan.ADVERSARIAL[loss]
    real, fake = torch.rand(4, 3, 32, 32) * 2 - 1, G(torch.randn(4, 8))
    d_loss = d_real(D(real)).mean() + d_fake(D(fake.detach())).mean()
    if loss == "wgan-gp":
        penalty = gca_gan.gradient_penalty(D, real, fake.detach(), torch.rand(4, 1, 1, 1))
        moved = torch.autograd.grad(
            penalty, list(D.parameters()), retain_graph=True, allow_unused=True
        )
        gained = {
            n
            for (n, _), grad in zip(D.named_parameters(), moved)
            if grad is not None and grad.any()
        }
        inside = {n for n, _ in D.named_parameters() if n.startswith(f"layers.{D.place}.")}
        assert name == "none" or inside <= gained  # second derivatives pass through the block
        d_loss = d_loss + penalty
    terms = gca_gan.block_terms(G, D)
    assert len(terms) == (0 if name == "none" else 4) and all(t.isfinite() for t in terms.values())
    for net, value in ((D, d_loss), (G, g_fake(D(fake)).mean())):
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        for (label, _), grad in zip(net.named_parameters(), grads):
            assert grad is not None and grad.isfinite().all(), label
            # D's last bias moves real and fake alike: only the cross-entropy has a gradient there
            assert grad.any() or (loss != "bce" and label == f"layers.{len(D.layers) - 1}.bias"), (
                label
            )


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def resolved(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["gca_gan.py", "--dry-run", *flags])
    gca_gan.main()
    return json.loads(capsys.readouterr().out)["args"]


def test_a_model_brings_its_settings_and_flags_win(monkeypatch, capsys):
    keys = ("loss", "z_dim", "batch_size", "g_lr", "d_lr", "beta1", "beta2", "total_steps")
    dcgan, sagan = (resolved(monkeypatch, capsys, "--model", name) for name in ("dcgan", "sagan"))
    assert [dcgan[key] for key in keys] == ["bce", 100, 128, 2e-4, 2e-4, 0.5, 0.999, 39_550]
    assert [sagan[key] for key in keys] == ["hinge", 128, 64, 1e-4, 4e-4, 0.0, 0.9, 100_000]
    flags = ("--loss", "bce", "--beta1", "0.5", "--z-dim", "100", "--model", "sagan")
    mixed = resolved(monkeypatch, capsys, *flags)
    assert [mixed[key] for key in keys] == ["bce", 100, 64, 1e-4, 4e-4, 0.5, 0.9, 100_000]


def test_the_channels_must_be_a_multiple_of_k():
    with pytest.raises(
        fid.UserError, match="--gca-k must divide the 12 channels of D's 8x8 map, got 8"
    ):
        gca_gan.check_args(Args(d_ch=3))
    gca_gan.check_args(Args(d_ch=3, block_in="g"))
    gca_gan.check_args(Args(d_ch=3, gca_k=4))


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def celeba(folder, count=6):
    """A CelebA of red images with a green bar of 20 rows at the top, in its on-disk format."""
    root = folder / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    for name in names:
        image = Image.new("RGB", (178, 218), (200, 30, 30))
        image.paste((30, 200, 30), (0, 0, 178, 20))
        image.save(root / "img_align_celeba" / name, quality=95)
    for file, width, header in (
        ("list_eval_partition.txt", 1, ""),
        ("identity_CelebA.txt", 1, ""),
        ("list_attr_celeba.txt", 40, "a " * 40),
        ("list_bbox_celeba.txt", 4, "image_id x_1 y_1 width height"),
        ("list_landmarks_align_celeba.txt", 10, "p " * 10),
    ):
        lines = [str(count), header] if header else []
        lines += [f"{name} {' '.join(['1'] * width)}" for name in names]
        (root / file).write_text("\n".join(lines) + "\n")


@pytest.fixture
def unhashed(monkeypatch):
    """torchvision's reader, but for the MD5s of the real files."""
    kind = torchvision.datasets.CelebA
    monkeypatch.setattr(kind, "file_list", [(a, None, name) for a, _, name in kind.file_list])


def test_celeba_is_cropped_or_squashed(tmp_path, unhashed):
    celeba(tmp_path)
    common = {"dataset": "celeba", "data_dir": str(tmp_path), "batch_size": 4, "num_workers": 0,
              "download": False}  # fmt: skip
    images = {}
    for key, flags in {"paper": {}, "178": {"crop": 178}, "108": {"crop": 108},
                       "squash": {"squash": True}}.items():  # fmt: skip
        array, _, path = gca_gan.load_images(Args(**common, **flags))
        assert array.shape == (6, 3, 64, 64) and path.parent == tmp_path / "cache"
        images[key] = array[0].astype(int)
    np.testing.assert_array_equal(images["paper"], images["178"])
    green = {key: (image[1] > image[0]).mean(axis=1) for key, image in images.items()}
    assert green["squash"][:5].min() == 1 and green["squash"][7:].max() == 0  # 20 / 218 of 64 rows
    assert green["paper"].max() == 0 == green["108"].max()  # the crop starts at row 20
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4


def test_celeba_missing_says_how_to_get_it(tmp_path):
    args = Args(data_dir=str(tmp_path), download=False)
    with pytest.raises(fid.UserError, match="--dataset celeba not found in .*img_align_celeba.zip"):
        gca_gan.load_images(args)


def church(folder, count=8, broken=False):
    """LSUN's church_outdoor_train_lmdb: JPEG entries and WebP entries, 300 x 256 pixels."""
    lmdb = pytest.importorskip("lmdb")
    path = folder / "church_outdoor_train_lmdb"
    with (
        lmdb.open(str(path), map_size=2**24) as database,
        database.begin(write=True) as transaction,
    ):
        for i in range(count):
            buffer = io.BytesIO()
            image = Image.new("RGB", (300, 256), (10 * i, 100, 200 - 10 * i))
            image.save(buffer, "WEBP" if i % 2 else "JPEG", quality=95)
            value = b"no image" if broken and i == 3 else buffer.getvalue()
            transaction.put(f"{count - i:040x}".encode(), value)


@pytest.mark.parametrize("workers", [0, 2])
def test_lsun_church_of_jpeg_and_webp(tmp_path, monkeypatch, workers):
    data, here = tmp_path / "data", tmp_path / "here"
    data.mkdir(), here.mkdir()
    church(data)
    monkeypatch.chdir(here)
    args = Args(dataset="lsun-church", data_dir=str(data), batch_size=4, num_workers=workers)
    images, _, _ = gca_gan.load_images(args)
    assert images.shape == (8, 3, 64, 64)
    for row, image in enumerate(images):  # lmdb's order is that of the keys: the last one first
        i = 7 - row
        colour = np.array([10 * i, 100, 200 - 10 * i])
        assert abs(image.mean(axis=(1, 2)) - colour).max() < 4
    assert not list(here.iterdir())  # torchvision's reader would leave its keys here
    source = gca_gan.LSUNChurch(str(data))
    assert source.transaction is None and len(source) == 8  # nothing open that a worker would get


def test_lsun_church_errors(tmp_path, monkeypatch):
    args = Args(dataset="lsun-church", data_dir=str(tmp_path), batch_size=4, num_workers=0)
    with pytest.raises(fid.UserError, match="church_outdoor_train_lmdb.*--dataset folder"):
        gca_gan.load_images(args)
    church(tmp_path, broken=True)
    with pytest.raises(fid.UserError, match="1 images cannot be read:\n  image 4: "):
        gca_gan.load_images(args)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmdb", None)
        with pytest.raises(fid.UserError, match="needs the package lmdb: pip install lmdb"):
            gca_gan.load_images(args)
    (tmp_path / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"\1" * 8192)
    with pytest.raises(fid.UserError, match="is no readable lmdb"):
        gca_gan.load_images(args)


# --------------------------------------------------------------------------------------------------
# Training, figures, table
# --------------------------------------------------------------------------------------------------
def photos(folder, count=8):
    folder.mkdir()
    for i in range(count):
        noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((40, 48)).save(folder / f"{i}.png")


@pytest.fixture
def trained(tmp_path, capsys):
    """Run folders of two steps each: every row of Table 1, on noise."""
    photos(tmp_path / "photos")
    runs = []
    for model, name in ROWS:
        args = Args(
            model=model, block=name, dataset="folder", data_dir=str(tmp_path / "photos"),
            out_dir=str(tmp_path / "runs"), batch_size=4, total_steps=2, log_every=1, eval_every=0,
            sample_every=2, save_every=2, num_workers=0, num_samples=4, device="cpu", **SMALL
        )  # fmt: skip
        gca_gan.train(args)
        runs.append(gca_gan.run_folder(args))
    capsys.readouterr()
    return runs


def test_runs_log_their_blocks_and_are_set_side_by_side(trained, tmp_path, capsys):
    for (model, name), folder in zip(ROWS, trained):
        assert folder.name == f"gca_gan__folder__{model}-{name}__s1"
        first, last = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        gain = {"nl": "gamma", "gca": "alpha", "none": ""}[name]
        logged = {key for key in last if key.startswith("train/")}
        keys = {f"train/{key}_{net}" for key in (gain, "ratio") for net in "gd"} if gain else set()
        assert logged == keys
        for key in keys:
            assert last[key] != 0 and (first[key] != last[key])
    with open(trained[0] / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 2, "metric/fid": 120.0}) + "\n")
    runs = tuple(str(folder) for folder in trained)
    here = {"data_dir": str(tmp_path / "photos"), "device": "cpu", "num_workers": 0}
    for net in ("d", "g"):
        args = Args(mode="figures", runs=runs, num_samples=4, heatmap_net=net, **here)
        gca_gan.check_args(args)
        gca_gan.figures(args)
        out = capsys.readouterr().out
        assert out.count(f"map of {net.upper()} above 0.5: o ") == 5
    target = trained[0] / "figures"
    samples, maps = (Image.open(target / f"{name}.png") for name in ("samples", "heatmaps"))
    assert samples.size == (4 * 34 + 2, 5 * 34 + 2)
    assert maps.size == ((2 + 4 * 4) * 34 + 2, 4 * 34 + 2)
    lines = (target / "table1.md").read_text().splitlines()
    assert len(lines) == 7 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| DCGAN | 33.39 | 33.59 | dcgan-none (folder, step 2) |" in "\n".join(lines)
    assert sum("| 120.00 | 1 |" in line for line in lines) == 1
    assert sum("not evaluated" in line for line in lines) == 4


def write_run(folder, seed, value, where="log", **flags):
    folder.mkdir(parents=True)
    args = vars(Args(seed=seed, img_size=32, g_ch=8, d_ch=8, **flags))
    (folder / "args.json").write_text(json.dumps({"args": args}))
    records = [{"step": 50, "metric/fid": 1.0}, {"step": 100, "loss/d": 0.5}]
    if where == "log":
        records.append({"step": 100, "metric/fid": value})
    else:
        record = {"step": 100, "metric/fid": value, "weights": "random"}
        (folder / "evaluate.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_table_takes_the_last_step_and_joins_seeds(tmp_path):
    runs = [
        write_run(tmp_path / f"gca{seed}", seed, value) for seed, value in enumerate((30, 32, 37))
    ]
    runs += [write_run(tmp_path / "nl", 1, 41.5, where="evaluate", block="nl")]
    lines = gca_gan.table(runs).splitlines()
    assert len(lines) == 7
    (gca,) = [line for line in lines if line.startswith("| DCGAN + GCA")]
    assert gca.startswith("| DCGAN + GCA | 25.75 | 22.15 | dcgan-gca (celeba, step 100) |")
    assert gca.endswith("| 33.00 ± 3.61 | 3 |")
    (nl,) = [line for line in lines if line.startswith("| DCGAN + NL")]
    assert f"step 100, {fid.RANDOM_LABEL}) |" in nl and nl.endswith("| 41.50 | 1 |")
    assert sum("not run" in line for line in lines) == 3


def test_cost_of_a_published_network():
    args = Args(block="none")
    assert gca_gan.cost(Discriminator(args), torch.zeros(1, 3, 64, 64)) == "2.77 / 104"


def test_overlay_and_heat():
    images = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    for value, colour in ((0.0, (0, 0, 0.5)), (0.5, (0.5, 1, 0.5)), (1.0, (0.5, 0, 0))):
        out = gca_gan.overlay(images, torch.full((1, 1, 8, 8), value)).float().mean((0, 2, 3))
        torch.testing.assert_close(out, 50 + 127.5 * torch.tensor(colour), rtol=0, atol=0.51)
    args = Args(block="gca", **SMALL)
    D, x = Discriminator(args).eval(), torch.randn(2, 3, 32, 32)
    torch.nn.init.constant_(D.layers[D.place].alpha, 0.5)
    maps = gca_gan.heat_maps(D.layers[D.place], D.layers[: D.place](x))
    assert list(maps) == ["o", "x", "gain p"]
    before = D.layers[: D.place](x).detach()
    for key, value in {"x": before, "o": D.layers[D.place](before).detach()}.items():
        mean = value.mean(1, keepdim=True)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        torch.testing.assert_close(maps[key], (mean - low) / (high - low))
    plain = gca_gan.heat_maps(torch.nn.LeakyReLU(), before)
    assert list(plain) == ["o"]


def test_runs_of_other_data_are_refused(tmp_path):
    photos(tmp_path / "photos")
    runs = []
    for size in (32, 64):
        args = Args(
            dataset="folder", data_dir=str(tmp_path / "photos"), out_dir=str(tmp_path / str(size)),
            batch_size=4, total_steps=1, eval_every=0, num_workers=0, num_samples=4, device="cpu",
            **SMALL | {"img_size": size}
        )  # fmt: skip
        gca_gan.train(args)
        runs.append(str(gca_gan.run_folder(args)))
    with pytest.raises(fid.UserError, match="--runs must be of one data set and size"):
        gca_gan.figures(Args(mode="figures", runs=tuple(runs), device="cpu"))


# --------------------------------------------------------------------------------------------------
# ConSinGAN: sizes, networks, penalty
# --------------------------------------------------------------------------------------------------
def photo_args(*flags, image="photo.png"):
    """Args as the command line resolves them for one photograph."""
    return gca_gan.parse(["--model", "consingan", "--image", str(image), *flags])


def pyramid(args, height=40, width=60):
    return [torch.rand(1, 3, *size) * 2 - 1 for size in gca_gan.pyramid_shapes(args, height, width)]


def test_what_follows_from_other_flags_is_not_settled_by_the_models_defaults():
    args = photo_args("--stages", "3", "--niter", "10", "--block", "gca", image="my photo.jpg")
    assert args.total_steps == 30 and args.exp_name == "consingan-gca-my photo"
    assert photo_args("--total-steps", "7").total_steps == 7


@pytest.mark.parametrize(
    ("size", "stages", "expected"),
    [
        ((166, 250), 8, "26x38 29x43 34x50 40x61 51x77 72x108 127x191 166x250"),
        ((166, 250), 6, "26x38 31x47 41x61 60x90 114x172 166x250"),
        ((250, 250), 6, "25x25 33x33 45x45 72x72 158x158 250x250"),
        ((188, 250), 6, "25x34 32x42 42x56 63x84 126x167 188x250"),
        ((166, 250), 1, "166x250"),
        ((166, 250), 2, "26x38 166x250"),
        ((332, 500), 2, "26x38 166x250"),  # brought to --max-size first, and rounded up
        ((1000, 601), 1, "250x151"),
    ],
)
def test_sizes_of_the_stages(size, stages, expected):
    sizes = gca_gan.pyramid_shapes(photo_args("--stages", str(stages)), *size)
    assert " ".join(f"{h}x{w}" for h, w in sizes) == expected


def test_singan_spacing_is_geometric_and_has_fewer_small_stages():
    sizes = gca_gan.pyramid_shapes(photo_args("--spacing", "singan"), 250, 250)
    ratios = [b[0] / a[0] for a, b in zip(sizes, sizes[1:])]
    assert max(ratios) - min(ratios) < 0.05 * max(ratios)
    ours = gca_gan.pyramid_shapes(photo_args(), 250, 250)
    assert sum(h < 60 for h, _ in sizes) < sum(h < 60 for h, _ in ours)


def test_consingan_parameters_and_receptive_field():
    args = photo_args()
    sizes = pyramid(args)
    G, D = gca_gan.PyramidGenerator(args, sizes), gca_gan.PatchDiscriminator(args)
    counts = [parameters(G.head), parameters(G.body[0]), parameters(G.tail), parameters(D)]
    assert counts == [1_792, 110_784, 1_731, 113_153]
    for _ in range(5):
        G.grow()
    assert parameters(G) == 668_227
    assert D(torch.zeros(1, 3, 11, 14)).shape == (1, 1, 1, 4)
    with pytest.raises(RuntimeError):
        D(torch.zeros(1, 3, 10, 14))
    gca = gca_gan.PyramidGenerator(photo_args("--block", "gca"), pyramid(args, 166, 250))
    assert parameters(gca.block) == 1_048_593 and gca.block.size == (26, 38)
    for net in (G, D):
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.weight.numel() > 10_000:
                assert abs(layer.weight.std() - 0.02) < 1e-3 and layer.bias.std() > 0.01


FEW = ("--g-ch", "8", "--d-ch", "8", "--stages", "3", "--min-size", "14", "--max-size", "60")


@pytest.mark.parametrize("place", ["body", "head"])
@pytest.mark.parametrize("block", ["none", "nl", "gca"])
@pytest.mark.parametrize("more", [(), ("--retarget",), ("--batch-norm",), ("--num-layer", "2")])
def test_every_stage_gives_images_of_its_size(block, place, more):
    args = photo_args(*FEW, *more, "--block", block, "--gca-place", place)
    sizes = pyramid(args)
    G = gca_gan.PyramidGenerator(args, sizes)
    torch.nn.init.ones_(G.amps)
    for d, real in enumerate(sizes):
        if d:
            G.grow()
        image = G(G.noise(torch.randn))
        assert image.shape == real.shape and image.abs().max() < 1
        other = G(G.noise(torch.randn))
        assert not torch.equal(other, image)
    D = gca_gan.PatchDiscriminator(args)
    D.add_block(args, tuple(sizes[0].shape[2:]))
    cut = 2 * args.num_layer + 4
    assert D(sizes[0]).shape[2:] == tuple(side - cut for side in sizes[0].shape[2:])


def test_forward_is_the_formulas():
    """Stage i: body(up(y, h + 2 L) + amp noise) + up(y, h), by torch's own interpolation."""
    args = photo_args(*FEW)
    G = gca_gan.PyramidGenerator(args, pyramid(args)).double()
    G.grow()
    torch.nn.init.normal_(G.body[1][0][0].weight)
    G.amps[:2] = torch.tensor([1.0, 0.3])
    z0, z1 = (z.double() for z in G.noise(torch.randn))
    zero = torch.nn.functional.pad
    up = lambda x, h, w: torch.nn.functional.interpolate(  # noqa: E731
        x, (h, w), mode="bicubic", align_corners=True
    )
    (h0, w0), (h1, w1) = z0.shape[2:], G.real1.shape[2:]
    y = G.body[0](zero(up(G.head(zero(z0, [1] * 4)), h0 + 2, w0 + 2), [2] * 4))
    y = G.body[1](up(y, h1 + 6, w1 + 6) + 0.3 * z1) + up(y, h1, w1)
    expected = torch.tanh(G.tail[0](zero(y, [1] * 4)))
    torch.testing.assert_close(G([z0, z1]), expected, rtol=0, atol=1e-6)


def test_resize_is_torchs_bicubic():
    x = torch.randn(2, 3, 7, 9)
    for size in ((9, 11), (20, 31), (1, 1), (7, 9)):
        expected = torch.nn.functional.interpolate(x, size, mode="bicubic", align_corners=True)
        torch.testing.assert_close(gca_gan.resize(x, size), expected, rtol=0, atol=1e-5)


def test_a_new_stage_is_a_copy_of_the_last_without_the_block():
    args = photo_args(*FEW, "--block", "gca")
    G = gca_gan.PyramidGenerator(args, pyramid(args))
    for d in (1, 2):
        torch.nn.init.normal_(G.body[-1][0][0].weight)
        before = parameters(G)
        G.grow()
        assert parameters(G) - before == 3 * (9 * 8 * 8 + 8)
        assert sum(isinstance(layer, GCA) for layer in G.modules()) == 1
        for old, new in zip(G.body[d - 1].parameters(), G.body[d].parameters(), strict=True):
            assert torch.equal(old, new) and old.data_ptr() != new.data_ptr()


@pytest.mark.parametrize("flags", [(), ("--gca-first-only",)])
def test_rates_and_what_is_frozen(flags):
    args = photo_args(*FEW, "--block", "gca", "--train-depth", "2", "--g-lr", "1", *flags)
    G = gca_gan.PyramidGenerator(args, pyramid(args))
    both = {"body.0": 1, "head": 1, "tail": 1, "block": 1}
    later = {"body.1": 1, "body.0": 0.1, "head": 0.1, "tail": 1, "block": 0.1}
    if flags:
        later.pop("block")
    for expected in (both, later, {"body.2": 1, "body.1": 0.1, "tail": 1}):
        rates = {id(p): group["lr"] for group in G.groups(args) for p in group["params"]}
        found = {}
        for name, parameter in G.named_parameters():
            part = ".".join(name.split(".")[: 2 if name.startswith("body") else 1])
            assert parameter.requires_grad == (id(parameter) in rates), name
            if id(parameter) in rates:
                found.setdefault(part, set()).add(round(rates[id(parameter)], 9))
        assert found == {part: {rate} for part, rate in expected.items()}
        if len(G.body) < 3:
            G.grow()


def test_pixel_penalty_is_a_mean_over_pixels_of_norms_over_colours():
    weight = torch.randn(3, 4, 5)
    critic = lambda x: (x * weight).sum(1, keepdim=True)[:, :, 1:-1, 1:-1]  # noqa: E731
    real, fake = torch.randn(2, 1, 3, 4, 5)
    penalty = gca_gan.pixel_penalty(critic, real, fake, torch.rand(1, 1, 1, 1))
    norms = torch.zeros(4, 5)  # the patches do not see the border: a norm of 0 there
    norms[1:-1, 1:-1] = weight.square().sum(0).sqrt()[1:-1, 1:-1]
    torch.testing.assert_close(penalty, (norms - 1).square().mean())
    whole = gca_gan.gradient_penalty(critic, real, fake, torch.rand(1, 1, 1, 1))
    assert (whole - penalty).abs() > 0.5  # the usual penalty is another


# --------------------------------------------------------------------------------------------------
# ConSinGAN: the photograph
# --------------------------------------------------------------------------------------------------
def noise_image(size=(60, 40), mode="RGB", seed=0):
    channels = {"RGB": 3, "L": 1, "CMYK": 4, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    small = Image.fromarray(values.squeeze(), mode if channels != 1 else "L")
    return small.resize(size, Image.BICUBIC)


def test_photographs_of_every_kind_become_upright_rgb(tmp_path, capsys):
    fid.warn.cache_clear()
    clear = noise_image(mode="RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((60, 40)))
    palette = noise_image().quantize(16)
    deep = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)
    frames = [noise_image(seed=i) for i in range(3)]
    turned = noise_image()
    exif = turned.getexif()
    exif[274] = 6  # the camera was turned: rotate by 270 degrees
    for name, image, options, words in (
        ("plain.png", noise_image(), {}, None),
        ("grey.png", noise_image(mode="L"), {}, "mode L"),
        ("palette.png", palette, {}, "mode P"),
        ("cmyk.jpg", noise_image(mode="CMYK"), {}, "mode CMYK"),
        ("deep.png", deep, {}, "mode I"),
        ("alpha.png", clear, {}, "become white"),
        ("film.gif", frames[0], {"save_all": True, "append_images": frames[1:]}, "of 3 frames"),
        ("turned.jpg", turned, {"exif": exif}, None),
    ):
        image.save(tmp_path / name, **options)
        photo = fid.open_photo(tmp_path / name)
        err = capsys.readouterr().err
        assert photo.mode == "RGB" and photo.size == ((40, 60) if "turned" in name else (60, 40))
        assert words in err and name in err if words else not err, name
        if name == "alpha.png":
            assert np.asarray(photo)[0].min() > 250  # transparent there
        if name == "deep.png":
            assert abs(np.asarray(photo)[..., 0] - np.asarray(deep) / 257).max() < 0.51
        if name == "film.gif":
            gap = np.asarray(photo).astype(int) - np.asarray(frames[0])
            assert abs(gap).mean() < 20


def test_levels_are_the_photograph_resized_by_bicubic(tmp_path):
    noise_image((130, 90)).save(tmp_path / "a.png")
    levels = gca_gan.load_pyramid(photo_args("--max-size", "100", image=tmp_path / "a.png"))
    assert levels[-1].shape == (1, 3, 70, 100) and len(levels) == 6
    full = Image.open(tmp_path / "a.png").resize((100, 70), Image.BICUBIC)
    for level in (levels[0], levels[-1]):
        assert level.min() >= -1 and level.max() <= 1
        expected = full.resize(level.shape[:1:-1], Image.BICUBIC)
        pixels = gca_gan.to_pixels(level)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_size_limits_of_the_photograph_and_of_the_block(tmp_path, capsys):
    fid.warn.cache_clear()
    words = r"--min-size must be below 15, the short side at 250x15 pixels: a smaller --min-size"
    with pytest.raises(fid.UserError, match=words):
        gca_gan.pyramid_shapes(photo_args(), 1000, 60)
    assert gca_gan.pyramid_shapes(photo_args("--max-size", "1000"), 1000, 60)[-1] == (1000, 60)
    assert not capsys.readouterr().err
    gca_gan.pyramid_shapes(photo_args(), 49, 60)
    assert "49 pixels, is below twice --min-size" in capsys.readouterr().err
    noise_image((250, 250)).save(tmp_path / "a.png")
    for side, variant, words in (
        (65, "nodes", "4225 pixels, above 4096"), (65, "gram", "--gca-variant must be bottleneck"),
        (65, "bottleneck", ""), (65, "gcn", ""), (41, "nodes", "1681x1681"), (39, "nodes", ""),
    ):  # fmt: skip
        flags = ("--block", "gca", "--gca-variant", variant, "--min-size", str(side))
        args = photo_args(*flags, image=tmp_path / "a.png")
        if words and side == 65:
            with pytest.raises(fid.UserError, match=words):
                gca_gan.load_pyramid(args)
        else:
            gca_gan.load_pyramid(args)
            err = capsys.readouterr().err
            assert words in err and bool(words) == bool(err)


class Restated:
    """ConSinGAN as the paper's base has it, one step after the other, nothing shared or batched.

    Only the layers and the noise are the script's: the noise is the function of the seed and the
    step that makes a resumed run equal.
    """

    def __init__(self, args, photo):
        torch.manual_seed(args.seed)
        self.args, self.photo, self.L = args, photo, args.num_layer
        G, self.D = gca_gan.pyramid_nets(args, photo, 0)
        self.head, self.tail, self.block, self.body = G.head, G.tail, G.block, [G.body[0]]
        self.noise, self.step, self.z, self.amps = torch.Generator(), 0, [photo[0]], [1.0]

    def up(self, y, more, size):
        size = [side + more for side in size]
        return F.interpolate(y, size, mode="bicubic", align_corners=True)

    def G(self, noise):
        y, L = self.head(F.pad(noise[0], [1] * 4)), self.L
        y = self.block(y) if self.args.gca_place == "head" else y
        y = self.body[0](F.pad(self.up(y, 2, y.shape[2:]), [L - 1] * 4))
        y = self.block(y) if self.args.gca_place == "body" else y
        for body, n, amp, real in zip(self.body[1:], noise[1:], self.amps[1:], self.photo[1:]):
            size = real.shape[2:]
            y = body(self.up(y, 2 * L, size) + amp * n) + self.up(y, 0, size)
        return self.tail(F.pad(y, [1] * 4))

    def draw(self):
        made = []
        for real in self.photo[: len(self.body)]:
            h, w = real.shape[2:]
            shape = (1, h + 2 * self.L, w + 2 * self.L, self.args.g_ch) if made else (1, h, w, 3)
            made.append(torch.randn(shape, generator=self.noise).permute(0, 3, 1, 2))
        return made

    def stage(self, d):
        a = self.args
        self.noise.manual_seed(fid.mix("noise", a.seed, self.step))
        if d:
            self.body.append(copy.deepcopy(self.body[-1]))
            self.z.append(self.draw()[d])
            self.amps.append(0.0)
            with torch.no_grad():
                error = (self.G(self.z) - self.photo[d]).square().mean().sqrt().item()
            self.amps[d], self.D.block = a.noise_amp * error, torch.nn.Identity()
        ages = [(body, d - i) for i, body in enumerate(self.body) if d - i < a.train_depth]
        ages += [(self.tail, 0), *[(self.head, d)] * (d < a.train_depth)]
        ages += [(self.block, d)] * (d < (1 if a.gca_first_only else a.train_depth))
        groups = [{"params": [*part.parameters()], "lr": a.g_lr * a.lr_scale**age}
                  for part, age in ages]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        trained = [p for group in groups for p in group["params"]]
        g_opt = torch.optim.Adam(groups, betas=(a.beta1, a.beta2))
        d_opt = torch.optim.Adam(self.D.parameters(), a.d_lr, (a.beta1, a.beta2))
        for i in range(a.niter):
            if i:
                self.noise.manual_seed(fid.mix("noise", a.seed, self.step))
            if i == math.ceil(0.8 * a.niter):
                for group in g_opt.param_groups + d_opt.param_groups:
                    group["lr"] *= 0.1
            real, noise = self.photo[d], self.draw()
            for _ in range(a.n_critic):
                fake, eps = self.G(noise).detach(), torch.rand((), generator=self.noise)
                mixed = (eps * real + (1 - eps) * fake).requires_grad_()
                (grad,) = torch.autograd.grad(self.D(mixed).sum(), mixed, create_graph=True)
                penalty = (grad.square().sum(1).sqrt() - 1).square().mean()
                loss = self.D(fake).mean() - self.D(real).mean() + a.lambda_gp * penalty
                d_opt.zero_grad()
                loss.backward(inputs=[*self.D.parameters()])
                d_opt.step()
            error = (self.G(self.z) - real).square().mean()
            loss = a.lambda_rec * error - self.D(self.G(noise)).mean()
            g_opt.zero_grad()
            loss.backward(inputs=trained)
            for _ in range(a.g_steps):
                g_opt.step()
            self.step += 1


@pytest.mark.parametrize(
    "more",
    [
        ("--block", "none"),
        ("--block", "gca", "--gca-k", "4", "--gca-in-d", "--beta1", "0.3", "--g-steps", "2"),
        ("--block", "gca", "--gca-k", "4", "--gca-place", "head", "--gca-first-only", "--d-lr",
         "1e-3", "--n-critic", "2", "--lambda-gp", "1"),
    ],
)  # fmt: skip
def test_training_is_the_algorithm_restated(more, monkeypatch):
    """Four stages of which two are trained, in float64, to the last weight and amplitude."""
    noise_image().save("photo.png")
    flags = (*FEW, "--stages", "4", "--niter", "6", "--train-depth", "2", "--num-samples", "1",
             "--sample-every", "0", "--device", "cpu")  # fmt: skip
    args, load = photo_args(*flags, *more), gca_gan.load_pyramid
    monkeypatch.setattr(gca_gan, "load_pyramid", lambda args: [x.double() for x in load(args)])
    torch.set_default_dtype(torch.float64)
    try:
        gca_gan.train_consingan(args)
        plain = Restated(args, gca_gan.load_pyramid(args))
        for d in range(4):
            plain.stage(d)
    finally:
        torch.set_default_dtype(torch.float32)
    (path,) = Path("runs").glob("*/checkpoint.pt")
    parts = torch.load(path, weights_only=True)["parts"]
    near = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)  # Adam divides by small numbers
    near(parts["G"]["amps"], torch.tensor(plain.amps, dtype=torch.float64))
    for i, z in enumerate(plain.z):
        near(parts["G"][f"z{i}"], z)
    bodies = {f"body.{i}": body for i, body in enumerate(plain.body)}
    for name, part in {"head": plain.head, "tail": plain.tail, "block": plain.block, **bodies}.items():
        for key, value in part.state_dict().items():
            near(parts["G"][f"{name}.{key}"], value)
    for key, value in plain.D.state_dict().items():
        near(parts["D"][key], value)


# --------------------------------------------------------------------------------------------------
# ConSinGAN: training, resume, samples
# --------------------------------------------------------------------------------------------------
LITTLE = ("--model", "consingan", "--image", "photo.png", *FEW, "--niter", "5", "--num-samples", "2",
          "--log-every", "2", "--save-every", "3", "--sample-every", "0")  # fmt: skip
BLOCK = ("--block", "gca", "--gca-k", "4")


class Killed(BaseException):
    """What nothing catches."""


def records(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines]


def same(a, b):
    """Whether two checkpoints agree in every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("more", [("--gca-in-d",), ("--batch-norm", "--gca-first-only")])
def test_three_stages_end_to_end_with_kills_inside_and_between(more, call, monkeypatch):
    noise_image().save("photo.png")
    flags = (*LITTLE, *BLOCK, *more)
    assert call("gca_gan", *flags, "--out-dir", "whole")[0] == 0
    save = gca_gan.Run.save
    for kill in (3, 5, 12):  # inside the first stage, between two, inside the last

        def stop(self, name="checkpoint.pt", kill=kill):
            save(self, name)
            if self.step == kill and name == "checkpoint.pt":
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(gca_gan.Run, "save", stop)
            call("gca_gan", *flags, "--out-dir", "parts", "--resume")
    code, out, err = call("gca_gan", *flags, "--out-dir", "parts", "--resume")
    assert code == 0 and "from step 12" in out, err
    whole, parts = (next(Path(name).iterdir()) for name in ("whole", "parts"))
    assert whole.name == "gca_gan__image__consingan-gca-photo__s1"
    assert records(whole) == records(parts)
    for name in ("checkpoint.pt", "stage0.pt", "stage1.pt", "stage2.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        assert a["step"] == b["step"] and same(a["parts"], b["parts"]), name
    images = {path.name for path in (whole / "samples").iterdir()}
    assert images == {f"{n:07d}{end}.png" for n in (5, 10, 15) for end in ("", "-rec")}
    last = records(whole)[-1]
    assert last["step"] == 15 and last["train/stage"] == 2 and last["train/alpha_g"] != 0
    assert [r["train/stage"] for r in records(whole)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert ("train/alpha_d" in records(whole)[0]) == ("--gca-in-d" in more)
    assert "train/alpha_d" not in last  # D's block went with stage 0


@pytest.mark.parametrize(
    "flags",
    [
        "--stages 1 --block none",
        "--stages 2 --gca-variant gram --gca-place head --gca-in-d",
        "--gca-variant bottleneck --gca-binarize hard --gca-y-transpose --spacing singan",
        "--block nl --nl-variant pooled --retarget --g-steps 1 --num-layer 2 --lambda-gp 0",
        "--gca-variant gcn --n-critic 1 --retarget --batch-norm --train-depth 1 --gca-in-d",
    ],
)
def test_variants_of_consingan_train(flags, call):
    noise_image().save("photo.png")
    block = () if "--block none" in flags else BLOCK
    argv = (*LITTLE, "--niter", "2", *block, *flags.split())
    code, out, err = call("gca_gan", *argv, "--fid-weights", "random", "--eval-every", "100")
    assert code == 0, err
    (folder,) = Path("runs").iterdir()
    last = records(folder)[-1]
    assert last["metric/sifid"] > 0 and "SIFID" in out
    code, _, err = call("gca_gan", *argv, "--mode", "sample")
    assert code == 0, err


def test_alpha_moves_in_one_step_and_parts_move_as_they_should(call):
    """From the checkpoints: what changed in the last stage, and by how much."""
    noise_image().save("photo.png")
    flags = (*LITTLE, *BLOCK, "--train-depth", "2", "--save-every", "1")
    assert call("gca_gan", *flags, "--total-steps", "1")[0] == 0
    (folder,) = Path("runs").iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    assert state["G"]["block.alpha"] != 0
    # three Adam steps on one gradient: each moves alpha by the learning rate, but for Adam's epsilon
    assert 1.1e-3 < state["G"]["block.alpha"].abs() < 1.5001e-3
    assert call("gca_gan", *flags, "--resume")[0] == 0
    first, second, third = (
        torch.load(folder / f"stage{d}.pt", weights_only=True)["parts"]["G"] for d in range(3)
    )
    moved = {
        key: (third[key] - second[key]).abs().max() > 0 for key in second if key != "amps"
    }  # fmt: skip
    for key, changed in moved.items():
        frozen = key.startswith(("head", "body.0", "block", "real", "z"))
        assert changed != frozen, key
    slow = (second["body.0.0.0.weight"] - first["body.0.0.0.weight"]).abs().max()
    fast = (second["body.1.0.0.weight"] - first["body.0.0.0.weight"]).abs().max()
    assert 0 < slow < 0.2 * fast
    assert second["amps"][0] == 1 and 0 < second["amps"][1] < 0.2 and second["amps"][2] == 0


def test_reconstruction_is_deterministic_and_improves(call):
    noise_image().save("photo.png")
    flags = (*LITTLE, "--stages", "1", "--niter", "60", "--max-size", "30", "--g-ch", "32")
    assert call("gca_gan", *flags, "--log-every", "10")[0] == 0
    (folder,) = Path("runs").iterdir()
    errors = [r["loss/g_rec"] for r in records(folder)]
    assert errors[-1] < 0.5 * errors[0]
    args, G, _ = gca_gan.open_pyramid(photo_args(), folder / "checkpoint.pt")
    with torch.no_grad():
        one, two = (gca_gan.to_pixels(G(G.stack("z"))) for _ in range(2))
    assert torch.equal(one, two)
    shown = np.asarray(Image.open(folder / "samples" / "0000060-rec.png"))
    np.testing.assert_array_equal(shown[2:-2, 2:32], one[0].permute(1, 2, 0).numpy())
    # z* of stage 0 is the photograph itself
    assert torch.equal(G.z0, G.real0)


def test_learning_rates_fall_in_the_last_fifth_of_a_stage(call):
    noise_image().save("photo.png")
    for steps, factor in ((4, 1), (5, 0.1), (9, 1), (10, 0.1)):
        flags = (*LITTLE, "--total-steps", str(steps), "--out-dir", str(steps))
        assert call("gca_gan", *flags)[0] == 0
        (folder,) = Path(str(steps)).iterdir()
        parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
        rates = [group["lr"] for group in parts["d_opt"]["param_groups"]]
        rates.append(max(group["lr"] for group in parts["g_opt"]["param_groups"]))
        assert rates == pytest.approx([5e-4 * factor] * 2)


@pytest.fixture
def photo_run(call):
    """A folder of a finished run of three stages, and one with GCA in its gcn variant."""
    noise_image().save("photo.png")
    assert call("gca_gan", *LITTLE)[0] == 0
    assert call("gca_gan", *LITTLE, *BLOCK, "--gca-variant", "gcn")[0] == 0
    return [Path(f"runs/gca_gan__image__consingan-{name}-photo__s1") for name in ("none", "gca")]


def test_modes_of_a_photograph(photo_run, call):
    none, gca = photo_run
    use = ("--model", "consingan", "--checkpoint", str(gca / "checkpoint.pt"))
    # one of the flags of the run finds it too; the photograph is not needed any more
    Path("photo.png").unlink()
    by_name = ("--model", "consingan", "--image", "photo.png")
    code, out, err = call("gca_gan", *by_name, "--mode", "evaluate", "--fid-weights", "random")
    assert code == 0 and "64 features, 10 samples of 40x60" in out, err
    assert fid.RANDOM_LABEL in out
    scores = json.loads((none / "evaluate.json").read_text())
    assert scores["metric/sifid"] > 0 and scores["metric/sifid_std"] > 0 and scores["step"] == 15
    trunk = fid.load_sifid_trunk("random")
    args, G, _ = gca_gan.open_pyramid(photo_args(), none / "checkpoint.pt")
    real = gca_gan.to_pixels(G.real2)
    assert fid.sifid(trunk, real[0], real)["mean"] < 1e-6
    fakes = gca_gan.photo_samples(args, G, 10)
    assert fid.sifid(trunk, real[0], fakes)["mean"] == pytest.approx(scores["metric/sifid"])
    assert len({image.numpy().tobytes() for image in fakes}) == 10
    diversity = fakes.double().numpy().std(0, ddof=1).mean() / real.double().numpy().std(ddof=1)
    assert scores["metric/diversity"] == pytest.approx(diversity, rel=1e-4)
    others = gca_gan.photo_samples(dataclasses.replace(args, eval_seed=1), G, 1)
    assert not torch.equal(others, fakes[:1])
    flags = ("--mode", "evaluate", "--fid-weights", "random", "--sifid-dims", "192")
    code, out, err = call("gca_gan", *use, *flags)
    assert code == 2 and "40x60 has too few positions for 192 features" in err
    # more samples are the same ones and others
    torch.testing.assert_close(gca_gan.photo_samples(args, G, 3), fakes[:3])
    for flags, count, size in (
        (("--num-samples", "5"), 5, (60, 40)),
        (("--num-samples", "3", "--scale-w", "1.5", "--scale-h", "0.8"), 3, (90, 32)),
    ):
        code, _, err = call("gca_gan", *use, "--mode", "sample", *flags)
        assert code == 0, err
        made = list((gca / "generated").glob("*.png"))
        assert len(made) == count and {Image.open(path).size for path in made} == {size}
        assert (gca / "generated.png").exists()
    runs = ("--runs", str(none), str(gca))
    code, out, err = call("gca_gan", "--model", "consingan", "--mode", "figures", *runs)
    assert code == 0, err
    assert out.count("map above 0.5: o ") == 2 and out.count("not evaluated") == 1
    assert f"SIFID {scores['metric/sifid']:.4g}" in out and ", 64 features, " in out
    (none / "evaluate.json").write_text(json.dumps({**scores, "step": 10}))
    code, out, err = call("gca_gan", "--model", "consingan", "--mode", "figures", *runs)
    assert code == 0 and out.count("not evaluated") == 2, err
    sizes = {"pairs": (5, 2), "stages": (4, 2), "heatmaps": (2 + 4, 4)}
    for name, (columns, rows) in sizes.items():
        image = Image.open(none / "figures" / f"{name}.png")
        assert image.size == (columns * 62 + 2, rows * 42 + 2)
    cells = np.asarray(Image.open(none / "figures" / "stages.png"))
    photo = real[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(cells[2:42, -62:-2], photo)
    for stage in range(3):  # enlarged by repetition
        then, grown, _ = gca_gan.open_pyramid(photo_args(), none / f"stage{stage}.pt")
        fake = F.interpolate(gca_gan.photo_samples(then, grown, 1), size=(40, 60))[0]
        left = 2 + 62 * stage
        np.testing.assert_array_equal(cells[2:42, left : left + 60], fake.permute(1, 2, 0))


def test_photographs_and_models_are_not_mixed_up(photo_run, call):
    none, gca = photo_run
    checkpoint = ("--checkpoint", str(none / "checkpoint.pt"))
    code, _, err = call("gca_gan", "--mode", "sample", *checkpoint)
    assert code == 2 and "--model must be consingan for this checkpoint" in err
    noise_image(seed=5).save("photo.png")
    code, _, err = call("gca_gan", *LITTLE, "--resume")
    assert code == 2 and "--image must be the photograph of runs/" in err
    assert not json.loads((none / "args.json").read_text())["args"]["resume"]  # untouched
    noise_image().save("photo.png")
    code, _, err = call("gca_gan", *LITTLE, "--resume", "--stages", "4")
    assert code == 2 and "--stages was 3, is 4" in err
    noise_image(seed=5).save("photo.png")
    assert call("gca_gan", *LITTLE, "--out-dir", "other")[0] == 0
    (other,) = Path("other").iterdir()
    runs = ("--runs", str(none), str(other))
    code, _, err = call("gca_gan", "--model", "consingan", "--mode", "figures", *runs)
    assert code == 2 and "--runs must be of one photograph and its stages" in err
    assert call("gca_gan", *LITTLE, *BLOCK, "--out-dir", "fixed")[0] == 0
    flags = (*LITTLE, *BLOCK, "--out-dir", "fixed", "--mode", "sample", "--save-every", "500")
    code, _, err = call("gca_gan", *flags, "--scale-h", "2")
    assert code == 2 and "--scale-h must be 1 with --gca-variant nodes" in err and "gcn" in err
    assert call("gca_gan", *flags)[0] == 0


def test_consingan_brings_its_settings(monkeypatch, capsys):
    noise_image((120, 80)).save("photo.png")
    args = resolved(monkeypatch, capsys, "--model", "consingan", "--image", "photo.png")
    found = {key: args[key] for key in ("block", "loss", "lambda_gp", "g_lr", "d_lr", "beta1")}
    assert found == {"block": "none", "loss": "wgan-gp", "lambda_gp": 0.1, "g_lr": 5e-4,
                     "d_lr": 5e-4, "beta1": 0.5}  # fmt: skip
    assert args["total_steps"] == 12_000 and args["exp_name"] == "consingan-none-photo"
    assert resolved(monkeypatch, capsys)["total_steps"] == 39_550
