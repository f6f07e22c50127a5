# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""Attentive Normalization for Conditional Image Generation (Wang et al., CVPR 2020), class labels.

A feature map is split softly into n regions by learned entity filters; each region is normalised by
its own statistics, and the regions are blended and added back (attentive normalization, AN). It
takes the place of self-attention as the long-range module, at a cost linear in the pixels. Hinge
GAN with spectral norm, conditional batch norm and a projection discriminator; the comparisons of
Table 1 are here too: SN-GAN (spectral norm in D only), SN-GAN* (in both), SA-GAN, AC-GAN.

    python an_gan.py --dataset imagenet --data-dir imagenet      # Table 1, AN, ImageNet 128x128
    python an_gan.py --dataset cifar10 --model sagan             # self-attention, CIFAR-10
    python an_gan.py --dataset folder --data-dir photos --img-size 64   # a subfolder per class

Differences from the paper
 1. It refers to a supplement for the layers. The networks are those of the bases that it names,
    SAGAN and SNGAN-projection, with five blocks in the discriminator as its text says.
 2. Statistics of a region are weighted by its mask. Eq. 5 as printed, which does not reduce to
    instance norm for 0/1 masks, and the authors' two forms are --an-reading.
 3. Not stated: the weight of the orthogonality (1e-3), the size of the max-pool (2x2), biases, the
    entities' start (orthonormal). Positions are drawn per image, without replacement.
 4. AN stands where it is between a convolution and its activation, in place of that conditional
    batch norm (--an-place); the paper's Figure 6 leaves this open.
 5. Not stated: Xavier-uniform weights, one discriminator step, no flip, no weight averaging.
 6. Before images are drawn, batch norm's statistics are re-estimated without self-sampling.
 7. SN-GAN's learning rate is not decayed. Its published numbers are of another code base, as are
    most of the table's baselines.
 8. No accumulation of gradients: under batch norm it is not the batch that it stands for.

Evidence: see README.md, "The papers, row by row". The paper's 880,000 steps on ImageNet have not
been run.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports
# --------------------------------------------------------------------------------------------------
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import tyro
from PIL import ImageColor
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

import fid


# --------------------------------------------------------------------------------------------------
# 2. Arguments
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # Run
    mode: Literal["train", "evaluate", "sample", "figures"] = "train"
    """train; or evaluate a checkpoint, sample from it, draw its figures"""
    exp_name: str = ""
    """name of the experiment, part of the run folder's; empty: the model's"""
    seed: int = 1
    """seed of the weights, of the noise and of the order of the data"""
    deterministic: bool = False
    """bit-reproducible kernels on CUDA, slower; the CPU is reproducible without"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU where there is one"""
    out_dir: str = "runs"
    """folder of the run folders"""
    resume: bool = False
    """go on from this run's checkpoint if there is one"""
    checkpoint: str = ""
    """checkpoint to evaluate, sample or draw; empty: checkpoint.pt of this run"""
    dry_run: bool = False
    """print the resolved flags and the parameter counts as JSON and exit"""
    # Data
    dataset: Literal["imagenet", "cifar10", "folder", "shapes"] = "imagenet"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    data_dir: str = "data"
    """folder of the data set and of the cache of its decoded images"""
    download: bool = True
    """fetch the data set if it is not in --data-dir"""
    num_classes: int = 0
    """classes; 0: the data set's (folder: the subfolders); 1: labels are left out of account"""
    img_size: int = 0
    """side of the square images in pixels; 0: the paper's for the data set"""
    crop: int = 0
    """side of the central square cut out first, in pixels; 0: the paper's, else the short side"""
    hflip: bool = False
    """mirror half of the training images, drawn anew each time"""
    num_workers: int = 4
    """processes that decode the images, once"""
    # Model
    z_dim: int = 128
    """length of the noise vector; 0: the paper's for the model"""
    g_ch: int = 64
    """base width of the generator, in channels"""
    d_ch: int = 64
    """base width of the discriminator, in channels"""
    # Optimisation
    total_steps: int = 880_000  # Table 1
    """generator updates to train for"""
    batch_size: int = 256
    """images per update, shared out over the processes"""
    n_critic: int = 1
    """discriminator updates per generator update"""
    g_lr: float = 1e-4
    """learning rate of the generator"""
    d_lr: float = 4e-4
    """learning rate of the discriminator"""
    beta1: float = 0.0
    """Adam's decay rate of the gradient's mean"""
    beta2: float = 0.999
    """Adam's decay rate of the squared gradient's mean"""
    # Speed
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA has it, else fp16, off on the CPU"""
    compile: bool = False
    """compile the networks' passes by torch.compile, but for those of a gradient penalty"""
    cuda_graphs: bool = False
    """record an update's kernels and launch them as one: for small networks on one GPU"""
    # Intervals, in steps; the last step counts as each of them
    log_every: int = 100
    """steps between lines of the log"""
    sample_every: int = 5_000
    """steps between sample grids; 0: none"""
    eval_every: int = 20_000
    """steps between evaluations; 0: none"""
    save_every: int = 5_000
    """steps between checkpoints"""
    # Evaluation
    fid_num: int = 50_000
    """generated images of an evaluation"""
    fid_real: int = 0
    """real images of an evaluation, spread over the data set; 0: all"""
    fid_batch_size: int = 100
    """images per forward pass of an evaluation"""
    fid_weights: str = "auto"
    """Inception weights: auto (find or download), a path, or random (smoke tests only)"""
    intra_num: int = 0
    """generated images of each class for the intra-FID of mode evaluate; 0: none"""
    bn_batches: int = 100
    """batches to re-estimate batch norm's statistics from before images are drawn; 0: keep them"""
    eval_seed: int = 0
    """seed of the noise of grids, samples and evaluations"""
    num_samples: int = 64
    """images of a sample grid and of mode sample"""
    figure_classes: tuple[int, ...] = ()
    """classes of mode figures, interpolated each to the next; empty: the paper's, or the first 4"""
    # Paper
    model: Literal["an", "sagan", "sngan-star", "sngan"] = "an"
    """row of the paper's tables"""
    conditioning: Literal["projection", "acgan"] = "projection"
    """the label in D: projected on the features, or guessed by a second head (AC-GAN)"""
    entities: int = 16  # Table 4
    """entities n of attentive normalization"""
    region_stats: Literal["in", "bn"] = "in"  # Table 4
    """statistics of an entity's region over one image (in) or over the batch (bn)"""
    self_sampling: bool = True  # Table 4
    """let sampled positions attract the layout in training; without it k, q and t are gone"""
    lambda_ortho: float = 1e-3
    """weight of the orthogonality of the entities' filters (the paper does not say), 0: none"""
    an_reading: Literal["weighted", "literal", "readme", "official"] = "weighted"
    """what the statistics of a region are: see AttentiveNorm"""
    an_value: bool = True
    """normalise a 1x1 convolution of the features (Figure 2), not the features (Eq. 5)"""
    tau: float = 0.1
    """factor of the layout's logits in the softmax over the entities"""
    entity_init: Literal["orthogonal", "normal", "xavier"] = "orthogonal"
    """entities' filters at the start: orthonormal, N(0, 1) as in the authors' code, or Xavier"""
    an_place: Literal["replace", "add", "tail"] = "replace"
    """AN in G's block: in place of its second batch norm, before that, or after the block's sum"""
    d_blocks: Literal[5, 6] = 5
    """blocks of D at 128x128; the sixth leaves the size alone"""

    def __post_init__(self) -> None:
        self.exp_name = self.exp_name or self.model
        self.img_size = self.img_size or (128 if self.dataset == "imagenet" else 32)
        self.z_dim = self.z_dim or 128
        known = {"imagenet": 1000, "cifar10": 10, "shapes": 8}
        self.num_classes = self.num_classes or known.get(self.dataset, 0)
        self.num_classes = self.num_classes or len(subfolders(self.data_dir))


