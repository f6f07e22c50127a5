# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""GCA: graph convolution over attention, in DCGAN, SAGAN, ConSinGAN (Peng et al., ICANN 2021).

"Leveraging GANs via Non-local Features": the pixels of the 8x8 feature map are the nodes of a
graph, self-attention gives its edges, one graph convolution mixes the nodes, and the result is
added to the map by a learned gain. Beside it the non-local (NL) block that it is compared with.

    python gca_gan.py --dataset celeba --block gca               # Table 1, DCGAN + GCA
    python gca_gan.py --dataset celeba --model sagan --block nl  # Table 1, SAGAN
    python gca_gan.py --mode figures --runs runs/gca_gan__celeba*  # Table 1, Figures 4, 5

The third model, ConSinGAN, learns from one photograph, stage by stage from coarse to fine:

    python gca_gan.py --model consingan --image photo.jpg --block gca
    python gca_gan.py --model consingan --image photo.jpg --block gca --mode sample
    python gca_gan.py --model consingan --mode figures --runs runs/gca_gan__image__*  # Figures 6, 7

Differences from the paper
 1. It prints a 1-channel W_j and, with it, sizes that do not multiply. Here W_j has as many outputs
    as the map has pixels, which keeps every other printed size; it is the printed square when
    C / k = H W, as in DCGAN of 512 channels at 8x8. `--gca-variant` has three other readings.
 2. "M = W_j x" is read as M = W_m x: four maps are named and only W_m is C x C.
 3. The block stands in both networks; `--block-in` puts it in one.
 4. Widths, losses, optimisers, batch and run length are not stated. `--model` brings its own, and
    every flag works with DCGAN and SAGAN. The crop of CelebA is its central 178x178.
 5. Initialisation is not stated: N(0, 0.02) in DCGAN, Xavier in SAGAN, Glorot for Theta, gain 0.
 6. SAGAN is the unconditional 64x64 network with one block at 8x8, not the 128x128 ResNet.
 7. A is binarised only by `--gca-binarize`: the paper says that it may help some models.
 8. FID follows the standard protocol of fid.py, at the last step, never at the best one.

Differences in ConSinGAN
 9. "Only works in the first stage" is read as: GCA follows the first stage's convolutions, stays in
    the path of the later stages, learns as long as they do; `--gca-first-only` freezes it then.
10. The base is ConSinGAN's released code (stages, rates, penalty per pixel) without its flaws: one
    or two stages work, alpha is composited, a photograph too small for its stages is refused.
11. SIFID takes the 64 features of SinGAN's code: the paper does not say. Beside it stands the
    samples' diversity, since a generator that copies the photograph has the best SIFID.

Evidence: see README.md, "The papers, row by row". Table 1 at its full length has not been run.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports
# --------------------------------------------------------------------------------------------------
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
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
from PIL import Image
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
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
    dataset: Literal["celeba", "lsun-church", "folder", "shapes", "image"] = "celeba"
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
    total_steps: int = 39_550  # 25 epochs of CelebA
    """generator updates to train for"""
    batch_size: int = 128
    """images per update, shared out over the processes"""
    n_critic: int = 1
    """discriminator updates per generator update"""
    g_lr: float = 2e-4
    """learning rate of the generator"""
    d_lr: float = 2e-4
    """learning rate of the discriminator"""
    beta1: float = 0.5
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
    sample_every: int = 1_000
    """steps between sample grids; 0: none"""
    eval_every: int = 10_000
    """steps between evaluations; 0: none"""
    save_every: int = 1_000
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
    model: Literal["dcgan", "sagan", "consingan"] = "dcgan"
    """row of the paper's tables"""
    block: Literal["none", "nl", "gca"] = "gca"
    """block at the 8x8 map (consingan: at stage 0): none, the non-local block, or GCA"""
    block_in: Literal["both", "g", "d"] = "both"
    """networks that have the block"""
    gca_k: Literal[1, 2, 4, 8] = 8
    """channel reduction k of the NL and GCA blocks"""
    gca_variant: Literal["nodes", "bottleneck", "gram", "gcn"] = "nodes"
    """reading of the paper's sizes: J from W_j x of N, or of C / k channels; J = U^T U of
    U = W_j x; or a textbook graph convolution"""
    gca_binarize: Literal["off", "ste", "hard"] = "off"
    """edges 1 above the mean weight, else 0; ste: gradient as if they were not binarised"""
    gca_y_transpose: bool = False
    """Z = M Y^T, where a pixel takes its own node's row, in place of the printed Z = M Y"""
    nl_variant: Literal["paper", "value", "pooled"] = "paper"
    """NL block: values of C / k channels; of C and no W_v; of C / 2, keys and values pooled 2x2"""
    loss: Literal["bce", "hinge", "wgan-gp"] = "bce"
    """adversarial loss"""
    lambda_gp: float = 10.0
    """weight of the gradient penalty"""
    squash: bool = False
    """squeeze CelebA's whole images to squares, with no crop"""
    heatmap_net: Literal["d", "g"] = "d"
    """mode figures: heat maps of D on real images, or of G on its own"""
    runs: tuple[str, ...] = ()
    """mode figures: run folders to set side by side; none: the one run of these flags"""
    # Paper: ConSinGAN
    image: str = ""
    """photograph of any size; for an_inpaint.py also a folder of them"""
    stages: int = 6
    """sizes at which the photograph is learnt, one after the other"""
    niter: int = 2_000
    """steps of a stage"""
    train_depth: int = 3
    """newest stages that are trained; the older ones are frozen"""
    lr_scale: float = 0.1
    """learning rate of a stage over that of the stage after it"""
    g_steps: int = 3
    """Adam steps of the generator on each of its gradients"""
    num_layer: int = 3
    """convolutions of a stage, and of the discriminator between its first and its last"""
    min_size: int = 25
    """short side of the first stage, in pixels"""
    max_size: int = 250
    """long side of the last stage, in pixels, where the photograph is larger"""
    spacing: Literal["consingan", "singan"] = "consingan"
    """sizes between: more of them small, or at one ratio"""
    lambda_rec: float = 10.0
    """weight of the reconstruction (the paper does not say)"""
    noise_amp: float = 0.1
    """noise of a stage over the error of the reconstruction before it"""
    batch_norm: bool = False
    """batch norm in the generator"""
    retarget: bool = False
    """pad the maps with zeros, not with upsampled features: for samples of other proportions"""
    gca_place: Literal["body", "head"] = "body"
    """the block follows the convolutions of stage 0, or the first layer of all"""
    gca_first_only: bool = False
    """freeze the block after stage 0"""
    gca_in_d: bool = False
    """the block also in the discriminator of stage 0"""
    sifid_dims: Literal[64, 192] = 64
    """features of SIFID: those of SinGAN's code, or those of its text"""
    scale_h: float = 1.0
    """mode sample: height of the samples over that of the photograph"""
    scale_w: float = 1.0
    """mode sample: width of the samples over that of the photograph"""

    def __post_init__(self) -> None:
        stem = f"-{Path(self.image).stem}" if self.model == "consingan" and self.image else ""
        self.exp_name = self.exp_name or f"{self.model}-{self.block}{stem}"
        self.img_size = self.img_size or 64
        self.z_dim = self.z_dim or {"dcgan": 100, "sagan": 128, "consingan": 3}[self.model]
        if self.model == "consingan":
            self.total_steps = self.total_steps or max(1, self.stages * self.niter)


