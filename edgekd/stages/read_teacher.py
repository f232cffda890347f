"""read_teacher: a teacher's ONNX file -> graph that takes images of the data's size and gives logits of the data's classes, in their order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.config import no_key
from edgekd.errors import InputRefused, OnnxRefused
from edgekd.models.spec import Triple
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.export import FACTS, GRAPH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.train.black_box import BlackBox

_IMAGES = 16  # that it is tried on
_SUM = 1e-3  # how far from 1 the probabilities of an image may add up


@register("stage")
class ReadTeacher:
    class Config(Base):
        # The content's hash is in the key instead, so the file may move without a rebuild.
        onnx: Path = no_key(..., "the teacher's file")
        mean: Triple = Field(description="channel means of its normalisation")
        std: Triple = Field(description="channel deviations of its normalisation")
        image_size: int | None = Field(None, ge=1, description="side of its input in pixels, where the file leaves it open")
        outputs: Literal["auto", "logits", "probabilities"] = Field("auto", description="what it gives; auto: as the numbers say")
        classes: tuple[str, ...] = Field((), description="names of its outputs, in order; none: the data's")

    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.GRAPH
    version = 1
    libraries = ("onnx", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import shutil

        import torch

        from edgekd.data.augment import to_float
        from edgekd.data.classes import outputs_of
        from edgekd.export import adapt
        from edgekd.export.opset import raised
        from edgekd.export.own import own_file
        from edgekd.profile.precision import precision_of
        from edgekd.safeio.onnxfile import check_onnx
        from edgekd.stages._common import drawn, open_dataset, unchanged
        from edgekd.stages.read_graph import assert_numbers, image_input

        config, dataset = settings.typed(self.Config), open_dataset(inputs["data"], ctx)
        path, file = config.onnx, out / GRAPH
        shutil.copyfile(path, file)
        unchanged(file, settings)
        given = check_onnx(file, where=path)
        assert_numbers(given, path)
        proto = raised(given, str(path))
        entry, side = image_input(proto, path)
        own = _own_side(side, config.image_size, dataset.image_size, path)
        if own != dataset.image_size:
            adapt.take_size(proto, entry, dataset.image_size, own)
        facts = {
            "input": proto.graph.input[0].name if own != dataset.image_size else entry.name,
            "fixed_batch": int(entry.type.tensor_type.shape.dim[0].dim_value) or None,
            "image_size": dataset.image_size,
            "mean": config.mean,
            "std": config.std,
            "precision": precision_of(proto),
        }
        positions = drawn(dataset, "train", _IMAGES)
        images, index = to_float(torch.from_numpy(dataset.images(positions))), torch.from_numpy(positions)
        with own_file(path):
            file.write_bytes(proto.SerializeToString(deterministic=True))
            said = opened(file, facts, ctx)(images, index, 0).logits.numpy()
        if said.ndim != 2:
            raise OnnxRefused(f"its outputs have the shape {said.shape}", where=str(path), expected="(batch, classes)")
        kind = kind_of(said, config.outputs, str(path))
        if kind == "probabilities":
            adapt.give_logits(proto)
        if (places := outputs_of(dataset.classes, said.shape[1], config.classes, str(path))) != list(range(said.shape[1])):
            adapt.give_classes(proto, places)
        facts["output"] = proto.graph.output[0].name
        with own_file(path):
            file.write_bytes(proto.SerializeToString(deterministic=True))
            opened(file, facts, ctx)(images, index, 0)
        (out / FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")
        return {"arch": path.stem, "nodes": len(proto.graph.node), "gives": kind, "outputs": said.shape[1], "side": own}


def opened(file: Path, facts: Mapping[str, Any], ctx: Context) -> BlackBox:
    """The teacher in an ONNX file, on this machine's onnxruntime."""
    from edgekd import registry
    from edgekd.profile.device import load_device
    from edgekd.train.black_box import BlackBox

    runtime = registry.load("backend", "onnxruntime")()
    return BlackBox(runtime.open_beside(file, threads=ctx.threads, device=load_device("host")), facts)


def kind_of(values: NDArray[np.float32], asked: str, where: str) -> str:
    """`logits` or `probabilities`: what is asked for, or, where that is left open, what (images, classes) of numbers look like.

    Raises InputRefused for what is asked for and cannot be, and for numbers that look like neither.
    """
    from_0_to_1 = bool((values >= 0).all() and (values <= 1 + _SUM).all())
    adds_up = from_0_to_1 and bool((abs(values.sum(1) - 1) <= _SUM).all())
    if asked == "probabilities" and not adds_up:
        raise InputRefused(
            "its outputs are not probabilities: they are negative somewhere, or do not add up to 1",
            where=where,
            expected="softmax outputs",
            hint="-o teacher.outputs=logits",
        )
    if asked == "auto" and from_0_to_1 and not adds_up:
        raise InputRefused(
            "its outputs lie between 0 and 1 and do not add up to 1, as if an image could have several classes",
            where=where,
            expected="logits, or probabilities of one class an image",
            hint="if they are logits: -o teacher.outputs=logits",
        )
    return asked if asked != "auto" else ("probabilities" if adds_up else "logits")


def _own_side(found: int | None, asked: int | None, of_data: int, path: Path) -> int:
    """The side of the teacher's own input in pixels."""
    if found and asked and found != asked:
        raise OnnxRefused(
            f"its input is {found} x {found} pixels",
            where=str(path),
            expected=f"{asked}, as teacher.image_size says",
            hint="leave that out",
        )
    return found or asked or of_data
