"""Every source from a small tree in its real on-disk format, and the cache of decoded images."""

import os
import pickle
import shutil
from pathlib import Path

import giu_gan
import numpy as np
import pytest
import torch
from giu_gan import Args
from PIL import Image

import fid


def write_image(path, colour, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def folder_args(**flags):
    return Args(
        **{"dataset": "folder", "data_dir": "tree", "batch_size": 2, "num_workers": 0} | flags
    )


@pytest.fixture
def tree(tmp_path):
    """Two classes, odd sizes, suffixes and modes; the left third of one image is another colour."""
    root = tmp_path / "tree"
    wide = Image.new("RGB", (90, 30), (10, 200, 30))
    wide.paste((255, 0, 0), (0, 0, 30, 30))
    (root / "a").mkdir(parents=True)
    wide.save(root / "a" / "wide.PNG")
    write_image(root / "a" / "deep" / "grey.jpg", 77, mode="L")
    write_image(root / "b" / "alpha.png", (1, 2, 3, 128), mode="RGBA")
    write_image(root / "b" / "palette.png", 5, mode="P")
    (root / "b" / "notes.txt").write_text("not an image")
    return root


def test_folder_reads_any_tree_in_sorted_order_with_class_labels(tree):
    images, labels, path = giu_gan.load_images(folder_args(img_size=32))
    assert images.shape == (4, 3, 32, 32) and images.dtype == np.uint8
    assert labels.tolist() == [0, 0, 1, 1]  # a/deep/grey, a/wide, b/alpha, b/palette
    assert abs(int(images[0].mean()) - 77) <= 1
    assert (images[1] == np.array([10, 200, 30])[:, None, None]).all()  # the central square only
    assert (images[2] == np.array([1, 2, 3])[:, None, None]).all()
    assert path.parent == tree.relative_to(tree.parent) / "cache"


def test_images_directly_in_a_folder_are_one_class(tree):
    for name in ("x.png", "y.png"):
        write_image(tree / name, (0, 0, 9))
    folder = fid.Folder(tree)
    assert folder.classes == ["", "a", "b"] and folder.targets == [1, 1, 2, 2, 0, 0]


def test_crop_cuts_the_central_square_before_resizing(tree):
    image = Image.new("RGB", (100, 100))
    image.paste((255, 255, 255), (25, 25, 75, 75))
    shutil.rmtree(tree)
    tree.mkdir()
    image.save(tree / "x.png")
    image.save(tree / "y.png")
    cut = giu_gan.load_images(folder_args(crop=50))[0]
    assert (cut == 255).all()
    whole = giu_gan.load_images(folder_args())[0]
    assert abs(whole[0].mean() - 255 / 4) < 4


def test_shrinking_is_antialiased(tree):
    shutil.rmtree(tree)
    tree.mkdir()
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in "xy":
        Image.fromarray(stripes).save(tree / f"{name}.png")
    images = giu_gan.load_images(folder_args())[0]
    inner = images[:, :, 2:-2, 2:-2]
    assert inner.min() > 110 and inner.max() < 145  # not 0 or 255


def test_the_cache_is_built_once_and_its_name_holds_what_decides_it(tree, capsys):
    path = giu_gan.load_images(folder_args())[2]
    stamp = path.stat().st_mtime_ns
    assert "decoding" in capsys.readouterr().out
    assert giu_gan.load_images(folder_args(seed=5))[2] == path
    assert path.stat().st_mtime_ns == stamp and "decoding" not in capsys.readouterr().out
    others = {
        giu_gan.load_images(folder_args(**flags))[2] for flags in ({"img_size": 64}, {"crop": 9})
    }
    write_image(tree / "b" / "palette.png", 5, size=(41, 31), mode="P")  # same name, other bytes
    others.add(giu_gan.load_images(folder_args())[2])
    assert len(others | {path}) == 4


def test_corrupt_images_are_all_listed_and_nothing_half_built_stays(tree):
    (tree / "a" / "empty.png").write_bytes(b"")
    whole = (tree / "a" / "wide.PNG").read_bytes()
    (tree / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fid.UserError) as error:
        giu_gan.load_images(folder_args())
    message = str(error.value)
    assert "2 images" in message and "a/empty.png" in message and "b/cut.png" in message
    assert not [p for p in (tree / "cache").iterdir() if p.suffix != ".lock"]


def test_an_interrupted_build_leaves_no_file(tree, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fid.Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        giu_gan.load_images(folder_args())
    monkeypatch.undo()
    os.chdir(tree.parent)
    assert not [p for p in (tree / "cache").iterdir() if p.suffix != ".lock"]
    assert len(giu_gan.load_images(folder_args())[0]) == 4


def test_a_full_disk_is_found_before_decoding(tree, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(fid.UserError, match=r"GB left, the decoded images need"):
        giu_gan.load_images(folder_args())


def test_workers_decode_the_same_array(tree):
    alone = giu_gan.load_images(folder_args(data_dir="tree"))[0].copy()
    shutil.rmtree(tree / "cache")
    assert np.array_equal(giu_gan.load_images(folder_args(num_workers=2))[0], alone)


def test_cifar10_in_its_on_disk_format(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

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
    args = Args(batch_size=4, num_workers=0, download=False)
    images, labels, _ = giu_gan.load_images(args)
    assert np.array_equal(images, pixels.reshape(10, 3, 32, 32)) and labels.tolist() == [3, 8] * 5


def test_celeba_in_its_on_disk_format(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    base = tmp_path / "data" / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, 5)]
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
    listed = [(key, None, name) for key, _, name in CelebA.file_list]
    monkeypatch.setattr(CelebA, "file_list", listed)
    args = Args(dataset="celeba", batch_size=4, num_workers=0, download=False)
    images, _, _ = giu_gan.load_images(args)
    assert images.shape == (4, 3, 64, 64)  # all three splits
    assert [round(image[0].mean() / 60) for image in images] == [0, 1, 2, 3]


def test_shapes_are_mirrored_labelled_and_fixed():
    shapes = fid.Shapes()
    for index in (0, 5, 4999):
        image, label = shapes[index]
        pixels = np.asarray(image)
        assert label == index % 8 and np.array_equal(pixels, pixels[:, ::-1])
        assert np.array_equal(pixels, np.asarray(shapes[index][0]))
        assert pixels.std() > 10
    assert not np.array_equal(np.asarray(shapes[0][0]), np.asarray(shapes[8][0]))


def batches(images, start=0, count=6, **flags):
    args = Args(**{"batch_size": 4, "seed": 3} | flags)
    labels = torch.arange(len(images))
    stream = giu_gan.endless_batches(images, labels, args, torch.device("cpu"), start)
    return [next(stream) for _ in range(count)]


def test_batches_are_a_function_of_seed_and_number():
    images = np.arange(11 * 3 * 4 * 4, dtype=np.uint8).reshape(11, 3, 4, 4)
    whole = batches(images)
    for (a, ya), (b, yb) in zip(whole[3:], batches(images, start=3, count=3)):
        assert torch.equal(a, b) and torch.equal(ya, yb)
    epoch = torch.cat([y for _, y in whole[:2]])
    assert len(set(epoch.tolist())) == 8  # no image twice in an epoch; the rest is dropped
    assert not torch.equal(epoch, torch.cat([y for _, y in whole[2:4]]))
    assert not torch.equal(whole[0][1], batches(images, seed=4)[0][1])
    real, y = whole[0]
    assert real.dtype == torch.float32
    assert torch.equal(real, torch.from_numpy(images)[y].float() / 127.5 - 1)


def test_processes_share_the_global_batch_out(monkeypatch):
    images = np.zeros((16, 3, 4, 4), np.uint8)
    together = [y for _, y in batches(images)]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(fid, "processes", lambda rank=rank: (rank, 2))
        parts.append([y for _, y in batches(images)])
    for whole, first, second in zip(together, *parts):
        assert torch.equal(whole, torch.cat([first, second]))


def test_reading_ahead_starts_no_second_team_of_threads():
    """PyTorch's operations in the reading thread would: training halved its speed on two cores."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs Linux to count its threads")
    threads, images = torch.get_num_threads(), np.zeros((512, 3, 32, 32), np.uint8)
    try:
        torch.set_num_threads(4)
        torch.ones(1 << 20).add_(1)  # this thread's own team
        before = len(list(Path("/proc/self/task").iterdir()))
        args = giu_gan.Args(batch_size=256)
        stream = giu_gan.endless_batches(
            images, torch.zeros(512, dtype=torch.long), args, torch.device("cpu"), 0
        )
        next(stream)
        next(stream)
        assert len(list(Path("/proc/self/task").iterdir())) == before + 1
    finally:
        torch.set_num_threads(threads)


def test_uint8_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    G = torch.nn.Sequential(torch.nn.Identity())
    G.scale = torch.nn.Parameter(torch.ones(()))  # generate() asks a parameter for the device
    assert torch.equal(giu_gan.generate(G, levels.float() / 127.5 - 1), levels)
