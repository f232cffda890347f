"""race: every runtime of this machine with every form of a graph, measured together on val -> the decision which of them ships.

A target that names neither its runtime nor its precision gets the fastest of them inside the accuracy limit. What a runtime refuses is a row with the
reason, and cannot win.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.budget import Budget
from edgekd.errors import BackendError
from edgekd.gate import Candidate, paired_drop, pick
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.stages.compile import ENGINE, RunConfig, engine_bytes, open_engine
from edgekd.stages.evaluate import OUTPUTS, metric_of, run_engine

if TYPE_CHECKING:
    from edgekd.backends import Session
    from edgekd.context import Context

    Opened = dict[str, tuple[Session, dict[str, Any]]]

_SECONDS_PER_ENGINE = 2.0
_SAMPLES = 2000  # val images that candidates are judged on: six of them over all of a large val part would take an hour


@register("stage")
class Race:
    class Config(RunConfig):
        candidates: tuple[str, ...] = Field(description="names of the engines, the one that the others are compared with first")
        plain: tuple[str, ...] = Field((), description="those in fp32, as the chain gave them")
        enabled: bool = Field(True, description="False ships the fastest rounded one whatever it loses")
        accuracy_drop_max: float = Field(0.01, ge=0, le=1, description="largest drop of the metric against the reference, absolute")
        budget: Budget = Field(default_factory=Budget, description="what the target must stay below")

    takes: Mapping[str, Kind] = {"data": Kind.DATA, "reference_metrics": Kind.METRICS, "start_metrics": Kind.METRICS, "*": Kind.ENGINE}
    gives = Kind.DECISION
    version = 1
    libraries = ("onnxruntime-gpu", "onnxruntime", "openvino")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.stages._common import measured_by, task_of

        config = settings.typed(self.Config)
        engines = {name: inputs[f"*{name}"] for name in config.candidates}
        opened, drops, refused = _judged(settings, engines, config.threads, inputs, ctx)
        rows = _timed(opened, config)
        candidates = []
        for name in opened:
            size, row = engine_bytes(engines[name]), rows[name]
            row |= {"precision": opened[name][1]["precision"], "size_bytes": size, "drop": drops[name][0], "drop_ci": list(drops[name][1])}
            missed = sum(
                config.budget.model_copy(update=alone).missed(row["latency_ms"], size)[0] is True for alone in _limits(config.budget)
            )
            candidates.append(
                Candidate(name, size, row["ratio"], row["ci95"], *drops[name], rounded=name not in config.plain, missed=missed)
            )
        left = config.accuracy_drop_max - (metric_of(inputs["reference_metrics"])[1] - metric_of(inputs["start_metrics"])[1])
        chosen, reason = pick(candidates, left, enabled=config.enabled, measures=measured_by(task_of(settings)))
        body = {
            "chosen": chosen.name,
            "verdict": "kept" if chosen.rounded else "rolled back",
            "reason": reason if config.enabled else f"the gate is off: {reason}",
            "allowed": left,
            "rows": [
                {"name": name, "backend": engines[name].json(ENGINE)["backend"]}
                | (rows[name] | {"refused": None} if name in rows else {"refused": refused[name]})
                for name in config.candidates
            ],
        }
        write_decision(out, body)
        return {"verdict": body["verdict"], "reason": body["reason"]}


def _judged(
    settings: Settings, engines: Mapping[str, Artifact], threads: int, inputs: Mapping[str, Artifact], ctx: Context
) -> tuple[Opened, dict[str, tuple[float, tuple[float, float]]], dict[str, str]]:
    """Open engines, their loss on val with its interval, and the reasons of those that a runtime refuses; raises where the first is one of them."""
    import numpy as np

    from edgekd.stages._common import drawn, open_samples, task_of

    task, dataset = task_of(settings), open_samples(inputs["data"], ctx)
    whole, positions = dataset.split("val"), drawn(dataset, "val", _SAMPLES)
    labels, places = dataset.labels[positions], {p: i for i, p in enumerate(whole.tolist())}
    outputs = np.load(inputs["start_metrics"].path / OUTPUTS)[[places[p] for p in positions.tolist()]]
    start = task.scores(outputs, labels).tolist()
    opened: Opened = {}
    drops, refused = {}, {}
    for name, engine in engines.items():
        ctx.stop.check()
        try:
            session, facts = open_engine(engine, threads=threads)
            outputs = run_engine(session, facts, dataset, positions, ctx, name)
        except BackendError as problem:
            if not opened:
                raise
            refused[name] = problem.what
            continue
        opened[name] = session, facts
        drops[name] = paired_drop(start, task.scores(outputs, labels).tolist())
    return opened, drops, refused


def _timed(opened: Opened, config: Any) -> dict[str, dict[str, Any]]:
    """Latency of each engine, and its ratio to the first one's with the interval, all interleaved."""
    from edgekd.profile.measure import measure, ratio
    from edgekd.stages.profile import random_input

    feeds = {name: {facts["input"]: random_input(facts, config.batch)} for name, (_, facts) in opened.items()}
    samples = measure({n: s for n, (s, _) in opened.items()}, feeds, budget_s=_SECONDS_PER_ENGINE * len(opened))
    first = samples[next(iter(opened))]
    found = {}
    for name, series in samples.items():
        against = ratio(series, first)
        summary = series.summary()
        latency = {k: summary[k] for k in ("p50", "p95", "p99", "ci95", "n", "series")} if summary["p50"] is not None else None
        found[name] = {"latency_ms": latency, "ratio": against["ratio"], "ci95": against["ci95"] if against["ratio"] is not None else None}
    return found


def _limits(budget: Budget) -> list[dict[str, None]]:
    """For each limit that a budget sets, what to leave out so that only that one is judged."""
    named = [name for name, value in budget.model_dump().items() if value is not None]
    return [{other: None for other in named if other != name} for name in named]
