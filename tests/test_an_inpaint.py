"""an_inpaint.py: counts, layers against loops, losses, holes, photographs, scores, mode inpaint."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import an_inpaint
import fid
from an_inpaint import Args, AttentiveNorm, ContextualAttention, Discriminator, Generator

SMALL = {"img_size": 64, "g_ch": 8, "d_ch": 4, "batch_size": 4, "num_workers": 0}
DOUBLE = torch.float64
CPU = torch.device("cpu")


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def write_photos(folder, number=6, sizes=((80, 64), (64, 96), (72, 72)), suffix=".png"):
    """Façades: windows on a gradient."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        width, height = sizes[i % len(sizes)]
        y, x = np.mgrid[:height, :width]
        wall = np.stack([(x * (i + 1) + y * k) % 200 + 20 for k in (1, 2, 3)], axis=2)
        wall[(x % 16 < 8) & (y % 20 < 10)] = 15 * i
        Image.fromarray(wall.astype(np.uint8)).save(folder / f"house{i:02d}{suffix}")
    return folder


def write_mask(path, size, box=None, fill=255):
    mask = Image.new("L", size)
    mask.paste(fill, box or (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path))


# --------------------------------------------------------------------------------------------------
# Counts
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ({}, 3_794_359),
        ({"entities": 8}, 3_791_279),
        ({"entities": 32}, 3_800_519),
        ({"self_sampling": False}, 3_790_215),
        ({"an_value": False}, 3_777_847),
        ({"region_stats": "bn"}, 3_794_359),
        ({"refine": "ca"}, 3_767_558),
        ({"refine": "plain"}, 3_767_558),
        ({"refine": "sa"}, 3_788_039),
        ({"refine": "none"}, 2_896_454),
        ({"widths": "deepfill"}, 3_628_343),
        ({"widths": "deepfill", "refine": "ca"}, 3_601_542),
        ({"g_ch": 8}, 241_471),
        ({"g_ch": 8, "refine": "ca"}, 238_598),
        ({"g_ch": 8, "refine": "plain"}, 238_598),
        ({"g_ch": 8, "refine": "sa"}, 239_879),
        ({"g_ch": 8, "refine": "none"}, 183_254),
    ],
)
def test_generator_counts(flags, number):
    assert count(Generator(Args(**flags))) == number


def test_counts_of_the_generators_parts():
    G = Generator(Args())
    assert count(G.coarse) == 1_448_227
    assert count(G.branch_a) == 1_018_816
    assert count(G.branch_b) + count(G.branch_b_end) == 723_648
    assert count(G.decoder) == 576_867
    assert count(G.module) == 26_801


def test_critic_counts():
    D = Discriminator(Args())
    assert (count(D.whole), count(D.local), D.patch) == (8_404_993, 8_403_457, None)
    D = Discriminator(Args(critics="global-patch"))
    assert (count(D.whole), count(D.patch), D.local) == (8_404_993, 4_319_361, None)
    D = Discriminator(Args(widths="deepfill"))
    assert (count(D.whole), count(D.local)) == (2_733_441, 4_339_329)
    assert count(Discriminator(Args(critics="global"))) == 8_404_993


def test_the_linear_layer_fits_a_box_that_halves_upwards():
    D = Discriminator(Args(**SMALL, box=39))  # 39, 20, 10, 5, 3, 2, 1
    assert D.local.layers[-1].in_features == 2 * 4 * 1
    assert D.local(torch.rand(2, 3, 39, 39)).shape == (2,)


# --------------------------------------------------------------------------------------------------
# Contextual attention
# --------------------------------------------------------------------------------------------------
def slow_attention(x, mask, fuse, scale=10.0):
    """The definition, position by position."""
    n, _, height, width = x.shape
    h, w = height // 2, width // 2
    maps = torch.zeros(n, h * w, h * w, dtype=x.dtype)
    for i in range(n):
        small = F.pad(x[i, :, ::2, ::2], (1, 1, 1, 1))
        hole = F.pad(mask[i, 0, ::2, ::2], (1, 1, 1, 1))
        places = list(itertools.product(range(h), range(w)))
        patches = [small[:, y : y + 3, z : z + 3].flatten() for y, z in places]
        known = [float(hole[y : y + 3, z : z + 3].sum() == 0) for y, z in places]
        s = torch.stack([torch.stack([p @ q / max(q.norm(), 1e-4) for q in patches])
                         for p in patches])  # fmt: skip

        def along(s, name):
            out = torch.zeros_like(s)
            for p, q, d in itertools.product(range(h * w), range(h * w), (-1, 0, 1)):
                if 0 <= p + d < h * w and 0 <= q + d < h * w:
                    out[name[p], name[q]] += s[name[p + d], name[q + d]]
            return out

        if fuse:
            s = along(s, list(range(h * w)))
            s = along(s, [y * w + z for z in range(w) for y in range(h)])
        m = torch.tensor(known, dtype=x.dtype)
        maps[i] = m * torch.softmax(scale * s * m, dim=1)
    return maps


def slow_paste(x, a):
    n, c, height, width = x.shape
    padded, w = F.pad(x, (1, 1, 1, 1)), width // 2
    out = torch.zeros_like(padded)
    for i, p, q in itertools.product(range(n), range(a.shape[1]), range(a.shape[2])):
        (y, z), (v, u) = divmod(p, w), divmod(q, w)
        patch = padded[i, :, 2 * v : 2 * v + 4, 2 * u : 2 * u + 4]
        out[i, :, 2 * y : 2 * y + 4, 2 * z : 2 * z + 4] += a[i, p, q] * patch
    return out[:, :, 1:-1, 1:-1] / 4


@pytest.mark.parametrize("fuse", [False, True])
def test_contextual_attention_is_its_definition(fuse):
    x = torch.randn(2, 3, 6, 8, dtype=DOUBLE)
    mask = torch.zeros(2, 1, 6, 8, dtype=DOUBLE)
    mask[0, :, 2:4, 2:4] = 1
    mask[1, :, :, 6:] = 1
    module = ContextualAttention(Args(refine="ca", fuse=fuse))
    a = slow_attention(x, mask, fuse)
    torch.testing.assert_close(module.attention(x, mask), a)
    torch.testing.assert_close(module(x, mask), slow_paste(x, a))
    assert not torch.allclose(a, slow_attention(x, mask, not fuse))
    small = x[:1, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: module(y, mask[:1, :, :4, :4]), (small,))


