"""Nothing lost, nobody surprised: kills, full disks, damaged files, runs and processes at once.

`pytest -m storm` runs the long tests: 20 kills of every script and model.
"""

import contextlib
import errno
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
import zlib
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, VARIANTS, tiny
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from test_errors import assert_mistake
from test_train import free_port, log, run_folder, same, state

import fid

MODULES = {script: importlib.import_module(script) for script in SCRIPTS}
# Not bf16 with an_inpaint's 1x1 maps: there PyTorch's CPU kernel of the gradient of a 5x5 weight
# leaves it uninitialised (2.6 and 2.15), so that no two runs agree.
MODELS = [
    (script, flags.replace(" --amp bf16", "") if script == "an_inpaint" else flags)
    for script in SCRIPTS
    for flags in ["", *VARIANTS[script]]
]
every_script = pytest.mark.parametrize("script", SCRIPTS)
QUICKLY = ("giu_gan", "an_inpaint")  # two kinds of data; the others share their text with these
some_scripts = pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[] if s in QUICKLY else pytest.mark.storm) for s in SCRIPTS],
)
every_model = pytest.mark.parametrize(("script", "flags"), MODELS)


@functools.cache
def forks():
    """Processes that start in no time: forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class FakeInception:
    """In place of Inception: 16 features, the means of 16 stripes, at once."""

    device, label = torch.device("cpu"), "not Inception"
    protocol = dict.fromkeys(("weights", "sha256", "resize", "dtype", "layer"), "none") | {
        "sha256": "0123456789"
    }

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = images.float().flatten(1) / 255
        features = values[:, : values.shape[1] // 16 * 16].unflatten(1, (16, -1)).mean(2)
        return features, features.repeat(1, 63)


def life(script: str, argv: list[str], cwd: Path, prepare: Callable, number: int) -> None:
    """What a process does: main() with quick evaluations; its output goes to out-<number>.txt."""
    os.chdir(cwd)
    with open(f"out-{number}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    fid.load_inception = lambda weights, device: FakeInception()
    fid.Moments.__init__.__defaults__ = 16, "cpu"
    fid.Moments.load.__func__.__defaults__ = (16,)
    # Event files are read in the order of their names, which hold the second.
    event_file_writer.time = types.SimpleNamespace(time=lambda: 1_700_000_000 + number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [f"{script}.py", *argv]
    prepare()
    MODULES[script].main()


def nothing() -> None:
    """Live on."""


BEGUN = []


@pytest.fixture(autouse=True)
def nobody_stays():
    """No process outlives its test, whatever becomes of it."""
    yield
    for process in BEGUN:
        process.kill()
    BEGUN.clear()


def begin(script: str, argv: list[str], cwd: Path, prepare: Callable = nothing, number: int = 0):
    """Start a script as a fork."""
    process = forks().Process(target=life, args=(script, argv, cwd, prepare, number))
    process.start()
    BEGUN.append(process)
    return process


def ended(process, seconds: float = 120) -> int:
    """The exit code of a fork."""
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for(path: Path, words: str, process=None) -> None:
    """Until a file has these words."""
    end = time.monotonic() + 60
    while not (path.exists() and words in path.read_text(errors="replace")):
        assert time.monotonic() < end and (process is None or process.is_alive()), path
        time.sleep(0.01)


def die_at(count: int) -> None:
    """SIGKILL right before the count-th thing done to the disk, or step of an evaluation."""
    left = [count]

    def step() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        writing = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writing or event in ("os.rename", "os.mkdir", "os.remove", "os.truncate"):
            step()

    def counted(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            step()
            return function(*args, **kwargs)

        return wrapped

    sys.addaudithook(watch)
    os.fsync, torch.save = counted(os.fsync), counted(torch.save)
    fid.Moments.update = counted(fid.Moments.update)
    event_file_writer.EventFileWriter.flush = counted(event_file_writer.EventFileWriter.flush)


def die_beyond(size: int) -> None:
    """The end of the process inside the write that makes a file longer than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_beyond(size: int, output: Path) -> None:
    """A write that makes a file longer than `size` bytes fails, as on a full disk."""
    pipe = os.open(output, os.O_WRONLY)  # which has no length
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_limited(script: str, argv: list[str], cwd: Path, size: int) -> tuple[int, str]:
    """Exit code and output of a run whose files may not be longer than `size` bytes."""
    pipe = cwd / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        prepare = functools.partial(full_beyond, size, pipe)
        code = ended(begin(script, argv, cwd, prepare))
        output = cwd / "limited.txt"
        output.write_bytes(os.read(reader, 60_000))
        return code, only_error(output)
    finally:
        os.close(reader)


