# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "scipy", "tyro"]
# ///
"""Fréchet Inception Distance, Inception Score, intra-FID and SIFID: a library and a command.

    python fid.py REAL GENERATED                  # FID of two folders or .npz files of moments
    python fid.py REAL GENERATED --isc --intra    # also Inception Score and FID per class folder
    python fid.py REAL --save real.npz            # store the moments of REAL
    python fid.py photo.png samples/ --sifid      # one real image against generated ones

The protocol is pytorch-fid's, and the numbers agree to 1e-4: Inception-v3 of the 2015 TensorFlow
graph, RGB images as uint8, bilinear to 299x299 without antialias, 2x - 1, the 2048 features of the
last pool, covariance over N - 1, sums in float64; 1008 logits without bias. Papers: FID 1706.08500,
Inception Score 1606.03498, intra-FID 1802.05637 and SIFID 1905.01164 of arXiv.
"""

# ---- 1. Imports ----------------------------------------------------------------------------------
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception as tv

RELEASES = "https://github.com/mseitzer/pytorch-fid/releases/download"
FID_WEIGHTS_URL = f"{RELEASES}/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SIFID_WEIGHTS_URL = tv.Inception_V3_Weights.IMAGENET1K_V1.url
RANDOM_LABEL = "random features, comparable with nothing"
SUFFIXES = ".png .jpg .jpeg .jpe .jfif .bmp .webp .tif .tiff .ppm .pgm .gif .avif .jp2 .tga"


# ---- 2. Network ----------------------------------------------------------------------------------
class Inception(tv.Inception3):
    """Inception-v3 of the 2015 TensorFlow graph; `protocol` and `label` go with its numbers."""

    @torch.no_grad()
    def forward(self, images: Tensor, prepared: bool = False) -> tuple[Tensor, Tensor]:
        """Features (N, 2048) and logits (N, 1008) without bias of images, see `prepare`."""
        x = images.to(self.device) if prepared else prepare(images.to(self.device))
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, enabled=False):
            for layer in list(self.children())[:-2]:  # all but dropout and fc
                x = layer(x)
            features = x.flatten(1)
            return features, features @ self.fc.weight.T


class LastBlock(tv.InceptionE):
    """Inception's last block with a max pool in its fourth branch, the last 192 channels."""

    def forward(self, x: Tensor) -> Tensor:
        pool = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([super().forward(x)[:, :-192], pool], dim=1)


def exclude_padding(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Correct the average pool before `module`: torchvision's counts the zero padding."""
    weight = F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, stride=1, padding=1)
    return inputs[0].div_(weight)


def prepare(images: Tensor, resize: bool = True) -> Tensor:
    """Scale images (N, 1 or 3, H, W), uint8 or float in [0, 1], to [-1, 1]; resize to 299x299."""
    if images.is_floating_point():
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError("images must be uint8, or float in [0, 1]")
        images = images.mul(255).round()  # the levels of a PNG file
    x = images.float().div_(255)
    return 2 * (F.interpolate(x, (299, 299), mode="bilinear") if resize else x) - 1


def load_inception(weights: str = "auto", device: Any = "cpu") -> Inception:
    """Load the network of FID and Inception Score; turn TF32 off, which would change the features.

    `weights` is "auto" (torch.hub's cache, else download), a path, or "random" (seeded, for tests).
    """
    with torch.device("meta"):  # no initialisation, which would be thrown away
        net = Inception(num_classes=1008, aux_logits=False, init_weights=False)
        for block in net.children():
            if isinstance(block, tv.InceptionA | tv.InceptionC | tv.InceptionE):
                block.branch_pool.register_forward_pre_hook(exclude_padding)
        net.Mixed_7c = LastBlock(2048)
    return load_weights(net, FID_WEIGHTS_URL, weights, device, "bilinear, no antialias", "pool3")


