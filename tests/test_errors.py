"""A user's mistakes: exit code 2, one line on stderr that says flag, rule, value and way out."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, SHAPES, tiny
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
    (["--fid-num", "0"], r"--fid-num must be at least 1"),
    (["--num-samples", "0"], r"--num-samples must be at least 1"),
    (["--num-workers", "-2"], r"--num-workers must be at least 0"),
    (["--device", "cuda"], r"--device must be cpu.*got cuda"),
    (["--device", "cpu:x"], r"--device must be"),
    (["--device", "cuda:99"], r"--device must be"),
    (["--device", "quantum"], r"--device must be"),
    (["--checkpoint", "x.pt"], r"--checkpoint must stay empty with --mode train"),
    (["--mode", "evaluate", "--resume"], r"--resume must go with --mode train, got evaluate"),
    (["--mode", "sample", "--checkpoint", "nowhere.pt"], r"nowhere.pt is missing"),
    (["--mode", "evaluate"], r"checkpoint.pt is missing"),
    (["--dataset", "folder", "--data-dir", "nowhere"], r"nowhere"),
    (["--dataset", "folder", "--data-dir", "."], r"no images"),
    (["--batch-size", "6000"], r"--batch-size must be at most \d+"),
]
CASES = {
    "giu_gan": [
        (["--kernel-size", "4"], r"--kernel-size must be odd, got 4"),
        (["--model", "sngan", "--lambda-gp", "3"], r"--lambda-gp must stay 10.0 without a"),
        (["--optimizer", "adagrad", "--beta1", "0.9"], r"--beta1 must stay 0.0 without --opt"),
        (["--third-layer", "g64-d128"], r"--third-layer must stay g128-d64 without"),
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
    ],
    "sagan_div": [
        (["--method", "e"], r"invalid choice|choices|one of"),
        (["--attn-blocks", "6"], r"1.*2.*3.*4.*5.*none"),
        (["--attn-blocks"], r"--attn-blocks must name layers of 1 2 3 4 5.*got nothing"),
        (["--attn-blocks", "1", "1"], r"--attn-blocks must name layers of 1 2 3 4 5, each once"),
        (["--attn-blocks", "none", "2"], r"--attn-blocks must .* or be none alone, got none 2"),
        (
            ["--dataset", "mnist", "--no-download", "--channels", "3"],
            r"--channels must be 1 with --dataset mnist",
        ),
        (
            ["--dataset", "mnist", "--no-download", "--data-dir", "{tmp}"],
            r"--dataset mnist not found in .*--download.*MNIST/raw/",
        ),
        (
            ["--dataset", "fashion-mnist", "--no-download", "--data-dir", "{tmp}"],
            r"not found in .*--download.*FashionMNIST/raw/",
        ),
        (["--img-size", "32"], r"--img-size must be 64, Table 1 is fixed, got 32"),
        (["--div-p", "0.5"], r"--div-p must be at least 1, got 0.5"),
        (["--div-k", "-1"], r"--div-k must be at least 0, got -1"),
        (["--div-scale", "-1"], r"--div-scale must be at least 0"),
        (["--batch-size", "1"], r"--batch-size must be at least 2, got 1"),
        (["--epochs", "-1"], r"--epochs must be at least 0"),
        (["--z-dim", "-1"], r"--z-dim must be at least 1"),
        (
            ["--method", "dcgan", "--attn-blocks", "1"],
            r"--attn-blocks must stay .* with --method dcgan",
        ),
        (["--method", "wgan-div", "--attn-block", "full"], r"--attn-block must stay pooled"),
        (
            ["--method", "sngan", "--div-k", "3"],
            r"--div-k must stay 2.0 with --method sngan",
        ),
        (["--method", "dcgan", "--div-points", "interp"], r"--div-points must stay endpoints"),
        (["--fid-distinct", "1"], r"--fid-distinct must be 0 or at least 2"),
        (["--query-pixels", "3", "64"], r"--query-pixels must be rows and columns from 0 to 63"),
        (["--query-pixels", "3"], r"query-pixels"),
    ],
    "sagan_dogs": [
        (["--attention", "none", "--attn-block", "pooled"], r"--attn-block must stay full with"),
        (["--attention", "no-g", "--attn-g", "8"], r"--attn-g must stay .16, 32. with"),
        (
            ["--early-stop", "--eval-every", "500", "--log-every", "300"],
            r"--log-every must divide --eval-every with --early-stop, got 300",
        ),
        (
            ["--attn-g", "64"],
            r"--attn-g must be among 4, 8, 16, 32, the maps of 64x64 images, got 64",
        ),
        (
            ["--attn-d", "8", "5"],
            r"--attn-d must be among 4, 8, 16, 32, the maps of 64x64 images, got 8 5",
        ),
        (
            ["--img-size", "32", "--attn-g", "32"],
            r"--attn-g must be among 4, 8, 16, the maps of 32x32",
        ),
        (["--img-size", "48"], r"--img-size must be 32, 64 or 128, got 48"),
        (
            ["--dataset", "stanford-dogs", "--crop", "64"],
            r"--crop must stay 0 with --dataset stanford-dogs, got 64",
        ),
        (["--boxes", "first"], r"--boxes must stay all without --dataset stanford-dogs, got first"),
        (
            ["--dataset", "folder", "--aspect", "square"],
            r"--aspect must stay stretch without --dataset stanford-dogs, got square",
        ),
        (["--milestones", "500", "0"], r"--milestones must be above 0"),
        (
            ["--early-stop", "--eval-every", "0"],
            r"--eval-every must be above 0 with --early-stop, got 0",
        ),
        (
            ["--dataset", "stanford-dogs", "--data-dir", "{tmp}/none", "--eval-every", "0"],
            r"--dataset stanford-dogs not found in .*none: no images/Images, Images or images\.tar; put images\.tar and annotation\.tar of http",
        ),
        (
            ["--dataset", "stanford-dogs", "--data-dir", "{tmp}/Images", "--eval-every", "0"],
            r"Images holds the breeds: --data-dir must name its parent",
        ),
        (["--attention", "no_g"], r"invalid choice|no_g"),
        (["--loss", "wgan"], r"invalid choice|wgan"),
    ],
    "gca_gan": [
        (["--img-size", "48"], r"--img-size must be 32, 64 or 128, got 48"),
        (
            ["--dataset", "celeba", "--crop", "200"],
            r"--crop must be at most 178 with --dataset celeba, .*got 200",
        ),
        (["--crop", "-1"], r"--crop must be at least 0, got -1"),
        (["--crop", "face"], r"face"),
        (
            ["--dataset", "celeba", "--squash", "--crop", "178"],
            r"--crop must be 0 with --squash, got 178",
        ),
        (["--squash"], r"--squash must stay off without --dataset celeba"),
        (["--d-ch", "3"], r"--gca-k must divide the 12 channels of D's 8x8 map, got 8"),
        (
            ["--g-ch", "5", "--block", "nl"],
            r"--gca-k must divide the 20 channels of G's 8x8 map, got 8",
        ),
        (["--gca-k", "3"], r"gca-k"),
        (["--block", "none", "--gca-k", "4"], r"--gca-k must stay 8 without a --block, got 4"),
        (["--block", "none", "--block-in", "g"], r"--block-in must stay both without a --block"),
        (
            ["--block", "nl", "--gca-variant", "gram"],
            r"--gca-variant must stay nodes without --block gca",
        ),
        (
            ["--block", "nl", "--gca-binarize", "ste"],
            r"--gca-binarize must stay off without --block gca",
        ),
        (
            ["--block", "nl", "--gca-y-transpose"],
            r"--gca-y-transpose must stay off without --block gca",
        ),
        (
            ["--gca-variant", "gcn", "--gca-y-transpose"],
            r"--gca-y-transpose must be off with .*gcn",
        ),
        (["--nl-variant", "value"], r"--nl-variant must stay paper without --block nl, got value"),
        (["--lambda-gp", "1"], r"--lambda-gp must stay 10.0 without --loss wgan-gp, got 1.0"),
        (["--loss", "wgan-gp", "--lambda-gp", "-1"], r"--lambda-gp must be at least 0, got -1.0"),
        (["--runs", "a", "b"], r"--runs must stay off without --mode figures"),
        (["--heatmap-net", "g"], r"--heatmap-net must stay d without --mode figures"),
        (
            ["--mode", "figures", "--runs", "{tmp}/a", "--checkpoint", "x.pt"],
            r"--runs must not go with",
        ),
        (["--mode", "figures", "--runs", "{tmp}/a", "{tmp}/b"], r"a/checkpoint\.pt is missing"),
        (["--z-dim", "-1"], r"--z-dim must be at least 1"),
        (
            ["--dataset", "celeba", "--no-download", "--eval-every", "0", "--data-dir", "{tmp}"],
            r"not found in .*img_align_celeba\.zip.*celeba/",
        ),
        (
            ["--dataset", "lsun-church", "--eval-every", "0", "--data-dir", "{tmp}"],
            r"church_outdoor_train_lmdb.*or read a folder of images by --dataset folder",
        ),
        (["--dataset", "image"], r"--dataset must be image with --model consingan, and only there"),
        (["--image", "a.png"], r"--image must stay off without --model consingan, got a\.png"),
        (["--stages", "3"], r"--stages must stay 6 without --model consingan, got 3"),
    ],
    "an_gan": [
        (["--img-size", "48"], r"--img-size must be 32, 64 or 128, got 48"),
        (["--entities", "0"], r"--entities must be at least 1, got 0"),
        (["--tau", "0"], r"--tau must be above 0, got 0"),
        (["--tau", "-1"], r"--tau must be at least 0, got -1"),
        (["--lambda-ortho", "-1"], r"--lambda-ortho must be at least 0"),
        (["--beta2", "1"], r"--beta2 must be below 1"),
        (["--d-blocks", "6"], r"--d-blocks must be 5 but for --img-size 128"),
        (
            ["--model", "sagan", "--entities", "8"],
            r"--entities must stay 16 without --model an, got 8",
        ),
        (
            ["--model", "sngan", "--no-self-sampling"],
            r"--self-sampling must stay True without --model an",
        ),
        (
            ["--model", "sngan-star", "--region-stats", "bn"],
            r"--region-stats must stay in without --model an",
        ),
        (["--intra-num", "1"], r"--intra-num must be 0 or at least 2, got 1"),
        (["--num-classes", "-1"], r"--num-classes must be at least 0"),
        (
            [
                "--num-classes",
                "7",
                "--batch-size",
                "4",
                "--eval-every",
                "0",
                "--num-workers",
                "0",
                "--data-dir",
                "{tmp}",
            ],
            r"--num-classes must be 8, the classes of the data, got 7",
        ),
        (
            ["--dataset", "folder", "--data-dir", "{tmp}/missing", "--eval-every", "0"],
            r"--data-dir must be a folder with a subfolder per class.*--num-classes 1.*missing",
        ),
        (
            [
                "--dataset",
                "folder",
                "--data-dir",
                "{tmp}",
                "--num-classes",
                "1",
                "--eval-every",
                "0",
            ],
            r"no images",
        ),
        (
            ["--dataset", "imagenet", "--data-dir", "{tmp}", "--eval-every", "0"],
            r"--dataset imagenet not found in .*put its class folders into train/",
        ),
        (
            ["--dataset", "cifar10", "--data-dir", "{tmp}", "--no-download", "--eval-every", "0"],
            r"--dataset cifar10 not found in .*cifar-10-python.tar.gz",
        ),
        (
            ["--mode", "figures", "--dataset", "shapes", "--out-dir", "{tmp}"],
            r"checkpoint.pt is missing",
        ),
    ],
    "an_inpaint": [
        (["--output", "x.png"], r"--output must stay off without --mode inpaint, got x.png"),
        (["--compare", "x.pt"], r"--compare must stay off without --mode figures"),
        (["--amp", "bf16", "--device", "cpu"], r"--amp must be off on the CPU: .*, got bf16"),
        (["--img-size", "32"], r"--img-size must be a multiple of 8, at least 64, got 32"),
        (["--img-size", "100"], r"--img-size must be a multiple of 8, at least 64, got 100"),
        (["--img-size", "64", "--box", "65"], r"--box must fit into --img-size 64, got 65"),
        (["--shrink", "0.5"], r"--shrink must be below 0.5"),
        (["--shrink", "-0.1"], r"--shrink must be at least 0"),
        (["--entities", "0"], r"--entities must be at least 1, got 0"),
        (["--tau", "0"], r"--tau must be above 0"),
        (["--tau", "-1"], r"--tau must be at least 0"),
        (
            ["--phase1-steps", "5", "--phase2-steps", "5", "--total-steps", "11"],
            r"--total-steps must be at most 10, the steps of both phases, got 11",
        ),
        (["--phase1-steps", "0", "--phase2-steps", "0"], r"--total-steps must be at"),
        (
            ["--train-mask", "stroke"],
            r"--critics must be global or global-patch with --train-mask stroke, which has no box",
        ),
        (
            ["--train-mask", "stroke", "--critics", "global", "--reconstruction", "discount"],
            r"--reconstruction must be regional or full with --train-mask stroke, which has no box",
        ),
        (
            ["--train-mask", "file", "--critics", "global"],
            r"--train-mask must not be file without --mask-dir",
        ),
        (["--eval-mask", "file"], r"--eval-mask must not be file without --mask-dir"),
        (
            ["--img-size", "64", "--eval-mask", "file", "--mask-dir", "{tmp}/no"],
            r"no does not exist",
        ),
        (["--refine", "plain", "--entities", "8"], r"--entities must stay 16 with --refine plain"),
        (
            ["--refine", "ca", "--lambda-ortho", "0"],
            r"--lambda-ortho must stay 0.001 with --refine ca",
        ),
        (["--no-fuse"], r"--fuse must stay True with --refine an, got False"),
        (["--refine", "gan"], r"gan"),
        (["--n-critic", "0"], r"--n-critic must be at least 1"),
        (
            ["--img-size", "64", "--batch-size", "951"],
            r"--batch-size must be at most 950, the number of images, got 951",
        ),
        (["--image", "a.png"], r"--image must be given with --mode inpaint, and only there"),
        (
            ["--mode", "inpaint", "--mask", "m.png"],
            r"--image must be given with --mode inpaint, and only there, got nothing",
        ),
        (
            ["--mode", "inpaint", "--image", "a.png"],
            r"--mask must be given with --mode inpaint, and only there, got nothing",
        ),
        (
            [
                "--mode",
                "inpaint",
                "--image",
                "a.png",
                "--mask",
                "m.png",
                "--checkpoint",
                "{tmp}/c.pt",
            ],
            r"c.pt is missing",
        ),
        (
            ["--dataset", "paris-streetview", "--data-dir", "{tmp}"],
            r"paris-streetview not found in .*train/ and val/ \(or test/\)",
        ),
        (["--dataset", "folder", "--data-dir", "{tmp}/no"], r"no does not exist"),
        (["--dataset", "folder", "--data-dir", "{tmp}"], r"no images .* under"),
        (["--img-size", "64", "--eval-from", "{tmp}/no"], r"no does not exist"),
    ],
}
EVERY_CASE = [(s, *case) for s in SCRIPTS for case in [*COMMON, *CASES[s]]]
GRAPHS = ["--cuda-graphs", "--device", "cpu"], r"--cuda-graphs must stay off except on one GPU"
EVERY_CASE += [(script, *GRAPHS) for script in SCRIPTS if script != "an_inpaint"]
# There 0 stands for the steps of both phases.
EVERY_CASE.remove(("an_inpaint", ["--total-steps", "0"], r"--total-steps must be at least 1"))
# There is no Inception Score, whose images come in ten splits.
EVERY_CASE.remove(("an_inpaint", ["--fid-num", "9"], r"--fid-num must be at least 10"))
# There a folder without class folders is the mistake.
EVERY_CASE.remove(("an_gan", ["--dataset", "folder", "--data-dir", "."], r"no images"))


def assert_mistake(result, words: str) -> None:
    code, _, err = result
    assert code == 2, err
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    if "For full helptext" not in err:  # the parser speaks for itself
        assert len(lines) == 1, err
    assert re.search(words, lines[0] if lines else err, re.DOTALL), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    EVERY_CASE,
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_one_line_and_leaves_nothing(script, argv, words, call, tmp_path):
    argv = [flag.replace("{tmp}", str(tmp_path)) for flag in argv]
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


def test_one_gpu_for_all_processes(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = call("giu_gan", *tiny("giu_gan", "--device", "cuda:0"))
    assert_mistake(result, r"--device must be auto, cpu or cuda with several processes, got cuda:0")


@every_script
def test_missing_inception_weights_stop_before_training(script, call, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    result = call(script, *tiny(script, "--eval-every", "2", "--fid-weights", "auto"))
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


PHOTO_CASES = [  # flags after --model consingan, and what the message must say
    ("", r"--image must name a photograph with --model consingan, got nothing"),
    ("--checkpoint x.pt", r"--checkpoint must stay empty with --mode train"),
    ("--mode sample", r"--image must name a photograph"),
    ("--mode evaluate --checkpoint x.pt", r"x\.pt is missing"),
    ("--mode figures --runs a b", r"a/checkpoint\.pt is missing"),
    ("--dry-run --mode sample --checkpoint x.pt", r"--image must name a photograph"),
    ("--image vast.png --stages 1 --block nl", r"--block must be none where stage 0 has 22500"),
    ("--image large.png --max-size 40 --min-size 20 --eval-every 1 --sifid-dims 192 "
     "--fid-weights random", r"40x40 has too few positions for 192 features"),
    ("--image nowhere.jpg", r"nowhere\.jpg cannot be read: .*No such file"),
    ("--image .", r"error: \. cannot be read: .*Is a directory"),
    ("--image text.png", r"text\.png cannot be read: cannot identify"),
    ("--image cut.png", r"cut\.png cannot be read: "),
    ("--image float.tif", r"float\.tif cannot be read: the range of floating-point"),
    ("--image flat.png", r"--min-size must be below 15, .*a smaller --min-size or a larger .*250"),
    ("--image small.png", r"--min-size must be below 25, the short side at 25x40 pixels"),
    ("--image large.png --block gca --min-size 65", r"--gca-variant must be .*4225 .* above 4096"),
    ("--image a.png --min-size 10", r"--min-size must be at least 11 pixels, .*got 10"),
    ("--image a.png --num-layer 11", r"--min-size must be at least 27 pixels, .*got 25"),
    ("--image a.png --num-layer 0", r"--num-layer must be at least 1"),
    ("--image a.png --stages 0", r"--stages must be at least 1, got 0"),
    ("--image a.png --niter 0", r"--niter must be at least 1, got 0"),
    ("--image a.png --train-depth 0", r"--train-depth must be at least 1, got 0"),
    ("--image a.png --g-steps 0", r"--g-steps must be at least 1"),
    ("--image a.png --noise-amp -1", r"--noise-amp must be at least 0"),
    ("--image a.png --total-steps 12001", r"--total-steps must be at most .*12000, got 12001"),
    ("--image a.png --batch-size 2", r"--batch-size must be 1 with --model consingan, got 2"),
    ("--image a.png --loss hinge --lambda-gp 10", r"--loss must be wgan-gp with --model consingan"),
    ("--image a.png --amp bf16", r"--amp must be off with --model consingan, got bf16"),
    ("--image a.png --dataset shapes", r"--dataset must be image with --model consingan"),
    ("--image a.png --hflip", r"--hflip must stay off without --model dcgan or sagan"),
    ("--image a.png --block-in g", r"--block-in must stay both without --model dcgan or sagan"),
    ("--image a.png --img-size 32", r"--img-size must stay 64 without --model dcgan or sagan"),
    ("--image a.png --z-dim 100", r"--z-dim must stay 3 without --model dcgan or sagan"),
    ("--image a.png --gca-in-d", r"--gca-in-d must stay off without a --block"),
    ("--image a.png --gca-place head", r"--gca-place must stay body without a --block, got head"),
    ("--image a.png --scale-h 2", r"--scale-h must stay 1.0 without --mode sample, got 2.0"),
    ("--image a.png --mode sample --scale-w 0", r"--scale-w must be above 0"),
    ("--image a.png --block gca --g-ch 20", r"--gca-k must divide the 20 channels of G's map"),
]


@pytest.mark.parametrize(("flags", "words"), PHOTO_CASES)
def test_mistakes_with_one_photograph(flags, words, call, tmp_path):
    Path("text.png").write_text("no image")
    sides = {"flat": (1000, 60), "small": (40, 25), "large": (90, 90), "vast": (150, 150)}
    sides["cut"] = 90, 90
    for name, size in sides.items():
        if name in flags:
            Image.effect_noise(size, 50).convert("RGB").save(f"{name}.png")
    if "cut" in flags:
        Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:2000])
    Image.new("F", (40, 40)).save("float.tif")
    assert_mistake(call("gca_gan", "--model", "consingan", *flags.split()), words)
    assert not (tmp_path / "runs").exists()


def test_one_photograph_needs_no_weights_but_for_an_evaluation(call, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    Image.effect_noise((40, 40), 50).convert("RGB").save("a.png")
    flags = ["--model", "consingan", "--image", "a.png", "--stages", "1", "--g-ch", "4"]
    flags += ["--d-ch", "4", "--num-samples", "1"]
    result = call("gca_gan", *flags, "--niter", "1", "--eval-every", "1")
    assert_mistake(result, r"inception_v3_google.*--fid-weights")
    assert call("gca_gan", *flags, "--niter", "1")[0] == 0
    result = call("gca_gan", *flags, "--niter", "1", "--mode", "evaluate")
    assert_mistake(result, r"inception_v3_google.*--fid-weights")


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
