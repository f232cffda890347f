"""torch module -> one self-contained ONNX file: named inputs and outputs, dynamic batch, checked, and nothing of this machine inside.

torch's exporter writes local source paths into most nodes; all of that is stripped, and the same weights give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from edgekd.errors import BackendError
from edgekd.safeio.onnxfile import check_onnx

INPUT, ROWS, OUTPUT = "images", "features", "logits"
OPSET = 20
_EXAMPLE_BATCH = 2  # 1 would be taken for a constant


def input_of(shape: Sequence[int]) -> str:
    """What the input of a file is called, by the shape of one sample."""
    return INPUT if len(shape) == 3 else ROWS


def export_onnx(model: nn.Module, size: int | Sequence[int], path: Path) -> dict[str, Any]:
    """Writes `path`; returns opset, nodes and whether the batch is dynamic. `size`: the side of an image in pixels, or the shape of one sample.

    Raises BackendError with the exporter's reason.
    """
    images = torch.zeros(_EXAMPLE_BATCH, *((3, size, size) if isinstance(size, int) else size))
    proto = _dynamic(model.eval(), images)
    dynamic = proto is not None
    if proto is None:
        try:
            proto = _export(model, images[:1], dynamic=False)
        except Exception as error:  # the exporter raises many unrelated types
            raise BackendError(
                f"the model does not export to ONNX: {_reason(error)}",
                where=type(model).__name__,
                hint="edgekd doctor; another architecture",
            ) from error
    proto = _clean(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    check_onnx(path, trusted=True)
    onnx.checker.check_model(proto, full_check=True)
    return {"opset": proto.opset_import[0].version, "nodes": len(proto.graph.node), "dynamic_batch": dynamic}


def _dynamic(model: nn.Module, images: torch.Tensor) -> onnx.ModelProto | None:
    """The graph for any batch; None where the model allows one size only, which the exporter may write down without a word."""
    try:
        proto = _export(model, images, dynamic=True)
    except Exception:  # the second attempt, with a fixed batch, gives the reason
        return None
    return proto if proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param else None


def _export(model: nn.Module, images: torch.Tensor, *, dynamic: bool) -> onnx.ModelProto:
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=[input_of(images.shape[1:])],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
            optimize=True,
        )
    proto: onnx.ModelProto = program.model_proto  # type: ignore[union-attr]  # with dynamo there is a program
    return proto


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without metadata, doc strings and names of where it was made."""
    for holder in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
        *proto.graph.value_info,
        *proto.functions,
    ):
        for name in ("metadata_props", "doc_string"):
            if any(f.name == name for f in holder.DESCRIPTOR.fields):
                holder.ClearField(name)
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "edgekd", "", "", 0
    proto.graph.name = "model"
    return proto


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter talks on stdout and warns about its own internals; stdout is for data."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)