def load_weights(net: Any, url: str, weights: str, device: Any, resize: str, layer: str) -> Any:
    """Give `net` its weights, fold its batch norms, set its device, protocol and label."""
    path, auto, random = Path(weights).expanduser(), weights == "auto", weights == "random"
    try:
        if auto:
            path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        digest = "random" if random else hashlib.sha256(path.read_bytes()).hexdigest()
        if auto and digest[:8] != path.stem[-8:]:  # the hub checks only what it downloads
            raise ValueError(f"the file is damaged, its SHA-256 begins {digest[:8]}")
        state = random_state(net) if random else torch.load(path, "cpu", weights_only=True)
        net.load_state_dict({k: state[k] for k in net.state_dict() if k in state}, assign=True)
    except Exception as error:  # garbage makes torch.load raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load {path}: {reason}; see --weights (--fid-weights)") from error
    for module in list(net.eval().modules()):
        if isinstance(module, tv.BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    net.device, net.label = torch.device(device), RANDOM_LABEL if random else ""
    net.protocol = {"weights": path.name, "sha256": digest, "resize": resize, "layer": layer}
    return net.requires_grad_(False).to(device, memory_format=torch.channels_last)


def random_state(net: nn.Module) -> dict[str, Tensor]:
    """Seeded weights for tests."""
    generator, state = torch.Generator().manual_seed(0), {}
    for key, value in net.state_dict().items():
        state[key] = torch.full_like(value, key.endswith(("bn.weight", "var")), device="cpu")
        if value.ndim > 1:
            nn.init.kaiming_normal_(state[key], generator=generator)
    return state


# ---- 3. Statistics -------------------------------------------------------------------------------
class Moments:
    """Mean `mu` (dims,) and covariance `sigma` (dims, dims) of `n` features, streamed in float64.

    `n` is None in a file that does not say; `meta` is what a file says besides.
    """

    def __init__(self, dims: int = 2048, device: Any = "cpu") -> None:
        self.n, self.meta = 0, {}
        # Sum of (x, 1) (x, 1)^T: the last row holds the sum of x and the count.
        self._sums = torch.zeros(dims + 1, dims + 1, dtype=torch.float64, device=device)
        self._stored: tuple[np.ndarray, ...] = ()  # mu and sigma of a file

    def update(self, features: Tensor) -> "Moments":
        """Add features (N, dims)."""
        x = F.pad(features.to(self._sums), (0, 1), value=1)
        self._sums.addmm_(x.T, x)
        self.n += len(x)
        return self

    @property
    def mu(self) -> np.ndarray:
        return self._stored[0] if self._stored else (self._sums[-1, :-1] / self.n).cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        if self._stored:
            return self._stored[1]
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}")
        outer, total = self._sums[:-1, :-1], self._sums[-1, :-1]
        return ((outer - total.outer(total / self.n)) / (self.n - 1)).cpu().numpy()

    def save(self, path: str | Path, **meta: Any) -> None:
        """Write an .npz: mu and sigma, which pytorch-fid reads, n, and `meta` as JSON."""
        texts = {key: json.dumps(value) for key, value in meta.items()}
        temporary = Path(path).with_name(f".{os.getpid()}.{Path(path).name}")
        try:
            with open(temporary, "wb") as file:  # a name would get a suffix
                np.savez(file, mu=self.mu, sigma=self.sigma, n=self.n or 0, **texts)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, dims: int = 2048) -> "Moments":
        """Read what `save` or pytorch-fid wrote. Raises: ValueError for any other file."""
        moments = cls(0)
        try:
            with np.load(path, allow_pickle=False) as file:
                mu, sigma = (file[key].astype(np.float64) for key in ("mu", "sigma"))
                meta = {key: json.loads(str(file[key])) for key in file if not file[key].ndim}
            if mu.shape != (dims,) or sigma.shape != (dims, dims):
                raise ValueError(f"mu is {mu.shape}, sigma {sigma.shape}, not of {dims} features")
        except Exception as error:  # a damaged archive makes numpy raise nearly anything
            raise ValueError(f"{path} is not an .npz of moments: {error}") from error
        moments._stored, moments.n, moments.meta = (mu, sigma), meta.pop("n", 0) or None, meta
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = L L^T, the trace of the root is the sum of the roots of the eigenvalues of L^T B L. The
    Cholesky factorisation with pivots ends at the rank of A: few images are no special case.
    """
    protocols = [m.meta["protocol"] | {"weights": "any"} for m in (a, b) if "protocol" in m.meta]
    if len(protocols) == 1:
        warnings.warn("moments without protocol metadata: made by another tool?")
    if len(protocols) == 2 and protocols[0] != protocols[1]:
        raise ValueError(f"moments of different protocols: {protocols[0]} and {protocols[1]}")
    a, b = sorted((a, b), key=lambda moments: moments.n or np.inf)  # the lower rank first
    A, B, difference = a.sigma, b.sigma, a.mu - b.mu
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise ValueError("the features are not finite: broken weights or images?")
    if a.n and a.n <= len(A):
        warnings.warn(f"{a.n} images, {len(A)} features: FID is biased, compare at equal N only")
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(A, lower=1)
    L = np.tril(packed[:, :rank])[np.argsort(pivots)]
    eigenvalues = scipy.linalg.eigvalsh(L.T @ (B @ L)) if rank else np.zeros(0)
    root_trace = np.sqrt(eigenvalues.clip(min=0)).sum()  # rounding leaves tiny negatives
    return max(float(difference @ difference + np.trace(A + B) - 2 * root_trace), 0.0)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score of logits (N, classes): mean and standard deviation (over N) of the splits.

    The images are shuffled, because in the order of their classes they would score far too low.
    """
    if len(logits) < splits:
        raise ValueError(f"Inception Score of {len(logits)} images cannot use {splits} splits")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for rows in order.tensor_split(splits):
        log_p = logits[rows].double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - np.log(len(rows))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ---- 4. Scores -----------------------------------------------------------------------------------