POSITIVE = (
    "img_size", "z_dim", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples", "stages", "niter", "train_depth",
    "g_steps", "num_layer",
)  # fmt: skip
ROW = ("model",)  # the flag that names a row of the table
DEFAULTS = {  # of the models, where Args has not theirs; it has DCGAN's
    ("sagan",): {
        "loss": "hinge", "total_steps": 100_000, "batch_size": 64, "g_lr": 1e-4, "d_lr": 4e-4,
        "beta1": 0.0, "beta2": 0.9,
    },
    ("consingan",): {
        "block": "none", "dataset": "image", "loss": "wgan-gp", "lambda_gp": 0.1, "batch_size": 1,
        "n_critic": 3, "g_lr": 5e-4, "d_lr": 5e-4, "total_steps": 0, "amp": "off",
        "sample_every": 500, "eval_every": 0, "save_every": 500, "num_samples": 25, "fid_num": 10,
    },
}  # fmt: skip
FIELDS = list(Args.__dataclass_fields__)
PHOTO = FIELDS[FIELDS.index("image") :]  # flags of consingan alone
NO_PHOTO = (  # flags that it does not read
    "data_dir", "download", "img_size", "crop", "hflip", "num_workers", "z_dim", "fid_real",
    "fid_batch_size", "block_in", "squash", "heatmap_net", "compile", "cuda_graphs",
)  # fmt: skip


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
    require(args.img_size in (32, 64, 128), "img_size", "be 32, 64 or 128", args.img_size)
    photo, resolved = args.model == "consingan", Args(model=args.model)
    blocks = photo and args.block != "none"
    needs = (
        (photo, "--model consingan", PHOTO),
        (not photo, "--model dcgan or sagan", NO_PHOTO),
        (args.block == "gca", "--block gca", ("gca_variant", "gca_binarize", "gca_y_transpose")),
        (args.block == "nl", "--block nl", ("nl_variant",)),
        (args.block != "none", "a --block", ("gca_k", "block_in")),
        (blocks, "a --block", ("gca_place", "gca_first_only", "gca_in_d")),
        (args.loss == "wgan-gp", "--loss wgan-gp", ("lambda_gp",)),
        (args.dataset == "celeba", "--dataset celeba", ("squash",)),
        (args.mode == "figures", "--mode figures", ("runs", "heatmap_net")),
        (args.mode == "sample", "--mode sample", ("scale_h", "scale_w")),
    )
    for given, what, flags in needs:
        stay(args, resolved, () if given else flags, f"without {what}")
    gcn = args.gca_variant == "gcn"
    must = "be off with --gca-variant gcn, which has no M Y"
    require(not (gcn and args.gca_y_transpose), "gca_y_transpose", must, args.gca_y_transpose)
    require(not (args.squash and args.crop), "crop", "be 0 with --squash", args.crop)
    must = "be at most 178 with --dataset celeba, the width of its images"
    require(args.dataset != "celeba" or args.crop <= 178, "crop", must, args.crop)
    require(not (args.runs and args.checkpoint), "runs", "not go with --checkpoint", args.runs)
    must = "be image with --model consingan, and only there"
    require((args.dataset == "image") == photo, "dataset", must, args.dataset)
    if photo:
        check_photo(args)
    splits = photo or args.fid_num >= 10
    require(splits, "fid_num", "be at least 10, an image a split", args.fid_num)
    for net in ("g", "d") if args.block != "none" else ():
        base = getattr(args, f"{net}_ch")
        channels = base if photo else widths(args, base)[1]
        must = f"divide the {channels} channels of {net.upper()}'s {'' if photo else '8x8 '}map"
        used = net == "g" or args.gca_in_d if photo else args.block_in in ("both", net)
        require(not used or channels % args.gca_k == 0, "gca_k", must, args.gca_k)


def check_photo(args: Args) -> None:
    """Refuse what ConSinGAN cannot run, before it reads the photograph (fid.UserError)."""
    kept = args.checkpoint or args.runs or checkpoint_path(args).exists()
    source = args.image or (args.mode != "train" and not args.dry_run and kept)
    require(bool(source), "image", "name a photograph with --model consingan", "nothing")
    fixed = {"loss": "wgan-gp", "batch_size": 1, "amp": "off"}  # fp32: derivatives of derivatives
    for flag, value in fixed.items():
        must = f"be {value} with --model consingan"
        require(getattr(args, flag) == value, flag, must, getattr(args, flag))
    least = 2 * args.num_layer + 5
    must = f"be at least {least} pixels, what D sees at once"
    require(args.min_size >= least, "min_size", must, args.min_size)
    must = f"be at most --stages x --niter = {args.stages * args.niter}"
    require(args.total_steps <= args.stages * args.niter, "total_steps", must, args.total_steps)
    for flag in ("scale_h", "scale_w"):
        require(getattr(args, flag) > 0, flag, "be above 0", getattr(args, flag))


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


