"""An ONNX classifier with another face: images of another size in, logits of other classes out. Its own nodes and weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgekd.export.opset import opset_of

_PREFIX = "edgekd."
_LEAST = 1e-12  # of a probability: its logarithm must be finite
_ANTIALIAS_OPSET = 18


def take_size(proto: Any, entry: Any, side: int, own: int) -> None:
    """Images (n, 3, side, side) are resized to the (n, 3, own, own) of the input `entry`, bilinear as `train.views.View` does.

    Of normalised pixels, which gives what normalising resized ones does. Below opset 18 a smaller image is made without antialiasing.
    """
    dims = entry.type.tensor_type.shape.dim
    outer = helper.make_tensor_value_info(f"{_PREFIX}images", TensorProto.FLOAT, [dims[0].dim_value or "batch", 3, side, side])
    smooth: dict[str, Any] = {"antialias": 1, "exclude_outside": 1} if own < side and opset_of(proto) >= _ANTIALIAS_OPSET else {}
    held = {"start": [0], "end": [2], "sides": [own, own]}
    proto.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), f"{_PREFIX}{n}") for n, v in held.items())
    nodes = [
        _node("Shape", [outer.name], "shape"),
        _node("Slice", [f"{_PREFIX}shape", f"{_PREFIX}start", f"{_PREFIX}end"], "batch_and_channels"),
        _node("Concat", [f"{_PREFIX}batch_and_channels", f"{_PREFIX}sides"], "sizes", axis=0),
        helper.make_node(
            "Resize",
            [outer.name, "", "", f"{_PREFIX}sizes"],
            [entry.name],
            name=f"{_PREFIX}resize",
            mode="linear",
            coordinate_transformation_mode="half_pixel",
            **smooth,
        ),
    ]
    _replace(proto.graph.node, [*nodes, *proto.graph.node])
    _replace(proto.graph.input, [outer, *(i for i in proto.graph.input if i.name != entry.name)])


def give_logits(proto: Any) -> None:
    """Its first output holds probabilities: their logarithms, which are logits, take its place."""
    least = numpy_helper.from_array(np.array(_LEAST, np.float32), f"{_PREFIX}least")
    proto.graph.initializer.append(least)
    proto.graph.node.append(_node("Clip", [proto.graph.output[0].name, least.name], "clipped"))
    proto.graph.node.append(_node("Log", [f"{_PREFIX}clipped"], "logits"))
    _put_out(proto, f"{_PREFIX}logits", None)


def give_classes(proto: Any, places: Sequence[int]) -> None:
    """Of its first output (n, outputs), the columns `places`, in that order."""
    held = numpy_helper.from_array(np.array(places, np.int64), f"{_PREFIX}places")
    proto.graph.initializer.append(held)
    proto.graph.node.append(_node("Gather", [proto.graph.output[0].name, held.name], "classes", axis=1))
    _put_out(proto, f"{_PREFIX}classes", len(places))


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, [f"{_PREFIX}{output}"], name=f"{_PREFIX}{output}", **attributes)


def _put_out(proto: Any, name: str, width: int | None) -> None:
    """Makes a tensor (n, width) the only output."""
    first = proto.graph.output[0].type.tensor_type.shape.dim
    batch = (first[0].dim_value or first[0].dim_param or None) if first else None
    wide = width or ((first[1].dim_value or None) if len(first) > 1 else None)
    _replace(proto.graph.output, [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, wide])])


def _replace(field: Any, values: list[Any]) -> None:
    """Protobuf's repeated fields cannot be assigned."""
    kept = [type(v).FromString(v.SerializeToString()) for v in values]
    del field[:]
    field.extend(kept)
