# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""SAGAN-div: Enhanced Full Attention Generative Adversarial Networks (Chen and Yamane, 2023).

Self-attention after every layer of the generator and none in the discriminator; the Wasserstein
divergence as loss; spectral norm (SN) against instance norm (IN) in four methods, a to d. With the
baselines of Table 2 on the same skeleton: DCGAN, WGAN-div, SNGAN.

    python sagan_div.py                                      # Tables 2 and 3, MNIST, method d
    python sagan_div.py --model c --dataset fashion-mnist    # Table 3, Fashion-MNIST, method c
    python sagan_div.py --model dcgan --recipe author --exp-name dcgan-author
    python sagan_div.py --mode sample --runs RUN_A RUN_B RUN_C RUN_D    # Figures 2 and 3

Differences from the paper
 1. "Every layer" is every hidden one: attention over the image's one channel would be degenerate.
    `--attn all` adds it, before the tanh.
 2. "All positions" is read as in SAGAN's code and the authors': keys and values are max-pooled, a
    quarter of the memory. `--attn-block full` is the literal reading, of as many parameters.
 3. The last layer of G has tanh but no norm: SN is on four of the five deconvolutions of a and b.
    The last layer of D has no norm but SN and no activation, its first no batch or layer norm. No
    convolution has biases, IN no gains.
 4. SN in the attention is not stated for a, b and d; the public code has it. Method c, "with IN
    without SN in D and G", has none there either (`--attn-sn` adds it).
 5. Not stated, from WGAN-div or the public code: k = 2, p = 6, slopes at the images themselves
    (WGAN-div: between them, `--div-points interp`), batch size, N(0, 0.02), LeakyReLU's 0.2.
 6. The baselines have Table 1's networks and their own papers' settings. `--recipe author` is the
    public code's: a tenfold penalty in a to d, Adam's (0.5, 0.999), five D steps; in DCGAN and
    SNGAN batches of 2,048, rates of a to d and cross-entropy with labels of 0.9; in WGAN-div slopes
    at the images and batch norm in D, which mixes the slopes of a batch's samples.
 7. 60,000 steps. The paper's 10,000 epochs are `--total-steps 1874000` for a to d and SNGAN,
    2342500 for WGAN-div, 4680000 for DCGAN; by the recipe `author` 58000 for DCGAN and SNGAN,
    1874000 for the others. Every update draws fresh noise; an epoch drops its last, partial batch.
 8. Ours: mixed precision on CUDA (D's update by the divergence is in fp32), `--ema-decay`.
 9. FID is of 10,000 distinct samples against all training images. The public code repeated 608
    images or fewer to 10,336 files: compare models with each other, not with the published values.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

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
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid, save_image

import fid

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---- 2. Arguments --------------------------------------------------------------------------------
Norm = Literal["none", "sn", "in", "sn+in", "bn", "ln"]  # spectral, instance, batch, layer norm


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
    total_steps: int = 60_000  # generator updates to train for
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 1_000  # steps between sample grids; 0: none
    eval_every: int = 5_000  # steps between evaluations; 0: none
    save_every: int = 1_000  # steps between checkpoints; 0: none
    num_samples: int = 100  # images of a sample grid and of mode sample
    fid_num: int = 10_000  # generated images of an evaluation
    fid_real: int = 0  # real images of an evaluation, spread over the data set; 0: all
    fid_weights: str = "auto"  # Inception weights: auto (download), a path, or random (for tests)
    runs: tuple[str, ...] = ()  # run folders that mode sample sets side by side
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal["mnist", "fashion-mnist", "folder", "shapes"] = "mnist"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 64  # side of the square images in pixels (Table 1)
    channels: Literal[1, 3] = 1  # channels of the images: 1 (grey) or 3 (RGB)
    crop: int = 0  # side of the central square cut out first, in pixels; 0: the short side
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    # Model
    model: Literal["a", "b", "c", "d", "dcgan", "wgan-div", "sngan"] = "d"
    """row of the paper's tables"""
    recipe: Literal["paper", "author"] = "paper"  # whose settings are the defaults
    z_dim: int = 100  # length of the noise vector (Table 1)
    g_ch: int = 64  # base width of the generator, in channels (Table 1)
    d_ch: int = 64  # base width of the discriminator, in channels (Table 1)
    g_norm: Norm = "in"  # norms in the hidden layers of G (Table 3)
    d_norm: Norm = "sn"  # norms in D: sn in all layers, the others in the hidden ones (Table 3)
    attn: Literal["hidden", "all", "none"] = "hidden"  # layers of G that attention follows
    attn_block: Literal["full", "pooled"] = "pooled"  # its keys and values: all, or 2x2 maxima
    attn_sn: bool = True  # spectral norm in the attention
    # Optimisation
    batch_size: int = 64  # images per update, shared out over the processes
    n_critic: int = 5  # discriminator updates per generator update
    g_lr: float = 1e-4  # learning rate of the generator
    d_lr: float = 4e-4  # learning rate of the discriminator
    beta1: float = 0.0  # Adam's decay rate of the gradient's mean
    beta2: float = 0.9  # Adam's decay rate of the squared gradient's mean
    loss: Literal["divergence", "hinge", "bce", "bce-0.9"] = "divergence"  # adversarial loss
    div_k: float = 2.0  # weight k of the divergence's penalty
    div_p: float = 6.0  # power p of the slope in the divergence's penalty
    div_points: Literal["endpoints", "interp"] = "endpoints"  # slopes at images, or between them
    ema_decay: float = 0.0  # decay of the averaged generator; 0: none, as in the paper
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""

    @property
    def row(self) -> tuple[str, str]:
        """Recipe and model, a key of DEFAULTS."""
        return self.recipe, self.model


ADAM = {"beta1": 0.5, "beta2": 0.999}
BASELINE = {"attn": "none", "g_norm": "bn", "g_lr": 2e-4, "d_lr": 2e-4}
AUTHOR = {"loss": "bce-0.9", "g_lr": 1e-4, "d_lr": 4e-4, "batch_size": 2048}
DEFAULTS = {  # what a data set or a row changes; flags that are given win
    ("dataset", "folder"): {"channels": 3},
    ("dataset", "shapes"): {"channels": 3},
    # Table 3: norms in G and in D, published FID on MNIST and Fashion-MNIST
    ("model", "a"): {"g_norm": "sn+in", "d_norm": "sn+in"},  # 86.7291, 127.7808
    ("model", "b"): {"g_norm": "sn", "d_norm": "sn"},  # 59.8766, 107.4283
    ("model", "c"): {"g_norm": "in", "d_norm": "in", "attn_sn": False},  # 101.1107, 153.7099
    ("model", "d"): {"g_norm": "in", "d_norm": "sn"},  # 55.6425, 100.8650
    # Table 2 (d is its SAGAN-div): 45.7734, 86.5129; 83.1224, 104.1503; 26.0231, 46.9646
    ("model", "dcgan"): BASELINE | ADAM | {"d_norm": "bn", "loss": "bce", "n_critic": 1,
                                           "batch_size": 128},
    ("model", "wgan-div"): BASELINE | {"d_norm": "ln", "div_points": "interp", "n_critic": 4},
    ("model", "sngan"): BASELINE | {"d_norm": "sn", "loss": "hinge"},
    # The public code
    ("recipe", "author"): ADAM | {"n_critic": 5, "div_points": "endpoints", "div_k": 20.0},
    ("row", ("author", "c")): {"attn_sn": True},
    ("row", ("author", "dcgan")): AUTHOR,
    ("row", ("author", "sngan")): AUTHOR,
    ("row", ("author", "wgan-div")): {"d_norm": "bn", "div_k": 2.0},
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
    yield args.div_p >= 1, f"--div-p must be at least 1, got {args.div_p}"


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


def gaussian(layer: nn.Module, spectral: bool) -> nn.Module:
    """Draw a layer's weight from N(0, 0.02); put it under spectral norm if `spectral`."""
    nn.init.normal_(layer.weight, std=0.02)
    return sn(layer, spectral)  # last: under it a draw would be lost


class Attention(nn.Module):
    """Attention of each position to all positions: (N, C, H, W) -> (N, C, H, W).

    y = x + gamma W_o o, o_i = sum over j of softmax_j(q_i . k_j) v_j, with q = W_q x, k = W_k x of
    C / 8 channels and v = W_v x. Pooled: k and v are 2x2 max-pooled, v has C / 2 channels. Full: v
    has C channels, no W_o. Either has 1.25 C^2 + 1 weights and starts as the identity: gamma is 0.
    """

    def __init__(self, channels: int, args: Args) -> None:
        super().__init__()
        pooled = args.attn_block == "pooled"
        inner, width = max(1, channels // 8), max(1, channels // 2) if pooled else channels

        def conv(c_in: int, c_out: int) -> nn.Module:
            return gaussian(nn.Conv2d(c_in, c_out, 1, bias=False), args.attn_sn)

        self.query, self.key = conv(channels, inner), conv(channels, inner)
        self.value = conv(channels, width)
        self.pool = nn.MaxPool2d(2) if pooled else nn.Identity()
        self.out = conv(width, channels) if pooled else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Fused kernels never build the HW x HW softmax. They want rows of one width.

        Zeros fill up q and k and leave their products as they are. PyTorch's scale is left out.
        """
        query, key, value = self.query(x), self.pool(self.key(x)), self.pool(self.value(x))
        rows = [maps.flatten(2).mT for maps in (query, key, value)]
        rows = [F.pad(r, (0, value.shape[1] - r.shape[2]))[:, None].contiguous() for r in rows]
        seen = F.scaled_dot_product_attention(*rows, scale=1.0)[:, 0]  # (N, HW, width)
        return x + self.gamma * self.out(seen.mT.unflatten(2, x.shape[2:]))


# ---- 4. Networks ---------------------------------------------------------------------------------
NORMS = {  # "sn+in" takes "in"; "sn" normalises weights, so like "none" it adds no layer
    "in": nn.InstanceNorm2d,  # no gains; the same in training and in eval mode
    "bn": nn.BatchNorm2d,
    "ln": partial(nn.GroupNorm, 1),  # over (C, H, W); gains per channel
}


def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


class Generator(nn.Sequential):
    """Noise z (N, z_dim) -> images (N, channels, img_size, img_size) in [-1, 1] (Table 1).

    Under instance norm only the direction of z counts, but for its eps: the first layer is linear.
    """

    def __init__(self, args: Args) -> None:
        channels, layers = args.z_dim, [nn.Unflatten(1, (args.z_dim, 1, 1))]
        norm = NORMS.get(args.g_norm.split("+")[-1], nn.Identity)
        for i, out in enumerate(widths(args, args.g_ch)):
            stride, padding = (2, 1) if i else (1, 0)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False)
            layers += [gaussian(conv, "sn" in args.g_norm), norm(out), nn.ReLU()]
            layers += [Attention(out, args)] if args.attn != "none" else []
            channels = out
        conv = nn.ConvTranspose2d(channels, args.channels, 4, 2, 1, bias=False)
        layers += [gaussian(conv, False)]
        layers += [Attention(args.channels, args)] if args.attn == "all" else []
        super().__init__(*layers, nn.Tanh())


class Discriminator(nn.Sequential):
    """Images (N, channels, img_size, img_size) -> logits or critic scores (N,) (Table 1)."""

    def __init__(self, args: Args) -> None:
        channels, layers, spectral = args.channels, [], "sn" in args.d_norm
        norm = NORMS.get(args.d_norm.split("+")[-1], nn.Identity)
        for i, out in enumerate(widths(args, args.d_ch)[::-1]):
            conv = nn.Conv2d(channels, out, 4, 2, 1, bias=False)
            normalise = norm if i or norm is nn.InstanceNorm2d else nn.Identity
            layers += [gaussian(conv, spectral), normalise(out), nn.LeakyReLU(0.2)]
            channels = out
        conv = nn.Conv2d(channels, 1, 4, bias=False)
        super().__init__(*layers, gaussian(conv, spectral), nn.Flatten(0))


# ---- 5. Losses -----------------------------------------------------------------------------------
# (D real, D fake, G) losses as functions of the logit s; their means over the batch are minimised.
ADVERSARIAL = {
    "divergence": (lambda s: -s, lambda s: s, lambda s: -s),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
    "bce": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    # With the label 0.9 for real: 0.9 softplus(-s) + 0.1 softplus(s) = softplus(-s) + 0.1 s.
    "bce-0.9": (lambda s: F.softplus(-s) + s / 10, F.softplus, lambda s: F.softplus(-s) + s / 10),
}


def divergence(
    D: nn.Module, real: Tensor, fake: Tensor, u: Tensor | None, k: float, p: float
) -> tuple[Tensor, ...]:
    """Return D's scores (N,) of real and of generated images, its slopes, the penalty; in fp32.

    The slopes ||grad D(x^)||_2, over all values of a sample, are (2N,) at the images or, with u
    (N, 1, 1, 1), (N,) at x^ = x + u (x~ - x). The penalty is k E slope^p: WGAN-GP would first
    subtract 1 from the slope. D minimises it plus E D(x~) - E D(x).
    """
    with autocast(real.device.type, enabled=False):
        points = [real, fake] if u is None else [real, fake, real + u * (fake - real)]
        points = [x.detach().requires_grad_() for x in points]
        scores = [D(x) for x in points]
        # Of the sum: each sample's own gradient, as long as D has no batch norm.
        total, places = torch.cat(scores).sum(), points if u is None else points[2:]
        grads = torch.autograd.grad(total, places, create_graph=True)
        slopes = torch.cat(grads).flatten(1).norm(dim=1)  # unlike a root, it has a gradient at 0
        return *scores[:2], slopes, k * slopes.pow(p).mean()


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


# differs from giu_gan.py: the data sets are this paper's
def open_dataset(args: Args) -> tuple[Callable[[int], Image.Image], list[int], list[tuple]]:
    """Return the function that reads image i, the labels, and (name, size, time) of the files."""
    root = Path(args.data_dir).expanduser()
    if args.dataset == "shapes":
        return draw_shape, [i % 8 for i in range(5_000)], []
    if args.dataset == "folder":
        skip = (args.out_dir, args.cache_dir or root / "cache")
        files = fid.image_files(root, [Path(path).expanduser() for path in skip])
        names = [file.relative_to(root).as_posix() for file in files]
        print(f"{len(files)} images; they are turned upright, transparent parts become white")
        stats = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, map(os.stat, files))]
        return lambda i: open_image(files[i]), [0] * len(files), stats
    kind = datasets.MNIST if args.dataset == "mnist" else datasets.FashionMNIST
    try:
        source = kind(root, download=True)
    except Exception as error:  # a damaged file's may be of any kind
        hint = f"its four idx files, unpacked, belong in {root / kind.__name__ / 'raw'}"
        raise OSError(f"--dataset {args.dataset} must be in {root}: {error}; {hint}") from error
    return lambda i: source[i][0], source.targets.tolist(), []


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


# differs from giu_gan.py: mode sample takes its flags from the first of --runs
def find_checkpoint(args: Args) -> Path:
    """Return --checkpoint or the run's best.pt or checkpoint.pt; training prefers the latter."""
    compared = args.mode == "sample" and args.runs
    folder = Path(args.runs[0]).expanduser() if compared else run_folder(args)
    best, last = folder / "best.pt", folder / "checkpoint.pt"
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
    images, _, file = load_images(args, device, args.channels)
    nets, G = build(args, device)
    about = {"step": load(path, nets)["step"], **inception.protocol}
    scores = about | score(args, inception, G, images, file)
    path.with_name("evaluate.json").write_text(json.dumps(scores, indent=2))
    return scores


def sample(args: Args) -> None:
    """Mode sample: images of G; with --runs, real images and the runs' images side by side."""
    if args.runs:
        return compare_runs(args)
    device, path = setup(args)[0], find_checkpoint(args)
    nets, G = build(args, device)
    folder = path.parent / f"generated/{load(path, nets)['step']}"
    images = generate(G, eval_noise(args, args.num_samples)) / 255
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_image(image, folder / f"{i:05d}.png")
    grid = path.with_name(f"generated-{folder.name}.png")  # not among what fid.py reads
    save_image(images, grid, nrow=math.isqrt(len(images)))
    print(f"{len(images)} images in {folder}, a grid in {grid}")


def compare_runs(args: Args) -> None:
    """Draw a grid of real images, then one of each run from equal noise (Figures 2 and 3)."""
    device, columns = setup(args)[0], {}
    for name in args.runs:
        path = find_checkpoint(replace(args, runs=(name,), checkpoint=""))
        run = Args(**torch.load(path, "cpu", weights_only=True)["args"])
        nets, G = build(run, device)
        print(f"{path}: step {load(path, nets)['step']}")
        columns[name] = generate(G, eval_noise(run, args.num_samples)).cpu()
    run = replace(run, mode=args.mode, data_dir=args.data_dir, cache_dir=args.cache_dir)
    try:
        real = load_images(run, device, run.channels)[0][: args.num_samples].cpu()
        columns = {"real": real} | columns
    except (OSError, ValueError) as error:
        print(f"no real images: {error}")
    count = min(map(len, columns.values()))
    grids = [make_grid(x[:count] / 255, math.isqrt(count)) for x in columns.values()]
    path = Path(args.out_dir).expanduser() / f"{Path(__file__).stem}__{run.dataset}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(grids, path, nrow=len(grids), padding=8, pad_value=1)
    print(f"{path}: {', '.join(columns)}")


# ---- 9. Training ---------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; return the last scores."""
    device, amp, scaler = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, file = load_images(args, device, args.channels)
    torch.manual_seed(args.seed)
    nets, shown = build(args, device)
    G, D = nets["G"], nets["D"]
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    g_opt, d_opt = adam(G.parameters(), args.g_lr), adam(D.parameters(), args.d_lr)
    run = Run(args, file.parent.name, nets | {"g_opt": g_opt, "d_opt": d_opt, "scaler": scaler})
    data = batches(args, images, labels, device, run.step * args.n_critic)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    gains = [layer.gamma for layer in G if isinstance(layer, Attention)]
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        for _ in range(args.n_critic):
            real, _ = next(data)
            with amp, torch.no_grad():
                fake = G(draw(torch.randn, noise, n, args.z_dim)).float()
            penalty = slopes = torch.zeros((), device=device)
            if args.loss == "divergence":
                u = draw(torch.rand, noise, n, 1, 1, 1) if args.div_points == "interp" else None
                found = divergence(D, real, fake, u, args.div_k, args.div_p)
                real_logits, fake_logits, slopes, penalty = found
            else:
                with amp:
                    real_logits, fake_logits = D(real).float(), D(fake).float()
            d_loss = d_real(real_logits).mean() + d_fake(fake_logits).mean()
            update(d_opt, D, d_loss + penalty, scaler)
        with amp:
            g_loss = g_fake(D(G(draw(torch.randn, noise, n, args.z_dim))).float()).mean()
        update(g_opt, G, g_loss, scaler)
        if args.ema_decay:
            nets["ema"].update_parameters(G)
        run.log({
            "loss/d": d_loss, "loss/penalty": penalty, "loss/g": g_loss,
            "slope/mean": slopes.mean(), "slope/max": slopes.max(),
            "logit/real": real_logits.mean(), "logit/fake": fake_logits.mean(),
            **{f"gamma/{i}": gamma for i, gamma in enumerate(gains, 1)},
        })  # fmt: skip
        if run.due(args.sample_every):
            grid = generate(shown, eval_noise(args, args.num_samples)) / 255
            save_image(grid, run.folder / f"samples/{run.step:07d}.png", nrow=math.isqrt(len(grid)))
        if run.due(args.eval_every):
            scores = score(args, inception, shown, images, file)
            run.write({f"metric/{name}": value for name, value in scores.items()})
            if scores["fid"] < run.best[0]:
                run.best = scores["fid"], run.step
                run.save("best.pt")
        if run.due(args.save_every):
            run.save("checkpoint.pt")
    if STOP:
        run.save("checkpoint.pt")
    best = f", lowest FID {run.best[0]:.6g} at step {run.best[1]}" if run.best[1] else ""
    print(f"{run.folder}: step {run.step}{best}")
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
