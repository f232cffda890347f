"""Static rules over edgekd/, read from the syntax tree (G20). Each has a bait that proves it fires and a decoy that it must leave alone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "edgekd"
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
TORCH_LOADS = {"torch.load", "torch.serialization.load", "torch.jit.load", "torch.export.load"}
ONNX_LOADS = {"onnx.load", "onnx.load_model"}  # parsing bytes in memory opens no file
YAML_LOADS = {f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")}

Found = Iterator[tuple[ast.AST, str]]  # every use of an outside name or keyword: node, dotted name


def names(tree: ast.AST) -> Found:
    """Imports and attribute chains under the full name of what they stand for: aliases do not hide anything."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                aliases[a.asname or a.name.partition(".")[0]] = a.name if a.asname else a.name.partition(".")[0]
                yield node, a.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for a in node.names:
                aliases[a.asname or a.name] = f"{node.module}.{a.name}"
                yield node, f"{node.module}.{a.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and (dotted := _dotted(node)):
            first, dot, rest = dotted.partition(".")
            yield node, aliases.get(first, first) + dot + rest


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def named(wanted: set[str], *, below: bool = False) -> Callable[[ast.AST], list[int]]:
    """Lines that use one of the names, or (below) anything inside the modules of these names."""

    def find(tree: ast.AST) -> list[int]:
        hit = (lambda n: n.partition(".")[0] in wanted) if below else (lambda n: n in wanted)
        return [node.lineno for node, name in names(tree) if hit(name)]  # type: ignore[attr-defined]

    return find


def imported(wanted: set[str]) -> Callable[[ast.AST], list[int]]:
    def find(tree: ast.AST) -> list[int]:
        found = [(n, a.name) for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        found += [(n, n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0]
        calls = (
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and _dotted(n.func).rpartition(".")[2] in ("import_module", "__import__")
        )
        found += [(n, str(a.value)) for n in calls for a in n.args if isinstance(a, ast.Constant)]
        return [node.lineno for node, name in found if name.partition(".")[0] in wanted]

    return find


def called(wanted: set[str]) -> Callable[[ast.AST], list[int]]:
    """Calls of a bare built-in, or of it through `builtins`."""

    def find(tree: ast.AST) -> list[int]:
        return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and _dotted(n.func).removeprefix("builtins.") in wanted]

    return find


def method(wanted: set[str]) -> Callable[[ast.AST], list[int]]:
    def find(tree: ast.AST) -> list[int]:
        calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
        return [n.lineno for n in calls if n.func.attr in wanted]  # type: ignore[attr-defined]

    return find


def keyword(name: str, *values: object) -> Callable[[ast.AST], list[int]]:
    """Calls with `name=value`; without values, with the keyword at all."""

    def find(tree: ast.AST) -> list[int]:
        calls = ((n, k) for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg == name)
        return [n.lineno for n, k in calls if not values or not isinstance(k.value, ast.Constant) or k.value.value in values]

    return find


# templates/ holds the scripts that a bundle hands to the user: they run on the device, without edgekd
SAFEIO, SPAWNERS, CONSOLE = ("safeio/",), ("safeio/", "profile/transports/"), ("console.py", "templates/")
# name -> (finder, places where it is allowed, bait, decoy)
RULES: dict[str, tuple[Callable[[ast.AST], list[int]], tuple[str, ...], str, str]] = {
    "pickles": (imported(PICKLES), (), "import pickle", "pickle = 3"),
    "pickles under another name": (imported(PICKLES), (), "from dill import loads as json_loads", "from mypackage import pickle_free"),
    "pickles imported by string": (imported(PICKLES), (), "importlib.import_module('pickle')", "importlib.import_module('json')"),
    "eval": (called({"eval", "exec"}), (), "eval('1')", "model.eval()"),
    "exec": (called({"eval", "exec"}), (), "import builtins\nbuiltins.exec('x = 1')", "evaluate('x')"),
    "yaml.load": (named(YAML_LOADS), (), "import yaml\nyaml.load(t)", "import yaml\nyaml.parse(t)"),
    "yaml.load under another name": (
        named(YAML_LOADS),
        (),
        "from yaml import unsafe_load as f\nf(t)",
        "from yaml import parse as load\nload(t)",
    ),
    "shell=True": (keyword("shell", True), (), "subprocess.run('ls', shell=True)", "subprocess.run(['ls'], shell=False)"),
    "shell=variable": (keyword("shell", True), (), "subprocess.run('ls', shell=flag)", "run(shelf=True)"),
    "os.system": (named(SHELLS), (), "import os as o\no.system('ls')", "import os\nos.stat('x')"),
    "extract": (method({"extractall", "extract", "unpack_archive"}), (), "archive.extractall(d)", "features.extract_all(d)"),
    "weights_only=False": (keyword("weights_only", False), (), "torch.load(f, weights_only=False)", "torch.load(f, weights_only=True)"),
    "trust_remote_code": (keyword("trust_remote_code"), (), "load(x, trust_remote_code=False)", "load(x, trust=False)"),
    "allow_pickle=True": (keyword("allow_pickle", True), (), "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=False)"),
    "mktemp": (named({"tempfile.mktemp"}), (), "from tempfile import mktemp\nmktemp()", "import tempfile\ntempfile.mkdtemp()"),
    "torch.load": (named(TORCH_LOADS), SAFEIO, "import torch as t\nt.load(f)", "import torch\ntorch.save(f)"),
    "onnx.load": (named(ONNX_LOADS), SAFEIO, "from onnx import load_model\nload_model(f)", "import onnx\nonnx.save(m, f)"),
    "Image.open": (
        named({"PIL.Image.open"}),
        (*SAFEIO, "templates/"),
        "from PIL import Image\nImage.open(f)",
        "from PIL import Image\nImage.new('RGB', s)",
    ),
    "archives": (imported({"zipfile", "tarfile", "shutil.unpack_archive"}), SAFEIO, "from tarfile import open", "import gzip"),
    "subprocess": (imported({"subprocess", "pty", "multiprocessing.popen"}), SPAWNERS, "import subprocess", "import subprocessing"),
    "print": (called({"print"}), CONSOLE, "print('x')", "console.print('x')"),
}


def violations(rule: str, folder: Path = PACKAGE) -> list[str]:
    find, allowed, _, _ = RULES[rule]
    found = []
    for path in sorted(folder.rglob("*.py")):
        where = path.relative_to(folder).as_posix()
        if not where.startswith(allowed):
            found += [f"{where}:{line}" for line in find(ast.parse(path.read_text(encoding="utf-8")))]
    return found


@pytest.mark.parametrize("rule", RULES)
def test_edgekd_keeps_the_rule(rule: str) -> None:
    assert violations(rule) == []


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_fires_on_its_bait_and_not_on_its_decoy(rule: str, tmp_path: Path) -> None:
    _, allowed, bait, decoy = RULES[rule]
    for place in ("stages/x.py", *(a if a.endswith(".py") else a + "x.py" for a in allowed)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(bait)
    assert {v.partition(":")[0] for v in violations(rule, tmp_path)} == {"stages/x.py"}
    for path in tmp_path.rglob("*.py"):
        path.write_text(decoy)
    assert violations(rule, tmp_path) == []


def test_the_rules_look_at_every_file_of_the_package() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 20
