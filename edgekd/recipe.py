"""Recipe: a YAML file becomes validated settings, every value with its source, every problem reported at once.

Precedence, lowest first: defaults, the `extends` chain, `set`, `-o NAME.FIELD=VALUE` from left to right. A recipe is data: it can never name code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from edgekd import registry
from edgekd.budget import Budget
from edgekd.config import Config, no_key
from edgekd.data.config import DataConfig, SamplesConfig
from edgekd.data.nodes_config import LinksConfig, NodesConfig
from edgekd.errors import EdgekdError, FileMissing, InputRefused, RecipeError, UnknownName, UsageError, suggest
from edgekd.graph._distiller import OF_TEACHER
from edgekd.models.names import check_architecture
from edgekd.models.spec import ModelConfig, NodeModelConfig
from edgekd.profile.host import HOST
from edgekd.safeio import yaml
from edgekd.safeio.files import contained
from edgekd.shipped import shipped_dir
from edgekd.stages._stage import Settings
from edgekd.train.config import LinkTrainConfig, NodeTrainConfig, TrainConfig
from edgekd.train.distiller import DistillConfig, black_box_lack

Path_ = tuple[str | int, ...]
AUTO = "auto"  # a method of distill that the pair of models decides (edgekd/wiring.py)
_MAX_EXTENDS = 8
_RESERVED = ("student", "preflight", "shipped")  # steps and engines that every plan has
_LISTED = re.compile(rb"^    user = True$", re.MULTILINE)
_PATH_FIELDS = {
    ("data", "root"),
    ("data", "split", "file"),
    ("teacher", "weights"),
    ("assistant", "weights"),
    ("model", "weights"),
    ("model", "onnx"),
    ("teacher", "onnx"),
    ("teacher", "predictions"),
}


class TeacherConfig(ModelConfig):
    """The model that is imitated: an architecture with given weights, trained here, or both; or, where only outputs are known, an ONNX file, or predictions."""

    train: TrainConfig | None = Field(None, description="train the teacher with these settings")
    predictions: Path | None = no_key(None, "a file of what it says to each image, .npz or .csv")
    outputs: Literal["auto", "logits", "probabilities"] = Field(
        "auto", description="onnx, predictions: what it gives; auto: as the numbers say"
    )

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.arch or Path(str(self.onnx or self.predictions)).name

    @property
    def black_box(self) -> bool:
        """Whether only its outputs are known."""
        return self.arch is None


class NodeTeacherConfig(NodeModelConfig):
    """The model of a graph that is imitated: an architecture with given weights, trained here, or both; or a file of what it says to each node."""

    train: NodeTrainConfig | None = Field(None, description="train the teacher with these settings")
    predictions: Path | None = no_key(None, "a file of what it says to each node, .npz or .csv")
    outputs: Literal["auto", "logits", "probabilities"] = Field("auto", description="predictions: what they are; auto: as the numbers say")
    calibrated: bool = Field(True, description="divide its logits by the temperature that fits val, and refuse it where it stays flat")

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.arch or Path(str(self.predictions)).name

    @property
    def black_box(self) -> bool:
        """Whether only its outputs are known."""
        return self.arch is None


class LinkTeacherConfig(NodeModelConfig):
    """The model of a graph whose view of links is imitated: an architecture with given weights, trained here, or both."""

    train: LinkTrainConfig | None = Field(None, description="train the teacher with these settings")
    predictions: None = None

    @property
    def name(self) -> str:
        """What reports call it."""
        return str(self.arch)

    @property
    def black_box(self) -> bool:
        """Whether only its outputs are known."""
        return False


class AssistantConfig(ModelConfig):
    """A model between teacher and student: it learns from the one and teaches the other (TAKD, arXiv 1902.03393)."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A name alone stands for `{arch: NAME}`; `auto` is found by the sizes of both models (edgekd/assistant.py)."""
        return {"arch": value} if isinstance(value, str) else value


class TargetConfig(Config):
    """A device, how the model runs on it, and its budget."""

    backend: str = Field("auto", description="runtime; auto takes the first of the device that edgekd has")
    precision: Literal["auto", "fp32", "int8"] = Field("auto", description="auto: what the chain and the gate give")
    threads: int = Field(1, ge=0, le=256, description="threads of the runtime; 0: as many as the device has cores")
    batch: int = Field(1, ge=1, le=1024, description="images per inference when measuring")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the backend's builder: edgekd methods show BACKEND")
    budget: Budget = Field(default_factory=Budget)


class Accept(Config):
    """When the result as a whole is accepted."""

    accuracy_drop_max: float = Field(0.01, ge=0, le=1, description="largest drop of the metric against the teacher's fp32 engine, absolute")
    keep_nodes: bool = Field(True, description="where rounding breaks the outputs, leave the nodes that do it in higher precision")


