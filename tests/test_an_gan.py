"""an_gan.py: attentive normalization, the conditional networks, losses, evaluation, figures."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

import an_gan
import fid
from an_gan import Args, AttentiveNorm

READINGS = ("weighted", "literal", "readme", "official")
TINY = {"dataset": "shapes", "g_ch": 8, "d_ch": 8, "num_classes": 5, "bn_batches": 3}
TINY |= {"batch_size": 4, "num_samples": 10, "z_dim": 16}


def make(**flags) -> Args:
    """Args of small networks."""
    return Args(**TINY | flags)


def an_layer(channels: int = 6, **flags) -> AttentiveNorm:
    """An AN layer whose every parameter is random, in float64."""
    layer = AttentiveNorm(channels, make(**{"entities": 3, "self_sampling": False} | flags))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The layer --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channels", "flags", "parameters"),
    [
        (256, {}, 94_545), (256, {"entities": 8}, 88_393), (256, {"entities": 32}, 106_849),
        (128, {}, 26_801), (64, {}, 8_289), (32, {}, 2_873),
        (256, {"self_sampling": False}, 78_081), (128, {"self_sampling": False}, 22_657),
        (64, {"self_sampling": False}, 7_233),
        (256, {"an_value": False}, 28_753), (64, {"an_value": False}, 4_129),
        (256, {"region_stats": "bn"}, 94_545),
    ],
)  # fmt: skip
def test_layer_parameters(channels, flags, parameters):
    assert count(AttentiveNorm(channels, make(**flags))) == parameters


def naive_norm(layer: AttentiveNorm, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Regional normalisation by loops over images, entities and channels."""
    n_images, channels, pixels = v.shape
    out, images = torch.zeros_like(v), range(n_images)
    groups = [images] if layer.batch else [[b] for b in images]
    for group, i, c in itertools.product(groups, range(s.shape[1]), range(channels)):
        total_s = sum(s[b, i].sum() for b in group) + 1e-6
        area = pixels * len(group)
        first = sum((s[b, i] * v[b, c]).sum() for b in group)
        mean = {
            "weighted": first / total_s,
            "readme": first / total_s,
            "literal": first / area,
            "official": first / total_s / area,
        }[layer.reading]
        if layer.reading == "weighted":
            var = sum((s[b, i] * (v[b, c] - mean) ** 2).sum() for b in group) / total_s
        else:
            below = area if layer.reading == "literal" else total_s
            var = sum(((s[b, i] * v[b, c] - mean) ** 2).sum() for b in group) / below
        for b in group:
            normal = (v[b, c] - mean) / torch.sqrt(var + 1e-5)
            out[b, c] += (normal * layer.beta[i, c] + layer.alpha[i, c]) * s[b, i]
    return out


@pytest.mark.parametrize("stats", ["in", "bn"])
@pytest.mark.parametrize("reading", READINGS)
def test_fast_form_is_the_naive_form(reading, stats):
    torch.manual_seed(0)
    layer = an_layer(an_reading=reading, region_stats=stats)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64) + 2
    logits = torch.einsum("nc,bchw->bnhw", layer.entity.weight[:, :, 0, 0], x)
    s = (0.1 * logits).softmax(1).flatten(2)
    v = torch.einsum("dc,bchw->bdhw", layer.value.weight[:, :, 0, 0], x)
    v = (v + layer.value.bias[:, None, None]).flatten(2)
    expected = x + layer.rho * naive_norm(layer, v, s).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    single = copy.deepcopy(layer).float()
    torch.testing.assert_close(single(x.float()).double(), expected, rtol=1e-4, atol=2e-5)


V = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
MASK = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=torch.float64)
S = torch.stack([MASK, 1 - MASK])[None]
ORACLE = {
    "weighted": [-1.085441, -0.060302, 0.060302, 1.085441],
    "literal": [0.204026, 2.030719, 1.696774, 2.168484],
    "readme": [-0.557210, 0.062060, 0.114181, 0.380968],
    "official": [0.575231, 1.501972, 1.321513, 1.624173],
}


@pytest.mark.parametrize("reading", READINGS)
def test_toy_oracle(reading):
    layer = AttentiveNorm(1, make(entities=2, an_reading=reading)).double()
    expected = torch.tensor(ORACLE[reading], dtype=torch.float64)  # of no epsilon in the variance
    torch.testing.assert_close(layer.regional_norm(V, S).flatten(), expected, rtol=1e-4, atol=1e-5)
    if reading == "weighted":
        mean, var = layer.statistics(V, S)
        torch.testing.assert_close(mean.flatten().tolist(), [1.75, 3.25], rtol=0, atol=1e-5)
        torch.testing.assert_close(var.sqrt().flatten().tolist(), [0.829156] * 2, rtol=0, atol=1e-5)


def test_beta_scales_and_alpha_shifts():
    layer = AttentiveNorm(1, make(entities=2)).double()
    layer.alpha.data = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    layer.beta.data = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    expected = torch.tensor([-1.499521, 0.480907, 0.061814, 0.956801], dtype=torch.float64)
    torch.testing.assert_close(layer.regional_norm(V, S).flatten(), expected, rtol=0, atol=2e-5)
    layer.alpha.data, layer.beta.data = layer.beta.data, layer.alpha.data  # the habit is wrong here
    assert (layer.regional_norm(V, S).flatten() - expected).abs().max() > 0.5


