"""The six scripts as one author's work: same order, same name => same text, every flag real."""

import ast
import re
from collections import defaultdict

import pytest
from conftest import ROOT, SCRIPTS

BANNERS = "Imports Arguments Layers Networks Losses Data Run Evaluation Training Main".split()
OWN = set("Args check_args Generator Discriminator evaluate sample train main".split())
LENGTHS = {  # lines, at most
    "giu_gan": 848, "sagan_div": 789, "sagan_dogs": 855, "gca_gan": 1282, "an_gan": 1025,
    "an_inpaint": 1048, "fid": 487,
}  # fmt: skip
TEXTS = {name: (ROOT / f"{name}.py").read_text() for name in LENGTHS}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_file = pytest.mark.parametrize("script", LENGTHS)


def definitions(script):
    """Top-level functions and classes: name -> (text with decorators, node)."""
    lines, found = TEXTS[script].splitlines(), {}
    for node in TREES[script].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            if lines[first - 1].startswith("# differs from"):
                node.name += f" of {script}"  # the comment says why
            found[node.name] = "\n".join(lines[first : node.end_lineno]), node
    return found


def flags(script):
    """Fields of Args: name -> (type, help); the place in the paper's tables may differ."""
    body, lines, found = definitions(script)["Args"][1].body, TEXTS[script].splitlines(), {}
    for item, after in zip(body, [*body[1:], None]):
        if isinstance(item, ast.AnnAssign):
            text = lines[item.end_lineno - 1].partition("  # ")[2]
            if isinstance(after, ast.Expr):
                text = after.value.value
            text = re.sub(r" *\((Tables?|Algorithm) [^)]*\)", "", text)
            found[item.target.id] = ast.unparse(item.annotation), " ".join(text.split())
    return found


@every_script
def test_sections_stand_in_order(script):
    banners = re.findall(r"^# ---- (\d+)\. (\w+) -+$", TEXTS[script], re.M)
    assert banners == [(str(i), name) for i, name in enumerate(BANNERS, 1)]
    assert all(len(line) == 100 for line in re.findall(r"^# ---- .*$", TEXTS[script], re.M))
    assert ast.get_docstring(TREES[script]).count("Differences from the paper") == 1
    assert TEXTS[script].startswith('# /// script\n# requires-python = ">=3.11"\n')


def test_same_name_same_text():
    texts = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for name, (text, _) in definitions(script).items():
            if name not in OWN:
                texts[name][text].append(script)
    assert not {name: list(by.values()) for name, by in texts.items() if len(by) > 1}


def test_flags_of_one_name_have_one_type_and_one_help():
    kinds = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for name, (kind, text) in flags(script).items():
            kind = "Literal" if "Literal" in kind or kind[0].isupper() else kind
            kinds[name][kind, text].append(script)
    assert not {name: dict(by) for name, by in kinds.items() if len(by) > 1}


@every_script
def test_every_flag_is_typed_documented_and_read(script):
    for name, (kind, text) in flags(script).items():
        assert kind and text, f"--{name}: type and help"
        read = rf'\b(args|self|run)\.{name}\b|\("{name}", '  # self: in a property of Args
        assert re.search(read, TEXTS[script]), f"--{name} is never read"


@every_file
def test_lengths(script):
    lines = TEXTS[script].splitlines()
    assert len(lines) <= LENGTHS[script]
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


def test_the_suite_is_short():
    files = [path for path in (ROOT / "tests").rglob("*.*") if path.suffix in (".py", ".txt")]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 4500


@every_script
def test_a_script_imports_nothing_of_ours_but_fid(script):
    ours = {name for name in SCRIPTS if name != script} | {"tests", "conftest"}
    for node in ast.walk(TREES[script]):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & ours


@every_file
def test_public_functions_are_documented_and_nothing_is_swallowed(script):
    for name, (_, node) in definitions(script).items():
        assert name == "Args" or ast.get_docstring(node), name
    for node in ast.walk(TREES[script]):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
    assert "filterwarnings" not in TEXTS[script]
