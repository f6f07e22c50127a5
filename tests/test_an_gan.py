"""an_gan.py: layers against loops, counts of every table row, losses, evaluation, pictures."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, same, state
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized

import an_gan
from an_gan import Args, AttentiveNorm, Discriminator, Generator


def make(**flags) -> Args:
    """Flags of small networks with five classes."""
    tiny = {"g_ch": 8, "d_ch": 8, "z_dim": 16, "num_classes": 5, "img_size": 32, "batch_size": 4}
    return Args(**tiny | flags)


def an_layer(channels: int = 6, **flags) -> AttentiveNorm:
    """An AN module with random parameters, in float64."""
    layer = AttentiveNorm(channels, make(**{"entities": 3, "self_sampling": False} | flags))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def randomize(net: nn.Module) -> nn.Module:
    """Give a network's class tables, gains and biases random values."""
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1 or name.endswith((".gamma", ".beta", ".rho")):
            nn.init.normal_(parameter, 0.7, 0.3)
    return net


# Attentive normalization --------------------------------------------------------------------------
def naive_norm(layer: AttentiveNorm, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Eq. 5 by loops over images, entities and channels."""
    out = torch.zeros_like(v)
    for b, i, c in itertools.product(range(len(v)), range(s.shape[1]), range(v.shape[1])):
        mass, product = s[b, i].sum() if layer.weighted else v.shape[2], s[b, i] * v[b, c]
        mean = product.sum() / mass
        square = s[b, i] * (v[b, c] - mean) ** 2 if layer.weighted else (product - mean) ** 2
        var = square.sum() / mass
        normal = (v[b, c] - mean) / (var.sqrt() + 1e-5)
        out[b, c] += (normal * layer.beta[i, c] + layer.alpha[i, c]) * s[b, i]
    return out


@pytest.mark.parametrize("stats", ["in", "bn"])
@pytest.mark.parametrize("reading", ["weighted", "literal"])
def test_matrix_form_equals_the_loops(reading, stats):
    torch.manual_seed(0)
    layer = an_layer(an_reading=reading, region_stats=stats)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64) + 2
    logits = torch.einsum("nc,bchw->bnhw", layer.entity.weight[:, :, 0, 0], x)
    v = torch.einsum("dc,bchw->bdhw", layer.value.weight[:, :, 0, 0], x)
    v, s = v + layer.value.bias[:, None, None], (0.1 * logits).softmax(1)
    if stats == "bn":  # the batch side by side, as one image
        v, s = (torch.cat(list(maps), dim=2)[None] for maps in (v, s))
    out = naive_norm(layer, v.flatten(2), s.flatten(2)).view_as(v)
    out = torch.cat(out.split(5, dim=3)) if stats == "bn" else out
    layer.momentum = 1  # the running statistics become those of x
    torch.testing.assert_close(layer(x), x + layer.rho * out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x), x + layer.rho * out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reading", "alpha", "beta", "expected"), [  # by hand, without epsilon
    ("weighted", (0.0, 0.0), (1.0, 1.0), [-1.085441, -0.060302, 0.060302, 1.085441]),
    ("weighted", (0.5, -0.5), (2.0, 1.0), [-1.499521, 0.480907, 0.061814, 0.956801]),
    ("literal", (0.0, 0.0), (1.0, 1.0), [0.204026, 2.030719, 1.696774, 2.168484]),
])  # fmt: skip
def test_toy_oracle(reading, alpha, beta, expected):
    v = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    s = torch.tensor([[[0.9, 0.8, 0.2, 0.1], [0.1, 0.2, 0.8, 0.9]]], dtype=torch.float64)
    layer = AttentiveNorm(1, make(entities=2, an_reading=reading)).double()
    layer.alpha.data, layer.beta.data = torch.tensor([alpha, beta]).double()[:, :, None]
    assert layer.regional_norm(v, s).flatten().tolist() == pytest.approx(expected, abs=5e-5)


def test_uniform_layout_is_instance_norm_and_hard_layout_regional():
    v, owner = torch.randn(2, 5, 40, dtype=torch.float64) * 3 + 1, torch.randint(4, (2, 40))
    uniform, hard = torch.full((2, 4, 40), 0.25).double(), F.one_hot(owner, 4).mT.double()
    regional = torch.zeros_like(v)
    for b, i in itertools.product(range(2), range(4)):
        regional[b][:, owner[b] == i] = F.instance_norm(v[b][:, owner[b] == i][None])[0]
    for reading in ("weighted", "literal"):  # negative control: Eq. 5 as printed is neither
        layer = AttentiveNorm(5, make(entities=4, an_reading=reading)).double()
        out = layer.regional_norm(v, uniform), layer.regional_norm(v, hard)
        assert torch.allclose(out[0], F.instance_norm(v), atol=1e-4) == layer.weighted
        assert torch.allclose(out[1], regional, atol=1e-4) == layer.weighted


def test_self_sampling_by_its_definition():
    """Every entity of every image is given one of the pooled keys, no two the same."""
    torch.manual_seed(0)
    layer, x = AttentiveNorm(16, make(entities=8)), torch.randn(3, 16, 8, 8)
    key, windows = layer.key(x), [(2 * i, 2 * j) for i in range(4) for j in range(4)]
    pooled = torch.stack([key[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i, j in windows], 2)
    every = torch.einsum("bcp,bchw->bphw", pooled, layer.query(x)).flatten(2)
    for _ in range(9):
        distance = (layer.activation(x).flatten(2)[:, :, None] - every[:, None]).abs().amax(3)
        assert distance.amin(2).max() < 1e-5
        drawn = distance.argmin(2).tolist()
        assert all(len(set(row)) == 8 for row in drawn) and drawn[0] != drawn[1] != drawn[2]


@pytest.mark.parametrize("flags", [{}, {"an_reading": "literal"}, {"region_stats": "bn"}])
def test_gradients(flags):
    torch.manual_seed(0)
    layer = an_layer(4, entities=3, self_sampling=True, **flags).train()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        torch.manual_seed(1)  # the same positions at each call
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), atol=1e-6)
    assert not torch.equal(layer(x), layer(x))
    layer.value.bias.data.zero_()
    assert torch.autograd.grad(layer(0 * x).sum(), x)[0].isfinite().all()  # of a deviation of 0
    without = an_layer(4, **flags).eval()
    without.load_state_dict({key: layer.state_dict()[key] for key in without.state_dict()})
    assert torch.equal(layer.eval()(x), without(x))  # self-sampling is for training: t = 0
    layer.rho.data.zero_()
    assert torch.equal(layer(x), x)  # the identity at the start


@pytest.mark.parametrize("flags", [{}, {"an_reading": "literal"}, {"region_stats": "bn"}])
def test_memory_is_linear(flags):
    layer, sizes = AttentiveNorm(32, make(**flags)).train(), []
    x = torch.randn(2, 32, 16, 16, requires_grad=True)
    with saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda x: x):
        layer(x)
    assert 0 < max(sizes) <= x.numel()  # the product of maps and features has 16 times as many


def test_variance_survives_a_large_mean():
    torch.manual_seed(0)
    v, s = torch.randn(1, 8, 64 * 64) * 0.35 + 100, torch.randn(1, 16, 64 * 64).softmax(1)
    layer = AttentiveNorm(8, make())
    exact = copy.deepcopy(layer).double().regional_norm(v.double(), s.double())
    assert (layer.regional_norm(v, s) - exact).abs().max() < 1e-5  # 0.02 without the shift


def test_pooled_attention_equals_the_loops():
    layer, x = an_gan.PooledAttention(16).double(), torch.randn(2, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    layer.gamma.data.fill_(0.5)
    query, corners = layer.query(x), [(0, 0), (0, 2), (2, 0), (2, 2)]
    pool = lambda f: [f(x)[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i, j in corners]
    key, value, expected = pool(layer.key), pool(layer.value), x.clone()
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        weights = torch.stack([query[b, :, i, j] @ k[b] for k in key]).softmax(0)  # not scaled
        mixed = sum(w * u[b] for w, u in zip(weights, value))
        expected[b, :, i, j] += 0.5 * layer.out.weight[:, :, 0, 0] @ mixed
    torch.testing.assert_close(layer(x), expected)


def test_conditional_batch_norm():
    torch.manual_seed(0)
    layer, x, y = an_gan.ConditionalBatchNorm2d(6, 5), torch.randn(8, 6, 4, 4), torch.arange(8) % 5
    nn.init.normal_(layer.gamma), nn.init.normal_(layer.beta)
    expected = F.batch_norm(x, None, None, training=True)
    for i, c in itertools.product(range(8), range(6)):
        expected[i, c] = expected[i, c] * layer.gamma[y[i], c] + layer.beta[y[i], c]
    torch.testing.assert_close(layer(x, y), expected)
    assert torch.equal(layer(x, F.one_hot(y, 5).float()), layer(x, y))


# Networks -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "g", "d"), [  # no counts in the paper: worked out by hand
    ({"model": "acgan"}, 41_996_931, 20_567_721),
    ({"model": "sngan"}, 41_996_931, 20_566_721),
    ({"model": "sngan-star"}, 41_996_931, 20_566_721),
    ({"model": "sagan"}, 42_078_852, 20_587_202),
    ({}, 41_579_476, 20_575_010),
    ({"entities": 8}, 41_573_324, 20_573_466),
    ({"self_sampling": False}, 41_563_012, 20_573_954),
    ({"region_stats": "bn"}, 41_579_476, 20_575_010),
    ({"img_size": 64, "num_classes": 200}, 13_342_516, 19_755_810),
    ({"img_size": 32, "num_classes": 10}, 4_393_812, 1_081_906),
])  # fmt: skip
def test_counts(flags, g, d, monkeypatch):
    args = Args(**{"num_classes": 1000} | flags)
    monkeypatch.setattr(an_gan, "sn", lambda layer, enabled=True: layer)  # adds buffers only
    with torch.device("meta"):
        nets = Generator(args), Discriminator(args)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [g, d]


@pytest.mark.parametrize("model", ["an", "sagan", "sngan-star", "sngan", "acgan"])
def test_spectral_norm_biases_and_filters_at_the_start(model):
    args = make(model=model)
    for net, on in (Generator(args), model not in ("sngan", "acgan")), (Discriminator(args), True):
        for name, layer in net.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
                assert is_parametrized(layer, "weight") == (on and not name.endswith("entity"))
                assert getattr(layer, "bias", None) is None or layer.bias.abs().max() == 0
        assert an_gan.orthogonality(net) < 1e-9


@pytest.mark.parametrize(("size", "after"), [(32, "blocks.1"), (64, "blocks.1"), (128, "blocks.2")])
def test_places_of_the_modules(size, after):
    seen, z, y = {}, torch.randn(2, 16), torch.tensor([0, 1])
    for model in ("an", "sagan"):
        G, D = (net(make(img_size=size, model=model)) for net in (Generator, Discriminator))
        for name, module in (*G.named_modules(), *D.named_modules()):
            if isinstance(module, (AttentiveNorm, an_gan.PooledAttention)):
                note = lambda module, x, out, name=name: seen.update({name: x[0].shape[2]})
                module.register_forward_hook(note)
        D(G(z, y), y)
    d_size = 16 if size == 32 else 32
    assert seen == {"blocks.2.an": 32, "blocks.0.an": size, "attention": 32, after: d_size}


def test_blocks_by_their_definition():
    torch.manual_seed(0)
    args, twice = make(), lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x, y, an = torch.randn(2, 8, 4, 4), torch.tensor([1, 3]), torch.neg  # for AN
    for has_an in (False, True):  # AN takes the place of the second norm
        up = randomize(an_gan.UpBlock(8, 6, args, has_an)).eval()
        h = up.conv1(twice(F.relu(up.norm1(x, y))))
        h = up.conv2(F.relu(up.an(h) if has_an else up.norm2(h, y)))
        torch.testing.assert_close(up(x, y), h + up.shortcut(twice(x)))
    same = an_gan.DownBlock(8, 8, False, an)
    torch.testing.assert_close(same(x), x + same.conv2(F.relu(an(same.conv1(F.relu(x))))))
    for before, x in ((F.relu, x), (nn.Identity(), x[:, :3])):  # none before the first block
        down = an_gan.DownBlock(x.shape[1], 6, True, an)
        h = down.conv2(F.relu(an(down.conv1(before(x)))))
        torch.testing.assert_close(down(x), F.avg_pool2d(h + down.shortcut(x), 2))


def test_discriminator_heads():
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    D, acgan = Discriminator(make()).eval(), Discriminator(make(model="acgan")).eval()
    h = F.relu(D.blocks(x)).sum((2, 3))
    expected = [D.linear(h[i])[0] + D.embed.weight[y[i]] @ h[i] for i in range(3)]
    torch.testing.assert_close(D(x, y)[0], torch.stack(expected))
    assert torch.equal(acgan(x, y)[0], acgan(x, (y + 1) % 5)[0])  # its logit does not see y
    classes = acgan.classify(F.relu(acgan.blocks(x)).sum((2, 3))).log_softmax(1)
    torch.testing.assert_close(acgan(x, y)[1], -classes[[0, 1, 2], y].mean())
    assert torch.autograd.grad(acgan(x, y)[1], acgan.blocks[0].conv1.bias)[0].any()
    assert D(x, y)[1].item() == 0


def test_orthogonality():
    layer = AttentiveNorm(2, make(entities=2))
    layer.entity.weight.data = 2 * torch.eye(2)[:, :, None, None]
    assert an_gan.orthogonality(nn.ModuleList([layer, copy.deepcopy(layer)])).item() == 2 * 18
    # The authors' signed sum of W^T W - I would be 2 * 6.


# Training, evaluation, pictures -------------------------------------------------------------------
@pytest.mark.parametrize("stats", ["in", "bn"])
def test_settled_statistics_are_those_without_self_sampling(stats):
    torch.manual_seed(0)
    args, seen, noise = make(region_stats=stats), [], torch.Generator().manual_seed(2)
    G = randomize(Generator(args))
    before, found = copy.deepcopy(G.state_dict()), an_gan.settled(args, G)
    assert same(before, G.state_dict()) and G.training and not found.training
    for module in G.eval().modules():  # by hand
        if isinstance(module, (nn.BatchNorm2d, AttentiveNorm)):
            module.training, module.sampling = stats == "bn" or module is not G.blocks[2].an, False
    G.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    for _ in range(100):
        G(torch.randn(4, 16, generator=noise), G.labels((4,), noise))
    torch.testing.assert_close(found.norm.running_mean, sum(seen) / 100, rtol=1e-4, atol=1e-5)


def test_scores_of_the_data_and_of_classes(tmp_path, monkeypatch):
    """Of a generator that has seen class 2 alone: grey, 10 k levels above mid-grey for class k."""
    args = make(intra_num=20, fid_num=20, num_classes=3, classes=(2, 0))
    G = Generator(args)
    G.class_counts.copy_(torch.tensor([0.0, 0.0, 30.0]))
    level = lambda y: (10 * y + torch.arange(len(y)) % 2 + 0.5) / 127.5
    G.forward = lambda z, y: level(y)[:, None, None, None].expand(-1, 3, 4, 4)
    images = an_gan.generate(G, torch.zeros(20, 16), torch.full((20,), 2)).repeat_interleave(3, 0)
    data = images, torch.arange(60) % 3, tmp_path / "images.npy"

    def inception(images):  # features: an image's mean colour, beside zeros
        return F.pad(images.float().mean((2, 3)), (0, 2045)), torch.ones(len(images), 1008)

    inception.label, inception.device, inception.protocol = "stub", "cpu", {"sha256": "0" * 64}
    for name, value in {
        "fid.load_inception": inception, "load_images": data, "build": ({}, G), "settled": G,
        "load": {"step": 7}, "find_checkpoint": tmp_path / "best.pt",
    }.items():  # fmt: skip
        monkeypatch.setattr(f"an_gan.{name}", lambda *a, value=value: value)
    found = an_gan.evaluate(args)
    assert found["fid"] < 1  # labels as frequent as in the data: all of class 2
    assert found["intra_fid_per_class"] == pytest.approx({2: 0, 0: 3 * 20**2}, abs=0.5)
    assert found["intra_fid"] == pytest.approx(600, abs=0.5)  # |shift of the mean|^2, 3 colours
    assert len(list(tmp_path.glob("*.npz"))) == 1  # not 34 MB for each of 1,000 classes
    written = json.loads((tmp_path / "evaluate.json").read_text())
    assert written["step"] == 7 and written["intra_fid"] == found["intra_fid"]


def test_interpolation_starts_and_ends_at_the_classes():
    torch.manual_seed(0)
    args, y = make(), torch.tensor([1, 3, 0])
    G = randomize(Generator(args)).eval()
    rows = an_gan.interpolation(args, G, y.tolist())
    assert rows.shape == (32, 3, 32, 32)  # two pairs, images and maps
    ends = an_gan.generate(G, an_gan.eval_noise(args, 1).expand(3, -1), y) / 255
    assert (ends[0] - ends[1]).abs().max() > 0.1
    torch.testing.assert_close(rows[[0, 7, 16, 23]], ends[[0, 1, 1, 2]], rtol=0, atol=1.01 / 255)


def test_mode_sample_draws_the_figures(call, tiny):
    flags = "--total-steps 1 --num-samples 6 --entities 4"
    assert call("an_gan", *tiny("an_gan", flags))[0] == 0
    assert call("an_gan", *tiny("an_gan", f"{flags} --mode sample --classes 1 5 7"))[0] == 0
    (run,) = Path("runs").iterdir()
    for name, columns, rows in (("classes", 3, 2), ("layouts", 6, 3), ("samples/0000001", 6, 1)):
        assert Image.open(run / f"{name}.png").size == (34 * columns + 2, 34 * rows + 2)
    assert Image.open(run / "regions.png").size == (1024 + 4, 3 * 258 + 2)


# Data and flags -----------------------------------------------------------------------------------
def photos(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (7, 9), (20 * i, 0, 0)).save(root / name)


def test_folders_of_classes(tmp_path, capsys):
    photos(tmp_path, "in/train/n02/0.png", "in/train/n01/deep/1.JPEG", "in/train/n02/2.PNG")
    for flags in {"data_dir": "in"}, {"data_dir": "in/train", "dataset": "folder"}:
        assert an_gan.open_dataset(Args(**flags))[1] == [0, 1, 1]
        assert "3 images, 2 classes (n01, n02)" in capsys.readouterr().out


def test_defaults():
    flags = "", "--dataset cifar10", "--model acgan"
    paper, cifar, acgan = (an_gan.parse(line.split()) for line in flags)
    assert (paper.g_lr, paper.d_lr, paper.beta1, paper.beta2) == (1e-4, 4e-4, 0.0, 0.999)
    assert (paper.batch_size, paper.total_steps, paper.ema_decay) == (256, 880_000, 0.0)
    assert (cifar.batch_size, cifar.total_steps, cifar.ema_decay) == (64, 100_000, 0.999)
    assert (cifar.g_lr, cifar.d_lr, cifar.hflip, cifar.img_size) == (2e-4, 2e-4, True, 32)
    assert (acgan.g_lr, acgan.beta2, acgan.n_critic, acgan.total_steps) == (2e-4, 0.9, 5, 1_000_000)


@pytest.mark.parametrize(("flags", "message"), [
    ("--img-size 48", "--img-size must be 32, 64 or 128, got 48"),
    ("--entities 0", "--entities must be from 1 to 256, got 0"),
    ("--dataset folder --num-classes 2 --batch-size 2", "--num-classes must be 3, got 2"),
    ("--classes 7 1000", "--classes must be from 0 to 999, got (7, 1000)"),
    ("--dataset folder --classes 3", "--classes must be from 0 to 2, got (3,)"),
    ("--dataset imagenet --batch-size 2", "--dataset imagenet must be in photos"),
])  # fmt: skip
def test_bad_input(flags, message, tmp_path, call):
    photos(tmp_path, "photos/a/0.png", "photos/b/1.png", "photos/c/2.png")
    code, _, err = call("an_gan", "--data-dir", "photos", "--eval-every", "0", *flags.split())
    assert code == 2 and message in err


@pytest.mark.parametrize("model", ["an", "acgan"])
def test_training_is_the_algorithm(model, call, tiny):
    """Two steps of two updates of D each, restated: hinge loss, labels as in the data."""
    flags = tiny("an_gan", f"--model {model} --total-steps 2 --n-critic 2 --lambda-ortho 0.5")
    assert call("an_gan", *flags)[0] == 0
    args, cpu = an_gan.parse([*flags, "--resume"]), torch.device("cpu")
    images, labels, _ = an_gan.load_images(args, cpu)
    torch.manual_seed(args.seed)
    G, D = Generator(args), Discriminator(args)
    G.class_counts.copy_(labels.bincount())
    data, betas = an_gan.batches(args, images, labels, cpu, 0), (args.beta1, args.beta2)
    opts = {net: torch.optim.Adam(net.parameters(), lr, betas, fused=True)
            for net, lr in ((G, args.g_lr), (D, args.d_lr))}  # fmt: skip
    for step in range(2):
        noise = torch.Generator().manual_seed(an_gan.seed_of(args.seed, 1, step))
        torch.manual_seed(an_gan.seed_of(args.seed, 3, step, 1))
        for net in (D, D, G):
            z = torch.randn(args.batch_size, args.z_dim, generator=noise)
            fake_y = G.labels((args.batch_size,), noise)
            fake = G(z, fake_y)
            if net is D:
                (a, real_class), (b, _) = D(*next(data)), D(fake.detach(), fake_y)
                loss = F.relu(1 - a).mean() + F.relu(1 + b).mean() + real_class
            else:
                logits, fake_class = D(fake, fake_y)
                loss = fake_class - logits.mean()
            opts[net].zero_grad()
            (loss + 0.5 * an_gan.orthogonality(net)).backward(inputs=list(net.parameters()))
            opts[net].step()
    assert_close(state(next(Path("runs").iterdir())), {"G": G.state_dict(), "D": D.state_dict()})
