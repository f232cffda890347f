"""What a user's own model file says of itself: the size of its images and the number of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import CheckpointRefused, OnnxRefused

_HINT = "give data, whose classes are counted: --data FOLDER"


@dataclass(frozen=True)
class Given:
    """None where the file leaves it open."""

    image_size: int | None
    classes: int | None


def of_onnx(path: Path) -> Given:
    """Raises FileMissing, and OnnxRefused for anything but a classifier of square images."""
    from onnx import shape_inference  # 0.2 s

    from edgekd.safeio.onnxfile import check_onnx
    from edgekd.stages.read_graph import image_input

    proto = check_onnx(path)
    _, side = image_input(proto, path)
    name = proto.graph.output[0].name
    inferred = {v.name: v for v in shape_inference.infer_shapes(proto).graph.output}[name]
    dims = [d.dim_value for d in inferred.type.tensor_type.shape.dim]
    if dims and len(dims) != 2:
        shown = [d.dim_value or d.dim_param for d in inferred.type.tensor_type.shape.dim]
        raise OnnxRefused(f"it is not a classifier: output {name} {shown}", where=str(path), expected="an output of shape (batch, classes)")
    return Given(side, dims[1] if dims and dims[1] else None)


def of_weights(path: Path, arch: str, args: Mapping[str, Any]) -> Given:
    """Raises FileMissing, CheckpointRefused, UnknownName."""
    from edgekd.models.build import architecture_defaults, stored_spec
    from edgekd.models.importing import classes_of, own_size
    from edgekd.safeio.checkpoint import load_weights

    defaults = architecture_defaults(arch)
    state, metadata = load_weights(path)
    if (stored := stored_spec(metadata)) is not None and stored.arch == arch:
        return Given(stored.image_size, stored.num_classes)
    try:
        return Given(own_size(defaults, args), classes_of(state, path))
    except CheckpointRefused:
        return Given(own_size(defaults, args), None)


def known_classes(found: Given, path: Path) -> int:
    """Raises the refusal of a file whose classes cannot be counted."""
    if found.classes is None:
        refusal = OnnxRefused if path.suffix == ".onnx" else CheckpointRefused
        raise refusal(
            "its number of classes cannot be read", where=str(path), expected="a classifier with an output of known size", hint=_HINT
        )
    return found.classes
