# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""Self-Attention in Deep Convolutional GANs, on Stanford Dogs (Levkovich, Avraham, Bar, Bachar).

A DCGAN with self-attention in G and D, in one of them or in none: does it help structure, and does
FID see that? FID, then the loss of D, say when to stop. Unconditional, 64x64, a crop for each box.

    python sagan_dogs.py --attention full                     # or none, no-g, no-d: the four runs
    python sagan_dogs.py --recipe sagan                       # SAGAN's training instead of DCGAN's
    python sagan_dogs.py --dataset folder --data-dir photos   # any photographs
    python sagan_dogs.py --mode sample                        # images, and what they attend to
    python sagan_dogs.py --mode sample --runs runs/sagan_dogs__*__s1   # runs side by side

Differences from the paper
 1. It states no recipe, only a "deep convolutional" GAN. Ours is DCGAN's: weights N(0, 0.02), batch
    norm in G, Adam at 2e-4 with moments 0.5 and 0.999; and spectral norm (SN) on all layers of D.
    `--recipe sagan` is SAGAN's: SN in both nets, Adam at 1e-4 and 4e-4 with 0 and 0.9; Xavier. Its
    hinge loss is `--loss hinge`. Mixed precision on CUDA is ours.
 2. Our choices, as it states none: widths, depth, z of length 128, a slope of 0.1 in D, batches of
    64, one update of D for each of G, no labels, no mirroring.
 3. Attention follows the last two maps of each net, queries and keys have C / 8 channels where it
    prints C x N. Rows of A are softmax over the keys, so o = V A^T: the text omits the transpose.
 4. The loss that was run is not stated. Ours: Eqs. 1-3 with its non-saturating step of G.
 5. Full attention has 410,562 parameters more in D and 25,842 more in G than none: the comparison
    is not matched in parameters. All four start as the same function.
 6. Smoothing, tolerances and patience of the stopping rule are ours. Lower is better for both
    signals ("improving" is not defined); but a falling loss of D can also mean that D is winning.
 7. All 22,126 boxes of the images are cropped, the paper counts 20,580 (`--boxes first`), and
    stretched to a square, as "crop, then resize" says.
 8. FID is fid.py's, of 10,000 fakes and all reals, in eval mode; the paper prints neither counts
    nor one FID: compare orders and plateaus, and FIDs of equal counts.
"""

# ---- 1. Imports ----------------------------------------------------------------------------------
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Literal
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp import GradScaler, autocast
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import fid

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---- 2. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # Run: what may change with --resume
    mode: Literal["train", "evaluate", "sample"] = "train"  # train, or use a trained checkpoint
    exp_name: str = ""  # part of the run folder's name; empty: the model's
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    data_dir: str = "data"  # folder of the data set
    cache_dir: str = ""  # folder of decoded images and FID moments; empty: cache in --data-dir
    out_dir: str = "runs"  # folder of the run folders
    resume: bool = False  # resume from this run's checkpoint if there is one
    checkpoint: str = ""  # checkpoint to use or start from; empty: the run's best.pt, else its last
    dry_run: bool = False  # print the flags and the parameter counts as JSON and exit
    total_steps: int = 30_000  # generator updates to train for
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 1_000  # steps between sample grids; 0: none
    eval_every: int = 500  # steps between evaluations; 0: none
    save_every: int = 1_000  # steps between checkpoints; 0: none
    num_samples: int = 64  # images of a sample grid and of mode sample
    fid_num: int = 10_000  # generated images of an evaluation
    fid_real: int = 0  # real images of an evaluation, spread over the data set; 0: all
    fid_weights: str = "auto"  # Inception weights: auto (download), a path, or random (for tests)
    early_stop: bool = False  # stop where the two-phase rule says so, else only report it
    milestones: tuple[int, ...] = (500, 2_500, 5_000, 10_000, 15_000, 20_000, 24_000, 30_000)
    """steps whose checkpoint and sample grid are kept"""
    query: tuple[tuple[int, int], ...] = ((22, 22), (22, 42), (34, 32), (46, 32), (6, 6))
    """y x of the places whose attention mode sample draws, in 64ths of the image's side"""
    runs: tuple[str, ...] = ()  # run folders that mode sample sets side by side
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal["stanford-dogs", "folder", "shapes"] = "stanford-dogs"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 64  # side of the square images in pixels
    crop: int = 0  # side of the central square cut out first, in pixels; 0: the short side
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    boxes: Literal["all", "first"] = "all"  # boxes of an image of Stanford Dogs that are cropped
    # Model
    attention: Literal["full", "none", "no-g", "no-d"] = "full"  # nets that have it; no-g: only D
    attn_g: tuple[int, ...] = (16, 32)  # sides of G's maps with attention: its last two
    attn_d: tuple[int, ...] = (8, 4)  # sides of D's maps with attention: its last two
    z_dim: int = 128  # length of the noise vector
    g_ch: int = 64  # base width of the generator, in channels
    d_ch: int = 64  # base width of the discriminator, in channels
    # Optimisation
    recipe: Literal["dcgan", "sagan"] = "dcgan"  # whose settings are the defaults
    init: Literal["normal", "xavier"] = "normal"  # initial weights: N(0, 0.02), or Xavier's uniform
    spectral_norm: Literal["d", "both", "none"] = "d"  # networks that have it, on all layers
    loss: Literal["ns", "minimax", "hinge"] = "ns"  # adversarial loss
    batch_size: int = 64  # images per update, shared out over the processes
    n_critic: int = 1  # discriminator updates per generator update
    g_lr: float = 2e-4  # learning rate of the generator
    d_lr: float = 2e-4  # learning rate of the discriminator
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean
    beta2: float = 0.999  # Adam's decay rate of the squared gradient's mean
    ema_decay: float = 0.0  # decay of the averaged generator; 0: none, as in the paper
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""

    @property
    def model(self) -> str:
        """The part of the run folder's name without --exp-name."""
        return self.attention


