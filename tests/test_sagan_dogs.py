"""sagan_dogs.py: attention, ablations, counts, losses, stopping rule, Stanford Dogs, pictures."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import state
from PIL import Image
from torch import nn

import fid
import sagan_dogs
from sagan_dogs import Args, Discriminator, FusedSelfAttention, Generator, stopping_rule


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def small(**flags):
    """Flags of small nets for 32x32 images."""
    sizes = {"img_size": 32, "g_ch": 16, "d_ch": 16, "z_dim": 8, "attn_g": (8, 16)}
    return Args(**sizes | {"dataset": "shapes", "batch_size": 4, "num_samples": 4} | flags)


# ---- Attention -----------------------------------------------------------------------------------
def attention_by_loops(block, x, axis=1):
    """y = x + gamma V A^T, a position and a key at a time; A is softmax over its `axis`."""
    q, k, v = ([f(x)[0, :, i, j] for i, j in np.ndindex(*x.shape[2:])]
               for f in (block.query, block.key, block.value))  # fmt: skip
    S = torch.stack([torch.stack([a @ b for b in k]) for a in q])  # no 1 / sqrt(d)
    A, out = S.exp() / S.exp().sum(axis, keepdim=True), torch.empty_like(x)
    for row, (i, j) in enumerate(np.ndindex(*x.shape[2:])):
        out[0, :, i, j] = x[0, :, i, j] + block.gamma * sum(a * b for a, b in zip(A[row], v))
    return out, A


def test_attention_against_loops_and_its_map():
    torch.manual_seed(0)
    block, x = FusedSelfAttention(16).double(), torch.randn(1, 16, 4, 6).double()
    assert torch.equal(block(x), x)  # gamma = 0
    block.gamma.data.fill_(0.7)
    block.query.weight.data.mul_(3)  # a scaled softmax would be another function
    expected, A = attention_by_loops(block, x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.attention_map(x)[0], A, rtol=0, atol=1e-12)
    torch.testing.assert_close(A.sum(1), torch.ones(24).double())
    wrong, _ = attention_by_loops(block, x, axis=0)  # softmax over the queries: without transpose
    assert (block(x) - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_attention_cells_show_where_a_place_looks(monkeypatch):
    seen, A = [], {side: torch.full((2, side**2, side**2), 1e-6) for side in (8, 16)}
    A[8][0, 5 * 8 + 2, 7] = 0.5  # of image 0, row 5, column 2 looks at row 0, column 7
    A[16][1, 10 * 16 + 5, 240] = 0.5  # of image 1, the same place looks at the left lower corner
    watch = lambda block, x: seen.append(x) or A[x.shape[3]]  # noqa: E731
    monkeypatch.setattr(FusedSelfAttention, "attention_map", watch)
    G, z = Generator(small()), torch.randn(2, 8)
    G.out.weight.zero_()
    G.out.bias.fill_(-20.0)  # black images
    cells = sagan_dogs.draw_attention(G, z, ((40, 20), (63, 0))).unflatten(0, (2, 2, 3))
    names = [name for name, _ in G.named_children()]
    for name, x in zip(("attn8", "attn16"), seen):  # in order; G is in eval mode
        torch.testing.assert_close(x, nn.Sequential(*list(G)[: names.index(name)]).eval()(z))
    assert cells.shape == (2, 2, 3, 3, 128, 128) and cells[:, :, 0].max() == 0
    for cell, place in ((cells[0, 0, 1], (0, 7)), (cells[1, 1, 1], (15, 0))):
        y, x = divmod(cell[1].argmax().item(), 128)  # green: heat without the red dot
        side = 8 if place == (0, 7) else 16
        assert (y * side // 128, x * side // 128) == place and cell[1].max() > 0.6
        assert cell[:, 80, 40].tolist() == [1, 0, 0]
    assert cells[0, 0, 2, :, 126, 0].tolist() == [1, 0, 0]
    assert cells[0, 0, 2, 1].mean() > 0.6  # another place looks everywhere alike


# ---- Networks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, g, d", [  # parameters of G and of D; the paper prints none
    ({}, 3832885, 3175299),
    ({"attention": "none"}, 3807043, 2764737),
    ({"attention": "no-g"}, 3807043, 3175299),
    ({"attention": "no-d"}, 3832885, 2764737),
    ({"z_dim": 100}, 3603509, 3175299),
    ({"attn_g": (32,)}, 3812244, 3175299),
    ({"attn_d": (32,)}, 3832885, 2769938),
    ({"attn_d": (16, 8)}, 3832885, 2867619),
    ({"spectral_norm": "none"}, 3832885, 3175299),
])  # fmt: skip
def test_parameter_counts(flags, g, d):
    args = Args(**flags)
    assert (count(Generator(args)), count(Discriminator(args))) == (g, d)


def test_layers_of_the_default_nets():
    G, D = Generator(Args()), Discriminator(Args())
    g, d = ({name: n for name, layer in net.named_children() if (n := count(layer))}
            for net in (G, D))  # fmt: skip
    assert g == {
        "conv4": 1_049_088, "norm4": 1_024, "conv8": 2_097_408, "norm8": 512,
        "conv16": 524_416, "norm16": 256, "attn16": 20_641,
        "conv32": 131_136, "norm32": 128, "attn32": 5_201, "out": 3_075,
    }  # fmt: skip
    assert d == {
        "conv32": 3_136, "conv16": 131_200, "conv8": 524_544, "attn8": 82_241,
        "conv4": 2_097_664, "attn4": 328_321, "out": 8_193,
    }  # fmt: skip
    images = G(torch.randn(2, 128))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    assert D(images).shape == (2,) and D(images[:1]).shape == (1,)
    assert D.act8.negative_slope == 0.1


@pytest.mark.parametrize("size", [32, 64, 128])
def test_attention_is_on_the_last_two_maps_at_every_size(size):
    args = sagan_dogs.parse(f"--dataset shapes --img-size {size} --g-ch 1 --d-ch 1".split())
    G, D = Generator(args), Discriminator(args)
    layers = *G.named_children(), *D.named_children()
    with_it = [name for name, layer in layers if isinstance(layer, FusedSelfAttention)]
    assert with_it == [f"attn{size // 4}", f"attn{size // 2}", "attn8", "attn4"]
    assert D(G(torch.randn(2, 128))).shape == (2,)


def built(args):
    torch.manual_seed(args.seed)
    return Generator(args), Discriminator(args)


@pytest.mark.parametrize(
    "flags", [{}, {"spectral_norm": "both", "init": "xavier"}, {"attn_g": (4, 8)}]
)
def test_the_four_ablations_are_one_function_at_step_0(flags):
    z, x, outputs = torch.randn(4, 8), torch.rand(4, 3, 32, 32) * 2 - 1, []
    for attention in ("full", "none", "no-g", "no-d"):
        G, D = built(small(attention=attention, **flags))
        stream = torch.rand(1)
        outputs.append((G(z), D(x), G.eval()(z), D.eval()(x), stream))
        found = [sum(isinstance(m, FusedSelfAttention) for m in net.modules()) for net in (G, D)]
        assert found == [2 * (attention in ("full", "no-d")), 2 * (attention in ("full", "no-g"))]
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others))
    G, D = built(small(seed=2, **flags))
    assert not torch.equal(G(z), outputs[0][0]) and not torch.equal(D(x), outputs[0][1])
    G, D = built(small(**flags))  # negative control: it is gamma = 0 that makes them one
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, FusedSelfAttention):
            module.gamma.data.fill_(1.0)
    assert not torch.equal(G(z), outputs[0][0]) and not torch.equal(D(x), outputs[0][1])


def test_weights_of_attention_depend_on_seed_net_and_side_alone():
    queries = []
    for net, side, seed in (("g", 8, 1), ("d", 8, 1), ("g", 16, 1), ("g", 8, 2), ("g", 8, 1)):
        torch.rand(3)  # moves the common stream
        args = small(seed=seed, spectral_norm="none")  # which would tell the nets apart
        queries.append(sagan_dogs.attention(args, net, side, 32).query.weight)
    assert torch.equal(queries[0], queries[4])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(queries[:4], 2))


@pytest.mark.parametrize("where", ["d", "both", "none"])
def test_spectral_norm_is_on_every_layer_of_the_nets_it_is_in_and_holds(where):
    G, D = built(small(spectral_norm=where))
    for _ in range(60):
        D(G(torch.randn(2, 8)))
    for net, expected in ((G, where == "both"), (D, where != "none")):
        convs = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(convs) == 3 + 1 + 2 * 3
        for conv in convs:
            assert hasattr(conv, "parametrizations") == expected
            transposed = isinstance(conv, nn.ConvTranspose2d)
            weight = conv.weight.transpose(0, 1) if transposed else conv.weight
            sigma = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
            assert not expected or abs(sigma - 1) < 0.02


def test_weights_are_drawn_before_spectral_norm():
    torch.manual_seed(0)
    layers = [sagan_dogs.init_layer(nn.Conv2d(32, 64, 4), small(init=init), "d")
              for init in ("normal", "xavier")]  # fmt: skip
    normal, xavier = (layer.parametrizations.weight.original for layer in layers)
    bound = math.sqrt(6 / (32 * 16 + 64 * 16))  # PyTorch's own weights reach 0.044, not 0.0625
    assert 0.98 * bound < xavier.abs().max() <= bound
    assert normal.std().item() == pytest.approx(0.02, rel=0.02) and abs(normal.mean()) < 5e-4
    assert layers[0].bias.abs().max() == 0


def test_the_recipe_is_one_flag_and_given_flags_win():
    for flags, *expected in (
        ("", "normal", "d", "ns", 2e-4, 2e-4, 0.5, 0.999),
        ("--recipe sagan", "xavier", "both", "ns", 1e-4, 4e-4, 0, 0.9),
        ("--recipe sagan --init normal --g-lr 2e-4 --loss hinge",
         "normal", "both", "hinge", 2e-4, 4e-4, 0, 0.9),
    ):  # fmt: skip
        args = sagan_dogs.parse(flags.split())
        found = args.init, args.spectral_norm, args.loss, args.g_lr, args.d_lr
        assert [*found, args.beta1, args.beta2] == expected


# ---- Losses --------------------------------------------------------------------------------------
def test_losses_in_closed_form():
    losses = sagan_dogs.ADVERSARIAL
    for s in (-3.0, -0.5, 0.0, 0.25, 2.0):
        logit, p = torch.tensor(s, dtype=torch.float64), 1 / (1 + math.exp(-s))
        found = {name: [loss(logit).item() for loss in three] for name, three in losses.items()}
        assert found["ns"] == pytest.approx([-math.log(p), -math.log(1 - p), -math.log(p)])
        assert found["minimax"] == pytest.approx([-math.log(p), -math.log(1 - p), math.log(1 - p)])
        assert found["hinge"] == pytest.approx([max(0, 1 - s), max(0, 1 + s), -s])
    for three in losses.values():  # from logits: finite where a sigmoid is 0 or 1
        assert all(loss(torch.tensor([-200.0, 200.0])).isfinite().all() for loss in three)


# ---- The stopping rule ---------------------------------------------------------------------------
def evaluations(fid_of, loss_of):
    """Rows of the rule, at every 500th step: its FID, the mean of D's loss over the 500 steps."""
    losses = np.array([loss_of(t) for t in range(1, 30_001)]).reshape(-1, 500).mean(1)
    return [(t, fid_of(t), loss) for t, loss in zip(range(500, 30_001, 500), losses.tolist())]


