"""The six scripts as one author's work: same order, same name => same text, every flag real."""

import ast
import re
from collections import defaultdict

import pytest
from conftest import ROOT, SCRIPTS

BANNERS = ["Imports", "Arguments", "Layers", "Networks", "Losses", "Data", "Run", "Evaluation",
           "Training", "Main"]  # fmt: skip
OWN = {"Args", "check_args", "Generator", "Discriminator", "evaluate", "sample", "figures", "train",
       "main"}  # fmt: skip
COMMON = """mode exp_name seed deterministic device out_dir resume checkpoint dry_run dataset data_dir
img_size hflip num_workers total_steps batch_size n_critic g_lr d_lr beta1 beta2 amp log_every
sample_every eval_every save_every fid_num fid_batch_size fid_weights eval_seed num_samples""".split()
LONGEST = {
    "giu_gan": 1130, "sagan_div": 1155, "sagan_dogs": 1345, "gca_gan": 1775, "an_gan": 1375,
    "an_inpaint": 1510,
}  # fmt: skip
TEXTS = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
every_script = pytest.mark.parametrize("script", SCRIPTS)


def definitions(script):
    """Top-level functions and classes: name -> (text with decorators, node)."""
    lines, found = TEXTS[script].splitlines(), {}
    for node in TREES[script].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            found[node.name] = "\n".join(lines[first : node.end_lineno]), node
    return found


def flags(script):
    """Fields of Args: name -> (type, help)."""
    body = definitions(script)["Args"][1].body
    found = {}
    for item, after in zip(body, [*body[1:], None]):
        if isinstance(item, ast.AnnAssign):
            doc = after.value.value if isinstance(after, ast.Expr) else None
            found[item.target.id] = ast.unparse(item.annotation), doc
    return found


@every_script
def test_rooms_stand_in_order(script):
    rule = "# " + "-" * 98
    banners = re.findall(rf"{rule}\n# (\d+)\. (\w+)\n{rule}\n", TEXTS[script])
    assert banners == [(str(i), name) for i, name in enumerate(BANNERS, 1)]
    assert ast.get_docstring(TREES[script]).count("Differences from the paper") == 1
    assert TEXTS[script].startswith("# /// script\n")


def test_same_name_same_text():
    texts, differing = defaultdict(dict), []
    for script in SCRIPTS:
        for name, (text, _) in definitions(script).items():
            if name not in OWN:
                texts[name].setdefault(text, []).append(script)
    differing = {name: list(by.values()) for name, by in texts.items() if len(by) > 1}
    assert not differing


def test_flags_of_one_name_have_one_type_and_one_help():
    kinds = defaultdict(dict)
    for script in SCRIPTS:
        for name, (kind, doc) in flags(script).items():
            kind = "Literal" if kind.startswith("Literal") else kind
            kinds[name].setdefault((kind, doc), []).append(script)
    assert not {name: by for name, by in kinds.items() if len(by) > 1}


@every_script
def test_every_flag_is_typed_documented_and_read(script):
    text = TEXTS[script]
    own = definitions(script)["Args"][0]
    rest = text.replace(own, "")
    for name, (kind, doc) in flags(script).items():
        assert kind and doc, f"--{name}: type and help"
        read = re.search(rf"\bargs\.{name}\b", rest)
        assert read, f"--{name} is never read"
    assert set(COMMON) <= flags(script).keys()


@every_script
def test_lengths(script):
    lines = TEXTS[script].splitlines()
    assert len(lines) <= LONGEST[script]
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]
    for name, (text, node) in definitions(script).items():
        parts = node.body if isinstance(node, ast.ClassDef) and name != "Args" else [node]
        for part in parts:
            if isinstance(part, ast.FunctionDef):
                limit = 120 if part.name.startswith("train") else 60
                assert part.end_lineno - part.lineno < limit, f"{name}.{part.name}"


@every_script
def test_a_script_imports_nothing_of_ours_but_fid(script):
    ours = {name for name in SCRIPTS if name != script} | {"tests", "conftest"}
    for node in ast.walk(TREES[script]):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & ours


@every_script
def test_public_functions_are_documented_and_nothing_is_swallowed(script):
    for name, (_, node) in definitions(script).items():
        assert name == "Args" or ast.get_docstring(node), name
    for node in ast.walk(TREES[script]):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
    assert "filterwarnings" not in TEXTS[script]
