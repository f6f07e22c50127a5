"""an_inpaint.py: layers against loops, counts, losses, holes, photographs, scores, inpainting."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, same, state
from PIL import Image

import an_inpaint
from an_inpaint import Args, AttentiveNorm, ContextualAttention, Discriminator, Generator

SMALL = {"img_size": 64, "g_ch": 8, "d_ch": 4, "batch_size": 4, "dataset": "folder"}
DOUBLE = torch.float64
CPU = torch.device("cpu")


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def example(*shape):
    """Images in [-1, 1] and their masks with a hole."""
    image, mask = torch.rand(*shape) * 2 - 1, torch.zeros(shape[0], 1, *shape[2:])
    mask[..., 16:40, 10:50] = 1
    return image, mask


# ---- Counts --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ({}, 3_794_359),
        ({"entities": 8}, 3_791_279),
        ({"entities": 32}, 3_800_519),
        ({"self_sampling": False}, 3_790_215),
        ({"region_stats": "bn"}, 3_794_359),
        ({"refine": "ca"}, 3_767_558),
        ({"refine": "plain"}, 3_767_558),
        ({"g_ch": 8}, 241_471),
        ({"g_ch": 8, "refine": "ca"}, 238_598),
    ],
)
def test_generator_counts(flags, number):
    assert count(Generator(Args(**flags))) == number


def test_counts_of_the_parts():
    G = Generator(Args())
    parts = [G.coarse, G.branch_a, G.decoder, G.module]
    assert [count(part) for part in parts] == [1_448_227, 1_018_816, 576_867, 26_801]
    assert count(G.branch_b) + count(G.branch_b_end) == 723_648
    assert [count(c) for c in Discriminator(Args()).critics] == [8_404_993, 8_403_457]
    assert [count(c) for c in Discriminator(Args(local_critic=False)).critics] == [8_404_993]
    odd = Discriminator(Args(**SMALL, box=39)).critics[1]  # 39, 20, 10, 5, 3, 2, 1
    assert odd.layers[-1].in_features == 2 * 4 and odd(torch.rand(2, 3, 39, 39)).shape == (2,)


def test_sizes_and_dilations_follow_the_layer_table():
    G, sizes = Generator(Args(g_ch=4)), []
    convs = [layer for layer in G.coarse if isinstance(layer, torch.nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:3])))
    G(torch.zeros(1, 3, 256, 256), torch.ones(1, 1, 256, 256))
    down = [(4, 256), (8, 128), (8, 128), *[(16, 64)] * 9]
    assert sizes == [*down, (8, 128), (8, 128), (4, 256), (2, 256), (3, 256)]
    assert [conv.dilation[0] for conv in convs] == [1] * 6 + [2, 4, 8, 16] + [1] * 7


# ---- Layers --------------------------------------------------------------------------------------
def slow_attention(x, mask, fuse=True):
    """Contextual attention by its definition, position by position."""
    n, _, height, width = x.shape
    h, w = height // 2, width // 2
    maps = torch.zeros(n, h * w, h * w, dtype=x.dtype)
    for i in range(n):
        small = F.pad(x[i, :, ::2, ::2], (1, 1, 1, 1))
        hole = F.pad(mask[i, 0, ::2, ::2], (1, 1, 1, 1))
        places = list(itertools.product(range(h), range(w)))
        patches = [small[:, y : y + 3, z : z + 3].flatten() for y, z in places]
        known = [float(hole[y : y + 3, z : z + 3].sum() == 0) for y, z in places]
        rows = [torch.stack([p @ q / max(q.norm(), 1e-4) for q in patches]) for p in patches]
        s = torch.stack(rows)

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
        maps[i] = m * torch.softmax(10 * s * m, dim=1)
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


def test_contextual_attention_is_its_definition():
    x = torch.randn(2, 3, 6, 8, dtype=DOUBLE)
    mask = torch.zeros(2, 1, 6, 8, dtype=DOUBLE)
    mask[0, :, 2:4, 2:4] = 1
    mask[1, :, :, 6:] = 1
    module, a = ContextualAttention(), slow_attention(x, mask)
    torch.testing.assert_close(module.attention(x, mask), a)
    torch.testing.assert_close(module(x, mask), slow_paste(x, a))
    assert not torch.allclose(a, slow_attention(x, mask, fuse=False))
    small = x[:1, :, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: module(y, mask[:1, :, :4, :4]), (small,))


def test_contextual_attention_has_no_weights_whose_products_are_denormal():
    """They made it 15 times slower on a CPU."""
    x, mask = 0.025 * torch.randn(1, 128, 16, 16), torch.zeros(1, 1, 16, 16)
    a, plain = ContextualAttention().attention(x, mask), slow_attention(x, mask)
    assert not ((a > 0) & (a < 1e-29)).any() and ((plain > 0) & (plain < 1e-29)).any()
    torch.testing.assert_close(a, plain)


TOY = {  # of V = 1, 2, 3, 4 and S_1 = 0.9, 0.8, 0.2, 0.1
    "weighted": [-1.085441, -0.060302, 0.060302, 1.085441],
    "literal": [0.204026, 2.030719, 1.696774, 2.168484],
}


@pytest.mark.parametrize("reading", TOY)
def test_toy_oracle_of_the_readings(reading):
    an = AttentiveNorm(1, Args(entities=2, an_reading=reading)).double()
    v = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=DOUBLE)
    first = torch.tensor([0.9, 0.8, 0.2, 0.1], dtype=DOUBLE)
    out = an.regional_norm(v, torch.stack((first, 1 - first))[None]).flatten().tolist()
    assert out == pytest.approx(TOY[reading], abs=2e-4)
    assert all(out != pytest.approx(TOY[o], abs=2e-2) for o in TOY if o != reading)


def test_an_with_zero_gain_is_plain_and_samples_in_training_only():
    an, plain = Generator(Args(**SMALL)), Generator(Args(**SMALL, refine="plain"))
    missing, unexpected = plain.load_state_dict(an.state_dict(), strict=False)
    assert not missing and all(key.startswith("module.") for key in unexpected)
    data = example(2, 3, 64, 64)
    for mode in (True, False):
        a, b = (net.train(mode)(*data) for net in (an, plain))
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    with torch.no_grad():
        an.module.rho.fill_(1)
        an.module.t.fill_(50)
    assert not torch.equal(an(*data)[1], plain(*data)[1])
    assert torch.equal(an(*data)[1], an(*data)[1])
    assert not torch.equal(an.train()(*data)[1], an(*data)[1])


# ---- Networks and losses -------------------------------------------------------------------------
@pytest.mark.parametrize("refine", ["an", "ca", "plain"])
def test_one_is_missing_and_what_is_missing_is_never_seen(refine):
    G, (image, mask) = Generator(Args(**SMALL, refine=refine)).eval(), example(1, 3, 64, 64)
    other = torch.where(mask > 0, -image, image)
    for a, b in zip(G(image, mask), G(other, mask)):
        assert torch.equal(a, b)
    other = torch.where(mask > 0, image, -image)  # a known pixel does count
    assert not torch.equal(G(image, mask)[1], G(other, mask)[1])


@pytest.mark.parametrize("flags", [{}, {"refine": "ca"}, {"reconstruction": "regional"}])
def test_every_parameter_gets_a_finite_gradient(flags):
    args = Args(**SMALL, **flags)
    G, D, (real, mask) = Generator(args), Discriminator(args), example(2, 3, 64, 64)
    for name, parameter in G.named_parameters():
        if name == "module.rho":
            torch.nn.init.constant_(parameter, 0.7)  # at 0 nothing else of the module gets one
    coarse, fine = G(real, mask)
    fake = fine.where(mask > 0, real)
    loss = sum(an_inpaint.l1_loss(args, x, real, mask) for x in (coarse, fine))
    loss = loss + an_inpaint.orthogonality(G) - D(fake, torch.full((2, 2), 10)).mean()
    loss.backward()
    assert coarse.abs().max() <= 1 and fine.abs().max() <= 1
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        # k's bias adds the same to all entities, v's is normalised away, D's last is constant
        if name not in ("module.key.bias", "module.value.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_the_second_stage_sees_the_image_filled_by_the_first():
    G, (image, mask) = Generator(Args(**SMALL)).eval(), example(2, 3, 64, 64)
    seen = []
    for branch in (G.branch_a, G.branch_b):
        branch.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    coarse = G(image, mask)[0]
    ones = torch.ones_like(mask)
    filled = torch.cat([coarse * mask + image * (1 - mask), ones, mask], dim=1)
    assert len(seen) == 2 and all(torch.equal(x, filled) for x in seen)


def test_the_local_critic_sees_each_images_own_box():
    D, image = Discriminator(Args(**SMALL, box=24)), torch.rand(2, 3, 64, 64, requires_grad=True)
    box = torch.tensor([[0, 40], [33, 5]])
    for crop, x, (top, left) in zip(D.views(image, box)[1], image, box.tolist()):
        assert torch.equal(crop, x[:, top : top + 24, left : left + 24])
    whole, local = (critic(x) for critic, x in zip(D.critics, D.views(image, box)))
    (grad,) = torch.autograd.grad(local.sum(), image, retain_graph=True)
    for i, (top, left) in enumerate(box.tolist()):
        inside = grad[i, :, top : top + 24, left : left + 24].abs().sum()
        assert inside > 0 and grad[i].abs().sum() == pytest.approx(inside.item(), rel=1e-5)
    torch.testing.assert_close(D(image, box), whole + local)


def test_reconstruction_in_closed_form():
    mask = torch.zeros(2, 1, 64, 64, dtype=DOUBLE)
    mask[0, :, 8:40, 8:40] = 1
    mask[1, :, 16:32, 16:32] = 1
    real, output = torch.zeros(2, 3, 64, 64, dtype=DOUBLE), 0.3 * mask + 0.1 * (1 - mask)
    output = output.expand_as(real)
    share = (1024 + 256) / 2 / 64**2
    regional = Args(reconstruction="regional")
    for args, x, hole, value in (
        (Args(), output, mask, 0.3 * share + 0.1 * (1 - share)),
        (regional, output, mask, 0.3 + 0.1),  # whatever the holes' sizes
        (regional, real + 0.25, 0 * mask, 0.25),
        (regional, real + 0.25, 0 * mask + 1, 0.25),
    ):
        assert an_inpaint.l1_loss(args, x, real, hole).item() == pytest.approx(value)


# ---- Holes ---------------------------------------------------------------------------------------
def holes(kind, number=300, **flags):
    args = Args(**flags)
    for i in range(number):
        hole, box = an_inpaint.draw_hole(args, kind, np.random.default_rng(i), [])
        yield hole[0].numpy(), box


def test_centred_and_random_rectangles():
    ((hole, box),) = holes("centre", 1)
    assert hole[64:192, 64:192].all() and hole.sum() == 16_384 and box == (64, 64)
    tops, lefts, cuts = set(), set(), set()
    for hole, (top, left) in holes("rect", 1_500):
        ys, xs = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
        h, w = ys[0] - top, xs[0] - left
        assert ys[-1] == top + 127 - h and xs[-1] == left + 127 - w  # as much at both ends
        assert hole.sum() == (128 - 2 * h) * (128 - 2 * w) and 9_216 <= hole.sum() <= 16_384
        tops, lefts, cuts = tops | {top}, lefts | {left}, cuts | {h, w}
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 127, 0, 127)
    assert cuts == set(range(17))
    assert all(box == (0, 0) for _, box in holes("rect", 9, box=256))


def test_strokes_scale_with_the_image():
    drawn = [hole for hole, _ in holes("stroke", 20)]
    shares = [hole.mean() for hole in drawn]
    assert all(0.01 < share < 0.9 for share in shares) and len(set(shares)) > 15
    assert np.array_equal(next(holes("stroke"))[0], drawn[0])
    small = np.mean([hole.mean() for hole, _ in holes("stroke", 20, img_size=64)])
    assert small == pytest.approx(np.mean(shares), rel=0.3)


def test_mask_files_as_people_have_them():
    grey = Image.new("L", (64, 64), 0)
    grey.paste(128, (0, 0, 32, 64))
    grey.paste(127, (32, 0, 64, 64))
    grey.save("grey.png")
    left = an_inpaint.read_mask(Path("grey.png"), (64, 64), False)
    assert left.shape == (1, 64, 64) and left[..., :32].all() and not left[..., 32:].any()
    assert torch.equal(an_inpaint.read_mask(Path("grey.png"), (64, 64), True), ~left)
    assert an_inpaint.read_mask(Path("grey.png"), (48, 32), False)[..., :24].all()  # (W, H)
    for fill in (0, 255):  # a hole cut out, whatever colour is left under it
        cut = Image.new("RGBA", (64, 64), (200, 200, 200, 255))
        cut.paste((fill, fill, fill, 0), (0, 0, 32, 64))
        cut.save("cut.png")
        assert torch.equal(an_inpaint.read_mask(Path("cut.png"), (64, 64), False), left)
    Image.merge("RGBA", [grey, grey, grey, Image.new("L", (64, 64), 255)]).save("opaque.png")
    assert torch.equal(an_inpaint.read_mask(Path("opaque.png"), (64, 64), False), left)


# ---- Photographs ---------------------------------------------------------------------------------
def write_photos(folder, number=6, sizes=((80, 64), (64, 96), (72, 72))):
    """Façades: windows on a gradient."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(number):
        width, height = sizes[i % len(sizes)]
        y, x = np.mgrid[:height, :width]
        wall = np.stack([(x * (i + 1) + y * k) % 200 + 20 for k in (1, 2, 3)], axis=2)
        wall[(x % 16 < 8) & (y % 20 < 10)] = 15 * (i % 17)
        Image.fromarray(wall.astype(np.uint8)).save(Path(folder, f"house{i:02d}.png"))