class Recipe(Config):
    """A validated recipe without its stages, which are typed by their own kinds."""

    version: Literal[1]
    seed: int = Field(0, ge=0, lt=2**31)
    task: str = "classification"
    data: DataConfig | None = None
    samples: SamplesConfig | None = None  # instead of data, where engines are all that is asked for
    teacher: TeacherConfig | None = None
    assistant: AssistantConfig | None = None
    model: ModelConfig
    targets: dict[str, TargetConfig] = Field(default_factory=lambda: {"host": TargetConfig()})
    baselines: tuple[Literal["student"], ...] = ()
    accept: Accept = Field(default_factory=Accept)


class NodeRecipe(Recipe):
    """A recipe of a task whose samples are the nodes of a graph."""

    data: NodesConfig | None = None  # type: ignore[assignment]
    samples: None = None
    teacher: NodeTeacherConfig | None = None  # type: ignore[assignment]
    assistant: None = None
    model: NodeModelConfig


class LinkRecipe(NodeRecipe):
    """A recipe of a task whose samples are pairs of nodes."""

    data: LinksConfig | None = None  # type: ignore[assignment]
    teacher: LinkTeacherConfig | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Loaded:
    """A recipe with its stages in order and the source of every value."""

    name: str
    recipe: Recipe
    stages: tuple[tuple[str, Settings], ...]  # (stage kind, settings)
    sources: dict[str, str] = field(default_factory=dict)  # dotted path -> file:line:col, `-o ...`, or nothing for a default


def load(name: str, overrides: Sequence[str] = (), *, devices: Sequence[str] = ()) -> Loaded:
    """A recipe by path or shipped name, with overrides and, where given, other targets; raises RecipeError with all problems."""
    path = find(name)
    tree = _Tree.of_file(path, _root_of(path))
    for text in overrides:
        tree.override(text, f"-o {text}", base=Path.cwd())
    if devices:
        kept = tree.value.get("targets") if isinstance(tree.value.get("targets"), dict) else {}
        tree.value["targets"] = {d: (kept or {}).get(d, {}) for d in devices}
    return _validate(_short(path), tree)


def smoothing_of(recipe: Recipe) -> float:
    """Label smoothing of the teacher's training, as far as the recipe knows."""
    train = recipe.teacher.train if recipe.teacher is not None else None
    return train.label_smoothing if train is not None else 0.0


