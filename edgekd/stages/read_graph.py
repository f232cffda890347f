"""read_graph: a user's ONNX file -> graph, after it was checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.errors import FileMissing, OnnxRefused
from edgekd.models.spec import ModelConfig
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    from edgekd.context import Context

_FLOAT = 1  # onnx.TensorProto.FLOAT


@register("stage")
class ReadGraph:
    Config = ModelConfig
    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.GRAPH
    version = 3
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.export.opset import opset_of, raised
        from edgekd.export.own import own_file
        from edgekd.profile.precision import assert_fp32, precision_of
        from edgekd.safeio.onnxfile import check_onnx
        from edgekd.stages._common import open_dataset, unchanged

        config = settings.typed(ModelConfig)
        if config.onnx is None:
            raise FileMissing("no ONNX file is named", where="model.onnx")
        shutil.copyfile(config.onnx, out / GRAPH)
        unchanged(out / GRAPH, settings)
        given, dataset = check_onnx(out / GRAPH, where=config.onnx), open_dataset(inputs["data"], ctx)
        if settings.facts.get("quantizes"):  # before anything is measured; a quantizer would say the same of a copy in the store
            assert_fp32(given, str(config.onnx))
        assert_numbers(given, config.onnx)
        proto = raised(given, str(config.onnx))
        if proto is not given:
            ctx.console.warn(f"{config.onnx.name} uses opset {opset_of(given)}: it was brought to {opset_of(proto)}, with the same outputs")
            (out / GRAPH).write_bytes(proto.SerializeToString(deterministic=True))
        entry, size = image_input(proto, config.onnx)
        if size is not None and size != dataset.image_size:
            raise OnnxRefused(
                f"its input is {size} x {size} pixels, the data are {dataset.image_size}",
                where=str(config.onnx),
                hint=f"--image-size {size} for a single command such as edgekd quantize; "
                f"-o {'data' if dataset.labelled else 'samples'}.image_size={size} for a recipe",
            )
        if config.mean is None or config.std is None:
            ctx.console.warn(
                f"{config.onnx.name} does not say how its input is normalised: mean and std 0.5 are assumed; give --mean and --std, or model.mean and model.std"
            )
        mean, std = config.mean or (0.5, 0.5, 0.5), config.std or (0.5, 0.5, 0.5)
        with own_file(config.onnx):
            _assert_runs(out / GRAPH, entry, dataset.image_size, ctx.threads)
        names = {"input": entry.name, "output": proto.graph.output[0].name}
        batch = int(entry.type.tensor_type.shape.dim[0].dim_value) or None
        facts = names | {"fixed_batch": batch, "image_size": dataset.image_size, "mean": mean, "std": std, "precision": precision_of(proto)}
        (out / FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
        return {"arch": config.onnx.stem, "nodes": len(proto.graph.node)}


def assert_numbers(proto: Any, path: Path) -> None:
    """Raises OnnxRefused for weights that are not numbers: nothing that is computed from them can be compared. Infinities mask attention, and may stay."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise OnnxRefused(
                f"weight '{tensor.name[:80]}' holds {int(np.isnan(values).sum())} values that are not numbers",
                where=str(path),
                expected="finite weights",
                hint="its training diverged: take an earlier checkpoint",
            )


def _assert_runs(file: Path, entry: Any, side: int, threads: int) -> None:
    """Raises GraphRefused where onnxruntime does not open the file, or cannot compute two images."""
    import numpy as np

    from edgekd import registry
    from edgekd.profile.device import load_device

    session = registry.load("backend", "onnxruntime")().open(file, threads=threads, device=load_device("host"))
    images = entry.type.tensor_type.shape.dim[0].dim_value or 2
    session.run({entry.name: np.zeros((images, 3, side, side), np.float32)})
    session.close()


def image_input(proto: Any, path: Path) -> tuple[Any, int | None]:
    """The (n, 3, h, w) input and its side in pixels, None where it is dynamic; raises OnnxRefused for another layout or type."""
    from edgekd.safeio.onnxfile import fed_inputs

    inputs = fed_inputs(proto)
    dims = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] if inputs else []
    if len(inputs) != 1 or len(dims) != 4 or dims[1] not in (0, 3) or dims[2] != dims[3] or inputs[0].type.tensor_type.elem_type != _FLOAT:
        shown = ", ".join(f"{i.name} {[d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim]}" for i in inputs) or "no input"
        raise OnnxRefused(
            f"it is not a classifier of square images: {shown}",
            where=str(path),
            expected="one float32 input of shape (batch, 3, side, side)",
        )
    return inputs[0], int(dims[2]) or None
