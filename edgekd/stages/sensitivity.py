"""sensitivity: quantizes one operator at a time -> for each of them what that alone costs in accuracy on val, and gains in latency on the target.

Effects do not simply add up: neighbours in int8 share their roundings, so a set is often faster than the sum of its members says. What is chosen is
therefore measured again as a whole (mix.py); this table says where to begin, and which operators to take back where accuracy is short.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.errors import BackendError
from edgekd.registry import register
from edgekd.stages._partial import PartialGraphs
from edgekd.stages._stage import Settings, write_decision
from edgekd.stages.compile import RunConfig

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class Sensitivity:
    class Config(RunConfig):
        evaluations: int = Field(
            24, ge=1, le=200, description="operators that are quantized alone, those with most operations a byte first"
        )

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "data": Kind.DATA}
    gives = Kind.DECISION
    version = 1
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    method_kind = "quantize"

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        config = settings.typed(self.Config)
        with tempfile.TemporaryDirectory() as folder:
            graphs = PartialGraphs(settings, config, inputs, Path(folder), ctx)
            rows = list(_rows(graphs, config.evaluations, ctx))
        write_decision(out, {"rows": rows})  # as a decision it is replayed, not measured again
        return {"operators": len(graphs.operators), "measured": len(rows)}


def _rows(graphs: PartialGraphs, limit: int, ctx: Context) -> Any:
    """One row an operator: `drop` of the metric, `error` of the outputs relative to their size, and the `ratio` of latencies to fp32."""
    import numpy as np

    wanted = graphs.outputs(graphs.fp32)
    scores, size = graphs.scores(wanted), float(np.abs(wanted).mean()) or 1.0
    chosen = graphs.operators[:limit]
    with ctx.console.bar("sensitivity", len(chosen)) as bar:
        for number, name in enumerate(chosen):
            ctx.stop.check()
            try:
                file = graphs.built({name})
                session = graphs.open(file)
                found = graphs.outputs(session)
                row = {"drop": float((scores - graphs.scores(found)).mean()), "error": float(np.abs(found - wanted).mean()) / size}
                yield {"node": name, **row, **graphs.ratio(session, graphs.fp32), "refused": None}
                file.unlink()
            except BackendError as problem:  # one operator that a runtime refuses is a row like others
                yield {"node": name, "drop": None, "error": None, "ratio": None, "ci95": None, "refused": problem.what}
            bar.update(number + 1, operator=name)
