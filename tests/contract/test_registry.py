"""Every member of every kind keeps the contract of its kind: a new file is tested without being named here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import edgekd
from edgekd import registry
from edgekd.artifact import Kind
from edgekd.config import Config
from edgekd.errors import UnknownName, UsageError
from edgekd.graph._distiller import NEEDS as GRAPH_NEEDS
from edgekd.stages._stage import Settings
from edgekd.train.distiller import NEEDS

PACKAGE = Path(edgekd.__file__).parent
MEMBERS = [(kind, name) for kind in registry.FOLDERS for name in registry.names(kind)]
ALGORITHMS = [(kind, name) for kind, name in MEMBERS if kind in ("distill", "criterion", "quantize", "graph_distill")]
CONFIGURED = [
    (kind, name) for kind, name in MEMBERS if kind in ("distill", "criterion", "quantize", "graph_distill", "architecture", "stage")
]
STAGES = registry.names("stage")
USER_STAGES = [n for n in STAGES if hasattr(registry.load("stage", n), "method_kind") and getattr(registry.load("stage", n), "user", False)]
METHODS: dict[str, set[str]] = {  # what each kind's Protocol asks for
    "distill": {"setup", "terms", "needs", "co_trains", "Config"},
    "criterion": {"score", "needs", "Config"},
    "quantize": {"quantize", "level", "precision", "needs", "Config"},
    "backend": {"available", "builds", "builds_for", "Options", "runs_on", "version", "convert", "open", "name", "suffix"},
    "task": {"collate", "mix", "label_loss", "scores", "metrics", "agreement", "confusion", "postprocess", "metric_name"},
    "format": {"scan", "read", "image"},
    "graph": {"files", "read"},
    "graph_distill": {"setup", "terms", "needs", "Config"},
    "architecture": {"create", "looks_at", "Config"},
    "stage": {"run", "takes", "gives", "version", "libraries", "Config"},
    "transport": {"ask", "name"},
}


# ------------------------------------------------------------------------------------------------------------ all kinds
@pytest.mark.parametrize("kind", registry.FOLDERS)
def test_the_members_of_a_kind_are_the_files_of_its_folder(kind: str) -> None:
    files = {p.stem for p in (PACKAGE / registry.FOLDERS[kind]).iterdir() if p.suffix == ".py" and not p.name.startswith("_")}
    assert files
    assert set(registry.names(kind)) == files
    assert list(registry.names(kind)) == sorted(files)


def test_the_contract_of_every_kind_is_checked() -> None:
    assert METHODS.keys() == registry.FOLDERS.keys()


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_member_is_the_one_class_of_its_file_and_keeps_its_kinds_contract(kind: str, name: str) -> None:
    cls = registry.load(kind, name)
    assert cls.__module__ == registry.module_of(kind, name)
    assert METHODS[kind] <= set(dir(cls)) | set(getattr(cls, "__annotations__", {}))
    assert registry.source_of(kind, name) == Path(sys.modules[cls.__module__].__file__ or "").read_bytes()
    if kind in ("backend", "transport"):
        assert cls.name == name


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_members_file_says_what_it_is_in_one_line(kind: str, name: str) -> None:
    first = (importlib.import_module(registry.module_of(kind, name)).__doc__ or "").partition("\n")[0]
    assert len(first) > 20
    assert first.endswith(".")


@pytest.mark.parametrize(("kind", "name"), ALGORITHMS)
def test_an_algorithm_names_its_source(kind: str, name: str) -> None:
    text = importlib.import_module(registry.module_of(kind, name)).__doc__ or ""
    assert [line for line in text.splitlines() if line.startswith("Source: ") and len(line) > 30]


# ------------------------------------------------------------------------------------------------------------ configs
def nested(config: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config and every config inside it."""
    yield config
    for info in config.model_fields.values():
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from nested(part)


@pytest.mark.parametrize(("kind", "name"), CONFIGURED)
def test_a_config_is_frozen_closed_and_described(kind: str, name: str) -> None:
    for config in nested(registry.load(kind, name).Config):
        assert issubclass(config, Config)
        assert (config.model_config["frozen"], config.model_config["extra"]) == (True, "forbid")
        assert [n for n, f in config.model_fields.items() if not f.description] == []
        with pytest.raises(ValidationError, match="no_such_field"):
            config.model_validate({"no_such_field": 1})


@pytest.mark.parametrize(("kind", "name"), ALGORITHMS)
def test_a_method_runs_with_its_defaults_and_its_settings_cannot_be_changed_later(kind: str, name: str) -> None:
    cls = registry.load(kind, name)
    method = cls(cls.Config())
    for field in cls.Config.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(method.config, field, 1)


@pytest.mark.parametrize("name", registry.names("distill"))
def test_what_a_distiller_needs_is_known_to_the_loop(name: str) -> None:
    cls = registry.load("distill", name)
    assert cls.needs <= NEEDS
    assert isinstance(cls.co_trains, bool)
    assert "label_weight" in cls.Config.model_fields