def grow_tree(root: Path, count: int = 24, side: int = 72) -> None:
    """Images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def on_tree(script: str, flags: str, *more: str) -> list[str]:
    """Flags of a short run on a tree of images, with all that a run may do in its intervals."""
    every = "--total-steps 14 --log-every 1 --sample-every 5 --eval-every 4 --save-every 2"
    few = "--fid-num 10 --fid-batch-size 6 --num-samples 4 --dataset folder --data-dir data "
    few += "--fid-weights random"
    classes = ["--num-classes", "2"] if script == "an_gan" else []
    return [*tiny(script), *every.split(), *few.split(), *classes, *flags.split(), *more]


def points(folder: Path) -> dict:
    """What TensorBoard shows: tag -> [(step, value)]."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_curves_are_the_log(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curves = points(folder)
    assert curves.keys() == {key for record in records for key in record} - {"step"}
    for tag, curve in curves.items():
        logged = [(r["step"], r[tag]) for r in records if tag in r]
        assert [step for step, _ in curve] == [step for step, _ in logged], tag
        assert [v for _, v in curve] == pytest.approx([v for _, v in logged], rel=1e-6), tag


def assert_same_run(calm: Path, stormy: Path) -> None:
    """Bit for bit: checkpoints, log, curves, samples, decoded images, moments of the data."""
    one, two = (next((place / "runs").iterdir()) for place in (calm, stormy))
    assert log(one) == log(two)
    assert same(state(one), state(two))
    assert_curves_are_the_log(two)
    kept = sorted(path.name for path in one.glob("*.pt"))
    assert kept == sorted(path.name for path in two.glob("*.pt"))
    for name in kept:
        a, b = (torch.load(place / name, weights_only=True) for place in (one, two))
        assert same(a["parts"], b["parts"]) and a["step"] == b["step"], name
    for pattern in ("samples/*.png", "report.json"):
        names = [path.relative_to(one) for path in sorted(one.glob(pattern))]
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    for path in (calm / "data" / "cache").glob("[!.]*"):
        other = stormy / "data" / "cache" / path.name
        if path.suffix == ".npy":
            assert path.read_bytes() == other.read_bytes()
        else:
            a, b = np.load(path), np.load(other)
            assert all(np.array_equal(a[key], b[key]) for key in ("mu", "sigma"))
    assert not [*two.glob(".*.pt.*.tmp"), *(stormy / "data" / "cache").glob(".*npy.*.tmp")]


def storm(script: str, flags: str, kills: int, tmp_path: Path, seed: int) -> None:
    """Kill runs at random moments, go on each time, compare each that ends with a calm one."""
    rng, argv = random.Random(seed), on_tree(script, flags)
    calm, stormy, hits, number = tmp_path / "calm", tmp_path / "stormy", 0, 1
    for place in (calm, stormy):
        grow_tree(place / "data")
    began = time.monotonic()
    assert ended(begin(script, argv, calm)) == 0, (calm / "out-0.txt").read_text()
    whole = time.monotonic() - began
    checkpoint = next(calm.glob("runs/*/checkpoint.pt")).stat().st_size
    while hits < kills:
        kind, prepare, seconds = rng.choice(["event", "event", "bytes", "time"]), nothing, 120.0
        if kind == "event":
            prepare = functools.partial(die_at, rng.randrange(1, 50))
        elif kind == "bytes":
            size = int(math.exp(rng.uniform(math.log(300), math.log(1.2 * checkpoint))))
            prepare = functools.partial(die_beyond, size)
        else:
            seconds = rng.uniform(0.02, 0.5) * whole
        process = begin(script, [*argv, "--resume"], stormy, prepare, number)
        process.join(seconds)
        process.kill()
        process.join()
        said, number = (stormy / f"out-{number}.txt"), number + 1
        assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), said.read_text()
        hits += process.exitcode != 0
        if process.exitcode == 0 and hits < kills:  # it got through: the next one starts anew
            assert_same_run(calm, stormy)
            shutil.rmtree(stormy / "runs")
            shutil.rmtree(stormy / "data" / "cache")
    process = begin(script, [*argv, "--resume"], stormy, number=number)
    assert ended(process) == 0, (stormy / f"out-{number}.txt").read_text()
    assert_same_run(calm, stormy)


@every_script
def test_kills_at_any_moment_lose_nothing(script, tmp_path):
    storm(script, "", 3, tmp_path, seed=SCRIPTS.index(script))


@pytest.mark.storm
@every_model
def test_twenty_kills_of_every_model_lose_nothing(script, flags, tmp_path):
    storm(script, flags, 20, tmp_path, seed=MODELS.index((script, flags)))


# Two runs at once


def endless(script: str, *more: str) -> list[str]:
    """Flags of a run that saves each step and does not end by itself."""
    never = "--total-steps 100000 --sample-every 0 --eval-every 0 --save-every 1"
    return on_tree(script, "", *never.split(), *more)


