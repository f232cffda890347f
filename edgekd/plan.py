"""Recipe + devices -> ordered steps. Kinds, wiring and keys are settled here, without torch.

A user lists model stages; export, compile, evaluate, gate, profile and bundle are inserted. A gate closes a segment: a compressing stage and the
recovery stages that follow it. What follows a gate refers to a `Choice`, resolved when the gate's decision is known. Where a target leaves its runtime
open and several run here, a race takes the place of its last gate: it chooses the runtime and the precision together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekd import registry
from edgekd.artifact import Artifact, Kind, Manifest, digest_of
from edgekd.backends import Backend
from edgekd.config import Config, key_fields
from edgekd.data.config import AugmentConfig, DataConfig
from edgekd.data.graphs import fingerprint
from edgekd.data.index import judged_by_labels, scan
from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import BackendError, DeviceError, RecipeError
from edgekd.graph._distiller import OF_TEACHER
from edgekd.models.names import user_source
from edgekd.profile.device import load_device, same_machine
from edgekd.profile.host import identity
from edgekd.profile.schema import DeviceProfile
from edgekd.recipe import LinkRecipe, Loaded, NodeRecipe, TargetConfig, TeacherConfig, smoothing_of
from edgekd.stages._stage import Settings
from edgekd.train.config import TrainConfig
from edgekd.train.distiller import OUTPUTS_ALONE
from edgekd.train.speed import SpeedConfig

STORE_VERSION = 1
HOST = "host"
LEARNS = ("train", "distill", "train_nodes", "distill_nodes", "train_links", "distill_links")
_IMITATES = ("distill", "distill_nodes", "distill_links", "quantize_train")
_FROM_LOGITS = frozenset({"logits", "labels"})


@dataclass(frozen=True)
class Choice:
    """Whatever a decision chose, by the name that it gives: a gate says `before` or `after`, a race says which candidate."""

    decision: str
    options: Mapping[str, Ref]

    @classmethod
    def of_gate(cls, gate: str, before: Ref, after: Ref) -> Choice:
        return cls(gate, {"before": before, "after": after})

    def each(self, change: Callable[[Ref], Ref]) -> Choice:
        """The same choice between what `change` makes of the options."""
        return Choice(self.decision, {name: change(ref) for name, ref in self.options.items()})


Ref = str | Choice


@dataclass(frozen=True)
class Step:
    """One stage with its settings and where its inputs come from."""

    name: str
    stage: str
    settings: Settings
    inputs: Mapping[str, Ref]
    unless: tuple[str, Ref] | None = None  # (decision, ref): where the decision chose `before`, the step is skipped and `ref` stands for it
    user: bool = False  # listed in the recipe, or what a person waits for

    @property
    def gives(self) -> Kind:
        kind: Kind = registry.load("stage", self.stage).gives
        return kind

    def ingredients(self, inputs: Mapping[str, str], seed: int, replayed: Any = None) -> dict[str, Any]:
        """Everything that can change the result; its SHA-256 is the key. `inputs` maps names to content digests."""
        stage, s = registry.load("stage", self.stage), self.settings
        method = None
        if s.method is not None and s.method_config is not None:
            config = key_fields(s.method_config)
            method = {"name": s.method, "config": config, "source": _sha(registry.source_of(stage.method_kind, s.method))}
            if hasattr(s.method_config, "uses"):  # a method of methods
                method["uses"] = {f"{kind}/{name}": _sha(registry.source_of(kind, name)) for kind, name in s.method_config.uses()}
        return {
            "store": STORE_VERSION,
            "stage": {"name": self.stage, "version": stage.version, "source": _sha(registry.source_of("stage", self.stage))},
            "config": key_fields(s.config),
            "method": method,
            "facts": s.facts,
            "inputs": dict(inputs),
            "libraries": {name: library_version(name) for name in stage.libraries},
            "seed": seed,
            "replayed": replayed,
        }

    def key(self, inputs: Mapping[str, str], seed: int, replayed: Any = None) -> str:
        """The full SHA-256 over the ingredients."""
        return digest_of(self.ingredients(inputs, seed, replayed))


@dataclass(frozen=True)
class Target:
    """A target with what was found for it: profile, backend, and whether this machine can run it."""

    name: str
    config: TargetConfig
    device: DeviceProfile
    backend: str
    runs_here: bool
    rivals: tuple[str, ...] = ()  # runtimes of this machine that are measured against each other, the first of them is `backend`

    @property
    def threads(self) -> int:
        """Of its runtime: as asked for, else one a core of the profile."""
        return self.config.threads or self.device.arch.cores or 1

    @property
    def raced(self) -> bool:
        return len(self.rivals) > 1

    def on(self, backend: str) -> Target:
        """The same target with its runtime settled."""
        return replace(self, backend=backend, rivals=())

    def takes(self, precision: str) -> bool:
        """False where the device's profile lists what the runtime computes in, and this is not in it."""
        runtime = self.device.runtime(self.backend)
        return runtime is None or not runtime.precisions or precision in runtime.precisions


@dataclass(frozen=True)
class Segment:
    """A gated part of the chain: its steps' names, and the gate or race that judges it."""

    gate: str
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Race:
    """The candidates of a target that leaves its runtime open: name -> graph, and name -> engine."""

    decision: str
    graphs: Mapping[str, Ref]
    engines: Mapping[str, Ref]

    @property
    def engine(self) -> Choice:
        return Choice(self.decision, self.engines)


@dataclass
class Plan:
    """Steps in order, and which of them the run's summary speaks of."""

    loaded: Loaded
    steps: list[Step] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    judge: Target | None = None  # where gates measure
    graphs: dict[str, str] = field(default_factory=dict)  # stage name -> its export step
    engines: dict[str, str] = field(default_factory=dict)  # stage name -> its engine on the judge
    metrics: dict[str, str] = field(default_factory=dict)  # stage name -> its val metrics
    segments: list[Segment] = field(default_factory=list)
    shipped: dict[str, Ref] = field(default_factory=dict)  # target -> chosen graph
    races: dict[str, Race] = field(default_factory=dict)  # target -> how its runtime is chosen, where it leaves that open
    baselines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what of the recipe is left out, and why

    def add(self, step: Step) -> str:
        self.steps.append(step)
        return step.name

    def step(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)


