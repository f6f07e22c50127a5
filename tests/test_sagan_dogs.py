"""sagan_dogs.py: attention, ablations, counts, losses, stopping rule, Stanford Dogs, figures."""

import itertools
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import sagan_dogs
from sagan_dogs import ADVERSARIAL, Args, Discriminator, Generator, stopping_rule, window_mean

ABLATIONS = ("full", "none", "no-g", "no-d")


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def small(**flags):
    """Flags of small nets for 32x32 images."""
    sizes = {"dataset": "shapes", "img_size": 32, "g_ch": 16, "d_ch": 16, "z_dim": 8}
    return Args(**sizes | {"batch_size": 4, "num_workers": 0, "num_samples": 4} | flags)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """64 of the drawn images: decoding all 5,000 takes seconds."""
    monkeypatch.setattr(fid.Shapes, "targets", [i % 8 for i in range(64)])


# --------------------------------------------------------------------------------------------------
# A tree in the format of Stanford Dogs
# --------------------------------------------------------------------------------------------------
def annotation(*boxes, size=(1, 1), name="%s"):
    """XML of an image with these inclusive boxes; size, name and folder are not to be relied on."""
    keys = "xmin", "ymin", "xmax", "ymax"
    marks = [
        "<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box)) + "</bndbox>"
        for box in boxes
    ]
    rest = "<name>dog</name><pose>Unspecified</pose><truncated>0</truncated>"
    objects = "".join(f"<object>{rest}<difficult>0</difficult>{mark}</object>" for mark in marks)
    width, height = size
    shape = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    head = f"<folder>02085620</folder><filename>{name}</filename>{shape}<segment>0</segment>"
    return f"<annotation>{head}{objects}</annotation>"


def put(root, breed, name, image, xml):
    """An image (PIL image or bytes) and its annotation in the tree of the extracted archives."""
    if image is not None:
        path = root / "Images" / breed / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, Image.Image):
            image.save(path, "PNG" if image.mode in ("RGBA", "P") else None, quality=95)
        else:
            path.write_bytes(image)
    if xml is not None:
        path = root / "Annotation" / breed / Path(name).stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml)