def test_contextual_attention_at_a_high_scale_is_the_identity_inside():
    module = ContextualAttention(Args(refine="ca", fuse=False))
    module.scale = 1000.0
    x, mask = torch.randn(1, 16, 12, 16, dtype=DOUBLE), torch.zeros(1, 1, 12, 16, dtype=DOUBLE)
    # Unit patches: the norm of the row's own patch does not count, that of the others does.
    out = module(x, mask)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], x[..., 1:-1, 1:-1])
    torch.testing.assert_close(out[..., 0, 1:-1], x[..., 0, 1:-1] / 2)  # covered half as often
    torch.testing.assert_close(out[..., 0, 0], x[..., 0, 0] / 4)


def test_contextual_attention_rows_and_masks():
    module, x = ContextualAttention(Args(refine="ca")), torch.randn(2, 4, 8, 8, dtype=DOUBLE)
    none, full = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    torch.testing.assert_close(module.attention(x, none).sum(2), torch.ones(2, 16, dtype=DOUBLE))
    assert (module(x, full) == 0).all()
    some = none.clone()
    some[..., :4, :4] = 1
    a, s = module.attention(x, some), module.similarity(x)
    known = torch.tensor([float(y > 2 or z > 2) for y in range(4) for z in range(4)])
    mass = (10 * s * known).softmax(dim=2)
    torch.testing.assert_close(a.sum(2), 1 - (mass * (1 - known)).sum(2))
    assert (a.sum(2) < 1).any()  # with minus infinity every row would sum to 1
    assert (a[:, :, known == 0] == 0).all()


def test_contextual_attention_has_no_weights_whose_products_are_denormal():
    """They made it 15 times slower on a CPU."""
    module, x = ContextualAttention(Args(refine="ca")), 0.025 * torch.randn(1, 128, 16, 16)
    a = module.attention(x, torch.zeros(1, 1, 16, 16))
    plain = (10 * module.similarity(x)).softmax(dim=2)
    assert not ((a > 0) & (a < 1e-29)).any() and ((plain > 0) & (plain < 1e-29)).any()
    torch.testing.assert_close(a, plain)


def test_contextual_attention_stays_in_fp32_under_autocast():
    module, x = ContextualAttention(Args(refine="ca")), torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        a = module.attention(x, torch.zeros(1, 1, 8, 8))
        out = module(x, torch.zeros(1, 1, 8, 8))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(x, torch.zeros(1, 1, 8, 8)))
    assert a.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Attentive normalization in its place
# --------------------------------------------------------------------------------------------------
TOY = {
    "weighted": [-1.085441, -0.060302, 0.060302, 1.085441],
    "literal": [0.204026, 2.030719, 1.696774, 2.168484],
    "readme": [-0.557210, 0.062060, 0.114181, 0.380968],
    "official": [0.575231, 1.501972, 1.321513, 1.624173],
}


@pytest.mark.parametrize("reading", TOY)
def test_toy_oracle_of_the_four_readings(reading):
    an = AttentiveNorm(1, Args(entities=2, an_reading=reading)).double()
    v = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=DOUBLE)
    first = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=DOUBLE)
    out = an.regional_norm(v, torch.stack((first, 1 - first))[None]).flatten().tolist()
    assert out == pytest.approx(TOY[reading], abs=2e-4)
    assert all(out != pytest.approx(TOY[o], abs=2e-2) for o in TOY if o != reading)


def test_an_with_zero_gain_is_plain_with_the_same_weights():
    an, plain = Generator(Args(**SMALL)), Generator(Args(**SMALL, refine="plain"))
    missing, unexpected = plain.load_state_dict(an.state_dict(), strict=False)
    assert not missing and all(key.startswith("module.") for key in unexpected)
    image, mask = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 1, 64, 64) < 0.3).float()
    for mode in (True, False):
        a, b = (net.train(mode)(image, mask) for net in (an, plain))
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    with torch.no_grad():
        an.module.rho.fill_(0.5)
    assert not torch.equal(an(image, mask)[1], plain(image, mask)[1])


def test_self_sampling_acts_in_training_only():
    G = Generator(Args(**SMALL))
    with torch.no_grad():
        G.module.rho.fill_(1)
        G.module.t.fill_(50)
    image, mask = torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    assert not torch.equal(G(image, mask)[1], G(image, mask)[1])
    assert torch.equal(G.eval()(image, mask)[1], G(image, mask)[1])


@pytest.mark.parametrize("flags", [{}, {"refine": "ca"}, {"refine": "sa"}, {"refine": "none"}])
def test_every_generator_parameter_gets_a_finite_gradient(flags):
    args = Args(**SMALL, **flags)
    G = Generator(args)
    for name, parameter in G.named_parameters():
        if name in ("module.rho", "module.gamma"):
            torch.nn.init.constant_(parameter, 0.7)  # at 0 nothing else of the module gets one
    image, mask = torch.rand(2, 3, 64, 64) * 2 - 1, torch.zeros(2, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    coarse, fine = G(image, mask)
    box = torch.full((2, 2), 16)
    loss = an_inpaint.reconstruction_loss(args, coarse, fine, image, mask, box)
    (loss + an_inpaint.orthogonality(G)).backward()
    for name, parameter in G.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # k's bias adds the same to all entities, v's is normalised away
        if name not in ("module.key.bias", "module.value.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_orthogonality_of_twice_the_identity():
    an = AttentiveNorm(2, Args(entities=2))
    with torch.no_grad():
        an.entity.weight.copy_(2 * torch.eye(2)[..., None, None])
    assert an_inpaint.orthogonality(an).item() == 18  # the signed sum would be 6
    assert an_inpaint.orthogonality(Generator(Args(**SMALL, refine="plain"))).item() == 0


def test_layout_use_shows_uniform_and_one_takes_all():
    uniform = torch.full((2, 4, 3, 3), 0.25)
    assert an_inpaint.layout_use(uniform) == (pytest.approx(1), 4)
    single = torch.zeros(2, 4, 3, 3)
    single[:, 1] = 1
    assert an_inpaint.layout_use(single) == (0, 1)


# --------------------------------------------------------------------------------------------------
# Networks: what is missing is never seen, clamping, gradients, boxes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("refine", ["an", "ca", "plain", "none"])
def test_one_is_missing_and_what_is_missing_is_never_seen(refine):
    G = Generator(Args(**SMALL, refine=refine)).eval()
    image, mask = torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 10:50] = 1
    other = torch.where(mask > 0, -image, image)
    for a, b in zip(G(image, mask), G(other, mask)):
        assert torch.equal(a, b)
    other = torch.where(mask > 0, image, -image)  # a known pixel does count
    assert not torch.equal(G(image, mask)[1], G(other, mask)[1])


def test_outputs_are_clamped_and_the_coarse_network_learns_from_the_fine_output():
    G = Generator(Args(**SMALL))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    G(torch.zeros(1, 3, 64, 64), mask)[1].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in G.coarse.parameters())
    with torch.no_grad():
        G.decoder[-1].bias.fill_(9)
        G.coarse[-1].bias.fill_(-9)
    coarse, fine = G(torch.zeros(1, 3, 64, 64), mask)
    assert (coarse == -1).all() and (fine == 1).all()


