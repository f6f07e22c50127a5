# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9", "tensorboard"]
# ///
"""Self-Attention in Deep Convolutional GANs, on Stanford Dogs (Levkovich, Avraham, Bar, Bachar).

A spectrally normalised DCGAN whose self-attention is switched off in G, in D or in both: what does
attention do for structure, and does FID see it? FID and the loss of D, one after the other, say
when to stop. Unconditional, 64x64, one crop for each box that marks a dog.

    python sagan_dogs.py --attention full                       # or none, no-g, no-d: four runs
    python sagan_dogs.py --mode figures                         # compares the four runs
    python sagan_dogs.py --dataset folder --data-dir photos     # any photographs

Differences from the paper
 1. It prints no widths, optimiser, batch size, rates or place of the attention: these are the
    common SAGAN code's, with attention on the last two maps of each net (--attn-g, --attn-d),
    but for spectral norm on every layer (--sn backbone: as there) and Xavier weights.
 2. The objective that was run is not stated. Default: Eqs 1-3 with its non-saturating G step; the
    hinge loss of SAGAN is --loss hinge.
 3. The rows of A are softmax over the keys, so the output is V A^T; the text omits the transpose.
 4. "Full attention" has 410,562 parameters more in D and 25,842 more in G than none: the
    comparison is not matched in parameters. The four nets are the same function at step 0.
 5. The stopping rule in numbers is ours: smoothing, tolerances and patience are not in the text.
    Lower is better for both signals. It reads D's loss from the log's interval means.
 6. Boxes: all 22,126 are cropped; the paper counts 20,580, an image each (--boxes first). The
    stretched aspect ratio follows its "crop, then resize"; --aspect square keeps proportions.
 7. It prints no FID at all: only orderings and plateaus can be compared.

Evidence: see README.md, "The papers, row by row". The paper's 30,000 steps have not been run.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports
# --------------------------------------------------------------------------------------------------
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
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import gaussian_blur

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
    dataset: Literal["stanford-dogs", "folder", "shapes"] = "stanford-dogs"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    data_dir: str = "data"
    """folder of the data set and of the cache of its decoded images"""
    img_size: int = 64
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
    total_steps: int = 30_000  # the longest run shown
    """generator updates to train for"""
    batch_size: int = 64
    """images per update, shared out over the processes"""
    n_critic: int = 1
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
    eval_every: int = 500
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
    num_samples: int = 64
    """images of a sample grid and of mode sample"""
    # Paper
    attention: Literal["full", "none", "no-g", "no-d"] = "full"
    """self-attention in both nets, in none, not in G ("no generator"), not in D"""
    attn_g: tuple[int, ...] = ()
    """sides of G's maps with attention, in pixels; none given: the two largest (16 32)"""
    attn_d: tuple[int, ...] = (8, 4)
    """sides of D's maps with attention, in pixels"""
    attn_block: Literal["full", "pooled"] = "full"
    """attention to all positions, or SAGAN's to 2x2 max-pooled keys and values"""
    loss: Literal["ns", "minimax", "hinge"] = "ns"  # Eqs. 1-3, G non-saturating
    """adversarial loss"""
    sn: Literal["all", "backbone", "none"] = "all"
    """spectral norm on every convolution; on all but attention and outputs; on none"""
    boxes: Literal["all", "first"] = "all"
    """crops of an image of Stanford Dogs: one for each of its boxes, or for the first"""
    aspect: Literal["stretch", "square"] = "stretch"
    """shape of the crops: the box stretched to a square, or grown to one first"""
    milestones: tuple[int, ...] = (500, 2_500, 5_000, 10_000, 15_000, 20_000, 24_000, 30_000)
    """steps whose grid and checkpoint are kept; the paper's"""
    early_stop: bool = False
    """stop where the two-phase rule says so, else only report it"""
    query: tuple[tuple[int, int], ...] = ()
    """y x of the pixels whose attention is drawn; none given: eyes, nose, mouth, background"""

    def __post_init__(self) -> None:
        self.exp_name = self.exp_name or self.attention
        self.img_size, self.z_dim = self.img_size or 64, self.z_dim or 128
        self.attn_g = self.attn_g or (self.img_size // 4, self.img_size // 2)


POSITIVE = (
    "img_size", "z_dim", "g_ch", "d_ch", "total_steps", "batch_size", "n_critic", "log_every",
    "save_every", "fid_num", "fid_batch_size", "num_samples",
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
    size, dogs = args.img_size, args.dataset == "stanford-dogs"
    require(size in (32, 64, 128), "img_size", "be 32, 64 or 128", size)
    sides = [4 * 2**i for i in range(len(widths(args, args.g_ch)))]
    must = f"be among {', '.join(map(str, sides))}, the maps of {size}x{size} images"
    for flag in ("attn_g", "attn_d"):
        given = getattr(args, flag)
        require(set(given) <= set(sides), flag, must, " ".join(map(str, given)))
    usual, without = Args(img_size=size), "with" if dogs else "without"
    flags = ("crop",) if dogs else ("boxes", "aspect")
    stay(args, usual, flags, f"{without} --dataset stanford-dogs")
    off = {"full": (), "none": ("attn_g", "attn_d", "attn_block")}
    off |= {"no-g": ("attn_g",), "no-d": ("attn_d",)}
    stay(args, usual, off[args.attention], f"with --attention {args.attention}")
    require(min(args.milestones, default=1) > 0, "milestones", "be above 0", args.milestones)
    rule = args.eval_every > 0 or not args.early_stop
    require(rule, "eval_every", "be above 0 with --early-stop", args.eval_every)
    rule = not args.early_stop or args.eval_every % args.log_every == 0
    require(rule, "log_every", "divide --eval-every with --early-stop", args.log_every)


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


def xavier(layer: nn.Module, sn: bool) -> nn.Module:
    """Xavier-uniform weights and zero biases, then spectral norm if sn.

    In this order: what is written to a weight under spectral norm is lost.
    """
    nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if sn else layer


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
def widths(args: Args, base: int) -> list[int]:
    """Channels of the maps from 4x4 up: 256, 128, 64 for 32x32 images of base width 64."""
    return [base * 2**i for i in reversed(range(int(math.log2(args.img_size)) - 2))]


def attention_blocks(args: Args, net: str) -> nn.ModuleDict:
    """Attention blocks of net "g" or "d" by the side of their map, none where it is switched off.

    Their weights come from a random stream of their own, so that the rest of a net starts the same
    with and without them; as gamma is 0, all four ablations start as the same function.
    """
    sides, base = (args.attn_g, args.g_ch) if net == "g" else (args.attn_d, args.d_ch)
    off, blocks = args.attention in ("none", f"no-{net}"), nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 * args.seed + (net == "g"))
        for side in () if off else sides:
            channels = widths(args, base)[int(math.log2(side)) - 2]
            block = {"full": SelfAttention, "pooled": PooledAttention}[args.attn_block](channels)
            for conv in block.children():
                xavier(conv, args.sn == "all")
            blocks[str(side)] = block
    return blocks


class Generator(nn.Module):
    """Noise z (N, z_dim) -> images (N, 3, img_size, img_size) in [-1, 1]."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.stages, channels = nn.ModuleList(), args.z_dim
        for i, out in enumerate(widths(args, args.g_ch)):
            stride, padding = (2, 1) if i else (1, 0)
            conv = nn.ConvTranspose2d(channels, out, 4, stride, padding)
            conv = xavier(conv, args.sn != "none")
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
            channels = out
        self.attn = attention_blocks(args, "g")
        conv = nn.ConvTranspose2d(channels, 3, 4, 2, 1)
        self.output = xavier(conv, args.sn == "all")

    def forward(self, z: Tensor) -> Tensor:
        x = z[:, :, None, None]
        for stage in self.stages:
            x = stage(x)
            side = str(x.shape[2])
            x = self.attn[side](x) if side in self.attn else x
        return self.output(x).tanh()


class Discriminator(nn.Module):
    """Images (N, 3, img_size, img_size) -> logits (N,)."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.stages, channels = nn.ModuleList(), 3
        for out in reversed(widths(args, args.d_ch)):
            conv = xavier(nn.Conv2d(channels, out, 4, 2, 1), args.sn != "none")
            self.stages.append(nn.Sequential(conv, nn.LeakyReLU(0.1)))
            channels = out
        self.attn = attention_blocks(args, "d")
        self.output = xavier(nn.Conv2d(channels, 1, 4), args.sn == "all")

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
            side = str(x.shape[2])
            x = self.attn[side](x) if side in self.attn else x
        return self.output(x).flatten()


# --------------------------------------------------------------------------------------------------
# 5. Losses
# --------------------------------------------------------------------------------------------------
# Of a logit s: D's loss on a real image, D's on a generated one, G's. Means over the batch follow.
# With D(x) = sigmoid(s): softplus(-s) = -log D(x), softplus(s) = -log(1 - D(x)).
ADVERSARIAL = {
    # Eqs. 1-3, G non-saturating
    "ns": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: F.softplus(-s)),
    # Eq. 1 to the letter: G goes down log(1 - D(G(z)))
    "minimax": (lambda s: F.softplus(-s), lambda s: F.softplus(s), lambda s: -F.softplus(s)),
    "hinge": (lambda s: F.relu(1 - s), lambda s: F.relu(1 + s), lambda s: -s),
}