def only_error(path: Path) -> str:
    """The one line of an error in the output of a process, without a traceback."""
    text = path.read_text(errors="replace")
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "Traceback" not in text and "Exception" not in text, text
    return line


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_is_gone(tmp_path):
    grow_tree(tmp_path / "data")
    first = begin("giu_gan", endless("giu_gan"), tmp_path)
    wait_for(tmp_path / "out-0.txt", "step 2/", first)
    second = begin("giu_gan", endless("giu_gan", "--resume"), tmp_path, number=1)
    assert ended(second, 20) == 2
    line = only_error(tmp_path / "out-1.txt")
    assert f"{run_folder()} is in use by process {first.pid} on {socket.gethostname()}" in line
    for number, mode in enumerate(("sample", "evaluate", "figures"), 2):
        reader = begin("giu_gan", endless("giu_gan", "--mode", mode), tmp_path, number=number)
        assert ended(reader) == 0, (tmp_path / f"out-{number}.txt").read_text()
    (run_folder() / ".checkpoint.pt.0123.tmp").write_text("of a killed run")
    assert first.is_alive()
    first.kill()
    first.join()
    third = begin("giu_gan", endless("giu_gan", "--resume"), tmp_path, number=5)
    wait_for(tmp_path / "out-5.txt", "step ", third)
    assert not (run_folder() / ".checkpoint.pt.0123.tmp").exists()
    third.kill()


def no_locks() -> None:
    """A file system without locks."""
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl.lockf = refuse


def slow_images(locks: bool = True) -> None:
    """A data set that takes a second to decode."""
    read = fid.open_image
    fid.open_image = lambda path: (time.sleep(0.05), read(path))[1]
    if not locks:
        no_locks()


def caches(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (place / "data/cache").glob("*.npy")}


@pytest.mark.parametrize("script", ["giu_gan", "an_inpaint"])  # of the two kinds of cache
@pytest.mark.parametrize("case", ["both", "killed", "no locks"])
def test_two_runs_that_decode_one_data_set_end_in_one_cache(script, case, tmp_path):
    flags = on_tree(script, "--eval-every 0 --sample-every 0 --total-steps 1")
    for place in ("calm", "two"):
        grow_tree(tmp_path / place / "data")
    assert ended(begin(script, flags, tmp_path / "calm")) == 0
    prepare, two = functools.partial(slow_images, case != "no locks"), tmp_path / "two"
    first = begin(script, flags, two, prepare)
    wait_for(two / "out-0.txt", "decoding", first)
    second = begin(script, [*flags, "--exp-name", "second"], two, prepare, number=1)
    if case != "no locks":
        wait_for(two / "out-1.txt", "waiting for it", second)
    if case == "killed":
        first.kill()
    assert ended(first) == (-signal.SIGKILL if case == "killed" else 0)
    assert ended(second) == 0
    said = (two / "out-1.txt").read_text()
    assert ("decoding" in said) == (case != "both") and "Traceback" not in said
    assert ("no locks here" in said) == (case == "no locks")
    assert caches(two) == caches(tmp_path / "calm") != {}
    assert not list((two / "data/cache").glob(".*.tmp"))


def test_temporary_names_of_equal_processes_on_two_machines_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with fid.atomic(tmp_path / "x") as one:
        one.write_text("one")
        with fid.atomic(tmp_path / "x") as two:
            two.write_text("two")
        assert (tmp_path / "x").read_text() == "two"
    assert (tmp_path / "x").read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_is_not_inherited_and_ends_with_its_file(tmp_path):
    """A worker that outlives its killed run must not keep the next one out."""
    taken = tmp_path / "taken"

    def refused() -> bool:
        process = forks().Process(target=fid.lock, args=(taken, "x"))
        process.start()
        return ended(process) == 1

    held = fid.lock(taken, "x")
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        assert refused()
        held.close()
        assert not refused()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Damaged files


@pytest.fixture
def checkpoint(call):
    """A checkpoint of a script and what it holds."""

    def make(script: str) -> tuple[Path, bytes, dict]:
        code, _, err = call(script, *tiny(script, "--total-steps", "1"))
        assert code == 0, err
        path = run_folder() / "checkpoint.pt"
        return path, path.read_bytes(), torch.load(path, weights_only=True)

    return make


def load_or_refuse(script: str, path: Path) -> dict | None:
    """The checkpoint, or None where it was refused in the way of a user's mistake."""
    try:
        return MODULES[script].load_checkpoint(path)
    except fid.UserError as error:
        assert "\n" not in str(error).strip() and str(path) in str(error)


