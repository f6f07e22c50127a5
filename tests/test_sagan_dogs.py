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
from sagan_dogs import (
    ADVERSARIAL,
    Args,
    Discriminator,
    FusedSelfAttention,
    Generator,
    History,
    stopping_rule,
)

ABLATIONS = ("full", "none", "no-g", "no-d")
TINY = "--img-size 32 --g-ch 8 --d-ch 8 --batch-size 4"


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
        torch.testing.assert_close(x, nn.Sequential(*list(G)[: names.index(name)])(z))
    assert cells.shape == (2, 2, 3, 3, 128, 128) and cells[:, :, 0].max() == 0
    for cell, place in ((cells[0, 0, 1], (0, 7)), (cells[1, 1, 1], (15, 0))):
        y, x = divmod(cell[1].argmax().item(), 128)  # green: heat without the red dot
        side = 8 if place == (0, 7) else 16
        assert (y * side // 128, x * side // 128) == place and cell[1].max() > 0.6
        assert cell[:, 80, 40].tolist() == [1, 0, 0]
    assert cells[0, 0, 2, :, 126, 0].tolist() == [1, 0, 0]
    assert cells[0, 0, 2, 1].mean() > 0.6  # another place looks everywhere alike


# ---- Networks ------------------------------------------------------------------------------------
COUNTS = [  # flags, parameters of G and of D; the paper prints none
    ({}, 3832885, 3175299),
    ({"attention": "none"}, 3807043, 2764737),
    ({"attention": "no-g"}, 3807043, 3175299),
    ({"attention": "no-d"}, 3832885, 2764737),
    ({"z_dim": 100}, 3603509, 3175299),
    ({"z_dim": 100, "attention": "no-g"}, 3577667, 3175299),
    ({"attn_g": (32,)}, 3812244, 3175299),
    ({"attn_d": (32,)}, 3832885, 2769938),
    ({"attn_d": (16, 8)}, 3832885, 2867619),
    ({"spectral_norm": "none"}, 3832885, 3175299),
]


@pytest.mark.parametrize("flags, g, d", COUNTS)
def test_parameter_counts(flags, g, d):
    args = Args(**flags)
    assert (count(Generator(args)), count(Discriminator(args))) == (g, d)


def test_layers_of_the_default_nets():
    G, D = Generator(Args()), Discriminator(Args())
    g = {name: n for name, layer in G.named_children() if (n := count(layer))}
    assert g == {
        "conv4": 1_049_088, "norm4": 1_024, "conv8": 2_097_408, "norm8": 512,
        "conv16": 524_416, "norm16": 256, "attn16": 20_641,
        "conv32": 131_136, "norm32": 128, "attn32": 5_201, "out": 3_075,
    }  # fmt: skip
    d = {name: n for name, layer in D.named_children() if (n := count(layer))}
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
    with_it = [[name for name, layer in net.named_children()
                if isinstance(layer, FusedSelfAttention)] for net in (G, D)]  # fmt: skip
    assert with_it == [[f"attn{size // 4}", f"attn{size // 2}"], ["attn8", "attn4"]]
    assert D(G(torch.randn(2, 128))).shape == (2,)


def built(args):
    torch.manual_seed(args.seed)
    return Generator(args), Discriminator(args)


@pytest.mark.parametrize(
    "flags", [{}, {"spectral_norm": "both", "init": "xavier"}, {"attn_g": (4, 8)}]
)
def test_the_four_ablations_are_one_function_at_step_0(flags):
    z, x, outputs = torch.randn(4, 8), torch.rand(4, 3, 32, 32) * 2 - 1, []
    for attention in ABLATIONS:
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
    def query(net, side, seed):
        return sagan_dogs.attention(small(seed=seed), net, side, 32).query.weight

    first = query("g", 8, 1)
    torch.rand(3)
    assert torch.equal(first, query("g", 8, 1))
    others = query("d", 8, 1), query("g", 16, 1), query("g", 8, 2)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations((first, *others), 2))


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
            weight = conv.weight.detach()
            weight = weight.transpose(0, 1) if isinstance(conv, nn.ConvTranspose2d) else weight
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
    names = "init spectral_norm loss g_lr d_lr beta1 beta2".split()

    def recipe(flags):
        args = sagan_dogs.parse(f"--dataset shapes {flags}".split())
        return [getattr(args, name) for name in names]

    assert recipe("") == ["normal", "d", "ns", 2e-4, 2e-4, 0.5, 0.999]
    assert recipe("--recipe sagan") == ["xavier", "both", "ns", 1e-4, 4e-4, 0, 0.9]
    mixed = recipe("--recipe sagan --init normal --g-lr 2e-4 --loss hinge")
    assert mixed == ["normal", "both", "hinge", 2e-4, 4e-4, 0, 0.9]