@cache
def library_version(name: str) -> str:
    """The installed version of a distribution, or `absent`."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def build_plan(loaded: Loaded, *, gate: bool = True, cache_dir: Path | None = None) -> Plan:
    """All steps of a recipe, in order; raises DataRefused, DeviceError or BackendError for what can be known before running."""
    return _Planner(loaded, gate, cache_dir).build()


@dataclass(frozen=True)
class Outlook:
    """A step as `plan` shows it: cached, run, skipped or depends on gate; `after` is the first step that it waits for."""

    step: Step
    state: str
    ingredients: dict[str, Any] = field(default_factory=dict)  # of its key, as far as its inputs are known
    after: str | None = None


def state_of(
    plan: Plan, peek: Callable[[str], Manifest | None], replay: Mapping[str, Any], read: Callable[[str], Artifact | None]
) -> Iterator[Outlook]:
    """What each step would do now: `read` is asked for decisions only."""
    digests: dict[str, str | None] = {}
    decisions: dict[str, Any] = {}
    for step in plan.steps:
        if step.unless and decisions.get(step.unless[0], {}).get("chosen") == "before":
            digests[step.name] = _digest(step.unless[1], digests, decisions)
            yield Outlook(step, "skipped")
            continue
        found = {name: _digest(ref, digests, decisions) for name, ref in step.inputs.items()}
        known = {name: digest for name, digest in found.items() if digest}
        ingredients = step.ingredients(known, plan.loaded.recipe.seed, replay.get(step.name))
        if len(known) < len(found):
            digests[step.name] = None
            missing = [ref for name, ref in step.inputs.items() if name not in known]
            gates = [ref.decision for ref in missing if isinstance(ref, Choice) and ref.decision not in decisions]
            after = next((ref for ref in missing if isinstance(ref, str)), None)
            yield Outlook(step, "depends on gate" if gates else "run", ingredients, gates[0] if gates else after)
            continue
        manifest = peek(digest_of(ingredients))
        digests[step.name] = manifest.digest if manifest else None
        if manifest and step.gives is Kind.DECISION and (artifact := read(manifest.key)):
            decisions[step.name] = artifact.json("decision.json")
        yield Outlook(step, "cached" if manifest else "run", ingredients)


def _digest(ref: Ref, digests: Mapping[str, str | None], decisions: Mapping[str, Any]) -> str | None:
    if isinstance(ref, str):
        return digests.get(ref)
    if ref.decision not in decisions:
        return None
    chosen = ref.options.get(decisions[ref.decision]["chosen"])
    return None if chosen is None else _digest(chosen, digests, decisions)


def _sha(source: bytes) -> str:
    import hashlib

    return hashlib.sha256(source).hexdigest()


# ------------------------------------------------------------------------------------------------------------ wiring
class _Planner:
    """Builds the plan of one recipe."""

    def __init__(self, loaded: Loaded, gate: bool, cache_dir: Path | None):
        self.loaded, self.recipe, self.gate, self.cache_dir = loaded, loaded.recipe, gate, cache_dir
        self.plan = Plan(loaded)
        self.of_nodes = isinstance(self.recipe, NodeRecipe)
        self.of_pairs = isinstance(self.recipe, LinkRecipe)
        self.parts = "links" if self.of_pairs else "nodes"  # of a graph, as its stages are called
        unlabelled = self.recipe.data is not None and not self.of_nodes and self.recipe.data.labels == "none"
        self.images = "data.images" if unlabelled else "data"  # the step before a teacher labels them
        self.said = "teacher"  # the step that has a teacher's answers, where only these are learned from
        self.imitates = False  # True: not even val and test have labels
        self.unrounded: dict[str, Ref] = {}  # quantized graph -> the one that it was made from, in fp32

    def build(self) -> Plan:
        self.plan.targets = [_target(name, config) for name, config in self.recipe.targets.items()]
        self.plan.judge = _judge(self.plan.targets[0])
        if self.recipe.data is not None:
            reads = self.parts if self.of_nodes else "data"
            self._add(self.images, reads, self.recipe.data, {}, facts=self._dataset(self.recipe.data), user=True)
        else:
            self._add("data", "samples", self.recipe.samples, {}, user=True)
            self._settle_runtimes()
        start = self._start()
        current, graph = self._model_stages(start) if self.recipe.model.onnx is None else (None, start)
        for target in self.plan.targets:
            self._target(target, graph, current)
        self._baselines(current)
        self._ship()
        return self.plan

    # ------------------------------------------------------------------------------------------------ helpers
    def _add(
        self,
        name: str,
        stage: str,
        config: Config | None,
        inputs: Mapping[str, Ref],
        *,
        settings: Settings | None = None,
        facts: dict[str, Any] | None = None,
        unless: tuple[str, Ref] | None = None,
        user: bool = False,
    ) -> str:
        base = settings or Settings(name, config or registry.load("stage", stage).Config())
        full = Settings(base.name, base.config, base.method, base.method_config, {**base.facts, **(facts or {})})
        return self.plan.add(Step(name, stage, full, inputs, unless, user))

    def _config(self, stage: str, **values: Any) -> Config:
        config: Config = registry.load("stage", stage).Config(**values)
        return config

    def _dataset(self, data: DataConfig | GraphConfig) -> dict[str, Any]:
        """What is in the dataset, and the code that reads it."""
        if isinstance(data, GraphConfig):
            return {"index": fingerprint(data), "source": _sha(registry.source_of("graph", data.format))}
        index = scan(data, cache_dir=self.cache_dir)
        self.imitates = data.labels == "none" and not judged_by_labels(index)
        if self.imitates:
            self.plan.notes.append(
                "val and test have no labels: every metric is agreement with the teacher, which says nothing of the teacher's own errors"
            )
        return {"index": index.fingerprint, "source": _sha(registry.source_of("format", data.format))}

    def _settle_runtimes(self) -> None:
        """Without data no race can judge accuracy: the first runtime is taken."""
        for i, target in enumerate(self.plan.targets):
            if target.raced:
                self.plan.notes.append(
                    f"{target.name}: without data runtimes are not compared and {target.backend} is taken; -o targets.{target.name}.backend={target.rivals[1]} takes another"
                )
                self.plan.targets[i] = target.on(target.backend)

    def _task(self) -> dict[str, Any]:
        name = self.recipe.task
        return {"task": name, "source": _sha(registry.source_of("task", name))} | ({"imitates": True} if self.imitates else {})

    @property
    def judge(self) -> Target:
        if self.plan.judge is None:
            raise DeviceError("no target was planned")
        return self.plan.judge

    # ------------------------------------------------------------------------------------------------ models
    def _start(self) -> Ref:
        recipe = self.recipe
        if recipe.model.onnx is not None:
            facts = _file_facts(recipe.model.onnx) | {"quantizes": any(kind == "quantize" for kind, _ in self.loaded.stages)}
            name = self._add("model", "read_graph", recipe.model, {"data": "data"}, facts=facts, user=True)
            self.plan.graphs["model"] = name
            self._measured("model", name)
            return name
        student = self._add("student", "init", recipe.model, {"data": self.images}, facts=_model_facts(recipe.model))
        inputs: dict[str, Ref] = {"student": student, "data": self.images}
        if recipe.teacher is not None:
            inputs |= self._given_teacher(recipe.teacher)
        if (between := recipe.assistant) is not None:
            inputs["assistant?"] = self._add(
                "assistant.init", "init", _as_model(between), {"data": self.images}, facts=_model_facts(between)
            )
        self._add(
            "preflight",
            "preflight",
            self._config(
                "preflight",
                probes=[_probe(k, s) for k, s in self.loaded.stages],
                places=self._places(),
                teacher_smoothing=smoothing_of(recipe),
            ),
            inputs,
            facts=self._task() | _here() | {"methods": self._sources()},
            user=True,
        )
        if recipe.teacher is not None:
            self._teacher()
        return student

    def _places(self) -> list[dict[str, Any]]:
        """Where preflight builds and runs: the targets of this machine, the judge, and, built only, those that this machine can build for."""
        found = {
            (t.name, t.backend): {
                "device": t.name,
                "backend": t.backend,
                "threads": t.threads,
                "runs": t.runs_here,
                "leaves_out": [
                    s.name
                    for k, s in self.loaded.stages
                    if k == "quantize" and (t.config.precision == "fp32" or _refuses(t, s) is not None)
                ],
                "batch": t.config.batch,
                "options": t.config.options,
            }
            for t in (*self.plan.targets, self.judge)
            if t.runs_here or _can_compile(t)
        }
        return list(found.values())

    def _sources(self) -> dict[str, str]:
        """The code of the recipe's methods."""
        used = {(registry.load("stage", k).method_kind, s.method) for k, s in self.loaded.stages if s.method}
        return {f"{kind}/{name}": _sha(registry.source_of(kind, name)) for kind, name in sorted(used)}

    def _given_teacher(self, teacher: TeacherConfig) -> dict[str, Ref]:
        """The teacher as it is before any training: the name that stages know it by, and its step."""
        if teacher.onnx is not None:
            fields = ("onnx", "mean", "std", "image_size", "outputs", "classes")
            config = self._config("read_teacher", **{n: getattr(teacher, n) for n in fields})
            name = self._add("teacher", "read_teacher", config, {"data": self.images}, facts=_file_facts(teacher.onnx), user=True)
            self.plan.graphs["teacher"] = name
            return {"black_box?": name}
        if teacher.predictions is not None:
            own = "calibrated" if self.of_nodes else "classes"
            reads = "read_node_predictions" if self.of_nodes else "read_predictions"
            config = self._config(reads, **{n: getattr(teacher, n) for n in ("predictions", "outputs", own)})
            return {"answers?": self._add("teacher", reads, config, {"data": self.images}, facts=_file_facts(teacher.predictions))}
        name = "teacher.init" if teacher.train is not None else "teacher"
        return {"teacher?": self._add(name, "init", _as_model(teacher), {"data": self.images}, facts=_model_facts(teacher))}

    def _teacher(self) -> None:
        teacher = self.recipe.teacher
        if teacher is not None and self.of_nodes and teacher.arch is not None:
            self._graph_teacher(teacher)
            return
        if teacher is not None and teacher.train is not None:
            self._learn("teacher", "train", Settings("teacher", teacher.train), "teacher.init")
        if teacher is not None and teacher.predictions is not None:
            self._label({"answers?": "teacher"})
            self.plan.metrics["teacher"] = self._judged("val")
            return
        graph = self.plan.graphs.get("teacher") or self._export("teacher", "teacher")
        self.plan.engines["teacher"] = self._compile("teacher.engine", graph, self.judge)
        self._label({"engine?": "teacher.engine"})
        self._measured("teacher", graph)

    def _graph_teacher(self, teacher: TeacherConfig) -> None:
        """A teacher that looks at neighbours has no engine: it is asked about every node once, and its answers are what is learned from and judged."""
        if teacher.train is not None:
            self._learn("teacher", f"train_{self.parts}", Settings("teacher", teacher.train), "teacher.init")
        methods = [registry.load("graph_distill", str(s.method)) for k, s in self.loaded.stages if k == "distill_nodes"]
        asked = {n: any(n in m.needs for m in methods) for n in OF_TEACHER} | {"calibrated": getattr(teacher, "calibrated", True)}
        config = self._config(f"answer_{self.parts}", **({} if self.of_pairs else asked))
        self.said = self._add("teacher.answers", f"answer_{self.parts}", config, {"model": "teacher", "data": "data"})
        self.plan.metrics["teacher"] = self._judged("val")

    def _label(self, said: dict[str, Ref]) -> None:
        """Where there are no labels, what the teacher says stands for them from here on."""
        if self.images != "data":
            self._add("data", "label", None, {"images": self.images, **said}, user=True)

    def _judged(self, split: str) -> str:
        """The step that reads a teacher's predictions on one split."""
        config = self._config("evaluate_predictions", split=split, above_chance=split == "val" and self.gate)
        return self._add(
            f"teacher.{split}", "evaluate_predictions", config, {"answers": self.said, "data": "data"}, facts=self._task() | _here()
        )

    def _taught(self) -> dict[str, Ref]:
        """What a stage that imitates the teacher takes."""
        teacher = self.recipe.teacher
        if teacher is None:
            return {}
        if self.of_nodes:
            return {"answers?": self.said}
        return {"answers?" if teacher.predictions is not None else "black_box?" if teacher.onnx is not None else "teacher?": "teacher"}

    def _learn(
        self,
        name: str,
        stage: str,
        settings: Settings,
        model: Ref,
        *,
        taught: dict[str, Ref] | None = None,  # by whom, where it is not the recipe's teacher
        unless: tuple[str, Ref] | None = None,
        user: bool = True,
    ) -> str:
        inputs: dict[str, Ref] = {"model": model, "data": "data"}
        if stage in _IMITATES:
            inputs |= self._taught() if taught is None else taught
        config = settings.config
        if isinstance(config, TrainConfig) and (how := _speed(stage, config)).open:
            few = stage in _IMITATES and self.recipe.teacher is not None and _distiller(stage, settings).needs <= OUTPUTS_ALONE
            asked = self._config("tune", **how.model_dump(), batch_size=config.batch_size, epochs=config.epochs, logits_only=few)
            tuned = {"model?": model, "data": "data"}
            if "teacher?" in inputs and not self._can_be_kept(stage, settings, config):
                tuned["teacher?"] = inputs["teacher?"]
            inputs["speed?"] = self._add(f"{name}.speed", "tune", asked, tuned, facts=_here(), unless=unless)
        if isinstance(config, TrainConfig) and "answers?" in inputs and _augments(settings.typed(TrainConfig).augment):
            self.plan.notes.append(
                f"{name}: its images are augmented and the teacher's predictions are of the images as they are; where that costs, "
                f"augment less, or give the teacher itself as ONNX"
            )
        if isinstance(config, TrainConfig) and self._can_be_kept(stage, settings, config):
            inputs["answers?"] = self._answers(stage, settings, inputs, unless)
        return self._add(name, stage, None, inputs, settings=settings, facts=self._task(), unless=unless, user=user)

    def _can_be_kept(self, stage: str, settings: Settings, config: TrainConfig) -> bool:
        """Whether a teacher would say the same thing again and again to the images of this stage."""
        return (
            0 < config.fixed_views < config.epochs
            and self.recipe.teacher is not None
            and self.recipe.teacher.predictions is None
            and stage in ("distill", "quantize_train")
            and _distiller(stage, settings).needs <= _FROM_LOGITS
        )

    def _answers(self, stage: str, settings: Settings, inputs: Mapping[str, Ref], unless: tuple[str, Ref] | None) -> str:
        """The teacher's answers to every view: kept once, for all stages that imitate it on the same views."""
        config = settings.typed(TrainConfig)
        how = _speed("answers", config)
        drawn = {"samples": config.sampled_classes, "temperature": _distiller(stage, settings).linear_at} if config.sampled_classes else {}
        asked = self._config("answers", views=config.fixed_views, augment=config.augment, **how.model_dump(), **drawn)
        taken = {"data": "data"} | {n: r for n, r in inputs.items() if n in ("teacher?", "black_box?")}
        teachers = [taken.get(n) for n in ("teacher?", "black_box?")]
        for step in self.plan.steps:
            if step.stage == "answers" and step.settings.config == asked and step.unless in (None, unless):
                if teachers == [step.inputs.get(n) for n in ("teacher?", "black_box?")]:
                    return step.name
        name = f"{settings.name}.answers"
        if how.open and "teacher?" in taken:
            tuned = self._config("tune", **how.model_dump(), batch_size=config.batch_size, epochs=config.fixed_views, logits_only=True)
            taken["speed?"] = self._add(f"{name}.speed", "tune", tuned, dict(taken), facts=_here(), unless=unless)
        return self._add(name, "answers", asked, taken, unless=unless)

    def _export(self, name: str, model: Ref, unless: tuple[str, Ref] | None = None) -> str:
        graph = self._add(f"{name}.export", "export", None, {"model": model, "data": self.images}, unless=unless)
        self.plan.graphs[name] = graph
        return graph

    def _measured(self, name: str, graph: Ref, unless: tuple[str, Ref] | None = None) -> None:
        """Engine and, where there are data, val metrics of a graph on the judge."""
        engine_unless = (unless[0], self._before_of(unless[1], self.plan.engines)) if unless else None
        metrics_unless = (unless[0], self._before_of(unless[1], self.plan.metrics)) if unless else None
        if name not in self.plan.engines:
            self.plan.engines[name] = self._compile(f"{name}.engine", graph, self.judge, engine_unless)
        if self.recipe.data is None:
            return
        inputs: dict[str, Ref] = {"engine": self.plan.engines[name], "data": "data"}
        if name != "teacher" and "teacher" in self.plan.metrics:
            inputs["teacher?"] = self.plan.metrics["teacher"]
        self.plan.metrics[name] = self._add(
            f"{name}.val",
            "evaluate",
            self._config("evaluate", split="val", above_chance=name == "teacher" and self.gate),
            inputs,
            facts=self._task() | _here(),
            unless=metrics_unless,
        )

    def _before_of(self, ref: Ref, table: Mapping[str, str]) -> Ref:
        """The engine or metrics that belong to a graph reference."""
        if isinstance(ref, Choice):
            return ref.each(lambda option: self._before_of(option, table))
        owner = next(n for n, g in self.plan.graphs.items() if g == ref)
        return table[owner]

    def _compile(self, name: str, graph: Ref, target: Target, unless: tuple[str, Ref] | None = None, *, optional: bool = False) -> str:
        config = self._config("compile", **_place(target), optional=optional)
        runtime = {"runtime": _backend(target.backend).version(), "source": _sha(registry.source_of("backend", target.backend))}
        return self._add(name, "compile", config, {"graph": graph}, facts=runtime, unless=unless)

    # ------------------------------------------------------------------------------------------------ the chain
    def _model_stages(self, start: Ref) -> tuple[Ref, Ref]:
        """The listed model stages with their gates; returns the chosen model and graph."""
        model: Ref = start
        graph: Ref = ""
        stages = [s for s in self.loaded.stages if s[0] != "quantize"]
        position = 0
        if not stages or _compresses(stages[0][0]):
            graph = self._export("student", start)
            self._measured("student", graph)
        while position < len(stages) and not _compresses(stages[position][0]):
            kind, settings = stages[position]
            before, model = model, self._learn(settings.name, kind, settings, model)
            graph = self._export(settings.name, model)
            self._measured(settings.name, graph)
            if position == 0 and self.recipe.assistant is not None:
                model, graph = self._assisted(settings, before, model, graph)
            position += 1
        current_model, current_graph = model, graph
        while position < len(stages):
            end = position + 1
            while end < len(stages) and not _compresses(stages[end][0]):
                end += 1
            current_model, current_graph = self._segment(stages[position:end], current_model, current_graph)
            position = end
        return current_model, current_graph

    def _assisted(self, settings: Settings, start: Ref, model: Ref, graph: Ref) -> tuple[Ref, Ref]:
        """The student taught by an assistant beside the one that the teacher taught; val decides. Both lessons are plain kd (TAKD), at the stage's settings."""
        own = settings.method_config
        kd = own if settings.method == "kd" else registry.load("distill", "kd").Config(**_label_weight(own))
        lesson = replace(settings, method="kd", method_config=kd)
        assistant = self._learn("assistant", "distill", replace(lesson, name="assistant"), "assistant.init")
        self._measured("assistant", self._export("assistant", assistant))
        name = f"{settings.name}.assisted"
        after = self._learn(name, "distill", replace(lesson, name=name), start, taught={"teacher?": assistant})
        after_graph = self._export(name, after)
        self._measured(name, after_graph)
        metrics = {"before_metrics": self._before_of(graph, self.plan.metrics), "after_metrics": self.plan.metrics[name]}
        decision = self._add(
            f"{settings.name}.assistant", "assist", self._config("assist", enabled=self.gate), metrics, facts=self._task(), user=True
        )
        self.plan.segments.append(Segment(decision, (name,)))
        return Choice.of_gate(decision, model, after), Choice.of_gate(decision, graph, after_graph)

    def _segment(self, stages: list[tuple[str, Settings]], model: Ref, graph: Ref) -> tuple[Ref, Ref]:
        (_, settings), name = stages[0], stages[0][1].name
        widths_config = self._config(
            "widths",
            **_place(self.judge),
            gate=self.gate,
            quantum=self._quantum(),
        )
        widths = self._add(
            f"{name}.widths",
            "widths",
            widths_config,
            {"model": model, "data": "data"},
            settings=Settings(
                f"{name}.widths",
                settings.config,
                settings.method,
                settings.method_config,
                self._task() | {"judge": widths_config.model_dump(mode="json")} | _here(),
            ),
        )
        skip_model, skip_graph = (widths, model), (widths, graph)
        after: Ref = self._add(
            name,
            "prune",
            None,
            {"model": model, "data": "data", "widths": widths},
            settings=settings,
            facts=self._task(),
            unless=skip_model,
            user=True,
        )
        after_graph: Ref = self._export(name, after, unless=skip_graph)
        self._measured(name, after_graph, unless=skip_graph)
        for kind, recover in stages[1:]:
            after = self._learn(recover.name, kind, recover, after, unless=skip_model)
            after_graph = self._export(recover.name, after, unless=skip_graph)
            self._measured(recover.name, after_graph, unless=skip_graph)
        gate = self._gate(name, graph, after_graph, note=widths)
        self.plan.segments.append(Segment(gate, tuple(s.name for _, s in stages)))
        return Choice.of_gate(gate, model, after), Choice.of_gate(gate, graph, after_graph)

    def _quantum(self) -> int:
        """The multiple of channels that the first target prefers in the precision that will ship."""
        first = self.plan.targets[0]
        needs = [
            _needs(s) for k, s in self.loaded.stages if k == "quantize" and first.config.precision != "fp32" and first.takes(_needs(s))
        ]
        return first.device.channel_multiple(needs[-1] if needs else "fp32")

    def _gate(self, name: str, before: Ref, after: Ref, *, note: str | None = None, target: Target | None = None) -> str:
        budget = (target or self.plan.targets[0]).config.budget
        timed = self.plan.targets[0].runs_here and (target is None or target.runs_here)
        config = self._config(
            "gate",
            **_place(self.judge),
            enabled=self.gate,
            timed=timed,
            accuracy_drop_max=self.recipe.accept.accuracy_drop_max,
            budget=budget.model_dump(mode="json"),
        )
        inputs: dict[str, Ref] = {
            "before": self._before_of(before, self.plan.engines),
            "after": self._before_of(after, self.plan.engines),
            "before_metrics": self._before_of(before, self.plan.metrics),
            "after_metrics": self._before_of(after, self.plan.metrics),
            "reference_metrics": self._reference(),
        }
        inputs |= {"note?": note} if note is not None else {}
        return self._add(f"{name}.gate", "gate", config, inputs, facts=self._task() | _here(), user=True)

    def _reference(self) -> str:
        """The val metrics that a loss is counted from."""
        return self.plan.metrics.get("teacher") or next(iter(self.plan.metrics.values()))

    # ------------------------------------------------------------------------------------------------ targets
    def _target(self, target: Target, graph: Ref, model: Ref | None) -> None:
        """What ships to one target: of its quantizing stages, each of which starts from the graph in fp32 (a rounded one is refused), what the last
        gate chose between it and what was kept before; or a race between all candidates."""
        if target.raced:
            self._race(target, graph, model)
            return
        current = graph
        for settings in self._quantizing(target):
            name = self._own_name(settings.name, target)
            mix = self._mix(name, settings, target, graph)
            step = self._quantized(name, settings, target, graph, model, mix)
            self._measured(name, step)
            gate = self._gate(name, current, step, note=mix, target=target)
            self.plan.segments.append(Segment(gate, (name,)))
            current = Choice.of_gate(gate, current, step)
        self.plan.shipped[target.name] = current

    def _race(self, target: Target, graph: Ref, model: Ref | None) -> None:
        """Every runtime here with the graph in fp32, quantized, and, where a search is asked for, quantized as the search found: the fastest ships."""
        graphs: dict[str, Ref] = {}
        stages: list[str] = []
        made: dict[tuple[str, str], str] = {}  # (stage, flavour) -> graph: one file serves all runtimes that want the same
        for backend in target.rivals:
            place = target.on(backend)
            quantizing = self._quantizing(place)
            if target.config.precision != "int8" or not quantizing:
                graphs[f"{backend} fp32"] = graph
            for settings in quantizing:
                key = (settings.name, place.device.flavour_for(backend))
                if key not in made:
                    first = not any(
                        n == settings.name for n, _ in made
                    )  # it stands for its stage in the table of stages; the race has them all
                    name = self._own_name(settings.name, target, *([] if first else [backend]))
                    made[key] = self._quantized(name, settings, place, graph, model, None)
                    if first:
                        self._measured(name, made[key])
                        stages.append(name)
                graphs[f"{backend} {settings.name}"] = made[key]
                name = self._own_name(settings.name, target, backend, "searched")
                if mix := self._mix(name, settings, place, graph):
                    graphs[f"{backend} {settings.name}, searched"] = self._quantized(name, settings, place, graph, model, mix)
        engines: dict[str, Ref] = {}
        for name, ref in graphs.items():
            step = f"{target.name}.{name.replace(', ', '.').replace(' ', '.')}.engine"
            place = target.on(name.split(" ", 1)[0])
            engines[name] = self._compile(
                step, ref, place, optional=place.backend != target.backend
            )  # of the first, the chain needs one anyway
        config = self._config(
            "race",
            **_place(target),
            candidates=tuple(graphs),
            plain=tuple(n for n in graphs if graphs[n] is graph),
            enabled=self.gate,
            accuracy_drop_max=self.recipe.accept.accuracy_drop_max,
            budget=target.config.budget.model_dump(mode="json"),
        )
        inputs: dict[str, Ref] = {
            "data": "data",
            "reference_metrics": self._reference(),
            "start_metrics": self._before_of(graph, self.plan.metrics),
        }
        inputs |= {f"*{n}": e for n, e in engines.items()}
        race = self._add(f"{target.name}.race", "race", config, inputs, facts=self._task() | _here(), user=True)
        self.plan.segments += [Segment(race, tuple(stages))] if stages else []
        self.plan.shipped[target.name] = Choice(race, graphs)
        self.plan.races[target.name] = Race(race, graphs, engines)

    def _quantizing(self, target: Target) -> list[Settings]:
        """The quantizing stages that a target takes."""
        found = []
        for kind, settings in self.loaded.stages:
            if kind != "quantize" or target.config.precision == "fp32":
                continue
            if (said := _refuses(target, settings)) is not None:
                self.plan.notes.append(f"{target.name}: '{settings.name}' is left out, {said}")
                continue
            found.append(settings)
        return found

    def _own_name(self, stage: str, target: Target, *parts: str) -> str:
        """A step's name for one target: the stage's own for the first."""
        place = [] if target.name == self.plan.targets[0].name else [target.name]
        return "@".join([stage, ".".join([*place, *parts])]) if place or parts else stage

    def _quantized(self, name: str, settings: Settings, target: Target, graph: Ref, model: Ref | None, mix: str | None) -> str:
        """The step that quantizes a graph in the flavour that the target asks for."""
        flavour = {"flavour": target.device.flavour_for(target.backend)}
        inputs: dict[str, Ref] = {"graph": graph, "data": "data"}
        if model is not None and _trains(settings):
            inputs |= self._trained(settings, model, flavour)
        self.unrounded[name] = inputs["graph"]
        if mix is not None:
            inputs["mix?"] = mix
        if trial := self._trial(name, settings, inputs, flavour):
            inputs["trial?"] = trial
        self.plan.graphs[name] = self._add(name, "quantize", None, inputs, settings=settings, facts=flavour, user=True)
        return name

    def _trained(self, settings: Settings, model: Ref, flavour: dict[str, Any]) -> dict[str, Ref]:
        """What a quantizer that trains gives every target: the model on its grid, and its export."""
        name = f"{settings.name}.train"
        if name not in self.plan.graphs:  # once, in the flavour of the first target that takes it
            fields = {n: getattr(settings.method_config, n) for n in TrainConfig.model_fields}
            training = Settings(name, TrainConfig(**fields), settings.method, settings.method_config, flavour)
            self._learn(name, "quantize_train", training, model)
            self._export(name, name)
        return {"graph": self.plan.graphs[name], "grid?": name}

    def _mix(self, name: str, settings: Settings, target: Target, graph: Ref) -> str | None:
        """The search for the operators that are worth quantizing, where the recipe asks for one and the target can be measured."""
        evaluations = getattr(settings.config, "search", 0)
        if not evaluations:
            return None
        if not hasattr(registry.load("quantize", str(settings.method)), "candidates"):
            raise RecipeError(
                [f"{settings.name}.search: {settings.method} has no operators to choose from"], hint=f"-o {settings.name}.method=ptq"
            )
        why = "a search needs the device" if not target.runs_here else "the budget names the size" if target.config.budget.size_mb else ""
        if why:
            note = f"{target.name}: '{settings.name}' quantizes everything, {why}"
            self.plan.notes += [note] if note not in self.plan.notes else []
            return None
        facts = {"flavour": target.device.flavour_for(target.backend)} | self._task() | _here()
        inputs: dict[str, Ref] = {"graph": graph, "data": "data"}
        limit = {"accuracy_drop_max": self.recipe.accept.accuracy_drop_max}
        for stage, more in (("sensitivity", {}), ("mix", limit)):
            config = self._config(stage, **_place(target), evaluations=evaluations, **more)
            step = Settings(f"{name}.{stage}", config, settings.method, settings.method_config)
            inputs |= {stage: self._add(f"{name}.{stage}", stage, None, dict(inputs), settings=step, facts=facts, user=stage == "mix")}
        return str(inputs["mix"])

    def _trial(self, name: str, settings: Settings, inputs: Mapping[str, Ref], flavour: dict[str, Any]) -> str | None:
        """The trial that chooses the calibration and finds nodes to keep, where the method leaves the one open or the recipe allows the other."""
        config = settings.method_config
        if config is None or "keep_nodes" not in type(config).model_fields:
            return None
        if not self.recipe.accept.keep_nodes and getattr(config, "calibration", None) != "auto":
            return None
        trial = Settings(f"{name}.trial", self._config("trial", repair=self.recipe.accept.keep_nodes), settings.method, config)
        return self._add(f"{name}.trial", "trial", None, dict(inputs), settings=trial, facts=flavour | self._task() | _here())

    def _baselines(self, model: Ref | None) -> None:
        """The student trained alone for as many epochs as the chain's first learning stage, exported, measured and tested."""
        if "student" not in self.recipe.baselines or model is None:
            return
        learns = [(k, s) for k, s in self.loaded.stages if k in LEARNS]
        if not learns:
            return
        config = learns[0][1].config
        plain = config if self.of_nodes else TrainConfig(**{n: getattr(config, n) for n in TrainConfig.model_fields})
        stage = f"train_{self.parts}" if self.of_nodes else "train"
        alone = self._learn("student alone", stage, Settings("student alone", plain), "student", user=False)
        self._measured("student alone", self._export("student alone", alone))
        self._tested("student alone")
        self.plan.baselines.append("student alone")

    def _ship(self) -> None:
        """Engines, one interleaved profile, test metrics, parity and a bundle for each target."""
        judge = self.judge
        for target in self.plan.targets:
            graph = self.plan.shipped[target.name]
            runner = target if target.runs_here else judge
            if (missing := _backend(target.backend).builds_for(target.device)) is not None:
                self.plan.notes.append(f"{target.name}: no engine is built here. {missing}")
            plain = judge if not _backend(judge.backend).builds else _host(judge)  # never the engine of another device
            engine: Ref = (
                self.plan.races[target.name].engine
                if target.raced
                else self._compile(f"{target.name}.compile", graph, target if _can_compile(target) else plain)
            )
            run_engine = engine if runner is target else self._compile(f"{target.name}.check", graph, judge)
            test = self._test(target, run_engine) if self.recipe.data is not None else None
            profile_inputs: dict[str, Ref] = {"shipped": run_engine}
            if target is self.plan.targets[0]:
                profile_inputs |= {f"*{name}": engine_ for name, engine_ in self.plan.engines.items()}
            if target is self.plan.targets[0] and self.said == "teacher.answers" and self._looks_at_neighbours():
                served: dict[str, Ref] = {"model": "teacher", "data": "data", "engine": run_engine}
                self._add("teacher.served", "serve", None, served, facts=_here(), user=True)
            if target is self.plan.targets[0] and self.of_nodes and test is not None:
                grouped: dict[str, Ref] = {"student": test, "data": "data"}
                grouped |= {f"{n}?": s for n, of in (("teacher", "teacher"), ("alone", "student alone")) if (s := self._tested(of))}
                self._add("test.groups", "node_groups", None, grouped, facts=self._task())
            config = self._config("profile", **_place(runner))
            self._add(f"{target.name}.profile", "profile", config, profile_inputs, facts=_here(), user=True)
            parity = self._parity(target, graph, engine)
            bundle_config = self._config(
                "bundle",
                target=target.name,
                backend="auto" if target.raced else target.backend,
                recipe=self.loaded.name,
                threads=target.threads,
                provenance=self._provenance(),
                build={name: facts for name in target.rivals or (target.backend,) if (facts := _build_facts(target.on(name)))},
            )
            inputs: dict[str, Ref] = {"graph": graph, "engine": engine, "data": "data", "parity": parity}
            inputs |= {"test?": test} if test is not None else {}
            self._add(f"{target.name}.bundle", "bundle", bundle_config, inputs, facts=self._task() | _here(), user=True)

    def _looks_at_neighbours(self) -> bool:
        teacher = self.recipe.teacher
        return teacher is not None and registry.load("architecture", str(teacher.arch)).looks_at == "graph"

    def _test(self, target: Target, engine: Ref) -> str:
        """What ships to a target, on test."""
        inputs: dict[str, Ref] = {"engine": engine, "data": "data"}
        if teacher := self._tested("teacher"):
            inputs["teacher?"] = teacher
        return self._add(f"{target.name}.test", "evaluate", self._config("evaluate", split="test"), inputs, facts=self._task() | _here())

    def _provenance(self) -> dict[str, Any]:
        """What the bundle says of its origin: architectures, weights and library versions."""
        recipe, found = self.recipe, {"student": self.recipe.model.arch or "an ONNX file"}
        if recipe.teacher is not None:
            found["teacher"] = recipe.teacher.name
        return found | {name: library_version(name) for name in ("edgekd", "torch", "timm", "onnx")}

    def _parity(self, target: Target, graph: Ref, engine: Ref) -> str:
        fp32 = self._fp32_of(graph)
        inputs: dict[str, Ref] = {"graph": graph, "fp32": fp32, "data": "data"}
        model = self._model_of(fp32)
        if model is not None:
            inputs["model?"] = model
        if target.runs_here:
            inputs["engine?"] = engine
        return self._add(f"{target.name}.parity", "parity", None, inputs, facts=self._task() | _here())

    def _fp32_of(self, ref: Ref) -> Ref:
        """The same choice without quantized graphs: what went into them."""
        if isinstance(ref, str):
            return self._fp32_of(self.unrounded[ref]) if ref in self.unrounded else ref
        found = ref.each(self._fp32_of)
        first, *others = found.options.values()
        return first if all(other == first for other in others) else found

    def _model_of(self, ref: Ref) -> Ref | None:
        """The model that a graph in fp32 was exported from; None where one of them came as a file."""
        if isinstance(ref, str):
            return self.plan.step(ref).inputs.get("model")
        found = {name: model for name, option in ref.options.items() if (model := self._model_of(option))}
        return Choice(ref.decision, found) if len(found) == len(ref.options) else None

    def _tested(self, name: str) -> str | None:
        """The step that reads a reference on test (the teacher, a baseline), or None where there is no such reference."""
        if name == "teacher" and name in self.plan.metrics and name not in self.plan.engines:
            return next((s.name for s in self.plan.steps if s.name == "teacher.test"), None) or self._judged("test")
        if name not in self.plan.engines:
            return None
        step = f"{name}.test"
        if not any(s.name == step for s in self.plan.steps):
            inputs: dict[str, Ref] = {"engine": self.plan.engines[name], "data": "data"}
            self._add(step, "evaluate", self._config("evaluate", split="test"), inputs, facts=self._task() | _here())
        return step