def from_values(name: str, value: dict[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """A recipe made by a single-stage command; the same validation as a file's."""
    tree = _Tree(value, {})
    for text in overrides:
        tree.override(text, f"-o {text}", base=Path.cwd())
    return _validate(name, tree)


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    ours = shipped_dir("recipes") / f"{name.removesuffix('.yaml')}.yaml"
    if ours.is_file() and not path.suffix:
        return ours
    bare = name.removeprefix("recipes/").removesuffix(".yaml")
    if name.startswith("recipes/") and (shipped_dir("recipes") / f"{bare}.yaml").is_file():
        return shipped_dir("recipes") / f"{bare}.yaml"  # the documented path, from a folder without a checkout
    raise UsageError(
        f"there is no recipe '{name}'{suggest(bare, shipped())}", where=name, hint="list the shipped ones: edgekd recipes list"
    )


def shipped() -> list[str]:
    """Names of the recipes that come with edgekd."""
    root = shipped_dir("recipes")
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


# ------------------------------------------------------------------------------------------------------------ files to one tree
class _Tree:
    """The merged plain values with, for each dotted path, where the value came from."""

    def __init__(self, value: dict[str, Any], marks: dict[Path_, str]):
        self.value, self.marks = value, marks

    @classmethod
    def of_file(cls, path: Path, root: Path, depth: int = 0) -> _Tree:
        document = yaml.read(_text(path), _short_path(path))
        if not isinstance(document.value, dict):
            raise RecipeError([f"{_short_path(path)}:1:1: a recipe is a mapping of sections, this is a {type(document.value).__name__}"])
        tree = cls(document.value, dict(document.marks))
        tree._resolve_paths(path.parent, root)
        parent, changes = tree.value.pop("extends", None), tree.value.pop("set", None)
        if parent is not None:
            tree = tree._extend(parent, path, root, depth)
        if changes is not None:
            tree._apply_set(changes, document.marks, path.parent, root)
        return tree

    def _extend(self, parent: Any, path: Path, root: Path, depth: int) -> _Tree:
        mark = self.marks.get(("extends",), f"{_short_path(path)}:1:1")
        if not isinstance(parent, str) or "://" in parent:
            raise RecipeError([f"{mark}: extends: expected the relative path of one recipe, got {parent!r}"])
        if depth >= _MAX_EXTENDS:
            raise RecipeError([f"{mark}: extends: more than {_MAX_EXTENDS} recipes in the chain; is there a cycle?"])
        try:
            base_path = contained(path.parent / parent, [root, path.parent])
            base = _Tree.of_file(base_path, root, depth + 1)
        except (InputRefused, UsageError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError([f"{mark}: extends: {error.what}"]) from error
        _merge(base.value, self.value, base.marks, self.marks, ())
        return base

    def _apply_set(self, changes: Any, marks: Mapping[Path_, str], base: Path, root: Path) -> None:
        where = marks.get(("set",), "set")
        if not isinstance(changes, dict):
            raise RecipeError([f"{where}: set: expected a mapping of NAME.FIELD to values"])
        for dotted, value in changes.items():
            self._put(str(dotted), value, marks.get(("set", dotted), where), base, root)

    def override(self, text: str, where: str, base: Path) -> None:
        """`NAME.FIELD=VALUE`; NAME is a section or a stage."""
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted:
            raise RecipeError([f"{where}: expected NAME.FIELD=VALUE"])
        self._put(dotted, yaml.read_value(raw, where), where, base, None)

    def _put(self, dotted: str, value: Any, where: str, base: Path, root: Path | None) -> None:
        names = dotted.split(".")
        at = self._locate(names, where)
        node: Any = self.value
        for part in at[:-1]:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
            if isinstance(node, list) and part == "stages" and at[1:2] and isinstance(at[1], int):
                continue  # a stage found by its name
            if not isinstance(node, dict):
                what = (
                    "is a list; name the whole of it, or one stage as STAGE.FIELD"
                    if isinstance(node, list)
                    else "is a value, not a section"
                )
                raise RecipeError([f"{where}: '{part}' {what}"])
        node[at[-1]] = value
        for known in [m for m in self.marks if m[: len(at)] == at]:
            del self.marks[known]
        self.marks |= dict.fromkeys(_places(value, at), where)
        self._resolve_paths(base, root, only=at)

    def _locate(self, names: list[str], where: str) -> Path_:
        """The path of a dotted name: a section, or the settings of the stage of that name."""
        stages = dict(_stage_paths(self.value))
        if names[0] in stages and len(names) > 1:
            path = stages[names[0]]
            holder = self.value["stages"][path[1]]
            if holder[path[2]] is None:
                holder[path[2]] = {}
            return (*path, *names[1:])
        known = {*Recipe.model_fields, "stages", *stages}
        if names[0] not in known:
            raise RecipeError([f"{where}: there is no section or stage '{names[0]}'{suggest(names[0], known)}"])
        return tuple(names)

    def _resolve_paths(self, base: Path, root: Path | None, only: Path_ | None = None) -> None:
        """Paths written in a file are relative to it (or to the root) and stay under the root; those of -o are the user's own."""
        for at in _PATH_FIELDS:
            if only is not None and at[: len(only)] != only:
                continue
            node: Any = self.value
            for part in at[:-1]:
                node = node.get(part) if isinstance(node, dict) else None
            written = node.get(at[-1]) if isinstance(node, dict) else None
            if not isinstance(written, str):
                continue
            mark = self.marks.get(at, "recipe")
            if root is None:
                node[at[-1]] = str((base / written).resolve() if not Path(written).is_absolute() else written)
                continue
            first = base / written
            try:
                node[at[-1]] = str(contained(first if first.exists() else root / written, [root, base]))
            except InputRefused as error:
                hint = f"a path outside is the user's to give: -o {'.'.join(map(str, at))}={written}"
                raise RecipeError([f"{mark}: {'.'.join(map(str, at))}: {error.what}"], hint=hint) from error


def _places(value: Any, at: Path_) -> Iterator[Path_]:
    """`at` and the paths of everything below it."""
    yield at
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _places(item, (*at, key))


def _merge(base: dict[str, Any], over: dict[str, Any], marks: dict[Path_, str], over_marks: Mapping[Path_, str], at: Path_) -> None:
    """Mappings merge, everything else is replaced."""
    for key, value in over.items():
        here = (*at, key)
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, marks, over_marks, here)
            continue
        base[key] = value
        for known in [m for m in marks if m[: len(here)] == here]:
            del marks[known]
        marks.update({m: w for m, w in over_marks.items() if m[: len(here)] == here})


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise FileMissing(f"there is no file '{path}'", where=str(path)) from error
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _root_of(path: Path) -> Path:
    """The folder that a recipe's paths may not leave: the working folder if the recipe lies under it, else its own."""
    shipped_root, real = shipped_dir("recipes"), path.resolve()
    if real.is_relative_to(shipped_root.resolve()):
        return shipped_root
    return Path.cwd() if real.is_relative_to(Path.cwd()) else path.parent


def _short_path(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _short(path: Path) -> str:
    root = shipped_dir("recipes").resolve()
    real = path.resolve()
    return real.relative_to(root).with_suffix("").as_posix() if real.is_relative_to(root) else path.stem


# ------------------------------------------------------------------------------------------------------------ validation
def _stage_paths(value: Mapping[str, Any]) -> list[tuple[str, tuple[str | int, ...]]]:
    """(stage name, path of its settings) for every well-formed stage."""
    found: list[tuple[str, tuple[str | int, ...]]] = []
    stages = value.get("stages")
    for i, item in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(item, dict) and len(item) == 1:
            [(kind, body)] = item.items()
            found.append((str(body.get("name", kind)) if isinstance(body, dict) else str(kind), ("stages", i, kind)))
    return found


def _validate(name: str, tree: _Tree) -> Loaded:
    problems: list[str] = []
    value = dict(tree.value)
    raw_stages = value.pop("stages", [])
    task = _task(value)
    kind = {"nodes": NodeRecipe, "pairs": LinkRecipe}.get(getattr(task, "samples", "images"), Recipe)
    of_nodes = issubclass(kind, NodeRecipe)
    recipe = _model(kind, value, tree.marks, (), problems, extra_names={"stages", "extends", "set"})
    stages = _stages(raw_stages, tree.marks, problems, getattr(task, "learns", {}))
    report = _reporter(tree.marks, problems)
    _check_names(value, report, of_nodes=of_nodes)
    filled: dict[str, str] = {}
    if recipe is not None and of_nodes:
        _check_nodes(recipe, stages, report)
    elif recipe is not None:
        if recipe.data is not None and recipe.data.labels == "none":
            _check_unlabelled(recipe, stages, report)
            recipe, stages, filled = _without_labels(recipe, stages)
        _check_fit(recipe, stages, report)
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=_position), hint="see every field: edgekd recipes show quickstart; edgekd methods show NAME")
    sources = {".".join(map(str, at)): where for at, where in tree.marks.items()}
    if "assistant" in sources:
        sources.setdefault("assistant.arch", sources["assistant"])  # its name alone stands for it
    return Loaded(name, recipe, tuple(stages), _stage_sources(sources, tree.value) | filled)


def _task(value: Mapping[str, Any]) -> Any:
    """The class of the task that a recipe names, or None."""
    name = value.get("task", Recipe.model_fields["task"].default)
    return registry.load("task", name) if isinstance(name, str) and name in registry.names("task") else None


def _stages(raw: Any, marks: Mapping[Path_, str], problems: list[str], learns: Mapping[str, str]) -> list[tuple[str, Settings]]:
    """(stage, settings) of each; `learns` says which stage does what a recipe lists for the samples of its task."""
    out: list[tuple[str, Settings]] = []
    if not isinstance(raw, list):
        problems.append(f"{marks.get(('stages',), 'recipe:1:1')}: stages: expected a list of stages, each `- kind: {{settings}}`")
        return out
    taken = {*Recipe.model_fields, *_RESERVED}
    kinds = user_stages()
    for i, item in enumerate(raw):
        where = marks.get(("stages", i), marks.get(("stages",), "recipe:1:1"))
        if not isinstance(item, dict) or len(item) != 1:
            problems.append(f"{where}: stages: expected one stage, `- kind: {{settings}}`")
            continue
        [(kind, body)] = item.items()
        at: Path_ = ("stages", i, kind)
        where = marks.get(at, where)
        if kind not in kinds:
            problems.append(f"{where}: unknown stage '{kind}'{suggest(kind, kinds)}")
        elif not isinstance(body, dict | None):
            problems.append(f"{where}: {kind}: expected settings, got {body!r}")
        else:
            settings = _stage(kind, dict(body or {}), at, marks, problems, learns.get(kind, kind))
            if settings and settings.name in taken:
                problems.append(f"{where}: two things are named '{settings.name}'; give this stage another: name: NAME")
            elif settings:
                taken.add(settings.name)
                out.append((learns.get(kind, kind), settings))
    return out


def user_stages() -> list[str]:
    """Stage kinds that a recipe may list: their files say `user = True`, so that only those in use are imported."""
    return [name for name in registry.names("stage") if _LISTED.search(registry.source_of("stage", name))]


def _stage(kind: str, body: dict[str, Any], at: Path_, marks: Mapping[Path_, str], problems: list[str], does: str) -> Settings | None:
    """The settings of a stage that the recipe calls `kind`, and the stage `does` carries out."""
    stage = registry.load("stage", does)
    name = body.pop("name", kind)
    where = marks.get(at, "recipe:1:1")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name):
        problems.append(f"{marks.get((*at, 'name'), where)}: name: expected lower-case letters, digits, '-' and '_', got {name!r}")
        return None
    method, method_cls = None, None
    if stage.method_kind is not None:
        field_ = stage.method_field
        method = body.pop(field_, stage.default_method)
        spot = marks.get((*at, field_), where)
        if does == "distill" and isinstance(method, list):
            method, body["methods"] = "combined", method
        auto = does == "distill" and method == AUTO
        if not auto and (not isinstance(method, str) or method not in registry.names(stage.method_kind)):
            what = f"unknown {field_} '{method}'{suggest(method, registry.names(stage.method_kind))}" if method else f"{field_}: missing"
            problems.append(f"{spot}: {name}.{what}" if not method else f"{spot}: {what}")
            return None
        method_cls = DistillConfig if auto else registry.load(stage.method_kind, method).Config
    own = {k: v for k, v in body.items() if k in stage.Config.model_fields}
    rest = {k: v for k, v in body.items() if k not in own}
    allowed = {"name", *stage.Config.model_fields, *(method_cls.model_fields if method_cls else ())}
    config = _model(stage.Config, own, marks, at, problems, label=name)
    if method_cls is None:
        problems += [f"{marks.get((*at, k), where)}: {name}.{k}: unknown field{suggest(k, allowed)}" for k in rest]
        return Settings(name, config) if config is not None else None
    method_config = _model(method_cls, rest, marks, at, problems, label=name, extra_names=allowed)
    if config is None or method_config is None:
        return None
    return Settings(name, config, method, method_config)


