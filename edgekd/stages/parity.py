"""parity: torch fp32 -> ONNX fp32 -> quantized -> engine on real val images -> one row a rung; a broken rung makes the run end with exit 4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.quantize._learned import GRID
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.data.dataset import Dataset

PARITY = "parity.json"


@register("stage")
class Parity:
    class Config(Base):
        samples: int = Field(256, ge=1, description="val images that are compared")

    takes: Mapping[str, Kind] = {"graph": Kind.GRAPH, "fp32": Kind.GRAPH, "data": Kind.DATA, "model?": Kind.MODEL, "engine?": Kind.ENGINE}
    gives = Kind.METRICS
    version = 2
    libraries = ("torch", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.export.parity import compare
        from edgekd.stages._common import drawn, open_dataset, task_of
        from edgekd.stages.compile import ENGINE, open_engine
        from edgekd.stages.evaluate import run_engine

        task, dataset = task_of(settings), open_dataset(inputs["data"], ctx)
        positions = drawn(dataset, "val", settings.typed(self.Config).samples)
        labels, rows = dataset.labels[positions], []
        onnx = graph_outputs(inputs["fp32"], dataset, positions, ctx)
        if "model" in inputs:
            rows.append(compare("torch fp32 -> ONNX fp32", "fp32", torch_outputs(inputs["model"], dataset, positions), onnx, labels, task))
        precision = inputs["graph"].json(FACTS)["precision"]
        if inputs["graph"].digest != inputs["fp32"].digest:
            rounded, source = graph_outputs(inputs["graph"], dataset, positions, ctx), "ONNX fp32"
            if (
                "model" in inputs and (inputs["model"].path / GRID).is_file()
            ):  # trained with rounded inputs: without them it is another model
                onnx, source = torch_outputs(inputs["model"], dataset, positions, rounded=True), "torch rounded"
            rows.append(compare(f"{source} -> {precision}", precision, onnx, rounded, labels, task))
            onnx = rounded
        if "engine" in inputs and inputs["engine"].json(ENGINE)["backend"] != "onnxruntime":  # on which the rungs before were run
            session, facts = open_engine(inputs["engine"])
            found = run_engine(session, facts, dataset, positions, ctx, "parity")
            rows.append(compare(f"ONNX {precision} -> {facts['backend']}", precision, onnx, found, labels, task))
        (out / PARITY).write_text(json.dumps(rows, sort_keys=True), encoding="utf-8")
        return {"ok": all(row["ok"] for row in rows)}


def graph_outputs(graph: Artifact, dataset: Dataset, positions: NDArray[np.int64], ctx: Context) -> NDArray[np.float32]:
    """Outputs of a graph on this machine's onnxruntime."""
    return outputs_of(graph.path / GRAPH, graph.json(FACTS), dataset, positions, ctx)


def outputs_of(file: Path, facts: Mapping[str, Any], dataset: Dataset, positions: NDArray[np.int64], ctx: Context) -> NDArray[np.float32]:
    """Outputs of an ONNX file on this machine's onnxruntime; `facts` say what it takes."""
    from edgekd import registry
    from edgekd.profile.device import load_device
    from edgekd.stages.evaluate import run_engine

    session = registry.load("backend", "onnxruntime")().open(file, threads=ctx.threads, device=load_device("host"))
    return run_engine(session, facts, dataset, positions, ctx, "parity")


def torch_outputs(model: Artifact, dataset: Dataset, positions: NDArray[np.int64], *, rounded: bool = False) -> NDArray[np.float32]:
    """Outputs in torch; `rounded` as the model was trained by a quantizer."""
    from edgekd.models.build import load_model
    from edgekd.quantize._attach import round_inputs
    from edgekd.quantize._learned import load_grid
    from edgekd.train.evaluate import logits_of
    from edgekd.train.views import View

    module, spec = load_model(model)
    if rounded:
        round_inputs(module, {n.removesuffix("/input"): v for n, v in load_grid(model.path / GRID).items() if n.endswith("/input")})
    return logits_of(module, View(spec), dataset, positions)