# ---- Losses --------------------------------------------------------------------------------------
def test_losses_in_closed_form():
    for s in (-3.0, -0.5, 0.0, 0.25, 2.0):
        logit, p = torch.tensor(s, dtype=torch.float64), 1 / (1 + math.exp(-s))
        found = {n: [loss(logit).item() for loss in three] for n, three in ADVERSARIAL.items()}
        assert found["ns"] == pytest.approx([-math.log(p), -math.log(1 - p), -math.log(p)])
        assert found["minimax"] == pytest.approx([-math.log(p), -math.log(1 - p), math.log(1 - p)])
        assert found["hinge"] == pytest.approx([max(0, 1 - s), max(0, 1 + s), -s])
    d_real, d_fake, _ = ADVERSARIAL["ns"]
    assert (d_real(torch.zeros(3)) + d_fake(torch.zeros(3))).mean() == pytest.approx(1.386294)
    for three in ADVERSARIAL.values():  # from logits: finite where a sigmoid is 0 or 1
        assert all(loss(torch.tensor([-200.0, 200.0])).isfinite().all() for loss in three)


# ---- The stopping rule ---------------------------------------------------------------------------
def evaluations(fid_of, loss_of, every=500, end=30_000):
    """Rows of the rule: FID at the step, the mean of D's loss over the steps before."""
    losses = np.array([loss_of(step) for step in range(1, end + 1)]).reshape(-1, every).mean(1)
    steps = range(every, end + 1, every)
    return [(step, fid_of(step), loss) for step, loss in zip(steps, losses.tolist())]


def plateau(t):
    return 150 - 0.006 * t if t <= 15_000 else 60


def falling(t):
    return 1 - 2e-5 * t if t <= 24_000 else 0.52


VECTORS = [  # FID, D's loss, options; t_fid, t_det, t_best, t_stop, reason
    (plateau, falling, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),  # the paper: 15,000, 24,000
    (plateau, falling, {"fid_window": 1}, 15_000, 18_000, 24_500, 28_500, "plateau"),
    (plateau, lambda t: 1 + 1e-5 * t, {}, 15_500, 18_500, 18_500, 22_500, "plateau"),
    (lambda t: 300 * math.exp(-t / 8e3), falling, {}, 30_000, None, None, 30_000, "cap_fid"),
    (plateau, lambda t: 2 * math.exp(-t / 5000), {}, 15_500, 18_500, 30_000, 30_000, "cap_dloss"),
    (plateau, lambda t: -min(t, 24_000) / 1000, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),
]


@pytest.mark.parametrize("vector", VECTORS)
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


def test_gains_below_the_tolerance_are_a_plateau():
    found = stopping_rule([(500 * i, 100 * 0.999**i, 1.0) for i in range(1, 41)])
    assert (found["t_fid"], found["t_det"]) == (500, 4_500)


def test_history_survives_a_checkpoint(tmp_path):
    whole, broken = History(rows=[], sum=0.0, count=0), History(rows=[], sum=0.0, count=0)
    for step in range(1, 9):
        d_loss = torch.tensor(1 / step)
        for history in (whole, broken):
            history.update(sum=history["sum"] + d_loss, count=history["count"] + 1)
            if step % 3 == 0:
                history.close(step, 10.0 * step)
        torch.save(broken.state_dict(), tmp_path / "history.pt")
        broken = History(rows=[], sum=0.0, count=0)
        broken.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert broken.state_dict() == whole.state_dict() and whole["count"] == 2
    expected = [(3, 30, (1 + 1 / 2 + 1 / 3) / 3), (6, 60, (1 / 4 + 1 / 5 + 1 / 6) / 3)]
    assert np.allclose(whole["rows"], expected)
    assert all(type(value) in (int, float) for row in whole["rows"] for value in row)