def test_upsampling_doubles_pixels_and_the_sizes_follow_the_table():
    G, sizes = Generator(Args(g_ch=4)), []
    for layer in G.coarse:
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:3])))
    G(torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256))
    down = [(4, 256), (8, 128), (8, 128), *[(16, 64)] * 9]
    assert sizes == [*down, (8, 128), (8, 128), (4, 256), (2, 256), (3, 256)]
    dilations = [m.dilation[0] for m in G.coarse if isinstance(m, torch.nn.Conv2d)]
    assert dilations == [1] * 6 + [2, 4, 8, 16] + [1] * 7
    x = torch.rand(1, 1, 2, 2)
    up = next(m for m in G.decoder if isinstance(m, torch.nn.Upsample))
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_local_critic_sees_each_images_own_box():
    x, box = torch.rand(3, 2, 9, 11), torch.tensor([[0, 0], [5, 7], [2, 3]])
    crops = an_inpaint.crop_boxes(x, box, 4)
    for crop, image, (top, left) in zip(crops, x, box.tolist()):
        assert torch.equal(crop, image[:, top : top + 4, left : left + 4])
    D, mask = Discriminator(Args(**SMALL, box=24)), torch.ones(2, 1, 64, 64)
    image = torch.rand(2, 3, 64, 64, requires_grad=True)
    box = torch.tensor([[0, 40], [33, 5]])
    (critic, view) = D.views(image, mask, box)[1]
    (grad,) = torch.autograd.grad(critic(view).sum(), image)
    for i, (top, left) in enumerate(box.tolist()):
        inside = grad[i, :, top : top + 24, left : left + 24].abs().sum()
        assert inside > 0 and grad[i].abs().sum() == pytest.approx(inside.item(), rel=1e-5)
    total = D.whole(image) + D.local(view)
    torch.testing.assert_close(D(image, mask, box), total)