def batches(num: int, batch_size: int, label: str) -> Iterator[tuple[int, int]]:
    """Yield the batches of 0 .. num - 1 as (first, count); print progress every 5 s."""
    start = printed = time.monotonic()
    for first in range(0, num, batch_size):
        yield first, min(batch_size, num - first)
        if time.monotonic() - printed >= 5:
            printed, done = time.monotonic(), min(first + batch_size, num)
            print(f"{label}: {done}/{num}, {done / (printed - start):.3g}/s", file=sys.stderr)


def dataset_moments(
    net: Inception, images: Any, batch_size: int, cache: Path | None = None, label: str = "real"
) -> Moments:
    """Moments of uint8 images (N, C, H, W).

    The .npz `cache` is read if it is of as many images of this size and protocol, else written.
    """
    meta = {"protocol": net.protocol, "size": list(images.shape[1:])}
    try:
        found = Moments.load(cache) if cache else Moments(0)
    except ValueError:  # there is none, or a damaged one
        found = Moments(0)
    if found.n == len(images) and found.meta == meta:
        return found
    moments = Moments(device=net.device)
    moments.meta = meta
    for first, count in batches(len(images), batch_size, f"{label} images"):
        batch = images[first : first + count]
        if not isinstance(batch, Tensor):
            batch = torch.tensor(batch)  # a copy: a memory map may be read-only
        moments.update(net(batch)[0])
    if cache:
        try:
            moments.save(cache, **meta)
        except OSError as error:
            warnings.warn(f"the moments are not kept in {cache}: {error}")
    return moments