def step_of(folder, name="checkpoint.pt"):
    return state(folder, name)["step"]


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


def test_early_stop_stops_and_keeps_both_candidates(trained, capsys):
    folder = trained([9, 5] + [5] * 10, early_stop=True)
    names = "checkpoint", "t_fid", "t_best", "best"
    assert [step_of(folder, f"{name}.pt") for name in names] == [7, 2, 5, 2]
    rule = "t_fid 2, t_det 5, t_best 5, t_stop 7, reason plateau"
    assert rule in capsys.readouterr().out
    trained([], early_stop=True, resume=True)  # stays stopped
    assert step_of(folder) == 7 and rule in capsys.readouterr().out
    trained([5] * 5, resume=True)  # goes on without the rule
    assert step_of(folder) == 12 and len(state(folder)["history"]["rows"]) == 12


def test_without_early_stop_the_rule_only_reports(trained, capsys):
    folder = trained([9, 5] + [5] * 10, milestones=(3, 12))
    assert step_of(folder) == 12
    assert "t_best 5, t_stop 7, reason plateau" in capsys.readouterr().out
    kept = {path.name for path in (*folder.glob("step-*.pt"), *folder.glob("samples/*"))}
    assert kept == {"step-0000003.pt", "step-0000012.pt", "0000003.png", "0000012.png"}


# ---- Comparison ----------------------------------------------------------------------------------
def test_runs_side_by_side_have_equal_noise_and_their_own_milestones(trained, call):
    runs = [str(trained([], attention=name, total_steps=2, milestones=steps, eval_every=0))
            for name, steps in (("full", (1, 2)), ("none", (2,)))]  # fmt: skip
    compare = "--mode", "sample", "--out-dir", "elsewhere/new", "--runs"
    code, out, _ = call("sagan_dogs", *compare, *runs)
    assert code == 0 and out.splitlines()[-1].endswith(", ".join(Path(run).name for run in runs))
    (path,) = Path("elsewhere/new").iterdir()
    assert path.name == "compare-step-0000002.png"
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 34 + 2, 8 * 34 + 2, 3)
    args = small(attention="none")
    nets, G = sagan_dogs.build(args, torch.device("cpu"))
    sagan_dogs.load(Path(runs[1], "step-0000002.pt"), nets)
    first = sagan_dogs.generate(G, sagan_dogs.eval_noise(args, 8))[0].permute(1, 2, 0)
    assert np.array_equal(picture[36:68, 2:34], first)
    code, _, err = call("sagan_dogs", *compare, runs[0], "runs")
    assert code == 2 and "--runs must have kept a common milestone" in err


# ---- Stanford Dogs -------------------------------------------------------------------------------
CHIHUAHUA, SHIH_TZU = "n02085620-Chihuahua", "n02086240-Shih-Tzu"
CORNERS = "xmin", "ymin", "xmax", "ymax"
BLACK = "n02089078-black-and-tan_coonhound"


def annotation(*boxes):
    """XML with these inclusive boxes; its size, name and folder are false, as some are."""
    box = "<name>dog</name><bndbox>" + "".join(f"<{k}>{{}}</{k}>" for k in CORNERS) + "</bndbox>"
    objects = "".join(f"<object>{box.format(*corners)}</object>" for corners in boxes)
    head = "<folder>02085620</folder><filename>%s</filename>"
    size = "<size><width>1</width><height>1</height><depth>3</depth></size>"
    return f"<annotation>{head}{size}{objects}</annotation>"


def put(root, breed, name, image, xml):
    """Put an image and its annotation into the tree of the extracted archives."""
    for folder in (root / "Images" / breed, root / "Annotation" / breed):
        folder.mkdir(parents=True, exist_ok=True)
    image.save(root / "Images" / breed / name, "PNG")  # lossless, whatever its name
    (root / "Annotation" / breed / Path(name).stem).write_text(xml)


