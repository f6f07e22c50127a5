"""fid.py: parity with pytorch-fid on equal weights, closed forms, files, bad input."""

import hashlib
import json
import os
import weakref

import fid
import numpy as np
import pytest
import pytorch_fid.inception
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_fid.fid_score import compute_statistics_of_path, get_activations
from torchvision.models.inception import Inception3

pytestmark = pytest.mark.filterwarnings("ignore:.*FID is biased")


# ---- 1. Fixtures ---------------------------------------------------------------------------------
def make_images(num, seed, size=32):
    """uint8 (num, 3, size, size): blurred noise of different contrast and colour."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(num, 3, 6, 6, generator=g) * torch.rand(num, 3, 1, 1, generator=g)
    return F.interpolate(noise, (size, size), mode="bicubic").mul(255).clamp(0, 255).byte()


def save_images(images, folder, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}{suffix}")
    return folder


def moments_of(features):
    return fid.Moments(features.shape[1]).update(torch.as_tensor(features))


def exact_distance(a, b):
    """Fréchet distance from the features themselves, by the nuclear norm of their product."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    trace = scipy.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * trace


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def run(call, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(fid.warnings, "formatwarning", fid.warnings.formatwarning)
    return lambda *argv: call("fid", *map(str, argv))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights with batch norms and a bias that do something."""
    with torch.device("meta"):
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    state, g = fid.random_state(network), torch.Generator().manual_seed(1)
    for key, value in state.items():
        if ".bn." in key and value.is_floating_point() or key == "fc.bias":
            value += 0.2 * torch.rand(value.shape, generator=g)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(str(weights))


@pytest.fixture(scope="module")
def reference(weights):
    """pytorch-fid's own network, its download replaced by `weights`."""
    state = torch.load(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state)
        return pytorch_fid.inception.InceptionV3().eval()


@pytest.fixture(scope="module")
def features(net):
    """Eight real images, six others, and the features and logits of both."""
    real, fake = make_images(8, 0), make_images(6, 1)
    return real, fake, net(real), net(fake)


# ---- 2. The network ------------------------------------------------------------------------------
def test_features_are_those_of_pytorch_fid_under_autocast_too(net, weights, features, reference):
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert net.label == "" and net.protocol["weights"] == "inception.pth"
    with torch.no_grad():
        expected = reference(features[0].float() / 255)[0].flatten(1)
    assert relative(features[2][0], expected) < 5e-6
    assert expected.std(0).mean() > 0.05 * expected.mean()  # the images do differ to this network
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = net(features[0][:2])
    assert relative(found, features[2][0][:2]) < 1e-5
    state = torch.load(weights)
    assert relative(logits, found @ state["fc.weight"].T) < 1e-5  # without bias
    assert relative(logits + state["fc.bias"], logits) > 1e-3


def test_grey_and_float_images(net):
    grey = make_images(2, 0)[:, :1]
    assert relative(net(grey)[0], net(grey.expand(-1, 3, -1, -1))[0]) < 1e-5
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = fid.prepare(levels, resize=False)
    below = (levels.float() - 0.4).clamp(min=0) / 255  # to be rounded, not truncated
    assert torch.equal(fid.prepare(below, resize=False), exact)
    assert not torch.equal(fid.prepare((below * 255).byte(), resize=False), exact)
    for wrong in (-1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"uint8, or float in \[0, 1\]"):
            net(torch.full((1, 3, 8, 8), wrong))


def test_other_files_are_not_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path, wrong = tmp_path / "w.pth", torch.load(weights) | {"fc.weight": torch.zeros(1000, 2048)}
    for words, content in (("No such file", b""), ("", [1]), ("", {}), ("Missing", wrong),
                           ("mismatch", b"garbage"), ("", b"")):  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot load .*w.pth: .*{words}"):
            fid.load_inception("~/w.pth")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


def test_weights_of_the_cache_have_the_hash_of_their_name(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "FID_WEIGHTS_URL", "http://127.0.0.1:9/w-6726825d.pth")
    with pytest.raises(ValueError, match="cannot load .*w-6726825d.pth.*--weights"):  # no network
        fid.load_inception()
    path, content = tmp_path / "checkpoints" / "w-6726825d.pth", weights.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        fid.load_inception()
    digest = hashlib.sha256(content).hexdigest()
    path.rename(path.with_name(f"w-{digest[:8]}.pth"))
    monkeypatch.setattr(fid, "FID_WEIGHTS_URL", f"http://127.0.0.1:9/w-{digest[:8]}.pth")
    assert fid.load_inception().protocol["sha256"] == digest


# ---- 3. Statistics -------------------------------------------------------------------------------
def test_moments_are_numpys_in_any_batches():
    x = np.random.default_rng(0).normal(3, 2, (101, 7)).astype(np.float32)
    moments = fid.Moments(7)
    for batch in np.array_split(x, 13):
        moments.update(torch.from_numpy(batch))
    assert moments.n == 101 and np.allclose(moments.mu, x.astype(np.float64).mean(0), rtol=1e-12)
    assert np.allclose(moments.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    assert not np.allclose(moments.sigma, np.cov(x, rowvar=False, bias=True), rtol=1e-3)


def test_distance_of_full_rank():
    rng = np.random.default_rng(0)
    a = moments_of(rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64)))
    b = moments_of(rng.normal(size=(200, 64)))
    root, difference = scipy.linalg.sqrtm(a.sigma @ b.sigma).real, a.mu - b.mu
    expected = difference @ difference + np.trace(a.sigma + b.sigma - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert fid.intra_fid({"k": a}, {"k": lambda: b})["mean"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [(5, 9), (9, 5), (30, 200), (200, 30), (2, 2)])
def test_distance_of_singular_covariances(n):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n[0], 64)), rng.normal(0.3, 2, size=(n[1], 64))
    with pytest.warns(UserWarning, match=f"{min(n)} images, 64 features: FID is biased"):
        found = fid.frechet_distance(moments_of(x), moments_of(y))
    assert found == pytest.approx(exact_distance(x, y), rel=1e-7)
    assert 0 <= fid.frechet_distance(moments_of(x), moments_of(x[::-1].copy())) < 1e-5
    constant = np.ones((5, 64))
    found = fid.frechet_distance(moments_of(constant), moments_of(y))
    assert found == pytest.approx(exact_distance(constant, y), rel=1e-9)
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet_distance(moments_of(constant * np.nan), moments_of(y))


