"""Each script from its command line: modes, resume, kill, processes. Bit for bit on the CPU."""

import contextlib
import copy
import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, VARIANTS, start, tiny
from PIL import Image

import fid

every_script = pytest.mark.parametrize("script", SCRIPTS)
every_variant = pytest.mark.parametrize(
    ("script", "flags"),
    [(script, flags) for script in SCRIPTS for flags in VARIANTS[script]],
)


def run_folder() -> Path:
    (folder,) = Path("runs").iterdir()
    return folder


def log(folder: Path) -> list[dict]:
    """The log without what a clock decides."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records]


def same(a, b) -> bool:
    """Whether two checkpoints agree in every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name in ("out_dir", "resume", "total_steps", "data_dir"):
        checkpoint["args"].pop(name)
    return checkpoint


@every_script
def test_a_run_leaves_what_it_says(script, call):
    code, out, err = call(script, *tiny(script))
    assert code == 0, err
    folder = run_folder()
    assert folder.name.startswith(f"{script}__shapes__") and folder.name.endswith("__s1")
    assert {path.name for path in (folder / "samples").iterdir()} == {"0000002.png", "0000004.png"}
    records = log(folder)
    assert [r["step"] for r in records] == [2, 4]
    assert {"loss/d", "loss/g", "logit/real", "logit/fake", "grad/d_norm"} <= records[0].keys()
    checkpoint = state(folder)
    assert checkpoint["step"] == 4 and checkpoint["script"] == script
    about = json.loads((folder / "args.json").read_text())
    assert about["torch"] == torch.__version__ and about["device"] == "cpu"
    assert list(folder.glob("events.out.tfevents.*"))
    assert "step 4/4 (100.0%)" in out and str(folder) in out


@every_script
def test_evaluate_sample_and_figures_of_a_checkpoint(script, call):
    few = "--fid-num 10 --fid-real 12 --fid-batch-size 5 --fid-weights random".split()
    code, out, err = call(script, *tiny(script, "--eval-every", "4", *few))
    assert code == 0, err
    folder = run_folder()
    trained = log(folder)[-1]
    assert (folder / "best.pt").exists() and trained["step"] == 4
    assert "comparable with nothing" in out + err
    args = tiny(script, *few)
    code, out, err = call(script, *args, "--mode", "evaluate")
    assert code == 0, err
    scores = json.loads((folder / "evaluate.json").read_text())
    metrics = {key: value for key, value in trained.items() if key.startswith("metric/")}
    assert metrics and {key: scores[key] for key in metrics} == pytest.approx(metrics, rel=1e-4)
    if script != "an_inpaint":
        assert scores["metric/n_fake"] == 10 and scores["metric/n_real"] == 12
    assert scores["sha256"]
    code, _, err = call(script, *args, "--mode", "sample", "--num-samples", "5")
    assert code == 0, err
    assert len(list((folder / "generated").rglob("*.png"))) == 5
    code, _, err = call(script, *args, "--mode", "sample", "--num-samples", "3")
    assert code == 0, err
    assert len(list((folder / "generated").rglob("*.png"))) == 3  # none of the five stayed
    code, _, err = call(script, *args, "--mode", "figures", "--num-samples", "4")
    assert code == 0, err
    assert list((folder / "figures").glob("*.png"))


@every_variant
def test_every_variant_trains(script, flags, call):
    code, _, err = call(script, *tiny(script, *flags.split(), "--total-steps", "2"))
    assert code == 0, err
    assert log(run_folder())[-1]["step"] == 2


@pytest.mark.parametrize(
    ("script", "flags", "shown"),
    [
        ("gca_gan", "", "--total-steps INT generator updates to train for (default: 39550)"),
        ("gca_gan", "--model sagan", "(default: 100000)"),
        ("gca_gan", "--model consingan", "generated images of an evaluation (default: 10)"),
        ("sagan_div", "--method wgan-div", "updates per generator update (default: 4)"),
        ("sagan_div", "--recipe author --method c", "(default: 0.999)"),
    ],
)  # fmt: skip
def test_help_shows_the_defaults_of_the_row(script, flags, shown, call):
    code, out, _ = call(script, *flags.split(), "--help")
    assert code == 0 and shown in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("script", ["sagan_div", "gca_gan"])
