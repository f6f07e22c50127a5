"""Speed of the Stanford Dogs data path and of fused attention, on this machine's CPU or GPU.

    python tests/benchmarks/bench_sagan_dogs.py

Prints the images per second of decoding (once, into the cache) and of batch delivery (always) with
their ratio, the same batches decoded anew by a DataLoader, and forward and backward of attention,
fused against explicit, in one process. Made-up photographs of the data set's median box.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sagan_dogs
from test_sagan_dogs import annotation, put

IMAGES, BATCHES = 256, 200


def photographs(root: Path) -> None:
    """500x375 JPEGs of smooth noise with a box of 270x285."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        noise = rng.integers(0, 256, (24, 32, 3), np.uint8)
        image = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
        put(
            root, "n02085620-Chihuahua", f"n02085620_{i}.jpg", image, annotation((90, 40, 359, 324))
        )


def seconds(work, repeats: int = 3) -> float:
    """Shortest of several runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def data(root: Path) -> None:
    args = sagan_dogs.Args(data_dir=str(root), num_workers=0)
    photographs(root)
    start = time.perf_counter()
    images, labels, _ = sagan_dogs.load_images(args)
    decode = IMAGES / (time.perf_counter() - start)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = sagan_dogs.endless_batches(images, labels, args, device, 0)
    next(batches)
    deliver = BATCHES * args.batch_size / seconds(lambda: [next(batches) for _ in range(BATCHES)])
    source = sagan_dogs.StanfordDogs(root, args.boxes, args.aspect, args.img_size)
    loader = DataLoader(
        source, args.batch_size, collate_fn=lambda items: np.stack([i[0] for i in items])
    )
    anew = IMAGES / seconds(lambda: [torch.from_numpy(batch).to(device) for batch in loader], 1)
    print(f"decoding, once          {decode:10.0f} images/s")
    print(f"batches from the cache {deliver:10.0f} images/s, {deliver / decode:.0f} x decode")
    print(f"DataLoader, decoding anew {anew:10.0f} images/s, the cache {deliver / anew:.0f} x that")


def attention() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for channels, side in ((128, 16), (64, 32)):
        block = sagan_dogs.SelfAttention(channels).to(device)
        x = torch.randn(16, channels, side, side, device=device, requires_grad=True)

        def explicit(x: torch.Tensor) -> torch.Tensor:
            mixed = block.value(x).flatten(2) @ block.attention_map(x).transpose(1, 2)
            return x + block.gamma * mixed.unflatten(2, x.shape[2:])

        fused = seconds(lambda: block(x).sum().backward())
        plain = seconds(lambda: explicit(x).sum().backward())
        print(f"attention {channels}x{side}x{side}, batch 16: fused {1e3 * fused:.1f} ms, "
              f"explicit {1e3 * plain:.1f} ms, {plain / fused:.2f} x")  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data(Path(folder))
    attention()
