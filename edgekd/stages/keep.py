"""keep: a graph is quantized on trial; while its outputs lie outside the rung's limits, the nodes where it turns away most stay as they are -> decision."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision, write_decision
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    from edgekd.context import Context

_PROBES = 8  # images whose intermediate tensors are compared


@register("stage")
class Keep:
    class Config(Base):
        samples: int = Field(128, ge=1, description="val images that outputs are compared on")
        rounds: int = Field(4, ge=1, le=20, description="how often nodes are taken back")
        share: float = Field(0.05, gt=0, le=1, description="of the graph's nodes that are taken back at once")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "data": Kind.DATA, "mix?": Kind.DECISION}
    gives = Kind.DECISION
    version = 1
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        found = _repaired(settings, settings.typed(self.Config), inputs, ctx)
        if found["keep"]:
            ctx.console.warn(found["reason"])
        write_decision(out, found)
        return {"kept": len(found["keep"]), "reason": found["reason"]}


def _repaired(settings: Settings, config: Any, inputs: Mapping[str, Artifact], ctx: Context) -> dict[str, Any]:
    """The decision: nodes to keep, none where nothing broke or nothing helped, with every trial and the node that broke first."""
    from edgekd.data.normalise import normalised
    from edgekd.export.bisect import compare_tensors, first_break, steepest, tensor_limits, with_makers
    from edgekd.export.parity import compare
    from edgekd.safeio.onnxfile import check_onnx
    from edgekd.stages._common import drawn, method_of, open_dataset, task_of
    from edgekd.stages.parity import outputs_of
    from edgekd.stages.quantize import calibration_batches

    quantizer, task, facts = method_of(settings, "quantize"), task_of(settings), inputs["graph"].json(FACTS)
    graph, dataset = inputs["graph"].path / GRAPH, open_dataset(inputs["data"], ctx)
    positions = drawn(dataset, "val", config.samples)
    wanted, labels = outputs_of(graph, facts, dataset, positions, ctx), dataset.labels[positions]
    given = (*quantizer.config.keep_nodes, *(read_decision(inputs["mix"])["keep"] if "mix" in inputs else ()))
    reference, keep = check_onnx(graph, trusted=True), set[str]()
    rounds: list[dict[str, Any]] = []
    broken = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / GRAPH
        while True:
            trial = type(quantizer)(quantizer.config.model_copy(update={"keep_nodes": (*given, *sorted(keep))}))
            samples = calibration_batches(dataset, facts, getattr(quantizer.config, "samples", 0), ctx.seed)
            done = trial.quantize(graph, file, samples, str(settings.facts["flavour"]))
            precision = str(done.get("precision", quantizer.precision))
            row = compare("trial", precision, wanted, outputs_of(file, facts, dataset, positions, ctx), labels, task)
            rounds.append({"keep": sorted(keep)} | {n: row[n] for n in ("cosine", "agreement", "max_relative", "ok")})
            if row["ok"] or len(rounds) > config.rounds:
                break
            size = facts["fixed_batch"] or _PROBES
            feeds = {facts["input"]: normalised(dataset.images(positions[:size]), facts)}
            proto = check_onnx(file, trusted=True)
            tensors = [t for t in compare_tensors(reference, proto, feeds, feeds) if t.node not in (*given, *keep)]
            first = first_break(tensors, **tensor_limits(precision))
            broken = broken or (first.said() if first else "")
            worst = {t.node for t in steepest(tensors, max(1, round(config.share * len(reference.graph.node))))}
            if not worst:
                break
            keep |= with_makers(reference, worst) - set(given)
    place = f", first at {broken}" if broken else ""
    if not rounds[-1]["ok"]:
        words = f"{settings.name}: the outputs lie outside the limits{place}, and keeping nodes in higher precision did not help"
        return {"keep": [], "rounds": rounds, "reason": words, "chosen": "after"}
    words = (
        f"{len(keep)} nodes stay in higher precision: with all of them quantized the outputs lie outside the limits{place}" if keep else ""
    )
    return {"keep": sorted(keep), "rounds": rounds, "reason": words, "chosen": "after"}
