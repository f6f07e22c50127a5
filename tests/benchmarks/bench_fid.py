"""What fid.py costs beside its peers, in one run: python tests/benchmarks/bench_fid.py

1. Images/s of the features against the networks of pytorch-fid and, where it is installed
   (`pip install torch-fidelity`), of torch-fidelity, on equal random weights, alternating. The
   latter resizes as TensorFlow does, so only its time compares.
2. Fréchet distance of 2048 features against the formula with scipy.linalg.sqrtm.
3. Peak memory of scoring 50,000 images, beyond that of the loaded network, the network replaced by
   a stand-in that costs nothing (its own activations depend on the batch, not on the images).
"""

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import fid


def seconds(function, *args):
    """(seconds, result) of one call; what runs on the GPU is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def features(batch=32, rounds=7):
    import pytorch_fid.inception

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        network = fid.Inception()
    state = fid._random_state(network)
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    theirs = pytorch_fid.inception.InceptionV3().eval().to(device)
    ours = fid.load_inception("random", device)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    peers = {
        "fid.py": lambda: ours(images)[0],
        "pytorch-fid": lambda: theirs(images.float() / 255)[0].flatten(1),
    }
    if third := fidelity(state, device):
        peers["torch-fidelity"] = lambda: third(images)[0]
    times, found = {name: [] for name in peers}, {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, work in peers.items():
                spent, found[name] = seconds(work)
                times[name] += [spent] * (turn > 0)  # the first one warms up
    a, b = found["fid.py"], found["pytorch-fid"]
    print(f"features ({device}, {torch.get_num_threads()} threads, batch {batch})")
    rates = {name: batch / statistics.median(spent) for name, spent in times.items()}
    for name, rate in rates.items():
        print(f"  {name}: {rate:.1f} images/s, fid.py's {rates['fid.py'] / rate:.2f} times that")
    print(f"  difference from pytorch-fid's {((a - b).norm() / b.norm()).item():.1e}")


def fidelity(state, device):
    """torch-fidelity's network with these weights, None where it is not installed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save(state, path)
        return FeatureExtractorInceptionV3("random", ["2048"], path).to(device)


def distance(n=5000, rounds=3):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(256, 2048))
    moments = []
    for shift in (0, 0.1):
        found = fid.Moments()
        noise = rng.normal(size=(n, 256)) @ mixing / 16 + rng.normal(size=(n, 2048)) + shift
        found.update(torch.from_numpy(np.maximum(noise, 0)))
        moments.append(found)
    a, b = moments
    ours, value = zip(*(seconds(fid.frechet_distance, a, b) for _ in range(rounds)))
    theirs, root = seconds(scipy.linalg.sqrtm, a.sigma @ b.sigma)
    difference = a.mu - b.mu
    expected = difference @ difference + np.trace(a.sigma + b.sigma - 2 * root.real)
    spent = statistics.median(ours)
    print(
        f"Fréchet distance, 2048-d: fid.py {spent:.2f} s, sqrtm {theirs:.2f} s, ratio "
        f"{theirs / spent:.1f}, relative difference {abs(value[0] / expected - 1):.1e}"
    )


class StandIn(fid.Inception):
    def embed(self, x):
        return torch.rand(len(x), 2048), torch.rand(len(x), 1008)


def memory(num=50_000, batch=50):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB

    def current():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    net = fid.load_inception("random")
    net.__class__ = StandIn
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    net(images)  # buffers of the resize
    before = current()  # not the peak: reading weights needs more than having them
    real = fid.dataset_moments(net, images.repeat(42, 1, 1, 1), batch)
    small = fid.score_generator(net, lambda first, count: images[:count], 2100, batch, real)
    middle = peak()
    fid.score_generator(net, lambda first, count: images[:count], num, batch, real)
    print(
        f"memory beyond the network: {middle - before:.0f} MiB with {small['n_fake']} images, "
        f"{peak() - before:.0f} MiB with {num}"
    )


if __name__ == "__main__":
    memory()  # first: the peak of a process never falls
    features()
    distance()
