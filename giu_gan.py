# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""GIU-GAN: Global Information Utilization for Generative Adversarial Networks (Tian et al., 2022).

Squeeze-and-excitation re-weights the channels from which an involution builds its kernels (the GIU
module); representative batch norm (RBN) in the generator; spectral norm (SN); WGAN-GP. With the
baselines of the paper's tables: DCGAN, LSGAN, WGAN-GP (+2, +3 layers), SNGAN, SAGAN.

    python giu_gan.py --dataset cifar10 --no-rbn            # Table 8, CIFAR-10 without RBN
    python giu_gan.py --dataset celeba                      # Table 6, CelebA 64x64
    python giu_gan.py --dataset folder --data-dir photos --img-size 64 --ema-decay 0.999
    python giu_gan.py --dataset cifar10 --mode sample       # images, and D's hidden maps

Differences from the paper
 1. The networks are rebuilt from the printed costs: a kernel reduction r1 of 4 (the text says 16),
    batch norm and ReLU after a GIU in G, LeakyReLU after a deep GIU in D.
 2. SN is on the hidden convolutions, not on output layers and GIUs (`--sn all`): not stated.
 3. A GIU of 256 channels has 34,128 parameters; Eq. 11 says 34,048 (biases and norms as C).
 4. Section 3.3 has no batch norm in D, Eq. 5 and the costs have one in its kernel generators. It
    couples the samples of a batch, which the gradient penalty takes for independent:
    `--d-kernel-norm layer` normalises each sample alone, `none` not at all.
 5. RBN replaces the first and the last batch norm of G, GIU stages not counted.
 6. Readings of the baselines: Table 2's Adam for all; hinge loss for SNGAN and SAGAN, cross-entropy
    for DCGAN; SN only in D for SNGAN, none on attention; LeakyReLU in WGAN-GP's G; twice the width
    in DCGAN's G. The third extra layer of WGAN-GP (+3) has 128 channels in G, 64 in D.
 7. One D step per G step: Algorithm 2's inner loop is read as a batch's samples. Initialisation and
    the rest of Adagrad and RMSprop are PyTorch's. CelebA: all 202,599 images (paper: 200,000).
 8. Ours: mixed precision on CUDA (the penalty is in fp32), `--ema-decay` (off by default).
 9. FID and Inception Score are fid.py's, over 1,008 logits where the paper has 1,000 classes. An IS
    of 4.7 beside an FID of 22.7 needs another Inception: compare models, not tables.
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
from dataclasses import asdict, dataclass
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
from torchvision.utils import save_image

import fid

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---- 2. Arguments --------------------------------------------------------------------------------
Placement = Literal[
    "deep-d-shallow-g", "middle", "shallow-d-deep-g", "shallow-d-deep-g-as-costed", "all",
    "only-g", "only-d", "none",
]  # fmt: skip


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
    total_steps: int = 1_000_000  # generator updates to train for
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 5_000  # steps between sample grids; 0: none
    eval_every: int = 100_000  # steps between evaluations; 0: none
    save_every: int = 5_000  # steps between checkpoints; 0: none
    num_samples: int = 64  # images of a sample grid and of mode sample
    fid_num: int = 50_000  # generated images of an evaluation
    fid_real: int = 0  # real images of an evaluation, spread over the data set; 0: all
    fid_weights: str = "auto"  # Inception weights: auto (download), a path, or random (for tests)
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal["cifar10", "celeba", "folder", "shapes"] = "cifar10"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 32  # side of the square images in pixels
    crop: int = 0  # side of the central square cut out first, in pixels; 0: the short side
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    # Model
    model: Literal["giu", "dcgan", "wgan-gp", "lsgan", "sngan", "sagan"] = "giu"
    """row of the paper's tables"""
    z_dim: int = 128  # length of the noise vector
    g_ch: int = 64  # base width of the generator, in channels
    d_ch: int = 64  # base width of the discriminator, in channels
    giu: Placement = "deep-d-shallow-g"  # place of the GIUs (Table 1); as-costed: at 4x4 too
    kernel_size: int = 3  # side of the involution kernels, odd (Table 4)
    group_channels: int = 16  # channels that share an involution kernel (Table 4)
    kernel_reduction: int = 4  # channel reduction r1 of the kernel generator (the text says 16)
    d_kernel_norm: Literal["batch", "layer", "none"] = "batch"  # norm in D's kernel generators
    rbn: bool = True  # representative batch norm as the first and last batch norm of G (Table 8)
    extra_layers: Literal[0, 2, 3] = 0  # 3x3 layers added to wgan-gp at 64x64 (Table 6)
    sn: Literal["hidden", "all"] = "hidden"  # layers under SN (giu, sagan, sngan); all: every one
    # Optimisation
    batch_size: int = 64  # images per update, shared out over the processes (Table 2)
    n_critic: int = 1  # discriminator updates per generator update
    g_lr: float = 2e-4  # learning rate of the generator (Table 2, V3)
    d_lr: float = 2e-4  # learning rate of the discriminator (Table 2, V3)
    beta1: float = 0.0  # Adam's decay rate of the gradient's mean
    beta2: float = 0.9  # Adam's decay rate of the squared gradient's mean
    optimizer: Literal["adam", "adagrad", "rmsprop"] = "adam"  # of both networks (Table 2)
    lambda_gp: float = 10.0  # weight of the gradient penalty
    ema_decay: float = 0.0  # decay of the averaged generator; 0: none, as in the paper
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""


