# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro>=0.9.1", "tensorboard"]
# ///
"""Attentive Normalization for Conditional Image Generation (Wang et al., 2020): inpainting.

A coarse network fills the hole of a photograph, a second one refines it (Section 5.3): attentive
normalization (AN) splits features softly into regions and normalises each by itself, in place of
contextual attention (CA). Phase 1 trains by reconstruction alone, phase 2 against Wasserstein
critics too. The step of the highest PSNR of each phase is kept (best-phase1.pt, best.pt), and the
generator alone of the latest of them (generator.pt), which mode inpaint takes.

    python an_inpaint.py --data-dir paris/train --eval-dir paris/test               # Table 3, AN
    python an_inpaint.py --data-dir paris/train --eval-dir paris/test --refine ca   # Table 3, CA
    python an_inpaint.py --data-dir photos --img-size 128      # every 20th photograph is held out
    python an_inpaint.py --data-dir photos --img-size 128 --mode inpaint --image a.jpg --mask b.png

Differences from the paper
 1. The layer tables are those of the authors' code, whose critics contain an attention layer that
    was not released. Two critics, of the whole image and of the box round the hole, with summed
    scores and gradient penalties (the paper: "a discriminator D").
 2. AN is the paper's. The authors' code samples at test time too, divides a region's mean twice,
    has no affine parameters, no max-pooling, clips t, shares sampled positions in a batch, and
    penalises the signed sum of W^T W - I. A region's statistics are weighted by its mask; Eq. 5
    as printed (`--an-reading literal`) is no instance norm.
 3. The weight of the orthogonality, 1e-3 in both phases, is ours (not given).
 4. The weight of the reconstruction, 1.2, is DeepFill's (not given), of both stages' outputs in
    both phases. The authors' code averages over the hole and over the known pixels separately
    (twice Eq. 9's mean where both err alike), weighs pixels deep in the hole less, and adds an
    ID-MRF loss on VGG features: not in the paper and not here.
 5. Critic steps (5) and batch (16) are the authors' code's, the phases' lengths (40,000) ours.
 6. Training holes are boxes at random places less up to 1/8 on each side, 96 to 128 pixels, one
    per image (the authors': one per batch). Table 3's holes are taken to be centred and 128x128.
 7. Photographs are upright, their short side resized to 256, then cropped at random; the authors
    crop without resizing. Initialisation is PyTorch's. Mixed precision on CUDA is ours.
 8. Range, region and compositing of Table 3's scores are not stated. Here: [0, 1], 8 bits, known
    pixels exact. The printed MAE fits twice this range, or no compositing.
 9. Contextual attention (Yu et al., 2018) favours runs of neighbouring matches, as its code does.
10. Mode inpaint takes photographs of any size; white or transparent in the mask is missing. A
    large hole is shrunk until its box fits the trained one, at the cost of detail.
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
from scipy import ndimage
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp import GradScaler, autocast
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import fid

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---- 2. Arguments --------------------------------------------------------------------------------
@dataclass
class Args:
    # Run: what may change with --resume
    mode: Literal["train", "evaluate", "sample", "inpaint"] = "train"
    """train, or use a trained checkpoint"""
    exp_name: str = ""  # part of the run folder's name; empty: the model's
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    data_dir: str = "data"  # folder of the data set
    cache_dir: str = ""  # folder of decoded images and FID moments; empty: cache in --data-dir
    out_dir: str = "runs"  # folder of the run folders
    resume: bool = False  # resume from this run's checkpoint if there is one
    checkpoint: str = ""  # checkpoint to use or start from; empty: the run's best.pt, else its last
    dry_run: bool = False  # print the flags and the parameter counts as JSON and exit
    total_steps: int = 80_000  # generator updates to train for
    log_every: int = 100  # steps between lines of the log; the last step ends every interval
    sample_every: int = 2_000  # steps between sample grids; 0: none
    eval_every: int = 2_000  # steps between evaluations; 0: none
    save_every: int = 2_000  # steps between checkpoints; 0: none
    num_samples: int = 12  # images of a sample grid and of mode sample
    eval_dir: str = ""  # folder of the held-out photographs; empty: every 20th of the data set
    eval_mask: Literal["centre", "rect", "stroke", "file"] = "centre"  # holes of held-out images
    mask_dir: str = ""  # folder of mask files; missing is white, or transparent
    invert_mask: bool = False  # mask files have it the other way round
    eval_num: int = 100  # held-out images of an evaluation, spread over all of them; 0: all
    runs: tuple[str, ...] = ()  # run folders that mode sample sets side by side
    image: str = ""  # photograph of any size, to learn from (gca_gan.py) or fill (an_inpaint.py)
    mask: str = ""  # its mask file; --image and --mask may be folders with files of equal names
    output: str = "filled"  # file to write (.jpg is lossy), or a folder of PNGs
    # Data: from here on the flags of a checkpoint hold
    seed: int = 1  # seed of the weights, the noise and the order of the data
    dataset: Literal["folder", "shapes"] = "folder"
    """folder: any tree of images at --data-dir; shapes: drawn here, no download"""
    img_size: int = 256  # side of the square images in pixels
    hflip: bool = False  # mirror half of the training images, drawn anew each time
    # Holes
    train_mask: Literal["centre", "rect", "stroke", "file"] = "rect"
    """holes to train on: centred square, random rectangle, brush strokes, files of --mask-dir"""
    box: int = 0  # side of the square hole and of the local critic's view; 0: half of --img-size
    shrink: float = 0.125  # most that a random rectangle loses on each side, as a share of --box
    # Model
    refine: Literal["an", "ca", "plain"] = "an"  # in stage 2: AN, contextual attention, neither
    g_ch: int = 32  # base width of the generator, in channels
    d_ch: int = 64  # base width of the discriminator, in channels
    entities: int = 16  # entities n of attentive normalization (Table 4)
    region_stats: Literal["in", "bn"] = "in"  # a region's statistics: image or batch (Table 4)
    self_sampling: bool = True  # let sampled positions attract the layout in training (Table 4)
    an_reading: Literal["weighted", "literal"] = "weighted"  # a region's weights: mask, or Eq. 5's
    tau: float = 0.1  # factor of the layout's logits in the softmax over the entities
    local_critic: bool = True  # judge the box round the hole by a critic of its own, too
    # Optimisation
    phase1_steps: int = 40_000  # generator updates by reconstruction alone, the first ones
    batch_size: int = 16  # images per update, shared out over the processes
    n_critic: int = 5  # discriminator updates per generator update
    g_lr: float = 1e-4  # learning rate of the generator
    d_lr: float = 1e-4  # learning rate of the discriminator
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean
    beta2: float = 0.9  # Adam's decay rate of the squared gradient's mean
    lambda_rec: float = 1.2  # weight of the reconstruction
    lambda_adv: float = 1e-3  # weight of the critics' scores in phase 2
    lambda_gp: float = 10.0  # weight of the gradient penalty
    lambda_ortho: float = 1e-3  # weight of the orthogonality of the entities' filters (Table 4)
    amp: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """mixed precision; auto: bf16 where CUDA supports it, else fp16; off on the CPU"""

    @property
    def model(self) -> str:
        """The row of Table 3; it names the run folder."""
        return self.refine

    @property
    def side(self) -> int:
        """The side of the hole's box in pixels."""
        return self.box or self.img_size // 2


