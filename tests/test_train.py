"""What every script promises of a run: resume, kills, processes, checkpoints, bad input."""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fid
import giu_gan
import pytest
import torch
from conftest import ROOT, SCRIPTS, assert_close, restated, same, start, state

every_script = pytest.mark.parametrize("script", SCRIPTS)


def run_folder() -> Path:
    (folder,) = (path for path in Path("runs").iterdir() if path.is_dir())
    return folder


def step(folder: Path, name: str = "checkpoint.pt") -> int:
    return state(folder, name)["step"]


@every_script
def test_a_resumed_run_is_the_whole_run_bit_for_bit(script, call, tiny):
    flags = "--log-every 3 --n-critic 2" + " --ema-decay 0.9" * (script != "an_inpaint")
    assert call(script, *tiny(script, f"{flags} --out-dir whole"))[0] == 0
    assert call(script, *tiny(script, f"{flags} --total-steps 2"))[0] == 0
    code, out, err = call(script, *tiny(script, f"{flags} --resume"))
    assert code == 0, err
    (whole,) = Path("whole").iterdir()
    a, b = state(whole), state(run_folder())
    assert step(whole) == 4 and a.pop("args") != b.pop("args") and same(a, b)


@pytest.mark.parametrize("steps, kills", [(24, 1), pytest.param(200, 5, marks=pytest.mark.storm)])
@every_script
def test_a_killed_run_is_the_whole_run_bit_for_bit(script, steps, kills, tiny, tmp_path):
    """Kill a run `kills` times at random moments after it has saved, then let it end."""
    flags = tiny(script, f"--total-steps {steps} --save-every 3 --sample-every 0 --log-every 5")
    rng, saved, times = random.Random(script), [], []
    process = start(script, *flags, cwd=tmp_path)
    for _ in range(kills):
        while process.poll() is None and times == saved:
            times = [path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/checkpoint.pt")]
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.kill()
        assert process.communicate() and process.returncode == -signal.SIGKILL  # it was running
        saved = times
        process = start(script, *flags, "--resume", cwd=tmp_path)
    assert process.communicate() and process.returncode == 0
    whole = start(script, *flags, "--out-dir", "whole", cwd=tmp_path)
    assert whole.communicate() and whole.returncode == 0
    a, b = (next(tmp_path.glob(f"{name}/*/checkpoint.pt")).parent for name in ("whole", "runs"))
    a, b = state(a), state(b)
    assert a.pop("args") != b.pop("args") and same(a, b)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


NO_BATCH_NORM = "nn.BatchNorm2d = nn.BatchNorm1d = lambda *a, **k: nn.Identity()"


def together(script: str, world: int, flags: list[str], cwd: Path, first: str = "") -> None:
    """Run a script in several processes as torchrun does, after the statement `first`."""
    code = (
        f"import sys, torch.nn as nn\n{first}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {script}\n"
        f"{script}.main()\n"
    )
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *flags], cwd=cwd, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.PIPE, env={**os.environ, **env, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world)
    ]  # fmt: skip
    for process in processes:
        assert process.communicate(timeout=120) and process.returncode == 0


def close(a, b) -> bool:
    """Whether two checkpoints are equal to rounding."""
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    return a == b


# Dropout and self-sampling see one process's share of the batch.
WHOLE = {"an_gan": "--no-self-sampling", "an_inpaint": "--no-self-sampling"}


@every_script
def test_two_processes_are_one(script, tiny, tmp_path):
    flags = tiny(script, f"--total-steps 5 --sample-every 0 {WHOLE.get(script, '')}")
    states = []
    for world in (1, 2):
        together(script, world, [*flags, "--out-dir", str(world)], tmp_path, NO_BATCH_NORM)
        states.append(state(next(Path(str(world)).iterdir())))
    for name in ("G", "D"):
        # A bias before an instance norm has no effect: Adam makes steps of its gradient's rounding.
        a, b = ({k: v for k, v in s[name].items() if "an.value.bias" not in k} for s in states)
        assert close(a, b), name


