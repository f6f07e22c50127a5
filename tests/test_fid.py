"""fid.py: parity with pytorch-fid on equal weights, closed forms, files, processes, bad input."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import fid
import numpy as np
import pytest
import pytorch_fid.inception
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytorch_fid.fid_score import calculate_activation_statistics, compute_statistics_of_path

ROOT = Path(fid.__file__).parent


# --------------------------------------------------------------------------------------------------
# 1. Fixtures
# --------------------------------------------------------------------------------------------------
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
    moments = fid.Moments(features.shape[1])
    moments.update(torch.as_tensor(features))
    return moments


def gaussian(mu, sigma, n=10_000):
    """Moments with exactly this mean and covariance."""
    moments = fid.Moments(0)
    moments.n, moments.dims = n, len(mu)
    moments._stats = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    return moments


def exact_distance(a, b):
    """Fréchet distance from the features themselves, by the nuclear norm of their product."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    trace = scipy.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * trace


def cli(monkeypatch, capsys, *argv):
    """Run the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, argv)])
    try:
        fid.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def state():
    """Random weights with batch norms that do something."""
    with torch.device("meta"):
        network = fid.Inception()
    state = fid._random_state(network)
    g = torch.Generator().manual_seed(1)
    for key, value in state.items():
        if ".bn." in key and value.is_floating_point():
            value += 0.2 * torch.rand(value.shape, generator=g)
    state["fc.bias"] += torch.randn(1008, generator=g)
    return state


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(str(weights))


@pytest.fixture(scope="module")
def reference(state):
    """pytorch-fid's own network, its download replaced by `state`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state)
        return pytorch_fid.inception.InceptionV3().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of images, and the images."""
    root, real, fake = tmp_path_factory.mktemp("images"), make_images(14, 0), make_images(12, 1)
    return save_images(real, root / "real"), save_images(fake, root / "fake"), real, fake


@pytest.fixture(scope="module")
def features(net, folders):
    """Features and logits of the images of `folders`."""
    return [net(images) for images in folders[2:]]


def args(**changes):
    return fid.Args(real=Path(), num_workers=0, **changes)


# --------------------------------------------------------------------------------------------------
# 2. The network
# --------------------------------------------------------------------------------------------------
def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_features_are_those_of_pytorch_fid(features, folders, reference):
    with torch.no_grad():
        expected = reference(folders[2].float() / 255)[0].flatten(1)
    assert features[0][0].dtype == torch.float32
    assert relative(features[0][0], expected) < 1e-4
    assert expected.std(0).mean() > 0.01 * expected.mean()  # the images do differ to this network


@pytest.mark.parametrize("block, right, wrong", [
    ("Mixed_5b", "average", torch.nn.AvgPool2d(3, 1, 1)),  # torchvision's, counting the padding
    ("Mixed_7c", "maximum", torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
])  # fmt: skip
def test_parity_sees_a_wrong_pool(net, features, folders, monkeypatch, block, right, wrong):
    assert right in fid.MIXED[block]
    monkeypatch.setitem(fid.POOLS, right, wrong)
    assert relative(net(folders[2][:4])[0], features[0][0][:4]) > 1e-3


def test_logits_have_no_bias(features, state):
    found_features, logits = features[0]
    assert logits.shape == (14, 1008)
    assert relative(logits, found_features @ state["fc.weight"].T) < 1e-5
    assert relative(logits + state["fc.bias"], logits) > 1e-3


def test_network_is_ready_to_measure(net):
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert net.label == "" and len(net.protocol["sha256"]) == 64


def test_random_network_is_labelled_and_sees_images():
    net = fid.load_inception("random")
    assert net.label == "random features, comparable with nothing"
    features, logits = net(make_images(6, 3))
    assert 0.01 < features.mean() < 100 and torch.isfinite(logits).all()
    assert features.std(0).mean() > 0.05 * features.mean()
    assert torch.equal(features, fid.load_inception("random")(make_images(6, 3))[0])


def test_float64_is_float64(weights, features, folders):
    double = fid.load_inception(str(weights), dtype="float64")
    found = double(folders[2][:2])[0]
    assert found.dtype == torch.float64
    assert 0 < relative(features[0][0][:2].double(), found) < 1e-4


def test_grey_images_are_repeated(net):
    grey = make_images(2, 0)[:, :1]
    repeated = net(grey.expand(-1, 3, -1, -1))[0]
    assert (net(grey)[0] - repeated).norm() < 1e-4 * repeated.norm()


def test_floats_are_rounded_to_uint8():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(fid.to_uint8(images.float() / 255), images)
    below = (images.float() - 0.4).clamp(min=0) / 255
    assert torch.equal(fid.to_uint8(below), images)
    assert not torch.equal((below * 255).byte(), images)  # truncation is what the test would see


@pytest.mark.parametrize("images, words", [
    (torch.full((1, 3, 8, 8), -1.0), "min -1, max -1"),
    (torch.full((1, 3, 8, 8), 2.0), "min 2, max 2"),
    (torch.full((1, 3, 8, 8), float("nan")), "min nan"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
    (torch.zeros(3, 8, 8), "(3, 8, 8)"),
    (torch.zeros(1, 4, 8, 8), "(1, 4, 8, 8)"),
])  # fmt: skip
def test_wrong_images_are_refused(net, images, words):
    with pytest.raises(ValueError) as error:
        net(images)
    assert words in str(error.value)


def test_autocast_does_not_reach_the_network(net, features, folders):
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(net(folders[2][:4])[0], features[0][0][:4]) < 1e-5


def test_precision_settings_are_restored():
    holder = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(torch.backends.cudnn, "conv") else "allow_tf32"
    before, fast = getattr(holder, name), "tf32" if name == "fp32_precision" else True
    setattr(holder, name, fast)
    try:
        with pytest.raises(KeyError), fid.full_precision(torch.device("cpu")):
            assert getattr(holder, name) in ("ieee", False)
            raise KeyError
        assert getattr(holder, name) == fast
    finally:
        setattr(holder, name, before)


# --------------------------------------------------------------------------------------------------
# 3. Weights
# --------------------------------------------------------------------------------------------------
def refused_weights(state, path):
    torch.save(state, path)
    with pytest.raises(fid.UserError) as error:
        fid.load_inception(str(path))
    return str(error.value)


def test_foreign_state_dicts_are_named(state, tmp_path):
    short = {k: v for k, v in state.items() if k != "Mixed_5b.branch1x1.conv.weight"}
    message = refused_weights(short | {"extra.weight": torch.zeros(3)}, tmp_path / "a.pth")
    assert "missing 1: Mixed_5b.branch1x1.conv.weight" in message
    assert "unexpected 1: extra.weight" in message
    message = refused_weights(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "b.pth")
    assert "fc.weight is (1000, 2048) in place of (1008, 2048)" in message
    assert "state dict" in refused_weights([1, 2], tmp_path / "c.pth")


def test_files_from_before_batch_norm_counted(state, features, folders, tmp_path):
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    assert len(old) < len(state)
    torch.save(old, tmp_path / "old.pth")
    found = fid.load_inception(str(tmp_path / "old.pth"))(folders[2][:2])[0]
    assert relative(found, features[0][0][:2]) < 1e-5


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"PK\x03\x04" + bytes(99), b"\x80\x02."])
def test_garbage_is_not_weights(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(fid.UserError, match="not a weight file|not a state dict"):
        fid.load_inception(str(tmp_path / "w.pth"))


def test_truncated_weights(weights, tmp_path):
    (tmp_path / "w.pth").write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(fid.UserError, match="not a weight file"):
        fid.load_inception(str(tmp_path / "w.pth"))
    with pytest.raises(fid.UserError, match="No such file"):
        fid.load_inception(str(tmp_path / "none.pth"))


def test_without_network_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "FID_WEIGHTS_URL", "http://127.0.0.1:9/pt_inception-6726825d.pth")
    with pytest.raises(fid.UserError) as error:
        fid.load_inception()
    target = tmp_path / "checkpoints" / "pt_inception-6726825d.pth"
    words = (fid.FID_WEIGHTS_URL, target, "6726825d", "--weights PATH", "--fid-weights PATH")
    for word in (*words, "--fid-weights random", "--eval-every 0"):
        assert str(word) in str(error.value)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_cached_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / fid.FID_WEIGHTS_URL.rsplit("/", 1)[1]
    path.parent.mkdir()
    path.write_bytes(b"half a download")
    with pytest.raises(fid.UserError, match="damaged.*expected 6726825d.*Delete it"):
        fid.load_inception()


# --------------------------------------------------------------------------------------------------
# 4. Moments and Fréchet distance
# --------------------------------------------------------------------------------------------------
def test_moments_are_numpys_in_any_batches():
    x = np.random.default_rng(0).normal(3, 2, (101, 7)).astype(np.float32)
    whole, parts = moments_of(x), fid.Moments(7)
    left, right = moments_of(x[:40]), moments_of(x[40:])
    for batch in np.array_split(x, 13):
        parts.update(torch.from_numpy(batch))
    left.merge(right)
    for moments in (whole, parts, left):
        assert moments.n == 101
        assert np.allclose(moments.mu, x.astype(np.float64).mean(0), rtol=1e-12)
        assert np.allclose(moments.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    biased = np.cov(x.astype(np.float64), rowvar=False, bias=True)
    assert not np.allclose(whole.sigma, biased, rtol=1e-4)


def test_moments_do_not_grow():
    def tensors(moments):
        return sum(t.numel() for t in vars(moments).values() if isinstance(t, torch.Tensor))

    moments = fid.Moments(16)
    before = tensors(moments)
    for _ in range(50):
        moments.update(torch.rand(100, 16))
    assert moments.n == 5000 and tensors(moments) == before == 16 * 17


def test_distance_of_shifted_equal_covariances():
    a = np.random.default_rng(0).normal(size=(40, 20))
    sigma = a.T @ a
    mu, shift = np.arange(20.0), np.linspace(-1, 2, 20)
    found = fid.frechet_distance(gaussian(mu, sigma), gaussian(mu + shift, sigma))
    assert found == pytest.approx(shift @ shift, rel=1e-9)


def test_distance_of_diagonal_covariances():
    x, y = np.linspace(0.1, 4, 30), np.linspace(3, 0.5, 30)
    found = fid.frechet_distance(gaussian(x, np.diag(x)), gaussian(y, np.diag(y)))
    expected = ((x - y) ** 2).sum() + ((np.sqrt(x) - np.sqrt(y)) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-12)
    assert abs(expected - ((x - y) ** 2).sum() - ((x - y) ** 2).sum()) > 0.1  # without the roots


def test_distance_of_full_rank_is_that_of_sqrtm():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64)), rng.normal(size=(200, 64))
    a, b = moments_of(x), moments_of(y)
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    difference = a.mu - b.mu
    expected = difference @ difference + np.trace(a.sigma + b.sigma - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [(5, 9), (9, 5), (30, 200), (200, 30), (2, 2)])
def test_distance_of_singular_covariances(n):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n[0], 64)), rng.normal(0.3, 2, size=(n[1], 64))
    found = fid.frechet_distance(moments_of(x), moments_of(y))
    assert found == pytest.approx(exact_distance(x, y), rel=1e-7)


def test_distance_from_constant_features():
    still, x = np.ones((5, 8)), np.random.default_rng(0).normal(size=(9, 8))
    assert fid.frechet_distance(moments_of(still), moments_of(still)) == 0
    found = fid.frechet_distance(moments_of(still), moments_of(x))
    assert found == pytest.approx(exact_distance(still, x), rel=1e-9)


def test_distance_of_a_set_from_itself(features):
    for found, _ in features:
        moments = moments_of(found)
        assert 0 <= fid.frechet_distance(moments, moments_of(found.flip(0))) < 1e-3


def test_distance_refuses_what_is_no_number():
    with pytest.raises(fid.UserError, match="not finite"):
        fid.frechet_distance(moments_of(np.full((3, 4), np.nan)), moments_of(np.ones((3, 4))))
    with pytest.raises(fid.UserError, match="at least 2 images, got 1"):
        fid.frechet_distance(moments_of(np.ones((1, 4))), moments_of(np.ones((3, 4))))
    with pytest.raises(ValueError, match="4 and of 5"):
        fid.frechet_distance(moments_of(np.ones((3, 4))), moments_of(np.ones((3, 5))))


# --------------------------------------------------------------------------------------------------
# 5. Files of moments, atomic writing
# --------------------------------------------------------------------------------------------------
def test_npz_is_read_by_pytorch_fid_and_back(features, tmp_path, capsys):
    moments = moments_of(features[0][0])
    moments.save(tmp_path / "ours.npz", protocol={"sha256": "0"}, size=[3, 32, 32])
    mu, sigma = compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 1, 2048, "cpu")
    assert np.array_equal(mu, moments.mu) and np.array_equal(sigma, moments.sigma)
    back = fid.Moments.load(tmp_path / "ours.npz")
    assert back.n == 14 and back.meta == {"protocol": {"sha256": "0"}, "size": [3, 32, 32]}
    # Bit for bit: a resumed run that finds its cache logs the same FID.
    assert np.array_equal(back.mu, moments.mu) and np.array_equal(back.sigma, moments.sigma)
    assert capsys.readouterr().err == ""
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = fid.Moments.load(tmp_path / "theirs.npz")
    assert theirs.n is None and np.array_equal(theirs.sigma, sigma)
    assert "statistics without protocol metadata; made by another tool?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown number"):
        theirs.update(features[0][0])
    theirs.save(tmp_path / "copy.npz")
    assert fid.Moments.load(tmp_path / "copy.npz").n is None


def test_loaded_moments_go_on(tmp_path):
    x = torch.rand(30, 6)
    moments_of(x[:20]).save(tmp_path / "m.npz", protocol={})
    moments = fid.Moments.load(tmp_path / "m.npz", dims=6)
    moments.update(x[20:])
    assert moments.n == 30 and np.allclose(moments.sigma, moments_of(x).sigma, rtol=1e-9)


@pytest.mark.parametrize("arrays, words", [
    ({"mu": np.zeros(2048)}, "no array 'sigma"),
    ({"mu": np.zeros(64), "sigma": np.eye(64)}, "got (64,) and (64, 64)"),
    ({"mu": np.zeros((1, 2048)), "sigma": np.eye(2048)}, "got (1, 2048)"),
    ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
    ({"mu": np.zeros(2048, int), "sigma": np.eye(2048)}, "must be floats"),
    ({"mu": np.array([{}] * 2048), "sigma": np.eye(2048)}, "allow_pickle"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048), "n": np.zeros(3)}, "not an .npz of moments"),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048), "protocol": "{"}, "not an .npz of moments"),
])  # fmt: skip
def test_wrong_npz_is_refused(arrays, words, tmp_path):
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    with pytest.raises(fid.UserError) as error:
        fid.Moments.load(tmp_path / "m.npz")
    assert words in str(error.value) and "m.npz" in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 3000, -30])
def test_broken_npz_is_refused(keep, tmp_path):
    np.savez(tmp_path / "m.npz", mu=np.zeros(2048), sigma=np.zeros(9))
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:keep])
    with pytest.raises(fid.UserError, match="m.npz is not an .npz of moments"):
        fid.Moments.load(tmp_path / "m.npz")
    with pytest.raises(fid.UserError, match="is not an .npz"):
        fid.Moments.load(tmp_path / "missing.npz")


def test_atomic_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "file.txt"
    with fid.atomic(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.parent == tmp_path
        assert temporary.name.startswith(".") and temporary.suffix == ".tmp"
    with pytest.raises(KeyError), fid.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    with pytest.raises(fid.UserError, match="cannot write .*No such file"), fid.atomic(path):
        pass  # nothing written
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_without_space(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(fid.UserError, match="cannot write .*file: No space left on device"):
        with fid.atomic(tmp_path / "file") as temporary:
            temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("save", [
    lambda path: fid.Moments.save(moments_of(torch.rand(9, 64)), path),
    # torch.save hides the reason in the context of a RuntimeError.
    lambda path: save_torch(path),
])  # fmt: skip
def test_atomic_beyond_the_file_size_limit(save, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(fid.UserError, match="cannot write .*m.npz: File too large"):
            save(tmp_path / "m.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def save_torch(path):
    with fid.atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save({"x": torch.zeros(100_000)}, file)


def test_atomic_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(fid.UserError, match="cannot write .*x: Not a directory"):
        with fid.atomic(tmp_path / "file" / "x") as temporary:
            temporary.write_text("new")


def test_atomic_passes_other_errors_on(tmp_path):
    with pytest.raises(RuntimeError, match="unrelated"), fid.atomic(tmp_path / "file"):
        raise RuntimeError("unrelated")


# --------------------------------------------------------------------------------------------------
# 6. Inception Score
# --------------------------------------------------------------------------------------------------
def score(logits, splits=10, order=None, **kwargs):
    found = fid.InceptionScore(len(logits), splits, classes=logits.shape[1], **kwargs)
    order = torch.arange(len(logits)) if order is None else order
    for indices in order.split(7):
        found.update(logits[indices], indices)
    return found.result()


def test_score_of_equal_predictions_is_one():
    mean, std = score(torch.randn(1, 20).expand(100, 20))
    assert mean == pytest.approx(1, abs=1e-12) and std == pytest.approx(0, abs=1e-12)


def test_score_of_certain_balanced_predictions_is_their_number():
    logits = 1000 * torch.eye(8).repeat(50, 1)  # p is exactly 0 elsewhere: 0 log 0 must be 0
    assert score(logits, splits=1)[0] == pytest.approx(8, rel=1e-12)


def test_score_is_the_formula_with_deviation_over_n():
    logits = torch.randn(60, 12)
    p = logits.double().softmax(1)
    split_of = torch.randperm(60, generator=torch.Generator().manual_seed(5)) * 3 // 60
    scores = [
        (q * (q.log() - q.mean(0).log())).sum(1).mean().exp().item()
        for q in (p[split_of == k] for k in range(3))
    ]
    mean, std = score(logits, splits=3, seed=5)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert std == pytest.approx(np.std(scores), rel=1e-9)


def test_score_does_not_mind_sorted_classes():
    sorted_logits = 20 * torch.eye(10).repeat_interleave(200, 0)
    mean = score(sorted_logits)[0]
    assert mean > 9.5
    shuffled = sorted_logits[torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    assert score(shuffled)[0] == pytest.approx(mean, rel=0.02)
    # Splits in order of arrival, without the permutation, hold one class each.
    in_order = [score(part, splits=1)[0] for part in sorted_logits.chunk(10)]
    assert np.mean(in_order) < 1.1
    # What counts is the index, not the order of arrival (or the process).
    assert score(sorted_logits, order=torch.arange(2000).flip(0))[0] == pytest.approx(mean)


def test_score_refuses_too_few_and_missing_images():
    with pytest.raises(fid.UserError, match="5 images cannot use 10 splits.*--fid-num.*--splits"):
        fid.InceptionScore(5)
    found = fid.InceptionScore(20, 2, classes=4)
    found.update(torch.zeros(19, 4), torch.arange(19))
    with pytest.raises(ValueError, match="19 of 20"):
        found.result()


# --------------------------------------------------------------------------------------------------
# 7. Scores of data sets and generators
# --------------------------------------------------------------------------------------------------
def fid_in_batches(net, images, fakes, batch_size, **kwargs):
    real = fid.dataset_moments(net, images, batch_size)
    generate = lambda first, count: fakes[first : first + count]  # noqa: E731
    return fid.score_generator(net, generate, len(fakes), batch_size, real, splits=2, **kwargs)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_generator_scores_do_not_depend_on_the_batch(net, features, folders, batch_size):
    found = fid_in_batches(net, folders[2][:9], folders[3][:8], batch_size)
    expected = exact_distance(features[0][0][:9], features[1][0][:8])
    assert found["fid"] == pytest.approx(expected, rel=1e-4)
    assert found["is_mean"] == pytest.approx(score(features[1][1][:8], splits=2)[0], rel=1e-5)
    assert (found["n_fake"], found["n_real"]) == (8, 9)


def test_few_images_warn_once(net, folders, capsys):
    fid.warn.cache_clear()
    for _ in range(2):
        fid_in_batches(net, folders[2][:3], folders[3][:2], 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3", "2"]
    assert all("covariance is singular, FID is biased upwards" in line for line in lines)


def test_memory_maps_and_the_cache(net, folders, tmp_path, monkeypatch, recwarn):
    images = folders[2].numpy()
    np.save(tmp_path / "images.npy", images)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    cache = tmp_path / "moments.npz"
    first = fid.dataset_moments(net, images, 5, cache)
    assert np.array_equal(first.mu, fid.dataset_moments(net, folders[2], 5).mu)
    calls = []
    monkeypatch.setattr(fid.Inception, "forward", lambda self, x: calls.append(len(x)) or stub(x))
    again = fid.dataset_moments(net, images, 5, cache)
    assert calls == [] and again.n == 14 and np.array_equal(again.sigma, first.sigma)
    fid.dataset_moments(net, images[:9], 5, cache)  # another number of images
    assert calls == [5, 4]
    monkeypatch.setattr(net, "protocol", net.protocol | {"sha256": "other"})
    fid.dataset_moments(net, images[:9], 5, cache)
    assert calls == [5, 4, 5, 4]
    assert not recwarn.list


def stub(images):
    return torch.rand(len(images), 2048), torch.rand(len(images), 1008)


def test_moments_of_another_protocol_are_refused(net, folders, monkeypatch):
    real = fid.dataset_moments(net, folders[2][:3], 3)
    monkeypatch.setattr(net, "protocol", net.protocol | {"dtype": "float64"})
    with pytest.raises(fid.UserError, match="dtype is float32 and float64"):
        fid.score_generator(net, lambda first, count: folders[3][:count], 4, 2, real, splits=1)


def test_data_sets_of_one_image_and_short_batches_are_refused(net, folders):
    with pytest.raises(fid.UserError, match="at least 2 images, got 1"):
        fid.dataset_moments(net, folders[2][:1], 3)
    real = fid.dataset_moments(net, folders[2][:3], 3)
    with pytest.raises(ValueError, match="returned 1 images in place of 2"):
        fid.score_generator(net, lambda first, count: folders[3][:1], 4, 2, real, splits=1)


PROCESS = """
    import json, sys, torch, torch.distributed as dist, fid
    from pathlib import Path
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank,
                                world_size=world)
    net = fid.load_inception("random")
    real, fake = torch.load(folder / "images.pt", weights_only=True)
    cache = folder / f"cache{world}.npz"
    moments = fid.dataset_moments(net, real, 3, cache)
    assert fid.dataset_moments(net, real, 3, cache).sigma.tobytes() == moments.sigma.tobytes()
    scores = fid.score_generator(net, lambda a, n: fake[a:a + n], len(fake), 3, moments, splits=2)
    try:
        fid.on_main(lambda: (folder / "gone").is_dir() or fid.image_files(folder / "gone"))
    except fid.UserError as error:
        scores["error"] = str(error)
    (folder / f"scores{world}-{rank}.json").write_text(json.dumps(scores))
    if world > 1:
        dist.destroy_process_group()