def load(held_out=False, **flags):
    return an_inpaint.load_photos(Args(**SMALL | {"data_dir": "photos"} | flags), held_out)


def pixels(path):
    return np.asarray(Image.open(path))


def test_photographs_keep_their_shape_and_are_upright():
    write_photos("photos", 4, sizes=((160, 64), (64, 160), (100, 100)))
    side = Image.open("photos/house01.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    side.save("photos/house04.png", exif=exif)  # stored lying, shown turned to the right
    photos, _ = load()  # house00 is held out
    assert [tuple(photo.shape) for photo in photos] == [
        (160, 64, 3), (64, 64, 3), (64, 160, 3), (64, 160, 3),
    ]  # fmt: skip
    assert np.array_equal(photos[0], np.asarray(side))
    assert np.array_equal(photos[3], np.rot90(np.asarray(side), -1))
    for at, top in ((0.0, 0), (0.5, 48), (0.99999, 96)):
        crop = an_inpaint.cut(photos[0], 64, at, 0.5)
        assert np.array_equal(crop, np.asarray(side)[top : top + 64].transpose(2, 0, 1))


def test_every_20th_is_held_out_and_decoded_once(capsys):
    write_photos("photos", 41)
    (train, name), (held, _) = load(), load(True)
    assert (len(train), len(held)) == (38, 3)
    assert np.array_equal(held[2], pixels("photos/house40.png"))  # 64x96: nothing to resize
    out = capsys.readouterr().out
    assert out.count("decoding 41 images") == 1 and "3 images held out (every 20th)" in out
    write_photos("other", 2)
    assert len(load(eval_dir="other")[0]) == 41 and len(load(True, eval_dir="other")[0]) == 2
    Image.new("RGB", (9, 9)).save("photos/house00.png")
    assert load()[1] != name  # another content
    Path("photos/house00.png").write_text("no image")
    with pytest.raises(OSError, match="house00.png"):
        load()
    assert not [path for path in Path("photos/cache").rglob("*") if ".bin" not in path.name
                and path.is_file() and path.suffix != ".npy"]  # fmt: skip


def test_batches_are_a_function_of_seed_and_number(monkeypatch):
    write_photos("photos", 11, sizes=((90, 64), (64, 80)))
    photos = load()[0]  # 10

    def batches(start=0, number=5, **flags):
        made = an_inpaint.photo_batches(Args(**SMALL | flags), photos, CPU, start)
        return [next(made) for _ in range(number)]

    whole = batches()
    assert all(same(a, b) for a, b in zip(whole[3:], batches(3)))
    assert not same(whole[0], batches(seed=2)[0])
    real, mask, box = whole[0]
    assert real.shape == (4, 3, 64, 64) and mask.shape == (4, 1, 64, 64) and box.shape == (4, 2)
    assert -1 <= real.min() < real.max() <= 1 and set(mask.unique().tolist()) == {0, 1}
    kept = [torch.equal(a, b) for a, b in zip(real, batches(hflip=True)[0][0])]
    assert 0 < sum(kept) < 4
    monkeypatch.setattr(an_inpaint, "WORLD", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(an_inpaint, "RANK", rank)
        shares.append(batches(number=1)[0])
    assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*shares), whole[0]))


