# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""GIU-GAN: Global Information Utilization for Generative Adversarial Networks (Tian et al., 2022).

A squeeze-and-excitation block re-weights the channels that an involution builds its kernels from
(the GIU module); representative batch norm (RBN) in the generator; spectral norm; WGAN-GP. The
baselines of the paper's tables are here too: DCGAN, LSGAN, WGAN-GP (+2, +3 layers), SNGAN, SAGAN.

    python giu_gan.py --dataset cifar10 --no-rbn                # Table 8, CIFAR-10 without RBN
    python giu_gan.py --dataset celeba                          # Table 6, CelebA 64x64
    python giu_gan.py --dataset folder --data-dir photos --img-size 64 --crop 256

Differences from the paper
 1. The text's kernel reduction is r1 = 16; the printed costs fit r1 = 4 only. Default 4.
 2. The networks are rebuilt from the printed costs; parameters and multiply-adds agree with every
    row except three misprints or truncations, which the tests name (two rows need
    `--giu-act-d kept` and `--giu shallow-d-deep-g-as-costed`).
 3. The generator's RBNs are the first and the last of its batch norms outside GIU stages.
 4. Losses of the baselines are not stated: SNGAN and SAGAN hinge, LSGAN least squares, DCGAN
    non-saturating cross-entropy, WGAN-GP its own. SNGAN has spectral norm in D only.
 5. Initialisation is not stated: PyTorch's defaults, or N(0, 0.02) by `--init normal`.
 6. CelebA is cropped to its central 160x160 before resizing; the paper does not say.
 7. The batch norm of D's kernels (Eq. 5) couples the samples whose gradients the penalty takes;
    `--no-kernel-norm` is without.
 8. FID and IS follow the standard protocol of fid.py; the paper's IS of 4.7 beside an FID of 22.7
    shows that its own Inception differed, so compare models with each other, not with its tables.

Evidence: see README.md, "The papers, row by row". The paper's 1,000,000 steps have not been run.
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
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
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
    dataset: Literal["cifar10", "celeba", "folder", "shapes"] = "cifar10"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    data_dir: str = "data"
    """folder of the data set and of the cache of its decoded images"""
    download: bool = True
    """fetch the data set if it is not in --data-dir"""
    img_size: int = 0
    """side of the square images in pixels; 0: the paper's for the data set"""
    crop: int = 0
    """side of the central square cut out first, in pixels; 0: the paper's, else the short side"""
    hflip: bool = False
    """mirror half of the training images, drawn anew each time"""
    num_workers: int = 4
    """processes that decode the images, once"""
    # Model
    z_dim: int = 0
    """length of the noise vector; 0: the paper's for the model"""
    g_ch: int = 64
    """base width of the generator, in channels"""
    d_ch: int = 64
    """base width of the discriminator, in channels"""
    # Optimisation
    total_steps: int = 1_000_000
    """generator updates to train for"""
    batch_size: int = 64  # Table 2
    """images per update, shared out over the processes"""
    n_critic: int = 1  # Algorithm 2
    """discriminator updates per generator update"""
    g_lr: float = 2e-4  # Table 2, V3
    """learning rate of the generator"""
    d_lr: float = 2e-4  # Table 2, V3
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
    sample_every: int = 5_000
    """steps between sample grids; 0: none"""
    eval_every: int = 100_000
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
    eval_seed: int = 0
    """seed of the noise of grids, samples and evaluations"""
    num_samples: int = 64
    """images of a sample grid and of mode sample"""
    # Paper
    model: Literal["giu", "dcgan", "wgan-gp", "lsgan", "sngan", "sagan"] = "giu"
    """row of the paper's tables"""
    giu: Literal[
        "deep-d-shallow-g", "middle", "shallow-d-deep-g", "shallow-d-deep-g-as-costed", "all",
        "only-g", "only-d", "none",
    ] = "deep-d-shallow-g"  # fmt: skip
    """place of the GIU modules, Table 1 (as-costed: with the 4x4 level that its cost includes)"""
    kernel_size: int = 3  # Table 4
    """side of the involution kernels, odd"""
    group_channels: int = 16  # Table 4
    """channels that share an involution kernel"""
    kernel_reduction: int = 4
    """channel reduction r1 of the kernel generator (the text says 16, the printed costs 4)"""
    kernel_norm: bool = True
    """batch norm in the kernel generator, Eq. 5"""
    se_reduction: int = 16
    """channel reduction r2 of squeeze-and-excitation"""
    rbn: bool = True  # Table 8
    """representative batch norm as the generator's first and last batch norm"""
    giu_act_d: Literal["deep", "every", "kept"] = "deep"
    """LeakyReLU after D's deep GIUs, after every GIU, or kept at the deep levels without a GIU"""
    extra_layers: Literal[0, 2, 3] = 0
    """3x3 layers added to both nets of wgan-gp at 64x64, Table 6"""
    third_layer: Literal["g128-d64", "g64-d128"] = "g128-d64"
    """place of the third of --extra-layers 3, in channels (the paper does not say)"""
    sn_output: bool = False
    """spectral norm on the output layers too"""
    sn_giu: bool = False
    """spectral norm on the GIU modules' 1x1 convolutions too"""
    lambda_gp: float = 10.0
    """weight of the gradient penalty"""
    optimizer: Literal["adam", "adagrad", "rmsprop"] = "adam"
    """optimiser of both nets, Table 2"""
    init: Literal["pytorch", "normal"] = "pytorch"
    """weights at the start: PyTorch's, or N(0, 0.02)"""

    def __post_init__(self) -> None:
        celeba = self.dataset == "celeba"
        self.exp_name = self.exp_name or self.model
        self.img_size = self.img_size or (64 if celeba else 32)
        self.crop = self.crop or (160 if celeba else 0)
        self.z_dim = self.z_dim or (100 if self.model == "lsgan" else 128)


