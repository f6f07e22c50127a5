# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""SAGAN-div: Enhanced Full Attention Generative Adversarial Networks (Chen and Yamane, 2023).

Self-attention after every layer of the generator and none in the discriminator; the Wasserstein
divergence as loss; a study of spectral norm (SN) against instance norm (IN) in four methods, a to
d. The baselines of Table 2 are here too: DCGAN, WGAN-div and SNGAN on the same skeleton.

    python sagan_div.py                                         # Tables 2 and 3, MNIST, method d
    python sagan_div.py --dataset fashion-mnist --method c      # Table 3, Fashion-MNIST, method c
    python sagan_div.py --method dcgan --recipe author          # a baseline as the authors ran it

Differences from the paper
 1. The fifth layer, whose output is the image, has no attention: one channel makes it degenerate.
    `--attn-blocks 1 2 3 4 5` adds it, before the tanh.
 2. Not stated: k = 2, p = 6 (WGAN-div's), the points of the penalty, batch size, initial weights,
    LeakyReLU's slope, SN inside attention. They follow the public code where it tells; its tenfold
    penalty and Adam's (0.5, 0.999), which the paper contradicts, are `--recipe author`.
 3. The paper's baselines have "their papers' defaults" (`--recipe paper`), the public code gives
    them one schedule (`--recipe author`). Norms of DCGAN's and WGAN-div's D omit the first layer.
 4. 60,000 generator updates of batch 64 by default; `--epochs 10000` is the paper's length. Every
    update draws fresh noise, and an epoch leaves its last incomplete batch out.
 5. FID is over 10,000 distinct samples and all training images. The public code repeated 608 images
    to 10,336 files: `--mode evaluate --fid-distinct 608` gives that number, under another name.
    Compare methods with each other, not with the published values.

Evidence: see README.md, "The papers, row by row". The paper's 10,000 epochs have not been run.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports
# --------------------------------------------------------------------------------------------------
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
from dataclasses import asdict, dataclass, fields
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
    dataset: Literal["mnist", "fashion-mnist", "folder", "shapes"] = "mnist"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    data_dir: str = "data"
    """folder of the data set and of the cache of its decoded images"""
    download: bool = True
    """fetch the data set if it is not in --data-dir"""
    img_size: int = 64  # Table 1
    """side of the square images in pixels; 0: the paper's for the data set"""
    channels: Literal[0, 1, 3] = 0
    """channels of the images, 1 (grey) or 3 (RGB); 0: 1 for MNIST and Fashion-MNIST, else 3"""
    crop: int = 0
    """side of the central square cut out first, in pixels; 0: the paper's, else the short side"""
    hflip: bool = False
    """mirror half of the training images, drawn anew each time"""
    num_workers: int = 4
    """processes that decode the images, once"""
    # Model
    z_dim: int = 100  # Table 1
    """length of the noise vector; 0: the paper's for the model"""
    g_ch: int = 64  # Table 1
    """base width of the generator, in channels"""
    d_ch: int = 64  # Table 1
    """base width of the discriminator, in channels"""
    # Optimisation
    total_steps: int = 60_000
    """generator updates to train for"""
    batch_size: int = 64
    """images per update, shared out over the processes"""
    n_critic: int = 5
    """discriminator updates per generator update"""
    g_lr: float = 1e-4
    """learning rate of the generator"""
    d_lr: float = 4e-4
    """learning rate of the discriminator"""
    beta1: float = 0.0
    """Adam's decay rate of the gradient's mean"""
    beta2: float = 0.9
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
    sample_every: int = 1_000
    """steps between sample grids; 0: none"""
    eval_every: int = 5_000
    """steps between evaluations; 0: none"""
    save_every: int = 1_000
    """steps between checkpoints"""
    # Evaluation
    fid_num: int = 10_000
    """generated images of an evaluation"""
    fid_real: int = 0
    """real images of an evaluation, spread over the data set; 0: all"""
    fid_batch_size: int = 100
    """images per forward pass of an evaluation"""
    fid_weights: str = "auto"
    """Inception weights: auto (find or download), a path, or random (smoke tests only)"""
    eval_seed: int = 0
    """seed of the noise of grids, samples and evaluations"""
    num_samples: int = 100
    """images of a sample grid and of mode sample"""
    # Paper
    method: Literal["a", "b", "c", "d", "dcgan", "wgan-div", "sngan"] = "d"
    """row of Tables 2 and 3; a to d differ in where spectral and instance norm stand"""
    recipe: Literal["paper", "author"] = "paper"
    """what flags not given are: each method's own paper's settings, or those of the public code"""
    epochs: int = 0
    """epochs in place of --total-steps, known once the data is open; 10000 in the paper; 0: none"""
    attn_blocks: tuple[Literal[1, 2, 3, 4, 5, "none"], ...] = (1, 2, 3, 4)
    """layers of the generator that attention follows (5: before the tanh), or none; a to d"""
    attn_block: Literal["full", "pooled"] = "pooled"
    """attention to all positions, or SAGAN's to 2x2 max-pooled keys and values"""
    attn_sn: Literal["always", "follow"] = "always"
    """spectral norm in attention: in all of a to d, or where the generator's layers have it"""
    div_k: float = 2.0
    """weight k of the penalty of the Wasserstein divergence"""
    div_p: float = 6.0
    """power p of the gradient's norm in it, at least 1"""
    div_points: Literal["endpoints", "interp"] = "endpoints"
    """where the gradient is taken: at real and at generated images, or between them"""
    div_scale: float = 1.0
    """further factor of the penalty, 10 in the public code"""
    fid_distinct: int = 0
    """mode evaluate: also the public code's FID of this many repeated images (608); 0: not"""
    query_pixels: tuple[tuple[int, int], ...] = ((32, 32), (16, 32), (48, 24))
    """mode figures: rows and columns of the image pixels whose attention is drawn"""

    def __post_init__(self) -> None:
        self.exp_name = self.exp_name or self.method + "-author" * (self.recipe == "author")
        self.img_size, self.z_dim = self.img_size or 64, self.z_dim or 100  # Table 1
        self.channels = self.channels or (1 if "mnist" in self.dataset else 3)


POSITIVE = (
    "img_size", "z_dim", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples", "div_p",
)  # fmt: skip
ADAM = {"beta1": 0.5, "beta2": 0.999}  # PyTorch's and DCGAN's
SAME = {"g_lr": 2e-4, "d_lr": 2e-4}
ROW = ("recipe", "method")  # the flags that name a row of the tables
DEFAULTS = {  # of the rows, where Args has not theirs; it has the paper's for a to d
    ("paper", "dcgan"): {**SAME, **ADAM, "batch_size": 128, "n_critic": 1},
    ("paper", "wgan-div"): {**SAME, "n_critic": 4, "div_points": "interp"},
    ("paper", "sngan"): SAME,
    **{("author", method): {**ADAM, "div_scale": 10.0} for method in "abcd"},
    **{("author", method): {**ADAM, "batch_size": 2048} for method in ("dcgan", "sngan")},
    ("author", "wgan-div"): {**SAME, **ADAM},
}


def parse(argv: list[str] | None = None) -> Args:
    """The command line; flags not given, and the defaults that --help shows, are its row's."""
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    row = DEFAULTS.get(tuple(getattr(given, flag) for flag in ROW), {})
    default = Args()
    vars(default).update({field.name: field.default for field in fields(Args)} | row)  # unresolved
    return tyro.cli(Args, args=argv, default=default, description=__doc__)


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
    require(args.img_size == 64, "img_size", "be 64, Table 1 is fixed", args.img_size)
    require(args.fid_num >= 10, "fid_num", "be at least 10, an image a split", args.fid_num)
    require(args.batch_size >= 2, "batch_size", "be at least 2", args.batch_size)
    must = f"be 1 with --dataset {args.dataset}, whose images are grey"
    require(args.channels == 1 or "mnist" not in args.dataset, "channels", must, args.channels)
    blocks, must = args.attn_blocks, "name layers of 1 2 3 4 5, each once, or be none alone"
    once = 0 < len(blocks) == len(set(blocks)) and (blocks == ("none",) or "none" not in blocks)
    require(once, "attn_blocks", must, " ".join(map(str, blocks)) or "nothing")
    unused = () if args.method in "abcd" else ("attn_blocks", "attn_block", "attn_sn")
    if LOSS[args.recipe].get(args.method):
        unused += ("div_k", "div_p", "div_points", "div_scale")
    stay(args, Args, unused, f"with --method {args.method}")
    require(args.fid_distinct != 1, "fid_distinct", "be 0 or at least 2", 1)
    inside = args.query_pixels and all(0 <= x < 64 for pixel in args.query_pixels for x in pixel)
    require(inside, "query_pixels", "be rows and columns from 0 to 63", args.query_pixels)


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


class SelfAttention(nn.Module):
    """Self-attention over all positions of a feature map (SAGAN, Zhang et al. 2019).

    (N, C, H, W) -> (N, C, H, W). Queries and keys have C // 8 channels, values C; the logits are
    not scaled. The gain gamma starts at 0: the block starts as the identity.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query = nn.Conv2d(channels, inner, 1, bias=bias)
        self.key = nn.Conv2d(channels, inner, 1, bias=bias)
        self.value = nn.Conv2d(channels, channels, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(()))

    def attention_map(self, x: Tensor) -> Tensor:
        """Weights (N, H*W, H*W): row q says where position q looks and sums to 1."""
        query, key = self.query(x).flatten(2), self.key(x).flatten(2)
        return (query.transpose(1, 2) @ key).float().softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * attend(self.query(x), self.key(x), self.value(x))


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


def gaussian(layer: nn.Module, sn: bool) -> nn.Module:
    """Draw a layer's weight from N(0, 0.02), then add spectral norm if sn.

    In this order: what is written to a weight under spectral norm is lost.
    """
    nn.init.normal_(layer.weight, 0.0, 0.02)
    return spectral_norm(layer) if sn else layer


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
NORM_LAYERS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,  # no gain and bias, the same in train and eval mode
    "layer": lambda channels: nn.GroupNorm(1, channels),  # over (C, H, W); gains per channel
}
NORMS = {  # spectral norm in G, norm in G, spectral norm in D, norm in D
    "a": (True, "instance", True, "instance"),  # Table 3: attnG+SN+IN
    "b": (True, "none", True, "none"),  # attnG+SN+noIN
    "c": (False, "instance", False, "instance"),  # attnG+noSN+IN
    "d": (False, "instance", True, "none"),  # attnG+SNinD+INinG
    "dcgan": (False, "batch", False, "batch"),  # Table 2
    "wgan-div": (False, "batch", False, "layer"),
    "sngan": (False, "batch", True, "none"),
}


class Generator(nn.Module):
    """Noise z (N, z_dim) -> images (N, channels, 64, 64) in [-1, 1] (Table 1).

    With instance norm only the direction of z counts, but for its eps: the first layer is linear.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        sn, norm, _, _ = NORMS[args.method]
        attend = PooledAttention if args.attn_block == "pooled" else SelfAttention
        self.layers, channels = nn.Sequential(), args.z_dim
        for i, out in enumerate([*(args.g_ch * k for k in (8, 4, 2, 1)), args.channels], start=1):
            stride, padding = (1, 0) if i == 1 else (2, 1)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False)
            self.layers.add_module(f"conv{i}", gaussian(conv, sn and i < 5))
            if i < 5:
                self.layers.add_module(f"norm{i}", NORM_LAYERS[norm](out))
                self.layers.add_module(f"act{i}", nn.ReLU())
            if args.method in "abcd" and i in args.attn_blocks:
                block = attend(out, bias=False)
                for conv in block.children():
                    gaussian(conv, sn or args.attn_sn == "always")
                self.layers.add_module(f"attn{i}", block)
            channels = out
        self.layers.add_module("tanh", nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])

    def attention_maps(self, z: Tensor) -> dict[str, Tensor]:
        """Weights (N, positions, positions attended to) of each attention block, by name."""
        maps, x = {}, z[:, :, None, None]
        for name, layer in self.layers.named_children():
            if name.startswith("attn"):
                maps[name] = layer.attention_map(x)
            x = layer(x)
        return maps