def test_uniform_masks_are_instance_norm_and_hard_masks_regional():
    torch.manual_seed(0)
    v = torch.randn(2, 5, 40, dtype=torch.float64) * 3 + 1
    owner = torch.randint(4, (2, 40))
    uniform = torch.full((2, 4, 40), 0.25, dtype=torch.float64)
    hard = F.one_hot(owner, 4).transpose(1, 2).double()
    regional = torch.zeros_like(v)
    for b, i in itertools.product(range(2), range(4)):
        part = v[b][:, owner[b] == i]
        regional[b][:, owner[b] == i] = F.instance_norm(part[None])[0]
    for reading in READINGS:
        layer = AttentiveNorm(5, make(entities=4, an_reading=reading)).double()
        errors = [
            (layer.regional_norm(v, uniform) - F.instance_norm(v)).abs().max(),
            (layer.regional_norm(v, hard) - regional).abs().max(),
        ]
        if reading == "weighted":
            assert max(errors) < 1e-5
        else:  # negative control: the other readings are not
            assert min(errors) > 0.1


def test_softmax_temperature_and_layout():
    layer = AttentiveNorm(2, make(entities=2, self_sampling=False))
    layer.entity.weight.data = torch.eye(2)[:, :, None, None]
    s = layer.layout(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
    assert s.flatten()[0].item() == pytest.approx(0.549834, abs=1e-6)
    layer = AttentiveNorm(16, make())
    s = layer.train().layout(torch.randn(2, 16, 8, 8) * 9)
    assert s.shape == (2, 16, 8, 8)
    torch.testing.assert_close(s.sum(1), torch.ones(2, 8, 8))


def test_gain_of_zero_is_identity_and_only_rho_learns_first():
    layer = AttentiveNorm(16, make(entities=4)).train()
    x = torch.randn(2, 16, 8, 8)
    out = layer(x)
    assert torch.equal(out, x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all()
        assert (parameter.grad.abs().max() > 0) == (name == "rho"), name


@pytest.mark.parametrize("flags", [{"an_reading": r} for r in READINGS] + [{"region_stats": "bn"}])
def test_gradients(flags):
    torch.manual_seed(0)
    layer = an_layer(4, entities=3, self_sampling=True, **flags).train()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        torch.manual_seed(1)  # the same positions at each call
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), atol=1e-6)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("stats", ["in", "bn"])
@pytest.mark.parametrize("reading", READINGS)
def test_no_tensor_is_larger_than_the_features(reading, stats):
    images, channels, side = 2, 32, 16
    layer = AttentiveNorm(channels, make(an_reading=reading, region_stats=stats)).train()
    x = torch.randn(images, channels, side, side, requires_grad=True)
    with Sizes() as sizes:
        layer(x).sum().backward()
    assert 0 < sizes.largest <= x.numel()
    with Sizes() as naive:
        s, v = layer.layout(x).flatten(2), x.flatten(2)
        (s[:, :, None] * v[:, None]).sum(3)
    assert naive.largest == 16 * x.numel()  # negative control: the mode sees the naive product


def test_training_memory_is_at_most_eight_feature_maps():
    layer, kept = AttentiveNorm(64, make()).train(), {}
    x = torch.randn(4, 64, 32, 32, requires_grad=True)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 8 * x.untyped_storage().nbytes()


def places_of(layer: AttentiveNorm, x: torch.Tensor) -> torch.Tensor:
    """Which pooled position each entity of each image was given (N, n)."""
    key, query = F.max_pool2d(layer.key(x), 2).flatten(2), layer.query(x).flatten(2)
    every = key.transpose(1, 2) @ query
    drawn = layer.activation(x).flatten(2)
    distance = (drawn[:, :, None] - every[:, None]).abs().amax(3)
    assert distance.amin(2).max() < 1e-5  # each row is the likeness to one key
    return distance.argmin(2)


def test_sampled_positions_differ_per_image_and_per_forward():
    layer, x = AttentiveNorm(16, make(entities=8)), torch.randn(3, 16, 16, 16)
    draws = [places_of(layer, x) for _ in range(60)]
    assert all(len(set(row)) == 8 for draw in draws for row in draw.tolist())  # no repetition
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0], draws[1])
    often = torch.cat(draws).flatten().bincount(minlength=64)  # uniform: 1440 draws over 64
    assert often.min() > 5 and often.max() < 50
    crowded = AttentiveNorm(16, make(entities=32))
    crowded.activation(torch.randn(2, 16, 4, 4))  # more entities than positions: repeated ones


def test_gradient_reaches_keys_at_the_sampled_pixels_only():
    layer, x, kept = AttentiveNorm(16, make(entities=5)).train(), torch.randn(2, 16, 8, 8), []
    layer.rho.data.fill_(1.0)

    def keep(module, args, out):
        out.retain_grad()
        kept.append(out)

    layer.key.register_forward_hook(keep)
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    grad = kept[0].grad
    assert ((grad != 0).flatten(2).sum(2) == 5).all()  # in every channel of every image
    windows = [F.max_pool2d((g != 0).float(), 2).flatten(1) for g in grad]
    assert all((w == w[0]).all() for w in windows)  # the same pooled positions in all channels
    assert not torch.equal(windows[0][0], windows[1][0])
    picked = kept[0][grad != 0]
    assert torch.isin(picked, F.max_pool2d(kept[0], 2)).all()  # through the maximum
    assert layer.t.grad.abs().min() > 0


