"""quantize: graph -> graph in the flavour of the target's device, calibrated on training images, or on the grid that its weights were trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.stages._common import Samples

_BATCH = 32
_FEW = 32  # calibration images


@register("stage")
class Quantize:
    class Config(Base):
        search: int = Field(
            0, ge=0, le=200, description="graphs to build and measure to find the operators that are worth quantizing; 0 quantizes all"
        )

    takes: Mapping[str, Kind] = {
        "graph": Kind.GRAPH,
        "data": Kind.DATA,
        "mix?": Kind.DECISION,
        "trial?": Kind.DECISION,
        "grid?": Kind.MODEL,
    }
    gives = Kind.GRAPH
    version = 4
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")
    user = True
    method_kind = "quantize"
    method_field = "method"
    default_method = "ptq"
    compresses = True

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.export.parity import coarser
        from edgekd.export.qdq import assert_rules
        from edgekd.quantize._learned import GRID
        from edgekd.safeio.onnxfile import check_onnx
        from edgekd.stages._common import method_of, open_samples

        quantizer = method_of(settings, "quantize")
        decisions = [read_decision(inputs[name]) for name in ("mix", "trial") if name in inputs]
        if decisions:
            changes: dict[str, Any] = {"keep_nodes": (*quantizer.config.keep_nodes, *(n for d in decisions for n in d["keep"]))}
            if chosen := next((d["calibration"] for d in decisions if d.get("calibration")), None):
                changes["calibration"] = chosen
            quantizer = type(quantizer)(quantizer.config.model_copy(update=changes))
        facts = inputs["graph"].json(FACTS)
        dataset, flavour = open_samples(inputs["data"], ctx), str(settings.facts["flavour"])
        wanted = getattr(quantizer.config, "samples", 0)  # methods that look at no data have no such setting
        samples = calibration_batches(dataset, facts, wanted, ctx.seed)
        _warn_of_few(dataset, wanted, settings.name, ctx)
        learned = {"grid": inputs["grid"].path / GRID} if "grid" in inputs else {}
        done: dict[str, Any] = quantizer.quantize(inputs["graph"].path / GRAPH, out / GRAPH, samples, flavour, **learned)
        precision = done.get("precision", quantizer.precision)
        if precision == "int8":
            keep = getattr(quantizer.config, "keep_nodes", ())
            assert_rules(check_onnx(out / GRAPH, trusted=True), flavour, settings.name, keep)
        prepared_by = settings.method if hasattr(quantizer, "prepare") else None  # optimized before it was rounded: a rung of its own
        (out / FACTS).write_text(
            json.dumps(
                facts | {"precision": coarser(facts["precision"], precision), "flavour": flavour, "prepared_by": prepared_by},
                sort_keys=True,
            ),
            encoding="utf-8",
        )
        return done


def _warn_of_few(dataset: Samples, wanted: int, name: str, ctx: Context) -> None:
    """Ranges seen on few images, or on images of one class, cut off what others need."""
    if not wanted:
        return
    from edgekd.data.loader import epoch_order

    chosen = epoch_order(ctx.seed, 0, dataset.split("train"))[:wanted]
    if len(chosen) < min(_FEW, wanted):
        ctx.console.warn(
            f"{name}: only {len(chosen)} training images to calibrate with: ranges may be too narrow; {_FEW} or more are better"
        )
    elif len(set(dataset.labels[chosen].tolist())) == 1:
        ctx.console.warn(
            f"{name}: all {len(chosen)} calibration images are of one class: ranges may be too narrow; give more: {name}.samples"
        )


def calibration_batches(dataset: Samples, facts: Mapping[str, Any], count: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Normalised training images (batch, 3, h, w), a seeded choice of `count`."""
    from edgekd.data.loader import epoch_order
    from edgekd.data.normalise import normalised

    fixed = facts["fixed_batch"]
    chosen, size = epoch_order(seed, 0, dataset.split("train"))[:count], fixed or _BATCH
    for start in range(0, len(chosen) - (size - 1 if fixed else 0), size):  # a fixed batch takes whole batches only
        yield normalised(dataset.samples(chosen[start : start + size]), facts)