"""


def test_two_processes_give_the_scores_of_one(tmp_path):
    torch.save((make_images(8, 0), make_images(7, 1)), tmp_path / "images.pt")
    (tmp_path / "process.py").write_text(textwrap.dedent(PROCESS))
    running = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        command = [sys.executable, tmp_path / "process.py", str(rank), str(world), tmp_path]
        env = os.environ | {"PYTHONPATH": str(ROOT), "RANK": str(rank)}
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    first, second, alone = (
        json.loads((tmp_path / f"scores{name}.json").read_text()) for name in ("2-0", "2-1", "1-0")
    )
    assert first == second and "gone does not exist" in first["error"]
    for key in ("fid", "is_mean", "is_std", "n_fake", "n_real"):
        assert first[key] == pytest.approx(alone[key], rel=1e-6)
    assert "WARNING" in errors[0] and "WARNING" not in errors[1]  # process 0 speaks


def test_intra_fid_is_the_mean_of_its_classes():
    rng = np.random.default_rng(0)
    data = {name: (rng.normal(size=(40, 6)), rng.normal(i, 1, (20 + i, 6)))
            for i, name in enumerate("abc")}  # fmt: skip
    real, fake = ({k: moments_of(v[side]) for k, v in data.items()} for side in (0, 1))
    found = fid.intra_fid(real, fake)
    values = [exact_distance(*pair) for pair in data.values()]
    assert found["mean"] == pytest.approx(np.mean(values), rel=1e-9)
    assert found["min"] == pytest.approx(min(values), rel=1e-9)
    assert found["max"] == pytest.approx(max(values), rel=1e-9)
    entry = found["per_class"]["c"]
    assert (entry["n_real"], entry["n_fake"]) == (40, 22)
    with pytest.raises(fid.UserError, match="no generated images of class b"):
        fid.intra_fid(real, {"a": fake["a"], "c": fake["c"]})
    with pytest.raises(fid.UserError, match="no real images of class a, b"):
        fid.intra_fid({"c": real["c"]}, fake)


def test_progress_speaks_late_and_in_whole_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fid.time, "monotonic", lambda: now[0])
    with fid.Progress(100, "decoding") as progress:
        for second in range(1, 21):
            now[0] = float(second)
            progress.update(5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "decoding: 15/100 (15 %), 5 images/s, 0:00:17 left"
    assert len(lines) == 5 and lines[-1].endswith("0:00:20 in all")
    with fid.Progress(1, "short") as progress:
        progress.update(1)
    monkeypatch.setenv("RANK", "1")
    with fid.Progress(2, "other process") as progress:
        now[0] += 60
        progress.update(1)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------
# 8. SIFID
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """torchvision's own network with random weights, and their file."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(
        weights=None, init_weights=False, transform_input=False
    ).eval()
    path = tmp_path_factory.mktemp("imagenet") / "inception_v3.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("dims", [64, 192])