# ---- Scores --------------------------------------------------------------------------------------
def test_score_oracles():
    real = torch.randint(0, 200, (2, 3, 64, 64), dtype=torch.uint8)
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    done = real + (51 * mask).to(torch.uint8)  # 0.2 on a quarter
    scores = an_inpaint.quality(done, real, mask)
    expected = {"psnr": 20, "psnr_hole": -20 * math.log10(0.2), "mae": 0.05, "mae_hole": 0.2}
    for name, value in expected.items():
        assert scores[name].tolist() == pytest.approx([value] * 2), name
    assert (scores["ssim"] < 1).all()
    same = an_inpaint.quality(real, real, 0 * mask)
    assert same["psnr"].isinf().all() and same["psnr_hole"].isnan().all()
    torch.testing.assert_close(same["ssim"], torch.ones(2, dtype=DOUBLE))


def test_ssim_is_its_definition():
    a, b = torch.rand(2, 1, 2, 13, 12, dtype=DOUBLE)
    line = torch.tensor([math.exp(-(i**2) / 2 / 1.5**2) for i in range(-5, 6)], dtype=DOUBLE)
    window, values = torch.outer(line, line) / line.sum() ** 2, []
    for c, y, x in itertools.product(range(2), range(3), range(2)):
        p, q = (i[0, c, y : y + 11, x : x + 11] for i in (a, b))
        m, n = (window * p).sum(), (window * q).sum()
        var = (window * (p - m) ** 2).sum() + (window * (q - n) ** 2).sum()
        cov = (window * (p - m) * (q - n)).sum()
        values.append((2 * m * n + 1e-4) * (2 * cov + 9e-4) / (m**2 + n**2 + 1e-4) / (var + 9e-4))
    torch.testing.assert_close(an_inpaint.ssim(a, b)[0], sum(values) / len(values))


