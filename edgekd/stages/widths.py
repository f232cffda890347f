"""widths: cuts and measures candidates until the prune target is met -> the decision how wide every layer becomes.

A measured speed-up compares exported files on the gate's target, interleaved, base against candidate. A candidate that does not run, or that is
slower where latency counts, ends the segment here, before any time is spent on recovering it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.stages.compile import RunConfig
from edgekd.stages.prune import Prune, example_of, score

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec

_SLACK = 0.05  # a speed-up up to 5 % beyond the goal is close enough: each candidate costs an export
_BUDGET_SECONDS = 2.0


@register("stage")
class Widths:
    class Config(RunConfig):
        gate: bool = Field(True, description="False goes on with a model that became slower")
        quantum: int = Field(1, ge=1, description="kept widths are multiples of it: what the first target prefers, wherever it is judged")

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA}
    gives = Kind.DECISION
    version = 1
    libraries = ("torch", "timm", "torch-pruning", "onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "criterion"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.models.build import load_model
        from edgekd.stages._common import open_samples

        config, judge = settings.typed(Prune.Config), self.Config(**settings.facts["judge"])
        model, spec = load_model(inputs["model"])
        scores = score(model, spec, open_samples(inputs["data"], ctx), settings, config)
        with tempfile.TemporaryDirectory() as folder:
            found = _Candidates(model, spec, scores, config, judge, Path(folder), ctx).search()
        write_decision(out, found | _judged(found, judge.gate))
        return {"trials": len(found["trials"]), "reason": found["reason"]}


def _judged(found: Mapping[str, Any], gate: bool) -> dict[str, Any]:
    """Whether the segment goes on; latency alone is judged here."""
    if found["error"]:
        return {"chosen": "before", "verdict": "rolled back", "why": f"the pruned model cannot be judged: {found['error']}"}
    if gate and found["ci95"] and found["ci95"][1] < 1 and found["goal"] in ("speedup", "latency_ms"):
        why = f"pruned, it is slower: {1 / found['speedup']:.2f}x the latency; widths were kept to multiples of {found['quantum']}"
        return {"chosen": "before", "verdict": "rolled back", "why": why}
    return {"chosen": "after"}


class _Candidates:
    """Cuts copies of one model, exports and measures them against it."""

    def __init__(
        self, model: nn.Module, spec: ModelSpec, scores: Mapping[str, Tensor], config: Any, judge: Any, folder: Path, ctx: Context
    ):
        from edgekd.profile.device import load_device

        self.model, self.spec, self.scores, self.config, self.judge, self.folder, self.ctx = model, spec, scores, config, judge, folder, ctx
        self.device = load_device(judge.device)
        self.backend = registry.load("backend", judge.backend)()
        self.quantum = config.quantum if isinstance(config.quantum, int) else judge.quantum
        self.goal, self.value = config.target.goal
        self.measured: dict[float, dict[str, Any]] = {}
        self.batch = judge.batch
        self.base = self._export(model, "base")

    def search(self) -> dict[str, Any]:
        """The decision: ratio, widths, trials, and the measured speed-up of what was chosen."""
        from edgekd.errors import BackendError, StructureRefused
        from edgekd.prune._target import Limits, find_ratio

        goal, target = self._relative_goal()
        limits = Limits(evaluations=self.config.evaluations, slack=_SLACK if goal == "speedup" else 0.01)
        error = ""
        try:
            found = find_ratio(self._evaluate if goal == "speedup" else lambda r: self._kept(r, goal), goal, target, limits=limits)  # type: ignore[arg-type]
            ratio, met, reason, trials = found.ratio, found.met, found.reason, [list(t) for t in found.trials]
            speed = self.measured.get(ratio) or (self._measure(ratio) if ratio else {"ratio": 1.0, "ci95": [1.0, 1.0]})
        except (StructureRefused, BackendError) as problem:  # a fact about the model; a full disk or a busy machine is none
            ratio, met, reason, trials, error, speed = 0.0, False, str(problem), [], str(problem), {"ratio": None, "ci95": None}
        _, report = self._cut(ratio) if ratio else (None, None)
        widths = {name: after for name, (before, after) in report.widths.items() if after != before} if report else {}
        facts = (
            {"macs": list(report.macs), "params": list(report.params), "scope": report.scope}
            if report
            else {"macs": [], "params": [], "scope": "auto"}
        )
        return facts | {
            "goal": self.goal,
            "target": self.value,
            "ratio": ratio,
            "met": met,
            "reason": reason,
            "trials": trials,
            "widths": widths,
            "quantum": self.quantum,
            "speedup": speed["ratio"],
            "ci95": speed["ci95"],
            "error": error,
        }

    def _relative_goal(self) -> tuple[str, float]:
        """Absolute goals as ratios against the base."""
        if self.goal == "latency_ms":
            return "speedup", max(self._base_ms() / self.value, 1.0)
        if self.goal == "size_mb":
            return "params", min(self.value * 1e6 / self.base.stat().st_size, 1.0)
        return self.goal, self.value

    def _base_ms(self) -> float:
        from edgekd.profile.measure import measure

        session = self._open(self.base)
        feeds = self._feeds()
        p50 = measure({"base": session}, {"base": feeds}, budget_s=_BUDGET_SECONDS)["base"].summary()["p50"]
        return float(_known(p50))

    def _kept(self, ratio: float, goal: str) -> float:
        _, report = self._cut(ratio)
        before, after = report.macs if goal == "macs" else report.params
        return float(after / before)

    def _evaluate(self, ratio: float) -> float:
        self.measured[ratio] = self._measure(ratio)
        _known(self.measured[ratio]["ratio"])
        found, low = self.measured[ratio]["ratio"], self.measured[ratio]["ci95"][0]
        self.ctx.console.say(f"  pruning {ratio:.0%} of every width: {found:.2f}x measured, at least {low:.2f}x")
        return float(low)  # the end of the interval: one lucky measurement must not end the search

    def _measure(self, ratio: float) -> dict[str, Any]:
        """Speed-up of a candidate over the base with its interval, both exported, interleaved."""
        from edgekd.profile import measure as m

        candidate, _ = self._cut(ratio)
        sessions = {"base": self._open(self.base), "candidate": self._open(self._export(candidate, f"{ratio:.4f}"))}
        samples = m.measure(sessions, dict.fromkeys(sessions, self._feeds()), budget_s=_BUDGET_SECONDS)
        found: dict[str, Any] = m.ratio(samples["base"], samples["candidate"])
        return found

    def _cut(self, ratio: float) -> tuple[nn.Module, Any]:
        from edgekd.prune._cut import prune_model

        candidate = copy.deepcopy(self.model)
        return candidate, prune_model(
            candidate, example_of(self.spec), self.scores, keep=1 - ratio, quantum=self.quantum, scope=self.config.scope
        )

    def _export(self, model: nn.Module, name: str) -> Path:
        from edgekd.export.onnx import export_onnx

        path = self.folder / f"{name}.onnx"
        if not export_onnx(model, self.spec.shape, path)["dynamic_batch"]:
            self.batch = 1
        return path

    def _open(self, graph: Path) -> Any:
        engine = self.folder / f"{graph.stem}.engine"
        engine.mkdir(exist_ok=True)
        meta = self.backend.convert(graph, self.device, engine, self.judge.options, batch=self.batch)
        return self.backend.open(engine / meta["model_file"], threads=self.judge.threads, device=self.device, options=meta.get("options"))

    def _feeds(self) -> dict[str, Any]:
        import numpy as np

        from edgekd.export.onnx import input_of

        shape = self.spec.shape
        return {input_of(shape): np.random.default_rng(0).standard_normal((self.batch, *shape), dtype=np.float32)}


def _known(value: float | None) -> float:
    """A measured value; raises DeviceError where the runtime was too slow to give one: perhaps only now, so nothing is decided."""
    from edgekd.errors import DeviceError

    if value is None:
        raise DeviceError("the model is too slow to be measured", hint="prune to a fraction of operations instead: target: {macs: 0.5}")
    return value
