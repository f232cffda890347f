"""execute(plan, store): the short heart. Then the run folder: bundles, run.json, decisions.json, report.html."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind, digest_of
from edgekd.errors import EdgekdError, InputRefused, ResourceError
from edgekd.plan import Plan, Ref, Step
from edgekd.safeio.files import resource_errors
from edgekd.stages._stage import read_decision, write_decision

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.train.ranks import Ranks

_INSIDE = re.compile(r"(^|, )[\w.-]+\.(?:onnx|ort|engine)$")  # a file without its folder


class Done:
    """Finished steps: their artifacts, and how long this run spent on each."""

    def __init__(self) -> None:
        self.artifacts: dict[str, Artifact] = {}
        self.seconds: dict[str, float] = {}
        self.skipped: set[str] = set()

    def resolve(self, ref: Ref) -> Artifact:
        """The artifact that a reference stands for, through the decisions of gates."""
        if isinstance(ref, str):
            return self.artifacts[ref]
        chosen = self.chosen(ref.decision)
        if chosen not in ref.options:  # a replayed decision of another machine or recipe
            raise InputRefused(
                f"the decision is '{chosen}'", where=ref.decision, expected=f"one of {', '.join(ref.options)}", hint="run without --replay"
            )
        return self.resolve(ref.options[chosen])

    def chosen(self, decision: str) -> str:
        return str(read_decision(self.artifacts[decision])["chosen"])


def execute(plan: Plan, ctx: Context, ranks: Ranks | None = None) -> Done:
    """Runs every step that the store does not hold yet, in order; raises what a stage raises, with everything before it kept.

    ranks: the processes that help in the steps that learn; this is the first of them.
    """
    done, total = Done(), len(plan.steps)
    for number, step in enumerate(plan.steps, 1):
        ctx.stop.check()
        if step.unless and done.chosen(step.unless[0]) == "before":
            done.artifacts[step.name] = done.resolve(step.unless[1])
            done.skipped.add(step.name)
            continue
        inputs = {name: done.resolve(ref) for name, ref in step.inputs.items()}
        replayed = ctx.replay.get(step.name) if step.gives is Kind.DECISION else None
        ingredients = step.ingredients({n: a.digest for n, a in inputs.items()}, ctx.seed, replayed)
        key = digest_of(ingredients)
        artifact = ctx.store.get(key)
        if artifact is None:
            ctx.console.say(f"[{number}/{total}] {step.name}")
            started = time.perf_counter()
            build = partial(_build, step, {n.removesuffix("?"): a for n, a in inputs.items()}, ctx, key, replayed, ranks)
            with _named(plan, step):
                artifact = ctx.store.put(key, step.gives, build, recipe=ingredients | {"step": step.name}, inputs=tuple(inputs.values()))
            done.seconds[step.name] = time.perf_counter() - started
        done.artifacts[step.name] = artifact
    if ranks:
        ranks.tell(None)
    return done


def help_with(plan: Plan, ctx: Context, ranks: Ranks) -> None:
    """What every process but the first does: it takes part in the steps that learn until there are no more, and keeps nothing."""
    steps = {step.name: step for step in plan.steps}
    while (told := ranks.tell()) is not None:
        name, key, keys = told
        inputs = {n: artifact for n, k in keys.items() if (artifact := ctx.store.get(k)) is not None}
        if lost := sorted(keys.keys() - inputs.keys()):
            raise ResourceError(
                f"this process does not see the store of the first one: '{lost[0]}' is not in it", where=name, hint="share EDGEKD_HOME"
            )
        ctx.work, ctx.ranks = ctx.store.work(key), ranks
        with TemporaryDirectory() as out:
            registry.load("stage", steps[name].stage)().run(steps[name].settings, inputs, Path(out), ctx)


@contextmanager
def _named(plan: Plan, step: Step) -> Iterator[None]:
    """Inside, an error names the model that the user gave, not the file of the store or of a temporary folder that stands for it."""
    try:
        yield
    except EdgekdError as error:
        if error.where and (found := _INSIDE.search(error.where)):
            recipe = plan.loaded.recipe
            model = recipe.teacher if recipe.teacher is not None and step.name.partition(".")[0] == "teacher" else recipe.model
            stage = "" if found.start() else f", step '{step.name}'"
            error.where = f"{error.where[: found.start()]}{found[1]}{model.onnx or model.arch}{stage}"
        raise


def _build(
    step: Step, inputs: Mapping[str, Artifact], ctx: Context, key: str, replayed: Any, ranks: Ranks | None, out: Path
) -> dict[str, Any]:
    """What the store calls to build one entry."""
    if replayed is not None:
        write_decision(out, replayed)
        return {"replayed": True, "step": step.name, **{k: replayed[k] for k in ("verdict", "reason") if k in replayed}}
    stage = registry.load("stage", step.stage)()
    ctx.work = ctx.store.work(key)
    ctx.ranks = ranks if getattr(stage, "together", False) else None
    if ctx.ranks:
        ctx.ranks.tell((step.name, key, {n: a.key for n, a in inputs.items()}))
    started = time.perf_counter()
    with resource_errors(out):
        meta: dict[str, Any] = stage.run(step.settings, inputs, out, ctx)
    ctx.stop.check()  # a library may have swallowed the signal's exception and gone on with something else: that is not published
    return meta | {"seconds": round(time.perf_counter() - started, 3), "step": step.name}


def decisions_of(plan: Plan, done: Done) -> dict[str, Any]:
    """Every recorded decision by step name: give it to `--replay` for byte-identical results."""
    return {s.name: read_decision(done.artifacts[s.name]) for s in plan.steps if s.gives is Kind.DECISION and s.name not in done.skipped}