DEFAULTS = {  # what a data set or a row changes; flags that are given win
    ("dataset", "celeba"): {"img_size": 64, "crop": 160},
    ("model", "lsgan"): {"z_dim": 100},
}


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
    n, size, kernel, extra = args.batch_size, args.img_size, args.kernel_size, args.extra_layers
    cuda = args.device != "cuda" or torch.cuda.is_available()
    yield cuda, "--device must be cpu where PyTorch finds no GPU, got cuda"
    yield 0 <= args.seed < 2**32, f"--seed must be from 0 to 2**32 - 1, got {args.seed}"
    yield args.fid_num >= 10, f"--fid-num must be at least 10, got {args.fid_num}"
    real = args.fid_real
    yield real == 0 or real > 1, f"--fid-real must be 0 or at least 2, got {real}"
    yield n > 0 and n % WORLD == 0, f"--batch-size must be a multiple of {WORLD}, got {n}"
    training, path, folder = args.mode == "train", find_checkpoint(args), run_folder(args)
    yield training or WORLD == 1, f"--mode {args.mode} must have 1 process, got {WORLD}"
    there = path.exists() or (training and not args.checkpoint)
    yield there, f"{path} does not exist: train first, or name a --checkpoint"
    new = not training or args.resume or args.dry_run or RANK > 0 or not folder.exists()
    yield new, f"--exp-name must be new or go with --resume: {folder} exists"
    yield size in (32, 64, 128), f"--img-size must be 32, 64 or 128, got {size}"
    yield kernel > 0 and kernel % 2 == 1, f"--kernel-size must be odd, got {kernel}"
    table6 = extra == 0 or (args.model == "wgan-gp" and size == 64)
    yield table6, f"--extra-layers must be 0 except for wgan-gp at 64x64, got {extra}"
    parts = {"group-channels": args.group_channels, "kernel-reduction": args.kernel_reduction}
    for width in giu_widths(args, args.g_ch) | giu_widths(args, args.d_ch):
        for name, part in parts.items():
            divides = part > 0 and width % part == 0
            yield divides, f"--{name} must divide {width} channels of a GIU, got {part}"


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