# ---- Filling photographs -------------------------------------------------------------------------
class Copy(torch.nn.Module):
    """A generator that fills with the mean of the known pixels, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, image, mask):
        self.seen.append((image, mask))
        known = (image * (1 - mask)).sum(dim=(2, 3)) / (1 - mask).sum(dim=(2, 3))
        fine = known[..., None, None].expand_as(image)
        return fine, fine


def test_a_large_hole_is_shrunk_to_the_trained_one():
    args, G = Args(img_size=64), Copy()
    photo = torch.full((3, 300, 400), 100, dtype=torch.uint8)
    hole = torch.zeros(1, 300, 400, dtype=torch.bool)
    hole[:, 100:180, 150:250] = True  # 80 x 100, in a window of 200 x 200
    photo[:, hole[0]] = 255  # what is under the hole must not leak into its surroundings
    photo[:, :, 60:62] = 7
    filled = an_inpaint.fill_holes(args, G, photo, hole)
    ((image, mask),) = G.seen
    assert image.shape == (1, 3, 64, 64) and 25 * 32 <= mask.sum() <= 27 * 33
    assert mask[0, 0, 32, 32] == 1  # in the middle
    known = (image + 1) * 127.5
    assert known.where(mask == 0, 100).sub(100).abs().max() < 1.01
    assert torch.equal(filled[:, ~hole[0]], photo[:, ~hole[0]])
    assert (filled[:, hole[0]].int() - 100).abs().max() <= 1


def test_holes_far_apart_are_filled_one_by_one_and_in_bounded_number():
    args, G = Args(img_size=64), Copy()
    photo = torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8)
    hole = torch.zeros(1, 320, 320, dtype=torch.bool)
    hole[:, :8, :8], hole[:, 100:200, 100:200], hole[:, 310:, 300:] = True, True, True
    filled = an_inpaint.fill_holes(args, G, photo, hole)
    assert [int(mask.sum()) for _, mask in G.seen[:2]] == [64, 200]  # at full size, in full
    assert len(G.seen) == 3 and max(image.shape[2] for image, _ in G.seen) == 64
    assert torch.equal(filled[:, ~hole[0]], photo[:, ~hole[0]])
    hole[:] = torch.rand(320, 320) < 0.002
    G.seen.clear()
    an_inpaint.fill_holes(args, G, photo, hole)
    assert 1 <= len(G.seen) <= 256
    for part in (photo, photo[:, :3, :5]):  # all is missing
        everything = torch.ones_like(part[:1], dtype=torch.bool)
        full = an_inpaint.fill_holes(args, Generator(Args(**SMALL)), part, everything)
        assert full.shape == part.shape


@pytest.fixture
def generator():
    """generator.pt of an untrained network, the flags to use it, a photograph and a small mask."""
    args = Args(**SMALL)
    noise("RGB").save("p.png")
    Image.new("L", (35, 26), 255).save("m.png")
    state = {"G": Generator(args).state_dict(), "args": vars(args), "step": 3}
    torch.save(state, "generator.pt")
    return ["--mode", "inpaint", "--checkpoint", "generator.pt"]


def noise(mode, shape=(53, 70)):
    rng, bands = np.random.default_rng(0), {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, shape).astype(np.uint16))
    array = rng.integers(0, 256, (*shape, bands) if bands else shape, np.uint8)
    return Image.fromarray(array, mode if bands else None).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("p.png", "RGB"), ("p.jpg", "RGB"), ("p.png", "RGBA"), ("p.png", "L"), ("p.png", "I;16"),
     ("p.png", "P"), ("p.tif", "CMYK"), ("p.tif", "I;16")],
)  # fmt: skip
def test_inpaint_keeps_known_pixels_mode_profile_and_exif(name, mode, call, generator):
    exif = Image.Exif()
    exif[0x010F], turned = "maker", not name.endswith(".tif")  # Pillow mistakes those of some modes
    exif[0x0112] = 6 if turned else 1  # stored lying on its side
    noise(mode).save(name, exif=exif, icc_profile=b"profile" * 20)
    mask = Image.new("L", (53, 70) if turned else (70, 53))
    mask.paste(255, (20, 10, 41, 30))
    mask.save("m.png")
    output = f"new/out{Path(name).suffix.replace('jpg', 'png')}"
    flags = ["--image", name, "--mask", "m.png", "--output", output]
    code, out, err = call("an_inpaint", *generator, *flags)
    assert (code, err) == (0, "") and f"{output}: 11.3% of {'x'.join(map(str, mask.size))}" in out
    result, hole = Image.open(output), pixels("m.png") > 0
    original = Image.open(name)
    original = np.asarray(original.convert("RGB") if mode == "P" else original)
    original = np.rot90(original, -1) if turned else original
    assert result.mode == ("RGB" if mode == "P" else mode)
    assert np.array_equal(np.asarray(result)[~hole], original[~hole])
    assert not np.array_equal(np.asarray(result)[hole], original[hole])
    assert result.getexif()[0x010F] == "maker" and result.getexif().get(0x0112, 1) == 1
    assert result.info["icc_profile"] == b"profile" * 20


def test_inpaint_says_what_is_odd(call, generator):
    flags = ["--image", "p.png", "--mask", "m.png", "--output"]
    code, out, err = call("an_inpaint", *generator, *flags, "o.jpg")
    assert code == 0 and Image.open("o.jpg").format == "JPEG"
    assert err.splitlines() == [
        "warning: m.png is 35x26, resized to 70x53",
        "warning: m.png has one value: all is missing",
    ]
    code, out, err = call("an_inpaint", *generator, *flags, "o.png", "--invert-mask")
    assert code == 0 and "nothing is missing" in err
    assert np.array_equal(pixels("o.png"), pixels("p.png"))


def test_inpaint_folders_by_name(call, generator):
    write_photos("in", 2)
    write_photos("masks", 2)
    flags = "--image in --mask masks --output out".split()
    code, _, err = call("an_inpaint", *generator, *flags)
    assert (code, err) == (0, "") and len(list(Path("out").iterdir())) == 2
    Path("masks/house01.png").unlink()
    code, _, err = call("an_inpaint", *generator, *flags)
    assert code == 2 and "cannot read masks/house01.png" in err


MINI = (
    "--data-dir photos --img-size 64 --g-ch 4 --d-ch 4 --batch-size 2 --n-critic 2 --eval-num 2 "
    "--phase1-steps 2 --total-steps 4 --eval-every 1 --log-every 1 --sample-every 0"
).split()


def test_two_phases_their_best_checkpoints_and_pictures(call, monkeypatch):
    write_photos("photos", 45)
    psnr, scores = iter([3.0, 2.0, 1.0, 0.5]), an_inpaint.score_completions
    with monkeypatch.context() as patch:
        fake = lambda *data: scores(*data) | {"psnr": next(psnr)}  # noqa: E731
        patch.setattr(an_inpaint, "score_completions", fake)
        code, out, err = call("an_inpaint", *MINI)
    assert code == 0, err
    assert "phase 1, highest PSNR 3.00 at step 1" in out
    assert "phase 2, highest PSNR 1.00 at step 3" in out
    run = Path("runs/an_inpaint__folder__an__s1")
    names = ("best-phase1", "best", "generator", "checkpoint")
    state = [torch.load(run / f"{name}.pt", weights_only=True) for name in names]
    assert [content["step"] for content in state] == [1, 3, 3, 4]
    assert state[2].keys() == {"G", "args", "step"}
    critics = [content["D"]["critics.1.layers.0.weight"] for content in state if "D" in content]
    torch.manual_seed(1)
    args = Args(**SMALL | {"g_ch": 4})
    start = (Generator(args), Discriminator(args))[1].critics[1].layers[0].weight
    assert torch.equal(critics[0], start) and not torch.equal(critics[1], start)
    code, _, err = call("an_inpaint", *MINI, "--mode", "evaluate", "--eval-mask", "stroke")
    assert code == 0 and json.loads((run / "evaluate.json").read_text())["step"] == 3, err
    flags = ["--mode", "sample", "--num-samples", "2", "--runs", str(run), str(run)]
    code, _, err = call("an_inpaint", *MINI, *flags)
    assert code == 0, err
    assert pixels("runs/an_inpaint__folder.png").shape[:2] == (2 * 66 + 2, 4 * 64 + 4)
    assert pixels(run / "layouts.png").shape[:2] == (2 * 66 + 2, 16 * 66 + 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--img-size 60", "--img-size must be a multiple of 8, at least 32, got 60"),
        ("--box 65 --img-size 64", "--box must be at most 64, got 65"),
        ("--shrink 0.5", "--shrink must be from 0 to below 0.5, got 0.5"),
        ("--img-size 32 --entities 17", "--entities must be at most 16, got 17"),
        ("--train-mask stroke", "--no-local-critic must go with --train-mask stroke: it has no "
         "box"),
        ("--eval-mask file", "--mask-dir must be given for holes from files"),
        ("--mode inpaint --image a --mask b", "runs/an_inpaint__folder__an__s1/generator.pt does "
         "not exist: train first, or name a --checkpoint"),
        ("--data-dir one", "--batch-size must be at most 0, the images not held out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(flags, message, call):
    write_photos("one", 1)
    code, out, err = call("an_inpaint", *"--img-size 64 --g-ch 4 --d-ch 4".split(), *flags.split())
    assert (code, err) == (2, f"error: {message}\n")


def test_inpaint_refuses_to_overwrite_and_names_what_is_broken(call, generator):
    Path("broken.png").write_text("no image")
    for flags, text in (
        ("--image p.png --mask m.png --output p.png", "--output must leave the inputs as they are"),
        ("--image p.png --mask broken.png", "cannot read broken.png"),
        ("--image broken.png --mask m.png", "cannot read broken.png"),
        ("--image p.png --mask m.png --output o.xyz", "unknown file extension: .xyz"),
        ("--mask m.png", "--mode inpaint must have an --image and a --mask"),
    ):
        code, _, err = call("an_inpaint", *generator, *flags.split())
        assert code == 2 and text in err and err.count("error") == 1, (flags, err)
    assert not Path("filled").exists()


def test_training_is_the_algorithm(call, tiny):
    """A step of phase 1 and one of phase 2 with two updates of the critics, restated (Eqs. 9, 10)."""
    more = "--total-steps 2 --phase1-steps 1 --lambda-adv 100 --lambda-gp 3 --lambda-ortho 0.5"
    flags = tiny("an_inpaint", more)
    assert call("an_inpaint", *flags)[0] == 0
    args = an_inpaint.parse([*flags, "--resume"])
    data = an_inpaint.photo_batches(args, an_inpaint.load_photos(args, False)[0], CPU, 0)
    torch.manual_seed(args.seed)
    G, D = Generator(args), Discriminator(args)
    opts = {net: torch.optim.Adam(net.parameters(), 1e-4, (0.5, 0.9), fused=True) for net in (G, D)}

    def descend(net, loss):
        opts[net].zero_grad()
        loss.backward(inputs=list(net.parameters()))
        opts[net].step()

    for step in range(2):
        noise = torch.Generator().manual_seed(an_inpaint.seed_of(args.seed, 1, step))
        torch.manual_seed(an_inpaint.seed_of(args.seed, 3, step, 1))
        for _ in range(2 * step):
            real, mask, box = next(data)
            fake = torch.where(mask > 0, G(real, mask)[1].detach(), real)
            loss = D(fake, box).mean() - D(real, box).mean()
            for critic, a, b in zip(D.critics, D.views(real, box), D.views(fake, box)):
                eps = torch.rand(4, 1, 1, 1, generator=noise)
                mixed = (eps * a + (1 - eps) * b).requires_grad_()
                (grad,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
                loss = loss + 3 * (grad.flatten(1).norm(dim=1) - 1).square().mean()
            descend(D, loss)
        real, mask, box = next(data)
        coarse, fine = G(real, mask)
        loss = 1.2 * ((coarse - real).abs().mean() + (fine - real).abs().mean())
        if step == 1:
            loss = loss - 100 * D(torch.where(mask > 0, fine, real), box).mean()
        descend(G, loss + 0.5 * an_inpaint.orthogonality(G))
    saved = state(next(Path("runs").iterdir()))
    assert_close(saved, {"G": G.state_dict(), "D": D.state_dict()})