def test_the_patch_critic_averages_the_patches_that_touch_the_hole():
    D = Discriminator(Args(**SMALL, critics="global-patch"))
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    mask[0, :, 33, 1] = 1  # one cell of the 2 x 2 map
    mask[1, :, 31:33, 40] = 1  # two
    scores = D.patch.layers(image)
    assert scores.shape == (2, 1, 2, 2)
    expected = torch.stack([scores[0, 0, 1, 0], scores[1, 0, :, 1].mean()])
    torch.testing.assert_close(D.patch(image, mask), expected)
    assert (D.patch(image, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("critics", ["global-local", "global", "global-patch"])
@pytest.mark.parametrize("region", ["full", "hole"])
def test_every_critic_parameter_gets_a_finite_gradient(critics, region):
    D, real = Discriminator(Args(**SMALL, critics=critics)), torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    fake, box = an_inpaint.composite(torch.rand_like(real), real, mask), torch.full((2, 2), 16)
    penalty = an_inpaint.critics_penalty(
        D, real, fake, mask, box, region, lambda: torch.rand(2, 1, 1, 1)
    )
    (D(fake, mask, box).mean() - 2 * D(real, mask, box).mean() + penalty).backward()
    for name, parameter in D.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
def example():
    real, mask = torch.zeros(2, 3, 64, 64, dtype=DOUBLE), torch.zeros(2, 1, 64, 64, dtype=DOUBLE)
    mask[0, :, 8:40, 8:40] = 1
    mask[1, :, 16:32, 16:32] = 1
    coarse = 0.3 * mask + 0.1 * (1 - mask)
    fine = 0.5 * mask + 0.2 * (1 - mask)
    box = torch.tensor([[8, 8], [16, 16]])
    return coarse.expand_as(real), fine.expand_as(real), real, mask, box


def test_reconstruction_in_closed_form():
    data = example()
    loss = an_inpaint.reconstruction_loss(Args(**SMALL), *data)
    assert loss.item() == pytest.approx(0.3 + 0.1 + 0.5 + 0.2)  # whatever the holes' sizes
    loss = an_inpaint.reconstruction_loss(Args(**SMALL, reconstruction="full"), *data)
    shares = [(1024 + 256) / 2 / 64**2] * 2  # holes' mean share
    by_hand = sum(h * s + k * (1 - s) for (h, k), s in zip([(0.3, 0.1), (0.5, 0.2)], shares))
    assert loss.item() == pytest.approx(by_hand)


def test_discount_weighs_the_depth_in_the_box():
    weight = an_inpaint.depth_discount(torch.tensor([[8, 20], [0, 0]]), 32, 64)
    assert weight.shape == (2, 1, 64, 64)
    for (image, top, left), (y, x) in itertools.product(
        [(0, 8, 20), (1, 0, 0)], [(0, 0), (0, 9), (5, 31), (12, 7), (16, 15), (31, 31)]
    ):
        deep = min(y, 31 - y, x, 31 - x)
        at = weight[image, 0, top + y, left + x].item()
        assert at == pytest.approx(max(0.9 ** min(y, 31 - y), 0.9 ** min(x, 31 - x)))
        assert at == pytest.approx(0.9**deep)
    coarse, fine, real, mask, box = example()
    args = Args(**SMALL, reconstruction="discount", box=32)
    loss = an_inpaint.reconstruction_loss(args, coarse, fine, real, mask, box)
    hole = (an_inpaint.depth_discount(box, 32, 64) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    by_hand = 1.2 * (0.3 * hole.mean() + 0.1) + 0.5 * hole.mean() + 0.2
    assert loss.item() == pytest.approx(by_hand.item())


def test_known_and_missing_pixels_without_any_are_no_error():
    real = torch.rand(1, 3, 64, 64)
    for mask in (torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64)):
        loss = an_inpaint.mean_l1(real + 0.25, real, mask)
        assert loss.item() == pytest.approx(0.25, rel=1e-4)


class Linear(Discriminator):
    """Critics <w, x> of the whole image and of the box."""

    def __init__(self, w, v):
        torch.nn.Module.__init__(self)
        self.box, self.patch = v.shape[1], None
        self.whole = Weighted(w)
        self.local = Weighted(v)


class Weighted(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).sum(dim=(1, 2, 3))


def test_penalty_oracle():
    w, v = torch.randn(3, 16, 16, dtype=DOUBLE) / 9, torch.randn(3, 8, 8, dtype=DOUBLE) / 3
    D, real = Linear(w, v), torch.rand(2, 3, 16, 16, dtype=DOUBLE)
    mask = torch.zeros(2, 1, 16, 16, dtype=DOUBLE)
    mask[..., 5:9, 4:10] = 1
    fake, box, drawn = an_inpaint.composite(-real, real, mask), torch.full((2, 2), 4), []

    def draw():
        drawn.append(torch.rand(2, 1, 1, 1, dtype=DOUBLE))
        return drawn[-1]

    def term(weights):
        return (weights.norm() - 1).square().item()

    full = an_inpaint.critics_penalty(D, real, fake, mask, box, "full", draw)
    assert full.item() == pytest.approx(term(w) + term(v))
    assert len(drawn) == 2 and not torch.equal(*drawn)  # each critic mixes by its own weights
    hole = an_inpaint.critics_penalty(D, real, fake, mask, box, "hole", draw)
    by_hand = term(w[:, 5:9, 4:10]) + term(v[:, 1:5, 0:6])
    assert hole.item() == pytest.approx(by_hand)
    assert hole.item() != pytest.approx(full.item(), rel=1e-2)
    full.backward()
    assert D.whole.w.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------
# Holes
# --------------------------------------------------------------------------------------------------
def holes(kind, number=300, **flags):
    args = Args(**flags)
    for i in range(number):
        yield an_inpaint.draw_hole(args, kind, np.random.default_rng(i), [], test=False)


def test_the_centred_hole():
    ((hole, box),) = holes("centre", 1)
    assert hole.shape == (1, 256, 256) and hole.dtype == np.float32 and box == (64, 64)
    assert hole[0, 64:192, 64:192].all() and hole.sum() == 16_384


def test_random_rectangles():
    tops, lefts, cuts = set(), set(), set()
    for hole, (top, left) in holes("rect", 1_500):
        ys, xs = (np.flatnonzero(hole[0].any(axis)) for axis in (1, 0))
        h, w = ys[0] - top, xs[0] - left
        assert ys[-1] == top + 127 - h and xs[-1] == left + 127 - w  # as much at both ends
        assert hole.sum() == (128 - 2 * h) * (128 - 2 * w) and 9_216 <= hole.sum() <= 16_384
        tops, lefts, cuts = tops | {top}, lefts | {left}, cuts | {h, w}
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 127, 0, 127)
    assert cuts == set(range(17))
    assert all(hole.sum() == 64**2 for hole, _ in holes("rect", 9, img_size=128, shrink=0.0))
    assert all(box == (0, 0) for _, box in holes("rect", 9, box=256))


def test_strokes():
    drawn = [hole for hole, _ in holes("stroke", 20)]
    shares = [hole.mean() for hole in drawn]
    assert all(0.01 < share < 0.9 for share in shares) and len(set(shares)) > 15
    assert set(np.unique(np.stack(drawn))) == {0, 1}
    (again, _), *_ = holes("stroke", 1)
    assert np.array_equal(again, drawn[0])
    small = np.mean([hole.mean() for hole, _ in holes("stroke", 20, img_size=64)])
    assert small == pytest.approx(np.mean(shares), rel=0.3)  # strokes scale with the image


def test_mask_files_mean_missing_where_white(tmp_path, capsys):
    grey = Image.new("L", (64, 64), 0)
    grey.paste(128, (0, 0, 32, 64))
    grey.paste(127, (32, 0, 64, 64))
    grey.save(tmp_path / "m.png")
    mask = an_inpaint.read_mask(tmp_path / "m.png", (64, 64), False)
    assert mask.shape == (1, 64, 64) and mask[..., :32].all() and not mask[..., 32:].any()
    assert "m.png is not black and white" in capsys.readouterr().err
    inverted = an_inpaint.read_mask(tmp_path / "m.png", (64, 64), True)
    assert torch.equal(inverted, 1 - mask)
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(tmp_path / "alpha.png")
    assert an_inpaint.read_mask(tmp_path / "alpha.png", (64, 64), False).all()
    assert "alpha.png has colours or alpha" in capsys.readouterr().err
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")  # luminance 76
    assert not an_inpaint.read_mask(tmp_path / "red.png", (64, 64), False).any()
    assert "red.png has colours" in capsys.readouterr().err
    Image.new("1", (64, 64), 1).save(tmp_path / "bit.png")
    assert an_inpaint.read_mask(tmp_path / "bit.png", (64, 64), False).all()
    assert not capsys.readouterr().err
    with pytest.raises(fid.UserError, match="bit.png is 64x64 pixels, its image 32x48"):
        an_inpaint.read_mask(tmp_path / "bit.png", (48, 32), False)


# --------------------------------------------------------------------------------------------------
# Photographs
# --------------------------------------------------------------------------------------------------
def folder_args(path, **flags):
    return Args(**SMALL | {"dataset": "folder", "data_dir": str(path), "batch_size": 1} | flags)


def test_photos_keep_their_shape_and_crops_are_cut_from_them(tmp_path):
    write_photos(tmp_path, 4, sizes=((160, 64), (64, 160), (100, 100)))
    photos = an_inpaint.load_photos(folder_args(tmp_path), held_out=False)
    assert photos.names == ["house01", "house02", "house03"]  # house00 is held out
    assert photos.sizes.tolist() == [[160, 64], [64, 64], [64, 160]]
    original = pixels(tmp_path / "house01.png")
    assert np.array_equal(photos[0], original)
    crop = photos.crop(0, 64, 0.5, 0.999)
    assert crop.shape == (3, 64, 64)
    assert np.array_equal(crop, original[48:112].transpose(2, 0, 1))
    first, last = photos.crop(0, 64, 0.0, 0.0), photos.crop(0, 64, 0.99999, 0.0)
    assert np.array_equal(first, original[:64].transpose(2, 0, 1))
    assert np.array_equal(last, original[-64:].transpose(2, 0, 1))
    assert torch.equal(photos.centres([0], 64)[0], torch.tensor(crop))
    shrunk = Image.open(tmp_path / "house02.png").resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(photos[1], np.asarray(shrunk))


def test_without_resizing_only_small_training_images_are_enlarged(tmp_path, capsys):
    write_photos(tmp_path / "a", 3, sizes=((100, 90), (100, 90), (50, 40)))
    args = folder_args(tmp_path / "a", resize=False)
    photos = an_inpaint.load_photos(args, held_out=False)
    assert photos.sizes.tolist() == [[90, 100], [64, 80]]
    assert "1 of 2 images are smaller than --img-size 64: enlarged" in capsys.readouterr().err
    with pytest.raises(fid.UserError, match=r"--img-size must fit into .* \(1 are smaller\), got"):
        an_inpaint.load_photos(replace(args, eval_from=args.data_dir), held_out=True)


def test_every_20th_image_is_never_trained_on(tmp_path):
    write_photos(tmp_path / "a", 41)
    write_photos(tmp_path / "b", 2)
    args = folder_args(tmp_path / "a")
    train, held = (an_inpaint.load_photos(args, held_out) for held_out in (False, True))
    assert held.names == ["house00", "house20", "house40"] and len(train) == 38
    assert not set(train.names) & set(held.names)
    args = replace(args, eval_from=str(tmp_path / "b"))
    assert len(an_inpaint.load_photos(args, False)) == 38  # and never trained on
    assert an_inpaint.load_photos(args, True).names == ["house00", "house01"]


def test_paris_streetview_in_its_folders(tmp_path):
    args = replace(folder_args(tmp_path), dataset="paris-streetview")
    with pytest.raises(fid.UserError, match="not found in .*train/ and val/ .or test/.*e-mail"):
        an_inpaint.load_photos(args, False)
    write_photos(tmp_path / "train" / "deep" / "er", 5)
    with pytest.raises(fid.UserError, match="paris-streetview not found"):
        an_inpaint.load_photos(args, True)
    write_photos(tmp_path / "test", 2, suffix=".JPG")
    assert len(an_inpaint.load_photos(args, False)) == 5
    assert len(an_inpaint.load_photos(args, True)) == 2


def test_a_cache_is_built_once_and_never_half(tmp_path, capsys, monkeypatch):
    write_photos(tmp_path, 5)
    args = folder_args(tmp_path)
    an_inpaint.load_photos(args, False)
    an_inpaint.load_photos(args, False)
    assert capsys.readouterr().out.count("decoding 4 images") == 1
    shutil.rmtree(tmp_path / "cache")
    for name in ("house01", "house03"):
        (tmp_path / f"{name}.png").write_bytes((tmp_path / f"{name}.png").read_bytes()[:90])
    (tmp_path / "house02.png").write_text("no image")
    with pytest.raises(fid.UserError, match=r"(?s)3 images cannot be read:.*01.*02.*03"):
        an_inpaint.load_photos(args, False)
    left = {path.suffix for path in (tmp_path / "cache").iterdir() if "sizes" not in path.name}
    assert left == {".lock"}
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(fid.UserError, match="0.00 GB left, the decoded images need 0.00 GB"):
        an_inpaint.load_photos(args, False)


def test_workers_decode_the_same_array(tmp_path):
    write_photos(tmp_path, 20)
    args = folder_args(tmp_path)
    one = np.array(an_inpaint.load_photos(args, False).flat)
    shutil.rmtree(tmp_path / "cache")
    two = an_inpaint.load_photos(replace(args, num_workers=2), False).flat
    assert np.array_equal(one, two)


def batches(photos, start=0, count=5, **flags):
    args = Args(**SMALL | flags)
    made = an_inpaint.endless_crops(photos, args, CPU, start)
    return [next(made) for _ in range(count)]


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 11, sizes=((90, 64), (64, 80)))
    return an_inpaint.load_photos(folder_args(tmp_path / "photos"), False)  # 10 images


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_a_function_of_seed_and_number(photos):
    whole = batches(photos)
    assert all(same(a, b) for a, b in zip(whole[3:], batches(photos, start=3)))
    assert not same(whole[0], batches(photos, seed=2)[0])
    real, mask, box = whole[0]
    assert real.shape == (4, 3, 64, 64) and mask.shape == (4, 1, 64, 64) and box.shape == (4, 2)
    assert -1 <= real.min() < real.max() <= 1 and mask.unique().tolist() == [0, 1]
    for hole, (top, left) in zip(mask, box.tolist()):
        assert hole[:, top : top + 32, left : left + 32].sum() == hole.sum() > 0
    assert not torch.equal(mask[0], mask[1])
    shared = batches(photos, shared_mask=True)
    assert all((m == m[:1]).all() and (b == b[:1]).all() for _, m, b in shared)
    assert same(shared[0][:1], whole[0][:1])  # the crops are those of the other holes


