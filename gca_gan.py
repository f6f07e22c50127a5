# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""GCA: graph convolution over attention, in DCGAN, SAGAN, ConSinGAN (Peng et al., ICANN 2021).

The pixels of the 8x8 map are the nodes of a graph, self-attention gives its edges, one graph
convolution mixes the nodes, and a learned gain adds the result to the map. Beside it the non-local
(NL) block that it is compared with.

    python gca_gan.py --dataset celeba --block gca                    # Table 1, DCGAN + GCA
    python gca_gan.py --dataset lsun-church --model sagan --block nl  # Table 1, SAGAN
    python gca_gan.py --mode sample --runs runs/gca_gan__celeba__*    # Table 1, Figures 4 and 5
    python gca_gan.py --image photo.jpg     # ConSinGAN, from one photograph; --block gca: with GCA
    python gca_gan.py --mode sample --runs runs/gca_gan__image__*     # Figures 6 and 7

Differences from the paper
 1. It prints a 1-channel W_j and sizes that do not multiply. Here W_j has H W outputs, all else is
    as printed. Where C / k = H W = 64, at DCGAN's own widths (`--g-ch 128 --d-ch 128`), all sizes
    agree; the usual 64 have the same formula at 1/4 of the cost.
 2. "M = W_j x" is read as M = W_m x: four maps are named and only W_m is C x C.
 3. The block is in both networks (`--block-in`), in ConSinGAN in G alone: its critic's maps are
    smaller than the image, and its weights go on to larger stages.
 4. "All models adopt the same hyperparameters", and none is given. `--model sagan` has SAGAN's own
    loss, rates and batch; DCGAN's for it are `--loss bce --batch-size 128 --g-lr 2e-4 --d-lr 2e-4
    --beta1 0.5 --beta2 0.999 --total-steps 39550`. DCGAN trains for 25 epochs.
 5. "Sampled to 64x64" is the central square of 178 pixels, resized; literally it is the whole
    image, squeezed (`--dataset celeba-squashed`). FIDs of different crops do not compare.
 6. Weights start at N(0, 0.02); all of SAGAN, all of gcn and Theta by Xavier; the gain at 0. The
    spectral norm of SAGAN overrides these scales, Theta's too. In DCGAN W_v z starts at 2 % of x
    with NL, at half (G) or a third (D) of x with GCA: this alone may tilt the comparison.
 7. SAGAN is the unconditional 64x64 network with one block at 8x8, not the 128x128 ResNet.
 8. A is binarised only by `--gca-binarize`, at a row's mean 1 / (H W); no threshold is stated.
 9. Heat maps (Figure 5) are channel means of D's maps of real images, each stretched to [0, 1].
10. FID is fid.py's. Table 1 and mode evaluate take the last step, mode sample the best.
11. ConSinGAN's GCA, which "only works in the first stage", follows stage 0's convolutions, stays in
    the path of the later stages and learns as long as they do.
12. There `--block gca` takes Z = M Y^T (`--gca-y-transpose`): the printed Z = M Y adds the same map
    whatever the noise, and all samples are the photograph (see GCA).
13. ConSinGAN is its released code (stages, rates, penalty per pixel) without its flaws: 1 or 2
    stages work, alpha is composited, a photograph too small for its stages is refused. It trains
    --stages times --niter steps in fp32 and reads no flags of data sets, batches, z, losses, EMA.
14. SIFID has the 64 features of SinGAN's numbers, not the 192 of its text (`--sifid-dims`). A copy
    has the best SIFID: read it beside the diversity.
"""

# ---- 1. Imports ----------------------------------------------------------------------------------
import copy
import io
import itertools
import json
import math
import os
import random
import shlex
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
from torch.nn.utils.rnn import pad_sequence
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
    total_steps: int = 39_550  # generator updates to train for
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 1_000  # steps between sample grids; 0: none
    eval_every: int = 10_000  # steps between evaluations; 0: none
    save_every: int = 1_000  # steps between checkpoints; 0: none
    num_samples: int = 64  # images of a sample grid and of mode sample
    fid_num: int = 50_000  # generated images of an evaluation
    fid_real: int = 0  # real images of an evaluation, spread over the data set; 0: all
    fid_weights: str = "auto"  # Inception weights: auto (download), a path, or random (for tests)
    runs: tuple[str, ...] = ()  # run folders that mode sample sets side by side
    image: str = ""  # photograph of any size, to learn from (gca_gan.py) or fill (an_inpaint.py)
    scale: tuple[float, float] = (1.0, 1.0)  # mode sample, ConSinGAN: factors of height and width
    sifid_num: int = 10  # samples of a SIFID, ConSinGAN's score
    sifid_dims: Literal[64, 192] = 64  # features of SIFID: as in SinGAN's code, or in its text
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal[
        "celeba", "celeba-squashed", "lsun-church", "folder", "shapes", "image"
    ] = "celeba"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 64  # side of the square images in pixels
    crop: int = 0  # side of the central square cut out first, in pixels; 0: the short side
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    # Model
    model: Literal["dcgan", "sagan", "consingan"] = "dcgan"  # row of the paper's tables
    z_dim: int = 100  # length of the noise vector
    g_ch: int = 64  # base width of the generator, in channels
    d_ch: int = 64  # base width of the discriminator, in channels
    block: Literal["none", "nl", "gca"] = "gca"  # block at the 8x8 map, in ConSinGAN at stage 0
    block_in: Literal["both", "g", "d"] = "both"  # networks with the block; in ConSinGAN only G
    gca_k: Literal[1, 2, 4, 8] = 8  # channel reduction k of the NL and GCA blocks
    gca_variant: Literal["nodes", "bottleneck", "gcn"] = "nodes"
    """reading of the paper's sizes: J of H W features, of C / k, or a textbook graph convolution"""
    gca_y_transpose: bool = False  # Z = M Y^T, not the printed M Y: a pixel takes its own row
    gca_binarize: Literal["off", "ste", "hard"] = "off"  # edges 0 or 1; ste: with soft A's gradient
    # Optimisation
    batch_size: int = 128  # images per update, shared out over the processes
    n_critic: int = 1  # discriminator updates per generator update
    g_lr: float = 2e-4  # learning rate of the generator
    d_lr: float = 2e-4  # learning rate of the discriminator
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean
    beta2: float = 0.999  # Adam's decay rate of the squared gradient's mean
    loss: Literal["bce", "hinge"] = "bce"  # adversarial loss
    ema_decay: float = 0.0  # decay of the averaged generator; 0: none, as in the paper
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""
    # ConSinGAN
    stages: int = 6  # sizes at which the photograph is learnt, one after the other
    niter: int = 2_000  # steps of a stage
    train_depth: int = 3  # newest stages that are trained; the older ones are frozen
    lr_scale: float = 0.1  # learning rate of a stage over that of the stage after it
    min_size: int = 25  # short side of the first stage, in pixels
    max_size: int = 250  # long side of the last stage, where the photograph is larger
    lambda_gp: float = 0.1  # weight of the gradient penalty
    lambda_rec: float = 10.0  # weight of the reconstruction

    @property
    def photo(self) -> bool:
        """Whether this is ConSinGAN: --image alone asks for it."""
        return self.model == "consingan" or self.image != ""


DEFAULTS = {  # what a data set or a row changes; flags that are given win
    ("dataset", "lsun-church"): {"total_steps": 24_650},
    ("model", "sagan"): {
        "z_dim": 128, "total_steps": 100_000, "batch_size": 64, "g_lr": 1e-4, "d_lr": 4e-4,
        "beta1": 0.0, "beta2": 0.9, "loss": "hinge",
    },
    ("photo", True): {
        "model": "consingan", "dataset": "image", "block": "none", "gca_y_transpose": True,
        "batch_size": 1, "n_critic": 3, "g_lr": 5e-4, "d_lr": 5e-4, "amp": "off",
        "sample_every": 500, "save_every": 500, "eval_every": 0, "num_samples": 25,
    },
}  # fmt: skip


# differs from giu_gan.py: the row settles where the checkpoint is
def parse(argv: list[str] | None = None) -> Args:
    """Parse the command line twice: the first pass finds the defaults of the second.

    They are the row's or, where a checkpoint is resumed, started from or used, that checkpoint's.
    Raises ValueError for flags that break a rule or differ from the checkpoint's.
    """
    argv = sys.argv[1:] if argv is None else argv
    first_argv = [a for a in argv if a not in ("-h", "--help")]
    first, default = tyro.cli(Args, args=first_argv), {}
    for (flag, value), row in DEFAULTS.items():
        default |= row if getattr(first, flag) == value else {}
    first = tyro.cli(Args, args=first_argv, default=Args(**default))
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
    n, size, k, training = args.batch_size, args.img_size, args.gca_k, args.mode == "train"
    yield n > 0 and n % WORLD == 0, f"--batch-size must be a multiple of {WORLD}, got {n}"
    agree = (args.model == "consingan") == (args.dataset == "image") == (args.image != "")
    got = f"{args.model}, {args.dataset}, {args.image or 'no image'}"
    together = agree or not training
    yield together, f"--model consingan, --dataset image, --image must go together, got {got}"
    path, folder, real = find_checkpoint(args), run_folder(args), args.fid_real
    yield real == 0 or real > 1, f"--fid-real must be 0 or at least 2, got {real}"
    one = WORLD == 1 or (training and not args.photo)
    yield one, f"--mode {args.mode} of --model {args.model} must have 1 process, got {WORLD}"
    there = path.exists() or bool(args.runs) or (training and not args.checkpoint)
    yield there, f"{path} does not exist: train first, or name a --checkpoint"
    new = not training or args.resume or args.dry_run or RANK > 0 or not folder.exists()
    yield new, f"--exp-name must be new or go with --resume: {folder} exists"
    yield size in (32, 64, 128), f"--img-size must be 32, 64 or 128, got {size}"
    for net in "g" if args.photo else "gd":
        channels = getattr(args, f"{net}_ch") * (1 if args.photo else size // 16)
        plain = args.block == "none" or args.block_in not in ("both", net)
        yield plain or channels % k == 0, f"--gca-k must divide {channels} channels, got {k}"
    yield args.sifid_num > 1, f"--sifid-num must be at least 2, got {args.sifid_num}"
    least = min(args.stages, args.niter, args.train_depth)
    yield least >= 1, f"--stages, --niter and --train-depth must be at least 1, got {least}"
    yield args.min_size >= 11, f"--min-size must be at least 11, what D sees, got {args.min_size}"


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


def edge_weights(f: Tensor, g: Tensor, binarize: str = "off") -> Tensor:
    """Return A: row j is node j's attention to all nodes and sums to 1; logits are not scaled.

    f, g (N, c, n) -> (N, n, n). Binarised, an edge is 1 above the mean 1 / n of its row, else 0;
    "ste" has the gradient of the soft A. No fused kernel: those have no second derivative.
    """
    r = g.transpose(1, 2) @ f  # r_ij = f(x_i)^T g(x_j), at [j, i]
    a = r.softmax(dim=-1)  # a_ji = exp(r_ij) / sum over i of exp(r_ij)
    if binarize == "off":
        return a
    b = (a > 1 / a.shape[2]).to(a.dtype)
    return b if binarize == "hard" else b + (a - a.detach())


def normalize(a: Tensor) -> Tensor:
    """Return A^ = D~^(-1/2) A~ D~^(-1/2) of A~ = A + I, D~ its row sums: (N, n, n) -> (N, n, n).

    The rows of a soft A sum to 1: then D~ = 2 I and A^ = (A + I) / 2. A is directed, so A^ is not
    symmetric. Of a binarised A the degrees differ; they are at least 1, by the self-loops.
    """
    a = a + torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    d = a.sum(dim=2).rsqrt()
    return d[:, :, None] * a * d[:, None, :]


class Gated(nn.Module):
    """Base of both blocks, (N, C, H, W) -> (N, C, H, W): o = gain W_v z + x, the gain 0 at first.

    `mix` makes z (N, c, n) of the 1x1 convolutions `inputs` of x, in fp32: it grows with the square
    of x and may overflow half precision. `ratio` is rms(W_v z) / rms(x) of the last forward pass.
    """

    def __init__(self, gain: str, inputs: str, **convolutions: tuple[int, int]) -> None:
        super().__init__()
        self.gain_name, self.inputs = gain, inputs
        for name, channels in convolutions.items():
            setattr(self, name, nn.Conv2d(*channels, 1, bias=False))
        setattr(self, gain, nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        gain = getattr(self, self.gain_name)
        maps = [getattr(self, name)(x).flatten(2).to(gain.dtype) for name in self.inputs]
        with autocast(x.device.type, enabled=False):
            p, wide = self.v(self.mix(*maps).unflatten(2, x.shape[2:])), x.to(gain.dtype)
            self.ratio = p.detach().norm() / wide.detach().norm().clamp_min(1e-12)
            return (gain * p + wide).to(x.dtype)


class NonLocal(Gated):
    """The non-local block, SAGAN's self-attention: z_j = sum over i of a_ji h(x_i)."""

    def __init__(self, channels: int, args: Args) -> None:
        down = channels, channels // args.gca_k
        super().__init__("gamma", "fgh", f=down, g=down, h=down, v=down[::-1])

    def mix(self, f: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return h @ edge_weights(f, g).transpose(1, 2)


class GCA(Gated):
    """Graph convolution over the pixels of a map, its edges from self-attention (the paper's own).

    With the n = H W pixels as nodes, x as C x n, c = C / k: Y = A^ J Theta, Z = M Y,
    o = alpha W_v Z + x, where M = W_m x and

        variant     J                              Theta
        nodes       (W_j x)^T, W_j: C -> n         n x n
        bottleneck  (W_j x)^T, W_j: C -> c         c x n
        gcn         (W_j x)^T, W_j: C -> c         c x c, and Z = W_m Y^T, W_m: c -> C

    Z = M Y is (M A^ J) Theta: the input enters by a sum over all pixels, and column q of Theta says
    what pixel q makes of it. With `--gca-y-transpose`, Z = M Theta^T (A^ J)^T, pixel q takes what
    its own row of A^ gathers, as in attention. Theta, but for gcn's, has the size of the map, so
    the block takes maps of `size` only.
    """

    def __init__(self, channels: int, size: tuple[int, int], args: Args) -> None:
        n, c = math.prod(size), channels // args.gca_k
        j, theta, m, inputs = {  # outputs of W_j and Theta, inputs of W_m
            "nodes": (n, n, channels, "fgjm"),
            "bottleneck": (c, n, channels, "fgjm"),
            "gcn": (c, c, c, "fgj"),
        }[args.gca_variant]
        convolutions = {"f": (channels, c), "g": (channels, c), "j": (channels, j)}
        super().__init__("alpha", inputs, **convolutions, m=(m, channels), v=(channels, channels))
        self.theta = nn.Linear(j, theta, bias=False)  # x -> x Theta; its weight is Theta^T
        nn.init.xavier_uniform_(self.theta.weight)
        self.size, self.variant, self.binarize = size, args.gca_variant, args.gca_binarize
        self.y_transpose = args.gca_y_transpose or self.variant == "gcn"

    def mix(self, f: Tensor, g: Tensor, j: Tensor, m: Tensor | None = None) -> Tensor:
        """Return Z = M Y or M Y^T, (N, C, n), of F and G (N, c, n), J^T (N, d, n), M (N, C, n)."""
        a = normalize(edge_weights(f, g, self.binarize))
        m = self.m.weight.flatten(1) if m is None else m  # gcn: Z = W_m Y^T
        if self.variant == "gcn" or math.prod(self.size) <= self.v.in_channels:
            y = self.theta(a @ j.transpose(1, 2))
            return m @ (y.transpose(1, 2) if self.y_transpose else y)
        # From M on where pixels outnumber channels: no product of two n x n matrices.
        if self.y_transpose:
            return m @ self.theta.weight @ j @ a.transpose(1, 2)
        return self.theta(m @ a @ j.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.variant != "gcn" and x.shape[2:] != self.size:
            got = tuple(x.shape[2:])
            raise ValueError(f"GCA was built for maps of {self.size}, got {got}; gcn takes any")
        return super().forward(x)


def start_weights(args: Args, net: nn.Module) -> None:
    """Weights at the start: N(0, 0.02) in DCGAN; in SAGAN Xavier, then spectral norm on all layers.

    In this order: what is written to a weight under spectral norm is lost. Theta keeps its
    Xavier, and so do all layers of gcn: four of them at 0.02 would leave p at under 1 % of x.
    """
    sagan, gcn = args.model == "sagan", (args.block, args.gca_variant) == ("gca", "gcn")
    for layer in list(net.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            if sagan or (gcn and layer.kernel_size == (1, 1)):  # only blocks have 1x1
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=0.02)
        elif hasattr(layer, "running_mean") and not sagan:  # batch norm
            nn.init.normal_(layer.weight, 1.0, 0.02)
        sn(layer, sagan and isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)))


# ---- 4. Networks ---------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


def make_block(args: Args, net: str, channels: int, size: tuple[int, int]) -> list[nn.Module]:
    """Return the block of net "g" or "d" at its map of `size`, if it has one."""
    if args.block == "none" or args.block_in not in ("both", net):
        return []
    return [NonLocal(channels, args) if args.block == "nl" else GCA(channels, size, args)]


class Generator(nn.Sequential):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1].

    DCGAN's; SAGAN's has biases and spectral norm. The block follows the activation at 8x8.
    """

    def __init__(self, args: Args) -> None:
        channels, bias = args.z_dim, args.model == "sagan"
        layers = [nn.Unflatten(1, (channels, 1, 1))]
        for i, out in enumerate(widths(args, args.g_ch)):
            stride, padding = (2, 1) if i else (1, 0)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=bias)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            layers += make_block(args, "g", out, (8, 8)) if i == 1 else []
            channels = out
        super().__init__(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=bias), nn.Tanh())
        start_weights(args, self)


class Discriminator(nn.Sequential):
    """Images (N, 3, img_size, img_size) -> logits (N,): DCGAN's without its sigmoid.

    SAGAN's has biases, spectral norm and no batch norm. The block follows the activation at 8x8.
    """

    def __init__(self, args: Args) -> None:
        channels, layers, sagan = 3, [], args.model == "sagan"
        deepest, eighth, *_ = widths(args, args.d_ch)
        for out in reversed(widths(args, args.d_ch)):
            norm = [] if sagan or channels == 3 else [nn.BatchNorm2d(out)]
            conv = nn.Conv2d(channels, out, 4, 2, 1, bias=sagan)
            layers += [conv, *norm, nn.LeakyReLU(0.1 if sagan else 0.2)]
            layers += make_block(args, "d", out, (8, 8)) if out == eighth else []
            channels = out
        super().__init__(*layers, nn.Conv2d(deepest, 1, 4, bias=sagan), nn.Flatten(0))
        start_weights(args, self)


def conv_layer(inputs: int, outputs: int) -> nn.Sequential:
    """ConSinGAN's layer: a 3x3 convolution without padding, LeakyReLU 0.05."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3), nn.LeakyReLU(0.05))


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return F.interpolate(x, size, mode="bicubic", align_corners=True) of maps (N, C, H, W).

    As two products of matrices, channels last: 1.5 (large maps) to 13 times as fast on a CPU, and
    bit-reproducible on CUDA, where that function's gradient comes by atomic additions.
    """
    matrices = []  # (new, old) each
    for old, new in zip(x.shape[2:], size):
        eye = torch.eye(old, dtype=x.dtype, device=x.device)[None, None]
        matrices.append(F.interpolate(eye, (new, old), mode="bicubic", align_corners=True)[0, 0])
    h, w = matrices
    y = (h @ x.permute(0, 2, 3, 1).flatten(2)).unflatten(2, (x.shape[3], x.shape[1]))
    return (w @ y).permute(0, 3, 1, 2)


class PyramidGenerator(nn.Module):
    """ConSinGAN's generator: noise of the stages 0 to d -> images (N, 3, h_d, w_d) in [-1, 1].

    One layer to features; stages that each refine the upsampled features of the one before, plus
    noise; one layer to colours. The block is outside of the stages: a copy of it would not fit the
    next size. Buffers hold what sampling needs: the photograph at every stage (real0, ...), the
    noise z* that reconstructs it (z0, ...), and the amplitudes of the noise.
    """

    def __init__(self, args: Args, pyramid: list[Tensor]) -> None:
        super().__init__()
        self.channels = c = args.g_ch
        self.head = conv_layer(3, c)
        self.body = nn.ModuleList([nn.Sequential(*(conv_layer(c, c) for _ in range(3)))])
        self.tail = nn.Sequential(nn.Conv2d(c, 3, 3), nn.Tanh())
        start_weights(args, self)
        # Last: a run with a block starts from the weights of one without.
        self.block = nn.Sequential(*make_block(args, "g", c, tuple(pyramid[0].shape[2:])))
        start_weights(args, self.block)
        for i, real in enumerate(pyramid):
            self.register_buffer(f"real{i}", real)
        self.register_buffer("z0", pyramid[0].clone())
        self.register_buffer("amps", torch.tensor([1.0] + [0.0] * (len(pyramid) - 1)))

    @torch.no_grad()
    def grow(self, sampler: Callable[..., Tensor]) -> None:
        """Append a copy of the last stage; draw its z*; its amplitude is 0.1 of z*'s RMS error."""
        d = len(self.body)
        self.body.append(copy.deepcopy(self.body[-1]))
        self.register_buffer(f"z{d}", self.noise(sampler)[d])
        error = F.mse_loss(self(self.stack("z")), self.stack("real")[d])  # amplitude 0 yet
        self.amps[d] = 0.1 * error.sqrt()

    def stack(self, name: str) -> list[Tensor]:
        """Return the buffers "real" or "z" of the present stages."""
        return [getattr(self, f"{name}{i}") for i in range(len(self.body))]

    def noise(self, sampler: Callable[..., Tensor], scale: tuple = (1.0, 1.0)) -> list[Tensor]:
        """Return the noise of one image of `scale` times the sides, by sampler(1, h, w, C).

        RGB at stage 0; later features, three pixels wider on all sides: what a stage cuts off.
        """
        sides = [real.shape[2:] for real in self.stack("real")]
        sides = [(int(h * scale[0]), int(w * scale[1])) for h, w in sides]
        shapes = [(*sides[0], 3), *((h + 6, w + 6, self.channels) for h, w in sides[1:])]
        return [sampler(1, *shape).permute(0, 3, 1, 2) for shape in shapes]

    def forward(self, noise: list[Tensor]) -> Tensor:
        x = self.head(F.pad(noise[0], [1] * 4))
        x = resize_bicubic(x, (x.shape[2] + 2, x.shape[3] + 2))
        y = self.block(self.body[0](F.pad(x, [2] * 4)))
        for body, z, amp in zip(self.body[1:], noise[1:], self.amps[1:]):
            h, w = z.shape[2:]
            y = body(resize_bicubic(y, (h, w)) + amp * z) + resize_bicubic(y, (h - 6, w - 6))
        return self.tail(F.pad(y, [1] * 4))

    def groups(self, args: Args) -> list[dict[str, Any]]:
        """Return Adam's parameter groups; a part `train_depth` stages old or older is frozen.

        The learning rate falls by `lr_scale` with each stage that a part is older than the newest.
        """
        d = len(self.body) - 1
        ages = [*zip(self.body, range(d, -1, -1)), (self.tail, 0), (self.head, d), (self.block, d)]
        for part, age in ages:
            part.requires_grad_(age < args.train_depth)
        groups = [([p for p in part.parameters() if p.requires_grad], age) for part, age in ages]
        return [{"params": p, "lr": args.g_lr * args.lr_scale**age} for p, age in groups if p]


class PatchDiscriminator(nn.Sequential):
    """ConSinGAN's critic: images (N, 3, H, W) -> scores of 11x11 patches (N, 1, H - 10, W - 10)."""

    def __init__(self, args: Args) -> None:
        layers = [conv_layer(3, args.d_ch), *(conv_layer(args.d_ch, args.d_ch) for _ in range(3))]
        super().__init__(*layers, nn.Conv2d(args.d_ch, 1, 3))
        start_weights(args, self)


def block_terms(**nets: nn.Module) -> dict[str, Tensor]:
    """Return for the log the gain of each block and rms(p) / rms(x) of its last forward pass."""
    found = [(key, m) for key, net in nets.items() for m in net.modules() if isinstance(m, Gated)]
    gains = {f"block/{m.gain_name}_{key}": getattr(m, m.gain_name) for key, m in found}
    return gains | {f"block/ratio_{key}": m.ratio for key, m in found}


# ---- 5. Losses -----------------------------------------------------------------------------------
# (D real, D fake, G) losses as functions of the logit s; their means over the batch are minimised.
ADVERSARIAL = {
    "bce": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
}


def pixel_penalty(D: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """ConSinGAN's penalty: the mean over pixels of (||grad D(x^)||_2 - 1)^2, D summed over patches.

    x^ = eps x + (1 - eps) x~, eps (1, 1, 1, 1). The norm is over a pixel's colours, not the image.
    """
    mixed = (eps * real + (1 - eps) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(D(mixed).sum(), mixed, create_graph=True)
    return (grad.norm(dim=1) - 1).square().mean()


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
        labels = [name.rpartition("/")[0].split("/")[0] for name in names]
        classes = {name: i for i, name in enumerate(sorted(set(labels)))}
        print(f"{len(files)} images, {len(classes)} classes ({', '.join(classes)[:80]})")
        print("photographs are turned upright, transparent parts become white")
        stats = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, map(os.stat, files))]
        return lambda i: open_image(files[i]), [classes[label] for label in labels], stats
    package = "lmdb" if args.dataset == "lsun-church" else "gdown"
    try:
        if package == "lmdb":  # torchvision's reader would write a file into the working folder
            import lmdb

            path = str(root / "church_outdoor_train_lmdb")
            database = lmdb.open(path, readonly=True, lock=False, readahead=False)
            keys = list(database.begin().cursor().iternext(values=False))
            get = lambda key: io.BytesIO(database.begin().get(key))  # threads cannot share begin()
            return lambda i: open_image(get(keys[i])), [0] * len(keys), []
        source = datasets.CelebA(root, "all", [], download=True)
    except Exception as error:  # gdown and lmdb have their own
        hint = f"pip install {package}, or take the pictures alone by --dataset folder"
        raise OSError(f"--dataset {args.dataset} must be in {root}: {error}; {hint}") from error
    if args.dataset == "celeba":
        return lambda i: source[i][0], [0] * len(source), []
    return lambda i: TF.resize(source[i][0], [args.img_size] * 2), [0] * len(source), []


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


def pyramid_shapes(args: Args, height: int, width: int) -> list[tuple[int, int]]:
    """Return sizes (H, W) of the stages of a photograph of height x width, the smallest first.

    All but the last are r^e of it, rounded up; e = (S - 1) ln(S - i) / ln(S) + 1 for stage i of
    S + 1 gives more small stages than SinGAN's S - i.
    """
    if (long := max(height, width)) > args.max_size:
        height, width = (-(-side * args.max_size // long) for side in (height, width))
    short, last = min(height, width), args.stages - 1
    if short <= args.min_size:
        side = f"{short}, the short side at {height}x{width} of --max-size {args.max_size}"
        raise ValueError(f"--min-size must be below {side}, got {args.min_size}")
    ratio, sizes = (args.min_size / short) ** (1 / max(1, last)), []
    for i in range(last):
        exponent = (last - 1) / (math.log(last) or 1) * math.log(last - i) + 1
        sizes.append(tuple(math.ceil(side * ratio**exponent) for side in (height, width)))
    return [*sizes, (height, width)]


def load_pyramid(args: Args) -> list[Tensor]:
    """Return the photograph at every stage's size, (1, 3, H, W) in [-1, 1], from the last's."""
    photo = open_image(Path(args.image).expanduser())
    sizes = pyramid_shapes(args, photo.height, photo.width)
    sized = args.block == "gca" and args.gca_variant != "gcn"
    if sized and args.gca_variant == "nodes" and (n := math.prod(sizes[0])) > 4096:
        raise ValueError(f"--gca-variant must be bottleneck or gcn: Theta would be {n}x{n}")
    if sized and not args.gca_y_transpose:
        print("warning: Z = M Y copies one photograph; --gca-y-transpose does not", file=sys.stderr)
    full = photo.resize(sizes[-1][::-1], Image.BICUBIC)
    levels = [TF.pil_to_tensor(full.resize(size[::-1], Image.BICUBIC)) for size in sizes]
    return [level[None].float() / 127.5 - 1 for level in levels]


# ---- 7. Run --------------------------------------------------------------------------------------
STOP: list[int] = []  # the signal that ends the training after the present step


def row_name(args: Args) -> str:
    """Return the name of a row: the model, the block and what sets it apart, the photograph."""
    gca = "gca_k", "block_in", "gca_variant", "gca_y_transpose", "gca_binarize"
    flags = {"none": (), "nl": gca[:2], "gca": gca}[args.block] + ("g_ch", "d_ch")
    changed = [flag for flag in flags if getattr(args, flag) != getattr(Args, flag)]
    parts = [f"{flag.removeprefix('gca_')}-{getattr(args, flag)}" for flag in changed]
    parts += [Path(args.image).stem] if args.image else []
    return "-".join([args.model, args.block, *parts])


# differs from giu_gan.py: the default name is that of the row
def run_folder(args: Args) -> Path:
    """Return the folder of the run with these flags."""
    name = f"{Path(__file__).stem}__{args.dataset}__{args.exp_name or row_name(args)}__s{args.seed}"
    return Path(args.out_dir).expanduser() / name


# differs from giu_gan.py: mode sample takes its flags from the first of --runs
def find_checkpoint(args: Args) -> Path:
    """Return --checkpoint or the run's best.pt or checkpoint.pt; training prefers the latter."""
    if args.mode == "sample" and args.runs:
        return Path(args.runs[0], "checkpoint.pt").expanduser()
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


def write_scores(folder: Path, step: int, scores: dict, inception: nn.Module) -> None:
    """Write scores, their step and Inception's protocol to evaluate.json of a run's folder."""
    about = {"step": step, **inception.protocol}
    (folder / "evaluate.json").write_text(json.dumps(about | scores, indent=2))


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: print the scores of the last step and write them to evaluate.json."""
    device = setup(args)[0]
    path = Path(args.checkpoint or run_folder(args) / "checkpoint.pt").expanduser()
    _, G, step = load_nets(args, path, device)
    if args.photo:
        inception = fid.load_sifid_trunk(args.fid_weights, device, args.sifid_dims)
        scores = photo_scores(args, G, inception)
    else:
        inception = fid.load_inception(args.fid_weights, device)
        images, _, file = load_images(args, device)
        scores = score(args, inception, G, images, file)
    write_scores(path.parent, step, scores, inception)
    return scores


ROWS = ("dcgan-none", "dcgan-nl", "dcgan-gca", "sagan-nl", "sagan-gca")
PUBLISHED = {  # Table 1
    "CelebA, paper": (33.39, 34.56, 25.75, 54.75, 37.39),
    "LSUN church, paper": (33.59, 54.36, 22.15, 36.56, 28.74),
}


def table(runs: list[Args], paths: list[Path]) -> str:
    """Return Table 1 in Markdown: published FIDs, then those of runs, their seeds together."""
    found = {(ROWS[i], name): [fids[i]] for name, fids in PUBLISHED.items() for i in range(5)}
    for args, path in zip(runs, paths):
        usual, file = {"total_steps": Args.total_steps}, path.with_name("evaluate.json")
        for (flag, value), row in DEFAULTS.items():
            usual |= row if getattr(args, flag) == value else {}
        about = json.loads(file.read_text()) if file.exists() else {"step": usual["total_steps"]}
        label = ", random features" if about.get("weights") == "random" else ""
        label += f", {about['n_fake']} images" if "n_fake" in about else ""
        step = "" if about["step"] == usual["total_steps"] else f", step {about['step']}"
        cell = args.exp_name or row_name(args), f"{args.dataset}{step}{label}"
        found.setdefault(cell, []).extend([about["fid"]] if "fid" in about else [])
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*found))
    lines = [["FID", *columns], ["---"] * (1 + len(columns))]
    for row in rows:
        lines.append([row])
        for fids in (found.get((row, column), []) for column in columns):
            spread = f" ± {np.std(fids, ddof=1):.2f} ({len(fids)})" if len(fids) > 1 else ""
            lines[-1].append(f"{np.mean(fids):.2f}{spread}" if fids else "not run")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [0, 1] half covered by maps (N, C, h, w) in colours ("jet").

    Of a map the mean over the channels, stretched to [0, 1].
    """
    mean = maps.mean(dim=1, keepdim=True)
    heat = mean - mean.amin(dim=(2, 3), keepdim=True)
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    heat = F.interpolate(heat, images.shape[2:], mode="bicubic").clamp(0, 1)
    jet = torch.cat([1.5 - (4 * heat - peak).abs() for peak in (3, 2, 1)], dim=1).clamp(0, 1)
    return images / 2 + jet / 2


@torch.no_grad()
def compare_models(runs: list[Args], paths: list[Path], device: torch.device) -> None:
    """Set runs side by side: Table 1, samples of shared noise (Figure 4), heat maps (Figure 5)."""
    target, text = paths[0].parent, table(runs, paths)
    (target / "table1.md").write_text(text + "\n")
    print(text)
    loaded = [load_nets(args, path, device) for args, path in zip(runs, paths)]
    rows = [generate(G, eval_noise(args, 8)) for args, (_, G, _) in zip(runs, loaded)]
    save_image(torch.cat(rows) / 255, target / "samples.png", nrow=8)
    try:
        real = load_images(runs[0], device)[0][:8].to(device) / 255
    except (OSError, ValueError) as error:
        return print(f"table1.md and samples.png in {target}; no heatmaps.png: {error}")
    columns = [real]
    for nets, _, _ in loaded:
        x, maps = real * 2 - 1, []
        for layer in nets["D"].eval():
            x = layer(x)
            if x.shape[2:] == (8, 8) and isinstance(layer, (nn.LeakyReLU, Gated)):
                maps.insert(0, x)  # o and x of a block, or x alone
        maps += [maps[0] - maps[1]] if len(maps) == 2 else []
        columns += [overlay(real, x) for x in maps]
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    save_image(cells, target / "heatmaps.png", nrow=len(columns))
    print(f"table1.md, samples.png, heatmaps.png (images; o, x, o - x of each run) in {target}")


def sample(args: Args) -> None:
    """Mode sample: images of a checkpoint's G; with --runs the paper's figures of several runs."""
    device, path = setup(args)[0], find_checkpoint(args)
    if args.runs:
        paths = [Path(run, "checkpoint.pt").expanduser() for run in args.runs]
        runs = [Args(**load(path, {})["args"]) for path in paths]
        runs[0] = replace(runs[0], mode=args.mode, data_dir=args.data_dir, cache_dir=args.cache_dir)
        if len({run.photo for run in runs}) > 1:
            raise ValueError("--runs must be all of ConSinGAN or all of other models")
        return (compare_photos if runs[0].photo else compare_models)(runs, paths, device)
    _, G, step = load_nets(args, path, device)
    n = args.num_samples
    images = photo_samples(G, n, args.scale) if args.photo else generate(G, eval_noise(args, n))
    size = f"-{images.shape[2]}x{images.shape[3]}" if args.scale != (1, 1) else ""
    folder, images = path.parent / f"generated/{step}{size}", images / 255
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_image(image, folder / f"{i:05d}.png")
    grid = path.with_name(f"generated-{folder.name}.png")  # not among what fid.py reads
    save_image(images, grid, nrow=math.isqrt(len(images)))
    print(f"{len(images)} images in {folder}, a grid in {grid}")


def build_pyramid(args: Args, pyramid: list[Tensor], step: int, device: torch.device) -> dict:
    """Return ConSinGAN's networks as they are after `step` steps, with the weights of the start."""
    nets = {"D": PatchDiscriminator(args), "G": PyramidGenerator(args, pyramid)}
    for _ in range(max(0, step - 1) // args.niter):
        nets["G"].grow(torch.zeros)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def load_nets(args: Args, path: Path, device: torch.device) -> tuple[dict, nn.Module, int]:
    """Return the networks of a checkpoint, the generator to show, and the step."""
    if args.photo:
        state = load(path, {})
        pyramid = [state["G"][f"real{i}"] for i in range(len(state["G"]["amps"]))]
        nets = build_pyramid(args, pyramid, state["step"], device)
        G = nets["G"]
    else:
        nets, G = build(args, device)
    return nets, G, load(path, nets)["step"]


@torch.no_grad()
def photo_samples(G: nn.Module, count: int, scale: tuple[float, float] = (1, 1)) -> Tensor:
    """Return uint8 samples (count, 3, H, W); the noise of sample i depends on i and the sizes."""
    samples = []
    for i in range(count):
        noise = partial(torch.randn, generator=torch.Generator().manual_seed(seed_of(0, 4, i)))
        samples.append(to_pixels(G([z.to(G.amps.device) for z in G.noise(noise, scale)])))
    return torch.cat(samples)


def to_pixels(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] as uint8, on the CPU."""
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def photo_scores(args: Args, G: nn.Module, trunk: nn.Module | None = None) -> dict[str, float]:
    """Return diversity, block_rms and, with Inception's first layers, SIFID of `sifid_num` samples.

    Diversity is SinGAN's: the deviation of a pixel over the samples, averaged, over that of the
    photograph's pixels; 0 for a copy. block_rms is the change of the samples, of 255, when the gain
    of the block is set to 0: its share in the image.
    """
    real, fakes = to_pixels(G.stack("real")[-1])[0], photo_samples(G, args.sifid_num)
    block, G.block = G.block, nn.Identity()
    without = photo_samples(G, args.sifid_num)
    G.block = block
    scores = {
        "diversity": (fakes.float().std(0).mean() / real.float().std()).item(),
        "block_rms": (fakes.float() - without).square().mean().sqrt().item(),
    }
    if trunk:
        found = fid.sifid(trunk, real, fakes, args.sifid_dims)
        scores |= {"sifid": found["mean"], "sifid_std": found["std"], "dims": args.sifid_dims}
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return scores


@torch.no_grad()
def compare_photos(runs: list[Args], paths: list[Path], device: torch.device) -> None:
    """Set runs of one photograph side by side, smaller images enlarged pixel by pixel.

    pairs.png: the photograph and samples of shared noise (Figure 6), their scores printed.
    stages.png: a sample after each finished stage, then the photograph (Figure 7).
    """
    pairs, strips = [], []
    for args, path in zip(runs, paths):
        _, G, step = load_nets(args, path, device)
        real, file = to_pixels(G.stack("real")[-1]), path.with_name("evaluate.json")
        if pairs and real.shape != pairs[0].shape:
            raise ValueError(f"--runs must be of one photograph and stage, got {path.parent}")
        pairs += [real, photo_samples(G, 4)]
        stages = [path.with_name(f"stage{i}.pt") for i in range(step // args.niter)]
        images = [photo_samples(load_nets(args, stage, device)[1], 1) for stage in stages]
        strips.append(torch.cat([*(F.interpolate(x, real.shape[2:]) for x in images), real]))
        print(f"{path.parent}: ", end="")
        photo_scores(args, G)
        about = json.loads(file.read_text()) if file.exists() else {}
        if about.get("step") == step:
            found = f"{about['sifid']:.4g} ± {about['sifid_std']:.2g}, {about['dims']} features"
            print(f"    SIFID {found}, {about['weights']}")
        else:
            print("    no SIFID of this step: run --mode evaluate first")
    target, strips = paths[0].parent, pad_sequence(strips, batch_first=True)
    save_image(torch.cat(pairs) / 255, target / "pairs.png", nrow=5)
    save_image(strips.flatten(0, 1) / 255, target / "stages.png", nrow=strips.shape[1])
    print(f"pairs.png and stages.png, a row for each run, in {target}")


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
    g_opt, d_opt = adam(G.parameters(), args.g_lr), adam(D.parameters(), args.d_lr)
    run = Run(args, file.parent.name, nets | {"g_opt": g_opt, "d_opt": d_opt, "scaler": scaler})
    data = batches(args, images, labels, device, run.step * args.n_critic)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    d_real, d_fake, g_fake = ADVERSARIAL[args.loss]
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        for _ in range(args.n_critic):
            real, _ = next(data)
            with amp:
                with torch.no_grad():
                    fake = G(draw(torch.randn, noise, n, args.z_dim)).float()
                real_logits, fake_logits = D(real).float(), D(fake).float()
            d_loss = d_real(real_logits).mean() + d_fake(fake_logits).mean()
            update(d_opt, D, d_loss, scaler)
        with amp:
            g_loss = g_fake(D(G(draw(torch.randn, noise, n, args.z_dim))).float()).mean()
        update(g_opt, G, g_loss, scaler)
        if args.ema_decay:
            nets["ema"].update_parameters(G)
        run.log({
            "loss/d": d_loss, "loss/g": g_loss, "logit/real": real_logits.mean(),
            "logit/fake": fake_logits.mean(), **block_terms(g=G, d=D),
        })  # fmt: skip
        if run.due(args.sample_every):
            grid = generate(shown, eval_noise(args, args.num_samples)) / 255
            save_image(grid, run.folder / f"samples/{run.step:07d}.png", nrow=math.isqrt(len(grid)))
        if run.due(args.eval_every):
            scores = score(args, inception, shown, images, file)
            run.write({f"metric/{name}": value for name, value in scores.items()})
            write_scores(run.folder, run.step, scores, inception)
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


def estimate(args: Args, D: nn.Module, photo: list[Tensor]) -> timedelta:
    """Return about how long the training takes: a step is about 8 gradients of D's penalty."""
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        for real in photo:
            penalty = pixel_penalty(D, real, -real, torch.tensor(0.5))
            torch.autograd.grad(penalty, D[0][0].weight)[0].sum().item()
    return timedelta(seconds=round(8 * args.niter * (time.perf_counter() - start)))


def train_consingan(args: Args) -> dict[str, float]:
    """Train ConSinGAN on one photograph, from the start or its checkpoint; return the last scores.

    A stage ends with samples, `stage<d>.pt` and the scores that need no Inception network.
    """
    args, path = replace(args, total_steps=args.stages * args.niter), find_checkpoint(args)
    device, _, scaler = setup(args)
    photo = load_pyramid(args)
    data = f"photograph-{zlib.crc32(to_pixels(photo[-1]).numpy().tobytes()):08x}"
    goes_on = (args.resume or args.checkpoint) and path.exists()
    saved = load(path, {}) if goes_on else {"step": 0, "data": data}
    if saved["data"] != data:
        raise ValueError(f"--image must be the photograph of {path}, got {args.image}")
    torch.manual_seed(args.seed)
    nets = build_pyramid(args, photo, saved["step"], device)
    G, D = nets["G"], nets["D"]
    adam = partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)

    def optimizers() -> dict[str, torch.optim.Optimizer]:  # new ones for each stage
        return {"g_opt": adam(G.groups(args), args.g_lr), "d_opt": adam(D.parameters(), args.d_lr)}

    sizes = ", ".join(f"{level.shape[2]}x{level.shape[3]}" for level in photo)
    total = estimate(args, D, [level.to(device) for level in photo])
    print(f"{args.image}: {args.niter} steps at each of {sizes}; about {total} in all")
    run, noise, scores = Run(args, data, nets | optimizers()), torch.Generator(device), {}
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        stage, inner = divmod(run.step, args.niter)
        if stage == len(G.body):
            G.grow(partial(draw, torch.randn, noise))
            run.parts |= optimizers()
        g_opt, d_opt = run.parts["g_opt"], run.parts["d_opt"]
        if inner == math.ceil(0.8 * args.niter):
            for group in g_opt.param_groups + d_opt.param_groups:
                group["lr"] *= 0.1
        real, fixed = G.stack("real")[-1], G.stack("z")
        z = G.noise(partial(draw, torch.randn, noise))
        fake, rec = G([torch.cat(pair) for pair in zip(z, fixed)]).split(1)
        both = torch.cat([real, fake.detach()])
        for _ in range(args.n_critic):
            real_logits, fake_logits = D(both).split(1)
            eps = draw(torch.rand, noise, 1, 1, 1, 1)
            penalty = pixel_penalty(D, real, fake.detach(), eps)
            d_loss = fake_logits.mean() - real_logits.mean() + args.lambda_gp * penalty
            update(d_opt, D, d_loss, scaler)
        rec_loss = F.mse_loss(rec, real)
        g_loss = args.lambda_rec * rec_loss - D(fake).mean()
        update(g_opt, G, g_loss, scaler)
        for _ in range(2):  # three steps on the same gradient, as the released code
            g_opt.step()
        run.log({
            "loss/d": d_loss, "loss/penalty": penalty, "loss/g": g_loss, "loss/rec": rec_loss,
            "logit/real": real_logits.mean(), "logit/fake": fake_logits.mean(), **block_terms(g=G),
        })  # fmt: skip
        ended = run.step % args.niter == 0
        if ended or run.due(args.sample_every):
            with torch.no_grad():
                pair = to_pixels(torch.cat([real, G(fixed)]))  # the photograph, reconstructed
            grid = torch.cat([pair, photo_samples(G, max(1, args.num_samples - 2))]) / 255
            save_image(grid, run.folder / f"samples/{run.step:07d}.png", nrow=math.isqrt(len(grid)))
        if ended:
            scores = photo_scores(args, G)
            run.write({f"metric/{name}": value for name, value in scores.items()})
            run.save(f"stage{stage}.pt")
        if ended or run.due(args.save_every):
            run.save("checkpoint.pt")
    if STOP:
        run.save("checkpoint.pt")
    sized = " --scale 1 2" if args.block != "gca" or args.gca_variant == "gcn" else ""
    path = shlex.quote(str(run.folder / "checkpoint.pt"))
    more = f"--mode sample --checkpoint {path} --num-samples 50{sized}"
    print(f"{run.folder}: step {run.step}; more samples: python {sys.argv[0]} {more}")
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
            cpu, total = torch.device("cpu"), args.stages * args.niter
            photo = build_pyramid(args, load_pyramid(args), total, cpu) if args.photo else {}
            nets = photo or build(args, cpu)[0]
            params = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
            return print(json.dumps({"args": asdict(args), "params": params}))
        # torchrun kills what has not ended 30 s after a signal: it relies on --save-every.
        if args.mode == "train" and WORLD == 1:
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        training = train_consingan if args.photo else train
        {"train": training, "evaluate": evaluate, "sample": sample}[args.mode](args)
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