def test_a_given_flag_wins_over_its_row(script):
    parse = importlib.import_module(script).parse
    row = {"sagan_div": "--method wgan-div", "gca_gan": "--model sagan"}[script].split()
    theirs, ours = parse(row), parse(["--g-lr", "0.5", *row, "--exp-name", "mine"])
    assert ours.g_lr == 0.5 != theirs.g_lr and ours.exp_name == "mine"
    assert (ours.d_lr, ours.n_critic, ours.z_dim) == (theirs.d_lr, theirs.n_critic, theirs.z_dim)


@every_script
def test_dry_run_counts_and_writes_nothing(script, call, tmp_path):
    code, out, _ = call(script, "--dry-run")
    record = json.loads(out)
    assert code == 0 and record["params"].keys() == {"G", "D"} and record["args"]["dry_run"]
    assert all(isinstance(n, int) and n > 0 for n in record["params"].values())
    assert not list(tmp_path.iterdir())


@every_script
def test_same_seed_same_log_and_kill_plus_resume_is_the_whole_run(script, call, monkeypatch):
    """4 steps == 3 steps, ended inside a log interval, and 1 more; another seed is another run."""
    # A cache of their own: whether it has to be built must not change the run.
    few = ["--sample-every", "0", "--log-every", "4", "--save-every", "3", "--data-dir", "data"]
    flags = tiny(script, *few)
    for name in ("whole", "again", "other"):
        seed = ["--seed", "2"] if name == "other" else []
        assert call(script, *flags, "--out-dir", f"out-{name}", *seed)[0] == 0
    whole, again, other = (next(Path(f"out-{n}").iterdir()) for n in ("whole", "again", "other"))
    assert log(whole) == log(again) and same(state(whole), state(again))
    assert log(whole) != log(other)
    module = sys.modules[script]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module.Run, "save", stop_after(module.Run.save, 3))
        call(script, *flags, "--out-dir", "out-parts")
    (parts,) = Path("out-parts").iterdir()
    assert state(parts)["step"] == 3
    code, out, err = call(script, *flags, "--out-dir", "out-parts", "--resume")
    assert code == 0, err
    assert "from step 3" in out
    assert log(parts) == log(whole) and same(state(parts), state(whole))


class Killed(BaseException):
    """What nothing catches."""