@pytest.mark.parametrize("name", registry.names("graph_distill"))
def test_what_a_distiller_of_graphs_needs_is_known_to_the_training(name: str) -> None:
    cls = registry.load("graph_distill", name)
    assert cls.needs <= GRAPH_NEEDS
    assert "label_weight" in cls.Config.model_fields


@pytest.mark.parametrize("name", registry.names("criterion"))
def test_what_a_criterion_needs_is_known_to_the_stage(name: str) -> None:
    assert registry.load("criterion", name).needs <= {"weights", "grads", "activations"}


@pytest.mark.parametrize("stage", USER_STAGES)
def test_no_setting_of_a_method_hides_one_of_its_stage(stage: str) -> None:
    """Both are written in the same section of a recipe."""
    cls = registry.load("stage", stage)
    taken = {"name", cls.method_field, *cls.Config.model_fields}
    for method in registry.names(cls.method_kind) if cls.method_kind else ():
        assert not taken & registry.load(cls.method_kind, method).Config.model_fields.keys(), method


# ------------------------------------------------------------------------------------------------------------ stages
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_what_it_takes_and_gives(name: str) -> None:
    cls = registry.load("stage", name)
    assert isinstance(cls.gives, Kind)
    assert all(isinstance(kind, Kind) for kind in cls.takes.values())
    assert all(n == "*" or n.removesuffix("?").isidentifier() for n in cls.takes)
    assert isinstance(cls.version, int)
    assert cls.version >= 1


@pytest.mark.parametrize("name", STAGES)
def test_the_libraries_of_a_stage_are_distributions_that_edgekd_depends_on(name: str) -> None:
    """A misspelt name would silently stay out of every key."""
    declared = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").lower()
    for library in registry.load("stage", name).libraries:
        assert f'"{library}>=' in declared, library


def test_one_of_the_runtimes_of_the_keys_is_installed() -> None:
    found = []
    for library in ("onnxruntime-gpu", "onnxruntime"):
        try:
            found.append(metadata.version(library))
        except metadata.PackageNotFoundError:
            continue
    assert found


@pytest.mark.parametrize("stage", USER_STAGES)
def test_a_stage_that_recipes_list_has_a_default_method_or_none(stage: str) -> None:
    cls = registry.load("stage", stage)
    assert isinstance(cls.compresses, bool)
    assert cls.method_kind is None or cls.default_method in registry.names(cls.method_kind)


def test_settings_of_another_stage_are_a_fault_and_not_a_guess() -> None:
    train, export = registry.load("stage", "train"), registry.load("stage", "export")
    with pytest.raises(TypeError, match="x was planned with Config, not TrainConfig"):
        Settings("x", export.Config()).typed(train.Config)


# ------------------------------------------------------------------------------------------------------------ names
@pytest.mark.parametrize("kind", registry.FOLDERS)
def test_an_unknown_name_is_refused_with_the_nearest(kind: str) -> None:
    name = registry.names(kind)[0]
    with pytest.raises(UnknownName, match=rf"unknown {kind} '{name}x'; did you mean '{name}'\?"):
        registry.load(kind, f"{name}x")


def test_helpers_and_paths_are_no_names() -> None:
    for name in ("_task", "../cli", "__init__", "classification.py", ""):
        with pytest.raises(UnknownName):
            registry.load("task", name)


# ------------------------------------------------------------------------------------------------------------ user classes
@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """Registrations that end with the test."""
    found: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(registry, "_user", found)
    return found


def test_a_users_class_is_listed_loaded_and_part_of_keys(user: dict[tuple[str, str], Any]) -> None:
    class Mine:
        pass

    assert edgekd.register("criterion", "mine")(Mine) is Mine
    assert registry.load("criterion", "mine") is Mine
    assert "mine" in registry.names("criterion")
    assert "mine" not in registry.names("distill")
    assert registry.source_of("criterion", "mine") == Path(__file__).read_bytes()


def test_a_users_class_without_a_name_takes_its_own(user: dict[tuple[str, str], Any]) -> None:
    @edgekd.register("task")
    class Parity:
        pass

    assert registry.load("task", "parity") is Parity


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_a_users_class_cannot_replace_one_of_ours(user: dict[tuple[str, str], Any], kind: str, name: str) -> None:
    before = registry.load(kind, name)
    with pytest.raises(UsageError, match=f"{kind} '{name}' exists already") as caught:
        edgekd.register(kind, name)(type("Mine", (), {"__module__": "mine"}))
    assert "another name" in str(caught.value.hint)
    assert registry.load(kind, name) is before


def test_two_users_classes_of_one_name_clash(user: dict[tuple[str, str], Any]) -> None:
    edgekd.register("task", "mine")(type("A", (), {"__module__": "mine"}))
    with pytest.raises(UsageError, match="task 'mine' exists already"):
        edgekd.register("task", "mine")(type("B", (), {"__module__": "mine"}))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown kind 'tasks'; did you mean 'task'"):
        edgekd.register("tasks")


def test_every_member_loads_without_torch() -> None:
    program = """
import sys
from edgekd import registry
for kind in registry.FOLDERS:
    for name in registry.names(kind):
        registry.load(kind, name)
print(sorted({"torch", "timm", "numpy", "onnx", "onnxruntime", "sklearn", "PIL"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