def _label_weight(config: Config | None) -> dict[str, Any]:
    """Whatever was said of the labels' weight, for another method of the same stage: without labels it is 0."""
    return {"label_weight": 0.0} if getattr(config, "label_weight", None) == 0 else {}


def _place(target: Target) -> dict[str, Any]:
    """Where and how something is built or measured: the fields of RunConfig."""
    config = target.config
    return {"device": target.name, "backend": target.backend, "threads": target.threads, "batch": config.batch, "options": config.options}


def _build_facts(target: Target) -> dict[str, Any]:
    """What build.py of a bundle needs on the device; nothing for a runtime that takes the graph as it is."""
    backend = _backend(target.backend)
    if not backend.builds:
        return {}
    options = backend.Options(**target.config.options).model_dump(mode="json")
    return {
        "backend": target.backend,
        "compute_capability": target.device.arch.sm,
        "batch": target.config.batch,
        "options": options,
    }


def _probe(kind: str, settings: Settings) -> dict[str, Any]:
    """A listed stage as preflight tries it."""
    method = settings.method_config.model_dump(mode="json") if settings.method_config else {}
    own = settings.config.model_dump(mode="json", exclude_none=True) if kind == "prune" else {}
    return {"stage": kind, "name": settings.name, "method": settings.method, "config": method, "settings": own}