DEFAULTS = {("dataset", "shapes"): {"img_size": 64}}  # what a data set changes; given flags win


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
    n, size, side = args.batch_size, args.img_size, args.side
    yield n > 0 and n % WORLD == 0, f"--batch-size must be a multiple of {WORLD}, got {n}"
    training, path, folder = args.mode == "train", find_checkpoint(args), run_folder(args)
    yield training or WORLD == 1, f"--mode {args.mode} must have 1 process, got {WORLD}"
    yield not training or path.name != "generator.pt", f"--checkpoint must hold D, got {path}"
    there = path.exists() or (training and not args.checkpoint)
    yield there, f"{path} does not exist: train first, or name a --checkpoint"
    new = not training or args.resume or args.dry_run or RANK > 0 or not folder.exists()
    yield new, f"--exp-name must be new or go with --resume: {folder} exists"
    fits = size >= 32 and size % 8 == 0
    yield fits, f"--img-size must be a multiple of 8, at least 32, got {size}"
    places = (size // 8) ** 2  # of the keys, max-pooled at a quarter of the size
    sampled = 0 < args.entities <= places
    yield sampled, f"--entities must be from 1 to {places}, got {args.entities}"
    yield 0 < side <= size, f"--box must be at most {size}, got {side}"
    yield 0 <= args.shrink < 0.5, f"--shrink must be from 0 to below 0.5, got {args.shrink}"
    boxed = args.train_mask in ("centre", "rect") or not args.local_critic
    yield boxed, f"--no-local-critic must go with --train-mask {args.train_mask}: it has no box"
    drawn = "file" not in (args.train_mask, args.eval_mask)
    yield drawn or args.mask_dir != "", "--mask-dir must be given for holes from files"
    given = "" not in (args.image, args.mask)
    yield given or args.mode != "inpaint", "--mode inpaint must have an --image and a --mask"


# ---- 3. Layers -----------------------------------------------------------------------------------
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


class ContextualAttention(nn.Module):
    """Rebuild each position of a map from the known patches that look like it (Yu et al. 2018).

    Features (N, C, H, W), mask (N, 1, H, W), H and W even -> (N, C, H, W). Patches of 3x3 are
    compared on the map halved by picking every other position; those that touch the hole drop out;
    the full map's 4x4 patches are pasted over each other, weighted, 2 apart. No parameters.
    """

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return a (N, P, P): row p weighs the patches for place p, and sums to at most 1.

        The likeness s of place p to normalised patches is summed along its diagonals, in row-major
        and then in column-major order: neighbouring patches that match neighbouring ones gain.
        Masked ones score 0, not minus infinity, and then count for nothing.
        """
        patches = F.unfold(x[..., ::2, ::2], 3, padding=1)
        s = patches.transpose(1, 2) @ F.normalize(patches, dim=1, eps=1e-4)
        height, width = x.shape[2] // 2, x.shape[3] // 2
        for rows, columns in ((height, width), (width, height)):
            around = F.pad(s, (1, 1, 1, 1))  # the ends of rows wrap around, as in Yu et al.'s code
            s = around[:, :-2, :-2] + s + around[:, 2:, 2:]
            s = s.view(-1, rows, columns, rows, columns).permute(0, 2, 1, 4, 3)
            s = s.flatten(3).flatten(1, 2)
        known = (F.max_pool2d(mask[..., ::2, ::2], 3, 1, 1) == 0).flatten(2).to(x.dtype)
        logits = 10 * s * known
        # Weights below e^-60 are nothing; their denormal products would slow a CPU down tenfold.
        floor = logits.detach().amax(dim=2, keepdim=True) - 60
        return known * logits.maximum(floor).softmax(dim=2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        with autocast(x.device.type, enabled=False):
            values = x.to(torch.promote_types(x.dtype, torch.float32))
            patches = F.unfold(values, 4, stride=2, padding=1)
            out = patches @ self.attention(values, mask).transpose(1, 2)
            return (F.fold(out, x.shape[2:], 4, stride=2, padding=1) / 4).to(x.dtype)


# ---- 4. Networks ---------------------------------------------------------------------------------
def stack(channels: int, rows: list[tuple], act: Callable = nn.ELU) -> list[nn.Module]:
    """Return a layer table's convolutions (channels, size, stride, dilation), zeros around.

    A stride of 1/2 doubles the map first. An activation follows each; there is no normalisation.
    """
    layers = []
    for out, size, stride, dilation in rows:
        layers += [nn.Upsample(scale_factor=2)] if stride < 1 else []
        padding, stride = dilation * (size // 2), math.ceil(stride)
        layers += [nn.Conv2d(channels, out, size, stride, padding, dilation), act()]
        channels = out
    return layers


class Generator(nn.Module):
    """Images (N, 3, H, W) in [-1, 1], mask (N, 1, H, W) with 1 = missing -> coarse and fine images.

    H and W are multiples of 8. What an image holds under the mask is never seen.
    """

    def __init__(self, args: Args) -> None:
        super().__init__()
        c, same, self.refine = args.g_ch, (4 * args.g_ch, 3, 1, 1), args.refine
        encoder = [(c, 5, 1, 1), (2 * c, 3, 2, 1), (2 * c, 3, 1, 1), (4 * c, 3, 2, 1), same]
        dilated = [(4 * c, 3, 1, dilation) for dilation in (1, 2, 4, 8, 16)]  # rows 6 to 10
        decoder = [same, same, (2 * c, 3, 0.5, 1), (2 * c, 3, 1, 1)]  # rows 11 to 17
        decoder += [(c, 3, 0.5, 1), (c // 2, 3, 1, 1), (3, 3, 1, 1)]
        self.coarse = nn.Sequential(*stack(5, encoder + dilated + decoder)[:-1])  # ends linear
        self.branch_a = nn.Sequential(*stack(5, encoder + dilated))
        self.branch_b = nn.Sequential(*stack(5, [*encoder, same])[:-1])
        modules = {"an": lambda: AttentiveNorm(4 * c, args), "ca": ContextualAttention}
        self.module = modules.get(args.refine, nn.Identity)()
        self.branch_b_end = nn.Sequential(*stack(4 * c, [same, same]))
        self.decoder = nn.Sequential(*stack(8 * c, decoder)[:-1])

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        image, ones = image * (1 - mask), torch.ones_like(mask)
        coarse = self.coarse(torch.cat((image, ones, mask), dim=1)).clamp(-1, 1)
        x = torch.cat((coarse.where(mask > 0, image), ones, mask), dim=1)
        a, b = self.branch_a(x), self.branch_b(x)
        if self.refine == "ca":
            b = self.module(F.relu(b), F.interpolate(mask, b.shape[2:]))  # nearest
        else:
            b = F.elu(self.module(b))  # between the convolution and its activation
        x = torch.cat((a, self.branch_b_end(b)), dim=1)
        return coarse, self.decoder(x).clamp(-1, 1)


class Critic(nn.Module):
    """Images (N, 3, S, S) -> scores (N,): 5x5 convolutions of stride 2 and a linear layer."""

    def __init__(self, c: int, size: int) -> None:
        super().__init__()
        rows = [(width * c, 5, 2, 1) for width in (1, 2, 4, 8, 4, 2)]
        convs, values = stack(3, rows, partial(nn.LeakyReLU, 0.2)), math.ceil(size / 64) ** 2
        self.layers = nn.Sequential(*convs, nn.Flatten(), nn.Linear(2 * c * values, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


class Discriminator(nn.Module):
    """Images (N, 3, S, S), corners (N, 2) of the boxes -> summed scores (N,) of the critics."""

    def __init__(self, args: Args) -> None:
        super().__init__()
        self.side = args.side
        sizes = [args.img_size, args.side] if args.local_critic else [args.img_size]
        self.critics = nn.ModuleList(Critic(args.d_ch, size) for size in sizes)

    def views(self, x: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the critics see: all of x, and the box of each image."""
        places, side = zip(x, box.tolist()), self.side  # box is on the CPU: no wait for the device
        return x, torch.stack([i[:, r : r + side, c : c + side] for i, (r, c) in places])

    def forward(self, x: Tensor, box: Tensor) -> Tensor:
        return sum(critic(view) for critic, view in zip(self.critics, self.views(x, box)))


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


def load_photos(args: Args, held_out: bool) -> tuple[list[Tensor], str]:
    """Return uint8 photographs (H, W, 3), their short side --img-size, and a name of the content.

    Those to train on, or those held out: of --eval-dir, else every 20th. Rank 0 decodes a folder
    once, into one file beside a table of sizes; the photographs are views of it.
    """
    if RANK > 0:
        dist.barrier()  # until rank 0 has decoded
    apart = args.eval_dir if args.dataset == "folder" else ""
    root = Path(apart if held_out and apart else args.data_dir).expanduser()
    cache = Path(args.cache_dir or Path(args.data_dir, "cache")).expanduser()
    read, source, files = draw_shape, range(1_000), []
    if args.dataset == "folder":
        skip = [Path(x).expanduser() for x in (args.out_dir, apart, args.mask_dir) if x]
        read, source = open_image, fid.image_files(root, [cache, *skip])
        stats = zip(source, map(os.stat, source))
        files = [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns) for f, s in stats]
    content = zlib.crc32(repr([file[:2] for file in files]).encode())
    times = zlib.crc32(repr(files).encode())
    folder = cache / f"{args.dataset}-{len(source)}-{content:08x}"
    path, sizes = folder / f"photos-{args.img_size}-{times:08x}.bin", []

    def decode(item: Any) -> np.ndarray:
        return np.array(TF.resize(read(item), [args.img_size]))

    if not path.exists():
        print(f"decoding {len(source)} images into {path}, once")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
                for first in range(0, len(source), 256):  # map submits all it gets at once
                    for photo in pool.map(decode, source[first : first + 256]):
                        sizes.append(photo.shape[:2])
                        file.write(photo)
            np.save(path.with_suffix(".npy"), sizes)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    sizes = np.load(path.with_suffix(".npy"))
    pixels = torch.from_numpy(np.memmap(path, mode="c"))  # c: private to this process
    parts = pixels.split((3 * sizes.prod(axis=1)).tolist())
    photos = [part.view(*size, 3) for part, size in zip(parts, sizes.tolist())]
    if not apart:
        photos = [photo for i, photo in enumerate(photos) if (i % 20 == 0) == held_out]
    rule = f"held out ({apart or 'every 20th'})" if held_out else "to train on"
    print(f"{len(photos)} images {rule}")
    return photos, f"{folder.name}-{len(photos)}"