# --------------------------------------------------------------------------------------------------
# 6. Data
# --------------------------------------------------------------------------------------------------
DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs"
MAX_SKIPPED = 0.01  # of the images, for want of a usable annotation
Span = tuple[Path, int, int]  # file, offset, length


def read_span(span: Span) -> bytes:
    """The bytes of a file, or of a member of a tar archive."""
    path, offset, length = span
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def read_tree(root: Path, folders: list[str], archive: str) -> tuple[set[str], dict[str, Span]]:
    """Breeds and files `breed/name` of the first of `folders` that root has, else of its archive.

    Raises FileNotFoundError where there is neither, fid.UserError for a broken archive.
    """
    for folder in filter(Path.is_dir, (root / name for name in folders)):
        paths = [path for path in folder.glob("*/*") if path.is_file()]
        files = {f"{p.parent.name}/{p.name}": (p, 0, p.stat().st_size) for p in paths}
        return {path.name for path in folder.iterdir() if path.is_dir()}, files
    path, breeds, files = root / archive, set(), {}
    if not path.is_file():
        raise FileNotFoundError(f"no {', '.join(folders)} or {archive}")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                inner = PurePosixPath(member.name).parts[1:]  # without Images or Annotation
                breeds.update(inner[:1])
                if len(inner) == 2 and member.isfile():
                    files["/".join(inner)] = path, member.offset_data, member.size
    except tarfile.TarError as error:
        raise fid.UserError(f"{path} is not a complete .tar archive: {error}") from error
    return breeds, files