DEFAULTS = {  # what a recipe or a size changes; flags that are given win
    ("recipe", "sagan"): {"init": "xavier", "spectral_norm": "both", "g_lr": 1e-4, "d_lr": 4e-4,
                          "beta1": 0.0, "beta2": 0.9},
    ("img_size", 32): {"attn_g": (8, 16)},
    ("img_size", 128): {"attn_g": (32, 64)},
}  # fmt: skip


def parse(argv: list[str] | None = None) -> Args:
    """Parse the command line twice: the first pass finds the defaults of the second.

    They are the row's or, where a checkpoint is resumed, started from or used, that checkpoint's.
    Raises ValueError for flags that break a rule or differ from the checkpoint's.
    """
    argv = sys.argv[1:] if argv is None else argv
    first, default = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")]), {}
    for (flag, value), row in DEFAULTS.items():
        default |= row if getattr(first, flag) == value else {}
    path, saved = find_checkpoint(first), {}
    if path.exists() and (first.resume or first.checkpoint or first.mode != "train"):
        saved = torch.load(path, "cpu", weights_only=True)["args"]
        default = saved | {"checkpoint": "", "resume": False}
    args = tyro.cli(Args, args=argv, default=Args(**default), description=__doc__)
    fixed = itertools.dropwhile(lambda item: item[0] != "seed", saved.items())  # see Args
    kept = [f"--{flag} {value}" for flag, value in fixed if getattr(args, flag) != value]
    if kept:
        raise ValueError(f"flags must be as in {path}: {', '.join(kept).replace('_', '-')}")
    for holds, message in check_args(args):
        if not holds:
            raise ValueError(message)
    return args


def check_args(args: Args) -> Iterator[tuple[bool, str]]:
    """Yield (holds, message) of every rule; `parse` stops at the first that does not hold."""
    cuda = args.device != "cuda" or torch.cuda.is_available()
    yield cuda, "--device must be cpu where PyTorch finds no GPU, got cuda"
    yield 0 <= args.seed < 2**32, f"--seed must be from 0 to 2**32 - 1, got {args.seed}"
    yield args.fid_num >= 10, f"--fid-num must be at least 10, got {args.fid_num}"
    n, size, real = args.batch_size, args.img_size, args.fid_real
    yield real == 0 or real > 1, f"--fid-real must be 0 or at least 2, got {real}"
    yield n > 0 and n % WORLD == 0, f"--batch-size must be a multiple of {WORLD}, got {n}"
    training, path, folder = args.mode == "train", find_checkpoint(args), run_folder(args)
    yield training or WORLD == 1, f"--mode {args.mode} must have 1 process, got {WORLD}"
    there = path.exists() or bool(args.runs) or (training and not args.checkpoint)
    yield there, f"{path} does not exist: train first, or name a --checkpoint"
    new = not training or args.resume or args.dry_run or RANK > 0 or not folder.exists()
    yield new, f"--exp-name must be new or go with --resume: {folder} exists"
    yield size in (32, 64, 128), f"--img-size must be 32, 64 or 128, got {size}"
    sides = [4 * 2**i for i in range(len(widths(args, 1)))]
    for flag, given in (("attn-g", args.attn_g), ("attn-d", args.attn_d)):
        yield set(given) <= set(sides), f"--{flag} must be of {sides}, got {list(given)}"
    crop = not args.crop or args.dataset != "stanford-dogs"
    yield crop, f"--crop must be 0 for Stanford Dogs, cropped to its boxes, got {args.crop}"
    rule = not args.early_stop or (args.eval_every > 0 and WORLD == 1)
    yield rule, f"--early-stop must have --eval-every and 1 process, got {args.eval_every}, {WORLD}"
    inside = all(0 <= place < 64 for pair in args.query for place in pair)
    yield inside, f"--query must be places from 0 to 63, got {args.query}"


