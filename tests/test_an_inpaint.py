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
def test_counts():
    for flags, number in (
        ({}, 3_794_359),
        ({"entities": 8}, 3_791_279),
        ({"entities": 32}, 3_800_519),
        ({"self_sampling": False}, 3_790_215),
        ({"region_stats": "bn"}, 3_794_359),
        ({"refine": "ca"}, 3_767_558),
        ({"g_ch": 8}, 241_471),
    ):
        assert count(Generator(Args(**flags))) == number, flags
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
    n, h, w = len(x), x.shape[2] // 2, x.shape[3] // 2
    maps, places = torch.zeros(n, h * w, h * w, dtype=x.dtype), [*np.ndindex(h, w)]
    for i in range(n):
        small = F.pad(x[i, :, ::2, ::2], (1, 1, 1, 1))
        hole = F.pad(mask[i, 0, ::2, ::2], (1, 1, 1, 1))
        patches = [small[:, y : y + 3, z : z + 3].flatten() for y, z in places]
        known = torch.tensor([hole[y : y + 3, z : z + 3].sum() == 0 for y, z in places])
        s = torch.tensor([[p @ q / max(q.norm(), 1e-4) for q in patches] for p in patches])

        def along(s, name):
            out = torch.zeros_like(s)
            for p, q, d in itertools.product(range(h * w), range(h * w), (-1, 0, 1)):
                if 0 <= p + d < h * w and 0 <= q + d < h * w:
                    out[name[p], name[q]] += s[name[p + d], name[q + d]]
            return out

        if fuse:
            s = along(s, list(range(h * w)))
            s = along(s, [y * w + z for z in range(w) for y in range(h)])
        maps[i] = known * torch.softmax(10 * s * known, dim=1)
    return maps


def slow_paste(x, a):
    padded, w = F.pad(x, (1, 1, 1, 1)), x.shape[3] // 2
    out = torch.zeros_like(padded)
    for i, p, q in np.ndindex(*a.shape):
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
    # Weights whose products are denormal made it 15 times slower on a CPU.
    x, mask = 0.025 * torch.randn(1, 128, 16, 16), torch.zeros(1, 1, 16, 16)
    a, plain = module.attention(x, mask), slow_attention(x, mask)
    assert not ((a > 0) & (a < 1e-29)).any() and ((plain > 0) & (plain < 1e-29)).any()
    torch.testing.assert_close(a, plain)


def test_toy_oracle_of_the_readings():
    """Of V = 1, 2, 3, 4 and S_1 = 0.9, 0.8, 0.2, 0.1, worked out by hand."""
    v = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=DOUBLE)
    s = torch.tensor([[[0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.8, 0.9]]], dtype=DOUBLE)
    for reading, expected in {
        "weighted": [-1.085441, -0.060302, 0.060302, 1.085441],
        "literal": [0.204026, 2.030719, 1.696774, 2.168484],
    }.items():
        an = AttentiveNorm(1, Args(entities=2, an_reading=reading)).double()
        assert an.regional_norm(v, s).flatten().tolist() == pytest.approx(expected, abs=2e-4)


def test_an_with_zero_gain_is_plain_and_samples_in_training_only():
    an, plain = Generator(Args(**SMALL)), Generator(Args(**SMALL, refine="plain"))
    missing, unexpected = plain.load_state_dict(an.state_dict(), strict=False)
    assert not missing and all(key.startswith("module.") for key in unexpected)
    data = example(2, 3, 64, 64)
    for mode in (True, False):
        a, b = (net.train(mode)(*data) for net in (an, plain))
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    torch.nn.init.constant_(an.module.rho, 1)
    torch.nn.init.constant_(an.module.t, 50)
    assert not torch.equal(an(*data)[1], plain(*data)[1])
    assert torch.equal(an(*data)[1], an(*data)[1])
    assert not torch.equal(an.train()(*data)[1], an(*data)[1])


# ---- Networks and losses -------------------------------------------------------------------------
@pytest.mark.parametrize("refine", ["an", "ca", "plain"])
def test_one_is_missing_and_the_second_stage_sees_it_filled_by_the_first(refine):
    G, (image, mask) = Generator(Args(**SMALL, refine=refine)).eval(), example(2, 3, 64, 64)
    seen, ones = [], torch.ones_like(mask)
    for part in (G.coarse, G.branch_a, G.branch_b):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    coarse, fine = G(image, mask)
    filled = coarse * mask + image * (1 - mask)
    for x, expected in zip(seen, (image * (1 - mask), filled, filled), strict=True):
        assert torch.equal(x, torch.cat([expected, ones, mask], dim=1))
    other = G(torch.where(mask > 0, -image, image), mask)  # what is missing is never seen
    assert torch.equal(other[0], coarse) and torch.equal(other[1], fine)
    other = G(torch.where(mask > 0, image, -image), mask)  # a known pixel does count
    assert not torch.equal(other[1], fine)


