"""mix: finds by measuring which operators of a graph are worth quantizing on the judge -> the decision which nodes stay as they are.

An int8 convolution pays for the Quantize and Dequantize nodes around it only where it has many operations for each value that passes. So candidates
are ordered by that ratio, nested sets of them are built and measured against fp32, and from the best set on, stretches of the graph are switched
one by one, each kept only if the interleaved measurement is sure. Then accuracy on val: while the drop is too large, the operators at which the
rounded tensors turn away most go back to fp32.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.errors import BackendError, OnnxRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision
from edgekd.stages.compile import RunConfig
from edgekd.stages.export import FACTS, GRAPH
from edgekd.stages.quantize import calibration_batches

if TYPE_CHECKING:
    from edgekd.context import Context

_NESTED = (1.0, 0.75, 0.55, 0.4, 0.3, 0.2, 0.12, 0.06)  # shares of the candidates, densest in operations first
_STRETCHES = 10  # pieces of the graph that are switched as one
_BUDGET_SECONDS = 1.0  # of measuring a pair
_SAMPLES = 256  # val images that accuracy is judged on
_BACK = 0.1  # share of the quantized nodes that go back to fp32 at once


@register("stage")
class Mix:
    class Config(RunConfig):
        evaluations: int = Field(24, ge=1, le=200, description="graphs that are built and measured")
        accuracy_drop_max: float = Field(0.01, ge=0, le=1, description="largest drop on val against the graph as it came")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "data": Kind.DATA}
    gives = Kind.DECISION
    version = 1
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        config = settings.typed(self.Config)
        with tempfile.TemporaryDirectory() as folder:
            found = _Search(settings, config, inputs, Path(folder), ctx).run()
        write_decision(out, found)
        return {"trials": len(found["trials"]), "quantized": found["quantized"], "reason": found["reason"]}


class _Search:
    """Builds and measures graphs that differ in which nodes are quantized."""

    unknown = ""

    def __init__(self, settings: Settings, config: Any, inputs: Mapping[str, Artifact], folder: Path, ctx: Context):
        from edgekd.profile.device import load_device
        from edgekd.stages._common import drawn, open_dataset, task_of

        self.config, self.folder, self.ctx = config, folder, ctx
        self.device, self.backend = load_device(config.device), registry.load("backend", config.backend)()
        self.facts, self.dataset, self.task = inputs["graph"].json(FACTS), open_dataset(inputs["data"], ctx), task_of(settings)
        self.positions = drawn(self.dataset, "val", _SAMPLES)
        self.flavour = str(settings.facts["flavour"])
        self.method = registry.load("quantize", str(settings.method))
        self.method_config: Any = settings.method_config
        self.graph = folder / "base.onnx"
        self.method.prepare(inputs["graph"].path / GRAPH, self.graph)
        try:
            self.order = self.method.candidates(self.graph)  # densest first
        except OnnxRefused as problem:  # a shape that stays unknown: nothing can be ordered or fed
            self.order, self.unknown = [], problem.what
        self.trials: list[dict[str, Any]] = []
        self.base = self._open(inputs["graph"].path / GRAPH)  # as it would ship: preparing alone can make it slower on other runtimes

    def run(self) -> dict[str, Any]:
        """The decision: nodes that stay, what was tried, and the measured ratio of the best graph to fp32."""
        names = [name for name, _ in self.order]
        if not names:
            return self._everything(self.unknown or "the graph has no operators with weights")
        with self.ctx.console.bar("search", self.config.evaluations) as bar:
            self.bar = bar
            best = self._nested(names)
            if all(t["ratio"] is None for t in self.trials):
                return self._everything("no graph could be built or measured in the time of a trial")
            if best:
                best = self._switched(best)
                best = self._accurate(best)
        found = {"keep": sorted(set(names) - best), "quantized": len(best), "candidates": len(names), "trials": self.trials}
        if not best:
            why = f"no set of the {len(names)} operators is certainly faster in int8, or none keeps the accuracy"
            return found | {"reason": why, "chosen": "before", "verdict": "rolled back", "why": why}
        ratio = next((t["ratio"] for t in reversed(self.trials) if t["quantized"] == sorted(best) and t["ratio"] is not None), None)
        told = f": {ratio:.2f}x the latency of fp32" if ratio is not None else ""
        return found | {"reason": f"{len(best)} of {len(names)} operators in int8{told}", "chosen": "after"}

    def _everything(self, why: str) -> dict[str, Any]:
        """The decision where nothing could be searched: as without a search."""
        self.ctx.console.warn(f"no search for operators, everything is quantized: {why}")
        facts = {"keep": [], "quantized": len(self.order), "candidates": len(self.order), "trials": self.trials}
        return facts | {"reason": f"everything is quantized: {why}", "chosen": "after"}

    def _nested(self, names: Sequence[str]) -> set[str]:
        """The fastest of the nested sets; empty where none is faster than fp32."""
        sizes = sorted({max(1, round(share * len(names))) for share in _NESTED}, reverse=True) if names else []
        found = []
        for size in sizes[: self._left()]:
            chosen = set(names[:size])
            found.append((self._against(chosen, None), -size, chosen))
        faster = [f for f in found if f[0] < 1]
        return min(faster, key=lambda f: f[:2])[2] if faster else set()

    def _switched(self, best: set[str]) -> set[str]:
        """Stretches of the graph in or out, while that is certainly faster."""
        stretches = list(_pieces(self.method.in_order(self.graph, [n for n, _ in self.order]), _STRETCHES))
        improved = True
        while improved and self._left():
            improved = False
            for stretch in stretches:
                if not self._left():
                    break
                inside = best & set(stretch)
                for changed in (best - inside, best | set(stretch)):
                    if changed and changed != best and self._left() and self._against(changed, best) < 1:
                        best, improved = changed, True
        return best

    def _accurate(self, best: set[str]) -> set[str]:
        """Fewer and fewer nodes until the drop on val lies inside the limit, or none is left."""
        reference = self._scores(self.graph)
        while best:
            drop = float((reference - self._scores(self._built(best))).mean())
            self.trials.append({"quantized": sorted(best), "drop": drop, "ratio": self._ratio_of(best)})
            if drop <= self.config.accuracy_drop_max:
                break
            self.ctx.console.say(f"  {len(best)} operators in int8 lose {100 * drop:.2f} points: the worst go back")
            best = best - self._worst(best)
        return best

    # ------------------------------------------------------------------------------------------------ measuring
    def _left(self) -> int:
        return max(0, int(self.config.evaluations) - sum("against" in t for t in self.trials))

    def _against(self, chosen: set[str], other: set[str] | None) -> float:
        """Upper end of the interval of latency ratios: `chosen` to `other`, or to fp32; below 1 it is certainly faster."""
        self.ctx.stop.check()
        found: dict[str, Any] = {"ratio": None}
        try:
            found = self._compared(chosen, self.base if other is None else self._open(self._built(other)))
        except BackendError as problem:  # one set that a runtime refuses is no reason to end the search
            self.ctx.console.say(f"  {len(chosen)} operators: {problem}")
        ratio, high = (float("inf"), float("inf")) if found["ratio"] is None else (found["ratio"], found["ci95"][1])
        against = "fp32" if other is None else f"{len(other)} operators"
        self.trials.append({"quantized": sorted(chosen), "against": against, "ratio": ratio if ratio < float("inf") else None})
        self.bar.update(self.config.evaluations - self._left(), int8=str(len(chosen)), ratio=f"{ratio:.3f}")
        return float(high)

    def _ratio_of(self, chosen: set[str]) -> float | None:
        found: float | None = self._compared(chosen, self.base)["ratio"]
        return found

    def _compared(self, chosen: set[str], old: Any) -> dict[str, Any]:
        """Ratio of latencies with its interval: the graph with `chosen` quantized to an opened one."""
        from edgekd.profile import measure as m

        sessions = {"new": self._open(self._built(chosen)), "old": old}
        samples = m.measure(sessions, dict.fromkeys(sessions, self._feeds()), budget_s=_BUDGET_SECONDS)
        return m.ratio(samples["new"], samples["old"])

    def _built(self, chosen: set[str]) -> Path:
        """The graph with exactly these candidates quantized."""
        import hashlib

        name = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.onnx"
        if not path.is_file():
            keep = tuple(n for n, _ in self.order if n not in chosen)
            quantizer = self.method(self.method_config.model_copy(update={"keep_nodes": (*self.method_config.keep_nodes, *keep)}))
            samples = calibration_batches(self.dataset, self.facts, self.method_config.samples, self.ctx.seed)
            quantizer.quantize(self.graph, path, samples, self.flavour, ranges=self.folder / "ranges.json")
        return path

    def _open(self, graph: Path) -> Any:
        engine = self.folder / f"{graph.stem}.engine"
        engine.mkdir(exist_ok=True)
        meta = self.backend.convert(graph, self.device, engine, self.config.options, batch=self.config.batch)
        session = self.backend.open(engine / meta["model_file"], threads=self.config.threads, device=self.device)
        shutil.rmtree(engine)  # it is loaded; two dozen copies of a large model would fill a disk
        return session

    def _feeds(self) -> dict[str, Any]:
        import numpy as np

        side, batch = self.facts["image_size"], self.facts["fixed_batch"] or self.config.batch
        return {self.facts["input"]: np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)}

    # ------------------------------------------------------------------------------------------------ accuracy
    def _scores(self, graph: Path) -> Any:
        from edgekd.stages.evaluate import run_engine

        facts = self.facts | {"max_batch": 1 if self.backend.builds else None}  # an engine of the search is built for its own batch
        outputs = run_engine(self._open(graph), facts, self.dataset, self.positions, self.ctx, "val")
        return self.task.scores(outputs, self.dataset.labels[self.positions])

    def _worst(self, best: set[str]) -> set[str]:
        """The quantized nodes at which the tensors turn away most."""
        import onnx

        from edgekd.data.normalise import normalised
        from edgekd.export.bisect import compare_tensors, steepest

        size = self.facts["fixed_batch"] or 8
        feeds = {self.facts["input"]: normalised(self.dataset.images(self.positions[:size]), self.facts)}
        before, after = (onnx.load_model_from_string(f.read_bytes()) for f in (self.graph, self._built(best)))
        tensors = [t for t in compare_tensors(before, after, feeds, feeds) if t.node in best]
        worst = {t.node for t in steepest(tensors, max(1, round(_BACK * len(best))))}
        return worst or set(sorted(best)[: max(1, round(_BACK * len(best)))])


def _pieces(names: Sequence[str], count: int) -> Iterator[list[str]]:
    size = max(1, -(-len(names) // count))
    for start in range(0, len(names), size):
        yield list(names[start : start + size])