class SelfAttention(nn.Module):
    """SAGAN's self-attention, (N, C, H, W) -> (N, C, H, W); with gamma at 0 it is the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        attn = (query.transpose(1, 2) @ key).softmax(dim=-1)  # (N, HW, HW), rows sum to 1
        return x + self.gamma * (value @ attn.transpose(1, 2)).view_as(x)


def involution(x: Tensor, kernel: Tensor) -> Tensor:
    """Apply one K x K kernel per position and channel group (Li et al. 2021), zeros outside x.

    x (N, C, H, W); kernel (N, G, K*K, H, W), G dividing C -> (N, C, H, W). With u, v from -(K // 2)
    to K // 2: Y[c, i, j] = sum over u, v of kernel[c * G // C, (u, v), i, j] * X[c, i + u, j + v].

    Views of one padded map take less memory than unfolding: autograd keeps no K*K copies of x. The
    sum and that of x's gradient are in fp32 (in bfloat16 they are 0.7 % off at K = 7), and
    autocast, which would keep fp32 copies of the kernels, is off.
    """
    height, width = x.shape[2:]
    groups, size = kernel.shape[1], math.isqrt(kernel.shape[2])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = F.pad(wide, [size // 2] * 4).unflatten(1, (groups, -1))
    out = torch.zeros_like(padded[..., :height, :width])
    with autocast(x.device.type, enabled=False):
        for k, tap in enumerate(kernel.to(x.dtype).unbind(2)):
            u, v = divmod(k, size)
            out = torch.addcmul(out, tap[:, :, None], padded[..., u : u + height, v : v + width])
    return out.flatten(1, 2).to(x.dtype)


class GIU(nn.Module):
    """Global information utilization: an involution whose kernels see re-weighted channels.

    (N, C, H, W) -> (N, C, H, W). The kernels are built from the scaled features and applied to the
    original ones; there is no softmax over a kernel and no residual connection.
    """

    def __init__(self, channels: int, args: Args, norm: str) -> None:
        super().__init__()
        self.groups = channels // args.group_channels
        inner, taps = channels // args.kernel_reduction, args.kernel_size**2 * self.groups
        r2 = max(1, channels // 16)
        squeeze = nn.Conv2d(channels, r2, 1, bias=False)  # W_a
        excite = nn.Conv2d(r2, channels, 1, bias=False)  # W_b
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
        norms = {"batch": nn.BatchNorm2d, "layer": partial(nn.GroupNorm, 1), "none": nn.Identity}
        self.reduce = sn(nn.Conv2d(channels, inner, 1), args.sn == "all")  # W_2
        self.norm = norms[norm](inner)
        self.span = sn(nn.Conv2d(inner, taps, 1), args.sn == "all")  # W_3

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.se(x) * x  # x~ = s X
        kernel = self.span(F.relu(self.norm(self.reduce(scaled))))  # Eq. 5
        return involution(x, kernel.unflatten(1, (self.groups, -1)))  # of the original X


class RepresentativeBatchNorm2d(nn.Module):
    """Batch norm calibrated by each sample's statistics (Gao et al. 2021): (N, C, H, W), as x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        zero, one = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.w_m, self.w_v, self.w_b = (nn.Parameter(w.clone()) for w in (zero, zero, one))
        self.gamma, self.beta = nn.Parameter(one), nn.Parameter(zero)

    def forward(self, x: Tensor) -> Tensor:
        x_cm = x + self.w_m * x.mean((2, 3), keepdim=True)  # centering calibration
        x_s = self.norm(x_cm)
        gate = torch.sigmoid(self.w_v * x_s.mean((2, 3), keepdim=True) + self.w_b)
        return self.gamma * (x_s * gate) + self.beta  # scaling calibration, affine


# ---- 4. Networks ---------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


def giu_widths(args: Args, base: int) -> set[int]:
    """Channels of the maps that a GIU module follows in a net of base width `base` (Table 1)."""
    deep = set(widths(args, base)[:-2])
    places = {
        "middle": {2 * base},
        "shallow-d-deep-g": {base},
        "shallow-d-deep-g-as-costed": {base} | deep,
        "all": {base, 2 * base} | deep,
        "none": set(),
    }
    return places.get(args.giu, deep) if args.model == "giu" else set()


def lsgan_generator(args: Args) -> list[nn.Module]:
    """LSGAN: 128 channels at 8x8, then nearest upsampling and 3x3 convolutions."""
    first, *outs = [2 * args.g_ch, *widths(args, args.g_ch)[1:]]
    layers = [nn.Linear(args.z_dim, first * 64), nn.Unflatten(1, (first, 8, 8))]
    for channels, out in itertools.pairwise([first, *outs]):
        conv = nn.Conv2d(channels, out, 3, padding=1)
        layers += [nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
    return [*layers, nn.Conv2d(outs[-1], 3, 3, padding=1), nn.Tanh()]


def lsgan_discriminator(args: Args) -> list[nn.Module]:
    """LSGAN: strided 3x3 convolutions with dropout, down to 2x2."""
    layers, outs = [], [args.d_ch // 4, *reversed(widths(args, args.d_ch // 2))]
    for channels, out in itertools.pairwise([3, *outs]):
        norm = [nn.BatchNorm2d(out)] if channels > 3 else []
        conv = nn.Conv2d(channels, out, 3, 2, 1)
        layers += [conv, nn.LeakyReLU(0.2), nn.Dropout2d(0.25), *norm]
    return [*layers, nn.Flatten(), nn.Linear(outs[-1] * 4, 1)]


class Generator(nn.Sequential):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1].

    SNGAN's layout, which all but LSGAN extend; DCGAN has no biases and twice the width.
    """

    def __init__(self, args: Args) -> None:
        model = args.model
        outs = widths(args, args.g_ch * 2 if model == "dcgan" else args.g_ch)
        hidden_sn = model in ("giu", "sagan")
        giu = giu_widths(args, args.g_ch) if args.giu != "only-d" else set()
        extra = [8 * args.g_ch, 4 * args.g_ch, 2 * args.g_ch][: args.extra_layers]  # Table 6
        act, bias = nn.LeakyReLU(0.1) if model == "wgan-gp" else nn.ReLU(), model != "dcgan"
        layers = [nn.Unflatten(1, (args.z_dim, 1, 1))]
        for i, (channels, out) in enumerate(itertools.pairwise([args.z_dim, *outs])):
            stride, padding = (2, 1) if i else (1, 0)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=bias)
            rbn = model == "giu" and args.rbn and i in (0, len(outs) - 1)
            norm = RepresentativeBatchNorm2d(out) if rbn else nn.BatchNorm2d(out)
            layers += [sn(conv, hidden_sn), norm, act]
            if out in giu:
                layers += [GIU(out, args, "batch"), nn.BatchNorm2d(out), act]
            if out in extra:
                layers += [nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), act]
            if model == "sagan" and out in outs[-2:]:
                layers += [SelfAttention(out)]
        conv = nn.ConvTranspose2d(outs[-1], 3, 4, 2, 1, bias=bias)
        layers += [sn(conv, hidden_sn and args.sn == "all"), nn.Tanh()]
        super().__init__(*(lsgan_generator(args) if model == "lsgan" else layers))


class Discriminator(nn.Sequential):
    """Images (N, 3, img_size, img_size) -> logits or critic scores (N,); DCGAN without sigmoid."""

    def __init__(self, args: Args) -> None:
        model, layers = args.model, []
        outs, hidden_sn = widths(args, args.d_ch)[::-1], model in ("giu", "sngan", "sagan")
        giu = giu_widths(args, args.d_ch) if args.giu != "only-g" else set()
        extra = [8 * args.d_ch, 4 * args.d_ch, args.d_ch][: args.extra_layers]  # Table 6
        act, bias = nn.LeakyReLU(0.2 if model == "dcgan" else 0.1), model != "dcgan"
        for channels, out in itertools.pairwise([3, *outs]):
            conv = nn.Conv2d(channels, out, 4, 2, 1, bias=bias)
            norm = [nn.BatchNorm2d(out)] if model == "dcgan" and channels > 3 else []
            layers += [sn(conv, hidden_sn), *norm, act]
            if out in giu:
                layers += [GIU(out, args, args.d_kernel_norm)]
                layers += [act] if out in outs[2:] else []
            if out in extra:
                layers += [nn.Conv2d(out, out, 3, padding=1), act]
            if model == "sagan" and out in outs[-2:]:
                layers += [SelfAttention(out)]
        conv = nn.Conv2d(outs[-1], 1, 4, bias=bias)
        layers += [sn(conv, hidden_sn and args.sn == "all")]
        layers = lsgan_discriminator(args) if model == "lsgan" else layers
        super().__init__(*layers, nn.Flatten(0))


# ---- 5. Losses -----------------------------------------------------------------------------------
# (D real, D fake, G) losses as functions of the logit s; their means over the batch are minimised.
ADVERSARIAL = {
    "wasserstein": (lambda s: -s, lambda s: s, lambda s: -s),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
    "bce": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    "least-squares": (lambda s: (s - 1) ** 2 / 2, lambda s: s**2 / 2, lambda s: (s - 1) ** 2 / 2),
}
LOSS = {"giu": "wasserstein", "wgan-gp": "wasserstein", "sngan": "hinge", "sagan": "hinge"}
LOSS |= {"lsgan": "least-squares", "dcgan": "bce"}


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """E (||grad D(x^)||_2 - 1)^2 at x^ = eps x + (1 - eps) x~, in fp32; eps (N, 1, 1, 1).

    The norm is over all values of a sample; `norm`, unlike a root of squares, has a gradient at 0.
    """
    with autocast(real.device.type, enabled=False):
        mixed = (eps * real + (1 - eps) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


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


def open_dataset(args: Args) -> tuple[Callable[[int], Image.Image], list[int], list[tuple]]:
    """Return the function that reads image i, the labels, and (name, size, time) of the files."""
    root = Path(args.data_dir).expanduser()
    if args.dataset == "shapes":
        return draw_shape, [i % 8 for i in range(5_000)], []
    if args.dataset == "folder":
        skip = (args.out_dir, args.cache_dir or root / "cache")
        files = fid.image_files(root, [Path(path).expanduser() for path in skip])
        names = [file.relative_to(root).as_posix() for file in files]
        labels = [name.rpartition("/")[0].split("/")[0] for name in names]
        classes = {name: i for i, name in enumerate(sorted(set(labels)))}
        print(f"{len(files)} images, {len(classes)} classes ({', '.join(classes)[:80]})")
        print("photographs are turned upright, transparent parts become white")
        stats = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, map(os.stat, files))]
        return lambda i: open_image(files[i]), [classes[label] for label in labels], stats
    try:
        if args.dataset == "cifar10":
            source = datasets.CIFAR10(root, download=True)
        else:
            source = datasets.CelebA(root, "all", [], download=True)
    except Exception as error:  # gdown has its own
        hint = "pip install gdown, or take the pictures alone by --dataset folder --crop 160"
        hint = f"; {hint} --img-size 64" if args.dataset == "celeba" else ""
        raise OSError(f"--dataset {args.dataset} must be in {root}: {error}{hint}") from error
    return lambda i: source[i][0], getattr(source, "targets", [0] * len(source)), []


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


def principal_maps(features: Tensor) -> Tensor:
    """Return the first principal component of maps (N, C, H, W) as (N, 1, H, W) in [0, 1].

    Over the positions, and of the sign that goes with the mean activation (Figures 1 and 2).
    """
    x = features.double().flatten(2)
    y = torch.linalg.svd(x - x.mean(dim=2, keepdim=True), full_matrices=False).Vh[:, :1]
    y = y * (y @ x.mean(dim=1)[..., None]).sign()
    low, high = y.aminmax(dim=2, keepdim=True)
    return ((y - low) / (high - low).clamp_min(1e-12)).view_as(features[:, :1]).float()


@torch.no_grad()
def sample(args: Args) -> None:
    """Mode sample: images of G (Figures 8, 11); hidden maps of D on real images (Figures 1, 2)."""
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
    try:
        x = load_images(args, device)[0][:8].to(device) / 127.5 - 1
    except (OSError, ValueError) as error:
        return print(f"no pca.png: {error}")
    columns, maps = [x / 2 + 0.5], {}
    for layer in nets["D"].eval():
        x = layer(x)
        maps[x.shape[2:]] = x  # the last map of each size
    maps = [x for size, x in maps.items() if size not in ((), (1, 1))]
    columns += [principal_maps(x).expand(-1, 3, -1, -1) for x in maps]
    cells = torch.stack([F.interpolate(column, args.img_size) for column in columns], 1)
    save_image(cells.flatten(0, 1), path.with_name("pca.png"), nrow=len(columns))


# ---- 9. Training ---------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; return the last scores."""
    device, amp, scaler = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, file = load_images(args, device)
    torch.manual_seed(args.seed)
    nets, shown = build(args, device)
    G, D = nets["G"], nets["D"]
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    kinds = {"adam": adam, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[args.optimizer]  # of Table 2
    g_opt, d_opt = optimizer(G.parameters(), args.g_lr), optimizer(D.parameters(), args.d_lr)
    run = Run(args, file.parent.name, nets | {"g_opt": g_opt, "d_opt": d_opt, "scaler": scaler})
    data = batches(args, images, labels, device, run.step * args.n_critic)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    d_real, d_fake, g_fake = ADVERSARIAL[LOSS[args.model]]
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        torch.manual_seed(seed_of(args.seed, 3, run.step, RANK + 1))  # of dropout
        for _ in range(args.n_critic):
            real, _ = next(data)
            with amp:
                with torch.no_grad():
                    fake = G(draw(torch.randn, noise, n, args.z_dim)).float()
                real_logits, fake_logits = D(real).float(), D(fake).float()
            d_loss = d_real(real_logits).mean() + d_fake(fake_logits).mean()
            penalty = torch.zeros((), device=device)
            if LOSS[args.model] == "wasserstein":
                penalty = gradient_penalty(D, real, fake, draw(torch.rand, noise, n, 1, 1, 1))
            update(d_opt, D, d_loss + args.lambda_gp * penalty, scaler)  # Algorithm 2
        with amp:
            g_loss = g_fake(D(G(draw(torch.randn, noise, n, args.z_dim))).float()).mean()
        update(g_opt, G, g_loss, scaler)
        if args.ema_decay:
            nets["ema"].update_parameters(G)
        run.log({
            "loss/d": d_loss, "loss/penalty": penalty, "loss/g": g_loss,
            "logit/real": real_logits.mean(), "logit/fake": fake_logits.mean(),
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