POSITIVE = (
    "img_size", "z_dim", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples", "kernel_size", "group_channels",
    "kernel_reduction", "se_reduction",
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
    require(args.fid_num >= 10, "fid_num", "be at least 10, an image a split", args.fid_num)
    require(args.img_size in (32, 64, 128), "img_size", "be 32, 64 or 128", args.img_size)
    require(args.kernel_size % 2 == 1, "kernel_size", "be odd", args.kernel_size)
    table6 = args.model == "wgan-gp" and args.img_size == 64
    must = "be 0 but for --model wgan-gp --img-size 64 (Table 6)"
    require(table6 or args.extra_layers == 0, "extra_layers", must, args.extra_layers)
    lsgan = args.model == "lsgan"
    adam = args.optimizer == "adam"  # the others look at the CPU in a step
    require(adam or not args.cuda_graphs, "optimizer", "be adam with --cuda-graphs", args.optimizer)
    require(args.d_ch >= 4 or not lsgan, "d_ch", "be at least 4 with --model lsgan", args.d_ch)
    require(not (lsgan and args.sn_output), "sn_output", "stay off with --model lsgan", "it on")
    divisors = ("group_channels", "kernel_reduction", "se_reduction")
    giu = ("giu", "kernel_size", "kernel_norm", "rbn", "sn_giu", *divisors)
    penalised = LOSS[args.model] == "wasserstein"
    stay(args, Args, giu if args.model != "giu" else (), "without --model giu")
    stay(args, Args, () if penalised else ("lambda_gp",), "without a gradient penalty")
    stay(args, Args, () if adam else ("beta1", "beta2"), "without --optimizer adam")
    third = args.extra_layers == 3
    stay(args, Args, () if third else ("third_layer",), "without --extra-layers 3")
    for width in giu_widths(args, "g") | giu_widths(args, "d"):
        for flag in divisors:
            must, value = f"divide the {width} channels of a GIU", getattr(args, flag)
            require(width % value == 0, flag, must, value)


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


class SqueezeExcite(nn.Module):
    """Channel weights of squeeze-and-excitation (Hu et al. 2018): (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)  # W_a
        self.excite = nn.Linear(channels // reduction, channels, bias=False)  # W_b

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean(dim=(2, 3))
        s = torch.sigmoid(self.excite(F.relu(self.squeeze(z))))
        return s[:, :, None, None]


def involution(x: Tensor, kernel: Tensor) -> Tensor:
    """Apply one K x K kernel per position and channel group (Li et al. 2021), zeros outside x.

    x (N, C, H, W); kernel (N, G, K*K, H, W), G dividing C -> (N, C, H, W). With u, v from -(K // 2)
    to K // 2: Y[c, i, j] = sum over u, v of kernel[c * G // C, (u, v), i, j] * X[c, i + u, j + v].

    The shifted maps are views of one padded map: autograd keeps no K*K-fold copy of x, as it would
    of an unfolded one.
    """
    n, channels, height, width = x.shape
    groups, size = kernel.shape[1], math.isqrt(kernel.shape[2])
    padded = F.pad(x, [size // 2] * 4).unflatten(1, (groups, channels // groups))
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for k in range(size * size):
        u, v = divmod(k, size)
        shifted = padded[..., u : u + height, v : v + width]
        out = torch.addcmul(out, kernel[:, :, None, k].to(x.dtype), shifted)
    return out.flatten(1, 2)


class GIU(nn.Module):
    """Global information utilization: an involution whose kernels see re-weighted channels.

    (N, C, H, W) -> (N, C, H, W). The kernels are built from the scaled features and applied to the
    original ones; there is no softmax over a kernel and no residual connection.
    """

    def __init__(self, channels: int, args: Args) -> None:
        super().__init__()
        self.groups = channels // args.group_channels
        inner = channels // args.kernel_reduction
        taps = args.kernel_size**2 * self.groups
        self.se = SqueezeExcite(channels, args.se_reduction)
        self.reduce = prepare(args, nn.Conv2d(channels, inner, 1), args.sn_giu)  # W_2
        self.norm = nn.BatchNorm2d(inner) if args.kernel_norm else nn.Identity()
        self.span = prepare(args, nn.Conv2d(inner, taps, 1), args.sn_giu)  # W_3

    def kernel(self, x: Tensor) -> Tensor:
        """Kernels (N, G, K*K, H, W) of the features x (N, C, H, W)."""
        scaled = self.se(x) * x  # x~ = s X
        kernel = self.span(F.relu(self.norm(self.reduce(scaled))))  # Eq. 5
        return kernel.unflatten(1, (self.groups, -1))

    def forward(self, x: Tensor) -> Tensor:
        return involution(x, self.kernel(x))  # of the original X


class RepresentativeBatchNorm2d(nn.Module):
    """Batch norm calibrated by each sample's own statistics (Gao et al. 2021).

    (N, C, H, W) -> (N, C, H, W). It starts as sigmoid(1) = 0.731 times plain batch norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.w_m = nn.Parameter(torch.zeros(shape))
        self.w_v = nn.Parameter(torch.zeros(shape))
        self.w_b = nn.Parameter(torch.ones(shape))
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        x_cm = x + self.w_m * x.mean(dim=(2, 3), keepdim=True)  # centering calibration
        x_s = self.norm(x_cm)
        gate = self.w_v * x_s.mean(dim=(2, 3), keepdim=True) + self.w_b
        x_cs = x_s * torch.sigmoid(gate)  # scaling calibration
        return self.gamma * x_cs + self.beta


def prepare(args: Args, layer: nn.Module, sn: bool = False) -> nn.Module:
    """Initialise a layer as args say, then add spectral norm if sn.

    In this order: what is written to a weight under spectral norm is lost.
    """
    if args.init == "normal":
        nn.init.normal_(layer.weight, 0.0, 0.02)
    return spectral_norm(layer) if sn else layer


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


def giu_widths(args: Args, net: str) -> set[int]:
    """Channels of the maps of net "g" or "d" that a GIU module follows (Table 1)."""
    base = args.g_ch if net == "g" else args.d_ch
    deep = set(widths(args, base)[:-2])
    places = {
        "deep-d-shallow-g": deep,
        "middle": {2 * base},
        "shallow-d-deep-g": {base},
        "shallow-d-deep-g-as-costed": {base} | deep,
        "all": {base, 2 * base} | deep,
        f"only-{net}": deep,
    }
    return places.get(args.giu, set()) if args.model == "giu" else set()


def extra_widths(args: Args, net: str) -> list[int]:
    """Channels of the maps that WGAN-GP(+2) and (+3) follow with a 3x3 layer (Table 6)."""
    base = args.g_ch if net == "g" else args.d_ch
    third = base * (2 if (net == "g") == (args.third_layer == "g128-d64") else 1)
    return [8 * base, 4 * base, third][: args.extra_layers]


def base_generator(args: Args) -> list[nn.Module]:
    """The SNGAN layout that the others extend; DCGAN's has no biases and twice the width."""
    sn, dcgan = args.model in ("giu", "sagan"), args.model == "dcgan"
    outs, channels, layers = widths(args, args.g_ch * (1 + dcgan)), args.z_dim, []
    for i, out in enumerate(outs):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=not dcgan)
        rbn = args.model == "giu" and args.rbn and i in (0, len(outs) - 1)
        norm = RepresentativeBatchNorm2d(out) if rbn else nn.BatchNorm2d(out)
        act = nn.LeakyReLU(0.1) if args.model == "wgan-gp" else nn.ReLU()
        layers += [prepare(args, conv, sn), norm, act]
        if out in giu_widths(args, "g"):
            layers += [GIU(out, args), nn.BatchNorm2d(out), act]
        if out in extra_widths(args, "g"):
            conv = prepare(args, nn.Conv2d(out, out, 3, padding=1))
            layers += [conv, nn.BatchNorm2d(out), act]
        if args.model == "sagan" and out in outs[-2:]:
            layers += [SelfAttention(out)]
        channels = out
    conv = nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=not dcgan)
    return [*layers, prepare(args, conv, args.sn_output), nn.Tanh()]


