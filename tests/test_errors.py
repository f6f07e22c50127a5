"""A user's mistakes: exit code 2, one line on stderr that says flag, rule, value and way out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHAPES, start, tiny
from PIL import Image

every_script = pytest.mark.parametrize("script", SCRIPTS)

# Flags that are wrong in every script, and what the message must say.
COMMON = [
    (["--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
    (["--total-steps", "0"], r"--total-steps must be at least 1"),
    (["--log-every", "0"], r"--log-every must be at least 1"),
    (["--save-every", "-1"], r"--save-every must be at least 1, got -1"),
    (["--eval-every", "-5"], r"--eval-every must be at least 0"),
    (["--n-critic", "0"], r"--n-critic must be at least 1"),
    (["--g-lr", "-1"], r"--g-lr must be at least 0"),
    (["--d-lr", "nan"], r"--d-lr must be at least 0, got nan"),
    (["--g-lr", "inf"], r"--g-lr must be at least 0, got inf"),
    (["--beta1", "1"], r"--beta1 must be below 1"),
    (["--beta2", "1.5"], r"--beta2 must be below 1"),
    (["--seed", "-1"], r"--seed must be at least 0"),
    (["--fid-num", "9"], r"--fid-num must be at least 10"),
    (["--num-samples", "0"], r"--num-samples must be at least 1"),
    (["--num-workers", "-2"], r"--num-workers must be at least 0"),
    (["--device", "cuda"], r"--device must be cpu.*got cuda"),
    (["--device", "quantum"], r"--device must be"),
    (["--checkpoint", "x.pt"], r"--checkpoint must stay empty with --mode train"),
    (["--mode", "evaluate", "--resume"], r"--resume must go with --mode train, got evaluate"),
    (["--mode", "sample", "--checkpoint", "nowhere.pt"], r"nowhere.pt is missing"),
    (["--mode", "evaluate"], r"checkpoint.pt is missing"),
    (["--dataset", "folder", "--data-dir", "nowhere"], r"nowhere does not exist"),
    (["--dataset", "folder", "--data-dir", "."], r"no images"),
    (["--batch-size", "6000"], r"--batch-size must be at most 5000"),
]
CASES = {
    "giu_gan": [
        (["--kernel-size", "4"], r"--kernel-size must be odd, got 4"),
        (["--img-size", "48"], r"--img-size must be 32, 64 or 128, got 48"),
        (["--group-channels", "24"], r"--group-channels must divide the 256 channels"),
        (["--se-reduction", "0"], r"--se-reduction must be at least 1"),
        (["--kernel-reduction", "3"], r"--kernel-reduction must divide the 256 channels"),
        (["--lambda-gp", "-1"], r"--lambda-gp must be at least 0"),
        (["--model", "dcgan", "--kernel-size", "5"], r"--kernel-size must stay 3 without"),
        (["--model", "sngan", "--no-rbn"], r"--rbn must stay True without --model giu"),
        (["--extra-layers", "2"], r"--extra-layers must be 0 but for --model wgan-gp"),
        (["--model", "wgan-gp", "--extra-layers", "3"], r"--extra-layers must be 0 but for"),
        (["--z-dim", "-1"], r"--z-dim must be at least 1"),
        (["--dataset", "celeba", "--no-download"], r"img_align_celeba\.zip.*celeba/"),
        (["--dataset", "cifar10", "--no-download"], r"cifar-10-python\.tar\.gz"),
    ]
}
EVERY_CASE = [(s, *case) for s in SCRIPTS for case in [*COMMON, *CASES[s]]]


def assert_mistake(result, words: str) -> None:
    code, _, err = result
    assert code == 2, err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert re.search(words, line), line
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    EVERY_CASE,
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_one_line_and_leaves_nothing(script, argv, words, call, tmp_path):
    base = [] if "--dataset" in argv else ["--dataset", "shapes", "--data-dir", SHAPES]
    base += ["--eval-every", "0"] + ([] if "--total-steps" in argv else ["--total-steps", "1"])
    assert_mistake(call(script, *base, *argv), words)
    assert not (tmp_path / "runs").exists()


@every_script
@pytest.mark.parametrize(
    "argv", [["--model-x", "1"], ["--dataset", "nothing"], ["--seed", "one"], ["--amp", "True"]]
)
def test_what_the_parser_refuses(script, argv, call):
    code, _, err = call(script, *argv)
    assert code == 2 and argv[0] in err


@every_script
def test_a_batch_that_processes_cannot_share(script, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = call(script, *tiny(script, "--batch-size", "4"))
    assert_mistake(result, r"--batch-size must be a multiple of the 3 processes, got 4")


@every_script
def test_missing_inception_weights_stop_before_training(script, call, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    result = call(script, *tiny(script, "--eval-every", "2"))
    assert_mistake(result, r"pt_inception-2015-12-05-6726825d\.pth.*--fid-weights")
    result = call(script, *tiny(script, "--eval-every", "2", "--fid-weights", "nowhere.pth"))
    assert_mistake(result, r"nowhere\.pth")
    assert not (tmp_path / "runs").exists()


def test_a_download_without_network_says_which_file_goes_where(call, monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    result = call("giu_gan", "--dataset", "cifar10", "--eval-every", "0")
    assert_mistake(result, r"no network.*cifar-10-python\.tar\.gz")


@every_script
def test_checkpoints_that_are_not_this_scripts(script, call, tmp_path):
    assert call(script, *tiny(script, "--total-steps", "2"))[0] == 0
    (folder,) = Path("runs").iterdir()
    good = folder / "checkpoint.pt"
    state = torch.load(good, weights_only=True)
    whole = good.read_bytes()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    def other(**changes):
        torch.save({**state, **changes}, "bad.pt")

    def raw(data):
        Path("bad.pt").write_bytes(data)

    cases = [
        (lambda: raw(whole[: len(whole) // 2]), r"bad\.pt is damaged"),
        (lambda: raw(b""), r"bad\.pt is damaged"),
        (lambda: raw(b"not a checkpoint"), r"bad\.pt is damaged"),
        (lambda: torch.save(Evil(), "bad.pt"), r"bad\.pt is damaged"),
        (lambda: other(script="other_gan"), r"other_gan\.py"),
        (lambda: other(format=99), r"format 99"),
        (lambda: other(args={**state["args"], "old_flag": 1}), r"another version.*old_flag"),
    ]
    for make, words in cases:
        make()
        result = call(script, "--dataset", "shapes", "--mode", "sample", "--checkpoint", "bad.pt")
        assert_mistake(result, words)
    assert not (tmp_path / "executed").exists()
    good.write_bytes(whole[:-100])  # resuming from it is refused as well, and it stays
    assert_mistake(call(script, *tiny(script, "--resume")), r"checkpoint\.pt is damaged")
    assert good.read_bytes() == whole[:-100]


@every_script
def test_a_corrupt_image_is_named(script, call, tmp_path):
    for i in range(12):
        (tmp_path / "tree" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 80), (i, 2, 3)).save(tmp_path / "tree" / str(i % 2) / f"{i}.png")
    (tmp_path / "tree" / "1" / "broken.png").write_bytes(b"\x89PNG nonsense")
    flags = tiny(script, "--dataset", "folder", "--data-dir", "tree", "--batch-size", "4")
    code, _, err = call(script, *flags)
    assert code == 2 and "error: " in err and "broken.png" in err and "Traceback" not in err


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: the write fails half way."""
    flags = tiny("giu_gan", "--total-steps", "2", "--save-every", "2")
    assert start("giu_gan", *flags, cwd=tmp_path).wait() == 0
    (folder,) = Path("runs").iterdir()
    before = (folder / "checkpoint.pt").read_bytes()
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import giu_gan\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)\n"
        "giu_gan.main()\n"
    )
    command = [sys.executable, "-c", code, *flags, "--total-steps", "4", "--resume"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and re.search(r"error: cannot write .*checkpoint\.pt", done.stderr)
    assert "Traceback" not in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*tmp"))
    fresh = [sys.executable, "-c", code, *tiny("giu_gan", "--data-dir", "elsewhere")]
    done = subprocess.run(fresh, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "error: cannot write elsewhere" in done.stderr
    assert not list((tmp_path / "elsewhere" / "cache").iterdir())
