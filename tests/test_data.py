"""The shared data block: on-disk formats, photographs as people have them, the decoded file."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.datasets import CIFAR10, CelebA

import giu_gan
from giu_gan import Args

CPU = torch.device("cpu")


def write_image(path, colour, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def load(**flags):
    args = Args(**{"dataset": "folder", "data_dir": "tree", "batch_size": 2} | flags)
    images, labels, file = giu_gan.load_images(args, CPU)
    return images, labels.tolist(), file


@pytest.fixture
def tree(tmp_path):
    """Two classes, odd sizes, suffixes and modes; the left third of one image is another colour."""
    root = tmp_path / "tree"
    wide = Image.new("RGB", (90, 30), (10, 200, 30))
    wide.paste((255, 0, 0), (0, 0, 30, 30))
    (root / "a").mkdir(parents=True)
    wide.save(root / "a" / "wide.PNG")
    write_image(root / "a" / "deep" / "grey.jpg", 77, mode="L")
    write_image(root / "b" / "palette.png", 5, mode="P")
    write_image(root / "b" / "plain.png", (1, 2, 3))
    (root / "b" / "notes.txt").write_text("not an image")
    return root


def test_a_folder_is_read_in_sorted_order_with_class_labels(tree, capsys):
    with pytest.warns(UserWarning, match="1 other files"):
        images, labels, file = load()
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert labels == [0, 0, 1, 1]  # a/deep/grey, a/wide, b/palette, b/plain
    assert abs(images[0].float().mean() - 77) <= 1
    assert (images[1] == torch.tensor([10, 200, 30])[:, None, None]).all()  # the central square
    assert Path("tree/cache") in file.parents
    assert "4 images, 2 classes (a, b)" in capsys.readouterr().out
    write_image(tree / "x.png", (0, 0, 9))
    assert load()[1] == [1, 1, 2, 2, 0]  # directly in the folder: a class of its own


def test_images_are_upright_on_white_and_of_eight_bits():
    write_image(Path("tree/1.png"), (200, 0, 0, 0), mode="RGBA")  # hidden red
    half = Image.new("RGB", (32, 32), (255, 255, 255))
    half.paste((0, 0, 0), (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    half.save("tree/0.png", exif=exif)
    Image.fromarray(np.full((40, 30), 65535 // 2, np.uint16)).save("tree/2.png")
    images = load()[0]
    assert images[0, :, :15].min() > 250 and images[0, :, 17:].max() < 5
    assert (images[1] == 255).all()
    assert (images[2] == 127).all() or (images[2] == 128).all()


def test_crop_cuts_the_central_square_before_an_antialiased_resize():
    Path("tree").mkdir()
    image = Image.new("RGB", (100, 100))
    image.paste((255, 255, 255), (25, 25, 75, 75))
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    image.save("tree/x.png")
    Image.fromarray(stripes).save("tree/y.png")
    assert (load(crop=50)[0][0] == 255).all()
    images = load()[0].float()
    assert abs(images[0].mean() - 255 / 4) < 4
    assert images[1, :, 2:-2, 2:-2].min() > 110  # not 0 or 255
    assert images[1, :, 2:-2, 2:-2].max() < 145


def test_the_decoded_file_is_made_once_and_its_name_holds_what_decides_it(tree, capsys):
    assert Path("elsewhere") in load(cache_dir="elsewhere")[2].parents
    assert "decoding" in capsys.readouterr().out and not (tree / "cache").exists()
    file = load()[2]
    stamp = file.stat().st_mtime_ns
    assert "decoding" in capsys.readouterr().out
    assert load(seed=5)[2] == file and file.stat().st_mtime_ns == stamp
    assert "decoding" not in capsys.readouterr().out
    others = {load(**flags)[2] for flags in ({"img_size": 64}, {"crop": 9})}
    edited = tree / "b" / "plain.png"
    size = edited.stat().st_size
    write_image(edited, (3, 2, 1))  # in place, with as many bytes
    assert edited.stat().st_size == size
    os.utime(edited, ns=(1, 1))
    images, _, again = load()
    assert images[3, 0, 0, 0] == 3
    assert again.parent.name == file.parent.name  # the same data to a checkpoint
    shutil.move(edited, tree / "b" / "renamed.png")
    assert load()[2].parent.name != file.parent.name
    assert len(others | {file, again}) == 4


def test_what_a_run_writes_is_never_data(tree):
    for name in ("runs/other/samples/1.png", "photos/.hidden/2.png", "__MACOSX/3.png"):
        write_image(tree / name, 0)
    write_image(tree / "copied-run" / "samples" / "4.png", 0)
    (tree / "copied-run" / "args.json").write_text("{}")
    assert len(load(out_dir="tree/runs")[0]) == 4
    assert len(load(out_dir=".")[0]) == 5  # the folder of all runs is not below the data


def test_too_few_and_unreadable_images_are_named_and_nothing_half_done_stays(tree, call):
    flags = "--dataset folder --data-dir tree --eval-every 0 --batch-size".split()
    code, _, err = call("giu_gan", *flags, "8")
    assert code == 2 and err.splitlines()[-1].startswith("error: --batch-size must be at most 4")
    assert len(load(mode="evaluate", batch_size=8, cache_dir="c")[0]) == 4  # enough to score with
    whole = (tree / "a" / "wide.PNG").read_bytes()
    (tree / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    code, _, err = call("giu_gan", *flags, "2")
    assert code == 2 and "b/cut.png" in err and err.startswith("error: "), err
    assert not [path for path in tree.rglob("*") if "cache" in path.parts and path.is_file()]


def test_a_full_disk_while_decoding_is_one_line(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    code = f"{limit}; import sys; sys.path.insert(0, {str(ROOT)!r}); import giu_gan; giu_gan.main()"
    command = [sys.executable, "-c", code, "--dataset", "shapes", "--eval-every", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_cifar10_in_its_on_disk_format(tmp_path, monkeypatch):
    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng, names = np.random.default_rng(0), [f"data_batch_{i}" for i in range(1, 6)]
    pixels = rng.integers(0, 256, (5, 2, 3072), dtype=np.uint8)
    for name, data in zip(names, pixels):
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 8]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    images, labels, _ = load(dataset="cifar10", data_dir="data")
    assert np.array_equal(images, pixels.reshape(10, 3, 32, 32)) and labels == [3, 8] * 5


def test_celeba_in_its_on_disk_format(tmp_path, monkeypatch):
    base, names = tmp_path / "data" / "celeba", [f"{i:06d}.jpg" for i in range(1, 5)]
    for i, name in enumerate(names):
        write_image(base / "img_align_celeba" / name, (60 * i, 0, 0), size=(178, 218))
    rows = {
        "list_eval_partition.txt": [f"{name} {i % 3}" for i, name in enumerate(names)],
        "identity_CelebA.txt": [f"{name} {i}" for i, name in enumerate(names)],
        "list_attr_celeba.txt": ["4", "Smiling Young", *(f"{name} 1 -1" for name in names)],
        "list_bbox_celeba.txt": ["4", "image_id x y w h", *(f"{name} 1 2 3 4" for name in names)],
        "list_landmarks_align_celeba.txt": ["4", "a b", *(f"{name} 1 2" for name in names)],
    }
    for name, lines in rows.items():
        (base / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(CelebA, "file_list", [(a, None, b) for a, _, b in CelebA.file_list])
    images, _, _ = load(dataset="celeba", data_dir="data", img_size=64, crop=160)
    assert images.shape == (4, 3, 64, 64)  # all three splits
    assert [round(image[0].float().mean().item() / 60) for image in images] == [0, 1, 2, 3]


def test_a_missing_celeba_says_what_to_do(call, monkeypatch):
    def download(self):
        raise RuntimeError("To download files from GDrive, 'gdown' is required.")

    monkeypatch.setattr(CelebA, "download", download)
    code, _, err = call("giu_gan", "--dataset", "celeba", "--eval-every", "0")
    assert code == 2 and "pip install gdown" in err
    assert "--dataset folder --crop 160 --img-size 64" in err


def test_shapes_are_mirrored_and_fixed():
    for index in (0, 5, 4999):
        pixels = np.asarray(giu_gan.draw_shape(index))
        assert np.array_equal(pixels, pixels[:, ::-1]) and pixels.std() > 10
        assert np.array_equal(pixels, np.asarray(giu_gan.draw_shape(index)))
    assert not np.array_equal(giu_gan.draw_shape(0), giu_gan.draw_shape(8))


def stream(images, first=0, count=6, **flags):
    args = Args(**{"batch_size": 4, "seed": 3} | flags)
    found = giu_gan.batches(args, images, torch.arange(len(images)), CPU, first)
    return [next(found) for _ in range(count)]


def test_batches_are_a_function_of_seed_and_number_and_shared_out(monkeypatch):
    images = torch.arange(11 * 3 * 4 * 4).to(torch.uint8).view(11, 3, 4, 4)
    whole = stream(images)
    for (a, ya), (b, yb) in zip(whole[3:], stream(images, first=3, count=3)):
        assert torch.equal(a, b) and torch.equal(ya, yb)
    epoch = torch.cat([y for _, y in whole[:2]])
    assert len(set(epoch.tolist())) == 8  # no image twice in an epoch; the rest is dropped
    assert not torch.equal(epoch, torch.cat([y for _, y in whole[2:4]]))
    assert not torch.equal(whole[0][1], stream(images, seed=4)[0][1])
    real, y = whole[0]
    assert real.dtype == torch.float32 and torch.equal(real, images[y].float() / 127.5 - 1)
    shares = []
    monkeypatch.setattr(giu_gan, "WORLD", 2)
    for rank in range(2):
        monkeypatch.setattr(giu_gan, "RANK", rank)
        shares.append(stream(images))
    for (_, y), (_, first), (_, second) in zip(whole, *shares):
        assert torch.equal(y, torch.cat([first, second]))


def test_hflip_mirrors_half_of_the_images_anew_in_each_epoch():
    images = torch.arange(64 * 12).view(64, 1, 3, 4).to(torch.uint8)
    epochs, mirrored = stream(images, count=2, batch_size=64, hflip=True), []
    for real, y in epochs:
        plain = images[y].float() / 127.5 - 1
        flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(real, plain)])
        assert torch.equal(real, torch.where(flipped[:, None, None, None], plain.flip(3), plain))
        mirrored.append(set(y[flipped].tolist()))
    assert all(16 < len(found) < 48 for found in mirrored) and mirrored[0] != mirrored[1]


def test_uint8_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    G = torch.nn.Identity()
    G.scale = torch.nn.Parameter(torch.ones(()))  # generate() asks a parameter for the device
    for off in (-0.4, 0, 0.4):  # rounded, not cut
        assert torch.equal(giu_gan.generate(G, (levels.float() + off) / 127.5 - 1), levels)


def test_fid_real_spreads_over_the_whole_data_set(monkeypatch):
    """The images are sorted by class: their first part is no sample of them."""
    seen = []

    class Inception:
        protocol, label = {"sha256": "0" * 64}, ""

    monkeypatch.setattr(giu_gan.fid, "dataset_moments", lambda net, x, *a: seen.append(x))
    monkeypatch.setattr(giu_gan.fid, "score_generator", lambda *a: {"fid": 1.0})
    images = torch.arange(50).to(torch.uint8).view(50, 1, 1, 1)
    args = Args(fid_real=30, fid_num=10)
    giu_gan.score(args, Inception(), torch.nn.Identity(), images, Path("x.npy"))
    (picked,) = seen
    assert len(picked.unique()) == 30 and picked.max() >= 48
