"""What fid.py costs beside pytorch-fid: python tests/benchmarks/bench_fid.py

1. Images/s of the features against pytorch-fid's network, equal random weights, alternating.
2. Fréchet distance of 2048 features against the formula with scipy.linalg.sqrtm.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytorch_fid.inception
import scipy.linalg
import torch
from torchvision.models.inception import Inception3

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fid


def seconds(function, *args):
    """(seconds, result) of one call; what runs on the GPU is waited for."""
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def features(batch=32, rounds=7):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        state = fid.random_state(Inception3(1008, aux_logits=False, init_weights=False))
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    theirs = pytorch_fid.inception.InceptionV3().eval().to(device)
    ours = fid.load_inception("random", device)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    work = {
        "fid.py": lambda: ours(images)[0],
        "pytorch-fid": lambda: theirs(images.float() / 255)[0].flatten(1),
    }
    times, found = {name: [] for name in work}, {}
    for turn in range(rounds + 1):
        for name in work:
            spent, found[name] = seconds(work[name])
            times[name] += [spent] * (turn > 0)  # the first one warms up
    a, b = (batch / statistics.median(spent) for spent in times.values())
    difference = (found["fid.py"] - found["pytorch-fid"]).norm() / found["pytorch-fid"].norm()
    print(f"features ({device}, {torch.get_num_threads()} threads): fid.py {a:.1f} images/s,")
    print(f"  pytorch-fid {b:.1f}, ratio {a / b:.2f}, relative difference {difference.item():.1e}")


def distance(n=5000, rounds=3):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(256, 2048)) / 16
    a, b = (
        fid.Moments().update(torch.from_numpy(np.maximum(x, 0)))
        for x in (rng.normal(size=(n, 256)) @ mixing + rng.normal(size=(n, 2048)) for _ in "ab")
    )
    ours, values = zip(*(seconds(fid.frechet_distance, a, b) for _ in range(rounds)))
    theirs, root = seconds(scipy.linalg.sqrtm, a.sigma @ b.sigma)
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root.real)
    spent = statistics.median(ours)
    print(f"Fréchet distance: fid.py {spent:.2f} s, sqrtm {theirs:.2f} s, ratio")
    print(f"  {theirs / spent:.1f}, relative difference {abs(values[0] / expected - 1):.1e}")


if __name__ == "__main__":
    features()
    distance()