def edge_weights(f: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """A: row j is the attention of node j to all nodes and sums to 1; the logits are not scaled.

    f (N, c, nodes), g (N, c, rows) -> (N, rows, nodes), in `dtype` whatever autocast says. No fused
    kernel: those have no second derivative, which a gradient penalty needs.
    """
    with torch.autocast(f.device.type, enabled=False):
        r = g.to(dtype).transpose(1, 2) @ f.to(dtype)  # r_ij = f(x_i)^T g(x_j), at [j, i]
        return r.softmax(dim=-1)  # a_ji = exp(r_ij) / sum over i of exp(r_ij)


def normalize(a: Tensor) -> Tensor:
    """A^ = D~^(-1/2) A~ D~^(-1/2) of A~ = A + I, D~ its row sums: (N, n, n) -> (N, n, n).

    The rows of a soft A sum to 1: then D~ = 2 I and A^ = (A + I) / 2. A is directed, so A^ is not
    symmetric. Of a binarised A the degrees differ; they are at least 1, by the self-loops.
    """
    a = a + torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    d = a.sum(dim=2).rsqrt()
    return d[:, :, None] * a * d[:, None, :]


class Gated(nn.Module):
    """A block that adds a residual p to its input x, o = gain p + x, and is the identity at first.

    `ratio` is rms(p) / rms(x) of the last forward pass: what the gain would let through, for the
    log. p comes in fp32 and is added in fp32, since it may be too large for half precision.
    """

    gain_name = ""

    def add(self, p: Tensor, x: Tensor) -> Tensor:
        """o (N, C, H, W), in the precision of x."""
        gain, wide = getattr(self, self.gain_name), x.to(p.dtype)
        p_rms, x_rms = (t.detach().square().mean().sqrt() for t in (p, wide))
        self.ratio = p_rms / x_rms.clamp_min(1e-12)
        return (gain * p + wide).to(x.dtype)


class NonLocal(Gated):
    """The non-local block, SAGAN's self-attention: (N, C, H, W) -> (N, C, H, W).

    y = gamma W_v(sum over i of a_ji h(x_i)) + x. Variant "value": values of C channels and no W_v;
    "pooled": keys and values max-pooled 2x2, values of C / 2 channels (H and W even).
    """

    gain_name = "gamma"

    def __init__(self, channels: int, args: Args) -> None:
        super().__init__()
        inner = channels // args.gca_k
        values = {"paper": inner, "value": channels, "pooled": channels // 2}[args.nl_variant]
        self.f = nn.Conv2d(channels, inner, 1, bias=False)
        self.g = nn.Conv2d(channels, inner, 1, bias=False)
        self.h = nn.Conv2d(channels, values, 1, bias=False)
        plain = args.nl_variant == "value"
        self.v = nn.Identity() if plain else nn.Conv2d(values, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(2) if args.nl_variant == "pooled" else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.gamma.dtype
        f, g, h = self.pool(self.f(x)), self.g(x), self.pool(self.h(x))
        a = edge_weights(f.flatten(2), g.flatten(2), dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = h.flatten(2).to(dtype) @ a.transpose(1, 2)  # H A^T
            return self.add(self.v(out.unflatten(2, x.shape[2:])), x)


class GCA(Gated):
    """Graph convolution over the pixels of a map, its edges from self-attention (the paper's own).

    (N, C, H, W) -> (N, C, H, W). With the n = H W pixels as nodes, x as C x n, c = C / k:
    Y = A^ J Theta, Z = M Y, o = alpha W_v Z + x, where M = W_m x and

        variant     J                              Theta
        nodes       (W_j x)^T, W_j: C -> n         n x n
        bottleneck  (W_j x)^T, W_j: C -> c         c x n
        gram        U^T U of U = W_j x, C -> c     n x n
        gcn         (W_j x)^T, W_j: C -> c         c x c, and Z = W_m Y^T, W_m: c -> C

    Theta, but for gcn's, has the size of the map, so the block takes maps of `size` only. Only the
    1x1 maps of x may run in half precision: M Y grows with the square of x.
    """

    gain_name = "alpha"

    def __init__(self, channels: int, size: tuple[int, int], args: Args) -> None:
        super().__init__()
        self.size, self.variant, self.binarize = size, args.gca_variant, args.gca_binarize
        self.y_transpose = args.gca_y_transpose
        inner, n = channels // args.gca_k, size[0] * size[1]
        j, rows, columns, m = {
            "nodes": (n, n, n, channels),
            "bottleneck": (inner, inner, n, channels),
            "gram": (inner, n, n, channels),
            "gcn": (inner, inner, inner, inner),
        }[args.gca_variant]
        self.f = nn.Conv2d(channels, inner, 1, bias=False)
        self.g = nn.Conv2d(channels, inner, 1, bias=False)
        self.j = nn.Conv2d(channels, j, 1, bias=False)
        self.m = nn.Conv2d(m, channels, 1, bias=False)
        self.v = nn.Conv2d(channels, channels, 1, bias=False)
        self.theta = nn.Linear(rows, columns, bias=False)  # x -> x Theta; its weight is Theta^T
        nn.init.xavier_uniform_(self.theta.weight)
        self.alpha = nn.Parameter(torch.zeros(()))

    def edges(self, x: Tensor) -> Tensor:
        """A (N, n, n), soft or binarised: 1 above the mean 1 / n of a row, else 0."""
        a = edge_weights(self.f(x).flatten(2), self.g(x).flatten(2), self.alpha.dtype)
        if self.binarize == "off":
            return a
        b = (a > 1 / a.shape[2]).to(a.dtype)
        return b if self.binarize == "hard" else b + (a - a.detach())

    def forward(self, x: Tensor) -> Tensor:
        gcn, dtype, size = self.variant == "gcn", self.alpha.dtype, tuple(x.shape[2:])
        if not gcn and size != self.size:
            raise ValueError(f"GCA was built for maps of {self.size}, got {size}; gcn takes any")
        a, j = self.edges(x), self.j(x).flatten(2).to(dtype)
        m = None if gcn else self.m(x).flatten(2).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            j = j.transpose(1, 2) @ j if self.variant == "gram" else j.transpose(1, 2)
            a = normalize(a)
            if not (gcn or self.y_transpose) and x.shape[1] < a.shape[1]:
                z = self.theta(m @ a @ j)  # M Y from the left: no product of two n x n matrices
                return self.add(self.v(z.unflatten(2, size)), x)
            y = self.theta(a @ j)  # Y = A^ J Theta
            if gcn:
                z = self.m(y.transpose(1, 2).unflatten(2, size))
            else:
                z = (m @ (y.transpose(1, 2) if self.y_transpose else y)).unflatten(2, size)
            return self.add(self.v(z), x)


def make_block(args: Args, net: str, channels: int) -> list[nn.Module]:
    """The block of net "g" or "d" at its 8x8 map, if it has one."""
    if args.block == "none" or args.block_in not in ("both", net):
        return []
    return [NonLocal(channels, args) if args.block == "nl" else GCA(channels, (8, 8), args)]


def start_weights(args: Args, net: nn.Module) -> None:
    """Weights at the start: N(0, 0.02) in DCGAN; in SAGAN Xavier, then spectral norm on all layers.

    In this order: what is written to a weight under spectral norm is lost. Theta stays Glorot.
    """
    sagan = args.model == "sagan"
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            normal = functools.partial(nn.init.normal_, std=0.02)
            (nn.init.xavier_uniform_ if sagan else normal)(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d) and not sagan:
            nn.init.normal_(layer.weight, 1.0, 0.02)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and sagan:
            spectral_norm(layer)


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


class Generator(nn.Module):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1].

    DCGAN's; SAGAN's has biases and spectral norm. The block follows the 8x8 stage's activation, as
    layers[place].
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        must = "be consingan for this checkpoint"
        require(args.model != "consingan", "model", must, "dcgan or sagan")
        channels, layers, bias = args.z_dim, [], args.model == "sagan"
        for i, out in enumerate(widths(args, args.g_ch)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=bias)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            if i == 1:
                self.place = len(layers)
                layers += make_block(args, "g", out)
            channels = out
        conv = nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=bias)
        self.layers = nn.Sequential(*layers, conv, nn.Tanh())
        start_weights(args, self)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, 3, img_size, img_size) -> logits or critic scores (N,).

    DCGAN's (its sigmoid is in the loss); SAGAN's has biases, spectral norm and no batch norm. The
    block follows the 8x8 stage's activation, as layers[place].
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        channels, layers, sagan = 3, [], args.model == "sagan"
        deepest, eighth, *_ = widths(args, args.d_ch)
        for out in reversed(widths(args, args.d_ch)):
            norm = [] if sagan or channels == 3 else [nn.BatchNorm2d(out)]
            conv = nn.Conv2d(channels, out, 4, 2, 1, bias=sagan)
            layers += [conv, *norm, nn.LeakyReLU(0.1 if sagan else 0.2)]
            if out == eighth:
                self.place = len(layers)
                layers += make_block(args, "d", out)
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(deepest, 1, 4, bias=sagan))
        start_weights(args, self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


def conv_layer(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
    """A 3x3 convolution without padding, batch norm where asked for, LeakyReLU 0.05."""
    norms = [nn.BatchNorm2d(outputs, track_running_stats=False)] if norm else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), *norms, nn.LeakyReLU(0.05))