def test_npz_is_read_by_pytorch_fid_and_back(features, tmp_path, monkeypatch):
    moments, path = moments_of(features[2][0]), tmp_path / "ours.npz"
    moments.save(path, protocol={"sha256": "0"}, size=[3, 32, 32])
    mu, sigma = compute_statistics_of_path(str(path), None, 1, 2048, "cpu")
    assert np.array_equal(mu, moments.mu) and np.array_equal(sigma, moments.sigma)
    back = fid.Moments.load(path)
    assert back.n == 8 and back.meta == {"protocol": {"sha256": "0"}, "size": [3, 32, 32]}
    # Bit for bit: a resumed run that finds its cache logs the same FID.
    assert np.array_equal(back.mu, moments.mu) and np.array_equal(back.sigma, moments.sigma)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    other = fid.Moments.load(tmp_path / "theirs.npz")
    assert other.n is None and np.array_equal(other.sigma, sigma)
    with pytest.warns(UserWarning, match="made by another tool"):
        assert fid.frechet_distance(other, back) < 1e-6
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)  # killed while it is written
    with pytest.raises(ZeroDivisionError):
        moments.save(path)
    assert fid.Moments.load(path).meta == back.meta and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("arrays, words", [
    ({"mu": np.zeros(2048)}, "sigma"), ({"mu": np.zeros(64), "sigma": np.eye(64)}, "mu is .64"),
    ({"mu": np.array([{}] * 2048), "sigma": np.eye(2048)}, "allow_pickle"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048), "protocol": "{"}, ""), (None, ""),
])  # fmt: skip
def test_other_files_are_not_moments(arrays, words, tmp_path):
    (tmp_path / "m.npz").write_text("PK")
    if arrays:
        np.savez_compressed(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match=f"m.npz is not an .npz of moments: .*{words}"):
        fid.Moments.load(tmp_path / "m.npz")


