"""sweep: one recipe's models trained with every combination of some values and seeds, and compared. No compression, no bundle.

What was trained before comes from the store, so a sweep that was interrupted, or that gets another value, runs only what is new. A combination that fails is a
row with its reason. Val is what a choice is made on; test is read only where it is asked for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, UsageError
from edgekd.plan import LEARNS, Plan, Ref, Step, build_plan
from edgekd.safeio.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekd.context import Context
    from edgekd.recipe import Loaded
    from edgekd.run import Done

TABLE = "sweep.csv"
ALONE = "student alone"


@dataclass(frozen=True)
class Cell:
    """One combination: the recipe's changes, in the words of `-o`, and a seed."""

    changes: tuple[str, ...]
    seed: int

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.changes, f"seed={self.seed}")

    @property
    def variant(self) -> str:
        return ", ".join(c.partition("=")[2] for c in self.changes) or "as written"


def cells(vary: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All combinations, seed by seed. Raises UsageError for a text that is not NAME.FIELD=VALUE,VALUE."""
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        found = list(_values(values))
        if not equals or not name or not found:
            raise UsageError(
                f"'{text}' varies nothing", where="--vary", expected="NAME.FIELD=VALUE,VALUE", hint="--vary distill.method=kd,ofa"
            )
        axes.append([f"{name}={v}" for v in found])
    return [Cell(changes, seed) for seed in seeds for changes in product(*axes)]


def _values(text: str) -> Iterator[str]:
    """The parts between commas; those inside brackets belong to one value, as in `[kd, {nd: {weight: 2}}]`."""
    depth, start = 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            if part := text[start:i].strip():
                yield part
            start = i + 1


def measured_part(plan: Plan, names: Sequence[str], *, test: bool) -> Plan:
    """The steps that train and measure the named models on val and, if asked, on test; nothing else."""
    steps = {s.name: s for s in plan.steps}
    for name in ("teacher", *names) if test else ():
        val = steps.get(plan.metrics.get(name, ""))
        if val is not None:
            config = val.settings.config.model_copy(update={"split": "test", "above_chance": False})
            inputs = {n: f"{r.removesuffix('.val')}.test" if n == "teacher?" and isinstance(r, str) else r for n, r in val.inputs.items()}
            own = f"{name}.test"
            steps.pop(own, None)  # where the plan has it, for it may stand before the teacher's
            steps[own] = Step(own, val.stage, replace(val.settings, name=own, config=config), inputs)
    wanted = {n for name in names for n in (plan.metrics[name], *([f"{name}.test"] if test else []))}
    waiting = list(wanted)
    while waiting:
        step = steps[waiting.pop()]
        refs: list[Ref] = [*step.inputs.values(), *([step.unless[0], step.unless[1]] if step.unless else [])]
        new = {n for ref in refs for n in _named(ref)} - wanted
        wanted |= new
        waiting += new
    order = {name: i for i, name in enumerate(steps)}
    return replace(plan, steps=[steps[n] for n in sorted(wanted, key=order.__getitem__)])


def _named(ref: Ref) -> list[str]:
    return [ref] if isinstance(ref, str) else [ref.decision, *(n for option in ref.options.values() for n in _named(option))]


def models_of(plan: Plan, until: str | None) -> list[str]:
    """The model that is compared, `until` or the first that learns, and the student alone where the recipe has that baseline."""
    learns = [s.name for s in plan.steps if s.stage in LEARNS and s.name in plan.metrics and s.name not in ("teacher", ALONE)]
    if not learns or (until is not None and until not in plan.metrics):
        raise UsageError(
            f"'{until}' is not measured in this recipe" if until else "nothing in this recipe learns",
            where="--until",
            expected=f"one of {', '.join(learns)}" if learns else "a recipe with a stage that trains",
            hint="edgekd plan RECIPE lists the steps",
        )
    return [until or learns[0], *([ALONE] if ALONE in plan.baselines else [])]


def rows_of(cell: Cell, plan: Plan, done: Done, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a model: what was varied, the seed, metrics by split, seconds of its training and the key of its weights."""
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": ALONE if name == ALONE else cell.variant, "seed": cell.seed}
        row |= {} if name == ALONE else dict(c.split("=", 1) for c in cell.changes)
        for split, step in (("val", plan.metrics[name]), ("test", f"{name}.test")):
            if step in done.artifacts:
                body = done.artifacts[step].json("metrics.json")
                row["metric_name"] = body["metric_name"]
                row |= {f"{split}_{n}": v for n, v in body["metrics"].items()}
        trained = done.artifacts[name]
        rows.append(row | {"seconds": trained.meta.get("seconds"), "key": trained.key, "error": ""})
    return rows


def run_cell(cell: Cell, loaded: Loaded, ctx: Context, until: str | None, *, test: bool, gate: bool) -> list[dict[str, Any]]:
    """Trains and measures one combination."""
    from edgekd.run import execute

    plan = build_plan(loaded, gate=gate, cache_dir=ctx.store.root)
    names = models_of(plan, until)
    part = measured_part(plan, names, test=test)
    return rows_of(cell, part, execute(part, ctx), names)


def failed_row(cell: Cell, error: EdgekdError) -> dict[str, Any]:
    """What the table says of a combination that could not be trained."""
    return {"variant": cell.variant, "seed": cell.seed, "error": f"{error.what}{f' ({error.where})' if error.where else ''}"}


def distinct(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in order, the same model once: the student alone belongs to a seed and not to what is varied."""
    return list({(r["variant"], r["seed"]): dict(r) for r in rows}.values())


def write_table(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """All rows so far as CSV, replaced at once: there is a whole file at any time."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / TABLE, text.getvalue().encode())
    return folder / TABLE


def compare(rows: Sequence[Mapping[str, Any]], against: str | None = None) -> list[dict[str, Any]]:
    """One row a variant: mean and standard error over its seeds, and the difference to `against` paired by seed with its 95 % interval.

    `against` is the student alone where there is one, else the first variant. On test where all rows have it, else on val.
    Raises UsageError where `against` names no variant.
    """
    good = [r for r in rows if not r["error"]]
    if not good:
        return []
    variants = sorted(dict.fromkeys(r["variant"] for r in good), key=lambda v: v != ALONE)  # the baseline first, the others as given
    against = against or (ALONE if ALONE in variants else variants[0])
    if against not in variants:
        raise UsageError(f"there is no variant '{against}'", where="--against", expected=f"one of {', '.join(variants)}")
    name = good[0]["metric_name"]
    split = "test" if all(f"test_{name}" in r for r in good) else "val"
    value = {(r["variant"], r["seed"]): float(r[f"{split}_{name}"]) for r in good}
    found = []
    for variant in variants:
        mine = [r for r in good if r["variant"] == variant]
        middle, error = mean_and_error([value[variant, r["seed"]] for r in mine])
        row = {"variant": variant, "seeds": len(mine), "metric": f"{split} {name}", "mean": middle, "standard_error": error}
        if variant != against:
            pairs = [value[variant, r["seed"]] - value[against, r["seed"]] for r in mine if (against, r["seed"]) in value]
            gain, spread = mean_and_error(pairs)
            row |= {"against": against, "difference": gain, "ci95": _interval(gain, spread, len(pairs))}
        for extra in (f"{split}_ece", f"{split}_agreement", "seconds"):
            values = [float(r[extra]) for r in mine if r.get(extra) is not None]
            row |= {extra.removeprefix(f"{split}_"): mean_and_error(values)[0]} if values else {}
        found.append(row)
    return found


def _interval(middle: float | None, error: float | None, count: int) -> list[float] | None:
    """95 %, of Student's t distribution; None for fewer than two values."""
    from scipy.stats import t

    if middle is None or error is None:
        return None
    half = error * float(t.ppf(0.975, count - 1))
    return [middle - half, middle + half]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values for one."""
    if len(values) < 2:
        return (values[0] if values else None), None
    return mean(values), stdev(values) / len(values) ** 0.5