def stage_block(args: Args, channels: int, size: tuple[int, int]) -> nn.Module:
    """ConSinGAN's block at stage 0, initialised; the identity without one."""
    block = nn.Identity()
    if args.block != "none":
        block = NonLocal(channels, args) if args.block == "nl" else GCA(channels, size, args)
    start_weights(args, block)
    return block


@functools.lru_cache
def bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """Bicubic interpolation of `old` values to `new`, ends on ends, as a matrix (new, old)."""
    eye = torch.eye(old, device=device)[None, None]
    return F.interpolate(eye, (new, old), mode="bicubic", align_corners=True)[0, 0]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """F.interpolate(x, size, mode="bicubic", align_corners=True) of maps (N, C, H, W).

    As two products of matrices, channels last: faster, and bit-reproducible on CUDA, where that
    function's gradient comes by atomic additions.
    """
    h, w = (bicubic(old, new, x.device).to(x.dtype) for old, new in zip(x.shape[2:], size))
    y = (h @ x.permute(0, 2, 3, 1).flatten(2)).unflatten(2, (x.shape[3], x.shape[1]))
    return (w @ y).permute(0, 3, 1, 2)


class PyramidGenerator(nn.Module):
    """ConSinGAN's generator: noise of the stages 0 to d -> images (N, 3, h_d, w_d) in [-1, 1].

    One layer to features, then stages that each refine the upsampled features of the one before,
    plus noise, then one layer to colours. It has one stage at first; `grow` appends a copy of the
    last. The block is outside of the stages, since a copy of it would not fit the next size.
    Buffers keep what sampling needs of the training: the photograph at every stage (real0, real1,
    ...), the noise z* that reconstructs it (z0, z1, ...), and the amplitudes of the noise.
    """

    def __init__(self, args: Args, pyramid: list[Tensor]) -> None:
        super().__init__()
        channels, norm, layers = args.g_ch, args.batch_norm, range(args.num_layer)
        self.channels, self.pad, self.stages = channels, args.num_layer, len(pyramid)
        self.retarget, self.place = args.retarget, args.gca_place
        self.head = conv_layer(3, channels, norm)
        stage = nn.Sequential(*(conv_layer(channels, channels, norm) for _ in layers))
        self.body = nn.ModuleList([stage])
        self.tail = nn.Sequential(nn.Conv2d(channels, 3, 3), nn.Tanh())
        start_weights(args, self)
        self.block = stage_block(args, channels, tuple(pyramid[0].shape[2:]))
        for i, real in enumerate(pyramid):
            self.register_buffer(f"real{i}", real)
        self.register_buffer("z0", pyramid[0].clone())
        self.register_buffer("amps", torch.tensor([1.0] + [0.0] * (self.stages - 1)))

    def grow(self) -> None:
        """Append a stage that starts as a copy of the last one."""
        self.body.append(copy.deepcopy(self.body[-1]))
        d = len(self.body) - 1
        zeros = functools.partial(torch.zeros, device=self.amps.device)
        self.register_buffer(f"z{d}", self.noise(zeros)[d])

    def stack(self, name: str) -> list[Tensor]:
        """The buffers "real" or "z" of the present stages."""
        return [getattr(self, f"{name}{i}") for i in range(len(self.body))]

    def noise(
        self, draw: Callable[..., Tensor], scale: tuple[float, float] = (1.0, 1.0)
    ) -> list[Tensor]:
        """The noise of one image of `scale` times the sides, rounded down; draw(1, h, w, C)."""
        noise, pad = [], 0 if self.retarget else 2 * self.pad
        for real in self.stack("real"):
            h, w = (int(side * factor) for side, factor in zip(real.shape[2:], scale))
            shape = (h + pad, w + pad, self.channels) if noise else (h, w, 3)
            noise.append(draw(1, *shape).permute(0, 3, 1, 2))
        return noise

    def trunk(self, noise: Tensor) -> Tensor:
        """What the block gets of the noise (N, 3, h, w) of stage 0: (N, channels, h, w)."""
        x = self.head(F.pad(noise, [1] * 4))
        return x if self.place == "head" else self.first(x)

    def first(self, x: Tensor) -> Tensor:
        """The convolutions of stage 0; what they cut off is added before, as two wider pixels."""
        if self.retarget:
            return self.body[0](F.pad(x, [self.pad] * 4))
        x = resize(x, (x.shape[2] + 2, x.shape[3] + 2))
        return self.body[0](F.pad(x, [self.pad - 1] * 4))

    def forward(self, noise: list[Tensor]) -> Tensor:
        y, pad = self.block(self.trunk(noise[0])), self.pad
        y = self.first(y) if self.place == "head" else y
        for body, z, amp in zip(self.body[1:], noise[1:], self.amps[1:]):
            h, w = z.shape[2:]
            if self.retarget:
                base = resize(y, (h, w))
                wide = F.pad(base + amp * z, [pad] * 4)
            else:
                base, wide = resize(y, (h - 2 * pad, w - 2 * pad)), resize(y, (h, w)) + amp * z
            y = body(wide) + base
        return self.tail(F.pad(y, [1] * 4))

    def groups(self, args: Args) -> list[dict]:
        """Adam's parameter groups of the newest stage; what is not in them is frozen.

        The learning rate falls by `lr_scale` with each stage that a part is older.
        """
        d, depth = len(self.body) - 1, args.train_depth
        parts = [(self.body[i], d - i) for i in range(max(0, d - depth + 1), d + 1)]
        parts += [(self.tail, 0), *[(self.head, d)][: d < depth]]
        parts += [(self.block, d)][: d < (1 if args.gca_first_only else depth)]
        self.requires_grad_(False)
        groups = [(list(part.requires_grad_().parameters()), age) for part, age in parts]
        return [{"params": p, "lr": args.g_lr * args.lr_scale**age} for p, age in groups if p]