def test_inception_score_is_its_formula():
    logits = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(1)
    parts = p[torch.randperm(60, generator=torch.Generator().manual_seed(5))].chunk(3)
    scores = [(q * (q.log() - q.mean(0).log())).sum(1).mean().exp().item() for q in parts]
    mean, std = fid.inception_score(logits, splits=3, seed=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert std == pytest.approx(np.std(scores), rel=1e-9)  # over N
    certain = 1000 * torch.eye(8).repeat(50, 1)  # p is exactly 0 elsewhere: 0 log 0 is 0
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(8, rel=1e-12)
    in_order = 20 * torch.eye(10).repeat_interleave(200, 0)  # splits in this order score 1
    assert fid.inception_score(in_order)[0] > 9.5
    assert np.mean([fid.inception_score(part, 1)[0] for part in in_order.chunk(10)]) < 1.1
    with pytest.raises(ValueError, match="5 images cannot use 10 splits"):
        fid.inception_score(logits[:5])


# ---- 4. Scores -----------------------------------------------------------------------------------
def score(net, images, fakes, batch_size):
    real = fid.dataset_moments(net, images, batch_size)
    generate = lambda first, count: fakes[first : first + count]  # noqa: E731
    return fid.score_generator(net, generate, len(fakes), batch_size, real, splits=2)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_generator_scores_do_not_depend_on_the_batch(net, features, batch_size):
    real, fake, (a, _), (b, logits) = features
    found = score(net, real, fake, batch_size)
    assert found["fid"] == pytest.approx(exact_distance(a, b), rel=1e-4)
    assert found["is_mean"] == pytest.approx(fid.inception_score(logits, 2)[0], rel=1e-5)
    assert (found["n_fake"], found["n_real"]) == (6, 8)


def test_without_an_output_layer_there_is_no_inception_score(weights, features, tmp_path, run):
    state = torch.load(weights) | {"fc.weight": torch.zeros(1008, 2048)}
    torch.save(state, tmp_path / "zero.pth")
    net = fid.load_inception(str(tmp_path / "zero.pth"))
    with pytest.warns(UserWarning, match="no output layer: no Inception Score"):
        found = score(net, features[0][:2], features[1][:2], 8)
    assert found.keys() == {"fid", "n_fake", "n_real"} and found["fid"] > 0
    folder = save_images(features[0][:3], tmp_path / "images")
    code, out, err = run(folder, "--isc", "--splits", 2, "--weights", tmp_path / "zero.pth")
    assert (code, out) == (2, "") and "zero.pth has no output layer" in err


def test_the_cache_is_used_only_if_everything_is_equal(net, tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", make_images(4, 0).numpy())
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    cache, calls = tmp_path / "moments.npz", []
    stub = lambda self, x: calls.append(len(x)) or torch.rand(1, len(x), 2048)  # noqa: E731
    monkeypatch.setattr(fid.Inception, "forward", stub)
    first = fid.dataset_moments(net, images, 3, cache)
    again = fid.dataset_moments(net, images, 3, cache)
    assert calls == [3, 1] and again.n == 4 and np.array_equal(again.sigma, first.sigma)
    fid.dataset_moments(net, images[:3], 3, cache)  # another number of images
    fid.dataset_moments(net, images[:3, :, :16], 3, cache)  # another size
    assert calls == [3, 1, 3, 3]
    monkeypatch.setattr(net, "protocol", net.protocol | {"sha256": "other"})
    other = fid.dataset_moments(net, images[:3, :, :16], 3, cache)
    assert calls == [3, 1, 3, 3, 3]
    with pytest.raises(ValueError, match="different protocols"):
        fid.frechet_distance(first, other)
    cache.write_text("PK")  # damaged: made anew
    assert fid.dataset_moments(net, images, 4, cache).n == fid.Moments.load(cache).n == 4
    with pytest.warns(UserWarning, match="not kept in .*nowhere"):  # the run goes on
        assert fid.dataset_moments(net, images, 4, tmp_path / "nowhere" / "m.npz").n == 4


@pytest.mark.parametrize("dims, small", [(64, 21), (192, 64)])
def test_sifid_is_the_distance_between_positions(dims, small, tmp_path):
    torch.manual_seed(0)
    network = Inception3(init_weights=False, transform_input=False).eval()
    torch.save(network.state_dict(), tmp_path / "imagenet.pth")
    real, *fakes = make_images(3, 0, size=80)
    fakes[1] = fakes[1][:, :70, :76]  # sizes may differ
    layers = [network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3]
    layers += [network.maxpool1, network.Conv2d_3b_1x1, network.Conv2d_4a_3x3] * (dims == 192)

    def positions(image):
        with torch.no_grad():
            return torch.nn.Sequential(*layers)(image[None] / 255 * 2 - 1)[0].flatten(1).T

    expected = [exact_distance(positions(real), positions(fake)) for fake in fakes]
    trunk = fid.load_sifid_trunk(str(tmp_path / "imagenet.pth"), dims=dims)
    found = fid.sifid(trunk, real, fakes, dims)
    assert found["values"] == pytest.approx(expected, rel=1e-3)
    summary = pytest.approx((np.mean(expected), np.std(expected)), rel=1e-3)
    assert (found["mean"], found["std"]) == summary and found["positions"] == len(positions(real))
    assert fid.sifid(trunk, real / 255, [real], dims)["mean"] < 1e-6 * max(expected)
    with pytest.raises(ValueError, match=f"{small}x{small} has too few positions for {dims}"):
        fid.sifid(trunk, real, [real[:, :small, :small]], dims)


# ---- 5. Folders and the command ------------------------------------------------------------------
def test_image_files(tmp_path, recwarn, monkeypatch):
    names = """b/one.PNG b/two.jpeg a/three.jfif four.tga b/deep/five.avif .hidden.png .git/six.png
        __MACOSX/seven.png run/args.json run/samples/eight.png old/checkpoint.pt old/nine.png
        out/ten.png cache/eleven.png b/notes.txt b/array.npy""".split()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "again").symlink_to("../b")  # wanted twice
    (tmp_path / "b" / "deep" / "round").symlink_to("..")  # and not for ever
    skip = [tmp_path / "out", os.path.relpath(tmp_path / "cache"), tmp_path]
    assert [str(path.relative_to(tmp_path)) for path in fid.image_files(tmp_path, skip)] == [
        "a/again/deep/five.avif", "a/again/one.PNG", "a/again/two.jpeg", "a/three.jfif",
        "b/deep/five.avif", "b/one.PNG", "b/two.jpeg", "four.tga",
    ]  # fmt: skip
    assert "4 other files are skipped" in str(recwarn.pop().message)  # two, and again by the link
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(fid.image_files("~/run/samples")) == 1
    with pytest.raises(ValueError, match="no images.*generated"):
        fid.image_files(tmp_path / "run")


def test_files_score_as_in_pytorch_fid(net, weights, reference, features, tmp_path, run):
    whole, mixed = make_images(1, 7, 60)[0], tmp_path / "mixed"
    save_images([whole[:, :20, :50]], mixed / "a")
    save_images([whole[:, :7, :5], make_images(1, 8, 400)[0]], mixed / "b", ".jpg")
    image = Image.fromarray(whole.permute(1, 2, 0).numpy())
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("palette.PNG", "P")):
        image.convert(mode).save(mixed / name)
    plain = save_images(features[0], tmp_path / "plain")
    files = [fid.image_files(folder) for folder in (mixed, plain)]
    theirs = [get_activations(paths, reference, 1, num_workers=0) for paths in files]
    code, out, err = run(mixed, plain, "--weights", weights, "--batch-size", 4, "--json")
    assert code == 0 and json.loads(out)["fid"] == pytest.approx(exact_distance(*theirs), rel=1e-4)
    kept, alive = [], []

    def watch(net, inputs, outputs):
        alive.append(sum(logits() is not None for logits in kept))
        kept.append(weakref.ref(outputs[1]))

    with net.register_forward_hook(watch):
        found = fid.folder_moments(net, files[1], 2)
    assert len(alive) > 3 and max(alive) <= 1  # memory does not grow with the images
    assert fid.frechet_distance(fid.dataset_moments(net, features[0], 3), found) < 1e-6
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)  # 16 bits are scaled
    Image.fromarray(levels * 257).save(mixed / "16.png")
    assert np.array_equal(np.array(fid.open_image(mixed / "16.png"))[:, :, 2], levels)