def cut(photo: Tensor, side: int, y: float = 0.5, x: float = 0.5) -> Tensor:
    """Cut a square (3, side, side) out of a photograph (H, W, 3); y, x in [0, 1), 0.5: centred."""
    top, left = (int(at * (n - side + 1)) for at, n in zip((y, x), photo.shape))
    return photo[top : top + side, left : left + side].permute(2, 0, 1)


def read_mask(path: Path, size: tuple[int, int], invert: bool) -> Tensor:
    """Return the hole (1, H, W), bool, of a mask file, resized to size (W, H) by picking pixels.

    Missing is the transparent part if there is one, else what is brighter than mid-grey.
    """
    grey, image = open_image(path).convert("L"), ImageOps.exif_transpose(Image.open(path))
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] < 128:
        grey = ImageOps.invert(alpha)
    return (TF.pil_to_tensor(grey.resize(size, Image.Resampling.NEAREST)) >= 128) != invert


def draw_strokes(size: int, rng: np.random.Generator) -> Tensor:
    """Draw 8 polylines of a brush, (1, size, size), bool; lengths are for a side of 256."""
    image, unit = Image.new("L", (size, size)), size / 256
    for _ in range(8):
        line, width = [rng.uniform(0, size, 2)], max(1, round(rng.uniform(10, 20) * unit))
        for angle, length in rng.uniform(0, (2 * math.pi, 80 * unit), (rng.integers(1, 16), 2)):
            step = length * np.array([math.cos(angle), math.sin(angle)])
            line.append((line[-1] + step).clip(0, size - 1))
        ImageDraw.Draw(image).line(np.concatenate(line).tolist(), 255, width, joint="curve")
    return TF.pil_to_tensor(image) > 0


