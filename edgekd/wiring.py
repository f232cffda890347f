"""How a recipe's teacher and student are wired: stages side by side, what each loss term compares, and the same as explicit YAML. No weights are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml

from edgekd import assistant, registry
from edgekd.distill._advice import Advice, Facts, advise, cautions, facts_of
from edgekd.distill._pairs import stage_of, stage_pairs
from edgekd.errors import UsageError, suggest
from edgekd.recipe import AUTO, Loaded, NodeRecipe, smoothing_of
from edgekd.stages._stage import Settings
from edgekd.train.distiller import DistillConfig

if TYPE_CHECKING:
    from torch import nn

    from edgekd.models.spec import ModelConfig, ModelSpec
    from edgekd.models.taps import Tap
    from edgekd.train.distiller import Side
    from edgekd.train.links import Link, Place

_WIDTH = 140


@dataclass(frozen=True)
class Pair:
    """A recipe's two models, untrained."""

    loaded: Loaded
    classes: int
    images: int  # to train on

    @cached_property
    def student(self) -> tuple[nn.Module, ModelSpec]:
        return self._build(self.loaded.recipe.model)

    @cached_property
    def teacher(self) -> tuple[nn.Module, ModelSpec]:
        if self.loaded.recipe.teacher is None:
            raise UsageError("the recipe has no teacher, so nothing is wired", where=self.loaded.name, hint="teacher: {arch: NAME, ...}")
        if self.loaded.recipe.teacher.black_box:
            raise UsageError(
                "only the outputs of the teacher are known, so there are no stages to wire",
                where="teacher",
                expected="a teacher with an arch",
            )
        return self._build(self.loaded.recipe.teacher)

    @cached_property
    def assistant(self) -> tuple[nn.Module, ModelSpec] | None:
        between = self.loaded.recipe.assistant
        return None if between is None else self._build(between)

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """Student and teacher with their stages."""
        from edgekd.train.pair import side  # torch

        return side(*self.student), side(*self.teacher)

    @cached_property
    def facts(self) -> Facts:
        recipe = self.loaded.recipe
        return facts_of(*self.sides, smoothing_of(recipe), assisted=recipe.assistant is not None)

    @property
    def advice(self) -> Advice:
        data = self.loaded.recipe.data
        return advise(self.facts.teacher, self.facts.student, self.classes, labelled=data is None or data.labels != "none")

    def _build(self, config: ModelConfig) -> tuple[nn.Module, ModelSpec]:
        from edgekd.models.build import build, make_spec

        data = self.loaded.recipe.data
        spec = make_spec(config, num_classes=self.classes, image_size=data.image_size if data is not None else 0)
        return build(spec).eval(), spec


def pair_of(loaded: Loaded, classes: int | None = None) -> Pair:
    """The models of a recipe; the number of classes is the data's, unless it is given."""
    from edgekd.data.index import scan

    if loaded.recipe.data is None:
        raise UsageError("a recipe without data trains nothing, so nothing is wired", where=loaded.name)
    if classes is not None:
        return Pair(loaded, classes, max(classes, 2) * 2)  # how many images there are decides no shape but that of memories
    index = scan(loaded.recipe.data)
    return Pair(loaded, len(index.classes), sum(s.split in (None, "train") for s in index.samples))


def chosen(loaded: Loaded) -> tuple[Loaded, list[str]]:
    """The recipe with a method for each `method: auto` and a model for `assistant: auto`, and a sentence about each; the same recipe where there is none."""
    between = assistant.is_auto(loaded)
    if not between and not any(s.method == AUTO for _, s in loaded.stages):
        return loaded, []
    pair = pair_of(loaded)
    told = [f"{s.name}: method {pair.advice.method}. {pair.advice.why}" for _, s in loaded.stages if s.method == AUTO]
    if told:
        stages = tuple((kind, _advised(s, pair.advice) if s.method == AUTO else s) for kind, s in loaded.stages)
        loaded = replace(loaded, stages=stages)
    if between:
        loaded, said = assistant.settled(loaded, pair)
        told.append(said)
    return loaded, told


def wire(loaded: Loaded, *, classes: int | None = None, step: str | None = None) -> dict[str, Any]:
    """Rows of the models, their stages and the loss terms of each distill stage (or of `step`), cautions, and the `stages:` section in full."""
    if isinstance(loaded.recipe, NodeRecipe):
        raise UsageError(
            "models of a graph are not wired stage by stage: a method of graphs compares answers",
            where=loaded.name,
            hint="edgekd methods list",
        )
    names = [s.name for kind, s in loaded.stages if kind == "distill"]
    if not names:
        raise UsageError("no stage of the recipe distils, so nothing is wired", where=loaded.name, hint="- distill: {method: auto}")
    if step is not None and step not in names:
        raise UsageError(f"there is no distill stage '{step}'{suggest(step, names)}", where="--step")
    pair = pair_of(loaded, classes)
    notes, between = [], {}
    if assistant.is_auto(loaded):
        loaded, why = assistant.settled(loaded, pair)
        pair = replace(pair, loaded=loaded)
        notes.append({"step": "assistant", "method": "auto", "why": why.removeprefix("assistant: ")})
    if loaded.recipe.assistant is not None:
        between = {"assistant": loaded.recipe.assistant.model_dump(mode="json", exclude_unset=True)}
    stages, terms, warnings = [], [], []
    for kind, settings in loaded.stages:
        asked = kind == "distill" and step in (None, settings.name)
        if asked:
            settings, why = _method(loaded, settings, pair)
            settings, rows, said = _traced(settings, pair)
            terms += rows
            warnings += [text for text in said if text not in warnings]
            notes.append({"step": settings.name, "method": _shown(settings), "why": why})
        stages.append({kind: _body(kind, settings, full=asked)})
    return {
        "recipe": loaded.name,
        "models": _models(pair),
        "stages": _stages(*pair.sides),
        "terms": terms,
        "methods": notes,
        "warnings": warnings,
        "yaml": _yaml(between | {"stages": stages}, notes),
    }