def test_sampling_stops_outside_training():
    torch.manual_seed(0)
    layer, x = AttentiveNorm(16, make()), torch.randn(2, 16, 8, 8)
    layer.rho.data.fill_(1.0)
    nn.init.normal_(layer.entity.weight)
    assert not torch.equal(layer.train()(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    without = AttentiveNorm(16, make(self_sampling=False)).eval()
    state, kept = layer.state_dict(), without.state_dict().keys()
    without.load_state_dict({key: state[key] for key in kept})
    assert torch.equal(without(x), layer(x))  # t = 0
    layer(x).sum().backward()
    assert layer.t.grad is None and layer.key.weight.grad is None
    alone = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(alone, layer(x))


@pytest.mark.parametrize("mean", [5.0, 100.0])
def test_variance_survives_a_large_mean(mean):
    torch.manual_seed(0)
    v = torch.randn(1, 8, 64 * 64) * 0.35 + mean
    s = (torch.randn(1, 16, 64 * 64)).softmax(1)
    layer = AttentiveNorm(8, make())
    exact = copy.deepcopy(layer).double().regional_norm(v.double(), s.double())
    assert (layer.regional_norm(v, s) - exact).abs().max() < 1e-5
    mass = s.sum(2, keepdim=True)  # negative control: one pass over the unshifted features
    first, second = s @ v.transpose(1, 2) / mass, s @ v.square().transpose(1, 2) / mass
    gain = (second - first.square() + 1e-5).rsqrt()
    one_pass = v * (gain.transpose(1, 2) @ s) - (first * gain).transpose(1, 2) @ s
    assert (one_pass - exact).abs().max() > (2e-5 if mean == 5 else 2e-2)


def test_autocast_keeps_the_statistics_in_fp32():
    torch.manual_seed(0)
    layer, seen = AttentiveNorm(16, make(an_value=False)).eval(), []
    layer.rho.data.fill_(1.0)
    x = (torch.randn(2, 16, 16, 16) * 0.35 + 5).bfloat16()
    norm = layer.regional_norm
    layer.regional_norm = lambda v, s: seen.append((v.dtype, s.dtype)) or norm(v, s)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert seen == [(torch.float32, torch.float32)] and out.dtype == torch.bfloat16
    del layer.regional_norm
    assert (out.double() - layer.double()(x.double())).abs().max() < 0.1
    m, v = x.float().mean((2, 3)), x.square().mean((2, 3)).float()  # negative control: in bf16
    assert ((v - m.square()).clamp_min(0).sqrt() - 0.35).abs().max() > 0.1


def test_batch_statistics_and_their_running_means():
    torch.manual_seed(0)
    layer = an_layer(region_stats="bn").train()
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64) + 4
    s, v = layer.layout(x).flatten(2), layer.value(x).flatten(2)
    weights = s.transpose(0, 1).flatten(1)  # (n, N * P)
    values = v.transpose(0, 1).flatten(1)
    mean = (weights @ values.T) / weights.sum(1, keepdim=True)
    square = (weights @ values.square().T) / weights.sum(1, keepdim=True)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)
    expected = 0.9 + 0.1 * (square - mean.square())
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-4, atol=1e-6)
    layer.eval()
    layer.running_mean, layer.running_var = mean.detach(), (square - mean.square()).detach()
    alone = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(alone, layer(x))  # no batch statistics any more
    torch.testing.assert_close(layer(x), layer.train()(x), rtol=1e-4, atol=1e-4)


# Orthogonality ----------------------------------------------------------------------------------
def test_orthogonality():
    layer = AttentiveNorm(2, make(entities=2))
    layer.entity.weight.data = 2 * torch.eye(2)[:, :, None, None]
    assert an_gan.orthogonality(layer).item() == 18
    w = layer.entity.weight.flatten(1)
    assert (w.T @ w - torch.eye(2)).sum().item() == 6  # the authors' signed sum is another thing
    pair = nn.ModuleList([layer, copy.deepcopy(layer)])
    assert an_gan.orthogonality(pair).item() == 36
    an_gan.orthogonality(pair).backward()
    touched = {name for name, p in pair.named_parameters() if p.grad is not None}
    assert touched == {"0.entity.weight", "1.entity.weight"}
    assert an_gan.orthogonality(nn.Linear(2, 2)).item() == 0


@pytest.mark.parametrize(
    ("init", "low", "high"),
    [("orthogonal", 0, 1e-9), ("normal", 0.9e6, 1.3e6), ("xavier", 13.5, 17.5)],
)
def test_orthogonality_at_the_start(init, low, high):
    torch.manual_seed(0)
    penalty = an_gan.orthogonality(AttentiveNorm(256, make(entity_init=init))).item()
    assert low <= penalty <= high


