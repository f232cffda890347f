"""export: model -> graph, one self-contained fp32 ONNX file with what a runtime must know about its input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.errors import ParityBroken
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    from edgekd.context import Context

GRAPH, FACTS = "model.onnx", "graph.json"


@register("stage")
class Export:
    class Config(Base):
        """Nothing to set."""

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA}
    gives = Kind.GRAPH
    version = 1
    libraries = ("torch", "timm", "onnx", "onnxscript")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.export.onnx import OUTPUT, export_onnx, input_of
        from edgekd.models.build import load_model

        model, spec = load_model(inputs["model"])
        meta = export_onnx(model, spec.shape, out / GRAPH)
        stored = sum(p.numel() for p in model.parameters())
        _assert_no_projector(out / GRAPH, stored, settings.name)
        facts = {
            "input": input_of(spec.shape),
            "output": OUTPUT,
            **({"image_size": spec.image_size, "mean": spec.mean, "std": spec.std} if spec.image_size else {"features": spec.shape[0]}),
            "precision": "fp32",
            "fixed_batch": None if meta["dynamic_batch"] else 1,
        }
        (out / FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
        return meta | {"arch": spec.arch, "parameters": stored}


def _assert_no_projector(graph: Path, parameters: int, name: str) -> None:
    """The file may hold the model's weights and small constants, nothing trained beside them."""
    import numpy as np

    from edgekd.safeio.onnxfile import check_onnx

    stored = sum(int(np.prod(t.dims)) for t in check_onnx(graph, trusted=True).graph.initializer if t.data_type == 1)
    if stored > parameters * 1.2 + 100_000:
        raise ParityBroken(
            f"the exported file holds {stored} weights, the model has {parameters}",
            where=name,
            expected="no training-only modules in the file",
        )