def _method(loaded: Loaded, settings: Settings, pair: Pair) -> tuple[Settings, str]:
    """The stage as the recipe has it, or, where it names no method, with the one that suits the pair."""
    if settings.method != AUTO and f"{settings.name}.method" in loaded.sources:
        return settings, "as the recipe says"
    if settings.method != AUTO and _written(settings).keys() - DistillConfig.model_fields.keys():
        return settings, "the default, for the recipe has settings of it"
    return _advised(settings, pair.advice), pair.advice.why


def _advised(settings: Settings, advice: Advice) -> Settings:
    """The stage with the proposed method; what was written for any method stays."""
    config = registry.load("distill", advice.method).Config
    kept = {name: value for name, value in _written(settings).items() if name in DistillConfig.model_fields}
    return replace(settings, method=advice.method, method_config=config(**advice.settings | kept))


def _written(settings: Settings) -> dict[str, Any]:
    return settings.method_config.model_dump(exclude_unset=True) if settings.method_config is not None else {}


def _traced(settings: Settings, pair: Pair) -> tuple[Settings, list[dict[str, Any]], list[str]]:
    """(the stage with everything that its method chose, a row a loss term, warnings)."""
    from edgekd.train.links import links

    distiller = registry.load("distill", str(settings.method))(settings.method_config)
    found = links(distiller, pair.student, pair.teacher, pair.images)
    explicit = replace(settings, method_config=getattr(distiller, "explicit", distiller.config))
    own = "modules" in distiller.needs  # reads the teacher where it likes
    rows = [_row(settings, link, *pair.sides, inside=own) for link in found]
    idle = [
        f"{settings.name}: nothing of the teacher changes '{link.term}': it teaches nothing" for link in found if not (link.teacher or own)
    ]
    return explicit, rows, idle + [f"{settings.name}: {text}" for text in cautions(str(settings.method), distiller, pair.facts)]


def _row(settings: Settings, link: Link, student: Side, teacher: Side, *, inside: bool) -> dict[str, Any]:
    layers = ", ".join(f"{count} {kind}" for kind, count in link.layers.items())
    return {
        "step": settings.name,
        "method": _shown(settings),
        "term": link.term,
        "student": _words(link.student, student),
        "teacher": _words(link.teacher, teacher) or ("its layers" if inside else ""),
        "projector": f"{layers}: {link.parameters} parameters" if layers else "",
    }


def _shown(settings: Settings) -> str:
    names = getattr(settings.method_config, "names", None)
    return " + ".join(names) if names else str(settings.method)


def _words(places: Iterable[Place], side: Side) -> str:
    return ", ".join(f"stage {stage_of(side.taps, p)}" if isinstance(p, int) else p for p in places)


def _models(pair: Pair) -> list[dict[str, Any]]:
    facts = pair.facts
    rows = [("teacher", pair.teacher[1], facts.teacher, facts.teacher_parameters)]
    if pair.assistant is not None:
        from edgekd.models.taps import family
        from edgekd.train.pair import side

        known = side(*pair.assistant)
        rows.append(("assistant", pair.assistant[1], family(known.taps, known.model), sum(p.numel() for p in known.model.parameters())))
    rows.append(("student", pair.student[1], facts.student, facts.student_parameters))
    return [
        {"model": name, "arch": spec.arch, "family": family, "parameters": size, "classes": spec.num_classes, "input": spec.image_size}
        | {"mean": list(spec.mean), "std": list(spec.std)}
        for name, spec, family, size in rows
    ]


def _stages(student: Side, teacher: Side) -> list[dict[str, Any]]:
    """The student's stages, and beside each the teacher's that is nearest in resolution and depth."""
    partner = dict(stage_pairs(student, teacher))
    return [
        {
            "stage": stage_of(student.taps, i),
            "student": _tap(tap),
            "teacher stage": stage_of(teacher.taps, partner[i]) if i in partner else None,
            "teacher": _tap(teacher.taps[partner[i]]) if i in partner else None,
        }
        for i, tap in enumerate(student.taps)
    ]


def _tap(tap: Tap) -> str:
    h, w = tap.grid
    before = f", {tap.prefix} before them" if tap.prefix else ""
    shape = f"{h * w} tokens of {tap.channels}{before}" if tap.layout == "NLC" else f"{tap.channels} channels"
    return f"{tap.module}: {h} x {w}, {shape}"


# ------------------------------------------------------------------------------------------------------------ the explicit recipe
def _body(kind: str, settings: Settings, *, full: bool) -> dict[str, Any]:
    """A stage as a recipe writes it: what was written, or, `full`, with every setting of its method."""
    stage = registry.load("stage", kind)
    body: dict[str, Any] = {"name": settings.name} if settings.name != kind else {}
    written = settings.config.model_dump(mode="json", exclude_unset=True)
    if settings.method is None or settings.method_config is None:
        return body | written
    method = settings.method_config.model_dump(mode="json", exclude_unset=not full)
    named: Any = settings.method
    if settings.method == "combined":
        named = method.pop("methods")
    return body | {stage.method_field: named} | method | written


def _yaml(sections: dict[str, Any], notes: list[dict[str, Any]]) -> str:
    """The sections with their reasons as comments."""
    comments = [f"# {n['step']}: {n['method']}: {n['why']}" for n in notes]
    text: str = yaml.safe_dump(sections, sort_keys=False, default_flow_style=None, width=_WIDTH, allow_unicode=True)
    return "\n".join([*comments, text.rstrip()])