def _needs(settings: Settings) -> str:
    """What a quantizer's graphs ask of the runtime: fp32, fp16 or int8."""
    return str(registry.load("quantize", str(settings.method)).needs)


def _trains(settings: Settings) -> bool:
    """Whether a quantizing stage trains the model."""
    return bool(registry.load("quantize", str(settings.method)).level == "model")


def _refuses(target: Target, settings: Settings) -> str | None:
    """Why a quantizing stage is left out for a target, or None."""
    needs, method = _needs(settings), registry.load("quantize", str(settings.method))
    if not target.takes(needs):
        return f"its {target.backend} does not compute in {needs}"
    if method.precision in ("int8_weights", "codebook") and _backend(target.backend).builds:
        return f"{target.backend} does not take packed weights"
    return None


def _compresses(kind: str) -> bool:
    found: bool = registry.load("stage", kind).compresses
    return found


def _distiller(stage: str, settings: Settings) -> Any:
    """The distiller of a stage that imitates a teacher."""
    if stage == "distill":
        return registry.load("distill", str(settings.method))(settings.method_config)
    config: Any = settings.method_config
    distiller = registry.load("distill", config.distiller)
    return distiller(distiller.Config(**config.distiller_options))


def _speed(stage: str, config: TrainConfig) -> SpeedConfig:
    """What a stage leaves open; rounding while learning is compiled only where that is asked for."""
    asked = {n: getattr(config, n) for n in SpeedConfig.model_fields}
    return SpeedConfig(**asked | ({"compile": "off"} if stage == "quantize_train" and config.compile == "auto" else {}))