class PatchDiscriminator(nn.Module):
    """ConSinGAN's critic: images (N, 3, H, W) -> a score of each patch (N, 1, H - 2k, W - 2k).

    k = num_layer + 2 layers without padding: a patch is 2k + 1 pixels wide. `add_block` is for
    stage 0 only, whose size the block keeps.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        channels, layers, self.place = args.d_ch, range(args.num_layer), args.gca_place
        self.head = conv_layer(3, channels)
        self.body = nn.Sequential(*(conv_layer(channels, channels) for _ in layers))
        self.tail = nn.Conv2d(channels, 1, 3)
        start_weights(args, self)
        self.block = nn.Identity()

    def add_block(self, args: Args, size: tuple[int, int]) -> None:
        """Give it the block, for photographs of `size`."""
        cut = 2 if self.place == "head" else 2 + 2 * args.num_layer
        inside = size[0] - cut, size[1] - cut
        self.block = stage_block(args, args.d_ch, inside)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        x = self.body(self.block(x)) if self.place == "head" else self.block(self.body(x))
        return self.tail(x)


def block_terms(G: nn.Module, D: nn.Module) -> dict[str, Tensor]:
    """For the log: the gain of each block, and rms(p) / rms(x) of its last forward pass."""
    terms = {}
    for key, net in (("g", G), ("d", D)):
        for block in net.modules():
            if isinstance(block, Gated):
                terms[f"train/{block.gain_name}_{key}"] = getattr(block, block.gain_name)
                terms[f"train/ratio_{key}"] = block.ratio
    return terms


# --------------------------------------------------------------------------------------------------
# 5. Losses
# --------------------------------------------------------------------------------------------------
# Of a logit s: D's loss on a real image, D's on a generated one, G's. Means over the batch follow.
ADVERSARIAL = {
    "bce": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
    "wgan-gp": (lambda s: -s, lambda s: s, lambda s: -s),
}


def gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """E (||grad D(x^)||_2 - 1)^2 at x^ = eps x + (1 - eps) x~, in fp32; eps (N, 1, 1, 1).

    The norm is over all values of a sample; `norm`, unlike a root of squares, has a gradient at 0.
    """
    with torch.autocast(real.device.type, enabled=False):
        mixed = (eps * real + (1 - eps) * fake).requires_grad_()
        (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
        return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def pixel_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """ConSinGAN's penalty: the mean over pixels of (||grad D(x^)||_2 - 1)^2, D summed over patches.

    x^ = eps x + (1 - eps) x~, eps (1, 1, 1, 1). The norm is over a pixel's colours, not the image.
    """
    mixed = (eps * real + (1 - eps) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    return (grad.norm(dim=1) - 1).square().mean()


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
def open_celeba(args: Args) -> Dataset:
    """CelebA's aligned images, 178x218; with --squash resized, not cropped, to squares."""
    source = torchvision.datasets.CelebA(args.data_dir, "all", [], download=args.download)
    if args.squash:
        source.transform = torchvision.transforms.Resize((args.img_size, args.img_size))
        source.key = "squashed"
    return source


class LSUNChurch(Dataset):
    """The training images of LSUN's outdoor churches, compressed images in an lmdb.

    Every process opens the database and lists its keys by itself, at its first image: torchvision's
    reader holds one open, which must not cross a fork, and writes its keys into the working folder.
    """

    def __init__(self, data_dir: str) -> None:
        self.path, self.transaction = Path(data_dir) / "church_outdoor_train_lmdb", None
        self.key = (self.path / "data.mdb").stat().st_size
        with self.database() as database:
            self.length = database.stat()["entries"]

    def database(self):
        """The database, opened for reading."""
        try:
            import lmdb

            return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
        except ModuleNotFoundError as error:
            how = "pip install lmdb, or read a folder of images by --dataset folder"
            raise fid.UserError(f"--dataset lsun-church needs the package lmdb: {how}") from error
        except lmdb.Error as error:
            raise OSError(f"{self.path} is no readable lmdb ({error})") from error

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.transaction is None:
            self.transaction = self.database().begin()
            self.keys = list(self.transaction.cursor().iternext(values=False))
        return Image.open(io.BytesIO(self.transaction.get(self.keys[index]))), 0


