# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""Attentive Normalization for Conditional Image Generation (Wang et al., 2020): inpainting.

A coarse network fills the hole of a photograph, a second one refines it. Half of the second sees
its features split softly into regions, each normalised by itself (attentive normalization, AN) in
place of contextual attention (CA) or self-attention. Section 5.3 of the paper; first by
reconstruction alone, then against Wasserstein critics too.

    python an_inpaint.py --data-dir paris                             # Table 3, AN
    python an_inpaint.py --dataset folder --data-dir photos --img-size 128
    python an_inpaint.py --mode inpaint --checkpoint runs/.../checkpoint.pt \\
        --image photo.jpg --mask hole.png --output filled.png         # white = missing

FID is among the scores only where --fid-weights names Inception weights.

Differences from the paper
 1. The layer tables are those of the authors' code; critics are without its self-attention layers,
    which were not released.
 2. The weight of the reconstruction is not given: 1.2, on the mean error of the hole plus that of
    the known pixels, of both stages' outputs (`--reconstruction full` is Eq. 9 on both).
 3. AN follows the paper, not the authors' inpainting code: sampling off at test, affine
    parameters, squared orthogonality penalty, max-pooled keys. Its weight 1e-3 is not given.
 4. Critic steps (5), batch (16), phase lengths (40,000 each) are the authors' code's or ours.
 5. Photographs are resized to 256 on their shorter side, then cropped at random; the authors crop
    without resizing (`--no-resize`). Initialisation is PyTorch's.
 6. The paper's mask, range and compositing for Table 3 are not stated: centred 128x128 holes;
    scores on [0, 1], 8 bits, known pixels exact. Its MAE fits twice that range or no compositing.

Evidence: see README.md, "The papers, row by row". Paris StreetView has not been trained on; the
full-size networks and the 80,000 steps have not been run.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

import fid


# --------------------------------------------------------------------------------------------------
# 2. Arguments
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # Run
    mode: Literal["train", "evaluate", "sample", "figures", "inpaint"] = "train"
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
    dataset: Literal["paris-streetview", "folder", "shapes"] = "paris-streetview"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    data_dir: str = "data"
    """folder of the data set and of the cache of its decoded images"""
    eval_from: str = ""
    """folder of held-out images; empty: val/ or test/ of paris-streetview, else each 20th image,
    which is never trained on"""
    img_size: int = 256
    """side of the square images in pixels; 0: the paper's for the data set"""
    resize: bool = True
    """shrink or enlarge photographs to --img-size on their shorter side before the crop"""
    hflip: bool = False
    """mirror half of the training images, drawn anew each time"""
    num_workers: int = 4
    """processes that decode the images, once"""
    # Model
    g_ch: int = 32
    """base width of the generator, in channels"""
    d_ch: int = 64
    """base width of the discriminator, in channels"""
    # Optimisation
    total_steps: int = 0  # 0: both phases
    """generator updates to train for"""
    batch_size: int = 16
    """images per update, shared out over the processes"""
    n_critic: int = 5
    """discriminator updates per generator update"""
    g_lr: float = 1e-4
    """learning rate of the generator"""
    d_lr: float = 1e-4
    """learning rate of the discriminator"""
    beta1: float = 0.5
    """Adam's decay rate of the gradient's mean"""
    beta2: float = 0.9
    """Adam's decay rate of the squared gradient's mean"""
    # Speed
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA has it, else fp16, off on the CPU"""
    compile: bool = False
    """compile the networks' passes by torch.compile, but for those of a gradient penalty"""
    # Intervals, in steps; the last step counts as each of them
    log_every: int = 100
    """steps between lines of the log"""
    sample_every: int = 2_000
    """steps between sample grids; 0: none"""
    eval_every: int = 5_000
    """steps between evaluations; 0: none"""
    save_every: int = 2_000
    """steps between checkpoints"""
    # Evaluation
    fid_num: int = 100
    """generated images of an evaluation"""
    fid_real: int = 0
    """real images of an evaluation, spread over the data set; 0: all"""
    fid_batch_size: int = 16
    """images per forward pass of an evaluation"""
    fid_weights: str = ""
    """Inception weights: auto (find or download), a path, or random (smoke tests only)"""
    eval_seed: int = 0
    """seed of the noise of grids, samples and evaluations"""
    num_samples: int = 12
    """images of a sample grid and of mode sample"""
    eval_mask: Literal["centre", "rect", "stroke", "file"] = "centre"
    """holes of the held-out images; file: of --mask-dir, by the images' names without suffix"""
    compare: tuple[str, ...] = ()
    """checkpoints of other models whose results stand in the strips of mode figures too"""
    # Mode inpaint
    image: str = ""
    """photograph of any size; for an_inpaint.py also a folder of them"""
    mask: str = ""
    """its mask, white = missing, of the same size, or a folder of masks of the same names"""
    output: str = ""
    """PNG to write, or the folder of them; empty: inpainted/ beside the checkpoint"""
    invert_mask: bool = False
    """mask files are black where pixels are missing"""
    # Paper
    refine: Literal["an", "ca", "sa", "plain", "none"] = "an"  # Table 3
    """module of the second stage: AN, contextual attention, self-attention; none: no branch B"""
    widths: Literal["official", "deepfill"] = "official"
    """widths of the second stage and of the critics: the authors' code's, or DeepFill v1's"""
    fuse: bool = True
    """favour runs of neighbouring matches in contextual attention"""
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
    phase1_steps: int = 40_000
    """generator updates by reconstruction alone, without critics"""
    phase2_steps: int = 40_000
    """generator updates against the critics that follow; --total-steps may end the run earlier"""
    critics: Literal["global-local", "global", "global-patch"] = "global-local"
    """critics of the whole image, of the box round the hole, of patches that touch the hole"""
    lambda_rec: float = 1.2
    """weight of the reconstruction (the paper does not say)"""
    lambda_adv: float = 1e-3
    """weight of the critics' score in the generator's loss of phase 2"""
    lambda_gp: float = 10.0
    """weight of the gradient penalty"""
    gp_region: Literal["full", "hole"] = "full"
    """gradient in the penalty: all of it (Eq. 10), or its part in the hole (the authors' code)"""
    reconstruction: Literal["regional", "full", "discount"] = "regional"
    """L1: hole plus known pixels, whole image (Eq. 9), or the hole's depth discounted (DeepFill)"""
    train_mask: Literal["centre", "rect", "stroke", "file"] = "rect"
    """holes to train on: centred square, random rectangle, brush strokes, files of --mask-dir"""
    mask_dir: str = ""
    """folder of mask files of --img-size, white = missing"""
    shared_mask: bool = False
    """one hole for all images of a batch"""
    box: int = 0
    """side of the square hole, and of the local critic's view, in pixels; 0: half of --img-size"""
    shrink: float = 0.125
    """most that a random rectangle loses on each side, as a share of --box"""

    def __post_init__(self) -> None:
        self.exp_name = self.exp_name or self.refine
        self.img_size = self.img_size or 256
        self.box = self.box or self.img_size // 2
        self.total_steps = self.total_steps or self.phase1_steps + self.phase2_steps
        self.compare = tuple(self.compare)