@pytest.mark.parametrize("refine", ["an", "ca"])
def test_every_parameter_gets_a_finite_gradient(refine):
    args = Args(**SMALL, refine=refine)
    G, D, (real, mask) = Generator(args), Discriminator(args), example(2, 3, 64, 64)
    if args.refine == "an":
        torch.nn.init.constant_(G.module.rho, 0.7)  # at 0 nothing else of the module gets one
    coarse, fine = G(real, mask)
    fake = fine.where(mask > 0, real)
    loss = sum((x - real).abs().mean() for x in (coarse, fine))
    loss = loss + an_inpaint.orthogonality(G) - D(fake, torch.full((2, 2), 10)).mean()
    loss.backward()
    assert coarse.abs().max() <= 1 and fine.abs().max() <= 1
    for name, parameter in [*G.named_parameters(), *D.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        # k's bias adds the same to all entities, v's is normalised away, D's last is constant
        if name not in ("module.key.bias", "module.value.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_the_local_critic_sees_each_images_own_box():
    D = Discriminator(Args(**SMALL, box=24)).double()
    image = torch.rand(2, 3, 64, 64, dtype=DOUBLE, requires_grad=True)
    crops = torch.stack([image[0, :, :24, 40:], image[1, :, 33:57, 5:29]])
    box = torch.tensor([[0, 40], [33, 5]])
    assert torch.equal(D.views(image, box)[1], crops)
    found, expected = D(image, box), D.critics[0](image) + D.critics[1](crops)
    torch.testing.assert_close(found, expected)
    slopes = (torch.autograd.grad(scores.sum(), image)[0] for scores in (found, expected))
    torch.testing.assert_close(*slopes)


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
    grey, opaque = Image.new("L", (64, 64), 127), Image.new("L", (64, 64), 255)
    grey.paste(128, (0, 0, 32, 64))
    cut, black = (Image.new("RGBA", (64, 64), (200, 200, 200, 255)) for _ in range(2))
    cut.paste((255, 255, 255, 0), (0, 0, 32, 64))  # a hole cut out, whatever is left under it
    black.paste((0, 0, 0, 0), (0, 0, 32, 64))
    left = (torch.arange(64) < 32).expand(1, 64, 64)
    for image in (grey, Image.merge("RGBA", [grey, grey, grey, opaque]), cut, black):
        image.save("mask.png")
        assert torch.equal(an_inpaint.read_mask(Path("mask.png"), (64, 64), False), left)
        assert torch.equal(an_inpaint.read_mask(Path("mask.png"), (64, 64), True), ~left)
        small = an_inpaint.read_mask(Path("mask.png"), (48, 32), False)  # (W, H)
        assert torch.equal(small, (torch.arange(48) < 24).expand(1, 32, 48))


# ---- Photographs ---------------------------------------------------------------------------------
def noise(mode, shape=(53, 70), seed=0):
    rng, bands = np.random.default_rng(seed), {"RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, shape).astype(np.uint16))
    array = rng.integers(0, 256, (*shape, bands) if bands else shape, np.uint8)
    return Image.fromarray(array, mode if bands else None).convert(mode)


def write_photos(folder, number, shapes=((64, 160), (160, 64), (100, 100))):
    """Photographs of noise, no two alike."""
    Path(folder).mkdir(exist_ok=True)
    for i in range(number):
        noise("RGB", shapes[i % len(shapes)], seed=i).save(Path(folder, f"photo{i:02d}.png"))


def load(held_out=False, **flags):
    return an_inpaint.load_photos(Args(**SMALL | {"data_dir": "photos"} | flags), held_out)


def test_photographs_are_upright_decoded_once_and_every_20th_is_held_out(capsys, monkeypatch):
    write_photos("photos", 41)
    side, exif = Image.open("photos/photo01.png"), Image.Exif()
    exif[0x0112] = 6
    side.save("photos/photo04.png", exif=exif)  # stored lying, shown turned to the right
    (train, name), (held, _) = load(), load(True)
    assert (len(train), len(held)) == (38, 3)
    assert [tuple(photo.shape) for photo in train[:4]] == [
        (160, 64, 3), (64, 64, 3), (64, 160, 3), (64, 160, 3),
    ]  # fmt: skip
    assert np.array_equal(train[0], side) and np.array_equal(train[3], np.rot90(side, -1))
    assert np.array_equal(held[2], Image.open("photos/photo40.png"))  # 64x160: nothing to resize
    for at, top in ((0.0, 0), (0.5, 48), (0.99999, 96)):
        crop = an_inpaint.cut(train[0], 64, at, 0.5)
        assert np.array_equal(crop, np.asarray(side)[top : top + 64].transpose(2, 0, 1))
    out = capsys.readouterr().out
    assert out.count("decoding 41 images") == 1 and "3 images held out (every 20th)" in out
    write_photos("other", 2)
    assert len(load(eval_dir="other")[0]) == 41 and len(load(True, eval_dir="other")[0]) == 2
    write_photos("photos/test", 2)  # what is held out, and masks, are never trained on
    monkeypatch.setenv("HOME", str(Path.cwd()))
    apart = load(eval_dir="~/photos/test")
    assert len(apart[0]) == 41 and len(load()[0]) == 40 and load(mask_dir="photos/test")[1] == name
    assert apart[1] != name  # nor is a run resumed that was trained on others
    Image.new("RGB", (9, 9)).save("photos/photo00.png")
    assert load()[1] != name  # another content
    Path("photos/photo00.png").write_text("no image")
    with pytest.raises(OSError, match="photo00.png"):
        load()
    files = [path for path in Path("photos/cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".bin", ".npy"}  # nothing half done


def test_batches_are_a_function_of_seed_and_number():
    write_photos("photos", 11, shapes=((64, 90), (80, 64)))
    photos = load()[0]  # 10

    def batches(start=0, number=5, **flags):
        made = an_inpaint.photo_batches(Args(**SMALL | flags), photos, CPU, start)
        return [next(made) for _ in range(number)]

    whole = batches()
    assert all(same(a, b) for a, b in zip(whole[3:], batches(3)))
    assert not same(whole[0], batches(seed=2)[0]) and not same(whole[0][2], whole[1][2])
    real, mask, box = whole[0]
    assert real.shape == (4, 3, 64, 64) and mask.shape == (4, 1, 64, 64) and box.shape == (4, 2)
    assert (real.min(), real.max()) == (-1, 1) and set(mask.unique().tolist()) == {0, 1}
    kept = [torch.equal(a, b) for a, b in zip(real, batches(hflip=True)[0][0])]
    assert 0 < sum(kept) < 4


# ---- Scores --------------------------------------------------------------------------------------
def test_score_oracles():
    real = torch.randint(0, 200, (2, 3, 64, 64), dtype=torch.uint8)
    mask = F.pad(torch.ones(2, 1, 32, 32), (16, 16, 16, 16))
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


def fill(photo, hole):
    """Fill the hole of a photograph by a Copy; return the result, which keeps known pixels."""
    G = Copy()
    filled = an_inpaint.fill_holes(Args(img_size=64), G, photo, hole)
    assert torch.equal(filled[:, ~hole[0]], photo[:, ~hole[0]])
    return filled, G.seen


def test_a_large_hole_is_shrunk_to_the_trained_one():
    photo = torch.full((3, 300, 400), 100, dtype=torch.uint8)
    hole = torch.zeros(1, 300, 400, dtype=torch.bool)
    hole[:, 100:180, 150:250] = True  # 80 x 100, in a window of 200 x 200
    photo[:, hole[0]] = 255  # what is under the hole must not leak into its surroundings
    photo[:, :, 60:62] = 7
    filled, ((image, mask),) = fill(photo, hole)
    assert image.shape == (1, 3, 64, 64) and 25 * 32 <= mask.sum() <= 27 * 33
    assert mask[0, 0, 32, 32] == 1  # in the middle
    known = (image + 1) * 127.5
    assert known.where(mask == 0, 100).sub(100).abs().max() < 1.01
    assert (filled[:, hole[0]].int() - 100).abs().max() <= 1


def test_holes_far_apart_are_filled_one_by_one_and_in_bounded_number():
    photo = torch.randint(0, 256, (3, 320, 320), dtype=torch.uint8)
    hole = torch.zeros(1, 320, 320, dtype=torch.bool)
    hole[:, :8, :8], hole[:, 100:200, 100:200], hole[:, 310:, 300:] = True, True, True
    _, seen = fill(photo, hole)
    assert [int(mask.sum()) for _, mask in seen[:2]] == [64, 200]  # at full size, in full
    assert len(seen) == 3 and max(image.shape[2] for image, _ in seen) == 64
    assert 1 <= len(fill(photo, torch.rand(1, 320, 320) < 0.002)[1]) <= 256
    G = Generator(Args(**SMALL))
    for part in (photo, photo[:, :3, :5]):  # all is missing
        everything = torch.ones_like(part[:1], dtype=torch.bool)
        assert an_inpaint.fill_holes(Args(**SMALL), G, part, everything).shape == part.shape


@pytest.fixture
def inpaint(call):
    """Mode inpaint of an untrained generator.pt; a photograph and a small mask lie there."""
    args = Args(**SMALL)
    noise("RGB").save("p.png")
    Image.new("L", (35, 26), 255).save("m.png")
    torch.save({"G": Generator(args).state_dict(), "args": vars(args), "step": 3}, "generator.pt")
    return lambda x: call("an_inpaint", *f"--mode inpaint --checkpoint generator.pt {x}".split())


@pytest.mark.parametrize(
    ("name", "mode"),
    [("p.png", "RGB"), ("p.jpg", "RGB"), ("p.png", "RGBA"), ("p.png", "L"), ("p.png", "I;16"),
     ("p.png", "P"), ("p.tif", "CMYK"), ("p.tif", "I;16")],
)  # fmt: skip
def test_inpaint_keeps_known_pixels_mode_profile_and_exif(name, mode, inpaint):
    exif = Image.Exif()
    exif[0x010F], turned = "maker", not name.endswith(".tif")  # Pillow mistakes those of some modes
    exif[0x0112] = 6 if turned else 1  # stored lying on its side
    noise(mode).save(name, exif=exif, icc_profile=b"profile" * 20)
    mask = Image.new("L", (53, 70) if turned else (70, 53))
    mask.paste(255, (20, 10, 41, 30))
    mask.save("m.png")
    output = f"new/out{Path(name).suffix.replace('jpg', 'png')}"
    code, out, err = inpaint(f"--image {name} --mask m.png --output {output}")
    assert (code, err) == (0, "") and f"{output}: 11.3% of {'x'.join(map(str, mask.size))}" in out
    result, hole = Image.open(output), np.asarray(mask) > 0
    kept = "RGB" if mode == "P" else mode
    original = np.rot90(Image.open(name).convert(kept), -turned)
    assert result.mode == kept
    assert np.array_equal(np.asarray(result)[~hole], original[~hole])
    assert not np.array_equal(np.asarray(result)[hole], original[hole])
    assert mode != "I;16" or np.asarray(result)[hole].max() > 255  # grey of 16 bits
    assert result.getexif()[0x010F] == "maker" and result.getexif().get(0x0112, 1) == 1
    assert result.info["icc_profile"] == b"profile" * 20


def test_inpaint_says_what_is_odd(inpaint):
    code, _, err = inpaint("--image p.png --mask m.png --output o.jpg")
    assert code == 0 and Image.open("o.jpg").format == "JPEG"
    assert err.splitlines() == [
        "warning: m.png is 35x26, resized to 70x53",
        "warning: m.png has one value: all is missing",
    ]
    noise("CMYK").save("p.jpg")
    code, _, err = inpaint("--image p.jpg --mask m.png --output o.png")
    assert code == 0 and "cannot write mode CMYK as PNG: o.png is 8-bit RGB" in err
    code, _, err = inpaint("--image p.png --mask m.png --output o.png --invert-mask")
    assert code == 0 and "nothing is missing" in err
    assert np.array_equal(Image.open("o.png"), Image.open("p.png"))


def test_inpaint_folders_by_name(inpaint):
    write_photos("in", 2)
    write_photos("masks", 2)
    for folder in ("in", "masks"):
        write_photos(f"{folder}/deeper", 1)
        Path(f"{folder}/photo00.png").rename(f"{folder}/photo01.5.png")
    Image.new("L", (160, 64), 255).save("masks/deeper/photo00.png")
    for _ in range(2):  # what a run wrote is no input of the next
        code, out, err = inpaint("--image in --mask masks --output in/out.dir")
        assert (code, err.count("\n"), out.count("filled")) == (0, 1, 3), err
    assert len(an_inpaint.fid.image_files("in/out.dir")) == 3
    Path("masks/deeper/photo00.png").rename("masks/photo00.png")  # another photograph's
    code, _, err = inpaint("--image in --mask masks --output out")
    assert code == 2 and "cannot read masks/deeper/photo00.png" in err


def test_inpaint_refuses_to_overwrite_and_names_what_is_broken(inpaint):
    Path("broken.png").write_text("no image")
    for flags, text in {
        "--image p.png --mask m.png --output p.png": "--output must leave the inputs as they are",
        "--image p.png --mask broken.png": "cannot read broken.png",
        "--image broken.png --mask m.png": "cannot read broken.png",
        "--image p.png --mask m.png --output o.xyz": "unknown file extension: .xyz",
        "--mask m.png": "--mode inpaint must have an --image and a --mask",
    }.items():
        code, _, err = inpaint(flags)
        assert code == 2 and text in err and err.count("error") == 1, (flags, err)
    assert not Path("filled").exists()


# ---- Training and flags --------------------------------------------------------------------------
def test_two_phases_their_best_checkpoints_and_pictures(call, monkeypatch, tiny):
    write_photos("photos", 45)
    flags = tiny("an_inpaint", "--dataset folder --data-dir photos --eval-every 1 --num-samples 2")
    psnr, scores = iter([3.0, 2.0, 1.0, 0.5, 0.0]), an_inpaint.score_completions
    fake = lambda *data: scores(*data) | {"psnr": next(psnr)}  # noqa: E731
    monkeypatch.setattr(an_inpaint, "score_completions", fake)
    code, out, err = call("an_inpaint", *flags)
    assert code == 0, err
    assert "phase 1, highest PSNR 3.00 at step 1" in out
    assert "phase 2, highest PSNR 1.00 at step 3" in out
    run = Path("runs/an_inpaint__folder__an__s1")
    saved = [state(run, f"{x}.pt") for x in ("best-phase1", "best", "generator", "checkpoint")]
    assert [content["step"] for content in saved] == [1, 3, 3, 4]
    assert saved[2].keys() == {"G", "args", "step"}
    critics = [content["D"]["critics.1.layers.0.weight"] for content in saved[:2]]
    args = an_inpaint.parse([*flags, "--resume"])
    torch.manual_seed(1)
    start = (Generator(args), Discriminator(args))[1].critics[1].layers[0].weight
    assert torch.equal(critics[0], start) and not torch.equal(critics[1], start)
    code, _, err = call("an_inpaint", *flags, "--mode", "evaluate", "--eval-mask", "stroke")
    assert code == 0 and json.loads((run / "evaluate.json").read_text())["step"] == 3, err
    moved = str(run.rename("moved"))
    Path("runs").rmdir()
    code, _, err = call("an_inpaint", "--mode", "sample", "--runs", moved, moved)  # its size
    assert code == 0, err
    assert Image.open("runs/an_inpaint__folder.png").size == (4 * 32 + 4, 2 * 34 + 2)
    assert Image.open("moved/layouts.png").size == (16 * 34 + 2, 2 * 34 + 2)
    assert an_inpaint.find_checkpoint(Args(runs=("a",))).name == "checkpoint.pt"  # to train on


BAD = {
    "--img-size 60": "--img-size must be a multiple of 8, at least 32, got 60",
    "--box 65": "--box must be at most 64, got 65",
    "--shrink 0.5": "--shrink must be from 0 to below 0.5, got 0.5",
    "--img-size 32 --entities 17": "--entities must be from 1 to 16, got 17",
    "--train-mask stroke": "--no-local-critic must go with --train-mask stroke: it has no box",
    "--checkpoint generator.pt": "--checkpoint must hold D, got generator.pt",
    "--eval-mask file": "--mask-dir must be given for holes from files",
    "--mode inpaint --image a --mask b": "runs/an_inpaint__folder__an__s1/generator.pt does not "
    "exist: train first, or name a --checkpoint",
    "--data-dir one": "--batch-size must be at most 0 images: 1 more are held out (see --eval-dir)",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, call):
    write_photos("one", 1)
    code, _, err = call("an_inpaint", *"--img-size 64 --g-ch 4 --d-ch 4".split(), *flags.split())
    assert (code, err) == (2, f"error: {BAD[flags]}\n")


def test_training_is_the_algorithm(call, tiny):
    """A step of phase 1 and one of phase 2 with two updates of D, restated (Eqs. 9, 10)."""
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
    assert_close(state(next(Path("runs").iterdir())), {"G": G.state_dict(), "D": D.state_dict()})