class Discriminator(nn.Module):
    """Images (N, channels, 64, 64) -> logits or critic scores (N,) (Table 1)."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        _, _, sn, norm = NORMS[args.method]
        norm = "batch" if norm == "layer" and args.recipe == "author" else norm
        self.layers, channels = nn.Sequential(), args.channels
        for i, out in enumerate([*(args.d_ch * k for k in (1, 2, 4, 8)), 1], start=1):
            stride, padding = (2, 1) if i < 5 else (1, 0)
            conv = nn.Conv2d(channels, out, 4, stride, padding, bias=False)
            self.layers.add_module(f"conv{i}", gaussian(conv, sn))
            if 1 < i < 5 or (i == 1 and norm == "instance"):
                self.layers.add_module(f"norm{i}", NORM_LAYERS[norm](out))
            if i < 5:
                self.layers.add_module(f"act{i}", nn.LeakyReLU(0.2))
            channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


# --------------------------------------------------------------------------------------------------
# 5. Losses
# --------------------------------------------------------------------------------------------------
# Of a logit s: D's loss on a real image, D's on a generated one, G's. Means over the batch follow.
ADVERSARIAL = {
    "wasserstein": (lambda s: -s, lambda s: s, lambda s: -s),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
    "bce": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    # With the label 0.9 for real: 0.9 softplus(-s) + 0.1 softplus(s) = softplus(s) - 0.9 s.
    "bce-0.9": (lambda s: F.softplus(s) - 0.9 * s, F.softplus, lambda s: F.softplus(s) - 0.9 * s),
}
LOSS = {  # of the others it is "wasserstein"
    "paper": {"dcgan": "bce", "sngan": "hinge"},
    "author": {"dcgan": "bce-0.9", "sngan": "bce-0.9"},
}


def score_and_slope(D: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores D(x) (N,) and ||grad_x D(x)||_2 (N,) of images x (N, C, H, W), in fp32.

    The norm is over all values of a sample; `norm`, unlike a root of squares, has a gradient at 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        scores = D(x)
        # Of the sum: each sample's own gradient, as long as D has no batch norm.
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        return scores, grad.flatten(1).norm(dim=1)


def critic(
    D: nn.Module, real: Tensor, fake: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scores (N,) of real and fake images (N, C, H, W), and slopes (N,) by where they are taken.

    Without u at the images themselves, as public code does; with u (N, 1, 1, 1) at real +
    u (fake - real), as WGAN-div's algorithm does.
    """
    if u is None:
        real_scores, real_slope = score_and_slope(D, real)
        fake_scores, fake_slope = score_and_slope(D, fake)
        return real_scores, fake_scores, {"real": real_slope, "fake": fake_slope}
    with torch.autocast(real.device.type, enabled=False):
        real_scores, fake_scores = D(real), D(fake)
    return real_scores, fake_scores, {"mixed": score_and_slope(D, real + u * (fake - real))[1]}