# Conditioning -----------------------------------------------------------------------------------
def test_conditional_batch_norm():
    torch.manual_seed(0)
    layer, x = an_gan.ConditionalBatchNorm2d(6, 5), torch.randn(8, 6, 4, 4)
    y = torch.randint(5, (8,))
    torch.testing.assert_close(layer(x, y), F.batch_norm(x, None, None, training=True))
    nn.init.normal_(layer.gamma), nn.init.normal_(layer.beta)
    plain, expected = layer.norm(x), torch.zeros_like(x)
    for i, label in enumerate(y.tolist()):
        for c in range(6):
            expected[i, c] = plain[i, c] * layer.gamma[label, c] + layer.beta[label, c]
    torch.testing.assert_close(layer(x, y), expected)
    assert torch.equal(layer(x, F.one_hot(y, 5).float()), layer(x, y))
    half = torch.full((8, 5), 0.2)
    mixed = plain * layer.gamma.mean(0)[:, None, None] + layer.beta.mean(0)[:, None, None]
    torch.testing.assert_close(layer(x, half), mixed)


@pytest.mark.parametrize("model", ["an", "sagan", "sngan-star", "sngan"])
def test_one_hot_weights_are_the_class(model):
    torch.manual_seed(0)
    args = make(model=model)
    G = an_gan.Generator(args).eval()
    for table in (p for name, p in G.named_parameters() if name.endswith((".gamma", ".beta"))):
        nn.init.normal_(table, 1.0, 0.3)
    z, y = torch.randn(6, args.z_dim), torch.arange(6) % 5
    images = G(z, y)
    assert images.shape == (6, 3, 32, 32) and images.abs().max() <= 1
    torch.testing.assert_close(G(z, F.one_hot(y, 5).float()), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([G(z[i : i + 1], y[i : i + 1]) for i in range(6)]), images)
    assert (G(z, (y + 1) % 5) - images).abs().max() > 1e-3
    assert an_gan.generate(G, z, y).dtype == torch.uint8


# Networks ---------------------------------------------------------------------------------------
BIG = {"img_size": 128, "num_classes": 1000, "g_ch": 64, "d_ch": 64}
MID = {"img_size": 64, "g_ch": 64, "d_ch": 64}
SMALL = {"img_size": 32, "g_ch": 64, "d_ch": 64}
TEST = {"img_size": 128, "num_classes": 10}
PLAIN, SAGAN, ADD = {"model": "sngan"}, {"model": "sagan"}, {"an_place": "add"}
OFF, NO_V = {"self_sampling": False}, {"an_value": False}
SIX, ACGAN = {"d_blocks": 6}, {"conditioning": "acgan"}
COUNTS = [
    (BIG | PLAIN, 41_996_931, 20_566_721),
    (BIG | {"model": "sngan-star"}, 41_996_931, 20_566_721),
    (BIG | SAGAN, 42_078_852, 20_587_202),
    (BIG | {"entities": 8}, 41_573_324, 20_573_466),
    (BIG, 41_579_476, 20_575_010),
    (BIG | {"entities": 32}, 41_591_780, 20_578_098),
    (BIG | ADD | {"entities": 8}, 42_085_324, 20_573_466),
    (BIG | ADD, 42_091_476, 20_575_010),
    (BIG | ADD | {"entities": 32}, 42_103_780, 20_578_098),
    (BIG | OFF, 41_563_012, 20_573_954),
    (BIG | OFF | ADD, 42_075_012, 20_573_954),
    (BIG | NO_V, 41_513_684, None),
    (BIG | NO_V | ADD, 42_025_684, None),
    (BIG | {"region_stats": "bn"}, 41_579_476, 20_575_010),
    (BIG | {"lambda_ortho": 0.0}, 41_579_476, 20_575_010),
    (BIG | SIX | PLAIN, 41_996_931, 39_443_137),
    (BIG | SIX | SAGAN, 42_078_852, 39_463_618),
    (BIG | SIX | {"entities": 8}, 41_573_324, 39_449_882),
    (BIG | SIX, 41_579_476, 39_451_426),
    (BIG | SIX | {"entities": 32}, 41_591_780, 39_454_514),
    (BIG | SIX | OFF, 41_563_012, 39_450_370),
    (BIG | ACGAN | PLAIN, 41_996_931, 20_567_721),
    (BIG | ACGAN | PLAIN | SIX, 41_996_931, 39_444_137),
    (BIG | ACGAN, 41_579_476, 20_576_010),
    (BIG | ACGAN | SIX, 41_579_476, 39_452_426),
    (MID | PLAIN | {"num_classes": 200}, 13_366_915, 19_747_521),
    (MID | SAGAN | {"num_classes": 200}, 13_387_396, 19_752_642),
    (MID | {"num_classes": 200}, 13_342_516, 19_755_810),
    (MID | ADD | {"num_classes": 200}, 13_393_716, 19_755_810),
    (MID | PLAIN | {"num_classes": 10}, 12_272_515, 19_552_961),
    (MID | SAGAN | {"num_classes": 10}, 12_292_996, 19_558_082),
    (MID | {"num_classes": 10}, 12_296_756, 19_561_250),
    (MID | ADD | {"num_classes": 10}, 12_299_316, 19_561_250),
    (SMALL | PLAIN | {"num_classes": 10}, 4_304_387, 1_055_105),
    (SMALL | SAGAN | {"num_classes": 10}, 4_386_308, 1_075_586),
    (SMALL | {"num_classes": 10}, 4_393_812, 1_081_906),
    (SMALL | ADD | {"num_classes": 10}, 4_398_932, 1_081_906),
    (SMALL | PLAIN | {"num_classes": 100}, 4_580_867, 1_066_625),
    (SMALL | SAGAN | {"num_classes": 100}, 4_662_788, 1_087_106),
    (SMALL | {"num_classes": 100}, 4_624_212, 1_093_426),
    (SMALL | ADD | {"num_classes": 100}, 4_675_412, 1_093_426),
    (TEST | PLAIN, 746_547, 307_609),
    (TEST | SAGAN, 747_828, 307_930),
    (TEST, 748_780, 308_100),
]