def test_sifid_is_the_distance_between_positions(imagenet, dims):
    network, path = imagenet
    real, *fakes = make_images(4, 0, size=80)
    fakes[1] = fakes[1][:, :70, :76]  # sizes may differ
    trunk = fid.load_sifid_trunk(str(path), dims=dims)
    found = fid.sifid(trunk, real, fakes, dims)
    layers = [network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3]
    layers += [network.maxpool1, network.Conv2d_3b_1x1, network.Conv2d_4a_3x3] * (dims == 192)

    def positions(image):
        with torch.no_grad():
            maps = torch.nn.Sequential(*layers)(image[None].float() / 255 * 2 - 1)[0]
        return maps.flatten(1).T

    expected = [exact_distance(positions(real), positions(fake)) for fake in fakes]
    assert found["values"] == pytest.approx(expected, rel=1e-3)
    assert found["mean"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert found["std"] == pytest.approx(np.std(expected), rel=1e-2)
    assert found["positions"] == len(positions(real))
    assert fid.sifid(trunk, real, [real], dims)["mean"] < 1e-6 * max(expected)


def test_sifid_of_floats_and_of_small_images():
    trunk = fid.load_sifid_trunk("random")
    assert trunk.label == fid.RANDOM_LABEL
    real, fake = make_images(2, 0, size=64)
    values = fid.sifid(trunk, real, [fake])["values"]
    assert fid.sifid(trunk, real / 255, [fake / 255])["values"] == pytest.approx(values)
    with pytest.raises(fid.UserError, match="21x21 has too few positions for 64"):
        fid.sifid(trunk, real, [fake[:, :21, :21]])  # 8 x 8 = 64
    fid.sifid(trunk, real, [fake[:, :21, :23]])  # 8 x 9
    with pytest.raises(
        fid.UserError, match="64x64 has too few positions for 192 .*--sifid-dims 64"
    ):
        fid.sifid(trunk, fake, [real], 192)
    large = make_images(1, 0, size=76)[0]
    assert fid.sifid(trunk, large[:, :70, :75], [large], 192)["positions"] == 13 * 15


# --------------------------------------------------------------------------------------------------
# 9. Folders and the command
# --------------------------------------------------------------------------------------------------
def test_folders_score_as_in_pytorch_fid(net, reference, folders):
    files = [sorted(folder.iterdir()) for folder in folders[:2]]
    mu, sigma = zip(*(calculate_activation_statistics(f, reference, num_workers=0) for f in files))
    expected = fid.frechet_distance(gaussian(mu[0], sigma[0]), gaussian(mu[1], sigma[1]))
    ours = [fid.folder_moments(net, fid.image_files(f), args(), "test") for f in folders[:2]]
    assert fid.frechet_distance(*ours) == pytest.approx(expected, rel=1e-3)
    assert expected > 1


def test_tensors_score_as_their_files(net, folders):
    stored = fid.folder_moments(net, fid.image_files(folders[0]), args(batch_size=5), "test")
    for images in (folders[2], folders[2].float() / 255):
        assert fid.frechet_distance(fid.dataset_moments(net, images, 5), stored) < 1e-3
    assert stored.n == 14


def test_mixed_sizes_and_modes(net, tmp_path):
    sizes = [(32, 32), (20, 50), (299, 299), (7, 5)]
    images = [make_images(1, i, 300)[0, :, :h, :w] for i, (h, w) in enumerate(sizes)]
    for i, image in enumerate(images):
        save_images([image], tmp_path / f"deep/{i}", ".PNG")
    Image.fromarray(images[0][0].numpy()).save(tmp_path / "grey.png")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).quantize(8).save(tmp_path / "palette.png")
    (tmp_path / "notes.txt").write_text("not an image")
    files = fid.image_files(tmp_path)
    assert len(files) == 7 and files == sorted(files)
    moments = fid.folder_moments(net, files, args(batch_size=3), "test")
    assert moments.n == 7
    alone = torch.cat([net(image[None])[0] for image in images])
    assert np.allclose(
        fid.folder_moments(net, files[:4], args(batch_size=4), "test").mu,
        alone.double().mean(0), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_image_modes_become_8_bit_rgb(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, array in (("8.png", ramp), ("16.png", ramp.astype(np.uint16) * 257)):
        Image.fromarray(array).save(tmp_path / name)
        found = fid.read_image(tmp_path / name)
        assert found.dtype == torch.uint8
        assert torch.equal(found, torch.from_numpy(ramp).expand(3, 16, 16))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        fid.read_image(tmp_path / "float.tiff")


def test_corrupt_files_are_all_listed(net, folders, tmp_path):
    save_images(folders[2][:3], tmp_path)
    for name in ("000.png", "002.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(fid.UserError) as error:
        fid.folder_moments(net, fid.image_files(tmp_path), args(batch_size=1), "test")
    lines = str(error.value).splitlines()
    assert lines[0] == "3 images cannot be read:"
    assert [Path(line.split(":")[0].strip()).name for line in lines[1:]] == [
        "000.png", "002.png", "text.jpg",
    ]  # fmt: skip


def test_command_with_everything(folders, weights, tmp_path, monkeypatch, capsys):
    for side in (0, 1):
        for name, part in (("cat", slice(0, 5)), ("dog", slice(5, 12))):
            save_images(folders[2 + side][part], tmp_path / str(side) / name)
    flags = ["--weights", weights, "--num-workers", 0, "--json", "--device", "cpu"]
    paths = [tmp_path / "0", tmp_path / "1"]
    run = lambda *argv: cli(monkeypatch, capsys, *argv, *flags)  # noqa: E731
    code, out, err = run(*paths, "--isc", "--intra", "--splits", 2, "--save", tmp_path / "m.npz")
    assert code == 0, err
    both = json.loads(out)
    assert both["n_real"] == both["n_generated"] == 12 and both["label"] == ""
    assert len(both["protocol"]["sha256"]) == 64 and both["protocol"]["dtype"] == "float32"
    assert both["protocol"]["sha256"] in err
    classes = both["intra_fid"]
    assert classes["cat"]["n_real"] == 5 and classes["dog"]["n_fake"] == 7
    values = [classes[name]["fid"] for name in ("cat", "dog")]
    assert both["intra_fid_mean"] == pytest.approx(np.mean(values))
    assert (both["intra_fid_min"], both["intra_fid_max"]) == (min(values), max(values))
    # The same without classes, and from the stored moments.
    code, out, _ = run(*paths, "--isc", "--splits", 2)
    plain = json.loads(out)
    for key in ("fid", "isc_mean", "isc_std"):
        assert plain[key] == pytest.approx(both[key], rel=1e-4)
    code, out, _ = run(tmp_path / "0", tmp_path / "m.npz")
    assert json.loads(out)["fid"] == pytest.approx(both["fid"], rel=1e-6)


def test_command_prints_text_with_the_random_label(folders, tmp_path, monkeypatch, capsys):
    flags = ["--weights", "random", "--num-workers", 0, "--isc", "--splits", 2]
    save_images(folders[3][:3], tmp_path / "jpg", ".jpg")
    code, out, err = cli(monkeypatch, capsys, folders[0], tmp_path / "jpg", *flags)
    assert code == 0
    for line, word in zip(out.splitlines(), ("fid: ", "isc_mean: ", "isc_std: ")):
        assert line.startswith(word) and line.endswith(f"({fid.RANDOM_LABEL})")
    assert "n_real: 14\nn_generated: 3\n" in out and "float32" in out and "sha256" in out
    assert err.count(".jpg") == 1
    # One path alone: its moments.
    target = tmp_path / "real.npz"
    assert cli(monkeypatch, capsys, folders[0], "--save", target, *flags)[0] == 0
    assert fid.Moments.load(target).n == 14
    # Two files of moments need no network.
    monkeypatch.setattr(fid, "load_inception", None)
    code, out, _ = cli(monkeypatch, capsys, target, target, "--json")
    assert code == 0 and json.loads(out)["fid"] < 1e-3


def test_command_sifid(tmp_path, monkeypatch, capsys):
    save_images(make_images(3, 0, 64), tmp_path / "fakes")
    save_images(make_images(1, 5, 64), tmp_path)
    flags = ["--sifid", "--weights", "random", "--json"]
    code, out, _ = cli(monkeypatch, capsys, tmp_path / "000.png", tmp_path / "fakes", *flags)
    found = json.loads(out)
    assert code == 0 and len(found["sifid"]) == 3 and found["n_generated"] == 3
    assert found["sifid_mean"] == pytest.approx(np.mean(list(found["sifid"].values())))
    one = cli(monkeypatch, capsys, tmp_path / "000.png", tmp_path / "000.png", *flags)[1]
    assert json.loads(one)["sifid_mean"] < 1e-6


BAD = [
    ("nowhere fake", "nowhere does not exist"),
    ("real nowhere", "nowhere does not exist"),
    ("empty fake", "no images (.png .jpg"),
    ("real notes.txt", "is a file: a folder of images or an .npz"),
    ("real", "GENERATED is missing"),
    ("real --intra --isc", "GENERATED is missing"),
    ("real fake --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("real fake --num-workers -1", "--num-workers must be at least 0, got -1"),
    ("real fake --splits 0", "--splits must be at least 1, got 0"),
    ("real fake --isc", "12 images cannot use 20 splits"),
    ("real fake --device teapot", "--device teapot cannot be used"),
    ("real fake --weights nowhere.pth", "nowhere.pth"),
    ("real fake --save out.npy", ".npz"),
    ("real fake --save stats.npz", "stats.npz exists"),
    ("real fake --save nowhere/x.npz", "nowhere does not exist"),
    ("real fake --intra", "is in no class folder"),
    ("real stats.npz --intra", "--intra needs a folder of images"),
    ("real stats.npz --isc", "--isc needs a folder of images"),
    ("real broken.npz", "not an .npz of moments"),
    ("corrupt fake", "1 images cannot be read"),
    ("real fake --sifid", "one real image"),
    ("real/000.png fake --sifid --isc", "not together"),
    ("real/000.png notes.txt --sifid", "cannot be read"),
    ("tiny.png fake --sifid", "too few positions"),
    ("real one", "at least 2 images, got 1"),
    ("real fake --dtype float16", "float16"),
    ("real fake --intre", "--intre"),
]


@pytest.fixture(scope="module")
def bad(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    for name, path in (("real", folders[0]), ("fake", folders[1])):
        (root / name).symlink_to(path)
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("text")
    (root / "broken.npz").write_text("text")
    save_images(make_images(1, 0), root / "corrupt")
    (root / "corrupt" / "0.png").write_text("text")
    save_images(make_images(1, 0), root / "one")
    save_images(make_images(1, 0, 9), root / "tiny")
    (root / "tiny" / "000.png").rename(root / "tiny.png")
    np.savez(root / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return root


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_error_with_exit_code_2(bad, monkeypatch, capsys, command, words):
    monkeypatch.chdir(bad)
    # Where the mistake is elsewhere, a network that costs nothing.
    monkeypatch.setattr(fid.Inception, "embed", lambda self, x: stub(x))
    before = sorted(bad.rglob("*"))
    extra = [] if "--weights" in command else ["--weights", "random"]
    extra += [] if "--num-workers" in command else ["--num-workers", "0"]
    extra += ["--splits", "20"] if command.endswith("fake --isc") else []
    code, out, err = cli(monkeypatch, capsys, *command.split(), *extra)
    assert code == 2 and out == ""
    assert words in err
    assert "Traceback" not in err and sorted(bad.rglob("*")) == before


def test_command_from_the_shell(bad):
    command = [sys.executable, ROOT / "fid.py", bad / "empty", bad / "fake"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no images (") and done.stderr.count("\n") == 1


def test_a_runs_scores_of_random_features_are_labelled(tmp_path):
    assert fid.run_label(tmp_path) == ""
    for weights, label in (("random", fid.RANDOM_LABEL), ("auto", "")):
        (tmp_path / "args.json").write_text(json.dumps({"args": {"fid_weights": weights}}))
        assert fid.run_label(tmp_path) == label