# ---- 3. Layers -----------------------------------------------------------------------------------
class SpectralNorm(_SpectralNorm):
    """PyTorch's spectral norm, its power iteration in fp32 under autocast too."""

    def forward(self, weight: Tensor) -> Tensor:
        with autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def sn(layer: nn.Module, enabled: bool = True) -> nn.Module:
    """Put a layer under spectral norm: one power iteration per forward pass in training."""
    if enabled:
        dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        register_parametrization(layer, "weight", SpectralNorm(layer.weight, dim=dim))
    return layer


class FusedSelfAttention(nn.Module):
    """Self-attention over all positions (SAGAN): (N, C, H, W) -> (N, C, H, W).

    With x as a C x HW matrix: q = W_q x and k = W_k x of C // 8 channels, v = W_v x of C channels;
    S = q^T k, not scaled; A = softmax of S over the keys, rows sum to 1; o = v A^T;
    y = x + gamma o. As gamma starts at 0, the block starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def attention_map(self, x: Tensor) -> Tensor:
        """Return A (N, HW, HW): row q says how much position q takes from each position."""
        return (self.query(x).flatten(2).mT @ self.key(x).flatten(2)).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Fused kernels never store A, of 256 MiB for 64 maps of 32x32.

        They want rows of one width: zeros fill up queries and keys and leave S as it is.
        """
        rows = [conv(x).flatten(2).mT for conv in (self.query, self.key, self.value)]
        rows = [F.pad(row, (0, x.shape[1] - row.shape[2]))[:, None].contiguous() for row in rows]
        out = F.scaled_dot_product_attention(*rows, scale=1.0)[:, 0]
        return x + self.gamma * out.mT.view_as(x)


def init_layer(layer: nn.Module, args: Args, net: str) -> nn.Module:
    """Draw a convolution's weights; put it under spectral norm if net "g" or "d" has it."""
    inits = {"normal": partial(nn.init.normal_, std=0.02), "xavier": nn.init.xavier_uniform_}
    inits[args.init](layer.weight)
    nn.init.zeros_(layer.bias)
    return sn(layer, args.spectral_norm in (net, "both"))  # last: under it a draw would be lost


# ---- 4. Networks ---------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


def attention(args: Args, net: str, side: int, channels: int) -> nn.Module:
    """Return the attention after the map of `side` of net "g" or "d", an identity without.

    Its weights come from a stream of their own: the other layers start the same with and without
    it, so as gamma is 0, the four ablations start as the same function.
    """
    if args.attention in ("none", f"no-{net}") or side not in getattr(args, f"attn_{net}"):
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(args.seed, 4, side, net == "g"))
        block = FusedSelfAttention(channels)
        for conv in block.children():
            init_layer(conv, args, net)
    return block