@pytest.mark.parametrize(("flags", "g", "d"), COUNTS)
def test_counts(flags, g, d, monkeypatch):
    args = make(**flags | {"z_dim": 128})
    an_gan.check_args(args)
    # Spectral norm adds buffers only; its power iterations would take seconds here.
    monkeypatch.setattr(an_gan, "spectral_norm", lambda layer: layer)
    with torch.device("meta"):
        assert count(an_gan.Generator(args)) == g
        assert d is None or count(an_gan.Discriminator(args)) == d


@pytest.mark.parametrize("model", ["an", "sagan", "sngan-star", "sngan"])
@pytest.mark.parametrize("conditioning", ["projection", "acgan"])
def test_spectral_norm_stands_where_the_paper_has_it(model, conditioning):
    args = make(model=model, conditioning=conditioning)
    for net, on in ((an_gan.Generator(args), model != "sngan"), (an_gan.Discriminator(args), True)):
        for name, layer in net.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
                assert is_parametrized(layer, "weight") == (on and not name.endswith("an.entity"))


def test_start_is_xavier_with_zero_biases():
    torch.manual_seed(0)
    layer = an_gan.xavier(nn.Conv2d(24, 40, 3), sn=False)
    bound = math.sqrt(6 / (64 * 9))
    assert 0.95 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() == 0
    normed = an_gan.xavier(nn.Linear(30, 50), sn=True)
    assert torch.linalg.matrix_norm(normed.weight, 2).item() == pytest.approx(1, abs=0.1)


def traced(net: nn.Module, *inputs) -> list[tuple[str, tuple, torch.Tensor, torch.Tensor]]:
    """Name, output shape, input and output of every module in the order of their calls."""
    calls = []
    for name, module in net.named_modules():

        def note(module, args, out, name=name):
            calls.append((name, args[0], out))

        if "parametrizations" not in name:
            module.register_forward_hook(note)
    net(*inputs)
    return calls


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("place", ["replace", "add", "tail"])
def test_an_is_in_the_third_block_at_32(size, place):
    args = make(img_size=size, an_place=place)
    calls = traced(an_gan.Generator(args), torch.randn(2, 16), torch.tensor([0, 1]))
    outputs = {name: out for name, _, out in calls}
    order = [name for name, _, _ in calls]
    inputs = {name: x for name, x, _ in calls}
    assert [name for name in order if name.endswith(".an")] == ["blocks.2.an"]
    assert inputs["blocks.2.an"].shape[2:] == (32, 32)
    if place == "tail":
        assert outputs["blocks.2"] is outputs["blocks.2.an"]
        assert inputs["blocks.2.norm2"] is outputs["blocks.2.conv1"]
    else:
        assert inputs["blocks.2.an"] is outputs["blocks.2.conv1"]
    assert ("blocks.2.norm2" in order) == (place != "replace")
    if place == "add":
        assert inputs["blocks.2.norm2"] is outputs["blocks.2.an"]
    calls = traced(an_gan.Discriminator(args), torch.randn(2, 3, size, size), torch.tensor([0, 1]))
    found = {name: x for name, x, _ in calls}
    assert found["blocks.0.an"].shape == (2, (16 if size == 32 else 8), size, size)


@pytest.mark.parametrize(("size", "width", "side"), [(32, 16, 16), (64, 8, 32), (128, 16, 32)])
def test_self_attention_stands_where_sagan_has_it(size, width, side):
    args = make(img_size=size, model="sagan")
    calls = traced(an_gan.Generator(args), torch.randn(2, 16), torch.tensor([0, 1]))
    found = {name: x.shape for name, x, _ in calls}
    assert found["attention"][2:] == (32, 32)
    channels = {32: 32, 64: 16, 128: 32}[size]
    assert found["attention"][1] == channels
    calls = traced(an_gan.Discriminator(args), torch.randn(2, 3, size, size), torch.tensor([0, 1]))
    found = {name: x.shape for name, x, _ in calls if name == "attention"}
    assert found["attention"] == (2, width, side, side)