def read_boxes(xml: bytes) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of an annotation; ValueError says what is wrong with it.

    Its numbers are 0-based and inclusive: right and bottom are one more than xmax and ymax.
    """
    try:
        marks = ElementTree.fromstring(xml).findall("object/bndbox")
    except ElementTree.ParseError as error:
        raise ValueError("unreadable XML") from error
    if not marks:
        raise ValueError("no object")
    keys, boxes = ("xmin", "ymin", "xmax", "ymax"), []
    for mark in marks:
        try:
            left, top, right, bottom = (int(mark.findtext(key, "")) for key in keys)
        except ValueError as error:
            raise ValueError("bad numbers") from error
        if min(right, right - left, bottom, bottom - top) < 0:
            raise ValueError("empty box")
        boxes.append((left, top, right + 1, bottom + 1))
    return boxes


def cut_box(
    image: Image.Image, box: tuple[int, int, int, int], aspect: str, size: int
) -> Image.Image:
    """The part of an image in a box, clamped to the image, as a square of side `size`.

    With aspect "square" the shorter side grows about its middle first, shifted to stay inside the
    image; where the image is too small for that, its edge pixels are repeated.
    """
    spans = []
    for low, high, limit in ((box[1], box[3], image.height), (box[0], box[2], image.width)):
        spans.append((max(low, 0), min(high, limit), limit))
    side, places = max(high - low for low, high, _ in spans), []
    for low, high, limit in spans:
        if low >= high:
            raise ValueError(f"the box {box} lies outside the {image.width}x{image.height} pixels")
        if aspect == "square":
            first, last = sorted((0, limit - side))
            low = min(max((low + high - side) // 2, first), last)
            high = low + side
        places.append(np.arange(low, high).clip(0, limit - 1))
    pixels = np.asarray(image)[places[0][:, None], places[1]]
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)


class StanfordDogs(Dataset):
    """The boxes of Stanford Dogs as square crops, with the number of the breed.

    Read from images.tar and annotation.tar as they are, or from what they extract to. An image and
    its annotation belong together by their paths; an annotation's other entries are not relied on.
    """

    def __init__(self, root: Path, boxes: str, aspect: str, size: int) -> None:
        if root.name == "Images" or any(root.glob("n????????-*")):
            raise fid.UserError(f"{root} holds the breeds: --data-dir must name its parent")
        breeds, images = read_tree(root, ["images/Images", "Images"], "images.tar")
        places = ["annotations/Annotation", "annotation/Annotation", "Annotation"]
        noted, notes = read_tree(root, places, "annotation.tar")
        notes = {str(PurePosixPath(name).with_suffix("")): span for name, span in notes.items()}
        names = [PurePosixPath(name) for name in sorted(images) if "/." not in name]
        names = [name for name in names if name.suffix.lower() in fid.IMAGE_SUFFIXES]
        self.aspect, self.size, self.items, skipped = aspect, size, [], Counter()
        for name in names:
            note = notes.get(str(name.with_suffix("")))
            try:
                found = read_boxes(read_span(note)) if note else []
            except ValueError as error:
                skipped[str(error)] += 1
                continue
            skipped["no annotation"] += note is None
            found = found[:1] if boxes == "first" else found
            self.items += [(str(name), images[str(name)], box) for box in found]
        self.files = [f"{name}, box {box}" for name, _, box in self.items]
        of = [PurePosixPath(name).parts[0] for name, _, _ in self.items]
        self.classes = sorted(set(of))
        self.targets = [self.classes.index(breed) for breed in of]
        self.key = [boxes, aspect, [(name, span[2], box) for name, span, box in self.items]]
        why = ", ".join(f"{reason}: {count}" for reason, count in skipped.items() if count)
        if why:
            without = f"{root}: {skipped.total()} of {len(names)} images left out ({why})"
            if skipped.total() > MAX_SKIPPED * len(names):
                raise fid.UserError(f"{without}, more than {MAX_SKIPPED:.0%}")
            fid.warn(without)
        if empty := sorted((breeds | noted) - set(of)):
            fid.warn(f"{root}: no crops of {', '.join(empty)}")
        if len(self.classes) != 120:
            fid.warn(f"{root}: {len(self.classes)} breeds, Stanford Dogs has 120")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        _, span, box = self.items[index]
        image = fid.open_image(io.BytesIO(read_span(span)))
        return cut_box(image, box, self.aspect, self.size), self.targets[index]


SOURCES = {  # how to open each data set, and how to get it
    "stanford-dogs": (
        lambda args: StanfordDogs(Path(args.data_dir), args.boxes, args.aspect, args.img_size),
        f"put images.tar and annotation.tar of {DOGS_URL}/ there, extracted or not",
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
    "eval_every", "save_every", "num_workers", "device", "out_dir", "data_dir", "num_samples",
    "fid_batch_size", "milestones", "early_stop", "query",
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


def read_log(folder: Path, key: str) -> np.ndarray:
    """Steps and values (K, 2) of a key of log.jsonl; no rows where there are none."""
    records = fid.read_records(folder / "log.jsonl")
    rows = [(record["step"], record[key]) for record in records if key in record]
    return np.array(rows, float).reshape(-1, 2)


def window_mean(losses: np.ndarray, step: int, window: int = 1_000) -> float:
    """Mean loss over the `window` steps up to the last row at or before `step`; nan without rows.

    Rows (K, 2) are a step and the mean loss since the row before, as in log.jsonl. The mean is that
    of the single steps where the window starts at a row, else a row counts in part, as if constant.
    """
    rows = losses[losses[:, 0] <= step]
    if not len(rows):
        return math.nan
    ends = np.concatenate([[0], rows[:, 0]])
    sums = np.concatenate([[0], np.cumsum(np.diff(ends) * rows[:, 1])])
    start = max(ends[-1] - window, 0)
    return float((sums[-1] - np.interp(start, ends, sums)) / (ends[-1] - start))


def stopping_rule(
    fids: np.ndarray, losses: np.ndarray, end: int, *, fid_window: int = 3, fid_tol: float = 0.01,
    fid_patience: int = 6, fid_min_step: int = 2_000, d_window: int = 1_000, d_tol: float = 0.01,
    d_patience: int = 8,
) -> dict:  # fmt: skip
    """The two-phase rule: train until FID plateaus, then until D's loss does; lower is better.

    fids (K, 2) are step and FID of each evaluation; losses (L, 2) step and mean of D's loss since
    the row before; both are looked at on the steps of the evaluations. Smoothed FID is the median
    of fid_window evaluations, smoothed loss the mean of d_window steps; a gain is a relative one of
    more than tol; patience is the evaluations without gain (of FID: from fid_min_step on) that make
    a plateau. Returns t_fid (step of FID's last gain), t_det (its plateau seen), t_best (D's last
    gain: the checkpoint to take), t_stop, None where not reached; candidate, the last gain of the
    present phase; reason: plateau, cap_fid or cap_dloss (`end` reached), no_fid, unfinished.
    """
    found = dict.fromkeys(("t_fid", "t_det", "t_best", "t_stop", "candidate"))
    best, waited = math.inf, 0
    for i, step in enumerate(fids[:, 0].astype(int).tolist()):
        if found["t_det"] is None:  # phase 1: features
            value = np.median(fids[max(0, i + 1 - fid_window) : i + 1, 1])
            gain, counts = value < best * (1 - fid_tol), step >= fid_min_step
        else:  # phase 2: quality; a loss may be below 0
            value = window_mean(losses, step, d_window)
            gain, counts = value < best - d_tol * max(abs(best), 1e-8), not math.isnan(best)
            gain = gain or math.isnan(best) and not math.isnan(value)
        if gain:
            best, waited, found["candidate"] = value, 0, step
        else:
            waited += counts
        if found["t_det"] is not None:
            found["t_best"] = found["candidate"]
            if waited == d_patience:
                return found | {"t_stop": step, "reason": "plateau"}
        elif waited == fid_patience:
            found |= {"t_fid": found["candidate"], "t_det": step, "t_best": step, "candidate": step}
            best, waited = window_mean(losses, step, d_window), 0
    if not len(fids) or fids[-1, 0] < end:
        return found | {"reason": "unfinished" if len(fids) else "no_fid"}
    return found | {"t_stop": end, "reason": "cap_dloss" if found["t_det"] else "cap_fid"}


def report_stop(folder: Path) -> dict:
    """The stopping rule on the log of a run, printed and written to report.json."""
    fids, losses = read_log(folder, "metric/fid"), read_log(folder, "loss/d")
    end = json.loads((folder / "args.json").read_text())["args"]["total_steps"]
    found = stopping_rule(fids, losses, end)
    means = [(window_mean(losses, step), step) for step in losses[:, 0].tolist()]
    found["lowest_fid_at"] = int(fids[fids[:, 1].argmin(), 0]) if len(fids) else None
    found["lowest_d_loss_at"] = int(min(means)[1]) if means else None
    fid.write_text(folder / "report.json", json.dumps(found, indent=2))
    text = ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
    fid.say(f"stopping rule: {text} (a falling loss of D can also mean that D is winning)")
    return found


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


def kept_samples(path: Path, count: int = 8) -> Tensor:
    """uint8 images (count, 3, S, S) of a kept checkpoint, from the first noise of all grids."""
    state = load_checkpoint(path)
    args = Args(**state["args"])
    G = Generator(args)
    fid.load_parts({"G": G}, state["parts"], path)
    return generate(G, eval_noise(args, count))


@torch.no_grad()
def attention_maps(G: nn.Module, z: Tensor) -> dict[int, Tensor]:
    """What each position attends to: side of a map -> (N, side * side, h, h), rows summing to 1.

    h is the side, or half of it where keys are pooled. Worked out in the open: fused attention, as
    in training, returns no weights.
    """
    maps, training = {}, G.training

    def keep(block: nn.Module, inputs: tuple[Tensor]) -> None:
        weights = block.attention_map(inputs[0])
        maps[inputs[0].shape[2]] = weights.unflatten(2, (math.isqrt(weights.shape[2]), -1))

    hooks = [block.register_forward_pre_hook(keep) for block in G.attn.values()]
    G.eval()(z)
    for hook in hooks:
        hook.remove()
    G.train(training)
    return maps


def draw_attention(args: Args, G: nn.Module, path: Path, title: str, count: int = 4) -> None:
    """Samples with their query pixels, and what these attend to in each attention layer of G."""
    z = eval_noise(args, count).to(next(G.parameters()).device)
    maps, big, size = attention_maps(G, z), 128, args.img_size
    face = (22, 22), (22, 42), (34, 32), (46, 32), (6, 6)  # of 64x64: eyes, nose, mouth, background
    query = args.query or [(y * size // 64, x * size // 64) for y, x in face]
    inside = all(0 <= place < size for pair in query for place in pair)
    require(inside, "query", f"be pixels of {size}x{size} images", query)
    samples = F.interpolate(generate(G, z).cpu().float(), size=big, mode="nearest")
    rows, scale = {}, big / size
    for i, side in itertools.product(range(count), sorted(maps)):
        dots = Image.fromarray(samples[i].byte().permute(1, 2, 0).numpy())
        cells = []
        for (y, x), name in zip(query, itertools.cycle(fid.COLOURS)):
            spot = (x + 0.5) * scale, (y + 0.5) * scale
            ImageDraw.Draw(dots).circle(spot, 5, name, "white")
            place = (y * side // size) * side + x * side // size
            heat = F.interpolate(maps[side][i, place][None, None].cpu(), size=big, mode="bilinear")
            colour = torch.tensor(ImageColor.getrgb(name)).view(3, 1, 1).float()
            cells.append(0.4 * samples[i] + 0.6 * heat[0] / heat.max() * (0.5 * colour + 127))
        cells.insert(0, torch.from_numpy(np.array(dots)).permute(2, 0, 1).float())
        rows[f"{i + 1}: {side}x{side}"] = torch.stack(cells).byte()
    fid.named_rows(path, title, rows)


def shuffle_patches(images: Tensor, per_side: int, random: torch.Generator) -> Tensor:
    """Images (N, C, S, S) whose per_side x per_side patches change places, anew in each image."""
    n, channels, size = images.shape[:3]
    step = size // per_side
    x = images.reshape(n, channels, per_side, step, per_side, step).permute(0, 2, 4, 1, 3, 5)
    order = torch.rand(n, per_side**2, generator=random).argsort(1)
    x = x.flatten(1, 2)[torch.arange(n)[:, None], order].unflatten(1, (per_side, per_side))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def add_noise(images: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    """uint8 images with Gaussian noise of a deviation given in grey levels."""
    noise = torch.randn(images.shape, generator=random) * deviation
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


DISTORTIONS = {
    "2x2 patches": lambda images, random: shuffle_patches(images, 2, random),
    "4x4 patches": lambda images, random: shuffle_patches(images, 4, random),
    "blur 1": lambda images, random: gaussian_blur(images, [5, 5], [1.0, 1.0]),
    "blur 2": lambda images, random: gaussian_blur(images, [9, 9], [2.0, 2.0]),
    "noise 10": lambda images, random: add_noise(images, 10, random),
    "noise 30": lambda images, random: add_noise(images, 30, random),
}


def spatial_check(args: Args, inception: nn.Module, images: np.ndarray) -> dict[str, float]:
    """FID between the real images and their distortions: does it see structure that is wrong?

    Noise and places are drawn anew for each batch, so they depend on --fid-batch-size.
    """
    size, result = args.fid_batch_size, {}
    real = fid.dataset_moments(inception, images, size)
    for name, distort in DISTORTIONS.items():

        def batch(first: int, count: int) -> Tensor:
            random = torch.Generator().manual_seed(first)
            return distort(torch.tensor(images[first : first + count]), random)

        result[name] = fid.score_generator(inception, batch, len(images), size, real)["fid"]
    return result


def diversity(
    args: Args, inception: nn.Module, G: nn.Module, images: np.ndarray, labels: Tensor
) -> dict[str, float]:
    """Collapse proxy: the breeds of the real crops that lie nearest to `fid_num` samples.

    Distances are between Inception features. Few breeds or a low entropy (in nats) say that samples
    keep to a part of the data; so does a small mean distance between samples.
    """
    z, real = eval_noise(args, args.fid_num), torch.from_numpy(images)
    fake = torch.cat([inception(generate(G, part))[0] for part in z.split(args.fid_batch_size)])
    real = torch.cat([inception(part)[0] for part in real.split(args.fid_batch_size)])
    nearest = torch.cat([torch.cdist(part, real).argmin(1) for part in fake.split(1_000)])
    counts = labels[nearest.cpu()].bincount(minlength=int(labels.max()) + 1)
    between = sum(torch.cdist(part, fake).double().sum().item() for part in fake.split(1_000))
    return {
        "samples": args.fid_num,
        "breeds": len(labels.unique()),
        "breeds_hit": int((counts > 0).sum()),
        "entropy": torch.special.entr(counts / counts.sum()).sum().item(),
        "entropy_max": math.log(len(labels.unique())),
        "mean_distance": between / (len(fake) * (len(fake) - 1)),
    }


def compare_runs(args: Args, folder: Path, target: Path, title: str) -> None:
    """Runs of one data set and seed: bars of the first FID, curves, samples at the milestones."""
    left, right = run_folder(replace(args, exp_name="*")).name.split("*")
    paths = sorted(folder.parent.glob(f"{left}*{right}"))
    label = "".join(f"; {text}" for text in {fid.run_label(path) for path in paths} if text)
    runs = {path.name[len(left) : -len(right)]: path for path in paths}
    fids = {name: read_log(path, "metric/fid") for name, path in runs.items()}
    if values := {name: curve[0, 1] for name, curve in fids.items() if len(curve)}:
        fid.bars(target / "fid_first.png", f"FID, first evaluation; {title}{label}", values)
    early = {name: curve[curve[:, 0] <= 5_000] for name, curve in fids.items()}
    fid.chart(target / "fid_early.png", f"FID to step 5000; {title}{label}", early)
    fid.chart(target / "fid.png", f"FID; {title}{label}", fids)
    for step in args.milestones:
        kept = {name: path / f"step-{step:07d}.pt" for name, path in runs.items()}
        rows = {name: kept_samples(path) for name, path in kept.items() if path.exists()}
        if rows:
            fid.named_rows(target / f"compare_{step:07d}.png", f"step {step}; {title}", rows)


def figures(args: Args) -> None:
    """Mode figures: the paper's, of this run and of those beside it with its data set and seed."""
    args, device, G, _, folder = open_checkpoint(args)
    (images, labels, _), target, n = load_images(args), folder / "figures", args.num_samples
    dogs = f", {args.boxes} boxes, {args.aspect}" if args.dataset == "stanford-dogs" else ""
    title = f"{args.dataset}{dogs}, {args.img_size}x{args.img_size}, seed {args.seed}"
    target.mkdir(exist_ok=True)
    fid.write_grid(target / "real.png", torch.from_numpy(images[:n]), math.isqrt(n))
    fid.write_grid(target / "samples.png", sample_grid(args, G), math.isqrt(n))
    compare_runs(args, folder, target, title)
    title = f"{args.exp_name}; {title}"
    kept = [*sorted(folder.glob("step-*.pt")), *folder.glob("t_*.pt")]
    if kept:
        rows = {path.stem: kept_samples(path) for path in kept}
        fid.named_rows(target / "progress.png", title, rows)
    rule, losses = report_stop(folder), read_log(folder, "loss/d")
    smooth = [(step, window_mean(losses, step)) for step in losses[:, 0]]
    curves = {"FID": read_log(folder, "metric/fid"), "D loss": np.reshape(smooth, (-1, 2))}
    marks = {key: rule[key] for key in ("t_fid", "t_best")}
    named = f"FID, D loss; {title} {fid.run_label(folder)}"
    fid.chart(target / "signals.png", named, curves, twin=True, **marks)
    keys = [f"gamma_{net}_{side}" for net in "gd" for side in getattr(args, f"attn_{net}")]
    gains = {key: read_log(folder, f"train/{key}") for key in keys}
    fid.chart(target / "gamma.png", f"gamma; {title}", gains)
    if len(G.attn):
        draw_attention(args, G, target / "attention.png", f"attention in G; {title}")
    if args.eval_every:
        inception = fid.load_inception(args.fid_weights, device)
        if 0 < args.fid_real < len(images):
            rows = np.arange(args.fid_real) * len(images) // args.fid_real
            images, labels = images[rows], labels[rows]
        measured = {
            "spatial": spatial_check(args, inception, images),
            "diversity": diversity(args, inception, G, images, labels),
            "n_real": len(images), "label": inception.label, **inception.protocol,
        }  # fmt: skip
        named = f"FID of distorted real images; {title} {inception.label}"
        fid.bars(target / "spatial.png", named, measured["spatial"])
        fid.write_text(target / "measured.json", json.dumps(measured, indent=2))
    fid.say(f"figures are in {target}")


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
    n, stop, metrics = args.batch_size, False, {}
    forward_G, forward_D = (torch.compile(net) if args.compile else net for net in (G, D))

    def rule() -> dict:
        fids, losses = read_log(run.folder, "metric/fid"), read_log(run.folder, "loss/d")
        return stopping_rule(fids, losses, args.total_steps)

    def d_update(real: Tensor, z: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            with torch.no_grad():
                fake = forward_G(z).float()
            real_logits, fake_logits = forward_D(real).float(), forward_D(fake).float()
        d_loss_real, d_loss_fake = d_real(real_logits).mean(), d_fake(fake_logits).mean()
        d_loss = d_loss_real + d_loss_fake
        d_norm = run.update(d_loss, "D")
        return {
            "loss/d": d_loss, "loss/d_real": d_loss_real, "loss/d_fake": d_loss_fake,
            "logit/real": real_logits.mean(), "logit/fake": fake_logits.mean(),
            "grad/d_norm": d_norm,
        }  # fmt: skip

    def g_update(z: Tensor) -> dict[str, Tensor]:
        with run.autocast():
            logits = forward_D(forward_G(z)).float()
        g_loss = g_fake(logits).mean()
        return {"loss/g": g_loss, "grad/g_norm": run.update(g_loss, "G")}

    if args.cuda_graphs:
        d_update, g_update = fid.graphed(d_update), fid.graphed(g_update)
    done = args.early_stop and fid.on_main(rule)["reason"] == "plateau"
    while run.step < args.total_steps and not stop and not done:
        for _ in range(args.n_critic):
            real, _ = next(batches)
            if args.hflip:
                real = torch.where(run.draw(torch.rand, n, 1, 1, 1) < 0.5, real.flip(3), real)
            z = run.draw(torch.randn, n, args.z_dim)
            terms = d_update(real, z)
        stop = run.collect(terms | g_update(run.draw(torch.randn, n, args.z_dim)))
        milestone = run.step in args.milestones
        if run.due(args.log_every):
            gains = {
                f"train/gamma_{key}_{side}": block.gamma.item()
                for key, net in (("g", G), ("d", D))
                for side, block in net.attn.items()
            }
            run.log_interval(gains)
        if (run.due(args.sample_every) or milestone) and run.rank == 0:
            grid = sample_grid(args, G)
            fid.write_grid(run.folder / f"samples/{run.step:07d}.png", grid, math.isqrt(len(grid)))
        if run.due(args.eval_every):
            metrics = score(args, inception, G, images, path, eval_noise(args, args.fid_num))
            run.log(metrics)
            if metrics["metric/fid"] < run.best_fid:
                run.best_fid = metrics["metric/fid"]
                run.save("best.pt")
            found = fid.on_main(rule)  # whose log it is
            if found["candidate"] == run.step:
                run.save("t_fid.pt" if found["t_det"] is None else "t_best.pt")
            done = args.early_stop and found["reason"] == "plateau"
        if milestone:
            run.save(f"step-{run.step:07d}.pt")
        if stop or done or run.due(args.save_every):
            run.save()
    if stop:
        fid.say(f"stopped at step {run.step}; the same command with --resume goes on")
        raise SystemExit(128 + run.signal)
    if run.rank == 0:
        report_stop(run.folder)
    fid.say(f"done: {run.folder} (samples/, log.jsonl, report.json, checkpoint.pt)")
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