def stop_after(save, step):
    """Run.save, and an end of the process right after the save of one step."""

    def wrapped(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.step == step:
            raise Killed

    return wrapped


@every_script
def test_a_changed_flag_is_refused_and_a_free_one_is_not(script, call):
    assert call(script, *tiny(script, "--total-steps", "2"))[0] == 0
    code, _, err = call(script, *tiny(script, "--d-lr", "0.5", "--beta1", "0.25", "--resume"))
    assert code == 2 and err.count("\n") == 1
    assert "--d-lr was" in err and "is 0.5" in err and "--beta1 was" in err
    before = state(run_folder())
    code, _, err = call(script, *tiny(script))
    assert code == 2 and "--resume" in err and "--exp-name" in err
    assert same(state(run_folder()), before)
    code, _, err = call(script, *tiny(script, "--resume", "--log-every", "1", "--save-every", "1"))
    assert code == 0, err
    assert [r["step"] for r in log(run_folder())] == [2, 3, 4]


@every_script
def test_another_runs_flags_are_refused_in_every_mode(script, call):
    """Else the scores of one network would be read as those of another."""
    assert call(script, *tiny(script, "--total-steps", "1"))[0] == 0
    for mode in ("evaluate", "sample", "figures"):
        code, _, err = call(script, *tiny(script, "--mode", mode, "--g-lr", "0.5"))
        assert code == 2 and "--g-lr was" in err and "is 0.5" in err, err
    checkpoint = next(run_folder().glob("checkpoint.pt"))
    flags = ["--mode", "sample", "--checkpoint", str(checkpoint), "--num-samples", "2"]
    code, _, err = call(script, *flags)
    assert code == 0, err  # what is not given comes from the checkpoint, the data's folder too


def test_other_data_is_refused_on_resume(call, tmp_path):
    for name, count in (("one", 9), ("two", 8)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.effect_noise((40, 40), 50 + i).save(tmp_path / name / f"{i}.png")
    flags = tiny("giu_gan", "--dataset", "folder")
    assert call("giu_gan", *flags, "--data-dir", "one", "--total-steps", "2")[0] == 0
    code, _, err = call("giu_gan", *flags, "--data-dir", "two", "--resume")
    assert code == 2 and "cannot be resumed: the data was folder-32-" in err
    (tmp_path / "one").rename(tmp_path / "moved")
    assert call("giu_gan", *flags, "--data-dir", "moved", "--resume")[0] == 0


def test_the_rate_after_a_resume_is_that_of_its_own_steps(call, monkeypatch):
    flags = tiny("giu_gan", "--log-every", "4")
    assert call("giu_gan", *flags, "--total-steps", "3", "--log-every", "100")[0] == 0
    clock = itertools.count(0, 10)
    module = importlib.import_module("giu_gan")
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert call("giu_gan", *flags, "--resume")[0] == 0
    last = json.loads((run_folder() / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["perf/steps_per_sec"] <= 1 / 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path):
    flags = tiny("giu_gan", "--total-steps", "100000", "--save-every", "100000", "--log-every", "1")
    process = start("giu_gan", *flags, cwd=tmp_path)
    while "step " not in process.stdout.readline():
        pass
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "--resume" in out and "Traceback" not in err
    step = state(run_folder())["step"]
    assert step > 0 and f"stopped at step {step}" in out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(script: str, world: int, flags: list[str], cwd: Path) -> list[subprocess.Popen]:
    """Start a script in several processes, as torchrun does."""
    port = str(free_port())
    return [
        start(
            script, *flags, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(world)
    ]  # fmt: skip


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    flags = tiny("giu_gan", "--total-steps", "100000", "--save-every", "100000", "--log-every", "1")
    first, second = together("giu_gan", 2, flags, tmp_path)
    while "step " not in first.stdout.readline():
        pass
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
    step = state(run_folder())["step"]
    for process in together(
        "giu_gan", 2, [*flags, "--total-steps", str(step), "--resume"], tmp_path
    ):
        assert process.communicate(timeout=60) and process.returncode == 0


def slow_saves(tmp_path, monkeypatch) -> list[str]:
    """Checkpoints of the coming processes take three seconds longer; flags of an endless run."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time, torch\nsave = torch.save\n"
        "torch.save = lambda *a, **k: (time.sleep(3), save(*a, **k))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    never = ["--total-steps", "100000", "--save-every", "100000"]
    return tiny("giu_gan", *never, "--sample-every", "0", "--log-every", "1")


def test_no_process_ends_before_the_checkpoint_is_written(tmp_path, monkeypatch):
    """torchrun ends all processes as soon as one has ended."""
    first, second = together("giu_gan", 2, slow_saves(tmp_path, monkeypatch), tmp_path)
    while "step " not in first.stdout.readline():
        pass
    first.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert (run_folder() / "checkpoint.pt").exists()
    assert first.communicate(timeout=60) and first.returncode == 128 + signal.SIGTERM


def test_a_second_sigterm_does_not_cut_the_save_short(tmp_path, monkeypatch):
    """It comes twice where the cluster signals torchrun and the processes."""
    process = start("giu_gan", *slow_saves(tmp_path, monkeypatch), cwd=tmp_path)
    while "step " not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    while "SIGTERM" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, err
    assert state(run_folder())["step"] > 0


@every_script
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(script, call):
    assert call(script, *tiny(script, "--total-steps", "2"))[0] == 0
    before = state(run_folder())
    module = sys.modules[script]
    collect = module.Run.collect

    def poisoned(self, terms):
        if self.step == 4:
            terms = terms | {"loss/g": terms["loss/g"] * float("inf")}
        return collect(self, terms)

    module.Run.collect = poisoned
    try:
        flags = ["--total-steps", "8", "--save-every", "8", "--log-every", "8", "--resume"]
        code, _, err = call(script, *tiny(script, *flags))
    finally:
        module.Run.collect = collect
    assert code == 3 and "loss/g is" in err and "at step 5" in err
    assert same(state(run_folder()), before)


@every_script
def test_noise_depends_on_seed_and_step_and_is_no_other_stream(script, monkeypatch):
    """The CPU's generator reads the low 32 bits of a seed only."""
    module = importlib.import_module(script)
    draws = {}
    for seed in (1, 2, 2**31):
        args = module.Args(seed=seed, dataset="shapes", exp_name=str(seed))
        run = module.Run(args, torch.device("cpu"), "")
        for step in (0, 1):
            run.step = step
            run.seed()
            draws[seed, step] = tuple(run.draw(torch.randn, args.batch_size)[:4].tolist())
            draws[seed, step, "rest"] = tuple(torch.randn(args.batch_size)[:4].tolist())
    assert len(set(draws.values())) == 12
    run.rank = 1
    run.seed()
    assert tuple(torch.randn(args.batch_size)[:4].tolist()) not in draws.values()


@every_script
def test_a_machine_without_git_trains(script, call, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, err = call(script, *tiny(script, "--total-steps", "1"))
    assert code == 0, err
    assert json.loads((run_folder() / "args.json").read_text())["commit"] == ""


@every_script
def test_an_update_never_waits_for_the_device(script):
    """Between fetching a batch and collecting the terms nothing may ask for a tensor's value."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.set_sync_debug_mode counts the waits")
    code = (
        "import sys, torch, {0}\n"
        "draw = {0}.Run.draw\n"
        "def watch(self, *a):\n"
        "    torch.cuda.set_sync_debug_mode('error')\n"
        "    return draw(self, *a)\n"
        "{0}.Run.draw = watch\n"
        "collect = {0}.Run.collect\n"
        "def rest(self, terms):\n"
        "    out = collect(self, terms)\n"
        "    torch.cuda.set_sync_debug_mode('default')\n"
        "    return out\n"
        "{0}.Run.collect = rest\n"
        "{0}.main()\n"
    ).format(script)
    done = subprocess.run([sys.executable, "-c", code, *tiny(script)], cwd=ROOT)
    assert done.returncode == 0


class FakeGraphs:
    """CUDA's graphs on the CPU: recording an update changes nothing, replaying it does the work."""

    def __init__(self, module, monkeypatch):
        self.recording, self.runs, self.replays, graphed = False, [], 0, fid.graphed
        init, draw = module.Run.__init__, module.Run.draw

        def start(run, *args, **kwargs):
            init(run, *args, **kwargs)
            self.runs.append(run)

        def watched_draw(*args):
            assert not self.recording, "noise drawn inside of a graph stays the same for ever"
            return draw(*args)

        def spy(update):
            def spied(*inputs):
                terms = update(*inputs)
                if self.recording:
                    self.graph.work, self.graph.terms = (lambda: update(*inputs)), terms
                return terms

            return graphed(spied)

        class Graph:
            def replay(graph):
                self.replays += 1
                for key, value in graph.work().items():
                    graph.terms[key].detach().copy_(value.detach())

        @contextlib.contextmanager
        def record(graph, capture_error_mode):
            assert capture_error_mode == "thread_local"  # batches are read ahead meanwhile
            parts = self.runs[-1].parts
            state, rng = copy.deepcopy({k: p.state_dict() for k, p in parts.items()}), None
            self.recording, self.graph, rng = True, graph, torch.get_rng_state()
            yield
            self.recording = False
            torch.set_rng_state(rng)
            for key, part in parts.items():
                part.load_state_dict(state[key])

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "CUDAGraph": Graph, "graph": record, "Stream": lambda: stream,
            "current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(module.Run, "__init__", start)
        monkeypatch.setattr(module.Run, "draw", watched_draw)
        monkeypatch.setattr(fid, "graphed", spy)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "an_inpaint"])
def test_recorded_updates_are_the_plain_ones(script, call, monkeypatch):
    """Bit for bit, across the recording and a resume: all that changes comes in as an input."""
    flags = ["--total-steps", "9", "--save-every", "5", "--log-every", "1", "--hflip"]
    flags += ["--n-critic", "2"]
    assert call(script, *tiny(script, *flags, "--exp-name", "plain"))[0] == 0
    module = importlib.import_module(script)
    fake = FakeGraphs(module, monkeypatch)
    monkeypatch.setattr(module, "check_args", lambda args: None)  # there is no GPU here
    flags += ["--exp-name", "graphs", "--cuda-graphs"]
    assert call(script, *tiny(script, *flags, "--total-steps", "7"))[0] == 0
    assert fake.replays == 7 * 2 - 3 + 7 - 3
    code, _, err = call(script, *tiny(script, *flags, "--resume"))
    assert code == 0, err
    plain, graphs = (next(Path("runs").glob(f"*__{name}__*")) for name in ("plain", "graphs"))
    assert log(plain) == log(graphs)
    a, b = state(plain)["parts"], state(graphs)["parts"]
    assert same([a["G"], a["D"]], [b["G"], b["D"]])


def compiled_and_plain(script, call, *flags):
    """Runs of the same flags with and without --compile, through a gradient penalty where there is
    one: both folders."""
    flags = ["--log-every", "1", *flags, *["--loss", "wgan-gp"][: 2 * (script == "gca_gan")]]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        code, _, err = call(script, *tiny(script, *flags, "--exp-name", name, *more))
        assert code == 0, err
    plain, compiled = (next(Path("runs").glob(f"*__{name}__*")) for name in ("plain", "compiled"))
    for a, b in zip(log(plain), log(compiled), strict=True):
        for key in (key for key in a if key.startswith(("loss/", "logit/", "grad/"))):
            assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-4), key
    return plain, compiled


@every_script
def test_compiled_passes_are_the_plain_ones(script, call, monkeypatch):
    """Within rounding; a penalty's second derivative, which cannot be compiled, is left plain."""
    parts, compile_ = [], torch.compile
    traced = functools.partial(compile_, backend="aot_eager")  # traced like all, but kernels kept
    monkeypatch.setattr(torch, "compile", lambda part: parts.append(part) or traced(part))
    compiled_and_plain(script, call, "--total-steps", "3")
    assert {type(part).__name__ for part in parts} >= {"Generator", "Discriminator"}


@pytest.mark.storm
@every_script
def test_compiled_kernels_are_the_plain_ones(script, call):
    """With real kernels: within rounding, and a resumed run is the whole one bit for bit."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    frozen = ["--no-self-sampling"] if script in ("an_gan", "an_inpaint") else []  # own random keys
    _, whole = compiled_and_plain(script, call, *frozen)
    whole = log(whole), state(whole)
    shutil.rmtree("runs")
    flags = tiny(script, "--log-every", "1", *frozen, "--exp-name", "compiled", "--compile")
    flags += ["--loss", "wgan-gp"][: 2 * (script == "gca_gan")]
    assert call(script, *flags, "--total-steps", "2")[0] == 0
    torch.compiler.reset()
    assert call(script, *flags, "--resume")[0] == 0
    (folder,) = Path("runs").iterdir()
    assert log(folder) == whole[0] and same(state(folder), whole[1])


@every_script
def test_a_copy_of_the_script_and_fid_alone_trains(script, tmp_path):
    for name in (f"{script}.py", "fid.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, f"{script}.py", *tiny(script, "--total-steps", "1")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
