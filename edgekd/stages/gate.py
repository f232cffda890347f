"""gate: a segment's start and end, measured as deployed -> the verdict which of them goes on. Reads val only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.budget import Budget
from edgekd.gate import Evidence, Verdict, judge, overruled, wants_of
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision, write_decision
from edgekd.stages.compile import RunConfig, engine_bytes, engine_file, open_engine
from edgekd.stages.evaluate import drop_of, metric_of

if TYPE_CHECKING:
    from edgekd.context import Context

_BUDGET_SECONDS = 4.0


@register("stage")
class Gate:
    class Config(RunConfig):
        enabled: bool = Field(True, description="False keeps everything and says so")
        timed: bool = Field(True, description="False: the target is not here, so latency is not judged")
        accuracy_drop_max: float = Field(0.01, ge=0, le=1, description="largest drop of the metric against the reference, absolute")
        budget: Budget = Field(default_factory=Budget, description="what the target must stay below; it says what a gain is")

    takes: Mapping[str, Kind] = {
        "before": Kind.ENGINE,
        "after": Kind.ENGINE,
        "before_metrics": Kind.METRICS,
        "after_metrics": Kind.METRICS,
        "reference_metrics": Kind.METRICS,
        "note?": Kind.DECISION,
    }
    gives = Kind.DECISION
    version = 3
    libraries = ("onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        config = settings.typed(self.Config)
        note = read_decision(inputs["note"]) if "note" in inputs else {}
        evidence = gather(settings, config, inputs)
        verdict = judge(evidence)
        if note.get("chosen") == "before":
            verdict = Verdict(note["verdict"], note["why"])
        if not config.enabled:
            verdict = overruled(verdict)
        reason = verdict.reason
        if note and not note.get("met", True) and verdict.verdict == "kept":
            reason += f"; the {note['goal']} target of {note['target']:g} was not met: {note['reason']}"
        body = {
            "verdict": verdict.verdict,
            "reason": reason,
            "chosen": verdict.chosen,
            "evidence": asdict(evidence) | {"wants": sorted(evidence.wants), "unmet": sorted(evidence.unmet)},
        }
        write_decision(out, body)
        return {"verdict": verdict.verdict, "reason": reason}


def gather(settings: Settings, config: Any, inputs: Mapping[str, Artifact]) -> Evidence:
    """Interleaved latencies, sizes, and paired val scores of both sides."""
    from edgekd.profile.causes import slow_causes
    from edgekd.profile.device import load_device
    from edgekd.stages._common import measured_by, task_of

    before, after, task = inputs["before"], inputs["after"], task_of(settings)
    drop, drop_ci = drop_of(task, inputs["before_metrics"], inputs["after_metrics"])
    left = config.accuracy_drop_max - (metric_of(inputs["reference_metrics"])[1] - metric_of(inputs["before_metrics"])[1])
    same, ratio, interval, p50 = before.digest == after.digest, None, None, None
    if config.timed and not same:
        ratio, interval, p50 = _timed(config, before, after)
    untimed = "" if config.timed else "the target is not at hand; accuracy and size were judged here"
    quantum = load_device(config.device).channel_multiple("fp32")
    causes = tuple(slow_causes(engine_file(before), engine_file(after), quantum)) if interval is None or interval[1] >= 1 else ()
    sizes = engine_bytes(before), engine_bytes(after)
    wants, unmet = wants_of(config.budget.model_dump()), _unmet(config.budget, p50, sizes[0])
    return Evidence(*sizes, ratio, interval, drop, drop_ci, left, wants, unmet, untimed, causes, same, measured_by(task))


def _unmet(budget: Budget, p50: dict[str, Any] | None, size: int) -> frozenset[str]:
    """What of the budget the start of the segment misses."""
    missed = {"size"} if budget.size_mb is not None and size > budget.size_mb * 1e6 else set()
    latency = Budget(p50_ms=budget.p50_ms, p95_ms=budget.p95_ms)
    return frozenset(missed | ({"latency"} if p50 and latency.missed(p50, 0)[0] else set()))


def _timed(config: Any, before: Artifact, after: Artifact) -> tuple[float | None, tuple[float, float] | None, dict[str, Any] | None]:
    """Ratio of the latencies, its interval, and the latency before."""
    from edgekd.profile import measure as m
    from edgekd.stages.profile import random_input

    opened = {name: open_engine(engine, threads=config.threads) for name, engine in (("before", before), ("after", after))}
    feeds = {name: {facts["input"]: random_input(facts, config.batch)} for name, (_, facts) in opened.items()}
    samples = m.measure({n: s for n, (s, _) in opened.items()}, feeds, budget_s=_BUDGET_SECONDS)
    found = m.ratio(samples["after"], samples["before"])
    if found["ratio"] is None:
        return None, None, None
    return found["ratio"], (found["ci95"][0], found["ci95"][1]), samples["before"].summary()