def test_an_epoch_shows_every_photo_once(photos):
    seen = [photo for real, _, _ in batches(photos, count=5, batch_size=2) for photo in real]
    colours = [set(map(tuple, photos[i].reshape(-1, 3).tolist())) for i in range(len(photos))]
    found = []
    for crop in seen:
        values = crop.add(1).mul(127.5).round().byte().permute(1, 2, 0).reshape(-1, 3).tolist()
        strange = [len(set(map(tuple, values)) - known) for known in colours]
        assert min(strange) == 0
        found.append(int(np.argmin(strange)))
    assert sorted(found) == list(range(10))


def test_processes_share_the_global_batch_out(photos, monkeypatch):
    whole = batches(photos, count=3, hflip=True)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(fid, "processes", lambda rank=rank: (rank, 2))
        parts.append(batches(photos, count=3, hflip=True))
    for both, a, b in zip(whole, *parts):
        assert same(both, [torch.cat(pair) for pair in zip(a, b)])


def test_hflip_mirrors_about_half(photos):
    plain, flipped = (batches(photos, count=20, hflip=flip) for flip in (False, True))
    mirrored = 0
    for (a, *_), (b, *_) in zip(plain, flipped):
        for x, y in zip(a, b):
            assert torch.equal(x, y) or torch.equal(x.flip(2), y)
            mirrored += not torch.equal(x, y)
    assert 25 <= mirrored <= 55


