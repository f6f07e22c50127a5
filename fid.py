# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro"]
# ///
"""Fréchet Inception Distance, Inception Score, intra-FID and SIFID.

A library for the training scripts and a command for folders of images:

    python fid.py REAL GENERATED                     # FID of two folders or .npz moments
    python fid.py REAL GENERATED --isc --intra       # and Inception Score, and FID per class folder
    python fid.py REAL --save real.npz               # keep the moments of REAL
    python fid.py photo.png samples/ --sifid         # one real image against generated ones

Protocol, the same everywhere (it is pytorch-fid's): Inception-v3 of the 2015 TensorFlow graph, RGB
images as uint8, bilinear to 299x299 without antialias, 2x - 1, the 2048 features of the last
average pool, covariance over N - 1, all sums in float64. Logits for the Inception Score are without
bias. Every result says how many images it comes from and the SHA-256 of the weights.

The training scripts take from here, besides, what has no part in any paper: messages, exit codes,
processes, locks, atomic files, checkpoints read, caches of decoded images, drawn images, grids,
curves and charts, CUDA graphs and what torch.compile needs.

Papers: FID arXiv:1706.08500, Inception Score arXiv:1606.03498, SIFID arXiv:1905.01164.
"""

# --------------------------------------------------------------------------------------------------
# 1. Imports
# --------------------------------------------------------------------------------------------------
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import random
import secrets
import shutil
import socket
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, library
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.models import Inception_V3_Weights

# The file name ends in the first 8 digits of its SHA-256, torch.hub's rule.
FID_WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SIFID_WEIGHTS_URL = Inception_V3_Weights.IMAGENET1K_V1.url
RANDOM_LABEL = "random features, comparable with nothing"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
T = TypeVar("T")


# --------------------------------------------------------------------------------------------------
# 2. Arguments
# --------------------------------------------------------------------------------------------------
@dataclass
class Args:
    real: tyro.conf.Positional[Path]
    """folder of real images, or their moments (.npz); with --sifid one image file"""
    generated: tyro.conf.Positional[Path | None] = None
    """folder of generated images, or their moments (.npz); with --sifid also one image file;
    left out, --isc and --save work on REAL and there is no distance"""
    isc: bool = False
    """also the Inception Score of GENERATED"""
    intra: bool = False
    """also the FID of each class: both folders hold one sub-folder per class, of equal names"""
    sifid: bool = False
    """single-image FID of REAL against each image of GENERATED, in place of FID"""
    sifid_dims: Literal[64, 192] = 64
    """features of SIFID: 64 before the first max pool (SinGAN's code), 192 before the second (its
    text)"""
    save: Path | None = None
    """write the moments of GENERATED (of REAL where GENERATED is left out) to this new .npz"""
    splits: int = 10
    """parts the images are shuffled into for the Inception Score"""
    weights: str = "auto"
    """Inception weights: auto (find or download), a path, or random (smoke tests only)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    batch_size: int = 50
    """images per pass through the network; changes the speed, not the result"""
    dtype: Literal["float32", "float64"] = "float32"
    """precision of the network; moments are always float64"""
    num_workers: int = 4
    """processes that decode images"""
    json: bool = False
    """print one JSON object in place of text"""


def check_args(args: Args) -> None:
    """Raise UserError for what can be known to be wrong before anything is read or built."""
    for flag, low in (("batch_size", 1), ("splits", 1), ("num_workers", 0)):
        value = getattr(args, flag)
        if value < low:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {low}, got {value}")
    given = [path for path in (args.real, args.generated) if path is not None]
    for path in given:
        if not path.exists():
            raise UserError(f"{path} does not exist")
    if len(given) == 1 and (args.sifid or args.intra or not (args.isc or args.save)):
        raise UserError("GENERATED is missing; one path alone goes with --isc or --save FILE")
    if args.sifid and (args.isc or args.intra or args.save):
        raise UserError("--sifid compares single images: not together with --isc, --intra, --save")
    if args.sifid and not args.real.is_file():
        raise UserError(f"--sifid compares with one real image, {args.real} is a folder")
    for flag, paths in (("intra", given), ("isc", given[-1:])):
        for path in paths:
            if getattr(args, flag) and path.is_file():
                raise UserError(f"--{flag} needs a folder of images, {path} is a file")
    if args.save:
        if args.save.suffix != ".npz":
            raise UserError(f"--save must name a .npz file, got {args.save}")
        if args.save.exists():
            raise UserError(f"--save {args.save} exists: remove it or choose another name")
        if not args.save.parent.is_dir():
            raise UserError(f"--save {args.save}: the folder {args.save.parent} does not exist")


# --------------------------------------------------------------------------------------------------
# 3. Messages, processes, files
# --------------------------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake its user can mend: one line `error: ...` on stderr, exit code 2."""


def note(text: str) -> None:
    """Print one line on stderr, in process 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print one line on stdout, in process 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


@functools.cache
def warn(text: str) -> None:
    """Print `WARNING: text` on stderr, the same text once in a run."""
    note(f"WARNING: {text}")


class Progress:
    """Lines such as `real images: 1200/50000 (2 %), 151 images/s, 0:05:23 left` on stderr.

    Process 0 prints, nothing in the first 3 seconds, then at most every 5 seconds: plain lines that
    read well in the log file of a cluster. `with Progress(...) as progress:` closes it.
    """

    def __init__(self, total: int, label: str, unit: str = "images") -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.start = 0, time.monotonic()
        self.next = self.start + 3
        self.printed = False

    def update(self, count: int) -> None:
        """Add `count` finished units (not beyond the total) and print if it is time to."""
        self.done = min(self.done + count, self.total)
        if time.monotonic() >= self.next:
            self._print("left")
            self.next = time.monotonic() + 5

    def close(self) -> None:
        """Print a last line with the time taken, if any line was printed before."""
        if self.printed:
            self._print("in all")

    def _print(self, word: str) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        if word == "left":
            seconds = (self.total - self.done) / max(rate, 1e-9)
        percent = 100 * self.done // max(self.total, 1)
        speed = f"{rate:.3g} {self.unit}/s, {timedelta(seconds=round(seconds))} {word}"
        note(f"{self.label}: {self.done}/{self.total} ({percent} %), {speed}")
        self.printed = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def processes() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed, (0, 1) where it is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mix(*key: int | str) -> int:
    """A seed that depends on all of `key`, also in its low 32 bits: the CPU reads no others."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")