class Generator(nn.Sequential):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1]."""

    def __init__(self, args: Args) -> None:
        channels, layers = args.z_dim, {"unflatten": nn.Unflatten(1, (args.z_dim, 1, 1))}
        for i, out in enumerate(widths(args, args.g_ch)):
            side, (stride, padding) = 4 * 2**i, (2, 1) if i else (1, 0)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding)
            layers[f"conv{side}"] = init_layer(conv, args, "g")
            layers[f"norm{side}"] = nn.BatchNorm2d(out)
            layers[f"act{side}"] = nn.ReLU()
            layers[f"attn{side}"] = attention(args, "g", side, out)
            channels = out
        layers["out"] = init_layer(nn.ConvTranspose2d(channels, 3, 4, 2, 1), args, "g")
        super().__init__(OrderedDict(layers, tanh=nn.Tanh()))


class Discriminator(nn.Sequential):
    """Images (N, 3, img_size, img_size) -> logits (N,)."""

    def __init__(self, args: Args) -> None:
        channels, side, layers = 3, args.img_size, {}
        for out in reversed(widths(args, args.d_ch)):
            side //= 2
            layers[f"conv{side}"] = init_layer(nn.Conv2d(channels, out, 4, 2, 1), args, "d")
            layers[f"act{side}"] = nn.LeakyReLU(0.1)
            layers[f"attn{side}"] = attention(args, "d", side, out)
            channels = out
        layers["out"] = init_layer(nn.Conv2d(channels, 1, 4), args, "d")
        super().__init__(OrderedDict(layers, flatten=nn.Flatten(0)))


# ---- 5. Losses -----------------------------------------------------------------------------------
# (D real, D fake, G) losses as functions of the logit s; their means over the batch are minimised.
# D(x) = sigmoid(s), so softplus(-s) = -log D(x) and softplus(s) = -log(1 - D(x)).
ADVERSARIAL = {  # ns: Eqs. 1-3 with the paper's step of G, maximise log D(G(z)); minimax: Eq. 1
    "ns": (lambda s: F.softplus(-s), F.softplus, lambda s: F.softplus(-s)),
    "minimax": (lambda s: F.softplus(-s), F.softplus, lambda s: -F.softplus(s)),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
}


# ---- 6. Data -------------------------------------------------------------------------------------
def draw_shape(index: int) -> Image.Image:
    """Draw a coloured shape and its mirror image; the class is index % 8."""
    rng, (kind, hollow) = random.Random(index), divmod(index % 8, 2)
    low, high, ink = (tuple(rng.randrange(a, a + 96) for _ in range(3)) for a in (0, 64, 159))
    circle = rng.randrange(48, 80), rng.randrange(64, 192), rng.randrange(28, 48)
    corners, angle, fill = (3, 4, 6, 60)[kind], rng.randrange(360), None if hollow else ink
    image = ImageOps.colorize(Image.linear_gradient("L"), low, high)  # 256 x 256
    ImageDraw.Draw(image).regular_polygon(circle, corners, angle, fill, ink, 12)
    image.paste(ImageOps.mirror(image.crop((0, 0, 128, 256))), (128, 0))
    return image


def open_image(path: Path) -> Image.Image:
    """Open an image file as upright RGB: 16 bits scaled to 8, transparent parts on white."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except Exception as error:  # decoders fail in many ways
        raise OSError(f"cannot read {path}: {error}") from error
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_crop(path: Path, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """Read an image's part in a box (left, top, right, bottom), stretched to size x size.

    Not by open_image: boxes are in stored pixels, before any rotation that EXIF asks for.
    """
    try:
        image = Image.open(path).convert("RGB")
        left, top, right, bottom = box  # two boxes of the data set pass the border
        inside = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        return image.crop(inside).resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders fail in many ways; a box without pixels
        raise OSError(f"cannot read {box} of {path}: {error}") from error


def open_dogs(args: Args, root: Path) -> tuple[Callable, list[int], list[tuple]]:
    """Return what `open_dataset` does of Stanford Dogs: a crop for each box, no labels.

    An image and its annotation belong together by their paths, breed/name.jpg and breed/name; the
    size, folder and file name in an annotation are not reliable.
    """
    trees, crops = [], []
    for name in ("Images", "Annotation"):  # or deeper: images/Images, annotations/Annotation
        trees += [*root.glob(name), *root.glob(f"*/{name}")][:1]
    if len(trees) < 2:
        hint = "images.tar and annotation.tar of http://vision.stanford.edu/aditya86/ImageNetDogs"
        raise OSError(f"--data-dir must hold Images and Annotation, got {root}: extract {hint}")
    images = fid.image_files(trees[0])
    notes = [trees[1] / image.parent.name / image.stem for image in images]
    corners = {"xmin": 0, "ymin": 0, "xmax": 1, "ymax": 1}  # the last pixel lies in the box
    for image, note in zip(images, notes):
        try:
            marks = ElementTree.parse(note).findall("object/bndbox")
            boxes = [[int(mark.find(k).text) + add for k, add in corners.items()] for mark in marks]
        except Exception as error:  # a missing file, no XML, no numbers
            raise OSError(f"cannot read {note}: {error}") from error
        crops += [(image, box) for box in boxes[: 1 if args.boxes == "first" else None]]
    print(f"{len(crops)} boxes of {len(images)} images, {len({i.parent for i in images})} breeds")
    stats = [(file.name, (s := file.stat()).st_size, s.st_mtime_ns) for file in images + notes]
    return lambda i: read_crop(*crops[i], args.img_size), [0] * len(crops), stats


# differs from giu_gan.py: the data sets are this paper's
def open_dataset(args: Args) -> tuple[Callable[[int], Image.Image], list[int], list[tuple]]:
    """Return the function that reads image i, the labels, and (name, size, time) of the files."""
    root = Path(args.data_dir).expanduser()
    if args.dataset == "shapes":
        return draw_shape, [i % 8 for i in range(5_000)], []
    if args.dataset == "stanford-dogs":
        return open_dogs(args, root)
    skip = (args.out_dir, args.cache_dir or root / "cache")
    files = fid.image_files(root, [Path(path).expanduser() for path in skip])
    names = [file.relative_to(root).as_posix() for file in files]
    print(f"{len(files)} images; they are turned upright, transparent parts become white")
    stats = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, map(os.stat, files))]
    return lambda i: open_image(files[i]), [0] * len(files), stats


