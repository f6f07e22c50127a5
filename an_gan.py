# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""Attentive Normalization for Conditional Image Generation (Wang et al., CVPR 2020), class labels.

Learned filters split a feature map softly into n regions; each is normalised by its own statistics,
and their blend is added back (attentive normalization, AN), in place of self-attention, at a cost
linear in the pixels. Hinge GAN with spectral norm (SN), conditional batch norm in G, projection in
D. Baselines of Table 1: AC-GAN, SN-GAN (SN in D only), SN-GAN* (in both networks), SA-GAN.

    python an_gan.py --dataset imagenet --data-dir imagenet      # Table 1, AN, ImageNet 128x128
    python an_gan.py --dataset cifar10 --model sagan             # self-attention, CIFAR-10
    python an_gan.py --dataset folder --data-dir photos          # a subfolder for each class
    python an_gan.py --dataset imagenet --data-dir imagenet --mode evaluate --intra-num 5000

Differences from the paper
 1. The supplement with the layers was not at hand: the networks are those of the bases that the
    paper names, SAGAN and SNGAN-projection, with five blocks in D as its text says.
 2. Statistics of a region are weighted by its mask: instance norm where the layout is uniform, that
    of the region where it is 0/1. Eq. 5 as printed (`--an-reading literal`) is neither.
 3. A 1x1 convolution of the features is normalised, as in Figure 2; Eq. 5 has none.
 4. AN takes the place of the second conditional batch norm of G's third block: Section 5.4 says
    that labels are missing there. In D it stands before the first activation.
 5. Not stated: the weight of the orthogonality (1e-3; 2e-4 in the authors' code for inpainting),
    the max-pool of the keys (2x2), biases, orthonormal entity filters at the start. These are not
    under SN, which would hide their scale. Positions are drawn for each image, all different.
 6. So the layout is nearly uniform at first (entropy above 0.999 of ln n): AN starts as plain
    instance norm. `an/entropy_g` in the log shows whether it leaves that state.
 7. Not stated: Xavier-uniform weights, one D step, no mirroring, no average of the weights. SN-GAN
    and AC-GAN have the rates and the five D steps of SNGAN-projection, but not its decay. AC-GAN's
    D learns classes from real images only; in its own paper from generated ones, too.
 8. Labels of generated images are as frequent as in the data. Before images are drawn, batch norm's
    statistics are re-estimated without self-sampling.
 9. Data sets other than ImageNet are ours: 32x32, batch 64, 100,000 steps, both rates 2e-4,
    mirrored images, an averaged generator (0.999). So is mixed precision on CUDA.
"""

# ---- 1. Imports ----------------------------------------------------------------------------------
import copy
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
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageColor, ImageDraw, ImageOps
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
    total_steps: int = 1_000_000  # generator updates to train for (Table 1)
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 5_000  # steps between sample grids; 0: none
    eval_every: int = 20_000  # steps between evaluations; 0: none
    save_every: int = 5_000  # steps between checkpoints; 0: none
    num_samples: int = 80  # images of a sample grid and of mode sample
    fid_num: int = 50_000  # generated images of an evaluation
    fid_real: int = 0  # real images of an evaluation, spread over the data set; 0: all
    fid_weights: str = "auto"  # Inception weights: auto (download), a path, or random (for tests)
    intra_num: int = 0  # generated images of each class for the intra-FID of evaluate; 0: none
    classes: tuple[int, ...] = ()  # classes of intra-FID (empty: all), pictures (empty: first 10)
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal["imagenet", "cifar10", "folder", "shapes"] = "imagenet"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 128  # side of the square images in pixels
    crop: int = 0  # side of the central square cut out first, in pixels; 0: the short side
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    num_classes: int = 0  # classes; 0: as many as --dataset folder has subfolders
    # Model
    model: Literal["an", "sagan", "sngan-star", "sngan", "acgan"] = "an"
    """row of the paper's tables"""
    z_dim: int = 128  # length of the noise vector
    g_ch: int = 64  # base width of the generator, in channels
    d_ch: int = 64  # base width of the discriminator, in channels
    entities: int = 16  # entities n of attentive normalization (Table 4)
    region_stats: Literal["in", "bn"] = "in"  # a region's statistics: image or batch (Table 4)
    self_sampling: bool = True  # let sampled positions attract the layout in training (Table 4)
    tau: float = 0.1  # factor of the layout's logits in the softmax over the entities
    an_reading: Literal["weighted", "literal"] = "weighted"  # a region's weights: mask, or Eq. 5's
    # Optimisation
    batch_size: int = 256  # images per update, shared out over the processes
    n_critic: int = 1  # discriminator updates per generator update
    g_lr: float = 1e-4  # learning rate of the generator
    d_lr: float = 4e-4  # learning rate of the discriminator
    beta1: float = 0.0  # Adam's decay rate of the gradient's mean
    beta2: float = 0.999  # Adam's decay rate of the squared gradient's mean
    lambda_ortho: float = 1e-3  # weight of the orthogonality of the entities' filters (Table 4)
    ema_decay: float = 0.0  # decay of the averaged generator; 0: none, as in the paper
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""


SNGAN = {"g_lr": 2e-4, "d_lr": 2e-4, "beta2": 0.9, "n_critic": 5}
SMALL = {
    "img_size": 32, "batch_size": 64, "total_steps": 100_000, "g_lr": 2e-4, "d_lr": 2e-4,
    "hflip": True, "ema_decay": 0.999,
}  # fmt: skip
DEFAULTS = {  # what a row or a data set changes; flags that are given win
    ("model", "an"): {"total_steps": 880_000},
    ("model", "sngan"): SNGAN,
    ("model", "acgan"): SNGAN,
    ("dataset", "imagenet"): {"num_classes": 1000},
    ("dataset", "cifar10"): {"num_classes": 10, **SMALL},
    ("dataset", "folder"): SMALL,
    ("dataset", "shapes"): {"num_classes": 8, **SMALL},
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
    cuda = args.device != "cuda" or torch.cuda.is_available()
    yield cuda, "--device must be cpu where PyTorch finds no GPU, got cuda"
    yield 0 <= args.seed < 2**32, f"--seed must be from 0 to 2**32 - 1, got {args.seed}"
    yield args.fid_num >= 10, f"--fid-num must be at least 10, got {args.fid_num}"
    real = args.fid_real
    yield real == 0 or real > 1, f"--fid-real must be 0 or at least 2, got {real}"
    n, size, entities, intra = args.batch_size, args.img_size, args.entities, args.intra_num
    yield n > 0 and n % WORLD == 0, f"--batch-size must be a multiple of {WORLD}, got {n}"
    training, path, folder = args.mode == "train", find_checkpoint(args), run_folder(args)
    yield training or WORLD == 1, f"--mode {args.mode} must have 1 process, got {WORLD}"
    there = path.exists() or (training and not args.checkpoint)
    yield there, f"{path} does not exist: train first, or name a --checkpoint"
    new = not training or args.resume or args.dry_run or RANK > 0 or not folder.exists()
    yield new, f"--exp-name must be new or go with --resume: {folder} exists"
    yield size in (32, 64, 128), f"--img-size must be 32, 64 or 128, got {size}"
    yield 0 < entities <= 256, f"--entities must be from 1 to 256, got {entities}"
    yield intra == 0 or intra >= 10, f"--intra-num must be 0 or at least 10, got {intra}"
    count = args.num_classes or math.inf  # of a folder they are counted later
    inside = all(0 <= label < count for label in args.classes)
    yield inside, f"--classes must be from 0 to {count - 1}, got {args.classes}"


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


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with the scale and shift of a class (SNGAN-projection): (N, C, H, W), y -> same.

    y is class indices (N,), or weights (N, K) that mix the classes (Figure 8).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma = nn.Parameter(torch.ones(classes, channels))
        self.beta = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pick = torch.matmul if y.is_floating_point() else F.embedding
        gamma, beta = (pick(y, t).to(x.dtype)[..., None, None] for t in (self.gamma, self.beta))
        return torch.addcmul(beta, self.norm(x), gamma)


class AttentiveNorm(nn.Module):
    """Attentive normalization: instance norm of n soft regions that the features themselves choose.

    (N, C, H, W) -> (N, C, H, W). The layout S (N, n, H, W) is a softmax over n entities. The pixels
    v of a region are normalised by its own mean and deviation, scaled by beta and shifted by alpha,
    and the regions are blended by S (Eq. 5). The gain rho starts at 0: the module starts as the
    identity. With P = H W pixels, mean and variance of a region are, for `an_reading`,
      weighted  sum S v / sum S    sum S (v - mean)^2 / sum S
      literal   sum S v / P        sum (S v - mean)^2 / P
    By products of (n, P) and (P, C) matrices: nothing of size (N, n, C, P) is ever built.
    """

    def __init__(self, channels: int, args: Args) -> None:
        super().__init__()
        n, inner = args.entities, max(1, channels // 8)
        self.tau, self.sampling, self.momentum = args.tau, args.self_sampling, 0.1
        self.weighted, self.batch = args.an_reading == "weighted", args.region_stats == "bn"
        self.entity = nn.Conv2d(channels, n, 1, bias=False)  # f(X) = W X
        nn.init.orthogonal_(self.entity.weight)
        self.value = nn.Conv2d(channels, channels, 1)
        if self.sampling:
            self.key, self.query = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
            self.t = nn.Parameter(torch.full((n,), 0.1))
        self.beta = nn.Parameter(torch.ones(n, channels))  # the scale, against habit
        self.alpha = nn.Parameter(torch.zeros(n, channels))  # the shift
        self.rho = nn.Parameter(torch.zeros(()))
        if self.batch:
            self.register_buffer("running_mean", torch.zeros(n, channels))
            self.register_buffer("running_var", torch.ones(n, channels))

    def activation(self, x: Tensor) -> Tensor:
        """Return F (N, n, H, W), the likeness of each position to n of the max-pooled keys.

        F_ij = k(x_i)^T q(x_j). Each image draws its n positions i anew at each call, all different.
        """
        key, query = F.max_pool2d(self.key(x), 2).flatten(2), self.query(x).flatten(2)
        where = torch.rand(key[:, :1].shape, device=x.device).topk(len(self.t)).indices  # (N, 1, n)
        sampled = key.gather(2, where.expand(-1, key.shape[1], -1))
        with autocast(x.device.type, enabled=False):
            product = sampled.to(self.t.dtype).transpose(1, 2) @ query.to(self.t.dtype)
            return product.unflatten(2, x.shape[2:])

    def layout(self, x: Tensor) -> Tensor:
        """Return S (N, n, H, W), fp32, of x (N, C, H, W): shares of the entities that sum to 1.

        S = softmax(tau (t F + f(X))). Outside training t is 0: X alone decides.
        """
        raw = self.entity(x).to(self.beta.dtype)  # parameters stay in fp32 under autocast
        if self.sampling and self.training:
            raw = raw + self.t[:, None, None] * self.activation(x)
        return (self.tau * raw).softmax(dim=1)

    def statistics(self, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (N, n, C), or (1, n, C) of the batch, of v (N, C, P) in s."""
        count, weight = (s, s) if self.weighted else (torch.ones_like(s), s.square())
        sums = count.sum(dim=2, keepdim=True), s @ v.mT, weight @ v.square().mT
        mass, first, second = (x.sum(dim=0, keepdim=True) if self.batch else x for x in sums)
        mean = first / (mass + 1e-6)
        return mean, second / (mass + 1e-6) - mean.square()

    def regional_norm(self, v: Tensor, s: Tensor) -> Tensor:
        """Normalise v (N, C, P) in each of the regions s (N, n, P) and blend them, in fp32."""
        # The variance is a difference of two sums that a large mean would drown. Shifting v cancels
        # in the weighted reading: the gradient of the shift is zero.
        centre = v.detach().mean((0, 2) if self.batch else 2, keepdim=True) * self.weighted
        v, centre = v - centre, centre.transpose(1, 2)
        if self.batch and not self.training:
            mean, var = self.running_mean - centre, self.running_var
        else:
            mean, var = self.statistics(v, s)
        if self.batch and self.training:
            self.running_mean.lerp_((mean + centre)[0].detach(), self.momentum)
            self.running_var.lerp_(var[0].detach(), self.momentum)
        sigma = var.clamp_min(1e-12).sqrt()  # the root of zero has no gradient
        gain = self.beta / (sigma + 1e-5)
        shift = self.alpha - mean * gain
        # Eq. 5: sum over i of ((v - mean_i) / (sigma_i + eps) * beta_i + alpha_i) * S_i
        return (shift.transpose(-1, -2) @ s).addcmul_(v, gain.transpose(-1, -2) @ s)

    def forward(self, x: Tensor) -> Tensor:
        s, v = self.layout(x).flatten(2), self.value(x).flatten(2)
        with autocast(x.device.type, enabled=False):
            out = self.regional_norm(v.to(s.dtype), s).view(x.shape)
            return torch.addcmul(x.to(out.dtype), self.rho, out).to(x.dtype)


class PooledAttention(nn.Module):
    """Self-attention to 2x2 max-pooled keys and values (SAGAN's code): (N, C, H, W), H, W even.

    The logits are not scaled. The gain gamma starts at 0: the block starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv, inner = partial(nn.Conv2d, kernel_size=1, bias=False), max(1, channels // 8)
        self.query, self.key = conv(channels, inner), conv(channels, inner)
        self.value, self.out = conv(channels, channels // 2), conv(channels // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        key, value = (F.max_pool2d(f(x), 2) for f in (self.key, self.value))
        # Fused kernels never store the map (N, HW, HW / 4), but want queries and keys as wide as
        # the values: zeros fill them up and leave the logits alone.
        fill = [0, 0, 0, 0, 0, value.shape[1] - key.shape[1]]
        maps = F.pad(query, fill), F.pad(key, fill), value
        rows = (m.flatten(2).transpose(1, 2)[:, None].contiguous() for m in maps)
        out = F.scaled_dot_product_attention(*rows, scale=1.0)[:, 0].transpose(1, 2)
        return x + self.gamma * self.out(out.unflatten(2, x.shape[2:]))


# ---- 4. Networks ---------------------------------------------------------------------------------
def init_network(net: nn.Module, enabled: bool = True) -> None:
    """Give all layers but AN's entity filters Xavier weights, zero biases and spectral norm."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)) and "entity" not in name:
            nn.init.xavier_uniform_(layer.weight)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
            sn(layer, enabled)  # last: what is written to a weight under spectral norm is lost
    net.to(memory_format=torch.channels_last)  # faster on CPUs and under mixed precision


class UpBlock(nn.Module):
    """Residual block of G: (N, c_in, H, W), y -> (N, c_out, 2H, 2W); `an`: norm2 is AN."""

    def __init__(self, c_in: int, c_out: int, args: Args, an: bool) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(c_in, args.num_classes)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.an = AttentiveNorm(c_out, args) if an else None
        self.norm2 = None if an else ConditionalBatchNorm2d(c_out, args.num_classes)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, y)), scale_factor=2))
        h = self.conv2(F.relu(self.an(h) if self.an else self.norm2(h, y)))
        # A 1x1 convolution and nearest upsampling commute: a quarter of the work in this order.
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DownBlock(nn.Module):
    """Residual block of D: (N, c_in, H, W) -> (N, c_out, H/2, W/2), or of the same shape.

    `an` is its AN module or the identity. The first block takes the image as it is: without a ReLU.
    """

    def __init__(self, c_in: int, c_out: int, down: bool, an: nn.Module) -> None:
        super().__init__()
        self.relu = nn.Identity() if c_in == 3 else nn.ReLU()
        self.conv1, self.an = nn.Conv2d(c_in, c_out, 3, padding=1), an
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if down else nn.Identity()
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.an(self.conv1(self.relu(x)))))
        return self.pool(h) + self.shortcut(self.pool(x))  # a 1x1 convolution and a mean commute


class Generator(nn.Module):
    """Noise z (N, z_dim), y -> images (N, 3, img_size, img_size) in [-1, 1].

    y is class indices (N,) or weights (N, num_classes) that mix the classes. Blocks double the map
    from 4x4 on; AN is in the third one, at 32x32, and self-attention follows it.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        units = {32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1)}[args.img_size]
        widths = [args.g_ch * unit for unit in units]
        self.linear, self.blocks = nn.Linear(args.z_dim, widths[0] * 16), nn.ModuleList()
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            self.blocks.append(UpBlock(c_in, c_out, args, an=args.model == "an" and i == 2))
        self.attention = PooledAttention(widths[3]) if args.model == "sagan" else nn.Identity()
        self.norm = nn.BatchNorm2d(widths[-1])
        self.out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        init_network(self, args.model in ("an", "sagan", "sngan-star"))
        self.register_buffer("class_counts", torch.ones(args.num_classes))  # `train` counts them

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, 4, 4))
        for i, block in enumerate(self.blocks):
            x = self.attention(block(x, y)) if i == 2 else block(x, y)
        return torch.tanh(self.out(F.relu(self.norm(x))))

    def labels(self, shape: tuple[int], generator: torch.Generator, device: Any = "cpu") -> Tensor:
        """Draw classes (N,) as frequent as in the data; called as torch.randn is."""
        return self.class_counts.to(device).multinomial(*shape, True, generator=generator)


class Discriminator(nn.Module):
    """Images (N, 3, img_size, img_size), classes y (N,) -> logits (N,), loss of the class logits.

    Projection (Miyato & Koyama 2018) adds <embed(y), h> to the logit; the loss is 0. AC-GAN's logit
    does not see y; the loss is its classifier's cross-entropy. AN is in the first block, on the
    image's size; self-attention follows the block that leaves 32x32 (16x16 of 32x32 images).
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        size, blocks = args.img_size, []
        widths = [args.d_ch * unit for unit in ([2, 2, 2, 2] if size == 32 else [1, 2, 4, 8, 16])]
        for i, (c_in, c_out) in enumerate(itertools.pairwise([3, *widths])):
            an = AttentiveNorm(c_out, args) if args.model == "an" and i == 0 else nn.Identity()
            blocks.append(DownBlock(c_in, c_out, size > 32 or i < 2, an))
            if args.model == "sagan" and i == (1 if size == 128 else 0):
                blocks.append(PooledAttention(c_out))
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(widths[-1], 1)
        if args.model == "acgan":
            self.classify = nn.Linear(widths[-1], args.num_classes)
        else:
            self.embed = nn.Embedding(args.num_classes, widths[-1])
        init_network(self)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.blocks(x))
        with autocast(x.device.type, enabled=False):
            h = h.to(self.linear.bias.dtype).sum(dim=(2, 3))
            logits = self.linear(h).squeeze(1)
            if hasattr(self, "classify"):
                return logits, F.cross_entropy(self.classify(h), y)
            return logits + (self.embed(y) * h).sum(dim=1), logits.new_zeros(())


# ---- 5. Losses -----------------------------------------------------------------------------------
def orthogonality(net: nn.Module) -> Tensor:
    """Return the sum over a network's AN modules of ||W W^T - I||_F^2, W (n, C) entity filters.

    The authors' code sums the signed entries of W^T W - I: that sum is least where the filters
    cancel one another, not where they are orthogonal.
    """
    penalty = torch.zeros((), device=next(net.parameters()).device)
    for module in net.modules():
        if isinstance(module, AttentiveNorm):
            w = module.entity.weight.flatten(1)
            penalty = penalty + (w @ w.T - torch.eye(len(w), device=w.device)).square().sum()
    return penalty


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
    try:
        if args.dataset == "cifar10":
            source = datasets.CIFAR10(root, download=True)
            return lambda i: source[i][0], source.targets, []
        if args.dataset == "imagenet":
            root /= "train"
            if not root.exists():
                datasets.ImageNet(root.parent, "train")  # unpacks its archives
    except Exception as error:
        raise OSError(f"--dataset {args.dataset} must be in {root}: {error}") from error
    skip = (args.out_dir, args.cache_dir or root / "cache")
    files = fid.image_files(root, [Path(path).expanduser() for path in skip])
    names = [file.relative_to(root).as_posix() for file in files]
    labels = [name.rpartition("/")[0].split("/")[0] for name in names]
    classes = {name: i for i, name in enumerate(sorted(set(labels)))}
    print(f"{len(files)} images, {len(classes)} classes ({', '.join(classes)[:80]})")
    print("photographs are turned upright, transparent parts become white")
    stats = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, map(os.stat, files))]
    return lambda i: open_image(files[i]), [classes[label] for label in labels], stats


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


@torch.no_grad()
def settled(args: Args, G: Generator) -> Generator:
    """Return a copy of G in eval mode whose batch norms have the statistics without self-sampling.

    In training they see self-sampled maps, and an averaged G those of the last G. Here they are
    means over 100 batches of the training's size, of noise of their own.
    """
    G, device, n = copy.deepcopy(G).eval(), G.class_counts.device, args.batch_size
    noise = torch.Generator().manual_seed(2)
    norms = [m for m in G.modules() if isinstance(m, (nn.BatchNorm2d, AttentiveNorm))]
    for i in range(100):
        for norm in norms:  # their children stay in eval mode
            norm.training, norm.sampling, norm.momentum = True, False, 1 / (i + 1)
        z, y = torch.randn(n, args.z_dim, generator=noise), G.labels((n,), noise)
        G(z.to(device), y.to(device))
    return G.eval()


# differs from giu_gan.py: images of classes y (N,), drawn as frequent as in the data if not given
def score(
    args: Args, inception: nn.Module, G: nn.Module, images: Tensor, file: Path | None, y: Any = None
) -> dict:
    """Return FID and Inception Score of G against images (N, C, S, S); moments go beside `file`."""
    y = G.labels((args.fid_num,), torch.Generator().manual_seed(1)) if y is None else y
    count, z = min(args.fid_real or len(images), len(images)), eval_noise(args, len(y))
    if count < len(images):
        images = images[torch.arange(count) * len(images) // count]
    cache = file and file.with_name(f"{file.stem}-{count}-{inception.protocol['sha256'][:8]}.npz")
    real = fid.dataset_moments(inception, images, 100, cache)
    scores = fid.score_generator(
        inception, lambda i, n: generate(G, z[i : i + n], y[i : i + n]), len(y), 100, real
    )
    print(", ".join(f"{name} {value:.6g}" for name, value in scores.items()), inception.label)
    return scores


def evaluate(args: Args) -> dict[str, Any]:
    """Mode evaluate: print a checkpoint's scores and write them to evaluate.json beside it."""
    device, path = setup(args)[0], find_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, labels, file = load_images(args, device)
    nets, G = build(args, device)
    about = {"step": load(path, nets)["step"], **inception.protocol}
    G = settled(args, G)
    scores, fids = about | score(args, inception, G, images, file), {}
    for label in (args.classes or range(args.num_classes)) if args.intra_num else ():  # Table 2
        print(f"class {label}: ", end="")
        y = torch.full((args.intra_num,), label)
        fids[label] = score(args, inception, G, images[labels == label], None, y)["fid"]
    if fids:
        scores |= {"intra_fid": sum(fids.values()) / len(fids), "intra_fid_per_class": fids}
        print(f"intra-FID {scores['intra_fid']:.6g}, the mean of {len(fids)} classes")
    path.with_name("evaluate.json").write_text(json.dumps(scores, indent=2))
    return scores


def class_grid(args: Args, G: nn.Module) -> tuple[Tensor, list[int]]:
    """Return images (num_samples, C, H, W) in [0, 1], and the classes of the grid's columns."""
    classes = list(args.classes or range(min(10, args.num_classes)))
    y = torch.tensor(classes * args.num_samples)[: args.num_samples]
    return generate(G, eval_noise(args, len(y)), y) / 255, classes


@torch.no_grad()
def an_layout(net: nn.Module, *inputs: Tensor) -> tuple[AttentiveNorm, Tensor, Tensor]:
    """Return a net's AN module, its input (N, C, H, W) and its layout (N, n, H, W) in eval mode."""
    an = next(module for module in net.modules() if isinstance(module, AttentiveNorm))
    seen, training = [], net.training
    with an.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        net.eval()(*(x.to(an.rho.device) for x in inputs))
    layout = an.layout(seen[0])
    net.train(training)
    return an, seen[0], layout


def an_state(name: str, net: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Return the state of a net's AN module for the log.

    rho; entropy of the layout over ln n (1: uniform, AN is plain instance norm); number of entities
    whose mean share is above 0.5 / n (1: one has all); with self-sampling the mean of t.
    """
    an, _, s = an_layout(net, *inputs)
    entropy = torch.special.entr(s).sum(dim=1).mean() / math.log(max(s.shape[1], 2))
    used = (s.mean(dim=(0, 2, 3)) > 0.5 / s.shape[1]).sum()
    state = {"rho": an.rho, "entropy": entropy, "entities": used}
    state |= {"t": an.t.mean()} if an.sampling else {}
    return {f"an/{key}_{name}": value for key, value in state.items()}


def grey(maps: Tensor, size: int) -> Tensor:
    """Return maps (N, H, W) as images (N, 3, size, size), each stretched to [0, 1]."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-12)
    return F.interpolate(scaled[:, None].expand(-1, 3, -1, -1), size)


def region_histograms(x: Tensor, s: Tensor, colours: list[tuple[int, ...]]) -> Tensor:
    """Draw the distribution of features x (C, H, W), and that in the 3 largest regions (Figure 4).

    A region is where its entity has the largest share of s (n, H, W). -> (3, 256, 512) in [0, 1].
    """
    owner, image = s.argmax(dim=0), Image.new("RGB", (512, 256), "white")
    pen, (low, high) = ImageDraw.Draw(image), x.aminmax()
    regions = [("all", "black", owner >= 0)]
    for i in owner.flatten().bincount().topk(min(3, len(owner.unique()))).indices.tolist():
        regions.append((f"entity {i}", colours[i], owner == i))
    for row, (name, colour, region) in enumerate(regions):
        values = x[:, region]
        bars = values.histc(64, low.item(), high.item())
        heights = (256 - 180 * bars / bars.max()).tolist()
        pen.line([(8 * i + 4, height) for i, height in enumerate(heights)], colour, 2)
        text = f"{name}: mean {values.mean():.2f}, std {values.std():.2f}"
        pen.text((8, 4 + 14 * row), text, colour)
    return TF.pil_to_tensor(image) / 255


def interpolation(args: Args, G: nn.Module, classes: list[int]) -> Tensor:
    """Return rows of 8 images of one noise, from each class to the next (Figure 8).

    With AN a second row for each pair: the share of the entity that varies most at the start.
    """
    rows, z = [], eval_noise(args, 1).expand(8, -1)
    for start, end in itertools.pairwise(torch.eye(args.num_classes)[classes]):
        y = torch.lerp(start, end, torch.linspace(0, 1, 8)[:, None])
        rows.append(generate(G, z, y).cpu() / 255)
        if args.model == "an":
            s = an_layout(G, z, y)[2].cpu()
            rows.append(grey(s[:, s[0].flatten(1).var(dim=1).argmax()], args.img_size))
    return torch.cat(rows)


def sample(args: Args) -> None:
    """Mode sample: images; grids of classes (Figure 7) and from class to class (Figure 8).

    With AN, layouts, hard and of each entity (Figure 5), and statistics of regions (Figure 4).
    """
    device, path = setup(args)[0], find_checkpoint(args)
    nets, G = build(args, device)
    step, folder, size = load(path, nets)["step"], path.parent, args.img_size
    G = settled(args, G)
    grid, classes = class_grid(args, G)
    generated = folder / f"generated/{step}"
    generated.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(grid):
        save_image(image, generated / f"{i:05d}.png")
    save_image(grid, folder / f"generated-{step}.png", nrow=math.isqrt(len(grid)))
    print(f"{len(grid)} images in {generated}, a grid in {generated.parent}-{step}.png")
    save_image(grid, folder / "classes.png", nrow=len(classes))
    if len(classes) > 1:
        save_image(interpolation(args, G, classes), folder / "interpolation.png", nrow=8)
    if args.model != "an":
        return
    z, y, n = eval_noise(args, len(classes)), torch.tensor(classes), args.entities
    images = generate(G, z, y).cpu() / 255
    features, layouts = (maps.cpu() for maps in an_layout(G, z, y)[1:])
    colours = [ImageColor.getrgb(f"hsv({360 * i // n},{100 - i % 2 * 45}%,90%)") for i in range(n)]
    hard = torch.tensor(colours)[layouts.argmax(dim=1)].permute(0, 3, 1, 2)
    hard = F.interpolate(hard / 255, size)
    maps = grey(layouts.flatten(0, 1), size).unflatten(0, layouts.shape[:2])
    rows = torch.cat([images[:, None], hard[:, None], maps], dim=1).flatten(0, 1)
    save_image(rows, folder / "layouts.png", nrow=2 + n)
    panels = torch.stack([region_histograms(*pair, colours) for pair in zip(features, layouts)])
    pairs = F.interpolate(torch.cat([images, hard], dim=3), (256, 512))
    save_image(torch.cat([pairs, panels], dim=3), folder / "regions.png", nrow=1)


# ---- 9. Training ---------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; return the last scores."""
    device, amp, scaler = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, file = load_images(args, device)
    counts = labels.bincount(minlength=args.num_classes)
    if len(counts) > args.num_classes:
        raise ValueError(f"--num-classes must be {len(counts)}, got {args.num_classes}")
    torch.manual_seed(args.seed)
    nets, shown = build(args, device)
    G, D = nets["G"], nets["D"]
    G.class_counts.copy_(counts)
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    g_opt, d_opt = adam(G.parameters(), args.g_lr), adam(D.parameters(), args.d_lr)
    run = Run(args, file.parent.name, nets | {"g_opt": g_opt, "d_opt": d_opt, "scaler": scaler})
    data = batches(args, images, labels, device, run.step * args.n_critic)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        torch.manual_seed(seed_of(args.seed, 3, run.step, RANK + 1))  # of self-sampling
        for _ in range(args.n_critic):
            real, y = next(data)
            z, fake_y = draw(torch.randn, noise, n, args.z_dim), draw(G.labels, noise, n)
            with amp:
                with torch.no_grad():
                    fake = G(z, fake_y).float()
                # One by one: with --region-stats bn a joint batch would mix their statistics.
                (real_logits, d_class), (fake_logits, _) = D(real, y), D(fake, fake_y)
            # The hinge loss; the paper prints min(1 - D), without the zero that it is cut at.
            d_loss = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
            d_ortho = orthogonality(D)
            update(d_opt, D, d_loss + d_class + args.lambda_ortho * d_ortho, scaler)
        z, fake_y = draw(torch.randn, noise, n, args.z_dim), draw(G.labels, noise, n)
        with amp:
            fake_logits, g_class = D(G(z, fake_y), fake_y)
        g_loss, g_ortho = -fake_logits.mean(), orthogonality(G)
        update(g_opt, G, g_loss + g_class + args.lambda_ortho * g_ortho, scaler)
        if args.ema_decay:
            nets["ema"].update_parameters(G)
        run.log({
            "loss/d": d_loss, "loss/g": g_loss, "class/d": d_class, "class/g": g_class,
            "ortho/d": d_ortho, "ortho/g": g_ortho, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(),
        })  # fmt: skip
        if args.model == "an" and run.due(args.log_every):
            run.write(an_state("g", G, z[:16], fake_y[:16]) | an_state("d", D, real[:16], y[:16]))
        if run.due(args.sample_every):
            grid, classes = class_grid(args, settled(args, shown))
            save_image(grid, run.folder / f"samples/{run.step:07d}.png", nrow=len(classes))
        if run.due(args.eval_every):
            scores = score(args, inception, settled(args, shown), images, file)
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
        if args.num_classes == 0:  # of a folder: the networks and the rules must know
            with redirect_stdout(None):
                count = len(set(open_dataset(args)[1]))
            args = parse([*sys.argv[1:], "--num-classes", str(count)])
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