def score_generator(
    net: Inception, generate: Callable[[int, int], Tensor], num: int, batch_size: int,
    real: Moments, splits: int = 10, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """FID and Inception Score of `num` generated images.

    generate(first, count) returns the uint8 images first .. first + count - 1 of a fixed sequence.
    """
    fake, logits = Moments(device=net.device), torch.zeros(num, 1008, device=net.device)
    fake.meta = {"protocol": net.protocol}
    for first, count in batches(num, batch_size, "generated images"):
        features, logits[first : first + count] = net(generate(first, count))
        fake.update(features)
    scores = {"fid": frechet_distance(real, fake), "n_fake": num, "n_real": real.n}
    if logits.any():
        scores["is_mean"], scores["is_std"] = inception_score(logits.cpu(), splits, seed)
    else:
        warnings.warn("the weights have no output layer: no Inception Score")
    return scores


def intra_fid(real: Mapping[str, Any], fake: Mapping[str, Any]) -> dict[str, Any]:
    """FID of each class, and the mean over classes, which all weigh the same.

    `real` and `fake` map a class to its Moments (34 MB), or to a function that returns them.
    """
    if names := set(real) ^ set(fake):
        raise ValueError(f"intra-FID: on one side only: class {', '.join(sorted(names))}")
    classes = {}
    for name in sorted(real):
        a, b = (m if isinstance(m, Moments) else m() for m in (real[name], fake[name]))
        classes[name] = {"fid": frechet_distance(a, b), "n_real": a.n, "n_fake": b.n}
    fids = [entry["fid"] for entry in classes.values()]
    return {"mean": sum(fids) / len(fids), "min": min(fids), "max": max(fids), "per_class": classes}


def load_sifid_trunk(weights: str = "auto", device: Any = "cpu", dims: int = 64) -> nn.Module:
    """Load torchvision's ImageNet Inception-v3, of which SIFID uses the first layers."""
    with torch.device("meta"):
        net = tv.Inception3(init_weights=False)
    return load_weights(net, SIFID_WEIGHTS_URL, weights, device, "none", f"before max pool, {dims}")


def sifid(trunk: Any, real: Tensor, fakes: Iterable[Tensor], dims: int = 64) -> dict[str, Any]:
    """Fréchet distance of one real image from each generated one; a position is a sample.

    As in SinGAN: torchvision's weights, no resize, 64 features (its code, behind the published
    numbers) or 192 (its text). Images are (C, H, W) of any size, uint8 or float in [0, 1].
    """

    def moments(image: Tensor) -> Moments:
        x = prepare(image[None].to(trunk.device), resize=False).expand(-1, 3, -1, -1)
        with torch.no_grad(), torch.autocast(trunk.device.type, enabled=False):
            for layer in list(trunk.children())[: 3 if dims == 64 else 6]:
                x = layer(x)
        if x[0, 0].numel() <= dims:
            size = "x".join(map(str, image.shape[1:]))
            raise ValueError(f"SIFID: {size} has too few positions for {dims} features")
        return Moments(dims).update(x[0].flatten(1).T)

    reference = moments(real)
    values = [frechet_distance(reference, moments(fake)) for fake in fakes]
    mean, std = float(np.mean(values)), float(np.std(values))
    return {"mean": mean, "std": std, "values": values, "positions": reference.n}


# ---- 5. Folders ----------------------------------------------------------------------------------
def image_files(folder: str | Path, skip: Iterable[str | Path] = ()) -> list[Path]:
    """All image files under `folder`, sorted; links are followed, but not in circles.

    Left out: `skip`, hidden names, __MACOSX, and run folders (with args.json or checkpoint.pt).
    """
    folder, images, others = Path(folder).expanduser(), [], []

    def visit(place: Path, excluded: set[Path]) -> None:
        if {"args.json", "checkpoint.pt"} & {*os.listdir(place)} or place.resolve() in excluded:
            return
        for path in map(Path, os.scandir(place)):
            if path.is_dir() and not path.name.startswith((".", "__MACOSX")):
                visit(path, excluded | {place.resolve()})
            elif not path.name.startswith((".", "__MACOSX")):
                (images if path.suffix.lower() in SUFFIXES.split() else others).append(path)

    visit(folder, {Path(path).resolve() for path in skip} - {folder.resolve()})
    if not images:
        raise ValueError(f"no images ({SUFFIXES}) under {folder}; a run's are in generated/STEP")
    if others:
        warnings.warn(f"{folder}: {len(others)} other files are skipped, as {others[0].name}")
    return sorted(images)


def open_image(path: str | Path) -> Image.Image:
    """Open an image file as RGB, 16 bits scaled to 8; alpha is dropped and EXIF ignored."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                image = Image.fromarray(np.uint8((np.asarray(image) / 257).round().clip(0, 255)))
            return image.convert("RGB")
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error


def folder_moments(
    net: Inception, files: list[Path], batch_size: int, logits: Tensor | None = None
) -> Moments:
    """Moments of image files of any sizes; `logits` (N, 1008) is filled with theirs if given."""

    def read(path: Path) -> Tensor:
        rgb = np.asarray(open_image(path))
        # By channel, because a large photograph takes four times its memory as floats.
        return torch.cat([prepare(torch.tensor(rgb[None, None, ..., c])) for c in range(3)], dim=1)

    moments = Moments(device=net.device)
    moments.meta = {"protocol": net.protocol, "label": net.label}
    # Pillow releases the lock: threads decode a batch while the network works on the one before.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        ahead = pool.map(read, files[:batch_size])
        for first, count in batches(len(files), batch_size, str(files[0].parent)):
            batch = torch.cat(list(ahead))
            ahead = pool.map(read, files[first + count :][:batch_size])
            features, found = net(batch, prepared=True)
            moments.update(features)
            if logits is not None:
                logits[first : first + count] = found
    return moments


# ---- 6. Main -------------------------------------------------------------------------------------
@dataclass
class Args:
    real: tyro.conf.Positional[Path]  # folder of real images, .npz moments, or (--sifid) an image
    generated: tyro.conf.Positional[Path | None] = None  # the same of generated images
    isc: bool = False  # also the Inception Score of GENERATED (of REAL, if that is alone)
    intra: bool = False  # also the FID of each class: subfolders of equal names on both sides
    sifid: bool = False  # only the single-image FID of REAL against each image of GENERATED
    sifid_dims: Literal[64, 192] = 64  # features of SIFID: 64 as SinGAN's code, 192 as its text
    save: Path | None = None  # write the moments of GENERATED (of REAL, if alone) to this new .npz
    splits: int = 10  # parts the images are shuffled into for the Inception Score
    weights: str = "auto"  # Inception weights: auto (find or download), a path, or random (tests)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1 ...
    batch_size: int = 16  # images per pass of the network: changes speed and memory only
    json: bool = False  # print one JSON object on one line


def compare_folders(args: Args) -> dict[str, Any]:
    """FID, and with their flags Inception Score and intra-FID, of folders or stored moments."""
    paths = [path for path in (args.real, args.generated) if path]
    stored = {path: Moments.load(path) for path in paths if path.suffix == ".npz"}
    if stored and (args.intra or args.isc and paths[-1] in stored):
        raise ValueError("--isc and --intra need folders of images")
    files = {path: image_files(path) for path in paths if path not in stored}
    if args.intra:
        classes = {p / f.relative_to(p).parts[0] for p in files for f in files[p]}
        sides = [{f.name for f in classes if f.parent == path} for path in paths]
        if odd := sides[0] ^ sides[1]:
            raise ValueError(f"--intra: on one side only: class {', '.join(sorted(odd))}")
        files |= {folder: image_files(folder) for folder in sorted(classes)}
    for folder, images in files.items():
        if len(images) < (least := args.splits if args.isc and folder == paths[-1] else 2):
            raise ValueError(f"{folder}: at least {least} images are needed, got {len(images)}")
    net = load_inception(args.weights, args.device) if files else None
    if args.isc and not net.fc.weight.any():
        raise ValueError(f"--isc: {net.protocol['weights']} has no output layer")
    measure = {f: partial(folder_moments, net, files[f], args.batch_size) for f in files}
    if args.isc:  # else 4 KB an image for nothing
        logits = torch.zeros(len(files[paths[-1]]), 1008)
        measure[paths[-1]] = partial(measure[paths[-1]], logits)
    moments = [stored[path] if path in stored else measure[path]() for path in paths]
    result = {f"n_{side}": m.n for side, m in zip(("real", "generated"), moments)}
    if args.generated:
        result["fid"] = frechet_distance(*moments)
    if args.isc:
        result["isc_mean"], result["isc_std"] = inception_score(logits, args.splits)
    if args.intra:
        sides = ({f.name: measure[f] for f in files if f.parent == path} for path in paths)
        result["intra_fid"] = intra_fid(*sides)
    if args.save:
        moments[-1].save(args.save, **moments[-1].meta)
    return result | moments[0].meta | moments[-1].meta


def compare_images(args: Args) -> dict[str, Any]:
    """SIFID of one real image against each generated one."""
    paths = [args.generated] if args.generated.is_file() else image_files(args.generated)
    images = (torch.tensor(np.array(open_image(p))).permute(2, 0, 1) for p in (args.real, *paths))
    real = next(images)
    trunk = load_sifid_trunk(args.weights, args.device, args.sifid_dims)
    result = sifid(trunk, real, images, args.sifid_dims)
    values = dict(zip(map(str, paths), result.pop("values")))
    return {"sifid": result | {"values": values}, "protocol": trunk.protocol, "label": trunk.label}


def main() -> None:
    """Run the command line; exit with code 2 and one line if what the user gave cannot work."""
    args = tyro.cli(Args, description="FID, Inception Score, intra-FID and SIFID of images.")
    warnings.formatwarning = lambda message, *_: f"WARNING: {message}\n"
    try:
        if args.generated is None and (args.sifid or args.intra or not (args.isc or args.save)):
            raise ValueError("GENERATED is missing; REAL alone goes with --isc and --save")
        if args.save and (args.save.suffix != ".npz" or args.save.exists()):
            raise ValueError(f"--save must name a new .npz file, got {args.save}")
        result = compare_images(args) if args.sifid else compare_folders(args)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last: no CUDA build
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(result, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