def _augments(augment: AugmentConfig) -> bool:
    return augment.policy != "none" or augment.erase > 0


def _as_model(teacher: Any) -> Any:
    from edgekd.models.spec import ModelConfig

    return ModelConfig(**{n: getattr(teacher, n) for n in ModelConfig.model_fields})


def _model_facts(model: Any) -> dict[str, Any]:
    """Content of the weights file, and of the user's file where that defines the architecture."""
    from edgekd.errors import CheckpointRefused

    found = _file_facts(model.weights) if model.weights is not None else {}
    if found and model.sha256 not in (None, found["file"]):
        raise CheckpointRefused(f"its SHA-256 is {found['file']}", where=str(model.weights), expected=model.sha256)
    code = user_source(model.arch) if model.arch else None
    return found | ({"code": code} if code else {})


def _file_facts(path: Path | None) -> dict[str, Any]:
    from edgekd.errors import FileMissing
    from edgekd.safeio.files import sha256_file

    if path is None or not path.is_file():
        raise FileMissing(
            f"there is no file '{path}'",
            expected="a file with weights, an ONNX model, or predictions",
            hint="import a checkpoint: edgekd import CHECKPOINT --arch NAME",
        )
    return {"file": sha256_file(path)}


@cache
def _here_cached() -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(identity().items()))