def test_masks_of_files_in_training(photos, tmp_path):
    for i in range(3):
        write_mask(tmp_path / "masks" / f"{i}.png", (64, 64), (0, 0, 10 * (i + 1), 10))
    flags = {"train_mask": "file", "mask_dir": str(tmp_path / "masks"), "critics": "global"}
    sums = {int(hole.sum()) for _, mask, _ in batches(photos, count=10, **flags) for hole in mask}
    assert sums == {100, 200, 300}


def test_steps_consume_one_batch_then_one_for_each_update():
    args = Args(phase1_steps=3, phase2_steps=9, n_critic=2)
    assert [an_inpaint.batches_before(args, k) for k in range(6)] == [0, 1, 2, 3, 6, 9]


# --------------------------------------------------------------------------------------------------
# Completion and scores
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 50), (8, 9), (227, 61)])
def test_known_pixels_are_the_inputs_and_any_size_is_fine(height, width):
    G = Generator(Args(**SMALL))
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    mask = (torch.rand(2, 1, height, width) < 0.4).float()
    done, raw = an_inpaint.complete(G, image, mask)
    assert done.shape == image.shape and done.dtype == torch.uint8 and G.training
    hole = mask.expand_as(image) > 0
    assert torch.equal(done[~hole], image[~hole]) and torch.equal(done[hole], raw[hole])
    assert not torch.equal(raw, image)
    again, _ = an_inpaint.complete(G, image, mask)
    assert torch.equal(again, done)  # self-sampling is off
    alone, _ = an_inpaint.complete(G, image[1:], mask[1:])
    assert (alone[0].int() - done[1].int()).abs().max() <= 1


def test_metric_oracles():
    real = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8)
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, :32, :32] = 1  # a quarter
    done = real + (51 * mask).byte()  # 0.2 of 255
    values = an_inpaint.quality(done, done + 51, real, mask)
    first = dict(zip(an_inpaint.METRICS, values[0].tolist()))
    assert first["psnr"] == pytest.approx(-10 * math.log10(0.04 / 4))  # 20
    assert first["mae"] == pytest.approx(0.05)
    assert first["psnr_hole"] == pytest.approx(-20 * math.log10(0.2))
    assert first["mae_hole"] == pytest.approx(0.2)
    assert first["mae_raw"] == pytest.approx(0.25 * 0.4 + 0.75 * 0.2)
    second = dict(zip(an_inpaint.METRICS, values[1].tolist()))
    assert second["psnr"] == math.inf and second["ssim"] == pytest.approx(1)
    assert second["mae"] == 0 and math.isnan(second["psnr_hole"]) and math.isnan(second["mae_hole"])
    # |error| 0.1 on a quarter: 26.0206 dB, 0.025; in the hole 20 dB, 0.1 (25.5 is not 8 bits)
    done = torch.where(mask > 0, real.double() + 25.5, real.double())
    values = an_inpaint.quality(done, done, real, mask)[0].tolist()
    assert values[0] == pytest.approx(26.0206, abs=1e-4) and values[2] == pytest.approx(0.025)
    assert values[3] == pytest.approx(20) and values[4] == pytest.approx(0.1)


def image_pair(k):
    y, x, c = np.mgrid[:24, :20, :3]
    a = 127.5 + 127.5 * np.sin(0.3 * x + 0.2 * y * (c + 1))
    b = np.clip(a * (0.9 - 0.1 * k) + 20 * np.cos(0.7 * x * y / (k + 2)), 0, 255)
    return (torch.from_numpy(np.rint(i).astype(np.uint8).transpose(2, 0, 1))[None] for i in (a, b))


@pytest.mark.parametrize(
    ("k", "ssim", "psnr", "uniform"),
    [
        (0, 0.9466088533852132, 22.208935761860822, 0.9622765385252204),
        (1, 0.9139273073613614, 17.787223921346538, 0.9260999600680453),
        (2, 0.8420395714493653, 14.627915485581068, 0.8548541229021943),
    ],
)
def test_ssim_and_psnr_are_scikit_images(k, ssim, psnr, uniform):
    # Recorded from scikit-image 0.26.0 with gaussian_weights=True, sigma=1.5,
    # use_sample_covariance=False, data_range=1; `uniform` is its default window.
    a, b = image_pair(k)
    found = fid.ssim(a.double() / 255, b.double() / 255).item()
    assert found == pytest.approx(ssim, abs=1e-9) and found != pytest.approx(uniform, abs=1e-3)
    values = an_inpaint.quality(b, b, a, torch.ones(1, 1, 24, 20))[0]
    assert values[:2].tolist() == pytest.approx([psnr, ssim], abs=1e-9)


def test_spread():
    assert an_inpaint.spread(10, 4) == [0, 2, 5, 7]
    assert an_inpaint.spread(150, 100)[-1] == 148  # to the end, where there are few more
    assert an_inpaint.spread(3, 100) == [0, 1, 2]


def test_a_mask_of_a_name_stands_once(tmp_path):
    for folder in ("a", "b"):
        write_photos(tmp_path / folder, 1)
    with pytest.raises(fid.UserError, match="--mask-dir must hold each name once, got 1 of 2 again"):
        an_inpaint.by_name("mask_dir", tmp_path)


def test_processes_score_the_generator_of_the_checkpoint(photos, monkeypatch):
    """The statistics of AN over batches are each process's own; the first's are the saved ones."""
    args = Args(**SMALL, fid_num=4, region_stats="bn")
    G = Generator(args)
    monkeypatch.setattr(fid, "processes", lambda: (1, 2))
    monkeypatch.setattr(fid.dist, "broadcast", lambda buffer, source: buffer.fill_(7))
    monkeypatch.setattr(fid, "sum_processes", lambda *tensors: None)
    an_inpaint.score_completions(args, G, photos, None)
    assert (G.module.running_mean == 7).all()