POSITIVE = (
    "img_size", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples", "entities", "box",
)  # fmt: skip
AN_FLAGS = (
    "entities", "region_stats", "self_sampling", "lambda_ortho", "an_reading", "an_value", "tau",
    "entity_init",
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
    size, last = args.img_size, args.phase1_steps + args.phase2_steps
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    boxes, masks = args.train_mask in ("centre", "rect"), bool(args.mask_dir)
    rules = (
        (size >= 64 and size % 8 == 0, "img_size", "be a multiple of 8, at least 64"),
        (args.box <= size, "box", f"fit into --img-size {size}"),
        (args.shrink < 0.5, "shrink", "be below 0.5, or nothing is left of the hole"),
        (args.tau > 0, "tau", "be above 0"),
        (on_gpu or args.amp in ("auto", "off"), "amp",
         "be off on the CPU: PyTorch's bf16 gradient of the critics' last layers is wrong there"),
        (args.total_steps <= last, "total_steps", f"be at most {last}, the steps of both phases"),
        (boxes or args.critics != "global-local", "critics",
         f"be global or global-patch with --train-mask {args.train_mask}, which has no box"),
        (boxes or args.reconstruction != "discount", "reconstruction",
         f"be regional or full with --train-mask {args.train_mask}, which has no box"),
        (masks or args.train_mask != "file", "train_mask", "not be file without --mask-dir"),
        (masks or args.eval_mask != "file", "eval_mask", "not be file without --mask-dir"),
    )  # fmt: skip
    for rule, flag, must in rules:
        require(rule, flag, must, getattr(args, flag))
    unused = {"an": ("fuse",), "ca": AN_FLAGS}.get(args.refine, ("fuse", *AN_FLAGS))
    stay(args, Args, unused, f"with --refine {args.refine}")
    stay(args, Args, () if args.mode == "inpaint" else ("output",), "without --mode inpaint")
    stay(args, Args, () if args.mode == "figures" else ("compare",), "without --mode figures")
    for folder in filter(None, (args.mask_dir, args.eval_from)):
        fid.image_files(folder)  # raises where there are none
    for flag in ("image", "mask"):
        given, must = getattr(args, flag), "be given with --mode inpaint, and only there"
        require(bool(given) == (args.mode == "inpaint"), flag, must, given or "nothing")


# --------------------------------------------------------------------------------------------------
# 3. Layers
# --------------------------------------------------------------------------------------------------
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


class ContextualAttention(nn.Module):
    """Rebuild each position of a map from the known patches that look like it (Yu et al. 2018).

    Features (N, C, H, W), mask (N, 1, H, W), H and W even -> (N, C, H, W). Patches of 3x3 are
    compared on the map halved by picking every other position; those that touch the hole drop out;
    the full map's 4x4 patches are pasted over each other, weighted, 2 apart. No parameters.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.fuse, self.scale = args.fuse, 10.0

    def similarity(self, x: Tensor) -> Tensor:
        """s (N, P, P) of the halved map's P patches: row p likens patch p to all normed ones."""
        patches = F.unfold(x[..., ::2, ::2], 3, padding=1)
        normed = patches / patches.norm(dim=1, keepdim=True).clamp_min(1e-4)
        s = patches.transpose(1, 2) @ normed
        if not self.fuse:
            return s
        height, width = x.shape[2] // 2, x.shape[3] // 2
        for rows, columns in ((height, width), (width, height)):
            # Along the diagonals in row-major order, then in column-major; row ends wrap around.
            around = F.pad(s, (1, 1, 1, 1))
            s = around[:, :-2, :-2] + s + around[:, 2:, 2:]
            s = s.unflatten(2, (rows, columns)).unflatten(1, (rows, columns))
            s = s.permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)
        return s

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """a (N, P, P): row p weighs the patches, and sums to at most 1.

        Masked ones score 0, not minus infinity, and then count for nothing.
        """
        touched = F.unfold(mask[..., ::2, ::2].to(x.dtype), 3, padding=1).amax(dim=1, keepdim=True)
        known = (touched == 0).to(x.dtype)
        logits = self.scale * self.similarity(x) * known
        # Weights below e^-60 are nothing; their denormal products would slow a CPU down tenfold.
        floor = logits.detach().amax(dim=2, keepdim=True) - 60
        return known * logits.maximum(floor).softmax(dim=2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            pasted = F.unfold(values, 4, stride=2, padding=1)
            out = pasted @ self.attention(values, mask).transpose(1, 2)
            return (F.fold(out, x.shape[2:], 4, stride=2, padding=1) / 4).to(x.dtype)


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


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
def conv2d(c_in: int, c_out: int, size: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Convolution that keeps the size of a map, or halves it, with zeros around."""
    return nn.Conv2d(c_in, c_out, size, stride, dilation * (size // 2), dilation)


def elus(*convs: nn.Module) -> list[nn.Module]:
    """Each convolution and an ELU after it; no normalisation."""
    return [layer for module in convs for layer in (module, nn.ELU())]


def encoder(c: int, row2: int, row4: int) -> list[nn.Module]:
    """Rows 1 to 5 of the layer table, to 4c channels at a quarter of the size: 5 -> 4c."""
    rows = conv2d(5, c, 5), conv2d(c, row2, 3, 2), conv2d(row2, 2 * c), conv2d(2 * c, row4, 3, 2)
    return elus(*rows, conv2d(row4, 4 * c))


def dilated(c: int) -> list[nn.Module]:
    """Rows 6 to 10: 4c -> 4c."""
    return elus(conv2d(4 * c, 4 * c), *(conv2d(4 * c, 4 * c, dilation=d) for d in (2, 4, 8, 16)))


def decoder(c: int, channels: int) -> list[nn.Module]:
    """Rows 11 to 17, from a quarter of the size up to an image: channels -> 3."""
    double = nn.Upsample(scale_factor=2)
    return [
        *elus(conv2d(channels, 4 * c), conv2d(4 * c, 4 * c)),
        *(double, *elus(conv2d(4 * c, 2 * c), conv2d(2 * c, 2 * c))),
        *(double, *elus(conv2d(2 * c, c), conv2d(c, c // 2)), conv2d(c // 2, 3)),
    ]


class Generator(nn.Module):
    """Images (N, 3, H, W) in [-1, 1], mask (N, 1, H, W) with 1 = missing -> coarse and fine images.

    H and W multiples of 8. What the image holds under the mask is never seen.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        c, self.refine = args.g_ch, args.refine
        row2, row4 = (2 * c, 4 * c) if args.widths == "official" else (c, 2 * c)
        self.coarse = nn.Sequential(*encoder(c, 2 * c, 4 * c), *dilated(c), *decoder(c, 4 * c))
        self.branch_a = nn.Sequential(*encoder(c, row2, row4), *dilated(c))
        self.decoder = nn.Sequential(*decoder(c, 4 * c if args.refine == "none" else 8 * c))
        self.module = None
        if args.refine == "none":
            return
        self.branch_b = nn.Sequential(*encoder(c, row2, 4 * c), conv2d(4 * c, 4 * c))
        modules = {
            "an": lambda: AttentiveNorm(4 * c, args),
            "ca": lambda: ContextualAttention(args),
            "sa": lambda: PooledAttention(4 * c, bias=False),
            "plain": nn.Identity,
        }
        self.module = modules[args.refine]()
        self.branch_b_end = nn.Sequential(*elus(conv2d(4 * c, 4 * c), conv2d(4 * c, 4 * c)))

    def semantic(self, x: Tensor, mask: Tensor) -> Tensor:
        """Branch B: the module stands between a convolution and its activation."""
        x = self.branch_b(x)
        if self.refine == "ca":
            x = self.module(F.relu(x), F.interpolate(mask, x.shape[2:]))  # nearest
        else:
            x = F.elu(self.module(x))
        return self.branch_b_end(x)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        image, ones = image * (1 - mask), torch.ones_like(mask)
        coarse = self.coarse(torch.cat((image, ones, mask), dim=1)).clamp(-1, 1)
        x = torch.cat((composite(coarse, image, mask), ones, mask), dim=1)
        maps = [self.branch_a(x)] + ([self.semantic(x, mask)] if self.refine != "none" else [])
        return coarse, self.decoder(torch.cat(maps, dim=1)).clamp(-1, 1)


def strided(widths: Sequence[int]) -> list[nn.Module]:
    """5x5 convolutions of stride 2 from an image on, each with a LeakyReLU."""
    pairs = itertools.pairwise((3, *widths))
    return [layer for a, b in pairs for layer in (conv2d(a, b, 5, 2), nn.LeakyReLU(0.2))]


class Critic(nn.Module):
    """Images (N, 3, S, S) -> scores (N,): 5x5 convolutions of stride 2 and a linear layer."""

    def __init__(self, widths: Sequence[int], size: int) -> None:
        super().__init__()
        for _ in widths:
            size = (size + 1) // 2
        linear = nn.Linear(widths[-1] * size**2, 1)
        self.layers = nn.Sequential(*strided(widths), nn.Flatten(), linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


class PatchCritic(nn.Module):
    """Images (N, 3, H, W), mask -> scores (N,): mean score of the patches that touch the hole."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*strided(widths), conv2d(widths[-1], 1, 5, 2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.layers(x)
        touched = F.adaptive_max_pool2d(mask, scores.shape[2:])
        return (scores * touched).sum(dim=(1, 2, 3)) / touched.sum(dim=(1, 2, 3)).clamp_min(1)


class Discriminator(nn.Module):
    """Images (N, 3, S, S), mask (N, 1, S, S), box corners (N, 2) -> summed critic scores (N,)."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        official = args.widths == "official"
        whole, local = ((1, 2, 4, 8, 4, 2),) * 2 if official else ((1, 2, 4, 4), (1, 2, 4, 8))
        self.box = args.box
        self.whole = Critic([args.d_ch * k for k in whole], args.img_size)
        self.local = self.patch = None
        if args.critics == "global-local":
            self.local = Critic([args.d_ch * k for k in local], args.box)
        if args.critics == "global-patch":
            self.patch = PatchCritic([args.d_ch * k for k in (1, 2, 4, 8)])

    def views(self, x: Tensor, mask: Tensor, box: Tensor) -> list[tuple[Callable, Tensor]]:
        """Each critic, and what it sees of x."""
        pairs = [(self.whole, x)]
        if self.local:
            pairs += [(self.local, crop_boxes(x, box, self.box))]
        if self.patch:
            pairs += [(lambda image: self.patch(image, mask), x)]
        return pairs

    def forward(self, x: Tensor, mask: Tensor, box: Tensor) -> Tensor:
        return sum(critic(view) for critic, view in self.views(x, mask, box))


def composite(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The image with its hole filled from the output."""
    return output * mask + image * (1 - mask)


def crop_boxes(x: Tensor, box: Tensor, side: int) -> Tensor:
    """Squares (N, C, side, side) of x (N, C, H, W), each image's: box (N, 2) holds top, left."""
    n, span = torch.arange(len(x), device=x.device), torch.arange(side, device=x.device)
    rows, columns = (box[:, i, None] + span for i in (0, 1))
    return x[n[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------------------
# 5. Losses
# --------------------------------------------------------------------------------------------------
def mean_l1(output: Tensor, real: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """L1 averaged over the hole's pixels plus L1 averaged over the known ones, of each image.

    `weight` (N, 1, H, W) scales the errors in the hole.
    """
    error = (output - real).abs().mean(dim=1, keepdim=True)
    hole = mask if weight is None else mask * weight
    sums = [(error * part).sum(dim=(1, 2, 3)) for part in (hole, 1 - mask)]
    counts = [part.sum(dim=(1, 2, 3)).clamp_min(1) for part in (mask, 1 - mask)]
    return (sums[0] / counts[0] + sums[1] / counts[1]).mean()


def depth_discount(box: Tensor, side: int, size: int) -> Tensor:
    """0.9 to the power of the distance to the box's nearest side: (N, 1, size, size) (DeepFill)."""
    at = torch.arange(size, device=box.device) - box[..., None]  # (N, 2, size)
    deep = torch.minimum(at, side - 1 - at).clamp_min(0)
    return (0.9 ** torch.minimum(deep[:, 0, :, None], deep[:, 1, None, :]))[:, None]


def reconstruction_loss(
    args: Args, coarse: Tensor, fine: Tensor, real: Tensor, mask: Tensor, box: Tensor
) -> Tensor:
    """Summed L1 of both stages' outputs to the real images, before compositing."""
    if args.reconstruction == "full":
        return (coarse - real).abs().mean() + (fine - real).abs().mean()  # the L1 of Eq. 9
    if args.reconstruction == "discount":
        weight = depth_discount(box, args.box, args.img_size)
        return 1.2 * mean_l1(coarse, real, mask, weight) + mean_l1(fine, real, mask, weight)
    return mean_l1(coarse, real, mask) + mean_l1(fine, real, mask)


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


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """E (||grad D(x^)||_2 - 1)^2 at x^ = eps x + (1 - eps) x~, in fp32; eps (N, 1, 1, 1).

    The norm is over all values of a sample; `norm`, unlike a root of squares, has a gradient at 0.
    """
    with torch.autocast(real.device.type, enabled=False):
        mixed = (eps * real + (1 - eps) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def critics_penalty(
    D: Discriminator, real: Tensor, fake: Tensor, mask: Tensor, box: Tensor, region: str,
    draw: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """Sum of the critics' gradient penalties (Eq. 10), each with mixing weights of its own.

    Region "hole": only the gradient of the pixels in the hole enters the norm.
    """
    views, penalties = [D.views(x, mask, box) for x in (real, fake, mask)], []
    for (critic, r), (_, f), (_, m) in zip(*views):

        def score(x: Tensor, critic: Callable = critic, m: Tensor = m) -> Tensor:
            return critic(x if region == "full" else torch.where(m > 0, x, x.detach()))

        penalties.append(gradient_penalty(score, r, f, draw()))
    return sum(penalties)


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
def open_source(args: Args, held_out: bool) -> tuple[Dataset, list[int]]:
    """A data set, and the indices of its images to train on or of those held out."""
    root, names = Path(args.data_dir), ("val", "test") if held_out else ("train",)
    if held_out and args.eval_from:
        source = fid.Folder(args.eval_from)
    elif args.dataset == "paris-streetview":
        found = [root / name for name in names if (root / name).is_dir()]
        if not found:
            how = "it needs train/ and val/ (or test/) there; the authors of the context encoder, "
            how += "https://github.com/pathak22/context-encoder, send it by e-mail"
            raise fid.UserError(f"--dataset {args.dataset} not found in {root.absolute()}: {how}")
        source = fid.Folder(found[0])
    else:
        source = fid.Shapes() if args.dataset == "shapes" else fid.Folder(root)
        count = 1_000 if args.dataset == "shapes" else len(source)
        return source, [i for i in range(count) if held_out == (i % 20 == 0)]
    return source, list(range(len(source)))


def by_name(flag: str, folder: str | Path) -> dict[str, Path]:
    """The image files of a flag's folder by their names without suffix, each of which is one's."""
    paths = fid.image_files(folder)
    found = {path.stem: path for path in paths}
    again = len(paths) - len(found)
    require(again == 0, flag, "hold each name once", f"{again} of {len(paths)} again")
    return found


def load_photos(args: Args, held_out: bool) -> fid.Photos:
    """The photographs to train on, or those held out; the first process decodes them, once."""

    def prepare_cache() -> tuple[str, list[str]]:
        source, indices = open_source(args, held_out)
        must = f"be at most {len(indices)}, the number of images"
        fits = held_out or args.batch_size <= len(indices)
        require(fits, "batch_size", must, args.batch_size)
        about = getattr(source, "key", args.dataset), indices, args.img_size, args.resize
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        path = Path(args.data_dir) / "cache" / f"photos-{args.img_size}-{digest}.npy"
        if not path.exists():
            small, workers = args.resize or not held_out, args.num_workers
            fid.cache_photos(source, indices, path, args.img_size, args.resize, small, workers)
        names = [file.stem for file in getattr(source, "files", [])]
        return str(path), [names[i] if names else f"{i:05d}" for i in indices]

    path, names = fid.on_main(prepare_cache)
    masked = held_out and args.eval_mask == "file"
    if masked and (missing := set(names) - by_name("mask_dir", args.mask_dir).keys()):
        has = f"{len(missing)} of {len(names)} images, such as {', '.join(sorted(missing)[:5])}"
        raise fid.UserError(f"{args.mask_dir} has no masks of the same name for {has}")
    return fid.Photos(Path(path), names)


def read_photo(path: Path) -> Tensor:
    """A photograph as uint8 (3, H, W), upright."""
    try:
        image = ImageOps.exif_transpose(fid.open_image(path))
    except Exception as error:  # decoders fail in many ways
        raise fid.UserError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_mask(path: Path, size: tuple[int, int], invert: bool) -> Tensor:
    """The hole (1, H, W), float 0 or 1, of a mask file: 128 or more of 255 is missing."""
    rgb = read_photo(path)
    if rgb.shape[1:] != size:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (rgb.shape[1:], size)]
        raise fid.UserError(f"{path} is {sizes[0]} pixels, its image {sizes[1]}: equal sizes only")
    with Image.open(path) as image:
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (rgb != rgb[:1]).any():
            fid.warn(f"{path} has colours or alpha: its luminance counts")
        grey = np.array(Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L"))
    if ((grey > 10) & (grey < 245)).mean() > 0.01:
        fid.warn(f"{path} is not black and white: 128 and above counts as white")
    return torch.from_numpy((grey >= 128) != invert)[None].float()


def stroke_mask(size: int, rng: np.random.Generator, test: bool) -> np.ndarray:
    """Union (size, size) of 8 brush strokes with round joints; lengths are for a side of 256."""
    unit = size / 256
    vertices, length, brush = (20, 100, 24) if test else (16, 80, 20)
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        at, width = rng.uniform(0, size, 2), max(1, round(rng.uniform(10, brush) * unit))
        for _ in range(int(rng.integers(1, vertices))):
            angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0, length) * unit
            to = np.clip(at + far * np.array((math.cos(angle), math.sin(angle))), 0, size - 1)
            draw.line((*at, *to), 255, width)
            for x, y in (at, to):
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
            at = to
    return np.array(image) > 0


def draw_hole(
    args: Args, kind: str, rng: np.random.Generator, files: Sequence[Path], test: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """A hole (1, S, S), float32 with 1 = missing, and the top left corner of its box.

    The box of a random rectangle lies anywhere, except at the very end; the hole is the box less
    some rows at the top and bottom and some columns at both sides. Strokes and files have no box.
    """
    size, side = args.img_size, args.box
    hole, top, left = np.zeros((1, size, size), np.float32), 0, 0
    if kind == "file":
        path = files[int(rng.integers(len(files)))]
        return read_mask(path, (size, size), args.invert_mask).numpy(), (0, 0)
    if kind == "stroke":
        hole[0] = stroke_mask(size, rng, test)
    elif kind == "centre":
        top = left = (size - side) // 2
        hole[0, top : top + side, left : left + side] = 1
    else:
        top, left = rng.integers(0, max(1, size - side), 2).tolist()
        h, w = rng.integers(0, int(args.shrink * side) + 1, 2).tolist()
        hole[0, top + h : top + side - h, left + w : left + side - w] = 1
    return hole, (top, left)


def endless_crops(
    photos: fid.Photos, args: Args, device: torch.device, index: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's shares of the batches from `index` on: images in [-1, 1], masks, box corners.

    Batch b is a function of (seed, b) alone, with its crops and holes: a thread reads ahead.
    """
    cuda, size, (rank, world) = device.type == "cuda", args.batch_size, fid.processes()
    files = sorted(fid.image_files(args.mask_dir)) if args.train_mask == "file" else []

    @functools.lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((args.seed, epoch)).permutation(len(photos))

    def read(index: int) -> list[Tensor]:
        epoch, place = divmod(index, len(photos) // size)
        rows, images, holes, boxes = order(epoch)[place * size : (place + 1) * size], [], [], []
        for i in range(rank * size // world, (rank + 1) * size // world):
            rng = np.random.default_rng((args.seed, index, i, 0))
            crop = photos.crop(rows[i], args.img_size, *rng.random(2))
            images += [crop[..., ::-1] if args.hflip and rng.random() < 0.5 else crop]
            rng = np.random.default_rng((args.seed, index, 0 if args.shared_mask else i, 1))
            hole, box = draw_hole(args, args.train_mask, rng, files, test=False)
            holes, boxes = [*holes, hole], [*boxes, box]
        batch = [torch.from_numpy(np.stack(part)) for part in (images, holes, boxes)]
        return [part.pin_memory() if cuda else part for part in batch]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, index)
        for following in itertools.count(index + 1):
            batch, ahead = ahead.result(), pool.submit(read, following)
            real, mask, box = (part.to(device, non_blocking=True) for part in batch)
            yield real.float().div_(127.5).sub_(1), mask, box


# --------------------------------------------------------------------------------------------------
# 7. Run
# --------------------------------------------------------------------------------------------------
FORMAT = 2  # of the checkpoints; 2: with the name of the data
load_checkpoint = functools.partial(fid.load_checkpoint, Path(__file__).stem, FORMAT)
FREE_FLAGS = {  # what a resumed run may change: whatever leaves the training alone
    "mode", "resume", "checkpoint", "dry_run", "total_steps", "phase2_steps", "log_every",
    "sample_every", "eval_every", "save_every", "num_workers", "device", "out_dir", "data_dir",
    "eval_from", "mask_dir", "num_samples", "fid_batch_size", "compare", "image", "mask", "output",
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
DEFINITION = (
    "means over images of 8-bit RGB on [0, 1] (MAE on [-1, 1] is twice this); psnr, ssim, mae: "
    "whole image, known pixels exact; _hole: the hole's pixels; _raw: the network's output alone"
)
METRICS = ("psnr", "ssim", "mae", "psnr_hole", "mae_hole", "psnr_raw", "ssim_raw", "mae_raw")


@torch.no_grad()
def complete(G: nn.Module, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Filled images and the network's bare output, both uint8 (N, 3, H, W), by G in eval mode.

    images uint8 (N, 3, H, W), mask (N, 1, H, W), H and W from 8 on: mirrored at the bottom and at
    the right up to multiples of 8 and cut back. Known pixels are the image's own.
    """
    training, device, (height, width) = G.training, next(G.parameters()).device, images.shape[2:]
    images, mask, border = images.to(device), mask.to(device), (0, -width % 8, 0, -height % 8)
    padded = [F.pad(x, border, "reflect") for x in (images.float() / 127.5 - 1, mask)]
    raw = G.eval()(*padded)[1][..., :height, :width]
    raw = raw.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
    G.train(training)
    return torch.where(mask > 0, raw, images), raw


def quality(done: Tensor, raw: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """METRICS (N, 8) in float64 of uint8 images (N, 3, H, W); NaN in the hole where there is none.

    PSNR = 10 log10(1 / MSE), infinite for equal images.
    """
    done, raw, real = (x.double() / 255 for x in (done, raw, real))

    def psnr(x: Tensor, region: Tensor) -> Tensor:
        return -10 * (mean((x - real).square(), region)).log10()

    def mean(x: Tensor, region: Tensor) -> Tensor:
        return (x * region).sum(dim=(1, 2, 3)) / (3 * region.sum(dim=(1, 2, 3)))

    hole, every = mask.double(), torch.ones_like(mask, dtype=torch.double)
    scores = [psnr(done, every), fid.ssim(done, real), mean((done - real).abs(), every)]
    scores += [psnr(done, hole), mean((done - real).abs(), hole)]
    scores += [psnr(raw, every), fid.ssim(raw, real), mean((raw - real).abs(), every)]
    return torch.stack(scores, dim=1)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread over `count`, or all of them where there are no more."""
    n = min(count, wanted)
    return [i * count // n for i in range(n)]


def held_out_holes(args: Args, photos: fid.Photos, indices: Sequence[int]) -> Tensor:
    """The holes (N, 1, S, S) of held-out images: functions of --eval-seed and the index alone."""
    files = by_name("mask_dir", args.mask_dir) if args.eval_mask == "file" else {}
    holes = []
    for i in indices:
        rng, own = np.random.default_rng((args.eval_seed, i)), [files.get(photos.names[i])]
        holes += [draw_hole(args, args.eval_mask, rng, own, test=True)[0]]
    return torch.from_numpy(np.stack(holes))


def score_completions(
    args: Args, G: nn.Module, photos: fid.Photos, inception: nn.Module | None
) -> dict[str, float | None]:
    """Means of METRICS over `fid_num` held-out images, shared out over the processes; and FID.

    An infinite PSNR (nothing to tell apart) and an image without a hole are left out of a mean,
    which is said; None where nothing is left. FID: of the filled images to the held-out ones.
    """
    fid.same_buffers(G)
    picks, size = spread(len(photos), args.fid_num), args.fid_batch_size
    reals = spread(len(photos), args.fid_real or len(photos))
    table = torch.zeros(len(picks), len(METRICS), dtype=torch.double)
    fake, true = (fid.Moments(device=inception.device) if inception else None for _ in "ab")
    with fid.Progress(len(picks), "inpainting") as progress:
        for first, count in fid.shares(len(picks), size):
            rows = picks[first : first + count]
            real, mask = photos.centres(rows, args.img_size), held_out_holes(args, photos, rows)
            done, raw = (x.cpu() for x in complete(G, real, mask))
            table[first : first + count] = quality(done, raw, real, mask)
            if inception:
                fake.update(inception(done)[0])
            progress.update(count * fid.processes()[1])
    fid.sum_processes(table)
    finite, scores = table.isfinite(), {}
    for key, column, counts in zip(METRICS, table.T, finite.T):
        scores[f"metric/{key}"] = column[counts].mean().item() if counts.any() else None
        if not counts.all():
            fid.warn(f"{key}: {int((~counts).sum())} images have no finite value and are left out")
    if inception:
        for first, count in fid.shares(len(reals), size):
            true.update(inception(photos.centres(reals[first : first + count], args.img_size))[0])
        for moments in (fake, true):
            moments.all_reduce()
        fid.warn_few(true, fake)
        scores["metric/fid"] = fid.frechet_distance(true, fake)
    text = ", ".join(f"{k[7:]} {'-' if v is None else f'{v:.5g}'}" for k, v in scores.items())
    label = f" ({inception.label})" if inception and inception.label else ""
    fid.say(f"{len(picks)} images, {args.eval_mask} holes: {text}{label}")
    return scores


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
    inception = fid.load_inception(args.fid_weights, device) if args.fid_weights else None
    photos = load_photos(args, held_out=True)
    scores, n = score_completions(args, G, photos, inception), min(args.fid_num, len(photos))
    fid.say(DEFINITION)
    about = {"n": n, "eval_mask": args.eval_mask, "img_size": args.img_size, "box": args.box}
    record = {**scores, **about, "definition": DEFINITION}
    record |= inception.protocol if inception else {}
    fid.write_text(folder / "evaluate.json", json.dumps(record, indent=2))
    return scores


def held_out_strips(
    args: Args, nets: Sequence[nn.Module], photos: fid.Photos, count: int
) -> tuple[Tensor, list[Tensor]]:
    """Strips of held-out images (N, 3, S, K * S): input, each net's result, original; the results.

    Missing pixels are shown as the networks see them, in mid-grey.
    """
    picks = spread(len(photos), count)
    real, mask = photos.centres(picks, args.img_size), held_out_holes(args, photos, picks)
    results = []
    for G in nets:
        parts = zip(real.split(args.fid_batch_size), mask.split(args.fid_batch_size))
        results += [torch.cat([complete(G, *part)[0].cpu() for part in parts])]
    grey = torch.full_like(real, 128)
    return torch.cat((torch.where(mask > 0, grey, real), *results, real), dim=3), results


def sample(args: Args) -> None:
    """Mode sample: filled held-out images as PNGs, and a grid of input, result, original."""
    args, _, G, _, folder = open_checkpoint(args)
    photos = load_photos(args, held_out=True)
    strips, (images,) = held_out_strips(args, [G], photos, args.num_samples)
    fid.write_images(folder, images, math.isqrt(len(strips)), strips)


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


def figures(args: Args) -> None:
    """Mode figures: strips with --compare's results (Figure 9), AN's layouts, curves."""
    args, device, G, _, folder = open_checkpoint(args)
    photos, n, target = load_photos(args, held_out=True), args.num_samples, folder / "figures"
    target.mkdir(exist_ok=True)
    others = [open_checkpoint(replace(args, checkpoint=path))[2] for path in args.compare]
    fid.write_grid(target / "strips.png", held_out_strips(args, [*others, G], photos, n)[0], 1)
    if args.refine == "an":
        picks = spread(len(photos), min(n, 8))
        real, mask = photos.centres(picks, args.img_size), held_out_holes(args, photos, picks)
        an, x = an_module(G, real.to(device) / 127.5 - 1, mask.to(device))
        with torch.no_grad():
            layout = an.layout(x).cpu()
        low, high = (f(layout, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        maps = F.interpolate((layout - low) / (high - low).clamp_min(1e-12), scale_factor=4)
        image = torch.where(mask > 0, 128, real)
        cells = 0.2 * image[:, None] + 0.8 * 255 * maps[:, :, None]  # (N, n, 3, S, S)
        cells = torch.cat((image[:, None].float(), cells), dim=1).flatten(0, 1)
        fid.write_grid(target / "layouts.png", cells.round().byte(), 1 + layout.shape[1])
    keys = ["loss/g_rec", "loss/d", "grad/g_norm", "metric/psnr", "metric/ssim"]
    fid.plot(target / "curves.png", folder / "log.jsonl", keys)
    columns = ", ".join(("input", *args.compare, "this checkpoint", "original"))
    fid.say(f"strips ({columns}), layouts of AN and curves are in {target}")


def photo_pairs(args: Args, folder: Path) -> list[tuple[Path, Path, Path]]:
    """(image, mask, output) of mode inpaint, for one pair of files or two folders."""
    image, mask, output = Path(args.image), Path(args.mask), Path(args.output)
    require(image.exists(), "image", "exist", image)
    require(mask.exists(), "mask", "exist", mask)
    require(image.is_dir() == mask.is_dir(), "mask", "be a file or a folder as --image is", mask)
    if not image.is_dir():
        output = output if args.output else folder / "inpainted" / f"{image.stem}.png"
        require(output.suffix.lower() == ".png", "output", "end in .png: JPEG would lose", output)
        pairs = [(image, mask, output)]
    else:
        images, masks = by_name("image", image), by_name("mask", mask)
        odd = sorted(images.keys() ^ masks.keys())
        if odd:
            text = f"{len(odd)} names stand in one of them only, such as {', '.join(odd[:5])}"
            raise fid.UserError(f"--image {image} and --mask {mask} do not match: {text}")
        output = output if args.output else folder / "inpainted"
        pairs = [(images[stem], masks[stem], output / f"{stem}.png") for stem in sorted(images)]
    for image, mask, output in pairs:
        clash = output.resolve() in (image.resolve(), mask.resolve())
        require(not clash, "output", "leave the inputs as they are", output)
    return pairs


def inpaint(args: Args) -> None:
    """Mode inpaint: fill photographs of any size where their masks are white, as PNGs."""
    args, _, G, _, folder = open_checkpoint(args)
    pairs = photo_pairs(args, folder)

    def read(image: Path, mask: Path) -> tuple[Tensor, Tensor]:
        pixels = read_photo(image)
        height, width = pixels.shape[1:]
        if min(height, width) < 8:
            raise fid.UserError(f"{image} is {width}x{height} pixels: at least 8x8 are needed")
        return pixels, read_mask(mask, (height, width), args.invert_mask)

    for image, mask, _ in pairs if len(pairs) > 1 else ():
        read(image, mask)  # nothing is written where one of them is unfit
    for image, mask, output in pairs:
        pixels, hole = read(image, mask)
        share = hole.mean().item()
        if share in (0, 1):
            fid.warn(f"{mask}: {'nothing' if share == 0 else 'everything'} is missing from {image}")
        filled = complete(G, pixels[None], hole[None])[0] if share > 0 else pixels[None]
        output.parent.mkdir(parents=True, exist_ok=True)
        fid.write_grid(output, filled, 1)
        fid.say(f"{output}: {share:.1%} of {pixels.shape[2]}x{pixels.shape[1]} pixels filled")


# --------------------------------------------------------------------------------------------------
# 9. Training
# --------------------------------------------------------------------------------------------------
def batches_before(args: Args, step: int) -> int:
    """Batches that the first `step` steps consume: one each, in phase 2 one for each update."""
    return step + args.n_critic * max(0, step - args.phase1_steps)


@torch.no_grad()
def module_terms(G: Generator, real: Tensor, mask: Tensor) -> dict[str, float]:
    """What to log of the second stage's module."""
    if isinstance(G.module, PooledAttention):
        return {"train/gamma_g": G.module.gamma.item()}
    if not isinstance(G.module, AttentiveNorm):
        return {}
    an, x = an_module(G, real, mask)
    entropy, used = layout_use(an.eval().layout(x))
    an.train(G.training)
    terms = {"train/rho_g": an.rho.item(), "train/layout_entropy_g": entropy}
    terms |= {"train/t_g": an.t.mean().item()} if an.sampling else {}
    return terms | {"train/entities_used_g": used}


def train(args: Args) -> dict[str, float]:
    """Train from the start or from the run's checkpoint; the last evaluation's metrics."""
    device = setup(args)
    wanted = args.eval_every and args.fid_weights
    inception = fid.load_inception(args.fid_weights, device) if wanted else None
    photos, shown = load_photos(args, held_out=False), args.eval_every or args.sample_every
    held_out = load_photos(args, held_out=True) if shown else None
    torch.manual_seed(args.seed)  # here: decoding, where it is due, draws random numbers too
    G, D = Generator(args).to(device), Discriminator(args).to(device)
    adam = {"betas": (args.beta1, args.beta2), "fused": True}
    g_opt = torch.optim.Adam(G.parameters(), args.g_lr, **adam)
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, **adam)
    run = Run(args, device, photos.path.stem, G=G, D=D, g_opt=g_opt, d_opt=d_opt)
    batches = endless_crops(photos, args, device, batches_before(args, run.step))
    n, stop, metrics = args.batch_size, False, {}
    forward_G, forward_D = (torch.compile(net) if args.compile else net for net in (G, D))

    while run.step < args.total_steps and not stop:
        adversarial = run.step >= args.phase1_steps
        zero = torch.zeros((), device=device)
        d_loss = d_loss_real = d_loss_fake = d_reg = d_norm = zero
        for _ in range(args.n_critic * adversarial):
            real, mask, box = next(batches)
            with run.autocast():
                with torch.no_grad():
                    fake = composite(forward_G(real, mask)[1].float(), real, mask)
                pair = (forward_D(image, mask, box).float() for image in (real, fake))
                real_logits, fake_logits = pair
            d_loss_real, d_loss_fake = -real_logits.mean(), fake_logits.mean()
            d_reg = critics_penalty(
                D, real, fake, mask, box, args.gp_region, lambda: run.draw(torch.rand, n, 1, 1, 1)
            )
            d_loss = d_loss_real + d_loss_fake + args.lambda_gp * d_reg  # Eq. 10
            d_norm = run.update(d_loss, "D")

        real, mask, box = next(batches)
        g_loss_adv = zero
        with run.autocast():
            coarse, fine = (x.float() for x in forward_G(real, mask))
            if adversarial:
                g_loss_adv = -forward_D(composite(fine, real, mask), mask, box).float().mean()
        g_loss_rec = reconstruction_loss(args, coarse, fine, real, mask, box)
        g_reg = orthogonality(G)
        g_loss = args.lambda_rec * g_loss_rec + args.lambda_adv * g_loss_adv  # Eq. 9
        g_loss = g_loss + args.lambda_ortho * g_reg
        g_norm = run.update(g_loss, "G")

        terms = {
            "loss/d": d_loss, "loss/g": g_loss,
            "loss/g_rec": g_loss_rec, "loss/g_adv": g_loss_adv, "loss/g_reg": g_reg,
            "loss/d_real": d_loss_real, "loss/d_fake": d_loss_fake, "loss/d_reg": d_reg,
            "logit/real": -d_loss_real, "logit/fake": d_loss_fake, "grad/d_norm": d_norm,
            "grad/g_norm": g_norm, "train/saturated": (fine.detach().abs() >= 1).float().mean(),
        }  # fmt: skip
        stop = run.collect(terms)
        if run.due(args.log_every):
            run.log_interval(module_terms(G, real, mask))
        if run.due(args.sample_every) and run.rank == 0:
            grid, _ = held_out_strips(args, [G], held_out, args.num_samples)
            path = run.folder / f"samples/{run.step:07d}.png"
            fid.write_grid(path, grid, math.isqrt(len(grid)))
        phase_ends = run.step == args.phase1_steps < args.total_steps
        if run.due(args.eval_every) or (args.eval_every and phase_ends):
            metrics = score_completions(args, G, held_out, inception)
            metrics = {key: value for key, value in metrics.items() if value is not None}
            run.log(metrics)
            if metrics.get("metric/fid", math.inf) < run.best_fid:
                run.best_fid = metrics["metric/fid"]
                run.save("best.pt")
        if phase_ends:
            run.save("phase1.pt")
            fid.say(f"step {run.step}: phase 1 is over; phase1.pt keeps it, its critics untrained")
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
            (modes | {"inpaint": inpaint})[args.mode](args)


if __name__ == "__main__":
    main()
