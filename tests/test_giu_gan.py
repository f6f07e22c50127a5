"""giu_gan.py: layers against loops, counts of every table row, losses, figures."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import giu_gan
from giu_gan import GIU, Args, Discriminator, Generator, RepresentativeBatchNorm2d, involution


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def macs(net: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of one sample by the rules that reproduce the paper's tables."""
    total = 0

    def hook(module, inputs, output):
        nonlocal total
        x = inputs[0] if inputs else None
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            taps = module.in_channels * math.prod(module.kernel_size)
            total += output.numel() * (taps + (module.bias is not None))
        elif isinstance(module, nn.Linear):
            total += module.in_features * module.out_features
        elif isinstance(module, RepresentativeBatchNorm2d):  # only its two average poolings
            total += 2 * x.shape[1] * (x.shape[2] * x.shape[3] + 1) - 2 * x.numel()
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * x.numel()
        elif isinstance(module, nn.LeakyReLU):
            total += x.numel()
        elif isinstance(module, giu_gan.SqueezeExcite):  # one average pooling
            total += x.shape[1] * (x.shape[2] * x.shape[3] + 1)

    handles = [module.register_forward_hook(hook) for module in net.modules()]
    with torch.no_grad():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return total


C64 = {"dataset": "celeba"}
WGAN64 = {"dataset": "celeba", "model": "wgan-gp"}
# flags, parameters of G and D, multiply-adds of G and D (Tables 1 and 4 to 8)
ROWS = {
    "SNGAN": ({"model": "sngan"}, 1184067, 662977, 78732288, 17625089),
    "Table 7 baseline": ({"giu": "none", "rbn": False}, 1184067, 662977, 78732288, 17625089),
    "without GIU": ({"giu": "none"}, 1185027, 662977, 78732928, 17625089),
    "GIU-GAN": ({}, 1219667, 697105, 79168640, 18056705),
    "without RBN": ({"rbn": False}, 1218707, 697105, 79168000, 18056705),
    "K 5": ({"kernel_size": 5}, 1236307, 713745, 79434880, 18322945),
    "K 7": ({"kernel_size": 7}, 1261267, 738705, 79834240, 18722305),
    "group 8": ({"group_channels": 8}, 1229027, 706465, 79318400, 18206465),
    "group 32": ({"group_channels": 32}, 1214987, 692425, 79093760, 17981825),
    "Only G": ({"giu": "only-g"}, 1219667, 662977, 79168640, 17625089),
    "Only D": ({"giu": "only-d"}, 1185027, 697105, 78732928, 18056705),
    "Middle": ({"giu": "middle"}, 1193899, 671593, 79180032, 18055809),
    "Middle, own Leaky": (
        {"giu": "middle", "giu_act_d": "every"}, 1193899, 671593, 79180032, 18064001,
    ),
    "Shallow": ({"giu": "shallow-d-deep-g"}, 1187351, 665173, 79213760, 18073153),
    "Shallow as costed": (
        {"giu": "shallow-d-deep-g-as-costed"}, 1221991, 699301, 79649472, 18504769,
    ),
    "All": ({"giu": "all"}, 1230863, 707917, 80096576, 18935489),
    "All, own Leaky": ({"giu": "all", "giu_act_d": "every"}, 1230863, 707917, 80096576, 18960065),
    "r1 16": ({"kernel_reduction": 16}, 1200323, 677761, 78859136, 17747201),
    "WGAN-GP": ({"model": "wgan-gp"}, 1184067, 662977, 78760960, 17625089),
    "SAGAN": ({"model": "sagan"}, 1209909, 765859, 81384448, 20261889),
    "DCGAN": ({"model": "dcgan"}, 3677952, 663296, 291618816, 17620992),
    "LSGAN": ({"model": "lsgan"}, 1050883, 98401, 116231168, 1018368),
    "CelebA SNGAN": ({"model": "sngan", **C64}, 3807043, 2764737, 432394240, 104062977),
    "CelebA SNGAN, kept Leaky": (
        {"model": "sngan", "giu_act_d": "kept", **C64}, 3807043, 2764737, 432394240, 104087553,
    ),
    "CelebA GIU-GAN": (C64, 3980275, 2934705, 435819904, 107462913),
    "CelebA without RBN": ({"rbn": False, **C64}, 3978547, 2934705, 435818752, 107462913),
    "CelebA WGAN-GP": (WGAN64, 3807043, 2764737, 432517120, 104062977),
    "CelebA WGAN-GP(+2)": ({"extra_layers": 2, **WGAN64}, 6758467, 5714625, 508112896, 179609601),
    "CelebA WGAN-GP(+3)": ({"extra_layers": 3, **WGAN64}, 6906307, 5751553, 545992704, 217489409),
    "CelebA WGAN-GP(+3), other": (
        {"extra_layers": 3, "third_layer": "g64-d128", **WGAN64},
        6795523, 5862209, 546123776, 217423873,
    ),
    "CelebA SAGAN": ({"model": "sagan", **C64}, 3832885, 3175299, 443002880, 114579457),
    "CelebA LSGAN": ({"model": "lsgan", **C64}, 1494019, 394593, 689221632, 5256192),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_counts_of_every_table_row(row):
    flags, g_params, d_params, g_macs, d_macs = ROWS[row]
    args = Args(**flags)
    giu_gan.check_args(args)
    G, D = Generator(args), Discriminator(args)
    assert (count(G), count(D)) == (g_params, d_params)
    z, x = torch.randn(1, args.z_dim), torch.randn(1, 3, args.img_size, args.img_size)
    assert (macs(G, z), macs(D, x)) == (g_macs, d_macs)
    assert G(z).shape == x.shape and D(x).shape == (1,)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("model", ["giu", "dcgan", "wgan-gp", "lsgan", "sngan", "sagan"])
def test_shapes_range_and_gradients(model, size):
    args = Args(model=model, img_size=size, g_ch=16, d_ch=16, se_reduction=8)
    G, D = Generator(args), Discriminator(args)
    z = torch.randn(3, args.z_dim)
    fake = G(z)
    assert fake.shape == (3, 3, size, size) and fake.abs().max() <= 1
    logits = D(fake)
    assert logits.shape == (3,)
    logits.sum().backward()
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    alone = G.eval()(z[:1])
    assert torch.allclose(alone, G(z)[:1], atol=1e-5)  # an image does not depend on its batch


def naive_involution(x, kernel):
    n, channels, height, width = x.shape
    groups, size = kernel.shape[1], math.isqrt(kernel.shape[2])
    out = torch.zeros_like(x)
    r = size // 2
    for c in range(channels):
        g = c * groups // channels
        for i in range(height):
            for j in range(width):
                for u in range(-r, r + 1):
                    for v in range(-r, r + 1):
                        if 0 <= i + u < height and 0 <= j + v < width:
                            weight = kernel[:, g, (u + r) * size + v + r, i, j]
                            out[:, c, i, j] += weight * x[:, c, i + u, j + v]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_involution_is_the_quadruple_sum(size, groups):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)  # not square: a swapped axis shows
    kernel = torch.randn(2, groups, size**2, 3, 5, dtype=torch.float64)
    expected = naive_involution(x, kernel)
    torch.testing.assert_close(involution(x, kernel), expected, rtol=0, atol=1e-12)
    unfolded = F.unfold(x, size, padding=size // 2).view(2, groups, 4 // groups, size**2, 3, 5)
    torch.testing.assert_close((kernel[:, :, None] * unfolded).sum(3).flatten(1, 2), expected)
    if size > 1:  # negative control: taps in transposed order are another function
        swapped = kernel.unflatten(2, (size, size)).transpose(2, 3).flatten(2, 3)
        assert (involution(x, swapped) - expected).abs().max() > 0.1


def test_involution_keeps_no_unfolded_copy():
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    kernel = torch.randn(2, 2, 9, 8, 8, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        involution(x, kernel)
    padded = 2 * 32 * 10 * 10 * 4
    assert sum(saved.values()) <= padded + kernel.numel() * 4  # an unfolded map: 9 * 4 * x.numel()


def test_giu_kernel_comes_from_scaled_features_and_meets_original_ones():
    args = Args(group_channels=4, kernel_reduction=2, se_reduction=2)
    giu = GIU(8, args).double().eval()
    nn.init.zeros_(giu.se.excite.weight)  # s = sigmoid(0) = 1/2
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    kernel = giu.span(F.relu(giu.norm(giu.reduce(x / 2)))).unflatten(1, (2, 9))
    torch.testing.assert_close(giu(x), involution(x, kernel))
    assert not torch.allclose(giu(x), involution(x / 2, kernel))  # negative controls
    whole = giu.span(F.relu(giu.norm(giu.reduce(x)))).unflatten(1, (2, 9))
    assert not torch.allclose(giu(x), involution(x, whole))


def test_squeeze_excite_weighs_channels_by_their_means():
    se = giu_gan.SqueezeExcite(4, 2).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    z = x.flatten(2).mean(2)
    s = torch.sigmoid(torch.relu(z @ se.squeeze.weight.T) @ se.excite.weight.T)
    torch.testing.assert_close(se(x), s[:, :, None, None])
    assert count(se) == 2 * 4 * 2  # no biases


@pytest.mark.parametrize(
    ("channels", "flags", "params"),
    [(256, {}, 34128), (512, {}, 135840), (128, {}, 8616), (64, {}, 2196),
     (256, {"kernel_size": 5}, 50768), (256, {"kernel_size": 7}, 75728),
     (256, {"group_channels": 8}, 43488), (256, {"group_channels": 32}, 29448)],
)  # fmt: skip
def test_giu_module_parameters(channels, flags, params):
    assert count(GIU(channels, Args(**flags))) == params


def test_rbn_starts_as_scaled_batch_norm_and_leaves_its_input():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 3 + 1
    rbn, bn, before = RepresentativeBatchNorm2d(3).double(), nn.BatchNorm2d(3).double(), x.clone()
    scale = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(rbn(x), scale * bn(x))
    torch.testing.assert_close(rbn.eval()(x), scale * bn.eval()(x))
    assert torch.equal(x, before) and count(rbn) == 15


def test_rbn_identities():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 2
    rbn = RepresentativeBatchNorm2d(3).double()
    nn.init.constant_(rbn.w_m, 0.7)
    seen = []
    rbn.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rbn(x)
    x_cm, mean = seen[0], lambda t: t.mean(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(mean(x_cm), 1.7 * mean(x))
    pooled = x.mean(dim=(2, 3), keepdim=True)
    deviation = (x_cm - mean(x_cm)) - (x - mean(x))
    torch.testing.assert_close(deviation, (0.7 * (pooled - mean(x))).expand_as(x))
    torch.testing.assert_close(rbn.norm.running_mean, 0.1 * mean(x_cm).flatten())
    nn.init.zeros_(rbn.w_m)
    nn.init.constant_(rbn.w_b, 40)  # sigmoid(40) = 1
    torch.testing.assert_close(rbn(x), nn.BatchNorm2d(3).double()(x))
    nn.init.zeros_(rbn.w_b)
    nn.init.constant_(rbn.w_v, 1.5)  # the gate reads the normalised map, not the input
    x_s = nn.BatchNorm2d(3).double()(x)
    gate = torch.sigmoid(1.5 * x_s.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(rbn(x), x_s * gate)


def test_attention_is_the_identity_at_first_and_fused_equals_explicit():
    block = giu_gan.SelfAttention(16).double()
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    assert torch.equal(block(x), x)
    nn.init.constant_(block.gamma, 0.5)
    rows = block.attention_map(x)
    assert rows.shape == (2, 12, 12)
    torch.testing.assert_close(rows.sum(2), torch.ones(2, 12))
    query, key = block.query(x).flatten(2), block.key(x).flatten(2)
    weights = torch.einsum("ncq,nck->nqk", query, key).softmax(2)  # no 1 / sqrt(C)
    out = torch.einsum("nqk,nck->ncq", weights, block.value(x).flatten(2)).view_as(x)
    torch.testing.assert_close(block(x), x + 0.5 * out)
    scaled = (torch.einsum("ncq,nck->nqk", query, key) / 2**0.5).softmax(2)
    wrong = torch.einsum("nqk,nck->ncq", scaled, block.value(x).flatten(2)).view_as(x)
    assert not torch.allclose(block(x), x + 0.5 * wrong)


def test_losses_in_closed_form():
    s = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)
    sigmoid = torch.sigmoid(s)
    expected = {
        "wasserstein": (-s, s, -s),
        "hinge": ((1 - s).clamp_min(0), (1 + s).clamp_min(0), -s),
        "bce": (-sigmoid.log(), -(1 - sigmoid).log(), -sigmoid.log()),
        "least-squares": ((s - 1) ** 2 / 2, s**2 / 2, (s - 1) ** 2 / 2),
    }
    assert giu_gan.ADVERSARIAL.keys() == expected.keys()
    for name, functions in giu_gan.ADVERSARIAL.items():
        for function, values in zip(functions, expected[name]):
            torch.testing.assert_close(function(s), values)
    real, fake, _ = giu_gan.ADVERSARIAL["bce"]
    assert math.isclose(real(s[1]) + fake(s[1]), 2 * math.log(2))
    assert set(giu_gan.LOSS.values()) == expected.keys()


class LinearCritic(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return x.flatten(1) @ self.w


def test_gradient_penalty_on_a_linear_critic():
    w = torch.randn(3 * 4 * 4, dtype=torch.float64)
    D = LinearCritic(w)
    real, fake = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    eps = torch.rand(5, 1, 1, 1, dtype=torch.float64)
    penalty = giu_gan.gradient_penalty(D, real, fake, eps)
    torch.testing.assert_close(penalty, (w.norm() - 1) ** 2)
    (grad,) = torch.autograd.grad(penalty, D.w)
    torch.testing.assert_close(grad, 2 * (w.norm() - 1) * w / w.norm())
    per_pixel = (w.view(3, 4, 4).norm(dim=0) - 1).square().mean()  # the norm over channels only
    assert abs(per_pixel - penalty) > 0.1
    zero = giu_gan.gradient_penalty(LinearCritic(torch.zeros_like(w)), real, fake, eps)
    zero.backward()  # a root of a sum of squares has a NaN gradient here
    assert zero == 1


def test_gradient_penalty_interpolates_a_sample_at_a_time():
    seen = []

    def D(x):
        seen.append(x)
        return x.flatten(1).sum(1)

    real, fake = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    eps = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1)
    giu_gan.gradient_penalty(D, real, fake, eps)
    assert torch.equal(seen[0].detach(), eps.expand(3, 1, 2, 2))


@pytest.mark.parametrize("norm", [True, False])
def test_second_derivatives_pass_through_a_critic_with_giu(norm):
    torch.manual_seed(0)
    args = Args(d_ch=4, group_channels=4, kernel_reduction=4, se_reduction=4, kernel_norm=norm)
    D = Discriminator(args).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fake, eps = torch.randn_like(x), torch.rand(2, 1, 1, 1, dtype=torch.float64)
    giu_gan.gradient_penalty(D, x, fake, eps).backward()
    silent = {n for n, p in D.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all(name.endswith("bias") for name in silent)  # a bias may leave the slope alone
    giu = GIU(4, args).double()
    small = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(giu, (small,), atol=1e-6)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_spectral_norm_has_the_plain_gradient():
    """PyTorch's own, compiled, differentiates at u and v of a step later: 5 % off here."""
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = giu_gan.spectral_norm(nn.Conv2d(4, 16, 1))
        norm = layer.parametrizations.weight[0]
        for vector in (norm._u, norm._v):  # far from the singular vectors: a step changes them
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
        forward = torch.compile(layer) if compiled else layer
        forward(torch.randn(4, 4, 8, 8)).square().sum().backward()
        grads.append(layer.parametrizations.weight.original.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4 * grads[0].abs().max().item())


def test_spectral_norm_stands_where_the_paper_has_it():
    def normed(net):
        return [isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and hasattr(m, "parametrizations")
                for m in net.layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]  # fmt: skip

    def both(**flags):
        args = Args(**flags)
        return normed(Generator(args)), normed(Discriminator(args))

    hidden, none = [True, True, True, False], [False] * 4
    assert both() == (hidden, hidden) == both(model="sagan")
    assert both(model="sngan") == (none, hidden)
    assert both(model="wgan-gp") == (none, none) == both(model="dcgan")
    assert both(sn_output=True) == ([True] * 4, [True] * 4)
    args = Args()
    D = Discriminator(args)
    for _ in range(30):
        D(torch.randn(2, 3, 32, 32))
    D.eval()
    for layer in D.layers[:5:2]:
        sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert abs(sigma - 1) < 0.05
    names = {name.split(".")[-1] for name, _ in D.named_parameters()}
    assert "_u" not in names  # u and v are buffers: they are not counted


def test_rbn_is_the_first_and_last_batch_norm_outside_giu():
    kinds = [type(m).__name__ for m in Generator(Args()).layers if "BatchNorm" in type(m).__name__]
    rbn, bn = "RepresentativeBatchNorm2d", "BatchNorm2d"
    assert kinds == [rbn, bn, bn, rbn]  # RBN, the one after the GIU, BN, RBN


def test_normal_init_reaches_the_weights_under_spectral_norm():
    torch.manual_seed(0)
    D = Discriminator(Args(init="normal"))
    for layer in D.layers:
        if hasattr(layer, "parametrizations"):
            assert abs(layer.parametrizations.weight.original.std() / 0.02 - 1) < 0.1
            assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.1


def test_principal_map_is_the_first_component_with_the_sign_of_the_mean():
    pattern = torch.arange(12.0).view(3, 4)
    features = torch.stack([3 * pattern, 1 - pattern, 0.5 * pattern + 2])
    torch.testing.assert_close(giu_gan.principal_map(features), pattern / 11)
    torch.testing.assert_close(giu_gan.principal_map(-features), 1 - pattern / 11)
    assert giu_gan.principal_map(torch.ones(3, 2, 2)).isfinite().all()


def test_hidden_maps_are_the_last_of_each_size():
    D = Discriminator(Args()).eval()
    sizes = [tuple(m.shape[1:]) for m in giu_gan.hidden_maps(D, torch.zeros(2, 3, 32, 32))]
    assert sizes == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]


@pytest.mark.parametrize("name", ["adam", "adagrad", "rmsprop"])
def test_optimisers_of_table_2(name):
    opt = giu_gan.make_optimizer(Args(optimizer=name), nn.Linear(1, 1), 3e-4)
    assert type(opt).__name__.lower() == name and opt.param_groups[0]["lr"] == 3e-4
    if name == "adam":
        assert opt.param_groups[0]["betas"] == (0.0, 0.9)


def test_an_update_is_adam_on_the_gradient_of_the_loss(tmp_path):
    """The fused optimiser reads raw memory: a gradient in another memory order scrambles weights."""
    args = Args(g_ch=16, d_ch=16, dataset="shapes")
    D = Discriminator(args)
    d_opt = giu_gan.make_optimizer(args, D, 1e-3)
    run = giu_gan.Run(args, torch.device("cpu"), "", D=D, d_opt=d_opt)
    x, fake, eps = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.rand(4, 1, 1, 1)
    loss = D(x).mean() + giu_gan.gradient_penalty(D, x, fake, eps)
    parameters = list(D.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    before = [parameter.detach().clone() for parameter in parameters]
    norm = run.update(loss, "D")
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in grads]).norm())
    for old, new, grad in zip(before, parameters, grads):
        step = grad / (grad.abs() + 1e-8)  # Adam's first step with beta1 = 0
        torch.testing.assert_close(new.detach(), old - 1e-3 * step, rtol=0, atol=1e-6)


def test_the_first_noise_vectors_do_not_depend_on_their_number():
    args = Args(model="lsgan")  # z of 100: no multiple of 16
    assert torch.equal(giu_gan.eval_noise(args, 3), giu_gan.eval_noise(args, 64)[:3])


def test_fid_real_spreads_over_the_whole_data_set(monkeypatch, tmp_path):
    """The images are sorted by class: their first part is no sample of them."""
    images, seen = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1), []

    class Inception:
        protocol, label = {"sha256": "0" * 64}, ""

    monkeypatch.setattr(giu_gan.fid, "dataset_moments", lambda net, x, *a, **k: seen.append(x))
    monkeypatch.setattr(giu_gan.fid, "score_generator", lambda *a: {"fid": 1.0})
    args = Args(fid_real=30, fid_num=10)
    z = giu_gan.eval_noise(args, 10)
    giu_gan.score(args, Inception(), nn.Identity(), images, tmp_path / "x.npy", z)
    (picked,) = seen
    assert len(picked) == 30 and picked.max() >= 48 and len(np.unique(picked)) == 30