POSITIVE = (
    "img_size", "z_dim", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples", "entities",
)  # fmt: skip
AN_FLAGS = (
    "entities", "region_stats", "self_sampling", "lambda_ortho", "an_reading", "an_value", "tau",
    "entity_init", "an_place",
)  # fmt: skip


def require(rule: bool, flag: str, must: str, value: object) -> None:
    """Raise a fid.UserError such as `--kernel-size must be odd, got 4` unless the rule holds."""
    if not rule:
        raise fid.UserError(f"--{flag.replace('_', '-')} must {must}, got {value}")


def stay(args: Args, usual: object, flags: Iterable[str], where: str) -> None:
    """Refuse flags that mean nothing here unless they are as usual (fid.UserError)."""
    for flag in flags:
        value, default = getattr(args, flag), getattr(usual, flag)
        shown = default if type(default) in (int, float) else default or "off"
        require(value == default, flag, f"stay {shown} {where}", value)


def check_common(args: Args) -> None:
    """Refuse what no script can run (fid.UserError)."""
    for flag, value in asdict(args).items():
        if isinstance(value, (int, float)):
            least = int(flag in POSITIVE)
            require(least <= value < math.inf, flag, f"be at least {least}", value)
    for flag in ("beta1", "beta2"):
        require(getattr(args, flag) < 1, flag, "be below 1", getattr(args, flag))
    world = int(os.environ.get("WORLD_SIZE", 1))
    must = f"be a multiple of the {world} processes"
    require(args.batch_size % world == 0, "batch_size", must, args.batch_size)
    training = args.mode == "train"
    require(training or not args.resume, "resume", "go with --mode train", args.mode)
    must = "stay empty with --mode train (--resume goes on with a run)"
    require(not (training and args.checkpoint), "checkpoint", must, args.checkpoint)
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    known = {"auto", "cpu"} | {f"cuda:{i}" for i in range(gpus)} | ({"cuda"} if gpus else set())
    must = f"be auto, cpu, cuda or cuda:N, N < {gpus}" if gpus else "be cpu: CUDA is not there"
    require(args.device in known, "device", must, args.device)
    alone = world == 1 or ":" not in args.device
    require(alone, "device", "be auto, cpu or cuda with several processes", args.device)
    graphs, one_gpu = asdict(args).get("cuda_graphs"), world == 1 and gpus and args.device != "cpu"
    require(one_gpu or not graphs, "cuda_graphs", "stay off except on one GPU", "it on")
    shared = gpus and args.device in ("auto", "cuda") and local >= gpus
    require(not shared, "device", f"be cpu: {gpus} GPUs are too few for process {local}", "auto")
    folder, first = run_folder(args), int(os.environ.get("RANK", 0)) == 0
    if first and training and not (args.resume or args.dry_run) and folder.exists():
        raise fid.UserError(f"{folder} holds a run: add --resume, or choose another --exp-name")


def check_args(args: Args) -> None:
    """Refuse what cannot run, before anything is downloaded or allocated (fid.UserError)."""
    check_common(args)
    must = "be a folder with a subfolder per class (any tree of images: add --num-classes 1)"
    require(args.num_classes > 0 or args.mode != "train", "data_dir", must, args.data_dir)
    require(args.img_size in (32, 64, 128), "img_size", "be 32, 64 or 128", args.img_size)
    require(args.fid_num >= 10, "fid_num", "be at least 10, an image a split", args.fid_num)
    require(args.tau > 0, "tau", "be above 0", args.tau)
    blocks = args.d_blocks == 5 or args.img_size == 128
    require(blocks, "d_blocks", "be 5 but for --img-size 128", args.d_blocks)
    stay(args, Args, AN_FLAGS if args.model != "an" else (), "without --model an")
    require(args.intra_num != 1, "intra_num", "be 0 or at least 2", args.intra_num)


# --------------------------------------------------------------------------------------------------
# 3. Layers
# --------------------------------------------------------------------------------------------------
class SpectralNorm(_SpectralNorm):
    """Weight over its largest singular value, the power iteration in fp32 under autocast too."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if not (self.training and torch.compiler.is_compiling()):
                return super().forward(weight)
            matrix = self._reshape_weight_to_matrix(weight)
            u, v = fid.power_iteration(matrix.detach(), self._u, self._v, self.eps)
            return weight / torch.vdot(u, torch.mv(matrix, v))


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Divide a layer's weight by its largest singular value; one power iteration a forward."""
    layer = parametrizations.spectral_norm(layer)
    layer.parametrizations.weight[0].__class__ = SpectralNorm
    return layer


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are those of a class (SNGAN-projection).

    (N, C, H, W) -> (N, C, H, W); y is class indices (N,), or weights (N, K) of a mixture of
    classes, whose scales and shifts are then mixed (Figure 8).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma = nn.Parameter(torch.ones(classes, channels))
        self.beta = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.norm(x)
        pick = torch.matmul if y.is_floating_point() else F.embedding
        gamma, beta = (pick(y, table).to(x.dtype) for table in (self.gamma, self.beta))
        return torch.addcmul(beta[:, :, None, None], x, gamma[:, :, None, None])


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without scale: maps (N, d, H, W), (N, d, h, w), (N, c, h, w) -> (N, c, H, W).

    Fused kernels, which never build the H*W x h*w weights, want rows that are contiguous and
    equally wide: zeros fill up the queries and keys and leave the logits as they are.
    """
    fill = [0, 0, 0, 0, 0, value.shape[1] - query.shape[1]]
    maps = F.pad(query, fill), F.pad(key, fill), value
    rows = (m.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for m in maps)
    out = F.scaled_dot_product_attention(*rows, scale=1.0).squeeze(1)
    return out.transpose(1, 2).unflatten(2, query.shape[2:])


class PooledAttention(nn.Module):
    """Self-attention to 2x2 max-pooled keys and values (SAGAN, Zhang et al. 2019, official code).

    (N, C, H, W) -> (N, C, H, W), H and W even. Queries and keys have C // 8 channels, values
    C // 2; the logits are not scaled. The gain gamma starts at 0: the block starts as the identity.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        inner, half = max(1, channels // 8), max(1, channels // 2)
        self.query = nn.Conv2d(channels, inner, 1, bias=bias)
        self.key = nn.Conv2d(channels, inner, 1, bias=bias)
        self.value = nn.Conv2d(channels, half, 1, bias=bias)
        self.out = nn.Conv2d(half, channels, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(()))

    def attention_map(self, x: Tensor) -> Tensor:
        """Weights (N, H*W, H*W/4): row q says where position q looks and sums to 1."""
        query, key = self.query(x).flatten(2), F.max_pool2d(self.key(x), 2).flatten(2)
        return (query.transpose(1, 2) @ key).float().softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        key, value = F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2)
        return x + self.gamma * self.out(attend(self.query(x), key, value))