def base_discriminator(args: Args) -> list[nn.Module]:
    """The SNGAN layout that the others extend; DCGAN's sigmoid is in the loss."""
    sn, dcgan = args.model in ("giu", "sngan", "sagan"), args.model == "dcgan"
    act, channels, layers = nn.LeakyReLU(0.2 if dcgan else 0.1), 3, []
    outs = widths(args, args.d_ch)[::-1]
    for out in outs:
        conv = nn.Conv2d(channels, out, 4, 2, 1, bias=not dcgan)
        norm = [nn.BatchNorm2d(out)] if dcgan and channels > 3 else []
        layers += [prepare(args, conv, sn), *norm, act]
        giu, deep = out in giu_widths(args, "d"), out in outs[2:]
        if giu:
            layers += [GIU(out, args)]
        if (giu and (deep or args.giu_act_d == "every")) or (deep and args.giu_act_d == "kept"):
            layers += [act]
        if out in extra_widths(args, "d"):
            layers += [prepare(args, nn.Conv2d(out, out, 3, padding=1)), act]
        if args.model == "sagan" and out in outs[-2:]:
            layers += [SelfAttention(out)]
        channels = out
    conv = nn.Conv2d(channels, 1, 4, bias=not dcgan)
    return [*layers, prepare(args, conv, args.sn_output)]