def test_processes_keep_the_mean_of_their_terms(monkeypatch, tmp_path):
    """The checkpoint of the first process is every process's on resume."""
    others = iter([torch.tensor([[3.0]]), torch.tensor([[2.0]])])
    monkeypatch.setattr(giu_gan.dist, "all_reduce", lambda rows: rows.add_(next(others)))
    run = giu_gan.Run(Args(dataset="shapes"), torch.device("cpu"), "")
    run.world, run.step, run.keys, run.rows = 2, 1, ["loss/d"], [torch.tensor([1.0])]
    assert run.means() == {"loss/d": 2.0} and run.rows[0].item() == 2.0
    assert run.means() == {"loss/d": 2.0}  # read again, as for a checkpoint and then the log


def test_processes_score_the_generator_of_the_checkpoint(monkeypatch, tmp_path):
    """Batch norm's statistics differ from process to process; the first's are the saved ones."""
    monkeypatch.setattr(giu_gan.fid, "processes", lambda: (1, 2))
    monkeypatch.setattr(giu_gan.dist, "broadcast", lambda buffer, source: buffer.fill_(7))
    monkeypatch.setattr(giu_gan.fid, "dataset_moments", lambda *a, **k: None)
    monkeypatch.setattr(giu_gan.fid, "score_generator", lambda *a: {"fid": 1.0})

    class Inception:
        protocol, label = {"sha256": "0" * 64}, ""

    G = nn.BatchNorm2d(3)
    images = np.zeros((4, 3, 2, 2), np.uint8)
    giu_gan.score(Args(), Inception(), G, images, tmp_path / "x.npy", torch.zeros(10, 3))
    assert (G.running_mean == 7).all() and (G.running_var == 7).all()