def divergence_penalty(slopes: dict[str, Tensor], k: float, p: float) -> Tensor:
    """k E ||grad D(x^)||^p; over real and fake images: the mean of the two means."""
    return k * torch.cat(list(slopes.values())).pow(p).mean()


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
def open_idx(kind: type[Dataset], args: Args) -> Dataset:
    """torchvision's MNIST or FashionMNIST; fid.UserError names a file that is not whole."""
    counts = {}
    for name, rank in (("train-images-idx3-ubyte", 3), ("train-labels-idx1-ubyte", 1)):
        path = Path(args.data_dir, kind.__name__, "raw", name)
        if path.exists():
            _, *dims = np.fromfile(path, ">u4", 1 + rank).tolist() or [0]  # after a magic number
            size, needed = path.stat().st_size, 4 + 4 * rank + math.prod(dims)
            text = f"{path} has {size} bytes, its header {dims} asks for {needed}"
            if size != needed:
                raise fid.UserError(f"{text}; remove it, and --download fetches it again")
            counts[name] = dims[0]
    if len(set(counts.values())) > 1:
        raise fid.UserError(f"{path.parent} is of two data sets, counts {counts}; remove one file")
    return kind(args.data_dir, download=args.download)


SOURCES = {  # how to open each data set, and how to get it
    "mnist": (
        lambda args: open_idx(torchvision.datasets.MNIST, args),
        "use --download, or put the idx files of https://ossci-datasets.s3.amazonaws.com/mnist/ "
        "into MNIST/raw/ there, unpacked",
    ),
    "fashion-mnist": (
        lambda args: open_idx(torchvision.datasets.FashionMNIST, args),
        "use --download, or put the idx files of https://github.com/zalandoresearch/fashion-mnist "
        "into FashionMNIST/raw/ there, unpacked",
    ),
    "folder": (lambda args: fid.Folder(args.data_dir), "name a folder of images by --data-dir"),
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
FORMAT = 2  # of the checkpoints; 2: with the name of the data
load_checkpoint = functools.partial(fid.load_checkpoint, Path(__file__).stem, FORMAT)
FREE_FLAGS = {  # what a resumed run may change: whatever leaves the training alone
    "mode", "resume", "checkpoint", "dry_run", "total_steps", "log_every", "sample_every",
    "eval_every", "save_every", "num_workers", "device", "out_dir", "data_dir", "download",
    "num_samples", "fid_batch_size", "epochs", "fid_distinct", "query_pixels",
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


@torch.no_grad()
def generate(G: nn.Module, *inputs: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) of noise (N, z_dim), and of what else G takes, in eval mode."""
    training, device = G.training, next(G.parameters()).device
    images = G.eval()(*(x.to(device) for x in inputs)).mul(127.5).add(127.5).round().clamp(0, 255)
    G.train(training)
    return images.to(torch.uint8)


def sample_grid(args: Args, G: nn.Module) -> Tensor:
    """uint8 images (num_samples, C, H, W) of the first noise."""
    parts = eval_noise(args, args.num_samples).split(args.fid_batch_size)
    return torch.cat([generate(G, z).cpu() for z in parts])


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


def replica_fid(args: Args, inception: nn.Module, G: nn.Module, images: np.ndarray) -> float:
    """FID as the public code computed it: `fid_distinct` images a side, repeated to 10,000 or more.

    Every image is stretched to its own range. With batch 2048 the 608 images of an epoch's last
    batch became 10,336 files: a covariance of rank 607, a value comparable with nothing else.
    """
    n, sides = min(args.fid_distinct, len(images)), []
    fakes = torch.cat([generate(G, z).cpu() for z in eval_noise(args, n).split(100)])
    for part in (torch.tensor(images[-n:]), fakes):
        one, repeated = fid.Moments(device=inception.device), fid.Moments(device=inception.device)
        for batch in part.split(args.fid_batch_size):
            low, high = batch.amin((1, 2, 3), True).int(), batch.amax((1, 2, 3), True).int()
            stretched = (batch - low) * 255 / (high - low).clamp_min(1)
            one.update(inception(stretched.round().to(torch.uint8))[0])
        for _ in range(math.ceil(10_000 / n)):
            repeated.merge(one)
        sides.append(repeated)
    return fid.frechet_distance(*sides)


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: the scores of a checkpoint, printed and kept in evaluate.json beside it."""
    args, device, G, _, folder = open_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, _, path = load_images(args, args.channels)
    scores = score(args, inception, G, images, path, eval_noise(args, args.fid_num))
    if args.fid_distinct:
        scores["metric/replica"] = value = replica_fid(args, inception, G, images)
        fid.say(f"replica of the public code, repeated images, not a protocol of FID: {value:.6g}")
    record = {**scores, **inception.protocol}
    fid.write_text(folder / "evaluate.json", json.dumps(record, indent=2))
    return scores


def sample(args: Args) -> None:
    """Mode sample: PNGs of a checkpoint's generator, and a grid of them."""
    args, _, G, _, folder = open_checkpoint(args)
    images = sample_grid(args, G)
    fid.write_images(folder, images, math.isqrt(len(images)))


@torch.no_grad()
def attention_figure(args: Args, G: nn.Module, z: Tensor) -> tuple[Tensor, int]:
    """uint8 cells (cells, 3, 128, 128) and their columns: a row for each image and query pixel.

    A row has the image with the query pixel in red, then what each attention block gives that
    pixel, brightest = its largest weight. Pooled maps have half the side; all are enlarged.
    """
    images, maps, cells = generate(G, z).expand(-1, 3, -1, -1), G.attention_maps(z), []
    for n, image in enumerate(images.cpu()):
        for row, column in args.query_pixels:
            marked = image.clone()
            around = slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
            marked[:, *around] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
            line = [marked]
            for weights in maps.values():
                side, seen = (math.isqrt(size) for size in weights.shape[1:])
                query = row * side // args.img_size * side + column * side // args.img_size
                grey = weights[n, query].view(1, seen, seen) / weights[n, query].max() * 255
                line += [grey.round().to(torch.uint8).cpu().expand(3, -1, -1)]
            cells += [F.interpolate(cell[None], size=128, mode="nearest") for cell in line]
    return torch.cat(cells), 1 + len(maps)


PUBLISHED = {  # FID on MNIST, Fashion-MNIST: Tables 2 and 3
    "dcgan": (45.7734, 86.5129), "wgan-div": (83.1224, 104.1503), "sngan": (26.0231, 46.9646),
    "a": (86.7291, 127.7808), "b": (59.8766, 107.4283), "c": (101.1107, 153.7099),
    "d": (55.6425, 100.8650),
}  # fmt: skip


def order(fids: dict[str, float]) -> str:
    """Whether FIDs by method have the paper's order d < b < a < c."""
    if missing := [method for method in "dbac" if method not in fids]:
        return f"not to be told, missing {' '.join(missing)}"
    return "holds" if fids["d"] < fids["b"] < fids["a"] < fids["c"] else "does not hold"


def compare_methods(out_dir: Path) -> str:
    """Tables 2 and 3 from the run folders beside the published numbers, as Markdown.

    A run counts for its method with the method's default flags only, by its best FID, as the
    paper's do; the mean over seeds. Every run is listed, with what may set it apart from others.
    """
    runs, best = ["| run | step | batch | widths | samples | best FID | last FID |"], {}
    runs += ["|---" * 7 + "|"]
    for path in sorted(out_dir.glob(f"{Path(__file__).stem}__*/args.json")):
        args = json.loads(path.read_text())["args"]
        log = fid.read_records(path.with_name("log.jsonl"))
        fids = [record["metric/fid"] for record in log if "metric/fid" in record]
        recipe = DEFAULTS.get(("paper", args["method"]), {})
        usual = asdict(Args(method=args["method"], dataset=args["dataset"], **recipe))
        usual = json.loads(json.dumps(usual))  # tuples become lists, as in args.json
        apart = {key for key, value in usual.items() if value != args.get(key)}
        apart -= {"fid_weights"} if args["fid_weights"] != "random" else set()
        apart -= FREE_FLAGS | {"seed", "deterministic", "amp", "compile", "cuda_graphs"}
        if fids and not apart:
            best.setdefault((args["method"], args["dataset"]), []).append(min(fids))
        scores = f"{min(fids):.4f} | {fids[-1]:.4f}" if fids else "none | none"
        scores = f"{scores} {fid.run_label(path.parent)}".rstrip()
        about = f"{args['batch_size']} | {args['g_ch']}, {args['d_ch']} | {args['fid_num']}"
        step = log[-1]["step"] if log else 0
        runs.append(f"| {path.parent.name} | {step} | {about} | {scores} |")
    table, orders = ["| data set | method | paper | ours (seeds) |", "|---|---|---|---|"], []
    for i, dataset in enumerate(("mnist", "fashion-mnist")):
        ours = {method: np.mean(fids) for (method, data), fids in best.items() if data == dataset}
        for method, published in PUBLISHED.items():
            seeds = len(best.get((method, dataset), []))
            mean = f"{ours[method]:.4f} ({seeds})" if seeds else "not run"
            table.append(f"| {dataset} | {method} | {published[i]:.4f} | {mean} |")
        published = order({method: value[i] for method, value in PUBLISHED.items()})
        orders.append(f"- {dataset}: published {published}; ours {order(ours)}")
    parts = ["# FID of Tables 2 and 3, lower is better", "", *table, "", "Order d < b < a < c:", ""]
    return "\n".join([*parts, *orders, "", "Runs:", "", *runs, ""])


def figures(args: Args) -> None:
    """Mode figures: samples, attention, curves, and Tables 2 and 3 from all runs in out_dir."""
    out_dir = Path(args.out_dir)
    args, device, G, _, folder = open_checkpoint(args)
    images, _, _ = load_images(args, args.channels)
    n, target = args.num_samples, folder / "figures"
    target.mkdir(exist_ok=True)
    z = eval_noise(args, n)
    fid.write_grid(target / "samples.png", sample_grid(args, G), math.isqrt(n))
    fid.write_grid(target / "real.png", torch.from_numpy(images[:n]), math.isqrt(n))
    fid.write_grid(target / "attention.png", *attention_figure(args, G, z[:4].to(device)))
    keys = ["loss/d", "loss/g", "logit/gap", "loss/d_reg", "metric/fid"]
    logged = sorted({key for record in fid.read_records(folder / "log.jsonl") for key in record})
    keys += [key for key in logged if key.startswith(("grad/", "train/gamma"))]
    fid.plot(target / "curves.png", folder / "log.jsonl", keys)
    fid.write_text(target / "report.md", compare_methods(out_dir))
    fid.say(f"samples, real, attention, curves and report.md (Tables 2 and 3) are in {target}")


# --------------------------------------------------------------------------------------------------
# 9. Training
# --------------------------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from the run's checkpoint; the last evaluation's metrics."""
    device = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, path = load_images(args, args.channels)
    torch.manual_seed(args.seed)  # here: decoding, where it is due, draws random numbers too
    if args.epochs:
        args.total_steps = -(-args.epochs * (len(images) // args.batch_size) // args.n_critic)
    G, D = Generator(args).to(device), Discriminator(args).to(device)
    adam = {"betas": (args.beta1, args.beta2), "fused": True, "capturable": args.cuda_graphs}
    g_opt = torch.optim.Adam(G.parameters(), args.g_lr, **adam)
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, **adam)
    run = Run(args, device, path.stem, G=G, D=D, g_opt=g_opt, d_opt=d_opt)
    batches = endless_batches(images, labels, args, device, run.step * args.n_critic)
    loss = LOSS[args.recipe].get(args.method, "wasserstein")
    d_real, d_fake, g_fake = ADVERSARIAL[loss]
    if loss == "wasserstein" and any(isinstance(m, nn.BatchNorm2d) for m in D.modules()):
        fid.warn("batch norm in D: the gradients that the penalty is taken of mix samples")
    n, stop, metrics = args.batch_size, False, {}
    forward_G, forward_D = (torch.compile(net) if args.compile else net for net in (G, D))

    def d_update(real: Tensor, z: Tensor, u: Tensor) -> dict[str, Tensor]:
        with run.autocast(), torch.no_grad():
            fake = forward_G(z).float()
        if loss == "wasserstein":
            mixed = u if args.div_points == "interp" else None
            real_logits, fake_logits, slopes = critic(D, real, fake, mixed)
            d_reg = divergence_penalty(slopes, args.div_k, args.div_p)
        else:
            with run.autocast():
                real_logits, fake_logits = forward_D(real).float(), forward_D(fake).float()
            slopes, d_reg = {}, torch.zeros((), device=device)
        d_loss_real, d_loss_fake = d_real(real_logits).mean(), d_fake(fake_logits).mean()
        d_loss = d_loss_real + d_loss_fake + args.div_scale * d_reg
        d_norm = run.update(d_loss, "D")
        terms = {
            "loss/d": d_loss, "loss/d_real": d_loss_real, "loss/d_fake": d_loss_fake,
            "loss/d_reg": d_reg, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), "grad/d_norm": d_norm,
            "logit/gap": real_logits.mean() - fake_logits.mean(),  # the W estimate of a critic
        }  # fmt: skip
        for where, slope in slopes.items():
            terms |= {f"grad/x_{where}_mean": slope.mean(), f"grad/x_{where}_max": slope.max()}
        return terms

    def g_update(z: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            logits = forward_D(forward_G(z)).float()
        g_loss = g_fake(logits).mean()
        return {"loss/g": g_loss, "grad/g_norm": run.update(g_loss, "G")}

    if args.cuda_graphs:
        d_update, g_update = fid.graphed(d_update), fid.graphed(g_update)
    while run.step < args.total_steps and not stop:
        for _ in range(args.n_critic):
            real, _ = next(batches)
            if args.hflip:
                real = torch.where(run.draw(torch.rand, n, 1, 1, 1) < 0.5, real.flip(3), real)
            z = run.draw(torch.randn, n, args.z_dim)
            terms = d_update(real, z, run.draw(torch.rand, n, 1, 1, 1))
        stop = run.collect(terms | g_update(run.draw(torch.randn, n, args.z_dim)))
        if run.due(args.log_every):
            gains = {
                f"train/gamma_g_{name.split('.')[1]}": value.item()
                for name, value in G.named_parameters()
                if name.endswith(".gamma")
            }
            run.log_interval(gains)
        if run.due(args.sample_every) and run.rank == 0:
            grid = sample_grid(args, G)
            fid.write_grid(run.folder / f"samples/{run.step:07d}.png", grid, math.isqrt(len(grid)))
        if run.due(args.eval_every):
            metrics = score(args, inception, G, images, path, eval_noise(args, args.fid_num))
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
    args = parse()
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