def plateau(t):
    return 150 - 0.006 * t if t <= 15_000 else 60


def falling(t):
    return 1 - 2e-5 * t if t <= 24_000 else 0.52


@pytest.mark.parametrize("vector", [  # FID, D's loss, options; t_fid, t_det, t_best, t_stop, reason
    (plateau, falling, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),  # the paper: 15,000, 24,000
    (plateau, falling, {"fid_window": 1}, 15_000, 18_000, 24_500, 28_500, "plateau"),
    (plateau, lambda t: 1 + 1e-5 * t, {}, 15_500, 18_500, 18_500, 22_500, "plateau"),
    (lambda t: 300 * math.exp(-t / 8e3), falling, {}, 30_000, None, None, 30_000, "cap_fid"),
    (plateau, lambda t: 2 * math.exp(-t / 5000), {}, 15_500, 18_500, 30_000, 30_000, "cap_dloss"),
    (plateau, lambda t: -min(t, 24_000) / 1000, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),
    (lambda t: 0.999 ** (t / 500), lambda t: 0.999 ** (t / 500), {},
     500, 4_500, 4_500, 8_500, "plateau"),  # gains below the tolerances
    (lambda t: 200 - 10 * min(t // 2000, 7), lambda t: 1 - 0.04 * min(t // 2000, 12), {},
     14_500, 17_500, 25_000, 29_000, "plateau"),  # stairs: after a gain the wait starts anew
])  # fmt: skip
def test_stopping_rule_vectors(vector):
    fid_of, loss_of, options, *expected = vector
    found = stopping_rule(evaluations(fid_of, loss_of), **options)
    assert [found[key] for key in ("t_fid", "t_det", "t_best", "t_stop", "reason")] == expected


def test_stopping_rule_reads_the_past_only_and_smooths():
    rows = evaluations(plateau, falling)
    whole, saved = stopping_rule(rows), {}
    for i, (step, _, _) in enumerate(rows, 1):
        now = stopping_rule(rows[:i])
        saved |= {name: step for name in ("t_fid", "t_best") if now[name] == step}
        if now["reason"] == "plateau":
            break
        assert now["t_stop"] == step
    assert now == whole and saved == {"t_fid": 15_500, "t_best": 24_500}  # checkpoints that remain
    noisy = evaluations(lambda t: 40 if t == 16_500 else plateau(t), falling)
    assert stopping_rule(noisy)["t_det"] == 18_500
    assert stopping_rule(noisy, fid_window=1)["t_fid"] == 16_500
    assert set(stopping_rule([]).values()) == {None, "cap_fid"}


@pytest.fixture
def trained(monkeypatch, shapes):
    """Train with made-up FIDs under a rule of little patience; return the run's folder."""

    def run(fids, **flags):
        scores = iter(fids)
        monkeypatch.setattr(fid, "load_inception", lambda *a: None)
        monkeypatch.setattr(sagan_dogs, "score", lambda *a: {"fid": next(scores)})
        quick = {"fid_window": 1, "fid_patience": 2, "d_window": 1, "d_patience": 2, "d_tol": 0.9}
        monkeypatch.setattr(sagan_dogs, "stopping_rule", lambda rows: stopping_rule(rows, **quick))
        every = {"log_every": 1, "eval_every": 1, "sample_every": 0, "cache_dir": str(shapes)}
        args = small(**{"total_steps": 12, "milestones": ()} | every | flags)
        sagan_dogs.train(args)
        return sagan_dogs.run_folder(args)

    return run


def test_rows_of_the_rule_hold_the_mean_loss_of_d_across_a_resume(trained, monkeypatch):
    losses, log, flags = [], sagan_dogs.Run.log, {"total_steps": 8, "eval_every": 3}
    watch = lambda run, terms: losses.append(terms["loss/d"].item()) or log(run, terms)
    monkeypatch.setattr(sagan_dogs.Run, "log", watch)
    whole = trained([30, 60, 80], milestones=(4,), **flags)
    rows = state(whole)["history"]["rows"]
    means = [np.mean(losses[first:last]) for first, last in ((0, 3), (3, 6), (6, 8))]
    assert np.allclose(rows, list(zip((3, 6, 8), (30, 60, 80), means)), rtol=1e-6)
    assert all(type(value) in (int, float) for row in rows for value in row)
    middle = str(whole / "step-0000004.pt")
    again = trained([60, 80], exp_name="again", resume=True, checkpoint=middle, **flags)
    assert state(again)["history"]["rows"] == rows and len(losses) == 8 + 4


def test_early_stop_keeps_both_candidates_and_without_it_the_rule_only_reports(trained, capsys):
    def steps(folder):
        names = "checkpoint", "t_fid", "t_best", "best"
        return [state(folder, f"{name}.pt")["step"] for name in names]

    folder = trained([9, 5] + [5] * 10, early_stop=True)
    rule = "t_fid 2, t_det 5, t_best 5, t_stop 7, reason plateau"
    assert steps(folder) == [7, 2, 5, 2] and rule in capsys.readouterr().out
    trained([], early_stop=True, resume=True)  # stays stopped
    assert steps(folder) == [7, 2, 5, 2] and rule in capsys.readouterr().out
    trained([5] * 5, resume=True)  # goes on without the rule
    whole = trained([9, 5] + [5] * 10, exp_name="whole", milestones=(3, 12))
    assert steps(whole) == [12, 2, 5, 2] and rule in capsys.readouterr().out
    assert state(folder)["history"] == state(whole)["history"]
    kept = {path.name for path in (*whole.glob("step-*.pt"), *whole.glob("samples/*"))}
    assert kept == {"step-0000003.pt", "step-0000012.pt", "0000003.png", "0000012.png"}


# ---- Comparison ----------------------------------------------------------------------------------
def test_runs_side_by_side_have_equal_noise_and_their_own_milestones(trained, call):
    runs = [str(trained([], attention=name, total_steps=2, milestones=steps, eval_every=0))
            for name, steps in (("full", (1, 2)), ("none", (2,)))]  # fmt: skip
    compare = "--mode", "sample", "--out-dir", "elsewhere/new", "--runs"
    code, out, _ = call("sagan_dogs", *compare, *runs)
    assert code == 0 and out.splitlines()[-1].endswith(", ".join(Path(run).name for run in runs))
    assert [path.name for path in Path("elsewhere/new").iterdir()] == ["compare-step-0000002.png"]
    picture = np.asarray(Image.open("elsewhere/new/compare-step-0000002.png"))
    assert picture.shape == (2 * 34 + 2, 8 * 34 + 2, 3)
    args = small(attention="none")
    nets, G = sagan_dogs.build(args, torch.device("cpu"))
    sagan_dogs.load(Path(runs[1], "step-0000002.pt"), nets)
    first = sagan_dogs.generate(G, sagan_dogs.eval_noise(args, 8))[0].permute(1, 2, 0)
    assert np.array_equal(picture[36:68, 2:34], first)
    code, _, err = call("sagan_dogs", *compare, runs[0], "runs")
    assert code == 2 and "--runs must have kept a common milestone" in err


# ---- Stanford Dogs -------------------------------------------------------------------------------
def annotation(*boxes):
    """XML with these inclusive boxes; its size, name and folder are false, as some are."""
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    box = f"<object><name>dog</name>{box}</object>"
    head = "<folder>0</folder><filename>%s</filename><size><width>1</width></size>"
    return f"<annotation>{head}{''.join(box.format(*corners) for corners in boxes)}</annotation>"


@pytest.fixture
def dogs(tmp_path):
    """Three breeds: an image with two boxes, a grey one with a box beyond it, one with alpha."""
    root, field = tmp_path / "dogs", np.zeros((60, 80, 3), np.uint8)
    field[..., 0], field[..., 1] = np.arange(80), np.arange(60)[:, None]  # its column, its row
    for name, image, *boxes in (
        ("n02085620-Chihuahua/n02085620_1.jpg",
         Image.fromarray(field), (10, 20, 41, 51), (0, 0, 9, 9)),
        ("n02086240-Shih-Tzu/n02086240_7.JPG", Image.new("L", (50, 40), 90), (-5, 10, 511, 29)),
        ("n02089078-black-and-tan_coonhound/n02089078_3.jpg",
         Image.new("RGBA", (30, 30), (1, 2, 250, 128)), (0, 0, 29, 29)),
    ):  # fmt: skip
        path, note = root / "Images" / name, (root / "Annotation" / name).with_suffix("")
        path.parent.mkdir(parents=True)
        note.parent.mkdir(parents=True)
        image.save(path, "PNG")  # lossless, whatever its name
        note.write_text(annotation(*boxes))
    return root


def load(root, **flags):
    args = small(**{"dataset": "stanford-dogs", "data_dir": str(root), "batch_size": 2} | flags)
    return sagan_dogs.load_images(args, torch.device("cpu"))


def test_boxes_of_a_tree_and_their_decoded_file(dogs, capsys):
    images, labels, path = load(dogs)
    assert images.shape == (4, 3, 32, 32) and len(labels) == 4
    assert "4 boxes of 3 images, 3 breeds" in capsys.readouterr().out
    # The first box is 32x32: its pixels as they are, the last of them included.
    assert torch.equal(images[0, 0], torch.arange(10, 42).expand(32, 32))
    assert torch.equal(images[0, 1], torch.arange(20, 52)[:, None].expand(32, 32))
    assert images[2].unique().tolist() == [90]  # clamped to the image, no black border
    assert images[3].flatten(1).amax(1).tolist() == [1, 2, 250]
    first, _, other = load(dogs, boxes="first")
    assert torch.equal(first, images[[0, 2, 3]]) and load(dogs)[2] == path != other
    for old, new in (("Images", "images/Images"), ("Annotation", "annotations/Annotation")):
        (dogs / new).parent.mkdir()  # as repackaged trees have them
        (dogs / old).rename(dogs / new)
    assert torch.equal(load(dogs, cache_dir="another")[0], images)
    (note,) = dogs.glob("annotations/Annotation/*/n02085620_1")
    note.write_text(annotation((10, 20, 41, 51), (0, 0, 9, 10)))
    assert load(dogs)[2] != path


def test_crops_of_stored_pixels_are_stretched_and_do_not_bleed(tmp_path):
    image = Image.new("RGB", (100, 80), "white")
    image.paste((0, 0, 0), (30, 20, 50, 70))
    image.paste((200, 0, 0), (30, 20, 50, 45))  # the upper half of the box
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    crop = np.asarray(sagan_dogs.read_crop(tmp_path / "a.png", (30, 20, 50, 70), 8))
    assert crop.shape == (8, 8, 3) and crop[..., 1:].max() == 0
    assert (crop[:3, :, 0] == 200).all() and (crop[5:, :, 0] == 0).all()


@pytest.mark.parametrize("xml", [None, "<annotation><object>", annotation((1, 2, "x", 4)),
                                 annotation((40, 2, 9, 4))])  # fmt: skip
def test_what_cannot_be_read_is_named(dogs, xml, call):
    (note,) = dogs.glob("Annotation/*/n02085620_1")
    note.unlink() if xml is None else note.write_text(xml)
    flags = f"--data-dir {dogs} --batch-size 2 --eval-every 0".split()
    code, _, err = call("sagan_dogs", *flags)
    assert code == 2 and "cannot read" in err and "n02085620_1" in err
    assert not list(dogs.glob("cache/*/*"))


@pytest.mark.parametrize("flags, message", [
    ("--img-size 48", "--img-size must be 32, 64 or 128, got 48"),
    ("--crop 32", "--crop must be 0 for Stanford Dogs, cropped to its boxes, got 32"),
    ("--attn-g 64", "--attn-g must be of [4, 8, 16, 32], got [64]"),
    ("--img-size 32 --attn-d 32", "--attn-d must be of [4, 8, 16], got [32]"),
    ("--early-stop --eval-every 0", "--early-stop must have --eval-every and 1 process, got 0, 1"),
    ("--query 10 64", "--query must be places from 0 to 63, got ((10, 64),)"),
    ("--data-dir nothing --eval-every 0",
     "--data-dir must hold Images and Annotation, got nothing: extract images.tar and "
     "annotation.tar of http://vision.stanford.edu/aditya86/ImageNetDogs"),
])  # fmt: skip
def test_bad_input_is_one_line(flags, message, call):
    assert call("sagan_dogs", *flags.split()) == (2, "", f"error: {message}\n")