SOURCES = {  # how to open each data set, and how to get it
    "celeba": (
        open_celeba,
        "put img_align_celeba.zip, identity_CelebA.txt and the four list_*.txt files of "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into celeba/ there, or install gdown",
    ),
    "lsun-church": (
        lambda args: LSUNChurch(args.data_dir),
        "put church_outdoor_train_lmdb of https://www.yf.io/p/lsun there, or read a folder of "
        "images by --dataset folder",
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


def pyramid_shapes(args: Args, height: int, width: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of the stages of a photograph of height x width pixels, the smallest first.

    All but the last are r^e of it, rounded up. ConSinGAN's e = (S - 1) ln(S - i) / ln(S) + 1 gives
    more small stages than SinGAN's S - i, for stage i of S + 1. fid.UserError for a photograph too
    small for its stages.
    """
    long = max(height, width)
    if long > args.max_size:
        height, width = (-(-side * args.max_size // long) for side in (height, width))
    short, last = min(height, width), args.stages - 1
    must = (
        f"be below {short}, the short side at {height}x{width} pixels: a smaller --min-size or a "
        f"larger photograph and --max-size (now {args.max_size})"
    )
    require(args.min_size < short, "min_size", must, args.min_size)
    if short < 2 * args.min_size:
        fid.warn(f"the short side, {short} pixels, is below twice --min-size: stages differ little")
    sizes, ratio = [], (args.min_size / short) ** (1 / max(1, last))
    for i in range(last):
        exponent = last - i
        if args.spacing == "consingan" and last > 1:
            exponent = (last - 1) / math.log(last) * math.log(last - i) + 1
        sizes.append(tuple(math.ceil(side * ratio**exponent) for side in (height, width)))
    return [*sizes, (height, width)]


def load_pyramid(args: Args) -> list[Tensor]:
    """The photograph at every stage's size, (1, 3, H, W) in [-1, 1], each resized from the last's.

    fid.UserError for a photograph that is unreadable, too small, or too large for the block.
    """
    photo = fid.open_photo(args.image)
    sizes = pyramid_shapes(args, photo.height, photo.width)
    nodes = sizes[0][0] * sizes[0][1]
    if args.block == "gca" and args.gca_variant in ("nodes", "gram"):
        must = f"be bottleneck or gcn where stage 0 has {nodes} pixels, above 4096"
        require(nodes <= 4096, "gca_variant", must, args.gca_variant)
        if nodes > 1600:
            fid.warn(f"Theta has {nodes}x{nodes} weights; --gca-variant bottleneck or gcn has few")
    must = f"be none where stage 0 has {nodes} pixels: A of more than 16384 squared takes over 1 GB"
    require(args.block == "none" or nodes <= 16_384, "block", must, args.block)
    full, pyramid = photo.resize(sizes[-1][::-1], Image.BICUBIC), []
    for height, width in sizes:
        level = torch.from_numpy(np.array(full.resize((width, height), Image.BICUBIC)))
        pyramid.append(level.permute(2, 0, 1)[None].float() / 127.5 - 1)
    return pyramid


# --------------------------------------------------------------------------------------------------
# 7. Run
# --------------------------------------------------------------------------------------------------
FORMAT = 2  # of the checkpoints; 2: with the name of the data
load_checkpoint = functools.partial(fid.load_checkpoint, Path(__file__).stem, FORMAT)
FREE_FLAGS = {  # what a resumed run may change: whatever leaves the training alone
    "mode", "resume", "checkpoint", "dry_run", "total_steps", "log_every", "sample_every",
    "eval_every", "save_every", "num_workers", "device", "out_dir", "data_dir", "download",
    "num_samples", "fid_batch_size", "heatmap_net", "runs", "image", "sifid_dims", "scale_h",
    "scale_w",
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


def checkpoint_path(args: Args) -> Path:
    """The checkpoint that --checkpoint or the flags of the run name."""
    return Path(args.checkpoint) if args.checkpoint else run_folder(args) / "checkpoint.pt"


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: the scores of a checkpoint, printed and kept in evaluate.json beside it."""
    step = load_checkpoint(checkpoint_path(args))["step"]
    args, device, G, _, folder = open_checkpoint(args)
    inception = fid.load_inception(args.fid_weights, device)
    images, _, path = load_images(args)
    scores = score(args, inception, G, images, path, eval_noise(args, args.fid_num))
    record = {"step": step, **scores, **inception.protocol}
    fid.write_text(folder / "evaluate.json", json.dumps(record, indent=2))
    return scores


def sample(args: Args) -> None:
    """Mode sample: PNGs of a checkpoint's generator, and a grid of them."""
    args, _, G, _, folder = open_checkpoint(args)
    images = sample_grid(args, G)
    fid.write_images(folder, images, math.isqrt(len(images)))


PUBLISHED = {  # Table 1, FID on CelebA and on LSUN church
    ("dcgan", "none"): (33.39, 33.59),
    ("dcgan", "nl"): (34.56, 54.36),
    ("dcgan", "gca"): (25.75, 22.15),
    ("sagan", "nl"): (54.75, 36.56),
    ("sagan", "gca"): (37.39, 28.74),
}


def run_result(folder: Path) -> tuple[Args, str, float | None]:
    """A run folder's flags, its data set and last step, and its FID there, None without one.

    The FID is the run's own at its last step, else that of mode evaluate.
    """
    args = Args(**json.loads((folder / "args.json").read_text())["args"])
    records = fid.read_records(folder / "log.jsonl")
    step, weights = max([r["step"] for r in records], default=0), args.fid_weights
    scores = [r["metric/fid"] for r in records if r["step"] == step and "metric/fid" in r]
    if not scores and (folder / "evaluate.json").exists():
        record = json.loads((folder / "evaluate.json").read_text())
        scores, weights, step = [record["metric/fid"]], record["weights"], record["step"]
    label = f", {fid.RANDOM_LABEL}" if scores and weights == "random" else ""
    return args, f"{args.dataset}, step {step}{label}", scores[-1] if scores else None


def cost(net: nn.Module, x: Tensor) -> str:
    """Parameters and multiply-adds of a forward pass of input x, both in millions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x)
    size = sum(p.numel() for p in net.parameters())
    return f"{size / 1e6:.2f} / {counter.get_total_flops() / 2e6:.0f}"


def table(runs: list[Path]) -> str:
    """Table 1 as Markdown: published FIDs, then those of the given runs, their seeds together."""
    head = "model | CelebA | LSUN church | experiment | G: M parameters / M MACs | D | FID | seeds"
    rows, found = [head, "|".join(["---"] * 8)], {}
    for args, where, value in map(run_result, runs):
        # Runs join into a row where nothing but the seed, and what leaves it alone, differs.
        flags = {k: v for k, v in asdict(args).items() if k not in FREE_FLAGS | {"seed"}}
        key = args.model, args.block, f"{args.exp_name} ({where})", json.dumps(flags)
        found.setdefault(key, []).append((args, value))
    done = {key[:2] for key in found}
    missing = {(*key, "not run"): [] for key in PUBLISHED if key not in done}
    for (model, block, experiment, *_), members in sorted((found | missing).items()):
        name = model.upper() + {"none": "", "nl": " + NL", "gca": " + GCA"}[block]
        published = [f"{value:.2f}" for value in PUBLISHED.get((model, block), ())] or ["", ""]
        ours = ["", "", "", ""]
        if members:
            args, values = members[0][0], [value for _, value in members if value is not None]
            z, x = torch.zeros(1, args.z_dim), torch.zeros(1, 3, args.img_size, args.img_size)
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            mean = f"{statistics.mean(values):.2f}{spread}" if values else "not evaluated"
            ours = [cost(Generator(args), z), cost(Discriminator(args), x), mean, str(len(values))]
        rows.append(" | ".join([name, *published, experiment, *ours]))
    return "\n".join(f"| {row} |" for row in rows)


@torch.no_grad()
def heat_maps(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Heat (N, 1, H, W) in [0, 1] at a block of input (N, C, H, W): its output o, x and o - x.

    The mean over the channels, stretched to [0, 1] map by map; without a block x alone, as "o".
    """
    o, maps = block(x) if isinstance(block, Gated) else x, {}
    for key, value in {"o": o, "x": x, "gain p": o - x}.items() if o is not x else [("o", x)]:
        mean = value.mean(dim=1, keepdim=True)
        mean = mean - mean.amin(dim=(2, 3), keepdim=True)
        maps[key] = (mean / mean.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)).cpu()
    return maps


def overlay(images: Tensor, heat: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W), half covered by heat (N, 1, h, w) in the colours of "jet"."""
    v = F.interpolate(heat, size=images.shape[2:], mode="bicubic").clamp(0, 1)
    jet = torch.cat([1.5 - (4 * v - peak).abs() for peak in (3, 2, 1)], dim=1).clamp(0, 1)
    return (images.cpu() / 2 + jet * 127.5).round().byte()


def figures(args: Args) -> None:
    """Mode figures: samples from shared noise (Figure 4), heat maps (Figure 5), Table 1."""
    paths = [str(Path(run) / "checkpoint.pt") for run in args.runs] or [args.checkpoint]
    opened = [open_checkpoint(replace(args, checkpoint=path)) for path in paths]
    first, *_, folder = opened[0]
    for other, *_, place in opened:
        same = (other.dataset, other.img_size) == (first.dataset, first.img_size)
        require(same, "runs", f"be of one data set and size, those of {folder}", place)
    target, n = folder / "figures", min(8, args.num_samples)
    target.mkdir(exist_ok=True)
    real = torch.from_numpy(load_images(first)[0][:n])
    samples, columns = [], []
    for other, device, G, D, place in opened:
        z = eval_noise(other, n)
        samples.append(generate(G, z).cpu())
        net, images, inputs = D, real, real.to(device).float() / 127.5 - 1
        if args.heatmap_net == "g":
            net, images, inputs = G, samples[-1], z.to(device)[:, :, None, None]
        with torch.no_grad():
            x = net.layers[: net.place](inputs)
        maps = heat_maps(net.layers[net.place], x)
        columns += [images, *(overlay(images, heat) for heat in maps.values())]
        above = ", ".join(f"{key} {(h > 0.5).float().mean():.1%}" for key, h in maps.items())
        fid.say(f"{place}: map of {args.heatmap_net.upper()} above 0.5: {above}")
    fid.write_grid(target / "samples.png", torch.cat(samples), n)
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    fid.write_grid(target / "heatmaps.png", cells, len(columns))
    text = table([place for *_, place in opened])
    fid.write_text(target / "table1.md", text + "\n")
    fid.say(text)
    fid.say(f"samples, heatmaps (image, o, x, gain p of each run) and table1 are in {target}")


def pyramid_nets(args: Args, pyramid: list[Tensor], stage: int) -> tuple[nn.Module, nn.Module]:
    """G and D as they are in a stage, with the weights of the start.

    The blocks come last: a run with a block starts from the weights of one without.
    """
    D, G = PatchDiscriminator(args), PyramidGenerator(args, pyramid)
    if args.gca_in_d and stage == 0:
        D.add_block(args, tuple(pyramid[0].shape[2:]))
    for _ in range(stage):
        G.grow()
    return G, D


def saved_stage(state: dict) -> tuple[list[Tensor], int]:
    """The photograph at every stage's size, and the present stage, of ConSinGAN's checkpoint."""
    buffers, args = state["parts"]["G"], state["args"]
    pyramid = [buffers[f"real{i}"] for i in range(len(buffers["amps"]))]
    return pyramid, max(0, state["step"] - 1) // args["niter"]


def open_pyramid(args: Args, path: Path) -> tuple[Args, nn.Module, dict]:
    """Args with the checkpoint's architecture, its generator on the device, the checkpoint."""
    state = load_checkpoint(path)
    must = f"be {state['args'].get('model')} for {path}"
    require(state["args"].get("model") == "consingan", "model", must, args.model)
    args = fid.recall(args, state["args"], FREE_FLAGS, path)
    G = pyramid_nets(args, *saved_stage(state))[0]
    fid.load_parts({"G": G}, state["parts"], path)
    return args, G.to(setup(args), memory_format=torch.channels_last), state


def photo_noise(args: Args, G: nn.Module, index: int) -> list[Tensor]:
    """The noise of sample `index`, a function of (eval_seed, index) and its sizes alone."""
    generator = torch.Generator().manual_seed(fid.mix("photo", args.eval_seed, index))
    draw = functools.partial(torch.randn, generator=generator)
    return [z.to(G.amps.device) for z in G.noise(draw, (args.scale_h, args.scale_w))]


@torch.no_grad()
def photo_samples(args: Args, G: nn.Module, count: int) -> Tensor:
    """uint8 samples (count, 3, H, W). One at a time: batch norm stays that of single images."""
    return torch.cat([to_pixels(G(photo_noise(args, G, i))) for i in range(count)])


def to_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] as uint8, on the CPU."""
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def photo_score(args: Args, trunk: nn.Module, G: nn.Module) -> dict[str, float]:
    """SIFID of `fid_num` samples of G from the photograph at the present stage's size.

    And their diversity, as SinGAN measures it: the deviation of a pixel over the samples, averaged,
    over the deviation of the photograph's pixels. A copied photograph has the best SIFID, and 0.
    """
    real, fakes = to_pixels(G.stack("real")[-1])[0], photo_samples(args, G, args.fid_num)
    found = fid.sifid(trunk, real, fakes, args.sifid_dims)
    mean, spread, size = found["mean"], found["std"], "x".join(map(str, real.shape[1:]))
    diversity = (fakes.float().std(0).mean() / real.float().std()).item()
    label = f"{args.sifid_dims} features, {args.fid_num} samples of {size}"
    fid.say(
        f"SIFID {mean:.4g} ± {spread:.2g}, diversity {diversity:.3f} ({label})"
        f"{trunk.label and ': '}{trunk.label}"
    )
    return {"metric/sifid": mean, "metric/sifid_std": spread, "metric/diversity": diversity}


def evaluate_photo(args: Args) -> dict[str, float]:
    """Mode evaluate of ConSinGAN: SIFID, printed and kept in evaluate.json by the checkpoint."""
    path = checkpoint_path(args)
    args, G, state = open_pyramid(args, path)
    trunk = fid.load_sifid_trunk(args.fid_weights, G.amps.device, args.sifid_dims)
    scores = photo_score(args, trunk, G)
    record = {"step": state["step"], "sifid_dims": args.sifid_dims, **scores, **trunk.protocol}
    fid.write_text(path.with_name("evaluate.json"), json.dumps(record, indent=2))
    return scores


def sample_photo(args: Args) -> None:
    """Mode sample of ConSinGAN: PNGs, of --scale-h and --scale-w times the size, and a grid."""
    path = checkpoint_path(args)
    args, G, _ = open_pyramid(args, path)
    fixed = args.block == "gca" and args.gca_variant != "gcn"
    for flag, side in (("scale_h", 2), ("scale_w", 3)):
        value, least = getattr(args, flag), G.real0.shape[side]
        must = f"be 1 with --gca-variant {args.gca_variant}, which has one size: train with gcn"
        require(value == 1 or not fixed, flag, must, value)
        few = 2 if args.block == "nl" and args.nl_variant == "pooled" else 1
        require(value * least >= few, flag, f"leave {few} of stage 0's {least} pixels", value)
    images = photo_samples(args, G, args.num_samples)
    fid.write_images(path.parent, images, math.isqrt(len(images)))


@torch.no_grad()
def figures_photo(args: Args) -> None:
    """Mode figures of ConSinGAN, a row of each run; smaller images are enlarged, pixel by pixel.

    pairs.png: the photograph and samples of shared noise (Figure 6). stages.png: a sample after
    each finished stage, then the photograph (Figure 7). heatmaps.png: G's block at stage 0.
    """
    paths = [Path(run) / "checkpoint.pt" for run in args.runs] or [checkpoint_path(args)]
    opened = [open_pyramid(args, path) for path in paths]
    photos = [saved_stage(state)[0] for *_, state in opened]
    for path, photo in zip(paths, photos):
        same = len(photo) == len(photos[0]) and all(map(torch.equal, photo, photos[0]))
        require(same, "runs", f"be of one photograph and its stages, as {paths[0]}", path)
    ended = min(len(list(path.parent.glob("stage*.pt"))) for path in paths)
    target, n = paths[0].parent / "figures", min(4, args.num_samples)
    target.mkdir(exist_ok=True)
    real, pairs, strips, columns = to_pixels(photos[0][-1]), [], [], []
    fit = functools.partial(F.interpolate, size=real.shape[2:])
    for path, (run, G, state) in zip(paths, opened):
        samples = fit(photo_samples(run, G, n))
        pairs += [real, samples]
        for stage in range(ended):
            then, grown, _ = open_pyramid(args, path.with_name(f"stage{stage}.pt"))
            strips.append(fit(photo_samples(then, grown, 1)))
        strips.append(real)
        noise = [photo_noise(run, G, i) for i in range(n)]
        maps = heat_maps(G.block, torch.cat([G.trunk(z[0]) for z in noise]))
        columns += [samples, *(overlay(samples, heat) for heat in maps.values())]
        above = ", ".join(f"{key} {(h > 0.5).float().mean():.1%}" for key, h in maps.items())
        kept, score = path.with_name("evaluate.json"), "not evaluated"
        found = json.loads(kept.read_text()) if kept.exists() else {"step": None}
        if found["step"] == state["step"]:
            label = f", {fid.RANDOM_LABEL}" if found["weights"] == "random" else ""
            score = f"{found['metric/sifid']:.4g} ± {found['metric/sifid_std']:.2g}{label}"
            score += f", {found['sifid_dims']} features, diversity {found['metric/diversity']:.3f}"
        size = f"G of {cost(G, noise[0])} M parameters / M MACs"
        fid.say(f"{path.parent}: SIFID {score}; {size}; map above 0.5: {above}")
    fid.write_grid(target / "pairs.png", torch.cat(pairs), n + 1)
    fid.write_grid(target / "stages.png", torch.cat(strips), ended + 1)
    fid.write_grid(target / "heatmaps.png", torch.stack(columns, 1).flatten(0, 1), len(columns))
    fid.say(f"pairs, stages and heatmaps (sample, o, x, gain p of each run) are in {target}")


# --------------------------------------------------------------------------------------------------
# 9. Training
# --------------------------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from the run's checkpoint; the last evaluation's metrics."""
    device = setup(args)
    inception = fid.load_inception(args.fid_weights, device) if args.eval_every else None
    images, labels, path = load_images(args)
    torch.manual_seed(args.seed)  # here: decoding, where it is due, draws random numbers too
    G, D = Generator(args).to(device), Discriminator(args).to(device)
    adam = {"betas": (args.beta1, args.beta2), "fused": True, "capturable": args.cuda_graphs}
    g_opt = torch.optim.Adam(G.parameters(), args.g_lr, **adam)
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, **adam)
    run = Run(args, device, path.stem, G=G, D=D, g_opt=g_opt, d_opt=d_opt)
    batches = endless_batches(images, labels, args, device, run.step * args.n_critic)
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    penalised = args.loss == "wgan-gp"
    if penalised and any(isinstance(m, nn.BatchNorm2d) for m in D.modules()):
        fid.warn("batch norm in D: the gradients that the penalty is taken of mix samples")
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
        return {"loss/g": g_loss, "grad/g_norm": run.update(g_loss, "G"), **block_terms(G, D)}

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
            run.log_interval({})
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