class AttentiveNorm(nn.Module):
    """Attentive normalization: instance norm of n soft regions that the features themselves choose.

    (N, C, H, W) -> (N, C, H, W), H and W above 1. The layout S (N, n, H, W) is a softmax over n
    entities; a region's pixels v are normalised by its own mean and deviation, scaled by beta and
    shifted by alpha, and the regions blended by S (Eq. 5). The gain rho starts at 0: the block
    starts as the identity. Self-sampling acts in training mode only.

    With M = sum of S and P pixels, --an-reading takes the mean and the variance of a region as
      weighted  sum S v / M        sum S (v - mean)^2 / M    instance norm where S is uniform or 0/1
      literal   sum S v / P        sum (S v - mean)^2 / P    Eq. 5 as printed
      readme    sum S v / M        sum (S v - mean)^2 / M    the authors' README
      official  sum S v / (P M)    sum (S v - mean)^2 / M    the authors' code
    By matrix products of (n, P) with (P, C): nothing of size (N, n, C, P) is ever built.
    """

    def __init__(self, channels: int, args: Args) -> None:
        super().__init__()
        n, inner = args.entities, max(1, channels // 8)
        self.tau, self.reading, self.sampling = args.tau, args.an_reading, args.self_sampling
        self.batch, self.momentum = args.region_stats == "bn", 0.1
        self.entity = nn.Conv2d(channels, n, 1, bias=False)  # f(X) = W X
        init = {"orthogonal": nn.init.orthogonal_, "xavier": nn.init.xavier_uniform_}
        init.get(args.entity_init, nn.init.normal_)(self.entity.weight)
        if self.sampling:
            self.key, self.query = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
            self.t = nn.Parameter(torch.full((n,), 0.1))
        self.value = nn.Conv2d(channels, channels, 1) if args.an_value else nn.Identity()
        self.beta = nn.Parameter(torch.ones(n, channels))  # the scale, against habit
        self.alpha = nn.Parameter(torch.zeros(n, channels))  # the shift
        self.rho = nn.Parameter(torch.zeros(()))
        if self.batch:
            self.register_buffer("running_mean", torch.zeros(n, channels))
            self.register_buffer("running_var", torch.ones(n, channels))

    def activation(self, x: Tensor) -> Tensor:
        """F (N, n, H, W): likeness of each position to n random ones of the 2x2 max-pooled keys.

        Each image draws its own positions at each call, all different where there are enough.
        """
        key, query = F.max_pool2d(self.key(x), 2).flatten(2), self.query(x).flatten(2)
        (count, inner, places), n = key.shape, len(self.t)
        if n <= places:
            where = torch.rand(count, places, device=x.device).topk(n).indices
        else:
            where = torch.randint(places, (count, n), device=x.device)
        sampled = key.gather(2, where[:, None].expand(-1, inner, -1))
        with torch.autocast(x.device.type, enabled=False):
            query, sampled = query.to(self.t.dtype), sampled.to(self.t.dtype)
            return (sampled.transpose(1, 2) @ query).unflatten(2, x.shape[2:])

    def layout(self, x: Tensor) -> Tensor:
        """S (N, n, H, W), fp32, of x (N, C, H, W): the share of each entity, summing to 1."""
        raw = self.entity(x).to(self.beta.dtype)  # parameters stay in fp32 under autocast
        if self.sampling and self.training:
            raw = raw + self.t[:, None, None] * self.activation(x)
        return (self.tau * raw).softmax(dim=1)

    def statistics(self, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (N, n, C), in batch mode (1, n, C), of v (N, C, P) in regions s."""

        def total(sums: Tensor) -> Tensor:
            return sums.sum(dim=0, keepdim=True) if self.batch else sums

        pixels = v.shape[2] * (len(v) if self.batch else 1)
        mass = total(s.sum(dim=2, keepdim=True)) + 1e-6
        first = total(s @ v.transpose(1, 2))
        if self.reading == "weighted":
            mean = first / mass
            var = total(s @ v.square().transpose(1, 2)) / mass - mean.square()
            return mean, var.clamp_min(0)
        second = total(s.square() @ v.square().transpose(1, 2))
        if self.reading == "literal":
            mean = first / pixels
            return mean, (second / pixels - mean.square()).clamp_min(0)
        mean = first / mass / (pixels if self.reading == "official" else 1)
        return mean, ((second - 2 * mean * first + pixels * mean.square()) / mass).clamp_min(0)

    def regional_norm(self, v: Tensor, s: Tensor) -> Tensor:
        """v (N, C, P) normalised in each of the regions s (N, n, P) and blended, in fp32."""
        over_batch = self.batch and self.training
        if self.reading == "weighted":
            # The variance is a difference of two sums that a large mean would drown. Shifting v
            # cancels in the result: its gradient is zero.
            centre = v.detach().mean(dim=(0, 2) if over_batch else 2, keepdim=True)
        else:
            centre = v.new_zeros(1, v.shape[1], 1)
        v, centre = v - centre, centre.transpose(1, 2)
        if self.batch and not self.training:
            mean, var = self.running_mean - centre, self.running_var
        else:
            mean, var = self.statistics(v, s)
        if over_batch:
            self.running_mean.lerp_((mean + centre)[0].detach(), self.momentum)
            self.running_var.lerp_(var[0].detach(), self.momentum)
        gain = (self.beta / (var + 1e-5).sqrt()).expand(len(v), -1, -1)
        shift = self.alpha - mean * gain
        # Eq. 5: sum over i of ((v - mean_i) / sigma_i * beta_i + alpha_i) * S_i
        return (shift.transpose(1, 2) @ s).addcmul_(v, gain.transpose(1, 2) @ s)

    def forward(self, x: Tensor) -> Tensor:
        s, v = self.layout(x).flatten(2), self.value(x).flatten(2)
        with torch.autocast(x.device.type, enabled=False):
            out = self.regional_norm(v.to(s.dtype), s).view_as(x)
            return torch.addcmul(x.to(out.dtype), self.rho, out).to(x.dtype)


def xavier(layer: nn.Module, sn: bool) -> nn.Module:
    """Xavier-uniform weights and zero biases, then spectral norm if sn.

    In this order: what is written to a weight under spectral norm is lost.
    """
    nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if sn else layer


def conv(c_in: int, c_out: int, size: int, sn: bool) -> nn.Module:
    """A convolution that keeps the size of the map."""
    return xavier(nn.Conv2d(c_in, c_out, size, padding=size // 2), sn)


def long_range(args: Args, channels: int) -> nn.Module:
    """The module that the paper compares: AN, or self-attention; spectral norm on both.

    Not on AN's entity filters, whose orthogonality is asked of the weights themselves.
    """
    an = args.model == "an"
    module = AttentiveNorm(channels, args) if an else PooledAttention(channels, bias=False)
    for name, layer in list(module.named_children()):
        if isinstance(layer, nn.Conv2d) and name != "entity":
            xavier(layer, sn=True)
    return module


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
class UpBlock(nn.Module):
    """Residual block of G, twice the size: (N, c_in, H, W), y -> (N, c_out, 2H, 2W).

    `an` is an AN module after the first convolution, or None.
    """

    def __init__(self, c_in: int, c_out: int, args: Args, an: nn.Module | None = None) -> None:
        super().__init__()
        sn, self.place = args.model != "sngan", args.an_place if an else ""
        self.norm1 = ConditionalBatchNorm2d(c_in, args.num_classes)
        self.conv1 = conv(c_in, c_out, 3, sn)
        self.an = an
        if self.place != "replace":
            self.norm2 = ConditionalBatchNorm2d(c_out, args.num_classes)
        self.conv2 = conv(c_out, c_out, 3, sn)
        self.shortcut = conv(c_in, c_out, 1, sn)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.norm1(x, y))
        h = self.conv1(F.interpolate(h, scale_factor=2))
        h = self.an(h) if self.place in ("replace", "add") else h
        h = h if self.place == "replace" else self.norm2(h, y)
        h = self.conv2(F.relu(h))
        # A 1x1 convolution and nearest upsampling commute: a quarter of the work in this order.
        h = h + F.interpolate(self.shortcut(x), scale_factor=2)
        return self.an(h) if self.place == "tail" else h


class DownBlock(nn.Module):
    """Residual block of D: (N, c_in, H, W) -> (N, c_out, H/2, W/2), or of the same size.

    The first block, of the image, starts with a convolution; `an` is its AN module, or None.
    """

    def __init__(self, c_in: int, c_out: int, down: bool, an: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.down = c_in == 3, down
        self.conv1, self.an = conv(c_in, c_out, 3, sn=True), an or nn.Identity()
        self.conv2 = conv(c_out, c_out, 3, sn=True)
        learned = down or c_in != c_out
        self.shortcut = conv(c_in, c_out, 1, sn=True) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        h = self.conv2(F.relu(self.an(h)))
        if self.down:  # the 1x1 convolution of the shortcut commutes with the average
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class Generator(nn.Module):
    """Noise z (N, z_dim), y -> images (N, 3, img_size, img_size) in [-1, 1].

    y is class indices (N,) or convex weights of the classes (N, num_classes). Blocks double the map
    from 4x4 on; the third one, at 32x32, has the AN, and self-attention follows it.
    """

    WIDTHS = {32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1)}

    def __init__(self, args: Args) -> None:
        super().__init__()
        widths, sn = [w * args.g_ch for w in self.WIDTHS[args.img_size]], args.model != "sngan"
        self.linear = xavier(nn.Linear(args.z_dim, widths[0] * 16), sn)
        an = long_range(args, widths[3]) if args.model == "an" else None
        places = enumerate(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(UpBlock(*w, args, an if i == 2 else None) for i, w in places)
        self.attention = long_range(args, widths[3]) if args.model == "sagan" else nn.Identity()
        self.norm = nn.BatchNorm2d(widths[-1])
        self.out = conv(widths[-1], 3, 3, sn)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, (-1, 4, 4))
        for i, block in enumerate(self.blocks):
            x = block(x, y)
            x = self.attention(x) if i == 2 else x
        return torch.tanh(self.out(F.relu(self.norm(x))))


class Discriminator(nn.Module):
    """Images (N, 3, img_size, img_size), class indices y (N,) -> logits (N,), class logits (N, K).

    Projection (Miyato & Koyama 2018) adds <embed(y), h> to the logit and has no class logits: K is
    then 0. The AN is in the first block; self-attention stands at 32x32 (16x16 of 32x32 images).
    """

    WIDTHS = {32: (2, 2, 2, 2), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16)}

    def __init__(self, args: Args) -> None:
        super().__init__()
        widths = [w * args.d_ch for w in self.WIDTHS[args.img_size]][: args.d_blocks]
        downs = 2 if args.img_size == 32 else 5
        an = long_range(args, widths[0]) if args.model == "an" else None
        places = enumerate(zip([3, *widths], widths))
        self.blocks = nn.ModuleList(
            DownBlock(*w, i < downs, an if i == 0 else None) for i, w in places
        )
        self.attended = 1 if args.img_size == 128 else 0  # the block that attention follows
        attention = args.model == "sagan"
        self.attention = long_range(args, widths[self.attended]) if attention else nn.Identity()
        self.linear, k = xavier(nn.Linear(widths[-1], 1), sn=True), args.num_classes
        if args.conditioning == "projection":
            self.embed = xavier(nn.Embedding(k, widths[-1]), sn=True)
        else:
            self.classify = xavier(nn.Linear(widths[-1], k), sn=True)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = self.attention(x) if i == self.attended else x
        with torch.autocast(x.device.type, enabled=False):
            h = F.relu(x.to(self.linear.bias.dtype)).sum(dim=(2, 3))
            logits = self.linear(h).squeeze(1)
            if hasattr(self, "classify"):
                return logits, self.classify(h)
            return logits + (self.embed(y) * h).sum(dim=1), h[:, :0]


# --------------------------------------------------------------------------------------------------
# 5. Losses
# --------------------------------------------------------------------------------------------------
# Hinge, of a logit s: D's loss on a real image, D's on a generated one, G's. Means over the batch
# follow. The paper prints min(1 - D) for D, without the zero that it is cut at.
HINGE = (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s)


def class_loss(class_logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of class logits (N, K) and classes y (N,), AC-GAN's; 0 where K is 0."""
    if class_logits.shape[1] == 0:
        return class_logits.sum()
    return F.cross_entropy(class_logits, y)


def orthogonality(net: nn.Module) -> Tensor:
    """Sum over the AN modules of a network of ||W W^T - I||_F^2, W (n, C) their entities' filters.

    The paper gives no weight for it; the authors' code sums the signed entries of W^T W - I, whose
    minimum makes the filters cancel, not orthogonal.
    """
    penalty = torch.zeros((), device=next(net.parameters()).device)
    for module in net.modules():
        if isinstance(module, AttentiveNorm):
            w = module.entity.weight.flatten(1)
            penalty = penalty + (w @ w.T - torch.eye(len(w), device=w.device)).square().sum()
    return penalty


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
def subfolders(root: str | Path) -> list[str]:
    """Sorted names of the class folders in root, none where it is missing; cache/ is ours."""
    names = next(os.walk(root), (root, [], []))[1]
    return sorted(name for name in names if name != "cache" and not name.startswith("."))


def open_imagenet(args: Args) -> Dataset:
    """ImageNet's class folders in train/, unpacked from its archives if they are not there."""
    root = Path(args.data_dir) / "train"
    if not root.is_dir():
        torchvision.datasets.ImageNet(args.data_dir, "train")
    return fid.Folder(root)


def open_classes(args: Args) -> Dataset:
    """A folder with a subfolder of images for each class; any tree of images for one class."""
    source = fid.Folder(args.data_dir)
    if args.num_classes == 1:
        source.targets = [0] * len(source)
        return source
    loose = [file for file in source.files if file.parent == Path(args.data_dir)]
    how = "give each class a subfolder, or add --num-classes 1"
    if loose:
        raise fid.UserError(f"{len(loose)} images are in no class, the first is {loose[0]}: {how}")
    empty = sorted(set(subfolders(args.data_dir)) - set(source.classes))
    if empty:
        raise fid.UserError(f"class folders without images in {args.data_dir}: {', '.join(empty)}")
    return source


SOURCES = {  # how to open each data set, and how to get it
    "imagenet": (
        open_imagenet,
        "put its class folders into train/ there, or ILSVRC2012_img_train.tar and "
        "ILSVRC2012_devkit_t12.tar.gz of https://image-net.org/download-images there",
    ),
    "cifar10": (
        lambda args: torchvision.datasets.CIFAR10(args.data_dir, download=args.download),
        "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there",
    ),
    "folder": (open_classes, "name a folder of images by --data-dir"),
    "shapes": (lambda args: fid.Shapes(), ""),
}


def load_images(args: Args, channels: int = 3) -> tuple[np.ndarray, Tensor, Path]:
    """The data set as uint8 images (N, C, S, S) on disk, labels (N,), and the file of the images.

    The first process decodes it, once: the file's name has a digest of all that decides its
    content. Raises fid.UserError for a data set that is missing, unreadable or too small.
    """

    def prepare_cache() -> tuple[str, list[int]]:
        open_source, how = SOURCES[args.dataset]
        try:
            source = open_source(args)
        except (RuntimeError, OSError, ModuleNotFoundError) as error:
            where = f"not found in {Path(args.data_dir).absolute()}: {' '.join(str(error).split())}"
            raise fid.UserError(f"--dataset {args.dataset} {where}; {how}") from error
        shape = (len(source), channels, args.img_size, args.img_size)
        must = f"be at most {shape[0]}, the number of images"
        require(args.batch_size <= shape[0], "batch_size", must, args.batch_size)
        key = json.dumps([args.dataset, shape, args.crop, getattr(source, "key", None)])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        path = Path(args.data_dir) / "cache" / f"{args.dataset}-{args.img_size}-{digest}.npy"
        if not path.exists():
            fid.cache_images(source, path, shape, args.crop, args.num_workers)
        return str(path), [int(y) for y in getattr(source, "targets", [0] * shape[0])]

    path, labels = fid.on_main(prepare_cache)
    shape = (len(labels), channels, args.img_size, args.img_size)
    return fid.open_array(Path(path), shape), torch.tensor(labels), Path(path)


def load_labelled(args: Args) -> tuple[np.ndarray, Tensor, Path]:
    """load_images, refused where its labels are not of --num-classes classes."""
    images, labels, path = load_images(args)
    labels = labels * (args.num_classes > 1)
    must = f"be {labels.max() + 1}, the classes of the data"
    require(labels.max() + 1 == args.num_classes, "num_classes", must, args.num_classes)
    return images, labels, path


def endless_batches(
    images: np.ndarray, labels: Tensor, args: Args, device: torch.device, index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's shares of the batches from `index` on: images in [-1, 1], labels.

    Batch b is a function of (seed, b) alone. The images lie on the device where they fit in a
    quarter of its free memory; else a thread reads ahead from disk, for CUDA into pinned memory.
    """
    cuda, size, (rank, world) = device.type == "cuda", args.batch_size, fid.processes()
    resident = cuda and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 4
    data = [images, labels.numpy()]
    data = [torch.from_numpy(part).to(device) for part in data] if resident else data

    @functools.lru_cache(1)
    def order(epoch: int) -> Tensor:
        shuffle = torch.Generator().manual_seed(fid.mix("order", args.seed, epoch))
        rows = torch.randperm(len(images), generator=shuffle)
        return rows.to(device) if resident else rows

    def read(index: int) -> list[Tensor]:
        epoch, place = divmod(index, len(images) // size)
        rows = order(epoch)[place * size : (place + 1) * size].chunk(world)[rank]
        # numpy takes the rows: PyTorch would start a second team of threads from this thread, and
        # the two teams would wait for each other's cores in every operation of the training.
        batch = [torch.as_tensor(part[rows]) for part in data]
        return [part.pin_memory() for part in batch] if cuda and not resident else batch

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, index)
        for following in itertools.count(index + 1):
            batch, ahead = ahead.result(), pool.submit(read, following)
            real, y = (part.to(device, non_blocking=True) for part in batch)
            yield real.float().div_(127.5).sub_(1), y


# --------------------------------------------------------------------------------------------------
# 7. Run
# --------------------------------------------------------------------------------------------------
FORMAT = 3  # of the checkpoints; 2: channels last, as the moments are; 3: the name of the data
load_checkpoint = functools.partial(fid.load_checkpoint, Path(__file__).stem, FORMAT)
FREE_FLAGS = {  # what a resumed run may change: whatever leaves the training alone
    "mode", "resume", "checkpoint", "dry_run", "total_steps", "log_every", "sample_every",
    "eval_every", "save_every", "num_workers", "device", "out_dir", "data_dir", "download",
    "num_samples", "fid_batch_size", "intra_num", "figure_classes",
}  # fmt: skip


def setup(args: Args) -> torch.device:
    """Choose this process's device and join the other processes."""
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    device = torch.device(name if args.device in ("auto", "cuda") else args.device)
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo too: it passes the stop signal on without waiting for the GPU. Hours: the others wait
        # while the first process decodes the data set.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        fid.collective(dist.init_process_group, backend, timeout=timedelta(hours=12))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    return device


def run_folder(args: Args) -> Path:
    """Where a run with these flags lives."""
    name = f"{Path(__file__).stem}__{args.dataset}__{args.exp_name}__s{args.seed}"
    return Path(args.out_dir) / name


class Run:
    """One training run: precision, noise, updates, run folder, log, checkpoint, signals.

    `data` names what is trained on; `parts` are what a checkpoint holds: the networks "G", "D",
    their optimisers "g_opt", "d_opt".
    `step` counts finished generator updates; everything is logged and named by it.
    """

    def __init__(self, args: Args, device: torch.device, data: str, **parts) -> None:
        self.args, self.device, self.parts, self.folder = args, device, parts, run_folder(args)
        self.data = data
        self.rank, self.world = fid.processes()
        self.step, self.best_fid, self.signal = 0, math.inf, 0
        self.keys, self.rows = [], []  # names, and values of each step since the last log line
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.amp)
        if args.amp == "auto" and device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.bfloat16 if native else torch.float16
        fp16 = self.dtype == torch.float16
        self.parts["scaler"] = self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.noise = torch.Generator(device)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        self.open()
        self.seed()
        self.clock, self.mark = time.perf_counter(), self.step
        self.spoken = self.clock

    def open(self) -> None:
        """Make the run folder, or with --resume take up its checkpoint, and start the log."""
        checkpoint, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"

        def take() -> None:
            if self.folder.exists() and not self.args.resume:
                how = "add --resume to go on with it, or choose another --exp-name"
                raise fid.UserError(f"{self.folder} holds a run: {how}")
            self.lock = fid.lock(self.folder / ".lock", "*.pt")

        fid.on_main(take)
        if fid.on_main(checkpoint.exists):
            self.restore(load_checkpoint(checkpoint))
        if self.rank > 0:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found = shutil.which("git") and subprocess.run(git, capture_output=True, text=True)
        cuda = self.device.type == "cuda"
        about = {
            "args": asdict(self.args),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "commit": found.stdout.strip() if found else "",
        }
        fid.write_text(self.folder / "args.json", json.dumps(about, indent=2))
        kept = [record for record in fid.read_records(log) if record["step"] <= self.step]
        fid.write_text(log, "".join(json.dumps(record) + "\n" for record in kept))
        fid.quiet_threads()
        self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        args, where = self.args, f"from step {self.step} to {self.args.total_steps}"
        steps = f"{args.log_every}, {args.sample_every}, {args.save_every} steps"
        every = f"log, samples/, checkpoint.pt every {steps}; Ctrl-C saves and ends"
        fid.say(f"{self.folder}: {where} on {about['device']}; {every}")

    def seed(self) -> None:
        """Make the noise of the coming step a function of the seed and the step alone.

        Every process draws the noise of the whole batch and keeps its share, so that the result
        does not depend on their number; dropout and the like draw from a stream of their own.
        """
        self.noise.manual_seed(fid.mix("noise", self.args.seed, self.step))
        torch.manual_seed(fid.mix("rest", self.args.seed, self.rank, self.step))

    def draw(self, sampler: Callable[..., Tensor], *shape: int) -> Tensor:
        """This process's share of noise of the given global shape, by torch.randn or torch.rand."""
        noise = sampler(shape, generator=self.noise, device=self.device)
        return noise.chunk(self.world)[self.rank]

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes."""
        return torch.autocast(self.device.type, self.dtype, self.dtype is not None)

    def update(self, loss: Tensor, net: str) -> Tensor:
        """Step net "G" or "D" down the loss, averaged over processes; the norm of its gradient."""
        opt = self.parts[f"{net.lower()}_opt"]
        parameters = [p for p in self.parts[net].parameters() if p.requires_grad]
        opt.zero_grad(set_to_none=True)
        # Not autograd.grad: its gradients may lie in memory in another order than the parameters,
        # and fused optimisers read raw memory. backward() keeps the parameters' order.
        self.scaler.scale(loss).backward(inputs=parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.world > 1:  # one flat buffer: a DDP wrapper is silently wrong around a penalty
            flat = torch.cat([grad.flatten() for grad in grads])
            fid.collective(dist.all_reduce, flat)
            shares = flat.div_(self.world).split([grad.numel() for grad in grads])
            for grad, share in zip(grads, shares):
                grad.copy_(share.view_as(grad))
        self.scaler.unscale_(opt)
        norm = nn.utils.get_total_norm(grads)
        self.scaler.step(opt)
        self.scaler.update()
        return norm.nan_to_num(0, 0, 0) if self.scaler.is_enabled() else norm  # 0: step skipped

    def collect(self, terms: dict[str, Tensor]) -> bool:
        """Count a finished step and keep its terms, all on the device; whether to stop now."""
        self.step += 1
        self.keys = list(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))
        if self.device.type == "cpu" and self.world == 1 and not self.rows[-1].isfinite().all():
            self.means()
        self.seed()
        if (now := time.perf_counter()) > self.spoken + 60:
            fid.say(f"step {self.step}/{self.args.total_steps}")
            self.spoken = now
        if self.world > 1:  # a signal to any process stops all of them at the same step
            shared = torch.tensor(self.signal)
            fid.collective(dist.all_reduce, shared, dist.ReduceOp.MAX)
            self.signal = int(shared)
        return self.signal > 0

    def due(self, every: int) -> bool:
        """Whether something done every so many steps (0: never), and at the end, is due."""
        return every > 0 and (self.step % every == 0 or self.step == self.args.total_steps)

    def means(self) -> dict[str, float]:
        """Means of the collected terms; FloatingPointError names the first that is not finite."""
        rows = torch.stack(self.rows)
        if self.world > 1:
            fid.collective(dist.all_reduce, rows)
            self.rows = list(rows.div_(self.world))  # the same everywhere, and in the checkpoint
        rows = rows.cpu().double()
        for row, column in (~rows.isfinite()).nonzero()[:1].tolist():
            step = self.step - len(rows) + 1 + row
            raise FloatingPointError(f"{self.keys[column]} is {rows[row, column]:g} at step {step}")
        return dict(zip(self.keys, rows.mean(0).tolist()))

    def log_interval(self, extra: dict[str, float]) -> None:
        """Log the interval's means, `extra` and the speed, pauses included; print one line."""
        values, now, total = self.means() | extra, time.perf_counter(), self.args.total_steps
        rate = (self.step - self.mark) / (now - self.clock)
        self.rows, self.clock, self.spoken, self.mark = [], now, now, self.step
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        values["perf/steps_per_sec"] = rate
        values["perf/img_per_sec"] = rate * self.args.batch_size
        values["perf/max_mem_gb"] = memory / 1e9
        self.log(values)
        left = timedelta(seconds=round((total - self.step) / rate))
        losses = f"loss/d {values['loss/d']:.4f}  loss/g {values['loss/g']:.4f}"
        done = f"step {self.step}/{total} ({self.step / total:.1%})"
        fid.say(f"{done}  {rate:.3g} steps/s  {left} left  {losses}")

    def log(self, values: dict[str, float]) -> None:
        """Append values to log.jsonl and TensorBoard under the present step."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, self.step)
            self.board.flush()

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write what a bit-identical continuation needs; noise and data follow from the step."""
        if self.rows:
            self.means()  # no checkpoint of a run that has gone wrong
        state = {
            "format": FORMAT, "script": Path(__file__).stem, "args": asdict(self.args),
            "data": self.data, "step": self.step, "best_fid": self.best_fid, "keys": self.keys,
            "rows": self.rows,
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
        }  # fmt: skip

        def write() -> None:
            with fid.atomic(self.folder / name) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)

        fid.on_main(write)  # the others wait: torchrun ends all as soon as one has ended

    def restore(self, state: dict) -> None:
        """Take up a checkpoint (fid.UserError where its flags differ from this run's)."""
        old, new = state["args"], asdict(self.args)
        text = fid.differences(old, new, (old | new).keys() - FREE_FLAGS)
        if not text and state["data"] != self.data:
            text = f"the data was {state['data']}, is {self.data}"
        if text:
            raise fid.UserError(f"{self.folder} cannot be resumed: {text}")
        fid.load_parts(self.parts, state["parts"], self.folder / "checkpoint.pt")
        self.step, self.best_fid, self.keys = state["step"], state["best_fid"], state["keys"]
        self.rows = [row.to(self.device) for row in state["rows"]]

    def on_signal(self, number: int, frame: object) -> None:
        """Finish the step and save; a second Ctrl-C ends the run at once."""
        self.signal = number
        if number == signal.SIGINT:  # SIGTERM comes twice: from the cluster and from torchrun
            signal.signal(number, signal.SIG_DFL)
        fid.say(f"{signal.Signals(number).name}: finishing the step, then saving")


# --------------------------------------------------------------------------------------------------
# 8. Evaluation
# --------------------------------------------------------------------------------------------------
def eval_noise(args: Args, count: int) -> Tensor:
    """The first `count` noise vectors (count, z_dim) of every grid, sample and evaluation."""
    generator = torch.Generator().manual_seed(args.eval_seed)
    # In blocks of 16 rows: the CPU draws the last few numbers of a tensor in another way.
    return torch.randn(-(-count // 16) * 16, args.z_dim, generator=generator)[:count]


def eval_classes(args: Args, count: int) -> Tensor:
    """The classes (count,) that go with eval_noise: all classes in turn."""
    return torch.arange(count) % args.num_classes


@torch.no_grad()
def settled(args: Args, G: nn.Module) -> nn.Module:
    """A copy of G in eval mode whose batch norms know its activations without self-sampling.

    In training they see self-sampled ones. The statistics are means over --bn-batches batches, of
    the training's size, of noise of their own.
    """
    G, device = copy.deepcopy(G).eval(), next(G.parameters()).device
    noise = torch.Generator().manual_seed(args.eval_seed + 1)
    kinds = (nn.BatchNorm2d, AttentiveNorm) if args.region_stats == "bn" else nn.BatchNorm2d
    norms = [module for module in G.modules() if isinstance(module, kinds)]
    for i in range(args.bn_batches):
        for norm in norms:  # their children stay in eval mode
            norm.training, norm.sampling, norm.momentum = True, False, 1 / (i + 1)
        z = torch.randn(args.batch_size, args.z_dim, generator=noise)
        y = torch.randint(args.num_classes, (args.batch_size,), generator=noise)
        G(z.to(device), y.to(device))
    return G.eval()


@torch.no_grad()
def generate(G: nn.Module, *inputs: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) of noise (N, z_dim), and of what else G takes, in eval mode."""
    training, device = G.training, next(G.parameters()).device
    images = G.eval()(*(x.to(device) for x in inputs)).mul(127.5).add(127.5).round().clamp(0, 255)
    G.train(training)
    return images.to(torch.uint8)


def class_grid(args: Args, G: nn.Module) -> Tensor:
    """uint8 images (num_samples, C, H, W) of a `settled` generator, all classes in turn."""
    n, size = args.num_samples, args.fid_batch_size
    parts = zip(eval_noise(args, n).split(size), eval_classes(args, n).split(size))
    return torch.cat([generate(G, z, y).cpu() for z, y in parts])


def columns(args: Args) -> int:
    """Columns of a class_grid: one for each class where they are few."""
    few = args.num_classes <= min(20, args.num_samples)
    return args.num_classes if few and args.num_classes > 1 else math.isqrt(args.num_samples)


def score(
    args: Args, inception: nn.Module, G: nn.Module, images: np.ndarray, path: Path, *inputs: Tensor
) -> dict[str, float]:
    """FID and Inception Score of G's images of `inputs` against the data's, (N, C, S, S) at path.

    An input (fid_num, ...) each: the noise, and what else G takes.
    """
    if 0 < args.fid_real < len(images):
        images = images[np.arange(args.fid_real) * len(images) // args.fid_real]
    fid.same_buffers(G)
    moments = path.with_name(f"{path.stem}-{len(images)}-{inception.protocol['sha256'][:8]}.npz")
    real = fid.dataset_moments(inception, images, args.fid_batch_size, cache=moments)

    def draw(first: int, count: int) -> Tensor:
        return generate(G, *(x[first : first + count] for x in inputs))

    scores = fid.score_generator(inception, draw, len(inputs[0]), args.fid_batch_size, real)
    text = ", ".join(f"{key} {value:.6g}" for key, value in scores.items())
    fid.say(f"{text}{inception.label and ': '}{inception.label}")
    return {f"metric/{key}": value for key, value in scores.items()}


def score_each_class(
    args: Args, inception: nn.Module, G: nn.Module, images: np.ndarray, labels: Tensor
) -> dict:
    """Intra-FID: `intra_num` images of each class against that class's images (Tables 1 and 2)."""
    z, size = eval_noise(args, args.intra_num), args.fid_batch_size

    def real(label: int) -> fid.Moments:
        rows = (labels == label).nonzero()[:, 0].numpy()
        return fid.dataset_moments(inception, images[rows], size, label=f"class {label}")

    def fake(label: int) -> fid.Moments:
        moments = fid.Moments(device=inception.device)
        for first, count in fid.shares(args.intra_num, size):
            y = torch.full((count,), label)
            moments.update(inception(generate(G, z[first : first + count], y))[0])
        moments.all_reduce()
        return moments

    def all_classes(side: Callable[[int], fid.Moments]) -> dict[str, Callable[[], fid.Moments]]:
        return {f"{k:04d}": functools.partial(side, k) for k in range(args.num_classes)}

    found = fid.intra_fid(all_classes(real), all_classes(fake))
    text = f"intra-FID {found['mean']:.6g} of {args.intra_num} images for each class"
    fid.say(f"{text}{inception.label and ': '}{inception.label}")
    return {"metric/intra_fid": found["mean"], "intra_fid_per_class": found["per_class"]}


@torch.no_grad()
def an_module(net: nn.Module, *inputs: Tensor) -> tuple[AttentiveNorm, Tensor]:
    """A network's AN module and the features (N, C, H, W) that reach it in eval mode."""
    an = next(module for module in net.modules() if isinstance(module, AttentiveNorm))
    seen, training = [], net.training
    hook = an.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.eval()(*inputs)
    hook.remove()
    net.train(training)
    return an, seen[0]


def layout_use(layout: Tensor) -> tuple[float, float]:
    """Entropy over ln n of a layout (N, n, H, W), 1 = uniform, and the entities in use.

    An entity is in use where its mean share exceeds 0.5 / n.
    """
    n, share = layout.shape[1], layout.mean(dim=(0, 2, 3))
    entropy = torch.special.entr(layout).sum(dim=1).mean() / max(math.log(n), 1e-12)
    return entropy.item(), (share > 0.5 / n).sum().item()


@torch.no_grad()
def diagnostics(args: Args, nets: dict[str, tuple]) -> dict[str, float]:
    """State of the long-range modules of nets {where: (net, *inputs)}: their gains, for the log.

    Of AN in eval mode also the mean t, the deviation of its output, the layout's entropy over ln n
    (1: uniform, plain instance norm), and the entities with a share above 0.5 / n (1: one has all).
    """
    values = {}
    for where, (net, *inputs) in nets.items():
        if args.model == "sagan":
            values[f"train/gamma_{where}"] = net.attention.gamma.item()
        if args.model != "an":
            continue
        an, x = an_module(net, *inputs)
        entropy, used = layout_use(an.eval().layout(x))
        values |= {f"train/rho_{where}": an.rho.item(), f"train/an_std_{where}": an(x).std().item()}
        values |= {f"train/layout_entropy_{where}": entropy, f"train/entities_used_{where}": used}
        values |= {f"train/t_{where}": an.t.mean().item()} if args.self_sampling else {}
        an.train(net.training)
    return values


def open_checkpoint(args: Args) -> tuple[Args, torch.device, nn.Module, nn.Module, Path]:
    """Args with the checkpoint's data and architecture, the device, G, D, the run's folder."""
    path = Path(args.checkpoint) if args.checkpoint else run_folder(args) / "checkpoint.pt"
    state = load_checkpoint(path)
    args = fid.recall(args, state["args"], FREE_FLAGS, path)
    device = setup(args)
    nets = {"G": Generator(args), "D": Discriminator(args)}
    fid.load_parts(nets, state["parts"], path)
    for net in nets.values():
        net.to(device).eval()
    fid.say(f"{path}: step {state['step']}")
    return args, device, nets["G"], nets["D"], path.parent


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: the scores of a checkpoint, printed and kept in evaluate.json beside it."""
    args, device, G, _, folder = open_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, labels, path = load_labelled(args)
    G = settled(args, G)
    z, y = eval_noise(args, args.fid_num), eval_classes(args, args.fid_num)
    scores = score(args, inception, G, images, path, z, y)
    if args.intra_num:
        scores |= score_each_class(args, inception, G, images, labels)
    record = {**scores, **inception.protocol}
    fid.write_text(folder / "evaluate.json", json.dumps(record, indent=2))
    return scores


def sample(args: Args) -> None:
    """Mode sample: PNGs of a checkpoint's generator in a folder for each class, and a grid."""
    args, _, G, _, folder = open_checkpoint(args)
    classes = eval_classes(args, args.num_samples).tolist()
    names = [f"{y:04d}/{i:05d}" for i, y in enumerate(classes)]
    fid.write_images(folder, class_grid(args, settled(args, G)), columns(args), names=names)


def grey(maps: Tensor, size: int) -> Tensor:
    """Maps (N, H, W), each stretched to its own range, as uint8 images (N, 3, size, size)."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = ((maps - low) / (high - low).clamp_min(1e-12)).mul(255).round().byte()
    return F.interpolate(scaled[:, None].expand(-1, 3, -1, -1), size=size, mode="nearest")


def hard_layout(s: Tensor, size: int) -> Tensor:
    """The entity of the largest share at each position of S (N, n, H, W), a colour for each."""
    n = s.shape[1]
    hues = [ImageColor.getrgb(f"hsv({360 * i // n},{100 - i % 2 * 45}%,90%)") for i in range(n)]
    image = torch.tensor(hues, dtype=torch.uint8)[s.argmax(dim=1).cpu()].permute(0, 3, 1, 2)
    return F.interpolate(image, size=size, mode="nearest")


def region_statistics(x: Tensor, s: Tensor) -> list[dict]:
    """Mean and deviation of the features x (N, C, H, W) of each image (Figure 4).

    "whole" (mean, std) and "regions" {entity: (share of the pixels, mean, std)}: the channels of
    the positions where that entity has the largest share in S (N, n, H, W).
    """
    rows = []
    for features, owner in zip(x.flatten(2).double(), s.argmax(dim=1).flatten(1)):
        row = {"whole": (features.mean().item(), features.std().item()), "regions": {}}
        for i in owner.unique().tolist():
            part = features[:, owner == i]
            share = part.shape[1] / len(owner)
            row["regions"][i] = share, part.mean().item(), part.std().item()
        rows.append(row)
    return rows


def interpolation(args: Args, G: nn.Module, path: list[int], count: int = 8) -> Tensor:
    """uint8 images of one noise from class to class of the path (Figure 8), `count` a row.

    With AN a second row for each pair: the map of one entity, the one that varies most at first.
    """
    rows, z = [], eval_noise(args, 1).expand(count, -1)
    for a, b in itertools.pairwise(path):
        ends = F.one_hot(torch.tensor([a, b]), args.num_classes).float()
        y = torch.lerp(ends[:1], ends[1:], torch.linspace(0, 1, count)[:, None])
        rows.append(generate(G, z, y).cpu())
        if args.model == "an":
            device = next(G.parameters()).device
            an, x = an_module(G, z.to(device), y.to(device))
            with torch.no_grad():
                s = an.layout(x).cpu()
            rows.append(grey(s[:, s[0].flatten(1).var(dim=1).argmax()], args.img_size))
    return torch.cat(rows)


def figures(args: Args) -> None:
    """Mode figures: classes (Figure 7), interpolation (8), layouts (5), regions (4), curves."""
    args, device, G, _, folder = open_checkpoint(args)
    for label in args.figure_classes:
        must = f"be from 0 to {args.num_classes - 1}"
        require(0 <= label < args.num_classes, "figure_classes", must, label)
    G, target, size = settled(args, G), folder / "figures", args.img_size
    target.mkdir(exist_ok=True)
    paper = args.num_classes == 1000 and not args.figure_classes
    few = list(args.figure_classes or range(min(4, args.num_classes)))
    classes, path = ([970, 992, 540, 780], [156, 14, 780]) if paper else (few, few)
    z = eval_noise(args, 8).repeat(len(classes), 1)
    y = torch.tensor(classes).repeat_interleave(8)
    images = generate(G, z, y).cpu()
    fid.write_grid(target / "classes.png", images, 8)
    if len(path) > 1:
        fid.write_grid(target / "interpolation.png", interpolation(args, G, path), 8)
    if args.model == "an":
        an, x = an_module(G, z.to(device), y.to(device))
        with torch.no_grad():
            s = an.layout(x)
        hard, cells = hard_layout(s, size), []
        for i in range(0, len(images), 4):  # two images of each class
            cells += [images[i, None], hard[i, None], grey(s[i].cpu(), size)]
        fid.write_grid(target / "layouts.png", torch.cat(cells), 2 + args.entities)
        rows = [{"class": k, **row} for k, row in zip(y.tolist(), region_statistics(x, s))]
        fid.write_text(target / "regions.json", json.dumps(rows, indent=1))
    keys = ["loss/d", "loss/g", "logit/real", "logit/fake", "metric/fid"]
    keys += ["train/rho_g", "train/layout_entropy_g"] if args.model == "an" else []
    fid.plot(target / "curves.png", folder / "log.jsonl", keys)
    fid.say(f"classes, interpolation, curves and, with AN, layouts and regions are in {target}")


# --------------------------------------------------------------------------------------------------
# 9. Training
# --------------------------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from the run's checkpoint; the last evaluation's metrics."""
    device = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, path = load_labelled(args)
    torch.manual_seed(args.seed)  # here: decoding, where it is due, draws random numbers too
    G, D = Generator(args), Discriminator(args)
    for net in (G, D):
        net.to(device, memory_format=torch.channels_last)
    adam = {"betas": (args.beta1, args.beta2), "fused": True, "capturable": args.cuda_graphs}
    g_opt = torch.optim.Adam(G.parameters(), args.g_lr, **adam)
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, **adam)
    run = Run(args, device, path.stem, G=G, D=D, g_opt=g_opt, d_opt=d_opt)
    batches = endless_batches(images, labels, args, device, run.step * args.n_critic)
    any_class = functools.partial(torch.randint, args.num_classes)
    d_real, d_fake, g_fake = HINGE
    n, stop, metrics = args.batch_size, False, {}
    forward_G, forward_D = (torch.compile(net) if args.compile else net for net in (G, D))

    def d_update(real: Tensor, y: Tensor, z: Tensor, fake_y: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            with torch.no_grad():
                fake = forward_G(z, fake_y).float()
            # One by one: with --region-stats bn a joint batch would mix their statistics.
            real_logits, real_classes = forward_D(real, y)
            fake_logits, _ = forward_D(fake, fake_y)
        d_loss_real, d_loss_fake = d_real(real_logits).mean(), d_fake(fake_logits).mean()
        d_loss_class, d_reg = class_loss(real_classes, y), orthogonality(D)
        d_loss = d_loss_real + d_loss_fake + d_loss_class + args.lambda_ortho * d_reg
        d_norm = run.update(d_loss, "D")
        return {
            "loss/d": d_loss, "loss/d_real": d_loss_real, "loss/d_fake": d_loss_fake,
            "loss/d_class": d_loss_class, "loss/d_reg": d_reg, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), "grad/d_norm": d_norm,
        }  # fmt: skip

    def g_update(z: Tensor, fake_y: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            logits, classes = forward_D(forward_G(z, fake_y), fake_y)
        g_loss_adv, g_loss_class = g_fake(logits).mean(), class_loss(classes, fake_y)
        g_reg = orthogonality(G)
        g_loss = g_loss_adv + g_loss_class + args.lambda_ortho * g_reg
        g_norm = run.update(g_loss, "G")
        return {
            "loss/g": g_loss, "loss/g_adv": g_loss_adv, "loss/g_class": g_loss_class,
            "loss/g_reg": g_reg, "grad/g_norm": g_norm,
        }  # fmt: skip

    if args.cuda_graphs:
        d_update, g_update = fid.graphed(d_update), fid.graphed(g_update)
    while run.step < args.total_steps and not stop:
        for _ in range(args.n_critic):
            real, y = next(batches)
            if args.hflip:
                real = torch.where(run.draw(torch.rand, n, 1, 1, 1) < 0.5, real.flip(3), real)
            fake_y = run.draw(any_class, n)
            terms = d_update(real, y, run.draw(torch.randn, n, args.z_dim), fake_y)
        fake_y = run.draw(any_class, n)
        stop = run.collect(terms | g_update(run.draw(torch.randn, n, args.z_dim), fake_y))
        if run.due(args.log_every):
            z, some = eval_noise(args, 16).to(device), eval_classes(args, 16).to(device)
            nets = {"g": (G, z, some), "d": (D, real[:16], y[:16])}
            run.log_interval(diagnostics(args, nets))
        if run.due(args.sample_every) and run.rank == 0:
            grid = class_grid(args, settled(args, G))
            fid.write_grid(run.folder / f"samples/{run.step:07d}.png", grid, columns(args))
        if run.due(args.eval_every):
            z, some = eval_noise(args, args.fid_num), eval_classes(args, args.fid_num)
            metrics = score(args, inception, settled(args, G), images, path, z, some)
            run.log(metrics)
            if metrics["metric/fid"] < run.best_fid:
                run.best_fid = metrics["metric/fid"]
                run.save("best.pt")
        if stop or run.due(args.save_every):
            run.save()
    if stop:
        fid.say(f"stopped at step {run.step}; the same command with --resume goes on")
        raise SystemExit(128 + run.signal)
    fid.say(f"done: {run.folder} (samples/, log.jsonl, checkpoint.pt)")
    return metrics


# --------------------------------------------------------------------------------------------------
# 10. Main
# --------------------------------------------------------------------------------------------------
def main() -> None:
    """Run the command line; exit 2 on a user's mistake, 3 on a loss that is not finite."""
    args = tyro.cli(Args, description=__doc__)
    modes = {"train": train, "evaluate": evaluate, "sample": sample, "figures": figures}
    with fid.exit_codes():
        check_args(args)
        if args.dry_run:
            nets = {"G": Generator(args), "D": Discriminator(args)}
            params = {key: sum(p.numel() for p in net.parameters()) for key, net in nets.items()}
            print(json.dumps({"args": asdict(args), "params": params}))
        else:
            modes[args.mode](args)


if __name__ == "__main__":
    main()