def test_blocks_by_their_definition():
    torch.manual_seed(0)
    args = make(model="sngan")
    up = an_gan.UpBlock(8, 6, args).eval()
    x, y = torch.randn(2, 8, 4, 4), torch.tensor([1, 3])

    def twice(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = up.conv1(twice(F.relu(up.norm1(x, y))))
    expected = up.conv2(F.relu(up.norm2(h, y))) + up.shortcut(twice(x))
    torch.testing.assert_close(up(x, y), expected)
    down = an_gan.DownBlock(8, 6, down=True).eval()
    h = down.conv2(F.relu(down.conv1(F.relu(x))))
    expected = F.avg_pool2d(h, 2) + F.avg_pool2d(down.shortcut(x), 2)
    torch.testing.assert_close(down(x), expected)
    first = an_gan.DownBlock(3, 6, down=True).eval()
    image = torch.randn(2, 3, 4, 4)
    h = first.conv2(F.relu(first.conv1(image)))  # no activation before it
    expected = F.avg_pool2d(h, 2) + first.shortcut(F.avg_pool2d(image, 2))
    torch.testing.assert_close(first(image), expected)
    same = an_gan.DownBlock(6, 6, down=False).eval()
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(same(x), x + same.conv2(F.relu(same.conv1(F.relu(x)))))


def test_discriminator_heads():
    torch.manual_seed(0)
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    D = an_gan.Discriminator(make(model="sngan")).eval()
    h = x
    for block in D.blocks:
        h = block(h)
    h = F.relu(h).sum((2, 3))
    logits, classes = D(x, y)
    expected = torch.stack([D.linear(h[i])[0] + D.embed.weight[y[i]] @ h[i] for i in range(3)])
    torch.testing.assert_close(logits, expected)
    assert logits.shape == (3,) and classes.shape == (3, 0)
    D = an_gan.Discriminator(make(model="sngan", conditioning="acgan")).eval()
    logits, classes = D(x, y)
    assert classes.shape == (3, 5)
    assert torch.equal(logits, D(x, (y + 1) % 5)[0])  # AC-GAN's logit does not see the label


# Losses -----------------------------------------------------------------------------------------
def test_hinge():
    d_real, d_fake, g_fake = an_gan.HINGE
    s = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    assert d_real(s).tolist() == [3.0, 1.5, 0.5, 0.0]  # cut at 0, which the print leaves out
    assert d_fake(s).tolist() == [0.0, 0.5, 1.5, 3.0]
    assert g_fake(s).tolist() == [2.0, 0.5, -0.5, -2.0]


def test_class_loss():
    y = torch.tensor([0, 3])
    assert an_gan.class_loss(torch.zeros(2, 5), y).item() == pytest.approx(math.log(5))
    sure = 20.0 * F.one_hot(y, 5)
    assert an_gan.class_loss(sure, y).item() < 1e-6 < 10 < an_gan.class_loss(-sure, y).item()
    nothing = an_gan.class_loss(torch.zeros(2, 0, requires_grad=True), y)
    assert nothing.item() == 0
    nothing.backward()


@pytest.mark.parametrize(
    "flags",
    [{}, {"img_size": 64}, {"img_size": 128}, {"an_place": "tail"}, {"region_stats": "bn"}, OFF,
     NO_V, SAGAN, PLAIN | ACGAN, {"img_size": 128, "d_blocks": 6}],
)  # fmt: skip
def test_every_parameter_learns(flags):
    torch.manual_seed(0)
    args = make(**flags)
    G, D = an_gan.Generator(args), an_gan.Discriminator(args)
    for name, gain in (*G.named_parameters(), *D.named_parameters()):
        if name.endswith((".rho", "attention.gamma")):
            nn.init.constant_(gain, 0.5)
    y = torch.tensor([0, 1])
    for net in (G, D):
        logits, classes = D(G(torch.randn(2, args.z_dim), y), y)
        loss = an_gan.HINGE[2](logits).mean() + an_gan.class_loss(classes, y)
        loss = loss + an_gan.orthogonality(net)
        loss.backward(inputs=list(net.parameters()))
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # AN's value has a bias for the sake of its count: the normalisation removes it.
            if not name.endswith(("an.value.bias", "an.key.bias")):
                assert parameter.grad.abs().max() > 0, name


# Evaluation -------------------------------------------------------------------------------------
def test_classes_of_an_evaluation_are_balanced():
    args = make(num_classes=5)
    assert an_gan.eval_classes(args, 12).tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert torch.equal(an_gan.eval_noise(args, 4), an_gan.eval_noise(args, 9)[:4])


@pytest.mark.parametrize("stats", ["in", "bn"])
def test_settled_statistics_are_those_without_self_sampling(stats):
    torch.manual_seed(0)
    args = make(region_stats=stats)
    G = an_gan.Generator(args)
    an = G.blocks[2].an
    an.rho.data.fill_(1.0), an.t.data.fill_(50.0)
    nn.init.normal_(an.entity.weight)
    for _ in range(3):
        G(torch.randn(4, 16), torch.arange(4))
    before, rng = copy.deepcopy(G.state_dict()), torch.get_rng_state()
    found = an_gan.settled(args, G)
    assert torch.equal(torch.get_rng_state(), rng) and G.training
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    assert not any(module.training for module in found.modules())

    twin = copy.deepcopy(G).eval()  # by hand: moments of the inputs of the last batch norm
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    if stats == "bn":
        twin.blocks[2].an.training, twin.blocks[2].an.sampling = True, False
    seen, noise = [], torch.Generator().manual_seed(args.eval_seed + 1)
    twin.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for _ in range(3):
            z = torch.randn(4, 16, generator=noise)
            twin(z, torch.randint(5, (4,), generator=noise))
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(found.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert (G.norm.running_mean - mean).abs().max() > 1e-3  # those of training are others
    kept = an_gan.settled(make(region_stats=stats, bn_batches=0), G)
    assert torch.equal(kept.norm.running_mean, G.norm.running_mean)
    z, y = torch.randn(2, 16), torch.tensor([0, 1])
    assert torch.equal(found(z, y), found(z, y))
    if stats == "bn":
        batches = [p[0] for p in (found.blocks[2].an.running_mean, an.running_mean)]
        assert not torch.allclose(*batches)


class StubInception(nn.Module):
    """Features that are the mean colour of an image, beside zeros."""

    label, protocol, device = "stub", {"sha256": "0" * 64}, torch.device("cpu")

    def forward(self, images):
        features = torch.zeros(len(images), 2048)
        features[:, :3] = images.float().mean((2, 3))
        return features, F.one_hot(torch.arange(len(images)) % 10, 1008) * 100.0


class StubGenerator(nn.Module):
    """Grey images 10 k levels above mid-grey for class k, one in two a level brighter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, z, y):
        level = 10 * y + (torch.arange(len(y)) % 2) + 0.5
        return (level / 127.5)[:, None, None, None].expand(-1, 3, 4, 4) + self.weight


def test_intra_fid_compares_class_with_class():
    args = make(num_classes=3, intra_num=8, fid_batch_size=4)
    labels = torch.arange(24) % 3
    with torch.no_grad():
        images = an_gan.generate(StubGenerator(), torch.zeros(8, 16), torch.zeros(8).long())
    images = images.repeat_interleave(3, 0).numpy()  # class 0 for all three classes
    found = an_gan.score_each_class(args, StubInception(), StubGenerator(), images, labels)
    values = [entry["fid"] for _, entry in sorted(found["intra_fid_per_class"].items())]
    assert values == pytest.approx([0, 3 * 10**2, 3 * 20**2], abs=1e-3)  # |mean shift|^2, 3 colours
    assert found["metric/intra_fid"] == pytest.approx(500, abs=1e-3)


def test_scores_use_every_class(tmp_path):
    args = make(num_classes=5, fid_num=20, fid_batch_size=7)
    images = an_gan.generate(StubGenerator(), torch.zeros(20, 16), torch.arange(20) % 5)
    inputs = an_gan.eval_noise(args, 20), an_gan.eval_classes(args, 20)
    path = tmp_path / "images.npy"
    scores = an_gan.score(args, StubInception(), StubGenerator(), images.numpy(), path, *inputs)
    assert scores["metric/fid"] < 2 and scores["metric/is_mean"] > 1


# Figures ----------------------------------------------------------------------------------------
def test_an_module_sees_the_input_in_eval_mode():
    args = make()
    G = an_gan.Generator(args).train()
    an, x = an_gan.an_module(G, torch.randn(2, 16), torch.tensor([0, 1]))
    assert an is G.blocks[2].an and x.shape == (2, 32, 32, 32) and G.training and an.training
    assert not an._forward_pre_hooks


def test_diagnostics():
    args = make(entities=4)
    G, D = an_gan.Generator(args), an_gan.Discriminator(args)
    z, y, real = torch.randn(2, 16), torch.tensor([0, 1]), torch.randn(2, 3, 32, 32)
    G.blocks[2].an.entity.weight.data.zero_()
    D.blocks[0].an.entity.weight.data.zero_()[0] = 1e6
    D.blocks[0].an.rho.data.fill_(0.25)
    rng = torch.get_rng_state()
    values = an_gan.diagnostics(args, {"g": (G, z, y), "d": (D, real, y)})
    assert torch.equal(torch.get_rng_state(), rng) and all(m.training for m in G.modules())
    assert values["train/layout_entropy_g"] == pytest.approx(1)
    assert values["train/entities_used_g"] == 4
    assert values["train/layout_entropy_d"] < 0.95
    assert values["train/rho_d"] == 0.25 and values["train/t_g"] == pytest.approx(0.1)
    assert values["train/an_std_d"] > 0
    json.dumps(values)
    sagan = make(model="sagan")
    values = an_gan.diagnostics(sagan, {"g": (an_gan.Generator(sagan), z, y)})
    assert values == {"train/gamma_g": 0.0}
    plain = make(model="sngan")
    assert an_gan.diagnostics(plain, {"g": (an_gan.Generator(plain), z, y)}) == {}


def test_region_statistics():
    s = torch.zeros(1, 3, 2, 2)
    s[0, 0, 0], s[0, 2, 1] = 1, 1  # upper half to entity 0, lower to entity 2
    x = torch.tensor([[1.0, 3.0], [10.0, 20.0]]).expand(1, 1, 2, 2)
    (row,) = an_gan.region_statistics(x, s)
    assert row["whole"] == pytest.approx((8.5, x.std().item()))
    assert set(row["regions"]) == {0, 2}
    assert row["regions"][0] == pytest.approx((0.5, 2.0, math.sqrt(2)))
    assert row["regions"][2] == pytest.approx((0.5, 15.0, math.sqrt(50)))


def test_layout_pictures():
    maps = torch.rand(3, 4, 4)
    maps[2] = 0.5
    pictures = an_gan.grey(maps, 16)
    assert pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    assert pictures[0].min() == 0 and pictures[0].max() == 255 and pictures[2].max() == 0
    s = F.one_hot(torch.arange(16).view(1, 4, 4), 16).permute(0, 3, 1, 2).float()
    picture = an_gan.hard_layout(s, 8)
    assert picture.shape == (1, 3, 8, 8)
    assert len(picture[0].flatten(1).T.unique(dim=0)) == 16  # a colour for each entity


def test_interpolation_starts_and_ends_at_the_classes():
    torch.manual_seed(0)
    args = make()
    G = an_gan.Generator(args).eval()
    for name, table in G.named_parameters():
        if name.endswith((".gamma", ".beta")):
            nn.init.normal_(table, 1.0, 0.3)
    rows = an_gan.interpolation(args, G, [1, 3, 0], count=5)
    assert rows.shape == (20, 3, 32, 32)  # two pairs, images and maps
    z = an_gan.eval_noise(args, 1).expand(3, -1)
    ends = an_gan.generate(G, z, torch.tensor([1, 3, 0])).int()
    for row, end in ((0, 0), (4, 1), (10, 1), (14, 2)):
        assert (rows[row].int() - ends[end]).abs().max() <= 1
    assert an_gan.interpolation(make(model="sngan"), G, [1, 3], count=5).shape[0] == 5


def test_save_load_sample_is_the_same():
    torch.manual_seed(0)
    args = make(region_stats="bn")
    G = an_gan.Generator(args)
    G(torch.randn(4, 16), torch.arange(4))
    twin = an_gan.Generator(args)
    twin.load_state_dict(G.state_dict())
    images = [an_gan.class_grid(args, an_gan.settled(args, net)) for net in (G, twin)]
    assert torch.equal(*images) and images[0].shape == (10, 3, 32, 32)
    assert an_gan.columns(args) == 5 and an_gan.columns(make(num_classes=1000)) == 3


# Data -------------------------------------------------------------------------------------------
def photos(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), 20 * i, np.uint8)).save(root / name)


def tree(tmp_path, **flags):
    return make(**{"dataset": "folder", "data_dir": str(tmp_path), "num_classes": 0,
                   "batch_size": 2, "num_workers": 0} | flags)  # fmt: skip


def test_classes_are_the_subfolders(tmp_path):
    photos(tmp_path, "b/0.png", "a/deep/1.jpg", "b/2.PNG")
    (tmp_path / "cache").mkdir()
    args = tree(tmp_path)
    assert args.num_classes == 2
    an_gan.check_args(args)
    images, labels, _ = an_gan.load_labelled(args)
    assert images.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 1]
    assert an_gan.load_labelled(tree(tmp_path, num_classes=1))[1].tolist() == [0, 0, 0]


def test_folder_without_classes(tmp_path):
    photos(tmp_path, "0.png", "1.png")
    with pytest.raises(fid.UserError, match="subfolder per class.*--num-classes 1"):
        an_gan.check_args(tree(tmp_path))
    with pytest.raises(fid.UserError, match="2 images are in no class.*0.png"):
        an_gan.load_labelled(tree(tmp_path, num_classes=2))
    args = tree(tmp_path, num_classes=1)
    an_gan.check_args(args)
    assert an_gan.load_labelled(args)[1].tolist() == [0, 0]
    with pytest.raises(fid.UserError, match="subfolder per class"):
        an_gan.check_args(tree(tmp_path / "missing"))


def test_class_counts_must_agree(tmp_path):
    photos(tmp_path, "a/0.png", "b/1.png", "c/2.png")
    with pytest.raises(fid.UserError, match="--num-classes must be 3.*got 7"):
        an_gan.load_labelled(tree(tmp_path, num_classes=7))
    with pytest.raises(fid.UserError, match="--num-classes must be 3.*got 2"):
        an_gan.load_labelled(tree(tmp_path, num_classes=2))
    (tmp_path / "d").mkdir()
    with pytest.raises(fid.UserError, match="class folders without images.*d"):
        an_gan.load_labelled(tree(tmp_path))


def test_imagenet_from_class_folders_and_from_archives(tmp_path, monkeypatch):
    def unpack(root, split):
        photos(tmp_path, "train/n01/0.JPEG", "train/n02/1.JPEG", "train/n02/2.JPEG")

    monkeypatch.setattr(an_gan.torchvision.datasets, "ImageNet", unpack)
    args = tree(tmp_path, dataset="imagenet", num_classes=2, img_size=32)
    assert an_gan.load_labelled(args)[1].tolist() == [0, 1, 1]
    monkeypatch.setattr(an_gan.torchvision.datasets, "ImageNet", None)  # not needed any more
    assert an_gan.load_labelled(args)[1].tolist() == [0, 1, 1]
    assert make(dataset="imagenet", num_classes=0).num_classes == 1000
    assert Args().img_size == 128


def test_imagenet_missing(tmp_path):
    args = tree(tmp_path / "none", dataset="imagenet", num_classes=1000)
    with pytest.raises(fid.UserError, match="--dataset imagenet not found in .*devkit"):
        an_gan.load_labelled(args)


def test_defaults_are_the_paper():
    args = Args()
    an_gan.check_args(args)
    assert (args.g_lr, args.d_lr, args.beta1, args.beta2) == (1e-4, 4e-4, 0.0, 0.999)
    assert (args.batch_size, args.n_critic, args.total_steps, args.z_dim) == (256, 1, 880_000, 128)
    assert (args.entities, args.tau, args.lambda_ortho, args.model) == (16, 0.1, 1e-3, "an")
    fields = {field.name: field.default for field in dataclasses.fields(Args)}
    assert all(flag in fields for flag in an_gan.AN_FLAGS)
    assert not an_gan.FREE_FLAGS - set(fields)