def test_scores_do_not_depend_on_the_batch_and_leave_out_what_is_infinite(photos, capsys, tmp_path):
    G = Generator(Args(**SMALL))
    args = Args(**SMALL, eval_mask="rect", fid_num=10)
    one = an_inpaint.score_completions(replace(args, fid_batch_size=1), G, photos, None)
    all_at_once = an_inpaint.score_completions(args, G, photos, None)
    assert one == pytest.approx(all_at_once, rel=1e-3)
    assert one["metric/psnr"] > max(one["metric/psnr_raw"], one["metric/psnr_hole"])
    capsys.readouterr()
    for i, name in enumerate(photos.names):
        box = (0, 0, 0, 0) if i < 4 else (8, 8, 40, 40)
        write_mask(tmp_path / "masks" / f"{name}.png", (64, 64), box)
    args = replace(args, eval_mask="file", mask_dir=str(tmp_path / "masks"))
    scores = an_inpaint.score_completions(args, G, photos, None)
    assert all(math.isfinite(value) for value in scores.values())
    assert "psnr_hole: 4 images have no finite value" in capsys.readouterr().err
    for name in photos.names:
        write_mask(tmp_path / "masks" / f"{name}.png", (64, 64), (0, 0, 0, 0))
    scores = an_inpaint.score_completions(args, G, photos, None)
    assert scores["metric/psnr_hole"] is None and scores["metric/psnr"] is None
    assert scores["metric/ssim"] == pytest.approx(1) and scores["metric/mae"] == 0


def test_evaluation_holes_are_the_same_for_every_model_and_order(photos):
    args = Args(**SMALL, eval_mask="stroke")
    two = an_inpaint.held_out_holes(args, photos, [3, 5])
    assert torch.equal(an_inpaint.held_out_holes(args, photos, [5])[0], two[1])
    assert not torch.equal(two[0], two[1])
    other = an_inpaint.held_out_holes(replace(args, eval_seed=1), photos, [3, 5])
    assert not torch.equal(other, two)
    centre = an_inpaint.held_out_holes(replace(args, eval_mask="centre"), photos, [0])
    assert centre[0, 0, 16:48, 16:48].all() and centre.sum() == 32**2


# --------------------------------------------------------------------------------------------------
# From the command line
# --------------------------------------------------------------------------------------------------
MINI = ["--dataset", "folder", "--data-dir", "photos", "--img-size", "64", "--g-ch", "4",
        "--d-ch", "4", "--batch-size", "2", "--n-critic", "2", "--num-workers", "0",
        "--log-every", "1", "--sample-every", "0", "--eval-every", "0", "--save-every", "1",
        "--phase1-steps", "2", "--phase2-steps", "2", "--num-samples", "2"]  # fmt: skip