def collective(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of torch.distributed; UserError where another process is gone."""
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:  # all that gloo and NCCL raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"lost another process, which may have said why: {reason}") from error


def on_main(function: Callable[[], T]) -> T:
    """Call `function` in process 0 only; every process gets its result, or its UserError.

    Keeps processes in step where only one may look at the disk: all take the same decision.
    """
    rank, world = processes()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if world > 1:
        collective(dist.broadcast_object_list, outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def same_buffers(net: nn.Module) -> None:
    """Give every process the first's buffers: batch norm's statistics are each process's own."""
    if processes()[1] > 1:
        for buffer in net.buffers():
            collective(dist.broadcast, buffer, 0)


def sum_processes(*tensors: Tensor) -> None:
    """Sum tensors over all processes, in place, whichever device the backend needs."""
    if processes()[1] > 1:
        for tensor in tensors:
            buffer = tensor.cuda() if "nccl" in dist.get_backend() else tensor.cpu()
            collective(dist.all_reduce, buffer)
            tensor.copy_(buffer)


def shares(num: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """This process's batches of 0..num-1 as (first, count): batch b is process b % world's."""
    rank, world = processes()
    for first in range(rank * batch_size, num, world * batch_size):
        yield first, min(batch_size, num - first)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed over it once it is complete and on the disk.

    Whoever reads `path` finds the old file or the new one, never a part. On any failure the
    temporary file goes and the old file stays. Give writers an open file
    (`with atomic(p) as tmp, open(tmp, "wb") as f: torch.save(x, f)`): from a path, torch.save says
    not why it failed, and others append suffixes.

    Raises: UserError where the system refuses to write (no space, no permission, quota).
    """
    path = Path(path)
    # Not the number of the process: on a shared disk two machines may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save raises a RuntimeError on top of the OSError
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        with suppress(OSError):  # it may never have come to be
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, in process 0 only."""
    if processes()[0] == 0:
        with atomic(path) as temporary:
            temporary.write_text(text)


def lock(path: Path, leftovers: str, wait: bool = False) -> IO[str]:
    """Hold a lock until the returned file is closed or the process ends, in whatever way.

    Where two hold it at once is a mistake, or with `wait` the second waits. Whoever has it removes
    what killed writers left of the files beside `path` whose names match `leftovers`. A lock of
    the POSIX kind: children do not inherit it, and it holds across machines with a shared disk.

    Raises: UserError where another process has it and this one is not to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    try:
        import fcntl  # not everywhere

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the system chooses which
            file.seek(0)
            holder = f"{path.parent} is in use by {file.read() or 'another process'}"
            if not wait:
                raise UserError(f"{holder}: let it end, or choose another name") from None
            note(f"{holder}: waiting for it")
            fcntl.lockf(file, fcntl.LOCK_EX)
    except (OSError, ModuleNotFoundError) as error:
        warn(f"{path.parent}: no locks here ({error}), so let no two runs write there at once")
        return file
    with suppress(OSError):  # a full disk; the lock holds without a name
        os.truncate(path, 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    for old in path.parent.glob(f".{leftovers}.*.tmp"):
        old.unlink(missing_ok=True)
    return file


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 2, a loss that is not finite into 3.

    Ctrl-C becomes 130. The other processes are let go of in any case.
    """
    try:
        yield
    except (UserError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3 if isinstance(error, FloatingPointError) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def quiet_threads() -> None:
    """No traceback where a thread ends by an OSError: TensorBoard's next call raises it again."""

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            threading.__excepthook__(failure)

    threading.excepthook = hook


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, none where it is missing; a last line without end is left out.

    Raises: UserError that names a line that is no JSON object.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                records.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: line {number} is damaged ({error})") from error
    return records


def read_checkpoint(path: Path) -> Any:
    """What torch.save wrote: tensors and plain containers only, every checksum right.

    torch.load by itself does not look at the checksums: a flipped bit would go unseen into a
    weight; and an entry that is marked as a folder, in the attributes that no checksum covers, it
    leaves as uninitialised memory. Raises: anything, for a file that is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        marked = [item.filename for item in archive.infolist() if item.external_attr]
        if name := archive.testzip() or "".join(marked[:1]):
            raise ValueError(f"{name} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(script: str, version: int, path: Path) -> dict[str, Any]:
    """A checkpoint of a script; UserError where it is missing, damaged, or of another one."""
    try:
        state = read_checkpoint(path)
        origin = state["script"], state["format"]
    except Exception as error:  # the unpickler of a damaged file can raise anything
        reason = f"damaged or no checkpoint ({error!r})" if path.exists() else "missing"
        raise UserError(f"{path} is {reason}") from error
    if origin != (script, version):
        raise UserError(f"{path} is of {origin[0]}.py, format {origin[1]}: not this script's")
    return state


def differences(old: dict[str, Any], new: dict[str, Any], flags: Iterable[str]) -> str:
    """What to say of flags that differ: `--g-ch was 64, is 32; ...`; empty where none does."""
    return "; ".join(
        f"--{flag.replace('_', '-')} was {old.get(flag)}, is {new.get(flag)}"
        for flag in sorted(flags)
        if old.get(flag) != new.get(flag)
    )


def recall(args: T, old: dict[str, Any], free: set[str], path: Path) -> T:
    """The flags `old` of a checkpoint, with those of `args` that modes other than training read.

    These are the `free` ones and those of evaluation; data and weights where the command line names
    them. Raises: UserError where it names another flag with another value than the checkpoint's.
    """
    new = asdict(args)
    if unknown := old.keys() ^ new.keys():
        raise UserError(f"{path} is of another version, flags: {', '.join(sorted(unknown))}")
    words = (word.split("=")[0] for word in sys.argv if word.startswith("--"))
    given = {word[2:].removeprefix("no-").replace("-", "_") for word in words} - {"exp_name"}
    here = {"deterministic", "fid_num", "fid_real", "eval_seed"} | free - {"data_dir"}
    here |= {"bn_batches", "eval_mask", "invert_mask"} & new.keys()
    here |= {"data_dir", "fid_weights"} & given
    if text := differences(old, new, given & new.keys() - here):
        how = "leave out what the checkpoint knows, or name another by --exp-name or --checkpoint"
        raise UserError(f"{path} is of other flags: {text}; {how}")
    return type(args)(**old | {flag: new[flag] for flag in here})


def load_parts(parts: Mapping[str, Any], states: Mapping[str, Any], path: Path) -> None:
    """Load networks and the like; UserError where the states in the file `path` do not fit them."""
    for key, part in parts.items():
        try:
            part.load_state_dict(states[key])
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is of another version, {key}: {reason}") from error


def create_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file of uint8 zeros as a memory map, its disk space taken at once.

    On a full disk a write to mapped memory is no OSError but the end of the process (SIGBUS).
    """
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


def open_array(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    """An .npy file as a memory map; writing to it changes no file.

    Raises: UserError where it does not hold such an array, OSError where it cannot be opened.
    """
    try:
        array = np.load(path, mmap_mode="c")
        found = f"{array.dtype} {array.shape}"
    except OSError:
        raise
    except Exception as error:  # numpy reads a header in many ways
        found = f"{type(error).__name__}: {error}"
    if found != f"{np.dtype(dtype)} {shape}":
        wrong = f"{found} in place of {np.dtype(dtype)} {shape}"
        raise UserError(f"{path} is damaged ({wrong}): delete it, and it is made anew")
    return array


def graphed(update: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """An update, tensors -> terms; its fourth call records it as a CUDA graph and replays that.

    From then on a call is one launch: the inputs are copied to fixed places, the recorded kernels
    work there. The terms have fixed places too: the next call overwrites them.
    """
    graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count(1)
    fixed, terms = [], {}

    def run(*inputs: Tensor) -> None:
        # Detached: an autograd graph that outlives its call ties the next one to its stream.
        terms.update({key: term.detach() for key, term in update(*inputs).items()})

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        number, main = next(calls), torch.cuda.current_stream()
        if number <= 3:  # cuDNN chooses its kernels and the optimiser makes its state
            side.wait_stream(main)
            with torch.cuda.stream(side):
                run(*inputs)
            main.wait_stream(side)
            return terms
        if number == 4:
            fixed.extend(value.clone() for value in inputs)
            # The thread that reads batches ahead may allocate memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run(*fixed)
        for place, value in zip(fixed, inputs):
            place.copy_(value)
        graph.replay()
        return terms

    return call


@library.custom_op("fid::power_iteration", mutates_args=("u", "v"))
def power_iteration(matrix: Tensor, u: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A step of spectral norm's power iteration of matrix (H, W) on u (H,), v (W,); their copies.

    One operation for torch.compile. Left to itself, it (2.15) works parts of a small matrix's out
    again for the gradient, from u and v as they are by then: one step on, and the gradient wrong.
    """
    F.normalize(torch.mv(matrix, v), dim=0, eps=eps, out=u)
    F.normalize(torch.mv(matrix.T, u), dim=0, eps=eps, out=v)
    return u.clone(), v.clone()


@power_iteration.register_fake
def _(matrix: Tensor, u: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


# --------------------------------------------------------------------------------------------------
# 4. Networks
# --------------------------------------------------------------------------------------------------
class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding keeps the size unless the stride is 2."""

    def __init__(self, c_in: int, c_out: int, kernel: str, same: bool = True) -> None:
        super().__init__()
        kernel, _, stride = kernel.partition("/")
        h, w = map(int, kernel.split("x"))
        padding = (h // 2, w // 2) if same and not stride else 0
        self.conv = nn.Conv2d(c_in, c_out, (h, w), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor, relu: bool = True) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if relu else x

    def fold(self) -> None:
        """Make one convolution of convolution and batch norm; in eval mode."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


# A Mixed block is branches side by side (|); a branch is layers in a row (>): a pool, or a
# convolution `name channels kernel`, `/2` with stride 2; two with & read the same input.
_A = (
    "1x1 64 1x1 | 5x5_1 48 1x1 > 5x5_2 64 5x5 | "
    "3x3dbl_1 64 1x1 > 3x3dbl_2 96 3x3 > 3x3dbl_3 96 3x3 | average > _pool {0} 1x1"
)
_B = "3x3 384 3x3/2 | 3x3dbl_1 64 1x1 > 3x3dbl_2 96 3x3 > 3x3dbl_3 96 3x3/2 | halve"
_C = (
    "1x1 192 1x1 | 7x7_1 {0} 1x1 > 7x7_2 {0} 1x7 > 7x7_3 192 7x1 | 7x7dbl_1 {0} 1x1 > "
    "7x7dbl_2 {0} 7x1 > 7x7dbl_3 {0} 1x7 > 7x7dbl_4 {0} 7x1 > 7x7dbl_5 192 1x7 | "
    "average > _pool 192 1x1"
)
_D = (
    "3x3_1 192 1x1 > 3x3_2 320 3x3/2 | "
    "7x7x3_1 192 1x1 > 7x7x3_2 192 1x7 > 7x7x3_3 192 7x1 > 7x7x3_4 192 3x3/2 | halve"
)
_E = (
    "1x1 320 1x1 | 3x3_1 384 1x1 > 3x3_2a 384 1x3 & 3x3_2b 384 3x1 | "
    "3x3dbl_1 448 1x1 > 3x3dbl_2 384 3x3 > 3x3dbl_3a 384 1x3 & 3x3dbl_3b 384 3x1 | "
    "{0} > _pool 192 1x1"
)
MIXED = {
    "Mixed_5b": _A.format(32),  # 35 x 35
    "Mixed_5c": _A.format(64),
    "Mixed_5d": _A.format(64),
    "Mixed_6a": _B,  # to 17 x 17
    "Mixed_6b": _C.format(128),
    "Mixed_6c": _C.format(160),
    "Mixed_6d": _C.format(160),
    "Mixed_6e": _C.format(192),
    "Mixed_7a": _D,  # to 8 x 8
    "Mixed_7b": _E.format("average"),
    "Mixed_7c": _E.format("maximum"),  # the graph of 2015 has it; Inception elsewhere an average
}
POOLS = {
    # TensorFlow's average leaves the padding out; torchvision's Inception counts it.
    "average": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "maximum": nn.MaxPool2d(3, stride=1, padding=1),
    "halve": nn.MaxPool2d(3, stride=2),
}


class Mixed(nn.Module):
    """One Inception block of `c_in` input channels, built from its line of MIXED."""

    def __init__(self, c_in: int, spec: str) -> None:
        super().__init__()
        self.branches: list[list[list[str]]] = []  # names of layers, or of pools
        self.c_out = 0
        for branch in spec.split("|"):
            c, self.branches = c_in, [*self.branches, []]
            for step in branch.split(">"):
                layers = [layer.split() for layer in step.split("&")]
                self.branches[-1].append([layer[0] for layer in layers])
                if layers[0][0] not in POOLS:
                    for name, channels, kernel in layers:
                        self.add_module("branch" + name, ConvBN(c, int(channels), kernel))
                    c = sum(int(channels) for _, channels, _ in layers)
            self.c_out += c

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            if branch[0] == ["average"]:
                # Commutes with the 1x1 convolution that follows: pool its fewer channels.
                y = F.relu(POOLS["average"](self.branch_pool(x, relu=False)), inplace=True)
                branch = []
            for names in branch:
                layers = [POOLS.get(name) or getattr(self, "branch" + name) for name in names]
                y = layers[0](y) if len(layers) == 1 else torch.cat([f(y) for f in layers], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


class Stem(nn.Module):
    """The layers of Inception-v3 before its Mixed blocks, the same in both weight files."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = ConvBN(32, 32, "3x3", same=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, "3x3")
        self.Conv2d_3b_1x1 = ConvBN(64, 80, "1x1")
        self.Conv2d_4a_3x3 = ConvBN(80, 192, "3x3", same=False)
        self.label = ""
        self.protocol: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.Conv2d_1a_3x3.conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.Conv2d_1a_3x3.conv.weight.dtype

    def stem(self, x: Tensor, dims: int = 192) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to the 64 maps before the first max pool, or 192 before the 2nd.

        The 64 maps are h = (H - 5) // 2 high, the 192 maps (h - 5) // 2, and so for the width.
        """
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        return x if dims == 64 else self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))


class Inception(Stem):
    """Inception-v3 of the 2015 TensorFlow graph, its state-dict keys those of FID_WEIGHTS_URL.

    Made by load_inception, which folds its batch norms.
    Attributes: label: "" or what to write beside every number; protocol: what makes numbers
    comparable (weights, sha256, resize, dtype, layer).
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 192
        for name, spec in MIXED.items():
            block = Mixed(channels, spec)
            self.add_module(name, block)
            channels = block.c_out
        self.fc = nn.Linear(channels, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images.

        Args: images: (N, 1 or 3, H, W), uint8, or float in [0, 1] which is rounded to uint8.
        Returns: features (N, 2048) and logits (N, 1008) without bias, in the network's dtype.
        Raises: ValueError for another shape or range.
        """
        return self.embed(resize(images.to(self.device)))

    @torch.no_grad()
    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same from `resize`d images (N, 3, 299, 299)."""
        with full_precision(self.device):
            x = POOLS["halve"](self.stem(x))
            for name in MIXED:
                x = getattr(self, name)(x)
            features = x.mean((2, 3))
            return features, features @ self.fc.weight.T


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16, no autocast inside; the settings of before afterwards."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9
        name, exact = "fp32_precision", "ieee"
        holders = [backends.cudnn.conv, backends.cuda.matmul]
        holders += [backends.mkldnn.conv, backends.mkldnn.matmul]
    else:
        name, exact = "allow_tf32", False
        holders = [backends.cudnn, backends.cuda.matmul]
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for holder, value in zip(holders, before):
            setattr(holder, name, value)


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, 1 or 3, H, W) as uint8; floats in [0, 1] are rounded to the nearest of 256 levels.

    What a PNG file would hold: scores of tensors and of their files are the same.
    Raises: ValueError for another shape, type or range.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"expected uint8 or float in [0, 1], got min {low:.4g}, max {high:.4g}")
    return images.float().mul(255).round().to(torch.uint8)


def resize(images: Tensor) -> Tensor:
    """Images for `to_uint8`, of any size, to float32 (N, 3, 299, 299) in [-1, 1], no antialias.

    Each image for itself, so that folders of mixed sizes and batches give the same.
    """
    x = F.interpolate(to_uint8(images).float() / 255, (299, 299), mode="bilinear")
    return (2 * x - 1).expand(-1, 3, -1, -1)


# --------------------------------------------------------------------------------------------------
# 5. Weights
# --------------------------------------------------------------------------------------------------
WAYS_OUT = (
    "name a copy of the file (fid.py --weights PATH, a training script's --fid-weights PATH), or "
    "use random weights (--weights random, --fid-weights random: a smoke test, not a measurement), "
    "or train without evaluation (--eval-every 0)"
)


def load_inception(
    weights: str = "auto", device: str | torch.device = "cpu", dtype: str = "float32"
) -> Inception:
    """The network of FID and Inception Score, ready: folded, channels-last, eval mode, no grad.

    Args:
        weights: "auto" (torch hub's cache, else download, SHA-256 checked), a path (used as it is),
            or "random" (seeded, for smoke tests: see `label`).
        device: where it runs.
        dtype: "float32" or "float64", the precision of the network.
    Raises: UserError where there are no weights to be had, or they are not this network's.
    """
    return _load(Inception, FID_WEIGHTS_URL, weights, device, dtype, "pool3, 2048")


def load_sifid_trunk(
    weights: str = "auto", device: str | torch.device = "cpu", dims: int = 64
) -> Stem:
    """The network of SIFID: the first layers of torchvision's ImageNet Inception-v3.

    Args: weights, device: as in load_inception; dims: 64 or 192, see `sifid`.
    Raises: UserError as load_inception.
    """
    trunk = _load(Stem, SIFID_WEIGHTS_URL, weights, device, "float32", f"stem, {dims}")
    trunk.protocol["resize"] = "none"
    return trunk


def _load(kind: type, url: str, weights: str, device, dtype: str, layer: str):
    with torch.device("meta"):  # the default initialisation would be thrown away
        net = kind()
    if weights == "random":
        name = digest = "random"
        state = _random_state(net)
    else:
        name, digest, state = _read_weights(url, weights)
        _check_keys(net, state, name)
    net.load_state_dict({key: state[key] for key in net.state_dict() if key in state}, assign=True)
    net.eval().requires_grad_(False).to(device, getattr(torch, dtype))
    for module in list(net.modules()):
        if isinstance(module, ConvBN):
            module.fold()
    net.label = RANDOM_LABEL if weights == "random" else ""
    net.protocol = {
        "weights": name,
        "sha256": digest,
        "resize": "bilinear to 299x299, align_corners=False, no antialias, from uint8",
        "dtype": dtype,
        "layer": layer,
    }
    return net.to(memory_format=torch.channels_last)


def _read_weights(url: str, weights: str) -> tuple[str, str, dict[str, Tensor]]:
    """Find or download, hash and parse a weight file: (file name, SHA-256, state dict)."""
    if weights == "auto":
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        expected = path.stem.rsplit("-", 1)[1]
        on_main(lambda: _download(url, path, expected))
        _download(url, path, expected)  # on the other machines of a cluster without a shared disk
    else:
        path, expected = Path(weights), ""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read Inception weights {path}: {error.strerror}") from error
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(expected):
        raise UserError(
            f"{path} is damaged: its SHA-256 begins {digest[:8]}, expected {expected}. Delete it "
            f"to download it again from {url}, or {WAYS_OUT}"
        )
    if not expected:
        note(f"Inception weights {path}, SHA-256 {digest}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes torch.load raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a weight file torch.load can read: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict: it holds a {type(state).__name__}")
    return path.name, digest, state


def _download(url: str, path: Path, expected: str) -> None:
    if path.exists():
        return
    note(f"downloading {url} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} to {path} (SHA-256 begins {expected}): {error}. Put the file "
            f"there by hand, or {WAYS_OUT}"
        ) from error


def _check_keys(net: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Raise UserError naming the first tensors that `net` lacks, has too many, or of other size."""
    # Scalars are batch norm's counters, which old files lack.
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items() if value.ndim}
    found = {key: tuple(value.shape) for key, value in state.items() if value.ndim}
    if not isinstance(net, Inception):  # the trunk of SIFID reads a part of its file
        found = {key: shape for key, shape in found.items() if key in wanted}
    shapes = [
        f"{key} is {found[key]} in place of {wanted[key]}"
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    groups = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "wrong shape": shapes,
    }
    problems = [f"{what} {len(k)}: {', '.join(k[:3])}" for what, k in groups.items() if k]
    if problems:
        raise UserError(f"{name} is not Inception-v3 as expected: {'; '.join(problems)}")


def _random_state(net: nn.Module) -> dict[str, Tensor]:
    """Seeded weights under which activations neither vanish nor explode, and images stay apart."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in net.state_dict().items():
        if value.ndim > 1:
            weight = torch.rand(value.shape, generator=generator)
            # Filters without mean ignore what all positive inputs share; else after 90 layers every
            # image has the same features. A ReLU leaves 0.34 of a centred signal's variance.
            weight -= weight.flatten(1).mean(1).view(-1, *[1] * (value.ndim - 1))
            state[key] = weight.mul_((12 / 0.34 / weight[0].numel()) ** 0.5)
        else:
            ones = key.endswith(("bn.weight", "running_var"))
            state[key] = torch.full(value.shape, float(ones), dtype=value.dtype)
    return state


# --------------------------------------------------------------------------------------------------
# 6. Statistics
# --------------------------------------------------------------------------------------------------
# What a truncated or foreign zip archive makes numpy raise.
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError)


class Moments:
    """Mean and covariance of features, streamed: float64 count, sum and sum of outer products.

    Args: dims: length of a feature vector; device: where the sums are kept.
    Attributes: n: vectors so far (None in a file that does not say); mu (dims,) and sigma
    (dims, dims), over n - 1, as float64 arrays; meta: what the file says beside them.
    """

    def __init__(self, dims: int = 2048, device: str | torch.device = "cpu") -> None:
        self.n: int | None = 0
        self.dims = dims
        self.meta: dict[str, Any] = {}
        self._total: Tensor | None = torch.zeros(dims, dtype=torch.float64, device=device)
        self._outer: Tensor | None = torch.zeros(dims, dims, dtype=torch.float64, device=device)
        self._stats: tuple[np.ndarray, np.ndarray] | None = None  # (mu, sigma), once known

    def update(self, features: Tensor) -> None:
        """Add features (N, dims)."""
        total, outer = self._sums()
        x = features.to(total.device).double()
        outer.addmm_(x.T, x)
        total += x.sum(0)
        self.n, self._stats = self.n + len(x), None

    def merge(self, other: "Moments") -> None:
        """Add the vectors of `other`."""
        for mine, its in zip(self._sums(), other._sums()):
            mine += its.to(mine.device)
        self.n, self._stats = self.n + other.n, None

    def all_reduce(self) -> None:
        """Add up the vectors of all processes, in all of them."""
        n = torch.tensor([self.n])
        sum_processes(n, *self._sums())
        self.n, self._stats = int(n), None

    @property
    def mu(self) -> np.ndarray:
        return self._finish()[0]

    @property
    def sigma(self) -> np.ndarray:
        return self._finish()[1]

    def save(self, path: str | Path, **meta: Any) -> None:
        """Write mu and sigma, as pytorch-fid reads them, with n and `meta` (JSON) to an .npz.

        Raises: UserError where it cannot be written.
        """
        extra: dict[str, Any] = {key: json.dumps(value) for key, value in meta.items()}
        if self.n is not None:
            extra["n"] = self.n
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma, **extra)

    @classmethod
    def load(cls, path: str | Path, dims: int = 2048) -> "Moments":
        """Read what `save` or pytorch-fid wrote; with a warning where the protocol is missing.

        Raises: UserError for a file that does not hold the moments of `dims` features.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            mu, sigma = arrays.pop("mu"), arrays.pop("sigma")
            n = int(arrays.pop("n")) if "n" in arrays else None
            meta = {key: json.loads(str(v)) for key, v in arrays.items() if v.dtype.kind == "U"}
        except KeyError as error:
            raise UserError(f"{path} holds no moments: no array {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, EOFError, *_BAD_ZIP) as error:
            raise UserError(f"{path} is not an .npz of moments: {error}") from error
        if mu.shape != (dims,) or sigma.shape != (dims, dims):
            raise UserError(
                f"{path}: mu must be ({dims},) and sigma ({dims}, {dims}), "
                f"got {mu.shape} and {sigma.shape}"
            )
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
            raise UserError(f"{path}: mu and sigma must be floats, got {mu.dtype}, {sigma.dtype}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{path}: mu or sigma holds values that are not finite")
        if "protocol" not in meta:
            warn(f"{path}: statistics without protocol metadata; made by another tool?")
        moments = cls(0)
        moments.n, moments.dims, moments.meta = n, dims, meta
        moments._stats = mu.astype(np.float64), sigma.astype(np.float64)
        moments._total = moments._outer = None
        return moments

    def _sums(self) -> tuple[Tensor, Tensor]:
        if self._outer is None:  # loaded: rebuilt only where more is added
            if self.n is None:
                raise ValueError("moments of an unknown number of images cannot be added to")
            mu, sigma = (torch.from_numpy(array) for array in self._stats)
            self._total = mu * self.n
            self._outer = torch.addr(sigma * (self.n - 1), mu, mu, alpha=self.n)
        return self._total, self._outer

    def _finish(self) -> tuple[np.ndarray, np.ndarray]:
        if self._stats is None:
            if self.n < 2:
                raise UserError(f"a covariance needs at least 2 images, got {self.n}")
            mu = self._total / self.n
            sigma = torch.addr(self._outer, mu, self._total, alpha=-1).div_(self.n - 1)
            self._stats = mu.cpu().numpy(), sigma.cpu().numpy()
        return self._stats


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = L L^T, the eigenvalues of A B are those of the symmetric L^T B L, and the trace of the
    root is the sum of their roots: real, and no matrix square root. L comes from a pivoted Cholesky
    factorisation, which ends at the rank r of A: a covariance of fewer images than dimensions needs
    no special case and costs less, as L is (dims, r).

    Raises: UserError for features that are not finite; ValueError for different dims.
    """
    if a.dims != b.dims:
        raise ValueError(f"moments of {a.dims} and of {b.dims} features cannot be compared")
    if a.n is None or (b.n is not None and b.n < a.n):
        a, b = b, a  # factor the one of lower rank
    for moments in (a, b):
        if not (np.isfinite(moments.mu).all() and np.isfinite(moments.sigma).all()):
            raise UserError("the features are not finite: broken weights or images?")
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(a.sigma, lower=1)
    factor = np.zeros((a.dims, rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])
    del packed
    product = factor.T @ (b.sigma @ factor)
    # Symmetric, so its transpose is itself, and in the layout LAPACK can overwrite.
    roots = scipy.linalg.eigvalsh(product.T, overwrite_a=True) if rank else np.zeros(0)
    trace = np.sqrt(np.maximum(roots, 0)).sum()  # rounding leaves tiny negatives
    difference = a.mu - b.mu
    distance = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace
    return max(float(distance), 0.0)


class InceptionScore:
    """exp of the mean divergence of p(y|x) from p(y), streamed; mean and deviation over splits.

    Images are dealt to the splits by a seeded permutation of their indices: without it a generator
    that is sampled class by class scores far too low. float64 throughout, on the CPU, where sums
    are reproducible. Memory is that of `splits` distributions and one byte or two per image.

    Args: num: images there will be; splits: parts; seed: of the permutation; classes: logits.
    Raises: UserError where num < splits.
    """

    def __init__(self, num: int, splits: int = 10, seed: int = 0, classes: int = 1008) -> None:
        if num < splits:
            raise UserError(
                f"Inception Score of {num} images cannot use {splits} splits: score more images "
                "(--fid-num of a training script), or lower --splits"
            )
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        self.num = num
        self._split_of = (order * splits // num).to(torch.int16)
        self._count = torch.zeros(splits, dtype=torch.float64)
        self._sum_p = torch.zeros(splits, classes, dtype=torch.float64)
        self._sum_plogp = torch.zeros(splits, dtype=torch.float64)

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add the logits (N, classes), without bias, of the images of these indices (N,)."""
        log_p = logits.cpu().double().log_softmax(1)
        p = log_p.exp()
        split = self._split_of[indices.cpu()].long()
        self._count.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self._sum_p.index_add_(0, split, p)
        self._sum_plogp.index_add_(0, split, (p * log_p).sum(1))

    def all_reduce(self) -> None:
        """Add up the images of all processes, in all of them."""
        sum_processes(self._count, self._sum_p, self._sum_plogp)

    def result(self) -> tuple[float, float]:
        """(mean, standard deviation over N, as is common) of the scores of the splits.

        Raises: ValueError where not every image was added exactly once.
        """
        if self._count.sum() != self.num:
            raise ValueError(f"{int(self._count.sum())} of {self.num} images were added")
        p_y = self._sum_p / self._count[:, None]
        entropies = torch.special.entr(p_y).sum(1)
        scores = (self._sum_plogp / self._count + entropies).exp()
        return scores.mean().item(), scores.std(correction=0).item()


# --------------------------------------------------------------------------------------------------
# 7. Scores
# --------------------------------------------------------------------------------------------------
def dataset_moments(
    net: Inception,
    images: Any,
    batch_size: int,
    cache: Path | None = None,
    label: str = "real images",
) -> Moments:
    """Moments of an array of images, worked out by all processes together, the same in all.

    Args:
        images: uint8 (N, C, H, W): array, memory map, or tensor on any device.
        cache: .npz to read where it was made from as many images of this size by the same
            protocol, else to write.
    Raises: UserError for fewer than 2 images, and where the cache cannot be read or written.
    """
    if len(images) < 2:
        raise UserError(f"{label}: a covariance needs at least 2 images, got {len(images)}")
    meta = {"protocol": net.protocol, "size": list(images.shape[1:])}

    def read() -> Moments | None:
        if cache is None or not cache.exists():
            return None
        found = Moments.load(cache)
        return found if found.n == len(images) and found.meta == meta else None

    cached = on_main(read)
    if cached is not None:
        return cached
    moments = Moments(device=net.device)
    with Progress(len(images), label) as progress:
        for first, count in shares(len(images), batch_size):
            batch = images[first : first + count]
            # A copy, since a memory map is read-only; a batch is small.
            moments.update(net(batch if isinstance(batch, Tensor) else torch.tensor(batch))[0])
            progress.update(count * processes()[1])
    moments.all_reduce()
    moments.meta = meta
    if cache is not None:
        on_main(lambda: moments.save(cache, **meta))
    return moments


def score_generator(
    net: Inception,
    generate: Callable[[int, int], Tensor],
    num: int,
    batch_size: int,
    real: Moments,
    splits: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """FID and Inception Score of `num` generated images, by all processes together.

    Args:
        generate: (first, count) -> uint8 (count, C, H, W), images first .. first + count - 1 of a
            fixed sequence, so that the score does not depend on the number of processes.
        real: what dataset_moments returned; seed: of the shuffle into splits.
    Returns: fid, is_mean, is_std, n_fake, n_real, identical in all processes.
    Raises: UserError for too few images or moments of another protocol.
    """
    check_protocols(real.meta, {"protocol": net.protocol})
    fake = Moments(device=net.device)
    score = InceptionScore(num, splits, seed)
    with Progress(num, "generated images") as progress:
        for first, count in shares(num, batch_size):
            features, logits = net(generate(first, count))
            if len(features) != count:
                raise ValueError(f"generate returned {len(features)} images in place of {count}")
            fake.update(features)
            score.update(logits, torch.arange(first, first + count))
            progress.update(count * processes()[1])
    fake.all_reduce()
    score.all_reduce()
    if net.label:
        warn(net.label)
    warn_few(real, fake)
    mean, std = score.result()
    fid = frechet_distance(real, fake)
    return {"fid": fid, "is_mean": mean, "is_std": std, "n_fake": num, "n_real": real.n}


def warn_few(*all_moments: Moments) -> None:
    """Warn of covariances without full rank."""
    for n, dims in ((moments.n, moments.dims) for moments in all_moments):
        if n is not None and n <= dims:
            warn(
                f"{n} images for {dims} feature dimensions: covariance is singular, FID is biased "
                "upwards and comparable only at equal N"
            )


def check_protocols(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise UserError where two metadata name protocols whose numbers cannot be compared."""
    if "protocol" not in a or "protocol" not in b:
        return  # Moments.load has warned
    for key in ("sha256", "resize", "dtype", "layer"):
        values = [str(meta["protocol"].get(key)) for meta in (a, b)]
        if values[0] != values[1]:
            raise UserError(
                f"moments of different protocols cannot be compared: {key} is {values[0]} and "
                f"{values[1]}"
            )


def intra_fid(real: Mapping[str, Any], fake: Mapping[str, Any]) -> dict[str, Any]:
    """FID of each class and its mean over classes (all classes weigh the same).

    Args: real, fake: Moments of each class, or functions that return them, called when their class
        comes: 34 MB of moments for each of many classes need not be held at a time.
    Returns: mean, min, max, and per_class {name: {fid, n_real, n_fake}}.
    Raises: UserError that lists the classes one side lacks.
    """
    for side, names in (("real", set(fake) - set(real)), ("generated", set(real) - set(fake))):
        if names:
            raise UserError(f"intra-FID: no {side} images of class {', '.join(sorted(names))}")
    if not real:
        raise UserError("intra-FID: there are no classes")
    per_class = {}
    for name in sorted(real):
        a, b = (m if isinstance(m, Moments) else m() for m in (real[name], fake[name]))
        warn_few(a, b)
        per_class[name] = {"fid": frechet_distance(a, b), "n_real": a.n, "n_fake": b.n}
    values = [entry["fid"] for entry in per_class.values()]
    mean = float(np.mean(values))
    return {"mean": mean, "min": min(values), "max": max(values), "per_class": per_class}


def sifid(trunk: Stem, real: Tensor, fakes: Iterable[Tensor], dims: int = 64) -> dict[str, Any]:
    """Fréchet distance of one real image from each generated one; a position is a sample.

    As SinGAN measures it: torchvision's ImageNet weights, no resize, no pooling over positions.
    They come from TensorFlow and expect 2x - 1, which is what they get; torchvision's
    transform_input only leads back to it from images normalised by ImageNet's mean and deviation.
    64 features are those of SinGAN's code, behind the published numbers; 192 those of its text.

    Args: trunk: from load_sifid_trunk; real: (C, H, W) and fakes: images (C, H, W) of any size,
        uint8 or float in [0, 1]; dims: 64 or 192.
    Returns: mean, std (over N), values, and positions of the real image.
    Raises: UserError for an image with fewer positions than dims + 1.
    """

    def moments(image: Tensor) -> Moments:
        side = [(s - 5) // 2 for s in image.shape[1:]]
        side = side if dims == 64 else [(s - 5) // 2 for s in side]
        if min(side) < 1 or side[0] * side[1] <= dims:
            raise UserError(
                f"SIFID: an image of {image.shape[1]}x{image.shape[2]} has too few positions for "
                f"{dims} features: use larger images" + " or --sifid-dims 64" * (dims > 64)
            )
        x = to_uint8(image[None].to(trunk.device)).float() / 127.5 - 1
        with torch.no_grad(), full_precision(trunk.device):
            maps = trunk.stem(x.expand(-1, 3, -1, -1), dims)[0]
        found = Moments(dims)
        found.update(maps.flatten(1).T)
        return found

    reference = moments(real)
    values = [frechet_distance(reference, moments(fake)) for fake in fakes]
    mean, std = float(np.mean(values)), float(np.std(values))
    return {"mean": mean, "std": std, "values": values, "positions": reference.n}


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) in [0, 1], mean over channels and places.

    Wang et al. 2004: an 11x11 Gaussian window of sigma 1.5, wherever it fits; K = 0.01, 0.03.
    """
    line = torch.exp(-(torch.arange(-5.0, 6.0, dtype=a.dtype, device=a.device) ** 2) / 4.5)
    line = (line / line.sum()).expand(a.shape[1], 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line, groups=x.shape[1])
        return F.conv2d(x, line.transpose(2, 3), groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    covariance = blur(a * b) - mean_a * mean_b
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


# --------------------------------------------------------------------------------------------------
# 8. Folders
# --------------------------------------------------------------------------------------------------
def image_files(folder: str | Path) -> list[Path]:
    """All image files under `folder`, recursive (links followed), sorted, suffix in any case.

    Raises: UserError for a folder that is missing, is a file, or holds no images.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} is a run folder: name {folder / 'generated'}, its samples")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: a folder of images or an .npz of moments is expected")

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    paths = []
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        paths += [Path(root, name) for name in names]
        folders[:] = [name for name in folders if not _leads_back(Path(root, name), folder)]
    images = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"no images ({' '.join(IMAGE_SUFFIXES)}) under {folder}")
    return images


def _leads_back(path: Path, top: Path) -> bool:
    """Whether a link leads to a folder that it lies in: without end, its images again and again."""
    if not path.is_symlink():
        return False
    target, above = path.resolve(), [p for p in path.parents if p == top or top in p.parents]
    return any(target in (p, *p.parents) for p in map(Path.resolve, above))


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, of 16 bits scaled to 8: Pillow would cut."""
    if image.mode == "F":
        raise ValueError("the range of floating-point pixels is unknown")
    if image.mode.startswith("I"):
        grey = np.rint(np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255))
        return Image.fromarray(grey.astype(np.uint8))
    return image


def open_image(path: str | Path) -> Image.Image:
    """An image file as an RGB image: grey and palette become RGB, alpha is dropped.

    Pillow raises OSError, SyntaxError, ValueError and others for what it cannot decode.
    """
    with Image.open(path) as image:
        return _eight_bits(image).convert("RGB")


def open_photo(path: str | Path) -> Image.Image:
    """A photograph as upright RGB of 8 bits; a warning says what was converted.

    Transparent parts become white, of an animation the first frame is taken. UserError for a
    file that is missing or unreadable.
    """
    try:
        with Image.open(path) as source:
            frames = getattr(source, "n_frames", 1)
            image = ImageOps.exif_transpose(source)
        mode = image.mode
        alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        image = _eight_bits(image)
        if alpha:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # decoders fail in many ways
        raise UserError(f"{path} cannot be read: {error}") from error
    for found, what in (
        (frames > 1, f"the first of {frames} frames is taken"),
        (alpha, "transparent parts become white"),
        (not alpha and mode != "RGB", f"its pixels (Pillow's mode {mode}) become RGB of 8 bits"),
    ):
        if found:
            warn(f"{path}: {what}")
    return image


def read_image(path: str | Path) -> Tensor:
    """An image file as uint8 (3, H, W); raises what `open_image` raises."""
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)


class ImageFiles(Dataset):
    """Decoded images, or the reason why one cannot be decoded."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return read_image(self.paths[index])
        except Exception as error:  # decoders fail in many ways; all are listed together
            return f"{self.paths[index]}: {error or type(error).__name__}"


class Folder(Dataset):
    """Every image under a folder, sorted; its first-level subfolders are the classes.

    Images that lie directly in it are one more class, with no name.
    """

    def __init__(self, root: str | Path) -> None:
        self.files = image_files(root)
        names = [file.relative_to(root) for file in self.files]
        tops = [(*name.parts[:-1], "")[0] for name in names]
        self.classes = sorted(set(tops))
        self.targets = [self.classes.index(top) for top in tops]
        self.key = [(str(name), file.stat().st_size) for name, file in zip(names, self.files)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.targets[index]


class Shapes(Dataset):
    """Drawn images of eight classes: a coloured shape and its mirror image on a shaded ground.

    One half fixes the other, so there is something non-local to learn. Image i depends on i alone.
    """

    targets = [i % 8 for i in range(5_000)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        rng, (kind, hollow) = random.Random(index), divmod(self.targets[index], 2)
        low, high, ink = (tuple(rng.randrange(a, a + 96) for _ in "rgb") for a in (0, 64, 159))
        circle = rng.randrange(48, 80), rng.randrange(64, 192), rng.randrange(28, 48)
        corners, angle, fill = (3, 4, 6, 60)[kind], rng.randrange(360), None if hollow else ink
        image = ImageOps.colorize(Image.linear_gradient("L"), low, high)  # 256 x 256
        ImageDraw.Draw(image).regular_polygon(circle, corners, angle, fill, ink, 12)
        image.paste(ImageOps.mirror(image.crop((0, 0, 128, 256))), (128, 0))
        return image, self.targets[index]


def cache_images(
    source: Dataset, path: Path, shape: tuple[int, int, int, int], crop: int, num_workers: int
) -> None:
    """Decode a data set once, into a uint8 array N x C x S x S: a .npy file to be memory-mapped.

    Items of `source` are (PIL image, ...). Each image loses all but its central square, of side
    `crop` (0: its shorter side), and is resized, antialiased. The file appears complete or not at
    all; where another run is at it, its file is waited for and taken.
    Raises: UserError for too little free disk, and one that lists all unreadable images.
    """
    with lock(path.with_name(f".{path.name}.lock"), path.name, wait=True):
        if not path.exists():
            _decode(source, path, shape, crop, num_workers)


def _decode(
    source: Dataset, path: Path, shape: tuple[int, int, int, int], crop: int, num_workers: int
) -> None:
    free, size = shutil.disk_usage(path.parent).free, math.prod(shape)
    if size > free:
        has = f"{path.parent} has {free / 1e9:.2f} GB left"
        raise UserError(f"{has}, the decoded images need {size / 1e9:.2f} GB")
    say(f"decoding {shape[0]} images into {path} ({size / 1e6:.0f} MB), once")
    work, broken = functools.partial(_squares, source, shape[1:], crop), []
    workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(range(shape[0]), 64, num_workers=workers, collate_fn=work)
    with atomic(path) as temporary, Progress(shape[0], "decoding") as progress:
        array = create_array(temporary, shape)
        for first, (images, errors) in zip(range(0, shape[0], 64), loader):
            array[first : first + len(images)] = images
            broken += errors
            progress.update(len(images))
        array.flush()
        _stop_at_broken(broken)


def _squares(
    source: Dataset, shape: tuple[int, int, int], crop: int, indices: list[int]
) -> tuple[np.ndarray, list[str]]:
    """Central squares (N, C, S, S) of some images, and the errors of those that cannot be read."""
    images, errors = np.zeros((len(indices), *shape), np.uint8), []
    for row, index in zip(images, indices):
        try:
            image = source[index][0].convert({1: "L", 3: "RGB"}[shape[0]])
        except Exception as error:  # decoders fail in many ways; all are listed together
            name = getattr(source, "files", {index: f"image {index}"})[index]
            errors.append(f"{name}: {error or type(error).__name__}")
            continue
        side = min(crop or math.inf, *image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Not resize's own box: its filter would reach for pixels outside of it.
        image = image.crop((left, top, left + side, top + side))
        image = image.resize(shape[:0:-1], Image.Resampling.BILINEAR)
        row[:] = np.asarray(image).reshape(*shape[1:], -1).transpose(2, 0, 1)
    return images, errors


def _cached_size(size: tuple[int, int], side: int, fit: bool) -> tuple[int, int]:
    """(height, width) in the cache of a photograph of size (width, height)."""
    scale = side / min(size)
    if fit or scale > 1:
        size = [max(side, round(length * scale)) for length in size]
    return size[1], size[0]


def _decode_photos(
    source: Dataset, side: int, fit: bool, indices: list[int]
) -> list[np.ndarray | str]:
    """Photographs as uint8 (H, W, 3) in their size of the cache, or why one cannot be read."""
    found = []
    for index in indices:
        try:
            image = source[index][0].convert("RGB")
            height, width = _cached_size(image.size, side, fit)
            found += [np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))]
        except Exception as error:  # decoders fail in many ways; all are listed together
            name = getattr(source, "files", {index: f"image {index}"})[index]
            found += [f"{name}: {error or type(error).__name__}"]
    return found


def cache_photos(
    source: Dataset, indices: list[int], path: Path, side: int, fit: bool, small: bool,
    num_workers: int,
) -> None:  # fmt: skip
    """Decode photographs once, into one flat uint8 array and a table of their sizes beside it.

    With `fit` their shorter sides become `side` pixels, else only those of smaller ones.

    The array appears complete or not at all, after the table; where another run is at it, its file
    is waited for and taken. Raises: UserError for too little free disk, images smaller than `side`
    unless `small` ones are welcome, and all unreadable ones.
    """
    with lock(path.with_name(f".{path.name}.lock"), f"{path.stem}*", wait=True):
        if not path.exists():
            _fill_photos(source, indices, path, side, fit, small, num_workers)


def _fill_photos(
    source: Dataset, indices: list[int], path: Path, side: int, fit: bool, small: bool,
    num_workers: int,
) -> None:  # fmt: skip
    sizes, least = [], 0
    for index in indices:
        try:  # the header only
            with Image.open(source.files[index]) as image:
                size = image.size
        except AttributeError:  # no files: shapes
            size = source[index][0].size
        except Exception:  # decoding will say what is wrong with it, and with all others
            size = side, side
        least += min(size) < side
        sizes.append(_cached_size(size, side, fit))
    if least and not small:
        must = f"fit into each held-out image without --resize ({least} are smaller)"
        raise UserError(f"--img-size must {must}, got {side}")
    if least:
        warn(f"{least} of {len(sizes)} images are smaller than --img-size {side}: enlarged")
    ends = np.cumsum([0, *(height * width * 3 for height, width in sizes)])
    free, size = shutil.disk_usage(path.parent).free, int(ends[-1])
    if size > free:
        has = f"{path.parent} has {free / 1e9:.2f} GB left"
        raise UserError(f"{has}, the decoded images need {size / 1e9:.2f} GB")
    say(f"decoding {len(sizes)} images into {path} ({size / 1e6:.0f} MB), once")
    work, broken = functools.partial(_decode_photos, source, side, fit), []
    workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(indices, 16, num_workers=workers, collate_fn=work)
    with atomic(path) as temporary, Progress(len(sizes), "decoding") as progress:
        flat, images = create_array(temporary, (size,)), 0
        for image in itertools.chain.from_iterable(loader):
            if isinstance(image, str):
                broken.append(image)
            elif not broken:
                flat[ends[images] : ends[images + 1]] = image.reshape(-1)
            images += 1
            progress.update(1)
        flat.flush()
        _stop_at_broken(broken)
        with atomic(path.with_suffix(".sizes.npy")) as table, open(table, "wb") as file:
            np.save(file, np.array(sizes))


class Photos:
    """Decoded photographs of any sizes, in one flat memory-mapped array."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.names = path, names
        self.sizes = open_array(path.with_suffix(".sizes.npy"), (len(names), 2), np.int64)
        self.ends = np.cumsum(self.sizes.prod(axis=1) * 3)
        self.flat = open_array(path, (int(self.ends[-1]),))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """One photograph, uint8 (H, W, 3)."""
        height, width = self.sizes[index]
        pixels = self.flat[self.ends[index] - height * width * 3 : self.ends[index]]
        return pixels.reshape(height, width, 3)

    def crop(self, index: int, side: int, top: float, left: float) -> np.ndarray:
        """A square (3, side, side); top and left from 0 to below 1 say where, 0.5 is the centre."""
        free = self.sizes[index] - side + 1
        y, x = int(top * free[0]), int(left * free[1])
        return self[index][y : y + side, x : x + side].transpose(2, 0, 1)

    def centres(self, indices: Sequence[int], side: int) -> Tensor:
        """Central squares uint8 (N, 3, side, side)."""
        return torch.from_numpy(np.stack([self.crop(i, side, 0.5, 0.5) for i in indices]))


def folder_moments(
    net: Inception,
    paths: list[Path],
    args: Args,
    label: str,
    score: InceptionScore | None = None,
    first: int = 0,
) -> Moments:
    """Moments of image files of any sizes; their logits go to `score`, from index `first` on.

    Raises: UserError that lists every one of `paths` that cannot be read.
    """
    moments = Moments(device=net.device)
    moments.meta = {"protocol": net.protocol}
    loader = DataLoader(
        ImageFiles(paths), args.batch_size, num_workers=args.num_workers, collate_fn=list
    )
    broken: list[str] = []
    with Progress(len(paths), label) as progress:
        for batch in loader:
            broken += [item for item in batch if isinstance(item, str)]
            if not broken:  # else go on only to find the others
                # Resized one by one: sizes may differ, and the numbers are those of a batch.
                resized = [resize(image[None].to(net.device)) for image in batch]
                features, logits = net.embed(torch.cat(resized))
                moments.update(features)
                if score is not None:
                    score.update(logits, torch.arange(first, first + len(batch)))
            first += len(batch)
            progress.update(len(batch))
    _stop_at_broken(broken)
    return moments


def _stop_at_broken(items: list[Tensor | str]) -> None:
    broken = [item for item in items if isinstance(item, str)]
    if broken:
        raise UserError(f"{len(broken)} images cannot be read:\n  " + "\n  ".join(broken))


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, the first sub-folder; UserError for images outside of any."""
    classes: dict[str, list[Path]] = {}
    for path in image_files(folder):
        name, *inside = path.relative_to(folder).parts
        if not inside:
            raise UserError(f"--intra: {path} is in no class folder")
        classes.setdefault(name, []).append(path)
    return classes


# --------------------------------------------------------------------------------------------------
# 9. Pictures
# --------------------------------------------------------------------------------------------------
COLOURS = ("blue", "red", "green", "darkorange", "purple", "teal", "black")


def save_png(path: Path, image: Image.Image) -> None:
    """Write a picture, whole or not at all."""
    with atomic(path) as temporary:
        image.save(temporary, "PNG")


def write_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write uint8 images (N, C, H, W) as one PNG."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, padding=2 if len(images) > 1 else 0)
    save_png(path, Image.fromarray(grid.permute(1, 2, 0).numpy()))


def write_images(
    folder: Path, images: Tensor, columns: int, grid: Tensor | None = None, names: Any = ()
) -> None:
    """Write uint8 images (N, C, H, W) to folder/generated/ and as a grid, in process 0 only.

    As PNGs, in place of those that were there; by numbers, or by `names`, which may have folders.
    `grid` (M, C, H, W) are other cells for generated.png.
    """
    if processes()[0] > 0:
        return
    target = folder / "generated"
    for old in target.rglob("*.png"):
        old.unlink()
    for name, image in zip(names or (f"{i:05d}" for i in range(len(images))), images):
        path = target / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_grid(path, image[None], 1)
    write_grid(folder / "generated.png", images if grid is None else grid, columns)
    say(f"{len(images)} images in {target}, a grid in {folder / 'generated.png'}")


def run_label(folder: Path) -> str:
    """RANDOM_LABEL where the scores of a run folder's log are of random features, else nothing."""
    about = folder / "args.json"
    args = json.loads(about.read_text())["args"] if about.exists() else {}
    return RANDOM_LABEL if args.get("fid_weights") == "random" else ""


def plot(path: Path, log: Path, keys: list[str]) -> None:
    """Draw values of log.jsonl over the step, a panel for each key, as a PNG."""
    records = read_records(log)
    curves = {key: [(r["step"], r[key]) for r in records if key in r] for key in keys}
    curves = {key: points for key, points in curves.items() if points}
    image = Image.new("RGB", (640, 200 * max(1, len(curves))), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 10), "" if curves else f"none of {', '.join(keys)} is logged yet", "black")
    for top, (key, points) in zip(range(0, image.height, 200), curves.items()):
        steps, values = np.array(points).T
        x = np.interp(steps, [steps.min(), steps.max() + 1e-9], [20, 620])
        y = np.interp(values, [values.min(), values.max() + 1e-9], [top + 170, top + 30])
        draw.rectangle((20, top + 30, 620, top + 170), outline="grey")
        draw.line(list(zip(x.tolist(), y.tolist())), "blue", 2)
        draw.circle((x[-1].item(), y[-1].item()), 3, "blue")
        text = f"{key}: {values.min():.4g} to {values.max():.4g}, last {values[-1]:.4g}"
        text += f", step {steps[0]:.0f} to {steps[-1]:.0f}"
        label = f"; {run_label(log.parent)}" if key == "metric/fid" else ""
        draw.text((20, top + 10), text + label.rstrip("; "), "black")
    save_png(path, image)


def chart(
    path: Path, title: str, curves: dict[str, np.ndarray], twin: bool = False, **marks: int | None
) -> None:
    """Draw curves, name -> (K, 2) of step and value, as a PNG; marks are named vertical lines.

    On one scale; two of them with twin on their own, the first at the left, the other at the right.
    """
    curves = {name: curve for name, curve in curves.items() if len(curve)}
    points = np.concatenate([*curves.values(), np.zeros((int(not curves), 2))])
    image, steps = Image.new("RGB", (900, 480), "white"), (points[:, 0].min(), points[:, 0].max())
    draw, left, top, right, bottom = ImageDraw.Draw(image), 80, 60, 820, 420
    draw.rectangle((left, top, right, bottom), outline="grey")
    draw.text((left, 10), title if curves else f"{title}: nothing in the log", "black")

    def scaled(values: np.ndarray, scale: tuple[float, float], ends: tuple[int, int]) -> list:
        return np.interp(values, (scale[0], scale[1] + 1e-9), ends).tolist()

    for step in np.linspace(*steps, 6):
        x = scaled(step, steps, (left, right))
        draw.text((x, bottom + 6), f"{step:.0f}", "black", anchor="ma")
    for name, step in marks.items():
        if step is not None:
            x = scaled(step, steps, (left, right))
            draw.line((x, top, x, bottom), "grey", 2)
            draw.text((x + 3, bottom - 14), name, "black")
    for i, (name, curve) in enumerate(curves.items()):
        values, colour = (curve if twin else points)[:, 1], COLOURS[i % len(COLOURS)]
        scale, x = (values.min(), values.max()), scaled(curve[:, 0], steps, (left, right))
        draw.line(list(zip(x, scaled(curve[:, 1], scale, (bottom, top)))), colour, 2)
        draw.text((left + 150 * (i % 5), 28 + 14 * (i // 5)), name, colour)
        place, anchor = (right + 6, "lm") if i else (left - 6, "rm")
        for value in np.linspace(*scale, 5) if i <= twin else ():
            y = scaled(value, scale, (bottom, top))
            draw.text((place, y), f"{value:.4g}", colour if twin else "black", anchor=anchor)
    save_png(path, image)


def bars(path: Path, title: str, values: dict[str, float]) -> None:
    """Draw named values as bars from 0, as a PNG."""
    image = Image.new("RGB", (max(500, 110 * len(values) + 40), 300), "white")
    draw, highest = ImageDraw.Draw(image), max(values.values())
    draw.text((20, 10), title, "black")
    for i, (name, value) in enumerate(values.items()):
        x, y = 40 + 110 * i, 260 - 200 * value / max(highest, 1e-9)
        draw.rectangle((x, y, x + 70, 260), COLOURS[i % len(COLOURS)])
        draw.text((x + 35, y - 14), f"{value:.4g}", "black", anchor="ma")
        draw.text((x + 35, 266), name, "black", anchor="ma")
    save_png(path, image)


def named_rows(path: Path, title: str, rows: dict[str, Tensor]) -> None:
    """Write rows of uint8 images, name -> (n, 3, S, S), as a PNG with the title and the names."""
    side = max(row.shape[3] for row in rows.values())
    images = torch.cat([F.interpolate(row.cpu(), side) for row in rows.values()])
    grid = torchvision.utils.make_grid(images, len(images) // len(rows))
    image = Image.new("RGB", (grid.shape[2] + 110, grid.shape[1] + 30), "white")
    image.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (110, 30))
    draw = ImageDraw.Draw(image)
    draw.text((6, 8), title, "black")
    for i, name in enumerate(rows):
        draw.text((6, 30 + (i + 0.5) * grid.shape[1] / len(rows)), name, "black", anchor="lm")
    save_png(path, image)


# --------------------------------------------------------------------------------------------------
# 10. Main
# --------------------------------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """The device a --device flag names; auto is CUDA where there is any, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}") from error


def compare_images(args: Args) -> dict[str, Any]:
    """--sifid: one real image against each generated one."""
    paths = [args.generated] if args.generated.is_file() else image_files(args.generated)
    images = [ImageFiles([path])[0] for path in (args.real, *paths)]
    _stop_at_broken(images)
    trunk = load_sifid_trunk(args.weights, pick_device(args.device), args.sifid_dims)
    found = sifid(trunk, images[0], images[1:], args.sifid_dims)
    each = {str(path): value for path, value in zip(paths, found["values"])}
    result = {"sifid_mean": found["mean"], "sifid_std": found["std"], "sifid": each}
    counts = {"n_real": 1, "n_generated": len(paths)}
    return result | counts | {"protocol": trunk.protocol, "label": trunk.label}


def compare_folders(args: Args) -> dict[str, Any]:
    """FID, and with their flags Inception Score and intra-FID, of folders or stored moments."""
    given = {"REAL": args.real} | ({"GENERATED": args.generated} if args.generated else {})
    subject = list(given)[-1]
    # Everything that can be wrong with the input comes before the network is loaded.
    files = {side: image_files(path) for side, path in given.items() if path.suffix != ".npz"}
    stored = {side: Moments.load(path) for side, path in given.items() if side not in files}
    classes = {side: class_files(given[side]) for side in files if args.intra}
    score = InceptionScore(len(files[subject]), args.splits) if args.isc else None
    if any(path.suffix.lower() in (".jpg", ".jpeg") for path in files.get("GENERATED", ())):
        warn("GENERATED holds .jpg files: compression alone moves FID; save samples as .png")
    net = load_inception(args.weights, pick_device(args.device), args.dtype) if files else None
    whole = {side: Moments(device=net.device) for side in files} | stored

    def measure(side: str, paths: list[Path]) -> Moments:
        total = whole[side]
        scored = score if side == subject else None
        moments = folder_moments(net, paths, args, side, scored, first=total.n)
        total.merge(moments)
        total.meta = moments.meta
        return moments

    result: dict[str, Any] = {}
    if args.intra:
        lazy = [
            {name: functools.partial(measure, side, paths) for name, paths in groups.items()}
            for side, groups in classes.items()
        ]
        intra = intra_fid(*lazy)
        result = {f"intra_fid_{key}": intra[key] for key in ("mean", "min", "max")}
        result["intra_fid"] = intra["per_class"]
    else:
        for side, paths in files.items():
            measure(side, paths)
    metas = [moments.meta for moments in whole.values()]
    if len(given) == 2:
        check_protocols(*metas)
        warn_few(*whole.values())
        result["fid"] = frechet_distance(whole["REAL"], whole["GENERATED"])
    if score is not None:
        result["isc_mean"], result["isc_std"] = score.result()
    if args.save:
        whole[subject].save(args.save, **whole[subject].meta)
    result |= {f"n_{side.lower()}": whole[side].n for side in given}
    protocol = next((meta["protocol"] for meta in metas if "protocol" in meta), {})
    label = RANDOM_LABEL if protocol.get("weights") == "random" else ""
    return result | {"protocol": protocol, "label": label}


def as_text(result: dict[str, Any]) -> str:
    """One line for each number, with the label of random features."""
    tail = f"  ({result['label']})" if result["label"] else ""
    lines = []
    for key, value in result.items():
        if key == "intra_fid":
            value = {f"{k} ({v['n_real']}, {v['n_fake']})": v["fid"] for k, v in value.items()}
        if isinstance(value, float):
            lines.append(f"{key}: {value:.6g}{tail}")
        elif key in ("intra_fid", "sifid"):
            lines += [f"{key} of {name}: {number:.6g}{tail}" for name, number in value.items()]
        elif key != "label":
            lines.append(f"{key}: {'unknown' if value in (None, {}) else value}")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description="FID, Inception Score, intra-FID and SIFID of images.")
    with exit_codes():
        check_args(args)
        result = compare_images(args) if args.sifid else compare_folders(args)
        print(json.dumps(result) if args.json else as_text(result))


if __name__ == "__main__":
    main()