def stage_optimizers(args: Args, G: nn.Module, D: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """New optimisers for the newest stage."""
    adam = {"betas": (args.beta1, args.beta2), "fused": True}
    return {
        "g_opt": torch.optim.Adam(G.groups(args), args.g_lr, **adam),
        "d_opt": torch.optim.Adam(D.parameters(), args.d_lr, **adam),
    }


@torch.no_grad()
def next_stage(run: Run, G: nn.Module, D: nn.Module) -> None:
    """Append a stage: its z*, the amplitude of its noise, new optimisers; D's block goes."""
    G.grow()
    d = len(G.body) - 1
    getattr(G, f"z{d}").copy_(G.noise(functools.partial(run.draw, torch.randn))[d])
    error = F.mse_loss(G(G.stack("z")), getattr(G, f"real{d}"))  # with an amplitude of 0
    G.amps[d] = run.args.noise_amp * error.sqrt()
    D.block = nn.Identity()
    G.to(memory_format=torch.channels_last)
    run.parts |= stage_optimizers(run.args, G, D)


def train_consingan(args: Args) -> dict[str, float]:
    """Train on one photograph, from the start or the run's checkpoint; the last SIFID."""
    device, path = setup(args), run_folder(args) / "checkpoint.pt"
    trunk = None
    if args.eval_every:
        trunk = fid.load_sifid_trunk(args.fid_weights, device, args.sifid_dims)
    photo = load_pyramid(args)
    if trunk:  # refuses a photograph with too few positions, before training
        fid.sifid(trunk, to_pixels(photo[-1])[0], to_pixels(photo[-1]), args.sifid_dims)
    resumed = args.resume and path.exists()
    pyramid, stage = saved_stage(load_checkpoint(path)) if resumed else (photo, 0)
    must = f"be the photograph of {path}, at the same --max-size"
    require(torch.equal(pyramid[-1], photo[-1]), "image", must, args.image)
    torch.manual_seed(args.seed)
    G, D = pyramid_nets(args, pyramid, stage)
    for net in (G, D):
        net.to(device, memory_format=torch.channels_last)
    run = Run(args, device, "photograph", G=G, D=D, **stage_optimizers(args, G, D))
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    last_fifth, stop, metrics = -(-args.niter * 4 // 5), False, {}

    while run.step < args.total_steps and not stop:
        stage, inner = divmod(run.step, args.niter)
        if stage == len(G.body):
            next_stage(run, G, D)
        if inner == last_fifth:
            for group in run.parts["g_opt"].param_groups + run.parts["d_opt"].param_groups:
                group["lr"] *= 0.1
        real, fixed = G.stack("real")[-1], G.stack("z")
        noise = G.noise(functools.partial(run.draw, torch.randn))
        if args.batch_norm:  # the statistics are those of one image
            fake, rec = G(noise), G(fixed)
        else:
            fake, rec = G([torch.cat(pair) for pair in zip(noise, fixed)]).split(1)

        both = torch.cat([real, fake.detach()])
        for _ in range(args.n_critic):
            real_logits, fake_logits = D(both).split(1)
            d_loss_real, d_loss_fake = d_real(real_logits).mean(), d_fake(fake_logits).mean()
            d_reg = pixel_penalty(D, real, fake.detach(), run.draw(torch.rand, 1, 1, 1, 1))
            d_loss = d_loss_real + d_loss_fake + args.lambda_gp * d_reg
            d_norm = run.update(d_loss, "D")

        g_loss_adv, g_loss_rec = g_fake(D(fake)).mean(), F.mse_loss(rec, real)
        g_loss = g_loss_adv + args.lambda_rec * g_loss_rec
        g_norm = run.update(g_loss, "G")
        for _ in range(args.g_steps - 1):  # more, on the same gradient
            run.parts["g_opt"].step()

        terms = {
            "loss/d": d_loss, "loss/g": g_loss, "loss/d_real": d_loss_real,
            "loss/d_fake": d_loss_fake, "loss/d_reg": d_reg, "loss/g_adv": g_loss_adv,
            "loss/g_rec": g_loss_rec, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), "grad/d_norm": d_norm, "grad/g_norm": g_norm,
        }  # fmt: skip
        stop = run.collect(terms | block_terms(G, D))
        ended = run.step % args.niter == 0
        if ended or run.due(args.log_every):
            run.log_interval({"train/stage": stage})
        if ended or run.due(args.sample_every):
            name = run.folder / f"samples/{run.step:07d}"
            grid = photo_samples(args, G, args.num_samples)
            fid.write_grid(name.with_suffix(".png"), grid, math.isqrt(len(grid)))
            with torch.no_grad():
                rec = to_pixels(G(fixed))
            pair = torch.cat([rec, to_pixels(real)])
            fid.write_grid(name.with_name(f"{name.name}-rec.png"), pair, 2)
        if run.due(args.eval_every) and len(G.body) == args.stages:
            metrics = photo_score(args, trunk, G)
            run.log(metrics)
        if ended:
            run.save(f"stage{stage}.pt")
        if stop or ended or run.due(args.save_every):
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
    if args.model == "consingan":
        modes = {"train": train_consingan, "evaluate": evaluate_photo, "sample": sample_photo,
                 "figures": figures_photo}  # fmt: skip
    with fid.exit_codes():
        check_args(args)
        if args.dry_run:
            if args.model == "consingan":
                G, D = pyramid_nets(args, load_pyramid(args), args.stages - 1)
            else:
                G, D = Generator(args), Discriminator(args)
            nets = {"G": G, "D": D}
            params = {key: sum(p.numel() for p in net.parameters()) for key, net in nets.items()}
            print(json.dumps({"args": asdict(args), "params": params}))
        else:
            modes[args.mode](args)


if __name__ == "__main__":
    main()