def load(name):
    return torch.load(f"runs/an_inpaint__folder__an__s1/{name}", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_phase_changes_exactly_at_its_step_and_across_a_resume(call, monkeypatch):
    write_photos(Path("photos"), 6)
    taken = []
    source = an_inpaint.endless_crops

    def counted(photos, args, device, index):
        for b, batch in enumerate(source(photos, args, device, index), index):
            taken.append(b)
            yield batch

    monkeypatch.setattr(an_inpaint, "endless_crops", counted)
    torch.manual_seed(1)
    args = Args(img_size=64, g_ch=4, d_ch=4)
    Generator(args)
    untouched = Discriminator(args).state_dict()
    code, out, err = call("an_inpaint", *MINI, "--total-steps", "2")
    assert code == 0, err
    assert equal(load("checkpoint.pt")["parts"]["D"], untouched) and taken == [0, 1]
    code, out, err = call("an_inpaint", *MINI, "--resume")
    assert code == 0, err
    assert not equal(load("checkpoint.pt")["parts"]["D"], untouched)
    assert taken == [0, 1, *range(2, 8)]  # 2 critic batches and one of the generator's, twice
    log = Path("runs/an_inpaint__folder__an__s1/log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    assert [r["loss/d"] == 0 for r in records] == [True, True, False, False]
    assert [r["loss/g_adv"] == 0 for r in records] == [True, True, False, False]
    assert [r["grad/d_norm"] == 0 for r in records] == [True, True, False, False]
    by_hand = 1.2 * records[3]["loss/g_rec"] + 1e-3 * records[3]["loss/g_adv"]
    by_hand += 1e-3 * records[3]["loss/g_reg"]
    assert records[3]["loss/g"] == pytest.approx(by_hand, rel=1e-5)
    keys = {"train/rho_g", "train/t_g", "train/layout_entropy_g", "train/entities_used_g"}
    assert keys | {"train/saturated"} <= records[0].keys()
    whole = load("checkpoint.pt")["parts"]
    shutil.rmtree("runs")
    code, out, err = call("an_inpaint", *MINI)
    assert code == 0 and "phase1.pt keeps it, its critics untrained" in out
    phase1 = load("phase1.pt")
    assert phase1["step"] == 2 and equal(phase1["parts"]["D"], untouched)
    parts = load("checkpoint.pt")["parts"]
    assert equal(parts["G"], whole["G"]) and equal(parts["D"], whole["D"])


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of an untrained network with a visible effect."""
    args = Args(**SMALL)
    parts = {"G": Generator(args).state_dict(), "D": Discriminator(args).state_dict()}
    state = {"format": an_inpaint.FORMAT, "script": "an_inpaint", "args": vars(args), "step": 3, "parts": parts}
    torch.save(state, tmp_path / "c.pt")
    return ["--mode", "inpaint", "--checkpoint", str(tmp_path / "c.pt")]


@pytest.mark.parametrize(("name", "mode"), [("p.png", "RGB"), ("p.jpg", "RGB"), ("p.png", "L")])
def test_inpaint_writes_the_known_pixels_byte_for_byte(name, mode, call, checkpoint):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 70, 3), np.uint8))
    photo.convert(mode).save(name)
    write_mask(Path("m.png"), (70, 53), (20, 10, 41, 30))
    flags = ["--image", name, "--mask", "m.png", "--output", "new/out.png"]
    code, out, err = call("an_inpaint", *checkpoint, *flags)
    assert code == 0 and not err, err
    assert "new/out.png: 11.3% of 70x53 pixels filled" in out
    result, original = Image.open("new/out.png"), np.asarray(Image.open(name).convert("RGB"))
    assert result.format == "PNG" and result.mode == "RGB" and result.size == (70, 53)
    hole = pixels("m.png") > 0
    assert np.array_equal(np.asarray(result)[~hole], original[~hole])
    assert not np.array_equal(np.asarray(result)[hole], original[hole])


def test_inpaint_follows_the_orientation_of_a_photograph(call, checkpoint):
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    photo.save("p.png", exif=exif)
    write_mask(Path("m.png"), (40, 60), (0, 0, 9, 9))
    code, _, err = call("an_inpaint", *checkpoint, "--image", "p.png", "--mask", "m.png",
                        "--output", "o.png")  # fmt: skip
    assert code == 0, err
    upright = np.rot90(np.asarray(photo), -1)
    assert np.array_equal(pixels("o.png")[9:], upright[9:])


def test_inpaint_with_nothing_and_with_everything_missing(call, checkpoint):
    write_photos(Path("."), 1)
    write_mask(Path("none.png"), (80, 64), (0, 0, 0, 0))
    write_mask(Path("all.png"), (80, 64), (0, 0, 80, 64))
    flags = ["--image", "house00.png", "--output", "o.png", "--mask"]
    code, _, err = call("an_inpaint", *checkpoint, *flags, "none.png")
    assert code == 0 and "WARNING: none.png: nothing is missing" in err
    assert np.array_equal(pixels("o.png"), pixels("house00.png"))
    code, _, err = call("an_inpaint", *checkpoint, *flags, "all.png")
    assert code == 0 and "WARNING: all.png: everything is missing" in err
    code, _, _ = call("an_inpaint", *checkpoint, *flags, "none.png", "--invert-mask")
    everything = pixels("o.png").copy()
    assert code == 0 and (everything != pixels("house00.png")).any()


def test_inpaint_folders_of_pairs(call, checkpoint):
    write_photos(Path("in"), 3)
    for path in Path("in").iterdir():
        write_mask(Path("masks") / path.name, Image.open(path).size)
    flags = ["--image", "in", "--mask", "masks", "--output"]
    code, _, err = call("an_inpaint", *checkpoint, *flags, "out")
    assert code == 0, err
    for path in Path("in").iterdir():
        hole = pixels(Path("masks") / path.name) > 0
        assert np.array_equal(pixels(Path("out") / path.name)[~hole], pixels(path)[~hole])
    write_mask(Path("masks/house01.png"), (9, 9))
    code, _, err = call("an_inpaint", *checkpoint, *flags, "other")
    assert code == 2 and "house01.png is 9x9 pixels, its image 64x96" in err
    assert not Path("other").exists()  # not even the fit ones
    Path("masks/house01.png").rename("masks/tower.png")
    code, _, err = call("an_inpaint", *checkpoint, *flags, "other")
    assert code == 2 and "2 names stand in one of them only, such as house01, tower" in err
    code, _, err = call("an_inpaint", *checkpoint, *flags, "in")
    assert code == 2


def test_inpaint_refusals_leave_no_output(call, checkpoint):
    write_photos(Path("."), 1)
    write_mask(Path("m.png"), (80, 64))
    write_mask(Path("small.png"), (40, 32))
    Path("broken.png").write_text("no image")
    Image.new("RGB", (5, 90)).save("thin.png")
    write_mask(Path("thinmask.png"), (5, 90))
    cases = [
        ("house00.png", "small.png", "o.png", "small.png is 40x32 pixels, its image 80x64"),
        ("house00.png", "m.png", "o.jpg", "--output must end in .png"),
        ("house00.png", "m.png", "house00.png", "--output must leave the inputs as they are"),
        ("nowhere.png", "m.png", "o.png", "--image must exist, got nowhere.png"),
        ("house00.png", "nowhere.png", "o.png", "--mask must exist, got nowhere.png"),
        ("broken.png", "m.png", "o.png", "broken.png cannot be read"),
        ("house00.png", "broken.png", "o.png", "broken.png cannot be read"),
        ("house00.png", ".", "o.png", "--mask must be a file or a folder as --image is"),
        ("thin.png", "thinmask.png", "o.png", "at least 8x8"),
    ]
    for image, mask, output, words in cases:
        code, _, err = call("an_inpaint", *checkpoint, "--image", image, "--mask", mask,
                            "--output", output)  # fmt: skip
        assert code == 2 and words in err and err.count("\n") == 1, (words, err)
        assert not Path("o.png").exists() and not Path("o.jpg").exists()


def test_evaluate_with_mask_files_compares_names(call, checkpoint, tmp_path):
    write_photos(Path("held"), 7)
    for i in range(7):
        write_mask(Path(f"masks/house{i:02d}.png"), (64, 64))
    flags = ["--mode", "evaluate", *checkpoint[2:], "--num-workers", "0", "--data-dir", ".",
             "--eval-from", "held", "--eval-mask", "file", "--mask-dir", "masks"]  # fmt: skip
    code, out, err = call("an_inpaint", *flags)
    assert code == 0, err
    record = json.loads((tmp_path / "evaluate.json").read_text())
    assert record["n"] == 7 and record["eval_mask"] == "file" and "MAE on [-1, 1]" in out
    for i in range(1, 7):
        Path(f"masks/house{i:02d}.png").rename(f"masks/h{i}.png")
    code, _, err = call("an_inpaint", *flags)
    assert code == 2 and "no masks of the same name for 6 of 7 images, such as house01" in err
    assert "house05" in err and "house06" not in err
    Path("held/house03.png").write_text("no image")
    shutil.rmtree("cache")
    code, _, err = call("an_inpaint", *flags)
    assert code == 2 and "house03.png" in err


def test_figures_show_strips_of_several_checkpoints_and_layouts(call, tmp_path):
    write_photos(Path("photos"), 45)
    for refine in ("an", "ca"):
        code, _, err = call("an_inpaint", *MINI, "--refine", refine, "--total-steps", "1")
        assert code == 0, err
    other = "runs/an_inpaint__folder__ca__s1/checkpoint.pt"
    flags = ["--mode", "figures", "--dataset", "folder", "--data-dir", "photos"]
    code, out, err = call("an_inpaint", *flags, "--num-samples", "2", "--compare", other)
    assert code == 0, err
    target = Path("runs/an_inpaint__folder__an__s1/figures")
    assert Image.open(target / "strips.png").size == (4 * 64 + 4, 2 * 64 + 6)
    assert Image.open(target / "layouts.png").size == (17 * 66 + 2, 2 * 66 + 2)
    assert (target / "curves.png").exists() and other in out