def test_two_processes_evaluate_and_resume_bit_for_bit(tiny, tmp_path):
    half = tiny("giu_gan", "--total-steps 2")
    flags = tiny("giu_gan", "--eval-every 4 --fid-num 12 --fid-real 12 --fid-weights random")
    together("giu_gan", 2, [*flags, "--out-dir", "whole"], tmp_path)
    together("giu_gan", 2, half, tmp_path)
    together("giu_gan", 2, [*flags, "--resume"], tmp_path)
    a, b = state(next(Path("whole").iterdir())), state(run_folder())
    assert a.pop("args") != b.pop("args") and same(a, b) and a["best"][1] == 4


@every_script
def test_a_copy_of_the_script_and_fid_alone_trains(script, tiny, tmp_path):
    for name in (f"{script}.py", "fid.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, f"{script}.py", *tiny(script, "--total-steps 1")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_script
def test_modes_after_training(script, call, tiny):
    """A run is evaluated and sampled by its name alone; the files that a reader looks for."""
    scores = "--eval-every 2 --fid-num 12 --fid-real 12 --fid-weights random"
    scores = scores if script != "an_inpaint" else "--eval-every 2"
    code, out, err = call(script, *tiny(script, scores))
    assert code == 0, err
    folder = run_folder()
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert {"args", "events", "samples", "checkpoint", "best"} <= names
    code, out, err = call(script, *tiny(script, "--mode sample"))
    assert code == 0, err
    assert len(list(folder.glob("generated/*"))) == len(list(folder.glob("generated-*.png"))) == 1
    assert len(fid.image_files(folder / "generated")) == 4  # the grid is not among them
    code, out, err = call(script, *tiny(script, f"--mode evaluate {scores}"))
    assert code == 0, err
    shown = "checkpoint.pt" if script == "gca_gan" else "best.pt"  # its Table 1 is of the last step
    assert json.loads((folder / "evaluate.json").read_text())["step"] == step(folder, shown)


@every_script
def test_resume_refuses_other_flags_and_lists_them(script, call, tiny):
    assert call(script, *tiny(script, "--total-steps 1"))[0] == 0
    before = state(run_folder())
    code, out, err = call(script, *tiny(script, "--d-lr 0.5 --beta1 0.25 --resume"))
    assert code == 2 and err.count("\n") == 1 and "--d-lr " in err and "--beta1 " in err
    code, out, err = call(script, *tiny(script))
    assert code == 2 and "--resume" in err and err.startswith("error: --")
    assert same(state(run_folder()), before)
    assert call(script, *tiny(script, "--resume --log-every 1 --save-every 1"))[0] == 0


@every_script
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(script, call, tiny):
    assert call(script, *tiny(script, "--total-steps 2"))[0] == 0
    before = state(run_folder())
    module = importlib.import_module(script)
    log = module.Run.log

    def poisoned(self, terms):
        log(self, {key: term * float("inf") for key, term in terms.items()})

    module.Run.log = poisoned
    try:
        code, out, err = call(script, *tiny(script, "--resume --log-every 9 --total-steps 9"))
    finally:
        module.Run.log = log
    assert code == 3 and err.startswith("error: loss/") and "at step 4" in err
    assert same(state(run_folder()), before)


@every_script
def test_checkpoints_are_named_once_and_their_scaler_may_be_off(script, call, tiny):
    """A run that went on from another's checkpoint goes on from its own the next time."""
    assert call(script, *tiny(script, "--total-steps 1 --exp-name first"))[0] == 0
    source = run_folder() / "checkpoint.pt"
    torch.save(state(source.parent) | {"best": (1.0, 1)}, source)
    go_on = f"--exp-name second --checkpoint {source}"
    code, out, err = call(script, *tiny(script, f"{go_on} --total-steps 2"))
    assert code == 0 and "from step 1" in out, err
    code, out, err = call(script, *tiny(script, f"{go_on} --total-steps 3 --resume"))
    assert code == 0 and "from step 2" in out and "lowest FID 1 " not in out, err
    code, out, err = call(script, *tiny(script, "--exp-name third --resume --checkpoint typo.pt"))
    assert code == 2 and "typo.pt does not exist" in err
    module = importlib.import_module(script)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert not state(source.parent)["scaler"]
    module.load(source, {"scaler": scaler})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(number, tiny, tmp_path):
    flags = tiny("giu_gan", "--total-steps 100000 --save-every 100000 --log-every 1")
    process = start("giu_gan", *flags, cwd=tmp_path)
    assert any(line.startswith("step ") for line in process.stdout)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "--resume" in out and "Traceback" not in err
    assert step(run_folder()) > 0


def test_an_interrupted_decoding_leaves_no_file(tiny, tmp_path):
    process = start("giu_gan", *tiny("giu_gan", "--img-size 128 --cache-dir cache"), cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("cache/*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # the step it would end has not begun
    process.send_signal(signal.SIGTERM)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert not list(tmp_path.glob("cache/*/*"))


def test_training_from_python_leaves_the_signal_handlers_alone(tiny):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    giu_gan.train(giu_gan.parse(tiny("giu_gan", "--total-steps 1")))
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_the_averaged_generator_is_the_one_that_is_shown(call, tiny):
    flags = tiny("giu_gan", "--ema-decay 0.75 --save-every 1")
    weights, buffers, average = [], [], None
    for step in (1, 2, 3):
        more = ["--total-steps", str(step), *["--resume"] * (step > 1)]
        assert call("giu_gan", *flags, *more)[0] == 0
        saved = state(run_folder())
        name = "1.parametrizations.weight.original"
        weight = saved["G"][name]
        average = weight if step == 1 else 0.75 * average + 0.25 * weight
        torch.testing.assert_close(saved["ema"][f"module.{name}"], average)
        for key in saved["G"]:
            if key.endswith(("running_mean", "_u")):
                assert torch.equal(saved["ema"][f"module.{key}"], saved["G"][key]), key
    args = giu_gan.parse([*flags, "--mode", "sample"])
    nets, shown = giu_gan.build(args, torch.device("cpu"))
    giu_gan.load(run_folder() / "checkpoint.pt", nets)
    z = giu_gan.eval_noise(args, 2)
    images = giu_gan.generate(shown, z)
    assert not torch.equal(images, giu_gan.generate(nets["G"], z))
    assert torch.equal(images, giu_gan.generate(nets["ema"].module, z))


def test_the_best_checkpoint_is_the_one_of_the_lowest_fid(call, tiny, monkeypatch):
    fids = iter([9.0, 3.0, 5.0, 4.0])
    monkeypatch.setattr(giu_gan, "score", lambda *a: time.sleep(1) or {"fid": next(fids)})
    flags = tiny("giu_gan", "--eval-every 1 --log-every 1 --fid-weights random")
    code, out, err = call("giu_gan", *flags)
    assert code == 0 and "lowest FID 3 at step 2" in out
    assert min(float(text.split()[-1]) for text in out.split(" steps/s")[:-1]) > 1  # steps alone
    assert step(run_folder(), "best.pt") == 2 and step(run_folder()) == 4
    args = giu_gan.parse([*flags, "--mode", "evaluate"])
    assert giu_gan.find_checkpoint(args) == run_folder() / "best.pt"
    assert giu_gan.find_checkpoint(giu_gan.parse([*flags, "--resume"])).name == "checkpoint.pt"


@every_script
def test_bad_input_of_every_script_is_one_line(script, call, tiny, monkeypatch):
    for flags, words in {
        "--seed -1": "--seed must be from 0 to 2**32 - 1, got -1",
        f"--seed {2**32}": "--seed must be",
        "--batch-size 0": "--batch-size must be",
        "--dataset folder --data-dir nowhere": "nowhere",
        "--mode sample --exp-name other": "train first",
        "--checkpoint other.pt --mode evaluate": "train first",
    }.items():
        code, out, err = call(script, *tiny(script, flags))
        assert code == 2 and words in err and err.startswith("error: "), (flags, err)
        assert err.count("\n") == 1 and not Path("runs").exists(), flags
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "WORLD", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for flags, words in {"": "environment variable", "--mode sample": "1 process"}.items():
        code, out, err = call(script, *tiny(script, flags))
        assert code == 2 and words in err and err.count("\n") == 1, err


@every_script
def test_a_batch_of_one_image_trains(script, call, tiny):
    code, out, err = call(script, *tiny(script, "--batch-size 1 --total-steps 1"))
    assert code in (0, 2) and "Traceback" not in err, err
    assert code == 0 or err.startswith("error: --batch-size must")


def test_noise_depends_on_seed_step_and_stream():
    keys = (1, 1, 0), (1, 1, 1), (2, 1, 0), (1, 3, 0, 1), (1, 3, 0, 2), (2**31 + 1, 1, 0)
    seeds = {giu_gan.seed_of(*key) for key in keys}
    assert len(seeds) == 6 and max(seeds) < 2**32  # the CPU reads the low 32 bits only


@pytest.mark.parametrize("script", ["sagan_dogs", "gca_gan"])
def test_training_is_the_algorithm(script, call, tiny):
    """Two steps of two updates of D each, restated, with DCGAN's cross-entropy."""
    flags = tiny(script, "--total-steps 2 --n-critic 2")
    assert call(script, *flags)[0] == 0
    module, softplus = importlib.import_module(script), torch.nn.functional.softplus

    def d_loss(D, real, fake, noise):
        return softplus(-D(real)).mean() + softplus(D(fake)).mean()

    args = module.parse([*flags, "--resume"])
    assert_close(state(run_folder()), restated(module, args, d_loss, lambda s: softplus(-s)))


@pytest.mark.parametrize("script", ["giu_gan", "an_gan", "an_inpaint"])
def test_every_step_seeds_dropout_and_self_sampling(script, call, tiny, monkeypatch):
    seeds, plain = set(), torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.add(seed) or plain(seed))
    assert call(script, *tiny(script))[0] == 0
    assert len(seeds) == 5  # that of the weights, and one for each of 4 steps


def test_processes_draw_shares_of_the_same_noise(monkeypatch):
    whole = giu_gan.draw(torch.randn, torch.Generator().manual_seed(5), 8, 3)
    monkeypatch.setattr(giu_gan, "WORLD", 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(giu_gan, "RANK", rank)
        parts.append(giu_gan.draw(torch.randn, torch.Generator().manual_seed(5), 8, 3))
    assert torch.equal(whole, torch.cat(parts))


def test_an_update_is_adam_on_the_gradient_of_the_loss():
    """The fused optimiser reads raw memory: a gradient in another memory order scrambles weights."""
    args = giu_gan.Args(g_ch=16, d_ch=16)
    D = giu_gan.Discriminator(args)
    d_opt = torch.optim.Adam(D.parameters(), 1e-3, (0.0, 0.9), fused=True)
    x, fake, eps = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.rand(4, 1, 1, 1)
    loss = D(x).mean() + giu_gan.gradient_penalty(D, x, fake, eps)
    parameters = list(D.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    before = [parameter.detach().clone() for parameter in parameters]
    giu_gan.update(d_opt, D, loss, torch.amp.GradScaler("cpu", enabled=False))
    for old, new, grad in zip(before, parameters, grads):
        step = grad / (grad.abs() + 1e-8)  # Adam's first step with beta1 = 0
        torch.testing.assert_close(new.detach(), old - 1e-3 * step, rtol=0, atol=1e-6)


def test_rows_choose_their_defaults_and_given_flags_win():
    args = giu_gan.parse("--dataset celeba --model lsgan --dry-run".split())
    assert (args.img_size, args.crop, args.z_dim) == (64, 160, 100)
    args = giu_gan.parse("--dataset celeba --img-size 128 --crop 0 --dry-run".split())
    assert (args.img_size, args.crop, args.z_dim) == (128, 0, 128)


def test_help_shows_the_defaults_of_the_row(call):
    code, out, err = call("giu_gan", "--dataset", "celeba", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert code == 0 and "side of the square images in pixels (default: 64)" in text


@every_script
def test_an_update_never_waits_for_the_device(script, tiny, tmp_path):
    """Between drawing noise and logging nothing may ask for a tensor's value (but for EMA)."""
    if not shutil.which("nvidia-smi"):
        pytest.skip("needs CUDA: torch.cuda.set_sync_debug_mode finds the waits")
    code = (
        "import sys; sys.path.insert(0, {1!r}); import torch, {0}\n"
        "draw, log = {0}.draw, {0}.Run.log\n"
        "def watch(*a):\n"
        "    torch.cuda.set_sync_debug_mode('error')\n"
        "    return draw(*a)\n"
        "def rest(self, terms):\n"
        "    torch.cuda.set_sync_debug_mode('default')\n"
        "    log(self, terms)\n"
        "{0}.draw, {0}.Run.log = watch, rest\n"
        "{0}.main()\n"
    ).format(script, str(ROOT))
    flags = tiny(script, "--ema-decay 0" * (script != "an_inpaint"))
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, env=env)
    assert done.returncode == 0