def field(width, height):
    """An image that says in red its column and in green its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.fixture
def dogs(tmp_path):
    """Three breeds: an image with two boxes, a grey one with a box beyond it, one with alpha."""
    root = tmp_path / "dogs"
    two, beyond = annotation((10, 20, 41, 51), (0, 0, 9, 9)), annotation((-5, 10, 511, 29))
    put(root, CHIHUAHUA, "n02085620_1.jpg", field(80, 60), two)
    put(root, SHIH_TZU, "n02086240_7.JPG", Image.new("L", (50, 40), 90), beyond)
    alpha = Image.new("RGBA", (30, 30), (1, 2, 250, 128))
    put(root, BLACK, "n02089078_3.jpg", alpha, annotation((0, 0, 29, 29)))
    return root


def load(root, **flags):
    args = small(**{"dataset": "stanford-dogs", "data_dir": str(root), "batch_size": 2} | flags)
    return sagan_dogs.load_images(args, torch.device("cpu"))


def test_boxes_of_a_tree(dogs, capsys):
    images, labels, _ = load(dogs)
    assert images.shape == (4, 3, 32, 32) and len(labels) == 4
    assert "4 boxes of 3 images, 3 breeds" in capsys.readouterr().out
    # The first box is 32x32: its pixels as they are, the last of them included.
    assert torch.equal(images[0, 0], torch.arange(10, 42).expand(32, 32))
    assert torch.equal(images[0, 1], torch.arange(20, 52)[:, None].expand(32, 32))
    assert images[2].unique().tolist() == [90]  # clamped to the image, no black border
    assert images[3].flatten(1).amax(1).tolist() == [1, 2, 250]
    assert torch.equal(load(dogs, boxes="first")[0], images[[0, 2, 3]])


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


def test_repackaged_trees_give_the_same_crops(dogs, tmp_path):
    expected = load(dogs, cache_dir=str(tmp_path / "a"))[0].clone()
    for old, new in (("Images", "images/Images"), ("Annotation", "annotations/Annotation")):
        (dogs / new).parent.mkdir()
        (dogs / old).rename(dogs / new)
    assert torch.equal(load(dogs, cache_dir=str(tmp_path / "b"))[0], expected)


def test_the_decoded_file_is_another_one_for_another_annotation(dogs):
    path = load(dogs)[2]
    assert load(dogs)[2] == path and load(dogs, boxes="first")[2] != path
    note = dogs / "Annotation" / CHIHUAHUA / "n02085620_1"
    note.write_text(annotation((10, 20, 41, 51), (0, 0, 9, 10)))
    assert load(dogs)[2] != path


@pytest.mark.parametrize("xml", [None, "<annotation><object>", annotation((1, 2, "x", 4)),
                                 annotation((40, 2, 9, 4))])  # fmt: skip
def test_what_cannot_be_read_is_named(dogs, xml, call):
    note = dogs / "Annotation" / CHIHUAHUA / "n02085620_1"
    note.unlink() if xml is None else note.write_text(xml)
    flags = f"--data-dir {dogs} {TINY} --eval-every 0".split()
    code, _, err = call("sagan_dogs", *flags, "--batch-size", "2")
    assert code == 2 and "cannot read" in err and "n02085620_1" in err
    assert not list(dogs.glob("cache/*/*"))


def test_missing_archives_are_named_with_their_address(tmp_path, call):
    code, _, err = call("sagan_dogs", "--data-dir", str(tmp_path), "--eval-every", "0")
    assert code == 2 and "--data-dir must hold Images and Annotation" in err
    address = "http://vision.stanford.edu/aditya86/ImageNetDogs"
    assert f"extract images.tar and annotation.tar of {address}" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--img-size 48", "--img-size must be 32, 64 or 128, got 48"),
        ("--attn-g 64", "--attn-g must be of [4, 8, 16, 32], got [64]"),
        ("--img-size 32 --attn-d 32", "--attn-d must be of [4, 8, 16], got [32]"),
        ("--early-stop --eval-every 0", "--early-stop must go with an --eval-every above 0 and one process"),
    ],
)
def test_bad_input_is_one_line(flags, message, call):
    assert call("sagan_dogs", *flags.split()) == (2, "", f"error: {message}\n")