def dogs_from_photographs(folder, root):
    """Turn a folder of class folders of photographs into a Stanford Dogs tree with made-up boxes.

    The first box is the middle of the photograph; every fifth has a second one, its left half.
    """
    for number, path in enumerate(fid.image_files(folder)):
        with Image.open(path) as image:
            width, height = image.size
        boxes = [(width // 10, height // 10, width - width // 10 - 1, height - height // 10 - 1)]
        boxes += [(0, 0, width // 2, height - 1)] if number % 5 == 0 else []
        synset, breed = path.parent.name[:9], path.stem.partition("_")[2] or "dog"
        xml = annotation(*boxes, size=(width, height))
        put(root, f"{synset}-{breed}", f"{synset}_{number}.jpg", path.read_bytes(), xml)


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------
def attention_by_loops(block, x, pooled):
    """Position by position, key by key: y = x + gamma V A^T with rows of A softmax over keys."""
    weights = {name: (conv.weight[:, :, 0, 0], conv.bias) for name, conv in block.named_children()}
    image, height, width = x[0], *x.shape[2:]
    places = list(itertools.product(range(height), range(width)))

    def at(name, y, x):
        return weights[name][0] @ image[:, y, x] + weights[name][1]

    def keys_and_values():
        if not pooled:
            return [(at("key", *p), at("value", *p)) for p in places]
        found = []
        for y, x in itertools.product(range(0, height, 2), range(0, width, 2)):
            four = [(y, x), (y + 1, x), (y, x + 1), (y + 1, x + 1)]
            largest = [torch.stack([at(n, *p) for p in four]).amax(0) for n in ("key", "value")]
            found.append(tuple(largest))
        return found

    pairs, out = keys_and_values(), torch.empty_like(image)
    for y, x in places:
        query = at("query", y, x)
        scores = torch.stack([query @ key for key, _ in pairs]).exp()  # no 1 / sqrt(d)
        mixed = sum(s * value for s, (_, value) in zip(scores / scores.sum(), pairs))
        if pooled:
            mixed = weights["out"][0] @ mixed + weights["out"][1]
        out[:, y, x] = image[:, y, x] + block.gamma * mixed
    return out[None]


@pytest.mark.parametrize("kind", ["SelfAttention", "PooledAttention"])
def test_attention_against_loops_and_its_map(kind):
    torch.manual_seed(0)
    block, x = getattr(sagan_dogs, kind)(16).double(), torch.randn(1, 16, 4, 6).double()
    assert torch.equal(block(x), x)  # gamma = 0
    block.gamma.data.fill_(0.7)
    pooled = kind == "PooledAttention"
    torch.testing.assert_close(block(x), attention_by_loops(block, x, pooled))
    with torch.no_grad():
        block.query.weight.mul_(2)  # a scaled softmax would be another function
    torch.testing.assert_close(block(x), attention_by_loops(block, x, pooled))
    weights = block.attention_map(x)
    assert weights.shape == (1, 24, 6 if pooled else 24)
    torch.testing.assert_close(weights.sum(2), torch.ones(1, 24))
    explicit = weights.double() @ value_rows(block, x, pooled)  # A V^T, fused against explicit
    if pooled:
        explicit = explicit @ block.out.weight[:, :, 0, 0].T + block.out.bias
    image = explicit.transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(block(x), x + 0.7 * image, atol=1e-4, rtol=0)
    transposed = (
        weights.double().transpose(1, 2) if not pooled else None
    )  # softmax on the other axis
    if transposed is not None:
        wrong = (transposed @ value_rows(block, x, False)).transpose(1, 2).unflatten(2, (4, 6))
        assert (block(x) - (x + 0.7 * wrong)).abs().max() > 1e-2


def value_rows(block, x, pooled):
    value = block.value(x)
    return (F.max_pool2d(value, 2) if pooled else value).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kind", ["full", "pooled"])
def test_attention_maps_of_the_generator_are_the_blocks_own(kind):
    args = small(attn_block=kind)
    G, z, seen = Generator(args), torch.randn(3, 8), {}
    hook = G.attn["8"].register_forward_hook(lambda block, inputs, _: seen.update(x=inputs[0]))
    maps = sagan_dogs.attention_maps(G, z)
    hook.remove()
    assert G.training and {s: m.shape for s, m in maps.items()} == {
        8: (3, 64, 8, 8) if kind == "full" else (3, 64, 4, 4),
        16: (3, 256, 16, 16) if kind == "full" else (3, 256, 8, 8),
    }
    again = G.attn["8"].eval().attention_map(seen["x"])
    torch.testing.assert_close(maps[8].flatten(2), again)
    torch.testing.assert_close(maps[16].sum((2, 3)), torch.ones(3, 256))


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------
COUNTS = [  # flags, parameters of G and of D
    ({}, 3832885, 3175299),
    ({"attention": "none"}, 3807043, 2764737),
    ({"attention": "no-g"}, 3807043, 3175299),
    ({"attention": "no-d"}, 3832885, 2764737),
    ({"z_dim": 100}, 3603509, 3175299),
    ({"z_dim": 100, "attention": "no-g"}, 3577667, 3175299),
    ({"attn_g": (32,)}, 3812244, 3175299),
    ({"attn_d": (32,)}, 3832885, 2769938),
    ({"attn_d": (16, 8)}, 3832885, 2867619),
    ({"attn_block": "pooled"}, 3832981, 3175683),
    ({"sn": "backbone"}, 3832885, 3175299),
    ({"sn": "none"}, 3832885, 3175299),
]


@pytest.mark.parametrize("flags, g, d", COUNTS)
def test_parameter_counts(flags, g, d):
    args = Args(**flags)
    assert (count(Generator(args)), count(Discriminator(args))) == (g, d)


def test_layers_of_the_default_nets():
    G, D = Generator(Args()), Discriminator(Args())
    rows = [1_049_088 + 1_024, 2_097_408 + 512, 524_416 + 256, 131_136 + 128]
    assert [count(stage) for stage in G.stages] == rows and count(G.output) == 3_075
    assert {side: count(block) for side, block in G.attn.items()} == {"16": 20_641, "32": 5_201}
    assert [count(stage) for stage in D.stages] == [3_136, 131_200, 524_544, 2_097_664]
    assert {side: count(block) for side, block in D.attn.items()} == {"8": 82_241, "4": 328_321}
    assert count(D.output) == 8_193
    images = G(torch.randn(2, 128))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    assert D(images).shape == (2,) and D(images[:1]).shape == (1,)
    assert D(images).abs().max() > 0  # a logit, not a probability
    none = Args(attention="none")
    assert count(G) - count(Generator(none)) == 25_842
    assert count(D) - count(Discriminator(none)) == 410_562


def build(args):
    torch.manual_seed(args.seed)
    return Generator(args), Discriminator(args)


@pytest.mark.parametrize(
    "flags", [{}, {"attn_block": "pooled"}, {"sn": "none"}, {"attn_g": (4, 8)}]
)
def test_the_four_ablations_are_one_function_at_step_0(flags):
    z, x = torch.randn(4, 8), torch.rand(4, 3, 32, 32) * 2 - 1
    outputs = []
    for attention in ABLATIONS:
        G, D = build(small(attention=attention, **flags))
        outputs.append((G(z), D(x), G.eval()(z), D.eval()(x)))
        assert len(G.attn) == (2 if attention in ("full", "no-d") else 0)
        assert len(D.attn) == (2 if attention in ("full", "no-g") else 0)
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others))
    G, D = build(small(seed=2))
    assert not torch.equal(G(z), outputs[0][0]) and not torch.equal(D(x), outputs[0][1])
    G, D = build(small())  # negative control: it is gamma = 0 that makes them one
    for block in (*G.attn.values(), *D.attn.values()):
        block.gamma.data.fill_(1.0)
    assert not torch.equal(G(z), outputs[0][0]) and not torch.equal(D(x), outputs[0][1])


def test_attention_weights_have_their_own_stream_that_leaves_the_global_one_alone():
    after = []
    for attention in ABLATIONS:
        build(small(attention=attention))
        after.append(torch.rand(3))
    assert all(torch.equal(after[0], other) for other in after)
    torch.manual_seed(5)
    first = Generator(small()).attn["8"].query.weight
    torch.manual_seed(6)
    assert torch.equal(first, Generator(small()).attn["8"].query.weight)
    assert not torch.equal(first, Generator(small(seed=2)).attn["8"].query.weight)


def spectral(net):
    """Names of the layers under spectral norm, and all layers with weights in two dimensions."""
    named = dict(net.named_modules())
    convs = {
        n for n, m in named.items() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    }
    return {name for name in convs if hasattr(named[name], "parametrizations")}, convs


@pytest.mark.parametrize("net", [Generator, Discriminator])
def test_spectral_norm_is_where_the_flag_says_and_holds(net):
    assert len(set.__and__(*spectral(net(small(sn="none"))))) == 0
    normed, convs = spectral(net(small()))
    assert normed == convs and len(convs) == 3 + 1 + 6
    normed, convs = spectral(net(small(sn="backbone")))
    assert normed == {f"stages.{i}.0" for i in range(3)}
    model = net(small())
    x = torch.randn(2, 8) if net is Generator else torch.randn(2, 3, 32, 32)
    for _ in range(60):
        model(x)
    for name in convs:
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        weight = weight.transpose(0, 1) if isinstance(layer, torch.nn.ConvTranspose2d) else weight
        assert abs(torch.linalg.matrix_norm(weight.flatten(1), 2).item() - 1) < 0.02, name


def test_initialisation_is_xavier_before_spectral_norm():
    torch.manual_seed(0)
    conv = sagan_dogs.xavier(torch.nn.Conv2d(32, 64, 4), True)
    raw, bound = conv.parametrizations.weight.original, math.sqrt(6 / (32 * 16 + 64 * 16))
    assert 0.98 * bound < raw.abs().max() <= bound  # PyTorch's own init would be 0.044, not 0.0625
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize("flags", [{}, {"attn_block": "pooled", "loss": "minimax", "sn": "none"}])
def test_every_parameter_gets_a_finite_gradient(flags):
    args = small(**flags)
    G, D = build(args)
    for block in (*G.attn.values(), *D.attn.values()):
        block.gamma.data.fill_(0.5)
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    real, fake = torch.rand(4, 3, 32, 32) * 2 - 1, G(torch.randn(4, 8))
    for net, loss in ((D, d_real(D(real)).mean() + d_fake(D(fake.detach())).mean()),
                      (G, g_fake(D(fake)).mean())):  # fmt: skip
        names = dict(net.named_parameters())
        grads = torch.autograd.grad(loss, list(names.values()), retain_graph=True)
        for name, grad in zip(names, grads):
            assert grad.isfinite().all(), name
            # A bias before batch norm, or of keys (softmax ignores a constant), has only noise.
            assert grad.abs().max() > 0 or name.endswith(("0.bias", "key.bias")), name


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
def test_losses_at_zero_logits():
    zero = torch.zeros(3)
    ln2 = math.log(2)
    for name, d, g in (("ns", 2 * ln2, ln2), ("minimax", 2 * ln2, -ln2), ("hinge", 2, 0)):
        d_real, d_fake, g_fake = ADVERSARIAL[name]
        assert (d_real(zero) + d_fake(zero)).mean().item() == pytest.approx(d)
        assert g_fake(zero).mean().item() == pytest.approx(g)


def test_losses_in_closed_form_on_both_sides():
    for s in (-3.0, -0.5, 0.25, 2.0):
        logit, p = torch.tensor(s, dtype=torch.float64), 1 / (1 + math.exp(-s))
        found = {n: [loss(logit).item() for loss in three] for n, three in ADVERSARIAL.items()}
        assert found["ns"] == pytest.approx([-math.log(p), -math.log(1 - p), -math.log(p)])
        assert found["minimax"] == pytest.approx([-math.log(p), -math.log(1 - p), math.log(1 - p)])
        assert found["hinge"] == pytest.approx([max(0, 1 - s), max(0, 1 + s), -s])
    for three in ADVERSARIAL.values():  # from logits: finite where a sigmoid is 0 or 1
        assert all(loss(torch.tensor([-200.0, 200.0])).isfinite().all() for loss in three)


# --------------------------------------------------------------------------------------------------
# The stopping rule
# --------------------------------------------------------------------------------------------------
def signals(fid_of, loss_of, every=1, end=30_000):
    """FID each 500 steps; D's loss as means of `every` steps."""
    t = np.arange(500, end + 1, 500)
    steps = np.arange(1, end + 1)
    losses = np.array([loss_of(s) for s in steps]).reshape(-1, every).mean(1)
    fids = np.stack([t, [fid_of(s) for s in t]], 1)
    return fids, np.stack([steps[every - 1 :: every], losses], 1)


def plateau(t):
    return 150 - 0.006 * t if t <= 15_000 else 60


def falling(t):
    return 1 - 2e-5 * t if t <= 24_000 else 0.52


VECTORS = [  # FID, D's loss, options, t_fid, t_det, t_best, t_stop, reason
    (plateau, falling, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),
    (plateau, falling, {"fid_window": 1}, 15_000, 18_000, 24_500, 28_500, "plateau"),
    (plateau, lambda t: 1 + 1e-5 * t, {}, 15_500, 18_500, 18_500, 22_500, "plateau"),
    (lambda t: 300 * math.exp(-t / 8000), falling, {}, None, None, None, 30_000, "cap_fid"),
    (plateau, lambda t: 2 * math.exp(-t / 5000), {}, 15_500, 18_500, 30_000, 30_000, "cap_dloss"),
    (plateau, lambda t: -min(t, 24_000) / 1000, {}, 15_500, 18_500, 24_500, 28_500, "plateau"),
]
KEYS = "t_fid", "t_det", "t_best", "t_stop", "reason"


@pytest.mark.parametrize("every", [1, 100])  # a loss for each step, and the log's interval means
@pytest.mark.parametrize("vector", VECTORS)
def test_stopping_rule_vectors(vector, every):
    fid_of, loss_of, options, *expected = vector
    found = stopping_rule(*signals(fid_of, loss_of, every), 30_000, **options)
    assert [found[key] for key in KEYS] == expected


def test_stopping_rule_is_not_fooled_by_the_sign_of_the_loss():
    """The margin is of |best|: of best itself, a constant negative loss would count as gains."""
    fids, losses = signals(plateau, lambda t: -24.0)
    assert stopping_rule(fids, losses, 30_000)["t_best"] == 18_500


def test_stopping_rule_reads_the_past_only():
    """Acting on the log so far and looking back give the same: candidates appear as they come."""
    fids, losses = signals(plateau, falling, 100)
    whole, seen = stopping_rule(fids, losses, 30_000), []
    for step in fids[:, 0]:
        now = stopping_rule(fids[fids[:, 0] <= step], losses[losses[:, 0] <= step], 30_000)
        if now["candidate"] == step:
            seen.append((int(step), now["t_det"] is not None))
        if now["reason"] == "plateau":
            break
        assert now["reason"] == "unfinished" and now["t_stop"] is None
    assert (step, now) == (whole["t_stop"], whole)
    assert [s for s, late in seen if not late][-1] == whole["t_fid"]
    assert [s for s, late in seen if late][-1] == whole["t_best"]


def test_stopping_rule_without_fid_or_before_the_end():
    none = np.zeros((0, 2))
    assert stopping_rule(none, none, 100)["reason"] == "no_fid"
    assert stopping_rule(np.array([[50.0, 1.0]]), none, 100)["reason"] == "unfinished"
    assert stopping_rule(np.array([[100.0, 1.0]]), none, 100)["reason"] == "cap_fid"


def test_losses_that_are_not_known_yet_are_no_plateau():
    fids, losses = signals(plateau, falling)
    found = stopping_rule(fids, losses[losses[:, 0] >= 20_000], 30_000)
    assert (found["t_best"], found["t_stop"]) == (24_500, 28_500)
    found = stopping_rule(fids, np.zeros((0, 2)), 30_000)
    assert (found["t_det"], found["reason"]) == (18_500, "cap_dloss")


def test_noise_in_fid_is_smoothed_by_the_median():
    fids, losses = signals(lambda t: 40 if t == 16_500 else plateau(t), falling)
    assert stopping_rule(fids, losses, 30_000)["t_det"] == 18_500
    assert stopping_rule(fids, losses, 30_000, fid_window=1)["t_fid"] == 16_500


def test_window_mean_is_that_of_the_single_steps():
    steps, losses = np.arange(1, 2_001), np.random.default_rng(0).normal(size=2_000)
    single = np.stack([steps, losses], 1)
    rows = np.stack([steps[99::100], losses.reshape(-1, 100).mean(1)], 1)
    for step, first in ((2_000, 1_000), (1_500, 500), (700, 0), (100, 0)):
        mean = losses[first:step].mean()
        assert window_mean(single, step, 1_000) == pytest.approx(mean)
        assert window_mean(rows, step, 1_000) == pytest.approx(mean)
    assert window_mean(rows, 1_560, 1_000) == window_mean(rows, 1_500, 1_000)  # up to the last row
    uneven = np.array([[100, 1.0], [150, 4.0]])  # the second row stands for half as many steps
    assert window_mean(uneven, 150, 1_000) == pytest.approx((100 * 1 + 50 * 4) / 150)
    assert window_mean(uneven, 150, 75) == pytest.approx((25 * 1 + 50 * 4) / 75)
    assert math.isnan(window_mean(rows, 50, 1_000))


def fake_scores(monkeypatch, values):
    """Evaluations without Inception: the k-th FID of a run is values[k]."""
    scores = iter(values)
    monkeypatch.setattr(fid, "load_inception", lambda *a: None)
    score = lambda *a: (
        dict.fromkeys(("metric/is_mean", "metric/is_std"), 1.0)
        | {  # noqa: E731
            "metric/fid": next(scores)
        }
    )
    monkeypatch.setattr(sagan_dogs, "score", score)


def quick_rule(monkeypatch):
    options = {
        "fid_window": 1,
        "fid_min_step": 0,
        "fid_patience": 2,
        "d_patience": 2,
        "d_window": 2,
    }
    rule = stopping_rule
    monkeypatch.setattr(sagan_dogs, "stopping_rule", lambda *a: rule(*a, **options, d_tol=0.9))


def trained(**flags):
    args = small(**{"total_steps": 12, "log_every": 1, "eval_every": 1, "sample_every": 0} | flags)
    sagan_dogs.train(args)
    return sagan_dogs.run_folder(args)


def test_early_stop_stops_and_keeps_both_candidates(monkeypatch):
    quick_rule(monkeypatch)
    fake_scores(monkeypatch, [9, 5, 5, 5, *[5] * 8])
    folder = trained(early_stop=True)
    report = json.loads((folder / "report.json").read_text())
    assert [report[key] for key in KEYS] == [2, 4, 4, 6, "plateau"]
    steps = {name: sagan_dogs.load_checkpoint(folder / f"{name}.pt")["step"]
             for name in ("checkpoint", "t_fid", "t_best", "best")}  # fmt: skip
    assert steps == {"checkpoint": 6, "t_fid": 2, "t_best": 4, "best": 2}
    sagan_dogs.train(replace(small(total_steps=12, log_every=1, eval_every=1, sample_every=0,
                                   early_stop=True), resume=True))  # fmt: skip
    assert sagan_dogs.load_checkpoint(folder / "checkpoint.pt")["step"] == 6  # stays stopped


def test_without_early_stop_the_rule_only_reports(monkeypatch):
    quick_rule(monkeypatch)
    fake_scores(monkeypatch, [9, 5, 5, 5, *[5] * 8])
    folder = trained(milestones=(3, 12))
    assert sagan_dogs.load_checkpoint(folder / "checkpoint.pt")["step"] == 12
    report = json.loads((folder / "report.json").read_text())
    assert [report[key] for key in KEYS] == [2, 4, 4, 6, "plateau"]
    (folder / "report.json").unlink()
    assert sagan_dogs.report_stop(folder) == report  # from the log alone
    assert {path.name for path in folder.glob("step-*.pt")} == {
        "step-0000003.pt",
        "step-0000012.pt",
    }
    assert {path.name for path in (folder / "samples").iterdir()} == {"0000003.png", "0000012.png"}


def test_gammas_are_logged_by_net_and_side(monkeypatch):
    folder = trained(total_steps=1, eval_every=0)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    keys = {key for key in last if key.startswith("train/")}
    assert keys == {f"train/gamma_{place}" for place in ("g_8", "g_16", "d_8", "d_4")}
    assert all(last[key] != 0 for key in keys)  # a step has moved them


# --------------------------------------------------------------------------------------------------
# Stanford Dogs
# --------------------------------------------------------------------------------------------------
CHIHUAHUA, SHIH_TZU, BLACK = (
    "n02085620-Chihuahua",
    "n02086240-Shih-Tzu",
    "n02089078-black-and-tan_coonhound",
)


def field(width, height):
    """An image that says in red its column and in green its row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.fixture
def dogs(tmp_path):
    """Three breeds: one image with two boxes, one box beyond the image, a PNG named .jpg."""
    root = tmp_path / "dogs"
    two = annotation((10, 20, 49, 59), (0, 0, 19, 9))
    put(root, CHIHUAHUA, "n02085620_1.jpg", Image.new("RGB", (80, 60), (200, 30, 30)), two)
    beyond = annotation(
        (-5, 10, 511, 29), size=(600, 600), name="n02085620_1"
    )  # a false size and name
    put(root, SHIH_TZU, "n02086240_7.JPG", Image.new("L", (50, 40), 90), beyond)
    alpha = Image.new("RGBA", (30, 30), (1, 2, 250, 128))
    put(root, BLACK, "n02089078_3.jpg", alpha, annotation((0, 0, 29, 29)))
    return root


def dog_args(root, **flags):
    return small(**{"dataset": "stanford-dogs", "data_dir": str(root), "batch_size": 2} | flags)


def opened(root, boxes="all", aspect="stretch", size=8):
    return sagan_dogs.StanfordDogs(root, boxes, aspect, size)


def test_boxes_of_a_tree(dogs, capsys):
    source = opened(dogs)
    assert len(source) == 4 and len(opened(dogs, "first")) == 3
    assert source.targets == [0, 0, 1, 2] and source.classes == [CHIHUAHUA, SHIH_TZU, BLACK]
    colours = [np.asarray(source[i][0]).reshape(-1, 3).mean(0).round() for i in range(4)]
    assert [source[i][1] for i in range(4)] == source.targets
    assert np.abs(colours[0] - [200, 30, 30]).max() < 4 and np.abs(colours[2] - 90).max() < 2
    assert colours[3].tolist() == [1, 2, 250]
    assert "3 breeds, Stanford Dogs has 120" in capsys.readouterr().err


def test_boxes_are_0_based_and_inclusive_and_clamped():
    whole = sagan_dogs.read_boxes(annotation((10, 20, 49, 59), (-5, 10, 511, 29)).encode())
    assert whole == [(10, 20, 50, 60), (-5, 10, 512, 30)]
    cut = np.asarray(sagan_dogs.cut_box(field(60, 70), whole[0], "stretch", 40))  # 40x40: as it is
    assert (cut[..., 0] == np.arange(10, 50)).all()
    assert (cut[..., 1] == np.arange(20, 60)[:, None]).all()
    clamped = np.asarray(sagan_dogs.cut_box(field(20, 40), whole[1], "stretch", 20))
    assert (clamped[..., 0] == np.arange(20)).all() and (
        clamped[..., 1] == np.arange(10, 30)[:, None]
    ).all()


@pytest.mark.parametrize(
    "box, columns, rows",
    [
        ((20, 30, 40, 40), range(20, 40), range(25, 45)),  # grown about its middle
        ((20, 2, 40, 8), range(20, 40), range(20)),  # shifted down
        ((20, 62, 40, 70), range(20, 40), range(50, 70)),  # shifted up
        ((0, 10, 60, 70), range(60), range(10, 70)),  # a square already
        ((5, 0, 15, 70), [*[0] * 10, *range(60)], range(70)),  # the edge repeated: 60 < 70
    ],
)
def test_square_boxes_keep_the_ratio(box, columns, rows):
    cut = np.asarray(sagan_dogs.cut_box(field(60, 70), box, "square", len(rows)))
    assert cut[0, :, 0].tolist() == list(columns)
    assert cut[:, 0, 1].tolist() == list(rows)


def test_crops_do_not_bleed_from_outside_the_box():
    image = Image.new("RGB", (100, 100), (255, 255, 255))
    image.paste((0, 0, 0), (30, 30, 70, 70))
    for aspect in ("stretch", "square"):
        assert np.asarray(sagan_dogs.cut_box(image, (30, 30, 70, 70), aspect, 8)).max() == 0
    with pytest.raises(ValueError, match="outside the 100x100"):
        sagan_dogs.cut_box(image, (100, 0, 120, 10), "stretch", 8)


def to_tar(tree, path):
    """An official archive: members Images/breed/name, or Annotation/breed/name."""
    with tarfile.open(path, "w") as tar:
        tar.add(tree, tree.name)


def test_archives_and_both_nestings_give_the_same_crops(dogs, tmp_path):
    args, places = dog_args(dogs), {}
    expected, labels, _ = sagan_dogs.load_images(args)
    places["tar"], places["nested"], places["mixed"] = (
        tmp_path / n for n in ("tar", "nest", "mix")
    )
    for name in ("tar", "mixed"):
        places[name].mkdir()
        to_tar(dogs / "Images", places[name] / "images.tar")
    to_tar(dogs / "Annotation", places["tar"] / "annotation.tar")
    (dogs / "Annotation").rename(places["mixed"] / "Annotation")
    (places["nested"] / "images").mkdir(parents=True)
    (places["nested"] / "annotations").mkdir()
    (dogs / "Images").rename(places["nested"] / "images" / "Images")
    with tarfile.open(places["tar"] / "annotation.tar") as tar:
        tar.extractall(places["nested"] / "annotations", filter="data")
    for name, place in places.items():
        found, found_labels, path = sagan_dogs.load_images(dog_args(place, num_workers=2))
        assert np.array_equal(found, expected) and torch.equal(labels, found_labels), name
        assert {p.name for p in place.iterdir()} & {"Images", "Annotation"} <= (
            {"Annotation"} if name == "mixed" else set()
        )  # nothing was unpacked
    whole = (places["tar"] / "images.tar").read_bytes()
    (places["tar"] / "images.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(fid.UserError, match=r"images\.tar is not a complete \.tar archive"):
        sagan_dogs.load_images(dog_args(places["tar"]))


def test_the_cache_is_rebuilt_when_options_or_files_change(dogs, capsys):
    options = {}, {"boxes": "first"}, {"aspect": "square"}, {"img_size": 64}
    paths = [sagan_dogs.load_images(dog_args(dogs, **flags))[2] for flags in options]
    assert len(set(paths)) == 4 and capsys.readouterr().out.count("decoding") == 4
    assert sagan_dogs.load_images(dog_args(dogs))[2] == paths[0]
    assert "decoding" not in capsys.readouterr().out
    note = dogs / "Annotation" / CHIHUAHUA / "n02085620_1"
    note.write_text(annotation((10, 20, 49, 58), (0, 0, 19, 9)))  # one number
    assert sagan_dogs.load_images(dog_args(dogs))[2] != paths[0]


BROKEN = {
    "no annotation": None,
    "unreadable XML": "<annotation><object>",
    "no object": annotation(),
    "bad numbers": annotation((1, 2, "x", 4)),
    "empty box": annotation((9, 9, 3, 20)),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unusable_annotations_are_counted_by_reason_and_limited(tmp_path, reason, capsys):
    root = tmp_path / "dogs"
    for i in range(100):
        xml = BROKEN[reason] if i == 50 else annotation((0, 0, 3, 3))
        put(root, CHIHUAHUA, f"n02085620_{i}.jpg", b"not decoded here", xml)
    assert len(opened(root)) == 99
    assert f"1 of 100 images left out ({reason}: 1)" in capsys.readouterr().err
    put(root, CHIHUAHUA, "n02085620_51.jpg", b"", "<annotation/>")
    with pytest.raises(fid.UserError, match=r"2 of 100 images left out .*, more than 1%"):
        opened(root)


def test_corrupt_images_and_boxes_outside_are_listed_and_stop_the_run(dogs):
    path = dogs / "Images" / CHIHUAHUA / "n02085620_1.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (dogs / "Annotation" / BLACK / "n02089078_3").write_text(annotation((40, 0, 60, 9)))
    with pytest.raises(fid.UserError) as error:
        sagan_dogs.load_images(dog_args(dogs))
    lines = str(error.value).splitlines()
    assert lines[0] == "3 images cannot be read:" and "n02085620_1.jpg" in lines[1]
    assert "outside the 30x30 pixels" in lines[3]
    assert {path.suffix for path in (dogs / "cache").iterdir()} == {".lock"}


def test_empty_and_one_sided_classes_are_named(dogs, capsys):
    (dogs / "Images" / "n02090622-borzoi").mkdir()
    put(dogs, "n02091032-Italian_greyhound", "n02091032_1.jpg", None, annotation((0, 0, 3, 3)))
    (dogs / "Images" / CHIHUAHUA / "Thumbs.db").write_bytes(b"no image")
    assert len(opened(dogs)) == 4
    error = capsys.readouterr().err
    assert "no crops of n02090622-borzoi, n02091032-Italian_greyhound" in error


def test_missing_data_say_what_was_looked_for(dogs, tmp_path):
    with pytest.raises(fid.UserError, match=r"no images/Images, Images or images\.tar; put images"):
        sagan_dogs.load_images(dog_args(tmp_path / "nowhere"))
    for place in (dogs / "Images", dogs / "Annotation"):
        with pytest.raises(
            fid.UserError, match="holds the breeds: --data-dir must name its parent"
        ):
            sagan_dogs.load_images(dog_args(place))
    (dogs / "Annotation").rename(tmp_path / "away")
    with pytest.raises(
        fid.UserError, match=r"no annotations/Annotation, .*Annotation or annotation"
    ):
        sagan_dogs.load_images(dog_args(dogs))


def test_fewer_crops_than_a_batch(dogs):
    with pytest.raises(fid.UserError, match="--batch-size must be at most 4"):
        sagan_dogs.load_images(dog_args(dogs, batch_size=5))


def test_the_helper_for_photographs_writes_a_tree(tmp_path):
    for name in ("n02085620", "n02113978"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), 9).save(tmp_path / "photos" / name / f"{name}_Shih-Tzu.JPEG")
    dogs_from_photographs(tmp_path / "photos", tmp_path / "tree")
    source = opened(tmp_path / "tree")
    assert len(source) == 3 and source.classes == ["n02085620-Shih-Tzu", "n02113978-Shih-Tzu"]
    assert source.items[0][2] == (4, 5, 36, 45)


# --------------------------------------------------------------------------------------------------
# Evaluation and figures
# --------------------------------------------------------------------------------------------------
def test_noise_of_grids_is_one_for_all_configurations_and_seeds():
    first = sagan_dogs.eval_noise(small(), 5)
    for attention in ABLATIONS:
        args = small(attention=attention, seed=7)
        assert torch.equal(first, sagan_dogs.eval_noise(args, 5))
    assert not torch.equal(first, sagan_dogs.eval_noise(small(eval_seed=1), 5))


def test_shuffled_patches_are_the_same_patches_elsewhere():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    shuffled = sagan_dogs.shuffle_patches(images, 2, torch.Generator().manual_seed(1))
    for before, after in zip(images, shuffled):
        patches = [[x[:, i : i + 4, j : j + 4].flatten().tolist() for i in (0, 4) for j in (0, 4)]
                   for x in (before, after)]  # fmt: skip
        assert sorted(patches[0]) == sorted(patches[1])
    assert not torch.equal(images, shuffled)
    one = sagan_dogs.shuffle_patches(images, 1, torch.Generator())
    assert torch.equal(one, images)


def test_noise_has_the_given_deviation():
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = sagan_dogs.add_noise(grey, 10, torch.Generator().manual_seed(0))
    assert noisy.dtype == torch.uint8 and 9.5 < noisy.double().std() < 10.5
    assert abs(noisy.double().mean() - 128) < 0.5


class Means:
    """Stands in for Inception: the features of an image are the means of its channels."""

    def __call__(self, images):
        return images.float().mean((2, 3)), None


def test_diversity_counts_the_breeds_that_samples_come_near(monkeypatch):
    images = np.zeros((4, 3, 8, 8), np.uint8)
    images[:, 0] = np.array([0, 10, 100, 200])[:, None, None]
    labels, args = torch.tensor([0, 0, 1, 2]), small(fid_num=4, fid_batch_size=3)
    samples = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    samples[:, 0] = torch.tensor([2, 9, 97, 104])[:, None, None]  # nearest: 0, 0, 1, 1
    place = iter([samples[:3], samples[3:]])
    monkeypatch.setattr(sagan_dogs, "generate", lambda G, z: next(place))
    found = sagan_dogs.diversity(args, Means(), None, images, labels)
    assert (found["breeds"], found["breeds_hit"], found["samples"]) == (3, 2, 4)
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["entropy_max"] == pytest.approx(math.log(3))
    pairs = [abs(a - b) for a, b in itertools.permutations([2, 9, 97, 104], 2)]
    assert found["mean_distance"] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_figures_of_four_runs(monkeypatch, capsys):
    fake_scores(monkeypatch, itertools.cycle([30.0, 20.0]))
    flags = {"total_steps": 2, "milestones": (1, 2), "eval_every": 1, "log_every": 1}
    for attention in ABLATIONS:
        folder = trained(attention=attention, **flags)
        args = small(attention=attention, **flags | {"eval_every": 0})
    trained(exp_name="large__nets", img_size=64, total_steps=1, milestones=(1,), eval_every=0)
    sagan_dogs.figures(replace(args, mode="figures", attention="full", exp_name="full"))
    folder = sagan_dogs.run_folder(replace(args, exp_name="full")) / "figures"
    expected = {"real", "samples", "fid_first", "fid_early", "fid", "compare_0000001", "progress",
                "compare_0000002", "signals", "gamma", "attention"}  # fmt: skip
    assert {path.stem for path in folder.iterdir()} == expected
    images = {name: np.asarray(Image.open(folder / f"{name}.png")) for name in expected}
    assert images["compare_0000001"].shape == (30 + 5 * 66 + 2, 110 + 8 * 66 + 2, 3)
    assert images["compare_0000002"].shape == (30 + 4 * 34 + 2, 110 + 8 * 34 + 2, 3)
    assert images["attention"].shape == (30 + 8 * 130 + 2, 110 + 6 * 130 + 2, 3)
    assert images["compare_0000001"].std() > 1 and images["fid"].std() > 1
    with pytest.raises(fid.UserError, match="--query must be pixels of 32x32 images"):
        sagan_dogs.figures(replace(args, exp_name="full", query=((3, 40),)))
    sagan_dogs.figures(replace(args, exp_name="none"))  # no attention in G: no maps to draw
    none = sagan_dogs.run_folder(args).with_name(folder.parent.name.replace("full", "none"))
    assert not (none / "figures" / "attention.png").exists()


def test_figures_with_inception(monkeypatch):
    folder = trained(total_steps=1, eval_every=0)
    monkeypatch.setattr(fid, "dataset_moments", lambda *a: None)
    calls = []

    def score_generator(net, batch, num, size, real):
        calls.append(torch.cat([batch(first, 2) for first in range(0, num, 2)]))
        return {"fid": float(len(calls))}

    monkeypatch.setattr(fid, "score_generator", score_generator)
    net = Means()
    net.protocol, net.label = {"weights": "a stand-in"}, fid.RANDOM_LABEL
    monkeypatch.setattr(fid, "load_inception", lambda *a: net)
    sagan_dogs.figures(small(fid_num=10, fid_real=6, fid_batch_size=5))
    measured = json.loads((folder / "figures" / "measured.json").read_text())
    assert list(measured["spatial"]) == list(sagan_dogs.DISTORTIONS) and measured["n_real"] == 6
    assert all(images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8 for images in calls)
    assert measured["label"] == fid.RANDOM_LABEL
    assert measured["diversity"]["breeds"] == 3 and (folder / "figures" / "spatial.png").exists()