def damage(script: str, made: tuple[Path, bytes, dict], cuts: int, flips: int) -> int:
    """Cut a checkpoint and flip its bits: it is refused, or what it holds is right."""
    (path, whole, state), rng, passed = made, random.Random(0), 0
    for size in [0, 1, len(whole) - 1, *rng.sample(range(len(whole)), cuts - 3)]:
        path.write_bytes(whole[:size])
        assert load_or_refuse(script, path) is None, f"cut to {size}"
    edges = [*range(600), *range(len(whole) - 1000, len(whole))]
    places = rng.sample(range(len(whole)), flips // 2) + rng.choices(edges, k=flips - flips // 2)
    for place in places:
        bits = bytearray(whole)
        bits[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bits)
        found = load_or_refuse(script, path)
        passed += found is not None
        assert found is None or same(found, state), f"a flipped bit of byte {place} went unseen"
    path.write_bytes(whole)
    assert same(load_or_refuse(script, path), state)
    return passed


@every_script
def test_cut_and_flipped_checkpoints_are_refused(script, checkpoint):
    passed = damage(script, checkpoint(script), *((100, 150) if script == "giu_gan" else (10, 10)))
    assert passed < 100  # of fillings and dates; a loader that sees nothing lets nearly all pass


def test_a_tensor_marked_as_a_folder_is_refused(checkpoint):
    """torch.load leaves it as the memory happens to be."""
    path, whole, _ = checkpoint("giu_gan")
    with zipfile.ZipFile(path) as archive:
        first = archive.start_dir
    marked = bytearray(whole)
    marked[first + 38] ^= 0x10  # the attributes of the first entry
    path.write_bytes(marked)
    assert load_or_refuse("giu_gan", path) is None


@pytest.mark.storm
@every_script
def test_many_cut_and_flipped_checkpoints_are_refused(script, checkpoint):
    damage(script, checkpoint(script), 100, 1000)


def renamed(states: dict) -> dict:
    return {f"old_{key}": value for key, value in states.items()}


def widened(states: dict) -> dict:
    return {k: torch.zeros(*v.shape, 2) if v.ndim else v for k, v in states.items()}


@every_script
def test_checkpoints_of_another_architecture_are_refused(script, checkpoint, call):
    path, _, good = checkpoint(script)
    G, D = good["parts"]["G"], good["parts"]["D"]
    cases = [
        {"G": renamed(G)}, {"G": widened(G)}, {"G": {}}, {"G": None}, {"D": D | {"more": G}},
        {"D": {**D, next(iter(D)): 3}}, {"g_opt": {}}, {"g_opt": {"state": {}, "param_groups": []}},
    ]  # fmt: skip
    for parts in cases:
        torch.save(good | {"parts": good["parts"] | parts}, path)
        before = path.read_bytes()
        result = call(script, *tiny(script, "--total-steps", "2", "--resume"))
        assert_mistake(result, rf"checkpoint\.pt is of another version, {next(iter(parts))}: ")
        if "g_opt" not in parts:
            result = call(script, *tiny(script, "--mode", "sample"))
            assert_mistake(result, r"checkpoint\.pt is of another version, [GD]: ")
        assert path.read_bytes() == before


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def bad_arrays(whole: bytes) -> list[bytes]:
    """What may stand in the place of a cache of images."""
    array = np.load(io.BytesIO(whole))
    rng = random.Random(0)
    cut = [whole[:size] for size in (0, 5, 100, 128, len(whole) // 2, len(whole) - 1)]
    other = [array.astype(np.int8), array[:-1], array.reshape(-1, 1), array.astype(np.float32)]
    other += [np.array([Evil()], dtype=object)]
    files = [*cut, *map(as_npy, other), pickle.dumps(Evil()), b"PK\x03\x04" + whole]
    for place in rng.sample(range(128), 60):
        files.append(
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        )
    return files


@pytest.mark.parametrize("script", ["giu_gan", "an_inpaint"])
def test_damaged_caches_are_named_and_nothing_in_them_runs(script, call, tmp_path):
    grow_tree(tmp_path / "data")
    flags = on_tree(script, "--eval-every 0 --total-steps 1")
    assert call(script, *flags)[0] == 0
    args, refused = tyro.cli(MODULES[script].Args, args=flags), 0
    for path in sorted((tmp_path / "data/cache").glob("*.npy")):
        whole = path.read_bytes()
        for bad in bad_arrays(whole):
            path.write_bytes(bad)
            if call_is_fine(lambda: load_data(script, args)):
                assert bad[128:] == whole[128:] and len(bad) == len(whole)  # blanks in the header
            else:
                refused += 1
        path.write_bytes(bad_arrays(whole)[4])
        shutil.rmtree("runs", ignore_errors=True)
        assert_mistake(call(script, *flags), rf"{path.name} is damaged.*delete it")
        path.write_bytes(whole)
    assert refused > 40 and not Path("executed").exists()
    assert call(script, *flags)[0] == 0


def load_data(script: str, args) -> None:
    """Open the data set of a run."""
    if script == "an_inpaint":
        for held_out in (False, True):
            MODULES[script].load_photos(args, held_out)
    else:
        MODULES[script].load_images(args)


def call_is_fine(function: Callable) -> bool:
    try:
        function()
    except fid.UserError as error:
        assert "is damaged" in str(error) and "\n" not in str(error)
        return False
    return True


def test_flipped_bits_in_moments_are_refused(tmp_path):
    moments, path = fid.Moments(8), tmp_path / "x.npz"
    moments.update(torch.randn(20, 8))
    moments.save(path, protocol={"a": 1}, size=[3, 8, 8])
    whole, rng = path.read_bytes(), random.Random(0)
    wrong = [dict(mu=np.array([Evil()] * 8, dtype=object), sigma=moments.sigma)]
    wrong += [dict(mu=moments.mu, sigma=moments.sigma[:4]), dict(mu=moments.mu[:, None])]
    for arrays in wrong:
        np.savez(path, **arrays)
        with pytest.raises(fid.UserError, match="x.npz"):
            fid.Moments.load(path, 8)
    assert not Path("executed").exists()
    for place in rng.sample(range(len(whole)), 400):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        )
        with contextlib.suppress(fid.UserError):
            found = fid.Moments.load(path, 8)
            assert np.array_equal(found.mu, moments.mu), place
            assert np.array_equal(found.sigma, moments.sigma), place
            assert found.n in (20, None), place


def test_a_log_without_its_end_is_read_and_a_damaged_one_named(tmp_path):
    log = tmp_path / "log.jsonl"
    assert fid.read_records(log) == []
    log.write_text('{"step": 1}\n{"step": 2, "lo')
    assert fid.read_records(log) == [{"step": 1}]
    for bad in ("\0\0\0\n", "[1, 2]\n", '"x"\n', "7\n"):
        log.write_text('{"step": 1}\n' + bad + '{"step": 2}\n')
        with pytest.raises(fid.UserError, match="log.jsonl: line 2 is damaged"):
            fid.read_records(log)


@pytest.mark.parametrize("script", ["giu_gan", "sagan_dogs"])
def test_figures_of_a_killed_run_with_half_a_line_in_its_log(script, call):
    assert call(script, *tiny(script))[0] == 0
    with open(run_folder() / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss/d')
    few = ["--fid-num", "10", "--fid-real", "12", "--fid-batch-size", "5"]
    code, _, err = call(script, *tiny(script, "--mode", "figures", "--fid-weights", "random", *few))
    assert code == 0, err


# Full disks


def assert_all_whole(folder: Path) -> None:
    """Every file that has its final name can be read; the log but for a last line without end."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["step"] > 0
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".npy", ".npz"):
            np.load(path)
        elif path.suffix == ".jsonl":
            fid.read_records(path)
        assert path.suffix != ".tmp", path


def fill_disk(script: str, flags: str, sizes: int, tmp_path: Path) -> None:
    """Runs that cannot write beyond a size, one line each; then the disk is free again."""
    argv, calm, full = on_tree(script, flags), tmp_path / "calm", tmp_path / "full"
    for place in (calm, full):
        grow_tree(place / "data")
    assert ended(begin(script, argv, calm)) == 0
    largest = max(p.stat().st_size for p in calm.rglob("*") if p.suffix in (".pt", ".npy"))
    for size in np.geomspace(20, largest - 1, sizes).astype(int).tolist():
        code, line = run_limited(script, [*argv, "--resume"], full, size)
        assert code == 2 and re.search("File too large|cannot write", line), line
        assert_all_whole(full)
    # With a checkpoint there: saving, logging and drawing fail, and it stays as it was.
    few = "--resume --total-steps 2 --eval-every 0 --sample-every 0"
    assert ended(begin(script, [*argv, *few.split()], full, number=1)) == 0
    folder = next((full / "runs").iterdir())
    before = (folder / "checkpoint.pt").read_bytes()
    for size in (200, 3_000, len(before) - 1):
        for more in (["--resume"], ["--mode", "sample"])[: 1 + (size == 200)]:
            code, line = run_limited(script, [*argv, *more], full, size)
            assert code == 2 and re.search("File too large|cannot write", line), line
            assert_all_whole(full)
        assert (folder / "checkpoint.pt").read_bytes() == before
    assert ended(begin(script, [*argv, "--resume"], full, number=2)) == 0
    assert_same_run(calm, full)


@pytest.mark.parametrize("script", ["giu_gan", "an_inpaint"])
def test_a_full_disk_is_one_line_and_costs_nothing(script, tmp_path):
    fill_disk(script, "", 3, tmp_path)


@pytest.mark.storm
@every_model
def test_a_full_disk_at_many_sizes_costs_no_model_anything(script, flags, tmp_path):
    fill_disk(script, flags, 12, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB that is really full at its end."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def blind() -> None:
    """The disk seems to have space: as with quotas, and where others fill it meanwhile."""
    shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)


@pytest.mark.parametrize("script", ["giu_gan", "an_inpaint"])
def test_a_disk_that_fills_up_while_decoding_is_no_bus_error(script, small_disk, tmp_path):
    grow_tree(tmp_path / "data", 300)
    (tmp_path / "data" / "cache").symlink_to(small_disk)
    flags = on_tree(script, "--eval-every 0")
    assert ended(begin(script, flags, tmp_path, blind)) == 2
    line = only_error(tmp_path / "out-0.txt")
    assert "cannot write" in line and "No space left on device" in line
    assert not list(small_disk.glob("[!.]*")) and not list(small_disk.glob(".*.tmp"))


def test_the_space_of_an_array_is_taken_at_once(tmp_path, monkeypatch):
    array = fid.create_array(tmp_path / "a.npy", (1000, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes and not array.any()


def no_space_for_curves() -> None:
    """The disk is full for TensorBoard's thread, from the first values on."""
    write, calls = event_file_writer.RecordWriter.write, []

    def full(self, data):
        calls.append(0)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    event_file_writer.RecordWriter.write = full


def test_a_full_disk_for_curves_is_one_line_too(tmp_path):
    grow_tree(tmp_path / "data")
    process = begin("giu_gan", on_tree("giu_gan", ""), tmp_path, no_space_for_curves)
    assert ended(process) == 2
    assert only_error(tmp_path / "out-0.txt") == "error: [Errno 28] No space left on device"


# Stops


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_stays(tmp_path):
    grow_tree(tmp_path / "data")
    process = begin("giu_gan", endless("giu_gan"), tmp_path, slow_third_save)
    wait_for(tmp_path / "out-0.txt", "saving slowly", process)
    before = state(run_folder())
    os.kill(process.pid, signal.SIGINT)
    wait_for(tmp_path / "out-0.txt", "SIGINT: finishing the step", process)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, 5) == -signal.SIGINT
    assert before["step"] == 2 and same(state(run_folder()), before)


def slow_third_save() -> None:
    """The third checkpoint takes a minute."""
    save, calls = torch.save, []

    def slow(*args, **kwargs):
        calls.append(0)
        if len(calls) > 2:
            print("saving slowly", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        save(*args, **kwargs)

    torch.save = slow


# Several processes


def join_in(rank: int, world: int, port: int) -> None:
    """One of several processes; says what it writes to the disk."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip

    def watch(event: str, args: tuple) -> None:
        writing = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if (writing and args[0] != os.devnull) or event in ("os.rename", "os.mkdir", "os.remove"):
            os.write(1, f"WROTE {args[0]}\n".encode())

    sys.addaudithook(watch)


def begin_together(script: str, argv: list[str], world: int, cwd: Path) -> list:
    port = free_port()
    return [
        begin(script, argv, cwd, functools.partial(join_in, rank, world, port), rank)
        for rank in range(world)
    ]


@some_scripts
def test_the_first_process_alone_writes(script, tmp_path):
    grow_tree(tmp_path / "data")
    argv = on_tree(script, "--total-steps 4 --batch-size 4")
    for process in begin_together(script, argv, 2, tmp_path):
        assert ended(process) == 0
    first, second = ((tmp_path / f"out-{rank}.txt").read_text() for rank in range(2))
    assert "WROTE" in first and "checkpoint.pt" in first
    assert second == ""


def join_without_batch_norm(rank: int, world: int, port: int) -> None:
    """Batch norm's statistics are each process's own."""
    join_in(rank, world, port)
    torch.nn.BatchNorm2d.forward = lambda self, x: x


def whole_batch(folder: Path) -> list[dict]:
    """The log without what is of a process's share of the batch: diagnostics and extremes."""
    share = re.compile(r"train/|.*_max$")
    return [{k: v for k, v in record.items() if not share.match(k)} for record in log(folder)]


@some_scripts
def test_one_two_and_three_processes_are_one_run(script, tmp_path):
    """Equal to rounding: log, evaluations, both checkpoints and which was the best."""
    argv = on_tree(script, "--total-steps 4 --batch-size 6 --eval-every 2 --hflip")
    kept = []
    for world in (1, 2, 3):
        place, port = tmp_path / str(world), free_port()
        grow_tree(place / "data")
        processes = []
        for rank in range(world):
            prepare = functools.partial(join_without_batch_norm, rank, world, port)
            processes.append(begin(script, argv, place, prepare, rank))
        for rank, process in enumerate(processes):
            assert ended(process) == 0, (place / f"out-{rank}.txt").read_text()
        kept.append(next((place / "runs").iterdir()))
    one, *others = kept
    for other in others:
        for a, b in zip(whole_batch(one), whole_batch(other), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
        for name in ("checkpoint.pt", "best.pt"):
            a, b = (torch.load(place / name, weights_only=True) for place in (one, other))
            assert a["step"] == b["step"] and a["best_fid"] == pytest.approx(
                b["best_fid"], rel=1e-3
            )
            for net in "GD":
                pairs = [(value, b["parts"][net][key]) for key, value in a["parts"][net].items()]
                away = torch.cat([(x - y).abs().flatten().float() for x, y in pairs])
                # Where a gradient is 0 but for rounding, Adam's steps go either way.
                assert (away < 1e-4).float().mean() > 0.98 and away.max() < 5e-3, net


@pytest.mark.parametrize("victim", [0, 2])
def test_the_end_of_one_process_ends_the_others_with_a_line(victim, tmp_path):
    grow_tree(tmp_path / "data")
    argv = endless("giu_gan", "--batch-size", "6")
    processes = begin_together("giu_gan", argv, 3, tmp_path)
    wait_for(tmp_path / "out-0.txt", "step 3/", processes[0])
    processes[victim].kill()
    for rank, process in enumerate(processes):
        code = ended(process, 60)
        if rank != victim:
            assert code == 2
            line = only_error(tmp_path / f"out-{rank}.txt")
            assert line.startswith("error: lost another process, which may have said why: ")
    assert MODULES["giu_gan"].load_checkpoint(run_folder() / "checkpoint.pt")["step"] >= 2


def test_the_end_of_the_decoding_process_ends_the_waiting_ones(tmp_path):
    grow_tree(tmp_path / "data", 400)
    processes = []
    port = free_port()
    for rank in range(2):
        prepare = functools.partial(join_slowly, rank, port)
        processes.append(begin("giu_gan", endless("giu_gan"), tmp_path, prepare, rank))
    wait_for(tmp_path / "out-0.txt", "decoding", processes[0])
    processes[0].kill()
    assert ended(processes[1], 60) == 2
    assert "lost another process" in only_error(tmp_path / "out-1.txt")


def join_slowly(rank: int, port: int) -> None:
    join_in(rank, 2, port)
    slow_images()


def torchrun(script: str, argv: list[str], cwd: Path) -> subprocess.Popen:
    """Two processes of a script by torchrun, in a group of their own; their output goes to files."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / f"{script}.py"), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(cwd / "out.txt", "w") as out, open(cwd / "err.txt", "w") as err:
        return subprocess.Popen(
            command, cwd=cwd, env=env, stdout=out, stderr=err, start_new_session=True
        )


@pytest.mark.parametrize("case", [
    "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.storm),
    pytest.param("Ctrl-C", marks=pytest.mark.storm),
    pytest.param("killed", marks=pytest.mark.storm),
])  # fmt: skip
def test_stops_and_deaths_under_torchrun(case, tmp_path):
    flags = "--total-steps 100000 --eval-every 0 --sample-every 0 --save-every 100000 --log-every 1"
    process = torchrun("giu_gan", tiny("giu_gan", *flags.split()), tmp_path)
    out = tmp_path / "out.txt"
    end = time.monotonic() + 60
    while "step 3/" not in out.read_text():
        assert time.monotonic() < end and process.poll() is None, (tmp_path / "err.txt").read_text()
        time.sleep(0.05)
    if case == "killed":
        (child, *_) = children(process.pid)
        os.kill(child, signal.SIGKILL)
    elif case == "Ctrl-C":  # the terminal signals the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, case))
    process.wait(60)
    text = (tmp_path / "err.txt").read_text()
    assert process.returncode != 0
    if case == "killed":
        assert 'File "' + str(ROOT) not in text  # torchrun's own traceback is not ours
    else:
        step = state(run_folder())["step"]
        assert f"stopped at step {step}" in out.read_text(), text


def children(pid: int) -> list[int]:
    """The processes that a process has started, of those that run a script of ours."""
    text = subprocess.run(["ps", "-o", "pid=,ppid=,args=", "-A"], capture_output=True, text=True)
    rows = (line.split(None, 2) for line in text.stdout.splitlines())
    return [int(own) for own, parent, args in rows if int(parent) == pid and "giu_gan.py" in args]


# Losses that are not finite


def poison(step: int, term: str, run_class: type) -> None:
    """One loss of one step becomes infinite."""
    collect = run_class.collect

    def poisoned(self, terms):
        if self.step + 1 == step:
            terms = terms | {term: terms[term] * float("inf")}
        return collect(self, terms)

    run_class.collect = poisoned


@pytest.mark.storm
@every_model
@pytest.mark.parametrize("term", ["loss/g", "loss/d", "grad/d_norm"])
def test_an_infinite_loss_stops_every_model_at_its_step(script, flags, term, tmp_path):
    grow_tree(tmp_path / "data")
    prepare = functools.partial(poison_script, script, term)
    assert ended(begin(script, on_tree(script, flags), tmp_path, prepare)) == 3
    line = only_error(tmp_path / "out-0.txt")
    assert re.fullmatch(rf"error: {term} is (inf|-inf|nan) at step 7", line)
    assert MODULES[script].load_checkpoint(run_folder() / "checkpoint.pt")["step"] == 6


def poison_script(script: str, term: str) -> None:
    poison(7, term, MODULES[script].Run)


# Trees of images


def png(mode: str = "RGB", size: tuple[int, int] = (72, 72), suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 3).save(file, suffix)
    return file.getvalue()


def huge() -> bytes:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    whole = bytearray(png())
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


NOISE = random.Random(0).randbytes(5000)
BROKEN = {
    "empty.png": b"", "cut.png": png()[:90], "cut.jpg": png(suffix="JPEG")[:400],
    "noise.png": NOISE, "page.jpg": b"<html>404</html>", "zeros.png": bytes(3000),
    "text.bmp": b"BM", "crc.png": png()[:50] + b"x" + png()[51:], "huge.png": huge(),
    "float.tiff": png("F", suffix="TIFF"), "cut.webp": png(suffix="WEBP")[:20],
    "header.png": png()[:16],
}  # fmt: skip


@every_script
@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_broken_image_is_named(script, name, call, tmp_path):
    grow_tree(tmp_path / "data", 22)
    (tmp_path / "data" / "b" / name).write_bytes(BROKEN[name])
    code, _, err = call(script, *on_tree(script, "--eval-every 0"))
    assert code == 2 and "Traceback" not in err
    assert re.search(rf"error: 1 images cannot be read:\n  data/b/{name}: .+", err)
    assert not Path("runs").exists() and not list(Path("data/cache").glob("[!.]*"))
    assert not list(Path("data/cache").glob(".*.tmp"))


WHOLE = {
    "grey.png": png("L"), "grey-alpha.png": png("LA"), "alpha.png": png("RGBA"),
    "palette.png": png("P"), "bits.png": png("1"), "sixteen.png": png("I;16"),
    "cmyk.jpg": png("CMYK", suffix="JPEG"), "wide.png": png(size=(400, 64)),
    "line.png": png(size=(1, 300)), "point.png": png(size=(1, 1)), "UPPER.JPEG": png(suffix="JPEG"),
    "name with spaces, ümläut.png": png(), "b\udcff.png": png(),
}  # fmt: skip


@every_script
def test_unusual_images_are_read(script, call, tmp_path):
    grow_tree(tmp_path / "data", 22)
    for name, content in WHOLE.items():
        (tmp_path / "data" / "a" / name).write_bytes(content)
    code, out, err = call(script, *on_tree(script, "--eval-every 0 --total-steps 1"))
    assert code == 0, err
    assert re.search(rf"decoding {22 + len(WHOLE) - (2 if script == 'an_inpaint' else 0)} ", out)


def test_links(tmp_path):
    grow_tree(tmp_path / "data", 6)
    (tmp_path / "data" / "again").symlink_to("a")  # wanted: twice
    assert len(fid.image_files("data")) == 9
    (tmp_path / "data" / "a" / "up").symlink_to("../..")
    (tmp_path / "data" / "b" / "round").symlink_to(".")
    assert len(fid.image_files("data")) == 9
    assert len(fid.image_files(tmp_path / "data")) == 9
    os.chdir("data")
    assert len(fid.image_files(".")) == 9
    Path("a", "nowhere.png").symlink_to("missing.png")
    with pytest.raises(OSError, match="nowhere.png"):
        fid.Folder(".")


@every_script
def test_a_link_to_nowhere_is_named(script, call, tmp_path):
    grow_tree(tmp_path / "data", 22)
    (tmp_path / "data" / "b" / "nowhere.png").symlink_to("missing.png")
    assert_mistake(call(script, *on_tree(script, "--eval-every 0")), r"data/b/nowhere\.png")


def test_a_folder_that_cannot_be_read_is_named_not_skipped(tmp_path, monkeypatch):
    grow_tree(tmp_path / "data", 6)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(fid.UserError, match=r"data/b cannot be read: Permission denied"):
        fid.image_files("data")
