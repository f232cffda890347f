"""Every shipped recipe loads and plans; every command line of README exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.graphs import save_planetoid
from tests.support import REPOSITORY, run_here, write_images

CODE = REPOSITORY / "recipes" / "cifar10" / "resnet_cifar.py"
RECIPES = sorted(p.relative_to(REPOSITORY / "recipes").with_suffix("").as_posix() for p in (REPOSITORY / "recipes").rglob("*.yaml"))
README = REPOSITORY / "README.md"
BLACK_BOXES = {  # what a user gives beside data.root
    "distill/black-box-onnx": ["teacher.onnx={}"],
    "distill/label-free": ["data.classes=2", "teacher.weights={}"],
    "distill/predictions": ["teacher.predictions={}"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny image folder and a weights file, neither of which planning reads beyond its hash; it stands for any other file of a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "teacher.safetensors").write_bytes(b"weights")
    return write_images(folder / "data", classes=2, each=10), folder / "teacher.safetensors"


def test_the_listed_recipes_are_the_files() -> None:
    assert [r["name"] for r in run_here("recipes", "list", "--json").json()] == RECIPES
    assert {"quickstart", "cifar10/resnet56-to-resnet20", "cifar10/resnet56-to-vit", "cifar10/resnet20-low-bits", *BLACK_BOXES} <= set(
        RECIPES
    )


def test_every_recipe_says_what_it_is_for() -> None:
    assert all(r["about"] for r in run_here("recipes", "list", "--json").json())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_plans_by_name_and_by_path(name: str, inputs: tuple[Path, Path], home: Path) -> None:
    data, weights = inputs
    bare = name in ("quickstart", "distill/assistant", "graph/quickstart") or "digits" in name  # needs no data
    changes = () if bare else ("--code", CODE, "-o", f"data.root={data}", "-o", f"teacher.weights={weights}")
    changes += ("-o", f"model.weights={weights}") if "low-bits" in name else ()
    of_graph = name.startswith("graph/") and not bare
    if of_graph:
        save_planetoid(data.parent / "graphs")
        (data.parent / "graphs" / "amazon_photo.npz").write_bytes(b"rows")
        changes = ("-o", f"data.root={data.parent / 'graphs'}", *(() if "photo" in name else ("-o", "data.name=toy")))
    if name in BLACK_BOXES:
        changes = ("-o", f"data.root={data}", *(part for c in BLACK_BOXES[name] for part in ("-o", c.format(weights))))
    for how in (name, REPOSITORY / "recipes" / f"{name}.yaml"):
        assert run_here("check", how, *changes).code == 0
        result = run_here("plan", how, *changes, "--json")
        assert result.code == 0, result.err
        steps = [r["step"] for r in result.json()]
        chain = {"distill", "prune", "recover", "quantize"}
        if "low-bits" in name or name in BLACK_BOXES or "digits" in name:
            chain = {"quantize.train", "quantize"} if "low-bits" in name else {"distill"} if "digits" in name else {"distill", "quantize"}
        if of_graph:
            chain = {"distill", "quantize", "teacher.answers"}
        if name == "distill/assistant":
            chain = {"distill", "assistant", "distill.assisted"}
        assert {"data", "preflight", "teacher", "host.bundle"} | chain <= set(steps)
        assert len(steps) == len(set(steps))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_show_prints_the_file(name: str) -> None:
    assert run_here("recipes", "show", name).out.strip() == (REPOSITORY / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").strip()


def test_a_path_that_is_not_there_is_3_at_plan_time(home: Path) -> None:
    result = run_here("plan", "cifar10/resnet56-to-resnet20", "--code", CODE, "-o", "data.root=nowhere")
    assert result.code == 3
    assert "nowhere" in result.err


# ------------------------------------------------------------------------------------------------------------ README
def commands() -> list[str]:
    """Lines of README's code blocks (fenced or indented) that start with `edgekd`, without their comments."""
    if not README.is_file():
        return []
    lines = (line.strip() for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(("    ", "edgekd ")))
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith("edgekd ")]


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md")
def test_readme_shows_the_main_commands() -> None:
    shown = {shlex.split(c)[1] for c in commands()}
    assert {"compress", "check", "plan", "prune", "quantize", "export", "import", "profile", "predict", "verify", "wire"} <= shown


@pytest.mark.parametrize("line", commands())
def test_every_command_line_of_readme_parses(line: str) -> None:
    """Subcommand, options and number of arguments are those of the program; nothing is run."""
    import typer
    from typer.main import get_command

    from edgekd.cli import app

    words, command = shlex.split(line)[1:], get_command(app)
    context = command.make_context("edgekd", list(words), resilient_parsing=False)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        assert rest, f"{line}: a command is missing"
        assert rest[0] in command.commands, f"{line}: there is no command '{rest[0]}'"
        command = command.commands[rest[0]]
        try:
            context = command.make_context(rest[0], rest[1:], parent=context)
        except typer.Exit:  # --help ends the parsing
            return


@pytest.mark.parametrize("line", [c for c in commands() if re.match(r"edgekd (check|plan|show|recipes|devices|methods) ", c)])
def test_read_only_command_lines_of_readme_run(line: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    result = run_here(*shlex.split(line)[1:])
    assert result.code == 0, result.err