def load_images(args: Args, device: torch.device, channels: int = 3) -> tuple[Tensor, Tensor, Path]:
    """Return uint8 images (N, C, S, S), labels (N,), and the file of the images.

    Rank 0 decodes once: the central squares, resized. The images are on the device if they fit in
    a quarter of a GPU's free memory, else a memory map. The file's folder is named by the content.
    """
    if RANK > 0:
        dist.barrier()  # until rank 0 has decoded
    read, labels, files = open_dataset(args)
    shape = len(labels), channels, args.img_size, args.img_size
    if args.mode == "train" and len(labels) < args.batch_size:
        raise ValueError(f"--batch-size must be at most {len(labels)}, the number of images")
    content = zlib.crc32(repr([file[:2] for file in files]).encode())
    times = zlib.crc32(repr(files).encode())
    folder = Path(args.cache_dir or Path(args.data_dir, "cache")).expanduser()
    folder = folder / f"{args.dataset}-{len(labels)}-{content:08x}"
    path = folder / f"{channels}x{args.img_size}-crop{args.crop}-{times:08x}.uint8"

    def decode(i: int) -> bytes:
        image = read(i).convert("L" if channels == 1 else "RGB")
        image = TF.center_crop(image, min(args.crop or math.inf, *image.size))
        return TF.pil_to_tensor(TF.resize(image, shape[2:])).numpy().tobytes()

    if not path.exists():
        print(f"decoding {len(labels)} images into {path}, once")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
                for first in range(0, len(labels), 256):  # map submits all it gets at once
                    file.writelines(pool.map(decode, range(len(labels))[first : first + 256]))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    images = torch.from_numpy(np.memmap(path, mode="c", shape=shape))  # c: private to this process
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images = images.to(device)
    return images, torch.tensor(labels, device=images.device), path


def batches(args: Args, images: Tensor, labels: Tensor, device: torch.device, b: int) -> Iterator:
    """Yield this process's share of batch `b` and of all later ones: images in [-1, 1], labels.

    A batch depends on its number and the seed alone: it is a slice of its epoch's permutation.
    """
    size, order = args.batch_size, None
    for b in itertools.count(b):
        epoch, place = divmod(b, len(images) // size)
        if order is None or place == 0:
            rng = np.random.default_rng([args.seed, 2, epoch])
            order = torch.from_numpy(rng.permutation(len(images))).to(images.device)
            flip = torch.from_numpy(rng.random((len(images), 1, 1, 1)) < 0.5).to(images.device)
        rows = order[place * size : (place + 1) * size].chunk(WORLD)[RANK]
        real, y = images[rows], labels[rows]
        if args.hflip:
            real = torch.where(flip[rows], real.flip(3), real)
        if images.device != device:
            real, y = (x.pin_memory().to(device, non_blocking=True) for x in (real, y))
        yield real.float().div_(127.5).sub_(1), y


# ---- 7. Run --------------------------------------------------------------------------------------
STOP: list[int] = []  # the signal that ends the training after the present step


def run_folder(args: Args) -> Path:
    """Return the folder of the run with these flags."""
    name = f"{Path(__file__).stem}__{args.dataset}__{args.exp_name or args.model}__s{args.seed}"
    return Path(args.out_dir).expanduser() / name


def find_checkpoint(args: Args) -> Path:
    """Return --checkpoint or the run's best.pt or checkpoint.pt; training prefers the latter."""
    best, last = run_folder(args) / "best.pt", run_folder(args) / "checkpoint.pt"
    if args.checkpoint and not (args.mode == "train" and last.exists()):
        return Path(args.checkpoint).expanduser()
    return best if best.exists() and args.mode != "train" else last


def setup(args: Args) -> tuple[torch.device, autocast, GradScaler]:
    """Join the other processes; return the device, the forward passes' autocast, the scaler."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.amp)
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # gradient penalties are to be in fp32
        if args.amp == "auto":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if native else torch.float16
    if WORLD > 1:  # hours: the others wait while rank 0 decodes the data set
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    return device, autocast(device.type, dtype, enabled=dtype is not None), scaler


def seed_of(*key: int) -> int:
    """Return a 32-bit seed that depends on every number of the key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def draw(sampler: Callable, generator: torch.Generator, *shape: int) -> Tensor:
    """Draw the whole batch's noise by torch.randn or torch.rand; return this process's share."""
    return sampler(shape, generator=generator, device=generator.device).chunk(WORLD)[RANK]


def update(opt: torch.optim.Optimizer, net: nn.Module, loss: Tensor, scaler: GradScaler) -> None:
    """Step `net` down the loss, averaged over the processes.

    One flat all-reduce: a DistributedDataParallel wrapper is silently wrong around a penalty.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    opt.zero_grad()
    scaler.scale(loss).backward(inputs=params)
    if WORLD > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / WORLD).split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))
    scaler.step(opt)
    scaler.update()


def load(path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint into networks, optimisers and the like by name; return all of it."""
    state = torch.load(path, "cpu", weights_only=True)
    for name, part in parts.items():
        if state[name]:  # of a scaler that was not in use there is no state
            part.load_state_dict(state[name])
    return state


class Run:
    """The progress of a training: step, lowest FID and its step, log, checkpoints of `parts`."""

    def __init__(self, args: Args, data: str, parts: dict[str, Any]) -> None:
        """Start in the run's folder; with --resume or --checkpoint, from where that stands."""
        self.args, self.data, self.parts, self.folder = args, data, parts, run_folder(args)
        self.step, self.best, self.sums, self.count = 0, (math.inf, 0), {}, 0
        path = find_checkpoint(args)
        if (args.resume or args.checkpoint) and path.exists():
            state = load(path, parts)
            self.step = state["step"]
            self.best = state["best"] if path.parent == self.folder else self.best
            if state["data"] != data:
                raise ValueError(f"--data-dir must hold {state['data']} of the run, got {data}")
        if RANK == 0:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(asdict(args), indent=2))
            self.board = SummaryWriter(self.folder, purge_step=self.step + 1)
        self.clock = time.perf_counter()
        print(f"{self.folder}: from step {self.step} to {args.total_steps}")

    def due(self, every: int) -> bool:
        """Return whether what rank 0 does every so many steps (0: never) and at the end is due."""
        last = self.step == self.args.total_steps
        return RANK == 0 and every > 0 and (self.step % every == 0 or last)

    def log(self, terms: dict[str, Tensor]) -> None:
        """Count a step and sum its terms on the device; every `log_every` steps log their means."""
        self.sums = {k: v.detach().float() + self.sums.get(k, 0) for k, v in terms.items()}
        self.step, self.count = self.step + 1, self.count + 1
        if self.due(self.args.log_every):
            self.flush()

    def flush(self) -> None:
        """Log the means of the steps since the last time; exit with code 3 if one is not finite."""
        means = dict(zip(self.sums, (torch.stack([*self.sums.values()]) / self.count).tolist()))
        for name, mean in means.items():
            if not math.isfinite(mean):
                print(f"error: {name} is {mean} at step {self.step}", file=sys.stderr)
                raise SystemExit(3)
        rate, total = self.count / (time.perf_counter() - self.clock), self.args.total_steps
        left = timedelta(seconds=round((total - self.step) / rate))
        text = ", ".join(f"{k} {v:.4f}" for k, v in means.items() if k.startswith("loss/"))
        done = f"step {self.step} ({self.step / total:.1%}), {rate:.3g} steps/s, {left} left"
        print(f"{done}, {text}")
        self.sums, self.count = {}, 0
        self.write(means | {"perf/steps_per_sec": rate})

    def write(self, values: dict[str, float]) -> None:
        """Write values to TensorBoard; the time of an evaluation is not that of the next steps."""
        for name, value in values.items():
            self.board.add_scalar(name, value, self.step)
        if not self.count:
            self.clock = time.perf_counter()

    def save(self, name: str) -> None:
        """Write a checkpoint to a temporary file, then rename it."""
        if self.count:
            self.flush()  # nothing is saved of a run that has gone wrong
        state = {"args": asdict(self.args), "data": self.data, "step": self.step, "best": self.best}
        state |= {key: part.state_dict() for key, part in self.parts.items()}
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / name)