def test_command_with_everything(features, weights, tmp_path, run):
    for side in (0, 1):  # of the real images six dogs, of the others four
        for name, part in (("cat", slice(2)), ("dog", slice(2, None))):
            save_images(features[side][part], tmp_path / str(side) / name)
    real, fake, stored = tmp_path / "0", tmp_path / "1", tmp_path / "m.npz"
    flags = ["--isc", "--intra", "--splits", 2, "--save", stored, "--weights", weights]
    code, out, err = run(real, fake, *flags)
    found = json.loads(out)
    assert code == 0 and (found["n_real"], found["n_generated"]) == (8, 6), err
    (a, _), (b, logits) = features[2:]
    assert found["fid"] == pytest.approx(exact_distance(a, b), rel=1e-4)
    assert found["isc_mean"] == pytest.approx(fid.inception_score(logits, 2)[0], rel=1e-5)
    classes = found["intra_fid"].pop("per_class")
    values = [classes[name]["fid"] for name in ("cat", "dog")]
    expected = [exact_distance(a[rows], b[rows]) for rows in (slice(2), slice(2, None))]
    assert values == pytest.approx(expected, rel=1e-4)
    assert (classes["dog"]["n_real"], classes["dog"]["n_fake"]) == (6, 4)
    all_classes = {"mean": np.mean(values), "min": min(values), "max": max(values)}
    assert found["intra_fid"] == pytest.approx(all_classes, rel=1e-9)
    assert found["label"] == "" and len(found["protocol"]["sha256"]) == 64
    with pytest.raises(ValueError, match="on one side only: class b"):
        fid.intra_fid({"a": a, "b": b}, {"a": a})
    code, out, _ = run(real, stored, "--weights", weights, "--json")
    assert json.loads(out)["fid"] == pytest.approx(found["fid"], rel=1e-6) and out.count("\n") == 1
    code, out, err = run(fake, "--save", tmp_path / "r.npz", "--weights", "random")
    assert code == 0 and json.loads(out)["label"] == "random features, comparable with nothing"
    code, _, err = run(tmp_path / "r.npz", stored)  # needs no network
    assert code == 2 and "different protocols" in err
    code, out, _ = run("--help")
    assert code == 0 and "also the Inception Score of GENERATED" in out  # comments are the help