def _here() -> dict[str, Any]:
    """The identity of this machine, for results that come from timing or running on it."""
    return {"machine": dict(_here_cached())}


def _backend(name: str) -> Backend:
    backend: Backend = registry.load("backend", name)()
    return backend


def _target(name: str, config: TargetConfig) -> Target:
    device = load_device(name)
    backend = _auto_backend(device) if config.backend == "auto" else config.backend
    try:
        _backend(backend).Options(**config.options)
    except ValidationError as error:
        problems = [f"targets.{name}.options.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(problems, hint=f"see them: edgekd methods show {backend}") from error
    if same_machine(device) and (missing := _backend(backend).available()) is not None:
        raise BackendError(missing, where=f"targets.{name}", hint=f"install it, or -o targets.{name}.backend=onnxruntime")
    return Target(name, config, device, backend, _backend(backend).runs_on(device), _rivals(backend, config, device))


def _rivals(first: str, config: TargetConfig, device: DeviceProfile) -> tuple[str, ...]:
    """Runtimes of a target that leaves its runtime open, where they run here and take its options: the first one, then the others."""
    if config.backend != "auto" or not _backend(first).runs_on(device):
        return ()
    names = [r.name for r in device.runtimes if r.name != first and r.name in registry.names("backend")]
    return (first, *(n for n in names if _backend(n).runs_on(device) and not set(config.options) - set(_backend(n).Options.model_fields)))


def _auto_backend(device: DeviceProfile) -> str:
    """The first runtime of the profile that edgekd has; where that takes a builder that is not here, the first whose builder is."""
    offered = [r.name for r in device.runtimes]
    known = [n for n in offered if n in registry.names("backend")]
    if not known:
        raise BackendError(
            f"edgekd has no backend for '{device.id}': the device runs {', '.join(offered) or 'nothing known'}",
            where=device.id,
            hint=f"predict still works: edgekd predict MODEL.onnx --device {device.id}",
        )
    if same_machine(device):
        return next((n for n in known if _backend(n).available() is None), known[0])
    builders = [n for n in known if _backend(n).builds]
    return known[0] if known[0] not in builders else next((n for n in builders if _backend(n).builds_for(device) is None), known[0])


def _judge(first: Target) -> Target:
    """The gate's target, or the host's onnxruntime where that cannot run here."""
    if first.runs_here:
        return first
    return _host(first)


def _host(like: Target) -> Target:
    """This machine's onnxruntime, with another target's threads and batch."""
    return Target(HOST, TargetConfig(threads=like.config.threads, batch=like.config.batch), load_device(HOST), "onnxruntime", True)


def _can_compile(target: Target) -> bool:
    return _backend(target.backend).builds_for(target.device) is None