# ---- 8. Evaluation -------------------------------------------------------------------------------
def stopping_rule(
    rows: list[tuple[int, float, float]], fid_window: int = 3, fid_tol: float = 0.01,
    fid_patience: int = 6, d_window: int = 2, d_tol: float = 0.01, d_patience: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Say when to stop, in two phases: train until FID plateaus, then until D's loss does.

    A row is an evaluation: step, FID, D's mean loss since the last. FID is smoothed by the median
    of `fid_window` rows, the loss by the mean of `d_window`; lower is better. A gain is a relative
    one of more than `tol`; `patience` rows without gain, the first three aside, make a plateau.

    Return the steps t_fid (last gain of FID so far), t_det (its plateau is seen), t_best (last gain
    of D's loss: the checkpoint to take), t_stop (last row read), None where not reached; and the
    reason: plateau, or the phase in which the rows end, cap_fid or cap_dloss.
    """
    found, best, waited = dict.fromkeys(("t_fid", "t_det", "t_best", "t_stop")), math.inf, 0
    for i, (step, _, _) in enumerate(rows):
        score = np.median([row[1] for row in rows[max(0, i + 1 - fid_window) : i + 1]])
        d_loss = np.mean([row[2] for row in rows[max(0, i + 1 - d_window) : i + 1]])
        found["t_stop"] = step
        if found["t_det"] is None:  # phase 1, features
            if score < best * (1 - fid_tol):
                best, waited, found["t_fid"] = score, 0, step
            else:
                waited += i >= 3
            if waited == fid_patience:
                best, waited, found["t_det"], found["t_best"] = d_loss, 0, step, step
        elif d_loss < best - d_tol * abs(best):  # phase 2, quality; a loss may be negative
            best, waited, found["t_best"] = d_loss, 0, step
        elif (waited := waited + 1) == d_patience:
            return found | {"reason": "plateau"}
    return found | {"reason": "cap_dloss" if found["t_det"] else "cap_fid"}


def build(args: Args, device: torch.device) -> tuple[dict[str, nn.Module], nn.Module]:
    """Return the networks by name, and the generator to show: the averaged one if there is one."""
    nets = {"G": Generator(args).to(device), "D": Discriminator(args).to(device)}
    if args.ema_decay:  # buffers are copied: an averaged u would break spectral norm
        nets["ema"] = AveragedModel(nets["G"], multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    return nets, nets["ema"].module if args.ema_decay else nets["G"]


def eval_noise(args: Args, count: int) -> Tensor:
    """Return the noise (count, z_dim) of grids, samples and evaluations, the same for all runs."""
    return torch.randn(count, args.z_dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def generate(G: nn.Module, *inputs: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W) of noise (N, z_dim) and G's other inputs, in eval mode."""
    training, device = G.training, next(G.parameters()).device
    G.eval()
    chunks = zip(*(x.split(100) for x in inputs))
    images = torch.cat([G(*(x.to(device) for x in chunk)) for chunk in chunks])
    G.train(training)
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def score(args: Args, inception: nn.Module, G: nn.Module, images: Tensor, file: Path) -> dict:
    """Return FID and Inception Score of G against images (N, C, S, S), of the array file `file`."""
    count, z = min(args.fid_real or len(images), len(images)), eval_noise(args, args.fid_num)
    if count < len(images):
        images = images[torch.arange(count) * len(images) // count]
    cache = file.with_name(f"{file.stem}-{count}-{inception.protocol['sha256'][:8]}.npz")
    real = fid.dataset_moments(inception, images, 100, cache)
    scores = fid.score_generator(
        inception, lambda i, n: generate(G, z[i : i + n]), args.fid_num, 100, real
    )
    print(", ".join(f"{name} {value:.6g}" for name, value in scores.items()), inception.label)
    return scores


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: print a checkpoint's scores and write them to evaluate.json beside it."""
    device, path = setup(args)[0], find_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, _, file = load_images(args, device)
    nets, G = build(args, device)
    about = {"step": load(path, nets)["step"], **inception.protocol}
    scores = about | score(args, inception, G, images, file)
    path.with_name("evaluate.json").write_text(json.dumps(scores, indent=2))
    return scores


@torch.no_grad()
def draw_attention(G: nn.Sequential, z: Tensor, query: tuple) -> Tensor:
    """Return the cells of Figure 2: for each image and block a row, the image and its queries.

    z (N, z_dim); query: Q places y, x in 64ths of the side -> (N * blocks * (1 + Q), 3, 128, 128)
    in [0, 1]. The brighter a place, the more the red dot takes of it.
    """
    images = F.interpolate(generate(G, z).cpu() / 255, 128)
    cells, maps = [], z.to(next(G.parameters()).device)
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    for layer in G.eval():
        if isinstance(layer, FusedSelfAttention):
            attn, side = layer.attention_map(maps).cpu(), maps.shape[3]
            cells.append(images)
            for y, x in query:
                heat = attn[:, y * side // 64 * side + x * side // 64].view(-1, 1, side, side)
                heat = F.interpolate(heat, 128, mode="bilinear") / heat.amax((2, 3), keepdim=True)
                cells.append(0.3 * images + 0.7 * heat)
                cells[-1][..., 2 * y : 2 * y + 4, 2 * x : 2 * x + 4] = red
        maps = layer(maps)
    return torch.stack(cells, 1).flatten(0, 1)


def sample(args: Args) -> None:
    """Mode sample: images of G and what they attend to (Figure 2), or a comparison of --runs."""
    if args.runs:
        return compare_milestones(args)
    device, path = setup(args)[0], find_checkpoint(args)
    nets, G = build(args, device)
    step, z = load(path, nets)["step"], eval_noise(args, args.num_samples)
    folder, images = path.parent / f"generated/{step}", generate(G, z).cpu() / 255
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_image(image, folder / f"{i:05d}.png")
    grid = path.with_name(f"generated-{folder.name}.png")  # not among what fid.py reads
    save_image(images, grid, nrow=math.isqrt(len(images)))
    print(f"{len(images)} images in {folder}, a grid in {grid}")
    if args.attn_g and args.attention in ("full", "no-d"):
        cells = draw_attention(G, z[:4], args.query)
        save_image(cells, path.with_name("attention.png"), nrow=1 + len(args.query))


def compare_milestones(args: Args) -> None:
    """Draw samples of --runs from equal noise, one row per run, at milestones they all kept."""
    runs, device = [Path(run).expanduser() for run in args.runs], torch.device("cpu")
    names = set.intersection(*({path.name for path in run.glob("step-*.pt")} for run in runs))
    if not names:
        raise ValueError("--runs must have kept a common milestone, got no step-*.pt in all")
    for name in sorted(names):
        rows = []
        for run in runs:
            flags = Args(**torch.load(run / name, device, weights_only=True)["args"])
            nets, G = build(flags, device)
            load(run / name, nets)
            rows.append(generate(G, eval_noise(flags, 8)))
        path = Path(args.out_dir, f"compare-{name}").expanduser().with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.cat(rows) / 255, path, nrow=8)
        print(f"{path}: a row each for {', '.join(run.name for run in runs)}")


# ---- 9. Training ---------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; return the last scores."""
    device, amp, scaler = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, file = load_images(args, device)
    torch.manual_seed(args.seed)
    nets, shown = build(args, device)
    G, D = nets["G"], nets["D"]
    history = {"rows": [], "sum": 0.0, "count": 0}  # sum: of D's losses since the last row
    stored = SimpleNamespace(
        state_dict=lambda: history | {"sum": float(history["sum"])}, load_state_dict=history.update
    )
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    g_opt, d_opt = adam(G.parameters(), args.g_lr), adam(D.parameters(), args.d_lr)
    parts = {"g_opt": g_opt, "d_opt": d_opt, "scaler": scaler, "history": stored}
    run = Run(args, file.parent.name, nets | parts)
    data = batches(args, images, labels, device, run.step * args.n_critic)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    learned = nn.ModuleDict({"G": G, "D": D}).named_parameters()
    gammas = {f"gamma/{name}": p for name, p in learned if name.endswith("gamma")}
    found, end = stopping_rule(history["rows"]), "plateau" if args.early_stop else ""
    while run.step < args.total_steps and not STOP and found["reason"] != end:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        for _ in range(args.n_critic):
            real, _ = next(data)
            with amp:
                with torch.no_grad():
                    fake = G(draw(torch.randn, noise, n, args.z_dim)).float()
                real_logits, fake_logits = D(real).float(), D(fake).float()
            d_loss = d_real(real_logits).mean() + d_fake(fake_logits).mean()  # Eq. 2
            update(d_opt, D, d_loss, scaler)
        with amp:
            g_loss = g_fake(D(G(draw(torch.randn, noise, n, args.z_dim))).float()).mean()  # Eq. 3
        update(g_opt, G, g_loss, scaler)
        if args.ema_decay:
            nets["ema"].update_parameters(G)
        history.update(sum=history["sum"] + d_loss.detach(), count=history["count"] + 1)
        run.log({
            "loss/d": d_loss, "loss/g": g_loss, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), **gammas,
        })  # fmt: skip
        milestone = RANK == 0 and run.step in args.milestones
        if run.due(args.sample_every) or milestone:
            grid = generate(shown, eval_noise(args, args.num_samples)) / 255
            save_image(grid, run.folder / f"samples/{run.step:07d}.png", nrow=math.isqrt(len(grid)))
        if run.due(args.eval_every):
            scores = score(args, inception, shown, images, file)
            run.write({f"metric/{name}": value for name, value in scores.items()})
            mean = float(history["sum"]) / history["count"]
            history["rows"].append((run.step, scores["fid"], mean))
            history.update(sum=0.0, count=0)
            found = stopping_rule(history["rows"])
            if scores["fid"] < run.best[0]:
                run.best = scores["fid"], run.step
                run.save("best.pt")
            for name in ("t_fid", "t_best"):
                if found[name] == run.step:
                    run.save(f"{name}.pt")
        if milestone:
            run.save(f"step-{run.step:07d}.pt")
        if run.due(args.save_every):
            run.save("checkpoint.pt")
    if STOP or found["reason"] == end:
        run.save("checkpoint.pt")
    best = f", lowest FID {run.best[0]:.6g} at step {run.best[1]}" if run.best[1] else ""
    print(f"{run.folder}: step {run.step}{best}")
    print("stopping rule:", ", ".join(f"{name} {value}" for name, value in found.items()))
    return scores


# ---- 10. Main ------------------------------------------------------------------------------------
def stop(number: int, frame: object) -> None:
    """Let the training end after this step; a second signal interrupts it."""
    STOP.append(number)
    signal.signal(number, signal.default_int_handler)


def main() -> None:
    """Run the command line; exit with code 2 and one line if what the user gave cannot work."""
    STOP.clear()
    sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # odd file names
    try:
        args = parse()
        if args.dry_run:
            nets, _ = build(args, torch.device("cpu"))
            params = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
            return print(json.dumps({"args": asdict(args), "params": params}))
        # torchrun kills what has not ended 30 s after a signal: it relies on --save-every.
        if args.mode == "train" and WORLD == 1:
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        {"train": train, "evaluate": evaluate, "sample": sample}[args.mode](args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be evaluating
        dist.destroy_process_group()  # its threads must not outlive the interpreter
    if STOP:
        print("stopped: add --resume to go on")
        raise SystemExit(128 + STOP[0])


if __name__ == "__main__":
    main()