def draw_hole(args: Args, kind: str, rng: np.random.Generator, files: list[Path]) -> tuple:
    """Return a hole (1, S, S), bool, and the top left corner of its box; (0, 0) where it has none.

    The box of a random rectangle lies anywhere, except at the very end; the hole is the box less
    some rows at its top and bottom and some columns at both sides.
    """
    size, side = args.img_size, args.side
    if kind == "file":
        return read_mask(files[rng.integers(len(files))], (size, size), args.invert_mask), (0, 0)
    if kind == "stroke":
        return draw_strokes(size, rng), (0, 0)
    top = left = (size - side) // 2
    h = w = 0
    if kind == "rect":
        top, left = rng.integers(0, max(1, size - side), 2).tolist()
        h, w = rng.integers(0, int(args.shrink * side) + 1, 2).tolist()
    hole = torch.zeros(1, size, size, dtype=torch.bool)
    hole[:, top + h : top + side - h, left + w : left + side - w] = True
    return hole, (top, left)


def photo_batches(args: Args, photos: list[Tensor], device: torch.device, b: int) -> Iterator:
    """Yield this process's share of batch `b` and of all later ones.

    Images (N, 3, S, S) in [-1, 1], masks (N, 1, S, S), corners (N, 2) of the boxes. A batch, with
    its crops and holes, depends on its number and the seed alone.
    """
    size, files = args.batch_size, fid.image_files(args.mask_dir) if args.mask_dir else []
    for b in itertools.count(b):
        epoch, place = divmod(b, len(photos) // size)
        order = np.random.default_rng([args.seed, 2, epoch]).permutation(len(photos))
        items = []
        for i in np.split(np.arange(size), WORLD)[RANK]:
            rng = np.random.default_rng([args.seed, 4, b, i])
            image = cut(photos[order[place * size + i]], args.img_size, *rng.random(2))
            image = image.flip(2) if args.hflip and rng.random() < 0.5 else image
            hole, box = draw_hole(args, args.train_mask, rng, files)
            items.append((image, hole, torch.tensor(box)))
        real, mask, box = map(torch.stack, zip(*items))
        if device.type == "cuda":
            real, mask = (x.pin_memory().to(device, non_blocking=True) for x in (real, mask))
        yield real.float().div_(127.5).sub_(1), mask.float(), box


def held_out_images(args: Args, photos: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return uint8 centres (N, 3, S, S) of photographs, spread over those held out, and masks.

    A mask depends on the place of its image alone.
    """
    files = fid.image_files(args.mask_dir) if args.mask_dir else []
    images, holes, n = [], [], min(count or len(photos), len(photos))
    for i in range(n):
        images.append(cut(photos[i * len(photos) // n], args.img_size))
        holes.append(draw_hole(args, args.eval_mask, np.random.default_rng([0, i]), files)[0])
    return torch.stack(images), torch.stack(holes).float()


# ---- 7. Run --------------------------------------------------------------------------------------
STOP: list[int] = []  # the signal that ends the training after the present step


def run_folder(args: Args) -> Path:
    """Return the folder of the run with these flags."""
    name = f"{Path(__file__).stem}__{args.dataset}__{args.exp_name or args.model}__s{args.seed}"
    return Path(args.out_dir).expanduser() / name


# differs from giu_gan.py: mode inpaint takes the generator alone
def find_checkpoint(args: Args) -> Path:
    """Return --checkpoint or the run's best.pt or checkpoint.pt; training prefers the latter.

    Mode inpaint takes its generator.pt, and so does mode sample of the first of --runs.
    """
    best, last = run_folder(args) / "best.pt", run_folder(args) / "checkpoint.pt"
    if args.checkpoint and not (args.mode == "train" and last.exists()):
        return Path(args.checkpoint).expanduser()
    if args.mode == "inpaint" or (args.mode == "sample" and args.runs):
        return Path(*args.runs[:1] or [run_folder(args)], "generator.pt").expanduser()
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
@torch.no_grad()
def complete(G: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
    """Fill uint8 images (N, 3, H, W) by G in eval mode; known pixels are the images' own."""
    training, device, done = G.training, next(G.parameters()).device, []
    G.eval()
    for image, hole in zip(images.split(16), mask.split(16)):
        fine = G(image.to(device) / 127.5 - 1, hole.to(device))[1].cpu()
        fine = fine.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
        done.append(fine.where(hole > 0, image))
    G.train(training)
    return torch.cat(done)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) in [0, 1] (Wang et al. 2004).

    An 11x11 Gaussian window of sigma 1.5, wherever it fits; K = 0.01, 0.03; mean over channels.
    """
    maps = torch.stack((a, b, a * a, b * b, a * b))
    for window in ([11, 1], [1, 11]):  # it is separable
        maps = TF.gaussian_blur(maps, window, [1.5, 1.5])
    mean_a, mean_b, square_a, square_b, product = maps[..., 5:-5, 5:-5]
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    structure = (2 * (product - mean_a * mean_b) + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def quality(done: Tensor, real: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Score filled uint8 images (N, 3, H, W), each, in float64.

    PSNR = 10 log10(1 / MSE) is infinite for equal images; without a hole its scores are NaN.
    """
    done, real, hole = done.double() / 255, real.double() / 255, mask.double().expand_as(real)
    error, scores, dims = (done - real).abs(), {"ssim": ssim(done, real)}, (1, 2, 3)
    for name, region in (("", torch.ones_like(hole)), ("_hole", hole)):
        mse, mae = ((e * region).sum(dims) / region.sum(dims) for e in (error**2, error))
        scores |= {f"psnr{name}": -10 * mse.log10(), f"mae{name}": mae}
    return scores


def score_completions(G: nn.Module, real: Tensor, mask: Tensor) -> dict[str, float]:
    """Return and print the means of held-out images' scores, without those that are not finite."""
    chunks = zip(real.split(16), mask.split(16))
    scores = [quality(complete(G, *chunk), *chunk) for chunk in chunks]
    table = torch.cat([torch.stack([*chunk.values()]) for chunk in scores], dim=1)
    means = table.where(table.isfinite(), torch.nan).nanmean(dim=1)
    means = dict(zip(scores[0], means.tolist()))
    print(f"{len(real)} images:", ", ".join(f"{name} {x:.5g}" for name, x in means.items()))
    return means


def load_generator(args: Args, path: Path) -> tuple[Generator, int]:
    """Return the generator of a checkpoint, in eval mode, and its step."""
    G = Generator(args).to(setup(args)[0])
    return G.eval(), load(path, {"G": G})["step"]


def evaluate(args: Args) -> dict[str, float]:
    """Mode evaluate: print a checkpoint's scores and write them to evaluate.json beside it."""
    path = find_checkpoint(args)
    G, step = load_generator(args, path)
    real, mask = held_out_images(args, load_photos(args, held_out=True)[0], args.eval_num)
    scores = score_completions(G, real, mask)
    rule = "8-bit RGB on [0, 1], known pixels exact; _hole: of the hole's pixels; means over images"
    about = {"step": step, "images": len(real), "holes": args.eval_mask, "scores": rule}
    print(rule)
    path.with_name("evaluate.json").write_text(json.dumps(about | scores, indent=2))
    return scores


def layout_maps(G: Generator, images: Tensor, mask: Tensor) -> Tensor:
    """Draw AN's layouts of uint8 images (N, 3, H, W) over them: (N, n, 3, H, W) in [0, 1]."""
    seen = []
    hook = G.module.register_forward_pre_hook(lambda an, x: seen.append(an.layout(*x).cpu()))
    complete(G, images, mask)
    hook.remove()
    layout = torch.cat(seen)
    low, high = layout.amin((2, 3), keepdim=True), layout.amax((2, 3), keepdim=True)
    maps = F.interpolate((layout - low) / (high - low).clamp_min(1e-12), scale_factor=4)
    return 0.2 * images[:, None] / 255 + 0.8 * maps[:, :, None]


def sample(args: Args) -> None:
    """Mode sample: fill held-out images, by --runs side by side (Figure 9); draw AN's layouts."""
    real, mask = held_out_images(args, load_photos(args, held_out=True)[0], args.num_samples)
    columns = [real.where(mask == 0, 128)]
    runs = [Path(run, "generator.pt").expanduser() for run in args.runs]
    for path in runs or [find_checkpoint(args)]:
        run = Args(**torch.load(path, "cpu", weights_only=True)["args"] | {"device": args.device})
        G, step = load_generator(run, path)
        columns.append(complete(G, real, mask))
        folder, images = path.parent / f"generated/{step}", columns[-1] / 255
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            save_image(image, folder / f"{i:05d}.png")
        grid = path.with_name(f"generated-{folder.name}.png")  # not among what fid.py reads
        save_image(images, grid, nrow=math.isqrt(len(images)))
        print(f"{len(images)} images in {folder}, a grid in {grid}")
        if run.refine == "an":
            cells = layout_maps(G, real, mask).flatten(0, 1)
            save_image(cells, path.with_name("layouts.png"), nrow=run.entities)
    file = Path(args.out_dir).expanduser() / f"{Path(__file__).stem}__{args.dataset}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.cat((*columns, real), dim=3) / 255, file, nrow=1)
    print(f"{file}: input, {', '.join(args.runs or ['result'])}, original")


def fill_holes(args: Args, G: nn.Module, photo: Tensor, hole: Tensor) -> Tensor:
    """Fill the holes (1, H, W), bool, of a photograph (3, H, W), uint8, one after the other.

    A hole is seen as in training: in a window of --img-size pixels, shrunk until the hole's box
    fits the trained one. The network's time and memory thus do not grow with the photograph. What
    lies closer than 1/32 of the long side is one hole, so that there are at most 256; small ones
    come first.
    """
    photo, hole, cell = photo.clone(), hole.clone(), -(-max(hole.shape) // 32)
    cells = F.max_pool2d(hole.float(), cell, ceil_mode=True)[0]
    areas = ndimage.find_objects(ndimage.label(cells.numpy(), np.ones((3, 3)))[0])
    for area in sorted(areas, key=lambda area: max(s.stop - s.start for s in area)):
        rows, columns = (slice(s.start * cell, s.stop * cell) for s in area)
        inside = torch.zeros_like(hole)
        inside[:, rows, columns] = hole[:, rows, columns]
        for box in ndimage.find_objects(inside.int().numpy()):  # none: filled along with another
            scale = min(1, args.side / max(s.stop - s.start for s in box))
            span, window = round(args.img_size / scale), [slice(None)]
            for s, length in zip(box[1:], hole.shape[1:]):
                start = max(0, min((s.start + s.stop - span) // 2, length - span))
                window.append(slice(start, start + span))
            view, gap = photo[*window], hole[*window]
            size = [max(8, 8 * round(n * scale / 8)) for n in gap.shape[1:]]
            known = TF.resize((~gap).float(), size).clamp_min(1e-6)  # they alone give the colour
            small = (TF.resize((view * ~gap).float(), size) / known).round().to(torch.uint8)
            filled = complete(G, small[None], (known < 0.5).float()[None])[0]
            filled = TF.resize(filled.float(), gap.shape[1:]).round().to(torch.uint8)
            photo[*window] = filled.where(inside[*window], view)
            hole &= ~inside
    return photo


def paste(image: Image.Image, filled: Tensor, hole: Tensor) -> Image.Image:
    """Put the hole's pixels of filled (3, H, W) into the image; all others stay as they are."""
    new, hole = TF.to_pil_image(filled), hole[0].numpy()
    if image.mode.startswith("I"):  # 16 bits
        grey = np.asarray(new.convert("L"), np.uint16) * 257
        return Image.fromarray(np.where(hole, grey, image))
    if image.mode in ("1", "P", "PA"):  # few colours
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.paste(new.convert(image.mode), mask=Image.fromarray(hole))
    return image


def inpaint(args: Args) -> None:
    """Mode inpaint: fill photographs of any size, in their own mode, where their masks say so."""
    G, _ = load_generator(args, find_checkpoint(args))
    Image.MAX_IMAGE_PIXELS = None  # a photograph of 200 megapixels is no attack
    source, masks, output = (Path(x).expanduser() for x in (args.image, args.mask, args.output))
    files = fid.image_files(masks) if masks.is_dir() else []
    named = {file.relative_to(masks).with_suffix(""): file for file in files}
    root = source if source.is_dir() else source.parent
    for file in fid.image_files(root, [masks, output]) if source.is_dir() else [source]:
        name = file.relative_to(root).with_suffix("")
        mask = named.get(name, masks / file.relative_to(root)) if named else masks
        target = output if output.suffix and source.is_file() else output / f"{name}.png"
        if target.resolve() in (file.resolve(), mask.resolve()):
            raise ValueError(f"--output must leave the inputs as they are, got {target}")
        rgb, image, found = open_image(file), Image.open(file), open_image(mask).size
        deep = ";16" in str(image.tile) and not image.mode.startswith("I")
        profile = {"exif": image.getexif(), "icc_profile": image.info.get("icc_profile")}
        image = ImageOps.exif_transpose(image)
        profile["exif"].pop(0x0112, None)  # the orientation: the result is upright
        hole, size = read_mask(mask, rgb.size, args.invert_mask), "{}x{}".format(*rgb.size)
        share = hole.float().mean().item()
        for odd, text in (
            (found != rgb.size, f"{mask} is {found[0]}x{found[1]}, resized to {size}"),
            (share in (0, 1), f"{mask} has one value: {'all' if share else 'nothing'} is missing"),
            (deep, f"{file} has colours of 16 bits, which Pillow reduces to 8"),
        ):
            if odd:
                print(f"warning: {text}", file=sys.stderr)
        filled = fill_holes(args, G, TF.pil_to_tensor(rgb), hole)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            paste(image, filled, hole).save(target, quality=95, **profile)
        except OSError as error:  # no alpha in JPEG, no CMYK in PNG
            print(f"warning: {error}: {target} is 8-bit RGB", file=sys.stderr)
            TF.to_pil_image(filled).save(target, quality=95, exif=profile["exif"])
        print(f"{target}: {share:.1%} of {size} pixels filled")


# ---- 9. Training ---------------------------------------------------------------------------------
def train(args: Args) -> dict[str, float]:
    """Train from the start or from a checkpoint; return the last scores."""
    device, amp, scaler = setup(args)
    (photos, content), (held_out, _) = (load_photos(args, part) for part in (False, True))
    if len(photos) < args.batch_size:
        rest = f"{len(held_out)} more are held out (see --eval-dir)"
        raise ValueError(f"--batch-size must be at most {len(photos)} images: {rest}")
    shown, scored = (held_out_images(args, held_out, x) for x in (args.num_samples, args.eval_num))
    torch.manual_seed(args.seed)
    G, D = Generator(args).to(device), Discriminator(args).to(device)
    g_opt = torch.optim.Adam(G.parameters(), args.g_lr, (args.beta1, args.beta2), fused=True)
    d_opt = torch.optim.Adam(D.parameters(), args.d_lr, (args.beta1, args.beta2), fused=True)
    run = Run(args, content, {"G": G, "D": D, "g_opt": g_opt, "d_opt": d_opt, "scaler": scaler})
    run.best = run.best if isinstance(run.best, dict) else {}  # by phase: highest PSNR, its step
    done = run.step + args.n_critic * max(0, run.step - args.phase1_steps)  # batches
    batches = photo_batches(args, photos, device, done)
    noise, n, scores = torch.Generator(device), args.batch_size, {}
    zero = torch.zeros((), device=device)
    while run.step < args.total_steps and not STOP:
        noise.manual_seed(seed_of(args.seed, 1, run.step))
        torch.manual_seed(seed_of(args.seed, 3, run.step, RANK + 1))  # of self-sampling
        phase = 1 if run.step < args.phase1_steps else 2
        d_loss = penalty = real_mean = fake_mean = adversarial = zero
        for _ in range(args.n_critic if phase == 2 else 0):
            real, mask, box = next(batches)
            with amp:
                with torch.no_grad():
                    fake = G(real, mask)[1].float().where(mask > 0, real)
                real_mean, fake_mean = (D(x, box).float().mean() for x in (real, fake))
            each = zip(D.critics, D.views(real, box), D.views(fake, box))
            penalty = sum(gradient_penalty(*x, draw(torch.rand, noise, n, 1, 1, 1)) for x in each)
            d_loss = fake_mean - real_mean
            update(d_opt, D, d_loss + args.lambda_gp * penalty, scaler)  # Eq. 10
        real, mask, box = next(batches)
        with amp:
            coarse, fine = (x.float() for x in G(real, mask))
            if phase == 2:
                adversarial = -D(fine.where(mask > 0, real), box).float().mean()
        l1, ortho = F.l1_loss(coarse, real) + F.l1_loss(fine, real), orthogonality(G)
        g_loss = args.lambda_rec * l1 + args.lambda_adv * adversarial  # Eq. 9
        update(g_opt, G, g_loss + args.lambda_ortho * ortho, scaler)
        run.log({
            "loss/d": d_loss, "loss/penalty": penalty, "loss/g": g_loss, "loss/l1": l1,
            "loss/orthogonality": ortho, "logit/real": real_mean, "logit/fake": fake_mean,
            "image/saturated": (fine.detach().abs() >= 1).float().mean(),
            **({"an/rho": G.module.rho} if args.refine == "an" else {}),
        })  # fmt: skip
        if run.due(args.sample_every):
            real, mask = shown
            grid = torch.cat((real.where(mask == 0, 128), complete(G, real, mask), real), dim=3)
            save_image(grid / 255, run.folder / f"samples/{run.step:07d}.png", nrow=2)
        phase_ends = RANK == 0 and args.eval_every and run.step == args.phase1_steps
        if run.due(args.eval_every) or phase_ends:
            scores = score_completions(G, *scored)
            run.write({f"metric/{name}": value for name, value in scores.items()})
            if scores["psnr"] > run.best.get(phase, (-math.inf, 0))[0]:
                run.best[phase] = scores["psnr"], run.step
                run.save("best.pt" if phase == 2 else "best-phase1.pt")
                small = {"G": G.state_dict(), "args": asdict(args), "step": run.step}
                torch.save(small, run.folder / "generator.tmp")
                os.replace(run.folder / "generator.tmp", run.folder / "generator.pt")
        if run.due(args.save_every):
            run.save("checkpoint.pt")
    if STOP:
        run.save("checkpoint.pt")
    for phase, (psnr, step) in run.best.items():
        print(f"{run.folder}: phase {phase}, highest PSNR {psnr:.2f} at step {step}")
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
            nets = {"G": Generator(args), "D": Discriminator(args)}
            params = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
            return print(json.dumps({"args": asdict(args), "params": params}))
        # torchrun kills what has not ended 30 s after a signal: it relies on --save-every.
        if args.mode == "train" and WORLD == 1:
            signal.signal(signal.SIGINT, stop)
            signal.signal(signal.SIGTERM, stop)
        modes = {"train": train, "evaluate": evaluate, "sample": sample, "inpaint": inpaint}
        modes[args.mode](args)
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