def test_command_sifid_and_names_that_are_no_text(tmp_path, run):
    images = make_images(2, 0, 64)
    fakes, real = save_images(images, tmp_path / "fakes"), save_images(images[:1], tmp_path)
    os.rename(fakes / "001.png", os.fsencode(fakes) + b"/\xff.png")
    code, out, err = run(real / "000.png", fakes, "--sifid", "--weights", "random")
    values = list(json.loads(out)["sifid"]["values"].values())
    assert code == 0 and out.isascii() and len(values) == 2 and values[0] < 1e-6 < values[1]


@pytest.mark.parametrize("command, words", [
    ("nowhere fake", "No such file or directory: 'nowhere'"),
    ("empty fake", "no images (.png .jpg"), ("real notes.txt", "Not a directory: 'notes.txt'"),
    ("real", "GENERATED is missing"), ("real --intra --isc", "GENERATED is missing"),
    ("real fake --isc", "fake: at least 10 images are needed, got 3"),
    ("real one", "one: at least 2 images are needed, got 1"),
    ("classes classes --intra", "classes/a: at least 2 images are needed, got 1"),
    ("classes others --intra", "on one side only: class a"),
    ("real fake --save out.npy", "--save must name a new .npz file"),
    ("real fake --save stats.npz", "--save must name a new .npz file"),
    ("real stats.npz --isc", "need folders of images"), ("real fake --intre", "--intre"),
    ("real broken.npz", "not an .npz of moments"), ("notes.txt fake --sifid", "cannot be read"),
    ("real fake --device teapot --weights random", "teapot"),
    ("real fake --device cuda --weights random", "not compiled with CUDA"),
    ("cut fake --weights random", "error: cut/001.png cannot be read"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(command, words, tmp_path, run, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount", raising=False)  # PyTorch without CUDA
    for name in ("real", "fake", "cut", "one", "classes/a", "classes/b", "others/b"):
        save_images(make_images(1 if name in ("one", "classes/a") else 3, 0), tmp_path / name)
    os.truncate("cut/001.png", 60)
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "broken.npz"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("--weights", "nowhere.pth", *command.split())  # refused before these
    assert (code, out) == (2, "") and words in err and sorted(tmp_path.rglob("*")) == before
    assert "--intre" in command or err.startswith("error: ") and err.count("\n") == 1