def lsgan_generator(args: Args) -> list[nn.Module]:
    """LSGAN: 128 channels at 8x8, then nearest upsampling and 3x3 convolutions."""
    channels, act = 2 * args.g_ch, nn.LeakyReLU(0.2)
    layers = [nn.Flatten(), prepare(args, nn.Linear(args.z_dim, channels * 64))]
    layers += [nn.Unflatten(1, (channels, 8, 8))]
    for out in widths(args, args.g_ch)[1:]:
        conv = prepare(args, nn.Conv2d(channels, out, 3, padding=1))
        layers += [nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(out), act]
        channels = out
    return [*layers, prepare(args, nn.Conv2d(channels, 3, 3, padding=1)), nn.Tanh()]


def lsgan_discriminator(args: Args) -> list[nn.Module]:
    """LSGAN: strided 3x3 convolutions with dropout, down to 2x2."""
    layers, channels = [], 3
    for out in [args.d_ch // 4, *reversed(widths(args, args.d_ch // 2))]:
        conv = prepare(args, nn.Conv2d(channels, out, 3, 2, 1))
        norm = [nn.BatchNorm2d(out)] if channels > 3 else []
        layers += [conv, nn.LeakyReLU(0.2), nn.Dropout2d(0.25), *norm]
        channels = out
    return [*layers, nn.Flatten(), prepare(args, nn.Linear(channels * 4, 1))]


class Generator(nn.Module):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1]."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        build = lsgan_generator if args.model == "lsgan" else base_generator
        self.layers = nn.Sequential(*build(args))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, 3, img_size, img_size) -> logits or critic scores (N,)."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        build = lsgan_discriminator if args.model == "lsgan" else base_discriminator
        self.layers = nn.Sequential(*build(args))

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
    "least-squares": (lambda s: (s - 1) ** 2 / 2, lambda s: s**2 / 2, lambda s: (s - 1) ** 2 / 2),
}
LOSS = {
    "giu": "wasserstein", "wgan-gp": "wasserstein", "sngan": "hinge", "sagan": "hinge",
    "lsgan": "least-squares", "dcgan": "bce",
}  # fmt: skip


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """E (||grad D(x^)||_2 - 1)^2 at x^ = eps x + (1 - eps) x~, in fp32; eps (N, 1, 1, 1).

    The norm is over all values of a sample; `norm`, unlike a root of squares, has a gradient at 0.
    """
    with torch.autocast(real.device.type, enabled=False):
        mixed = (eps * real + (1 - eps) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
SOURCES = {  # how to open each data set, and how to get it
    "cifar10": (
        lambda args: torchvision.datasets.CIFAR10(args.data_dir, download=args.download),
        "put cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there",
    ),
    "celeba": (
        lambda args: torchvision.datasets.CelebA(args.data_dir, "all", [], download=args.download),
        "unpack img_align_celeba.zip of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into "
        "celeba/ there, identity_CelebA.txt and the four list_*.txt files beside it",
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
    "num_samples", "fid_batch_size",
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


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: the scores of a checkpoint, printed and kept in evaluate.json beside it."""
    args, device, G, _, folder = open_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, _, path = load_images(args)
    scores = score(args, inception, G, images, path, eval_noise(args, args.fid_num))
    record = {**scores, **inception.protocol}
    fid.write_text(folder / "evaluate.json", json.dumps(record, indent=2))
    return scores


def sample(args: Args) -> None:
    """Mode sample: PNGs of a checkpoint's generator, and a grid of them."""
    args, _, G, _, folder = open_checkpoint(args)
    images = sample_grid(args, G)
    fid.write_images(folder, images, math.isqrt(len(images)))


def principal_map(features: Tensor) -> Tensor:
    """First principal component of a map (C, H, W) over its positions, as (H, W) in [0, 1].

    Its sign is such that it goes with the mean activation (Figures 1 and 2).
    """
    x = features.double().flatten(1)
    mean, x = x.mean(dim=0), x - x.mean(dim=1, keepdim=True)
    p = torch.linalg.eigh(x @ x.T / x.shape[1]).eigenvectors[:, -1]
    y = (p @ x) * (1 if p @ x @ mean >= 0 else -1)
    y = (y - y.min()) / (y.max() - y.min()).clamp_min(1e-12)
    return y.view(features.shape[1:]).float()


@torch.no_grad()
def hidden_maps(D: nn.Module, images: Tensor) -> list[Tensor]:
    """D's last feature map (N, C, S, S) of each size S > 1, on images (N, 3, H, W) in [-1, 1]."""
    maps, x = {}, images
    for layer in D.layers:
        x = layer(x)
        if x.ndim == 4 and x.shape[2] > 1:
            maps[x.shape[2]] = x
    return list(maps.values())


def figures(args: Args) -> None:
    """Mode figures: hidden layers of D (Figures 1, 2), samples (8, 11), curves (10)."""
    args, device, G, D, folder = open_checkpoint(args)
    images, n, target = torch.from_numpy(load_images(args)[0]), args.num_samples, folder / "figures"
    target.mkdir(exist_ok=True)
    fid.write_grid(target / "samples.png", sample_grid(args, G), math.isqrt(n))
    fid.write_grid(target / "real.png", images[:n], math.isqrt(n))
    maps, cells = hidden_maps(D, images[:8].to(device).float() / 127.5 - 1), []
    for i, image in enumerate(images[:8]):
        greys = [principal_map(features[i]).mul(255).byte().cpu() for features in maps]
        row = [image, *(grey.expand(3, -1, -1) for grey in greys)]
        cells += [F.interpolate(cell[None], size=128, mode="nearest") for cell in row]
    fid.write_grid(target / "pca.png", torch.cat(cells), 1 + len(maps))
    keys = ["loss/d", "loss/g", "grad/d_norm", "grad/g_norm", "metric/fid"]
    fid.plot(target / "curves.png", folder / "log.jsonl", keys)
    fid.say(f"samples, real, pca (image, D's maps from large to small) and curves are in {target}")


# --------------------------------------------------------------------------------------------------
# 9. Training
# --------------------------------------------------------------------------------------------------
def make_optimizer(args: Args, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam with the paper's moments, or Table 2's others with the library's defaults."""
    if args.optimizer == "adagrad":
        return torch.optim.Adagrad(net.parameters(), lr)
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), lr)
    adam = {"betas": (args.beta1, args.beta2), "fused": True, "capturable": args.cuda_graphs}
    return torch.optim.Adam(net.parameters(), lr, **adam)


def train(args: Args) -> dict[str, float]:
    """Train from the start or from the run's checkpoint; the last evaluation's metrics."""
    device = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, path = load_images(args)
    torch.manual_seed(args.seed)  # here: decoding, where it is due, draws random numbers too
    G, D = Generator(args).to(device), Discriminator(args).to(device)
    g_opt, d_opt = make_optimizer(args, G, args.g_lr), make_optimizer(args, D, args.d_lr)
    run = Run(args, device, path.stem, G=G, D=D, g_opt=g_opt, d_opt=d_opt)
    batches = endless_batches(images, labels, args, device, run.step * args.n_critic)
    d_real, d_fake, g_fake = ADVERSARIAL[LOSS[args.model]]
    penalised = LOSS[args.model] == "wasserstein"
    n, stop, metrics = args.batch_size, False, {}
    forward_G, forward_D = (torch.compile(net) if args.compile else net for net in (G, D))

    def d_update(real: Tensor, z: Tensor, eps: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            with torch.no_grad():
                fake = forward_G(z).float()
            real_logits, fake_logits = forward_D(real).float(), forward_D(fake).float()
        d_loss_real, d_loss_fake = d_real(real_logits).mean(), d_fake(fake_logits).mean()
        d_reg = gradient_penalty(D, real, fake, eps) if penalised else torch.zeros_like(d_loss_real)
        d_loss = d_loss_real + d_loss_fake + args.lambda_gp * d_reg
        d_norm = run.update(d_loss, "D")
        return {
            "loss/d": d_loss, "loss/d_real": d_loss_real, "loss/d_fake": d_loss_fake,
            "loss/d_reg": d_reg, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), "grad/d_norm": d_norm,
        }  # fmt: skip

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
                f"train/gamma_{key}_{name.split('.')[1]}": value.item()
                for key, net in (("g", G), ("d", D))
                for name, value in net.named_parameters()
                if name.endswith(".gamma") and args.model == "sagan"
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