def _model(
    cls: type[BaseModel],
    value: Any,
    marks: Mapping[Path_, str],
    at: Path_,
    problems: list[str],
    *,
    label: str = "",
    extra_names: set[str] | None = None,
) -> Any:
    """The validated model, or None with its problems added, each at the place where the value was written."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        for e in error.errors(include_url=False):
            loc = tuple(p for p in e["loc"] if p in ("",) or not str(p).startswith("function-"))
            here = (*at, *loc)
            where = next((marks[here[:n]] for n in range(len(here), -1, -1) if here[:n] in marks), "recipe:1:1")
            dotted = ".".join(map(str, ([label] if label else []) + list(loc)))
            problems.append(f"{where}: {dotted}: {_sentence(e, cls, loc, extra_names or set())}")
        return None


def _sentence(error: Any, cls: type[BaseModel], loc: Path_, extra: set[str]) -> str:
    if error["type"] == "extra_forbidden":
        names = {*_fields_at(cls, loc[:-1]), *(extra if len(loc) == 1 else ())}
        return f"unknown field{suggest(loc[-1], names)}"
    if error["type"] == "missing":
        return "missing; it has no default"
    text = str(error["msg"])
    return f"{text[0].lower()}{text[1:]}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _fields_at(cls: type[BaseModel], loc: Path_) -> set[str]:
    """Field names of the model nested at `loc`."""
    current: Any = cls
    for part in loc:
        info = current.model_fields.get(str(part)) if isinstance(current, type) and issubclass(current, BaseModel) else None
        options = _models_in(info.annotation) if info else ([current] if isinstance(current, type) else [])
        current = options[0] if options else current
    return set(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else set()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


Report = Callable[[Path_, str], None]


def _reporter(marks: Mapping[Path_, str], problems: list[str]) -> Report:
    """Adds a problem at the nearest place that was written."""

    def bad(at: Path_, text: str) -> None:
        where = next((marks[at[:n]] for n in range(len(at), -1, -1) if at[:n] in marks), "recipe:1:1")
        problems.append(f"{where}: {'.'.join(map(str, at))}: {text}")

    return bad


def _check_names(value: Mapping[str, Any], bad: Report, *, of_nodes: bool) -> None:
    """Closed names, read from the raw values: they are reported even where a schema fails elsewhere."""

    def written(*at: str) -> Any:
        node: Any = value
        for part in at:
            node = node.get(part) if isinstance(node, dict) else None
        return node

    if "data" not in value and "samples" not in value:
        bad(("data",), "missing; it has no default")
    for section in ("model", "teacher", "assistant"):
        arch = written(section, "arch")
        if not isinstance(arch, str) or (section, arch) == ("assistant", AUTO):
            continue
        if of_nodes and arch not in registry.names("architecture"):
            bad((section, "arch"), f"unknown architecture of nodes '{arch}'{suggest(arch, registry.names('architecture'))}")
        elif not of_nodes and (found := check_architecture(arch)):
            bad((section, "arch"), found)
    short = written("assistant")
    if isinstance(short, str) and short != AUTO and (found := check_architecture(short)):
        bad(("assistant",), found)
    for kind, word, at in (("task", "task", ("task",)), ("graph" if of_nodes else "format", "format", ("data", "format"))):
        name = written(*at)
        if isinstance(name, str) and name not in registry.names(kind):
            bad(at, f"unknown {word} '{name}'{suggest(name, registry.names(kind))}")
    targets = written("targets")
    for device, target in (targets if isinstance(targets, dict) else {}).items():
        _check_target(str(device), target, bad)


def _check_fit(recipe: Recipe, stages: list[tuple[str, Settings]], bad: Report) -> None:
    """What no single section can know: stages that need what the recipe lacks, and their order."""
    if (recipe.model.arch is None) == (recipe.model.onnx is None):
        bad(("model",), "expected either arch or onnx")
    if recipe.teacher is not None:
        _check_teacher(recipe.teacher, bad)
    if recipe.assistant is not None:
        _check_assistant(recipe.assistant, recipe.teacher, stages, bad)
    if recipe.model.image_size is not None:
        bad(("model", "image_size"), "the student takes images of data.image_size; give that")
    for section, model in (("model", recipe.model), ("teacher", recipe.teacher)):
        if model is not None and model.classes and model.arch is not None and model.weights is None and not model.pretrained:
            bad((section, "classes"), "they name the outputs of given weights, and none are given")
        if model is not None and len(set(model.classes)) < len(model.classes):
            bad((section, "classes"), "a name is there twice")
    if recipe.samples is not None:
        for name in [s.name for _, s in stages] + (["teacher"] if recipe.teacher is not None else []):
            bad(("samples",), f"'{name}' needs data, and generated samples have no labels; give data instead")
        if recipe.data is not None:
            bad(("samples",), "there are data, so nothing is generated; leave one of the two out")
    elif recipe.data is None and "data" in recipe.model_fields_set:
        bad(("data",), "expected a dataset, got nothing")
    if not recipe.targets:
        bad(("targets",), "expected at least one target")
    if not any(kind == "quantize" for kind, _ in stages):
        for name in [n for n, t in recipe.targets.items() if t.precision == "int8"]:
            bad(("targets", name, "precision"), "int8 is asked for, and no stage quantizes; add `- quantize: {method: ptq}`")
    quantized = False
    for i, (kind, settings) in enumerate(stages):
        at: Path_ = ("stages", i, kind)
        if kind == "distill" and recipe.teacher is None:
            bad(at, f"stage '{settings.name}' distils, and the recipe has no teacher")
        if recipe.teacher is not None and recipe.teacher.predictions is not None:
            _check_unmixed(at, kind, settings, bad)
        if recipe.teacher is not None and recipe.teacher.black_box and settings.method == AUTO:
            bad((*at, "method"), "auto goes by the families of both models, and only the teacher's outputs are known; name one, such as kd")
        elif recipe.teacher is not None and recipe.teacher.black_box and (problem := _beyond_outputs(kind, settings)):
            bad((*at, "method" if kind == "distill" else "distiller"), problem)
        if problem := _sampled(kind, settings):
            bad((*at, "sampled_classes"), problem)
        if recipe.model.onnx is not None and kind != "quantize":
            bad(at, f"stage '{settings.name}' needs an architecture; an ONNX file can only be quantized")
        if quantized and kind != "quantize":
            bad(at, f"stage '{settings.name}' trains or cuts a model and cannot follow a quantize stage; put it before")
        if kind == "quantize" and registry.load("quantize", str(settings.method)).level == "model":
            if recipe.model.onnx is not None:
                bad(at, f"{settings.method} trains a model, and an ONNX file cannot be trained; methods for it: ptq, fp16, weight_only")
            if quantized:
                bad(at, f"stage '{settings.name}' trains the model and must be the first that quantizes")
        quantized = quantized or kind == "quantize"


def _check_nodes(recipe: NodeRecipe, stages: list[tuple[str, Settings]], bad: Report) -> None:
    """What a recipe of nodes needs: a student of rows, a teacher where something distils, stages that know nodes, in an order that can be."""
    teacher = recipe.teacher
    if recipe.data is None:
        bad(("data",), "expected a graph, got nothing")
    if _looks_at(recipe.model, ("model",), bad) == "graph" and any(kind not in ("train_nodes", "train_links") for kind, _ in stages):
        bad(("model", "arch"), "it looks at neighbours, which are not there where it is deployed; the student must look at rows: mlp")
    if teacher is not None:
        if (teacher.arch is None) == (teacher.predictions is None):
            bad(("teacher",), "expected either arch or predictions")
        elif teacher.arch is not None:
            _looks_at(teacher, ("teacher",), bad)
            if teacher.train is None and teacher.weights is None:
                bad(("teacher",), "the teacher is not trained: give weights, or train: {}")
    if not recipe.targets:
        bad(("targets",), "expected at least one target")
    quantized = False
    for i, (kind, settings) in enumerate(stages):
        written, _, what = kind.partition("_") if kind.endswith(("_nodes", "_links")) else (kind, "", "")
        at: Path_ = ("stages", i, written)
        if written == "distill" and getattr(registry.load("graph_distill", str(settings.method)), "of_pairs", False) != (what == "links"):
            bad(
                (*at, "method"),
                f"{settings.method} is not for {'pairs of nodes: llp' if what == 'links' else 'nodes; methods for them: glnn, krd'}",
            )
        elif written == "distill" and teacher is None:
            bad(at, f"stage '{settings.name}' distils, and the recipe has no teacher")
        elif kind == "distill_nodes" and teacher is not None and teacher.arch is None:
            if registry.load("graph_distill", str(settings.method)).needs & OF_TEACHER:
                bad(
                    (*at, "method"),
                    f"{settings.method} asks the teacher for more than its answers, which are all that is known; use glnn or ffg2m",
                )
        elif kind == "distill_nodes" and teacher is not None and "tokens" in registry.load("graph_distill", str(settings.method)).needs:
            if not getattr(registry.load("architecture", str(teacher.arch)), "tokenizes", False):
                bad((*at, "method"), f"{settings.method} learns a teacher's tokens, and {teacher.arch} has none: -o teacher.arch=vqgcn")
        if quantized and kind != "quantize":
            bad(at, f"stage '{settings.name}' trains or cuts a model and cannot follow a quantize stage; put it before")
        if kind == "quantize" and registry.load("quantize", str(settings.method)).level == "model":
            bad((*at, "method"), f"{settings.method} trains on images; methods here: ptq, fp16, weight_only")
        quantized = quantized or kind == "quantize"


def _looks_at(model: ModelConfig, at: Path_, bad: Report) -> str | None:
    """rows or graph; its arguments are checked."""
    if model.arch is None or model.arch not in registry.names("architecture"):
        if model.arch is None and at == ("model",):
            bad(at, "expected arch, such as mlp")
        return None
    architecture = registry.load("architecture", model.arch)
    try:
        architecture.Config(**model.args)
    except ValidationError as error:
        for e in error.errors(include_url=False):
            bad((*at, "args", *(str(p) for p in e["loc"])), _sentence(e, architecture.Config, e["loc"], set()))
    return str(architecture.looks_at)


def _check_teacher(teacher: TeacherConfig, bad: Report) -> None:
    """One kind of teacher, with the settings of that kind."""
    kinds = {"arch": teacher.arch, "onnx": teacher.onnx, "predictions": teacher.predictions}
    found = [name for name, value in kinds.items() if value is not None]
    if len(found) != 1:
        bad(("teacher",), "expected one of arch, onnx and predictions")
        return
    [kind] = found
    takes = {
        "arch": set(ModelConfig.model_fields) | {"train"},
        "onnx": {"mean", "std", "image_size", "outputs", "classes"},
        "predictions": {"outputs", "classes"},
    }[kind]
    default = TeacherConfig()
    for name in sorted(n for n in teacher.model_fields_set - takes - set(kinds) if getattr(teacher, n) != getattr(default, n)):
        bad(("teacher", name), f"a teacher given by {kind} does not take it; it takes {', '.join(sorted(takes - set(kinds)))}")
    if kind == "arch" and teacher.train is None and teacher.weights is None and not teacher.pretrained:
        bad(("teacher",), "the teacher is not trained: give weights, pretrained, or train: {epochs: N}")
    if kind == "onnx" and (teacher.mean is None or teacher.std is None):
        text = "an ONNX file does not say how its input is normalised: give mean and std, [0, 0, 0] and [1, 1, 1] where it does that itself"
        bad(("teacher",), text)


def _check_assistant(assistant: AssistantConfig, teacher: TeacherConfig | None, stages: list[tuple[str, Settings]], bad: Report) -> None:
    """It stands between a teacher and the first stage that distils, and starts as an architecture."""
    if teacher is None or not any(kind == "distill" for kind, _ in stages):
        bad(("assistant",), "it stands between a teacher and a stage that distils, and the recipe lacks one of them")
    elif stages[0][0] != "distill":
        bad(("assistant",), f"it serves the first stage, which must distil; this one is '{stages[0][0]}'")
    if teacher is not None and teacher.black_box and assistant.arch == AUTO:
        bad(("assistant",), "auto goes by the sizes of both models, and only the teacher's outputs are known; name an architecture")
    if assistant.arch is None:
        bad(("assistant",), "expected auto, the name of an architecture, or arch with its args")
    if assistant.arch == AUTO:
        for name in sorted(assistant.model_fields_set - {"arch"}):
            bad(("assistant", name), "auto finds the architecture with its arguments: it takes nothing beside")
    for name in sorted(assistant.model_fields_set & {"onnx", "image_size", "classes"}):
        bad(("assistant", name), "an assistant is trained here, on the data's images and classes: it does not take it")


def _check_unlabelled(recipe: Recipe, stages: list[tuple[str, Settings]], bad: Report) -> None:
    """Without labels a teacher that is there already is all that can be learned from."""
    if recipe.teacher is None:
        bad(("data", "labels"), "without labels there is nothing to learn from but a teacher, and the recipe has none")
    elif recipe.teacher.train is not None:
        bad(("teacher", "train"), "a teacher is trained with labels, and data.labels is none; give its weights, onnx or predictions")
    if recipe.baselines:
        bad(("baselines",), "a student alone is trained with labels, and data.labels is none; leave it out")
    if not hasattr(registry.load("task", recipe.task) if recipe.task in registry.names("task") else None, "without_labels"):
        bad(("data", "labels"), f"the task {recipe.task} needs labels")
    for i, (kind, settings) in enumerate(stages):
        at: Path_ = ("stages", i, kind)
        if kind == "train":
            bad(at, f"stage '{settings.name}' learns from labels, and data.labels is none; use distill")
        if (found := _imitation(kind, settings)) is None:
            continue
        method, distiller = found
        if "label_weight" in distiller.config.model_fields_set and distiller.config.label_weight:
            bad((*at, "label_weight"), "there are no labels, so its weight is 0")
        if "labels" in distiller.needs:
            free = [n for n in registry.names("distill") if n != "combined" and "labels" not in registry.load("distill", n).needs]
            bad((*at, "method"), f"{method} needs labels, and data.labels is none; methods without: {', '.join(free)}")


def _without_labels(recipe: Recipe, stages: list[tuple[str, Settings]]) -> tuple[Recipe, list[tuple[str, Settings]], dict[str, str]]:
    """The recipe with what follows from `labels: none` filled in (classes of the teacher, no weight for the label loss), and the source of each."""
    sources: dict[str, str] = {}
    data, teacher = recipe.data, recipe.teacher
    if data is not None and data.classes is None and teacher is not None and (names := _names_of(teacher)):
        recipe = recipe.model_copy(update={"data": data.model_copy(update={"classes": names})})
        sources["data.classes"] = "teacher"
    found = []
    for kind, settings in stages:
        config: Any = settings.method_config
        if kind == "distill" and config is not None:
            settings = replace(settings, method_config=config.model_copy(update={"label_weight": 0.0}))
            sources[f"{settings.name}.label_weight"] = "data.labels"
        elif hasattr(config, "distiller_options"):
            options = config.distiller_options | {"label_weight": 0.0}
            settings = replace(settings, method_config=config.model_copy(update={"distiller_options": options}))
            sources[f"{settings.name}.distiller_options.label_weight"] = "data.labels"
        found.append((kind, settings))
    return recipe, found, sources


def _names_of(teacher: TeacherConfig) -> tuple[str, ...]:
    """The classes of a teacher, where it says them."""
    if teacher.classes or teacher.predictions is None or not teacher.predictions.is_file():
        return teacher.classes
    from edgekd.safeio.predictions import columns_of  # numpy, for those who have such a file

    return columns_of(teacher.predictions)


def _imitation(kind: str, settings: Settings) -> tuple[str, Any] | None:
    """(name, distiller) of a stage that imitates the teacher, as far as the recipe says it."""
    config: Any = settings.method_config
    if settings.method == AUTO:
        return None
    if kind == "distill":
        return str(settings.method), registry.load("distill", str(settings.method))(config)
    if not hasattr(config, "distiller"):
        return None
    cls = registry.load("distill", config.distiller)
    return config.distiller, cls(cls.Config(**config.distiller_options))


def _beyond_outputs(kind: str, settings: Settings) -> str | None:
    """Why a stage cannot learn from a teacher of which only the outputs are known."""
    found = _imitation(kind, settings)
    if found is None or not (lack := black_box_lack(found[1])):
        return None
    known = [n for n in registry.names("distill") if n != "combined" and not black_box_lack(registry.load("distill", n))]
    return f"{found[0]} needs {lack}, and only the teacher's outputs are known; methods for it: {', '.join(known)}"


def _check_unmixed(at: Path_, kind: str, settings: Settings, bad: Report) -> None:
    """A file knows images, not mixtures of them; and it is kept whole."""
    config: Any = settings.config if kind == "distill" else settings.method_config
    for name in ("mixup", "cutmix"):
        if getattr(getattr(config, "augment", None), name, 0):
            bad((*at, "augment", name), "mixed images are new, and a file of predictions says nothing of them; set it to 0")
    if kind == "distill" and config.sampled_classes:
        bad((*at, "sampled_classes"), "predictions are kept whole; leave it out")


def _sampled(kind: str, settings: Settings) -> str | None:
    """Why a stage cannot learn from sampled answers, where it asks for them."""
    config: Any = settings.config
    if kind != "distill" or not config.sampled_classes:
        return None
    if not config.fixed_views:
        return "answers are kept, and sampled, only where views repeat: set views"
    if (
        settings.method == AUTO
        or getattr(registry.load("distill", str(settings.method))(settings.method_config), "linear_at", None) is None
    ):
        return f"{settings.method} needs all of the teacher's logits; a sample of them is enough for kd"
    return None


def _check_target(device: str, target: Any, bad: Report) -> None:
    try:
        if device != HOST:  # which is there, and need not be detected to be named
            from edgekd.profile.device import load_device

            load_device(device)
    except UnknownName as error:
        bad(("targets", device), error.what)
    except EdgekdError as error:
        bad(("targets", device), str(error))
    backend = target.get("backend", "auto") if isinstance(target, dict) else "auto"
    if backend != "auto" and backend not in registry.names("backend"):
        bad(("targets", device, "backend"), f"unknown backend '{backend}'{suggest(backend, registry.names('backend'))}")


def _position(problem: str) -> tuple[str, int, int]:
    found = re.match(r"(.*?):(\d+):(\d+): ", problem)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def _stage_sources(sources: dict[str, str], value: Mapping[str, Any]) -> dict[str, str]:
    """Sources with `stages.0.distill.lr` written as `distill.lr`."""
    renames = {".".join(map(str, at)): name for name, at in _stage_paths(value)}
    out = {}
    for dotted, where in sources.items():
        for prefix, name in renames.items():
            if dotted == prefix or dotted.startswith(prefix + "."):
                out[name + dotted[len(prefix) :]] = where
                break
        else:
            out[dotted] = where
    return out


def resolved(loaded: Loaded) -> list[dict[str, Any]]:
    """Every value of a recipe with its source: rows of path, value, source (`default` where nothing was written)."""
    rows: list[dict[str, Any]] = []

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{path}.{key}" if path else str(key), item)
            return
        rows.append({"path": path, "value": value, "source": loaded.sources.get(path, "default")})

    walk("", loaded.recipe.model_dump(mode="json"))
    for kind, settings in loaded.stages:
        body = {"stage": kind} | settings.config.model_dump(mode="json")
        if settings.method:
            body |= {registry.load("stage", kind).method_field: settings.method}
        if settings.method_config is not None:
            body |= settings.method_config.model_dump(mode="json")
        walk(settings.name, body)
    return rows
