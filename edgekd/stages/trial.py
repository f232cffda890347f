"""trial: a graph is quantized on trial -> the decision how its ranges are calibrated, and which nodes stay in higher precision.

Ranges come from minmax where that loses nothing on val; else from whichever of minmax, entropy and percentile keeps most accuracy, and of equals stays
closest to fp32. Then, while the outputs lie outside the rung's limits, the nodes where they turn away most are taken back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.quantize._static import AUTO, CALIBRATIONS
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision, write_decision
from edgekd.stages.export import FACTS, GRAPH
from edgekd.stages.quantize import calibration_batches

if TYPE_CHECKING:
    from edgekd.context import Context

_PROBES = 8  # images whose intermediate tensors are compared
_HALF = 65504 / 2  # the largest fp16 value, with room for images that were not looked at


@register("stage")
class Trial:
    class Config(Base):
        samples: int = Field(256, ge=1, description="val images that outputs are compared on")
        repair: bool = Field(True, description="take nodes back where the outputs lie outside the limits")
        rounds: int = Field(4, ge=1, le=20, description="how often nodes are taken back")
        share: float = Field(0.05, gt=0, le=1, description="of the graph's nodes that are taken back at once")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "data": Kind.DATA, "mix?": Kind.DECISION}
    gives = Kind.DECISION
    version = 4
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = _Trial(settings, settings.typed(self.Config), inputs, Path(folder), ctx).run()
        if found["keep"]:
            ctx.console.warn(found["reason"])
        write_decision(out, found)
        return {"kept": len(found["keep"]), "calibration": found["calibration"], "reason": found["reason"]}


class _Trial:
    """Quantizes with other settings and looks at what comes out."""

    def __init__(self, settings: Settings, config: Any, inputs: Mapping[str, Artifact], folder: Path, ctx: Context):
        from edgekd.safeio.onnxfile import check_onnx
        from edgekd.stages._common import drawn, method_of, open_samples, task_of
        from edgekd.stages.parity import outputs_of

        self.settings, self.config, self.ctx, self.file = settings, config, ctx, folder / GRAPH
        self.quantizer, self.task, self.facts = method_of(settings, "quantize"), task_of(settings), inputs["graph"].json(FACTS)
        self.graph, self.dataset = inputs["graph"].path / GRAPH, open_samples(inputs["data"], ctx)
        self.positions = drawn(self.dataset, "val", config.samples)
        self.labels = self.dataset.labels[self.positions]
        self.wanted = outputs_of(self.graph, self.facts, self.dataset, self.positions, ctx)
        self.given = (*self.quantizer.config.keep_nodes, *(read_decision(inputs["mix"])["keep"] if "mix" in inputs else ()))
        self.reference = check_onnx(self.graph, trusted=True)
        self.calibration: str | None = getattr(self.quantizer.config, "calibration", None)
        self.large = self._overflowing() if config.repair else set[str]()

    def run(self) -> dict[str, Any]:
        """The decision with every trial, and the node that broke first."""
        tried = self._calibrated() if self.calibration == AUTO else []
        known = next((t["row"] for t in tried if t["calibration"] == self.calibration), None)
        keep, rounds, broken = self._repaired(known) if self.config.repair else (set[str](), [], "")
        body = {
            "calibration": self.calibration,
            "calibrations": [{n: v for n, v in t.items() if n != "row"} for t in tried],
            "rounds": rounds,
            "chosen": "after",
        }
        place = f", first at {broken}" if broken else ""
        if rounds and not rounds[-1]["ok"]:
            name = self.settings.name.removesuffix(".trial")
            words = f"{name}: the outputs lie outside the limits{place}, and keeping nodes in higher precision did not help"
            return body | {"keep": [], "reason": words}
        said = [f"ranges calibrated by {self.calibration}: {self._why(tried)}"] if len(tried) > 1 else []
        if self.large:
            said.append(f"{len(self.large)} nodes stay in fp32: they make or read values over {_HALF:.0f}, half of what fp16 can hold")
        if more := keep - self.large:
            said.append(f"{len(more)} nodes stay in higher precision: with all of them quantized the outputs lie outside the limits{place}")
        return body | {"keep": sorted(keep), "reason": "; ".join(said)}

    # ------------------------------------------------------------------------------------------------ calibration
    def _calibrated(self) -> list[dict[str, Any]]:
        """Tries the ways to find ranges, and settles on the best; only the first where that loses nothing."""
        fp32 = float(self.task.scores(self.wanted, self.labels).mean())
        tried: list[dict[str, Any]] = []
        for name in CALIBRATIONS:
            self.ctx.stop.check()
            self.calibration = name
            row = self._compared(set())
            tried.append({"calibration": name, "metric": fp32 + row["metric_delta"], "mean_abs": row["mean_abs"], "fp32": fp32, "row": row})
            if name == CALIBRATIONS[0] and row["metric_delta"] >= 0 and row["ok"]:
                break
        self.calibration = str(max(tried, key=lambda t: (t["metric"], -t["mean_abs"]))["calibration"])
        return tried

    def _why(self, tried: list[dict[str, Any]]) -> str:
        return ", ".join(f"{t['calibration']} {100 * t['metric']:.2f} %" for t in tried) + f" on val, fp32 {100 * tried[0]['fp32']:.2f} %"

    # ------------------------------------------------------------------------------------------------ nodes
    def _repaired(self, known: dict[str, Any] | None) -> tuple[set[str], list[dict[str, Any]], str]:
        """Nodes to take back, the rounds, and the node that broke first; `known` is what was seen already with nothing taken back."""
        from edgekd.export.bisect import compare_tensors, first_break, steepest, tensor_limits, with_makers
        from edgekd.safeio.onnxfile import check_onnx

        keep = set(self.large)
        rounds: list[dict[str, Any]] = []
        broken = ""
        while True:
            row = known if not rounds and known and known["ok"] else self._compared(keep)
            rounds.append(
                {"keep": sorted(keep)}
                | {n: row[n] for n in ("cosine", "covariation", "agreement", "clear_agreement", "max_relative", "ok")}
            )
            if row["ok"] or len(rounds) > self.config.rounds:
                return keep, rounds, broken
            rounded, feeds = check_onnx(self.file, trusted=True), self._feeds()
            found = compare_tensors(self.reference, rounded, feeds, feeds)
            tensors = [t for t in found if t.node not in (*self.given, *keep)]
            first = first_break(tensors, **tensor_limits(row["precision"]))
            broken = broken or (first.said() if first else "")
            worst = {t.node for t in steepest(tensors, max(1, round(self.config.share * len(self.reference.graph.node))))}
            known_names = {n.name for n in rounded.graph.node}  # preparing may have folded a node of the reference into another
            more = (with_makers(self.reference, worst) & known_names) - {*self.given, *keep}
            if not more:
                return keep, rounds, broken
            keep |= more

    def _overflowing(self) -> set[str]:
        """Nodes that fp16 has no values for. A CPU computes fp16 graphs in fp32, and may drop casts that follow each other: parity would not show them."""
        from edgekd.export.bisect import beyond

        return beyond(self.reference, self._feeds(), _HALF) - set(self.given) if type(self.quantizer).precision == "fp16" else set()

    def _feeds(self) -> dict[str, Any]:
        from edgekd.data.normalise import normalised

        size = self.facts["fixed_batch"] or _PROBES
        return {self.facts["input"]: normalised(self.dataset.samples(self.positions[:size]), self.facts)}

    def _compared(self, keep: set[str]) -> dict[str, Any]:
        """The parity row of the graph quantized with `keep` left out."""
        from edgekd.export.parity import compare
        from edgekd.stages.parity import outputs_of

        changes: dict[str, Any] = {"keep_nodes": (*self.given, *sorted(keep))}
        if self.calibration is not None:
            changes["calibration"] = self.calibration
        quantizer = type(self.quantizer)(self.quantizer.config.model_copy(update=changes))
        samples = calibration_batches(self.dataset, self.facts, getattr(quantizer.config, "samples", 0), self.ctx.seed)
        done = quantizer.quantize(self.graph, self.file, samples, str(self.settings.facts["flavour"]))
        precision = str(done.get("precision", quantizer.precision))
        found = outputs_of(self.file, self.facts, self.dataset, self.positions, self.ctx)
        return compare("trial", precision, self.wanted, found, self.labels, self.task) | {"precision": precision}
