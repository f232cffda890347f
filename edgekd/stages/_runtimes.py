"""A teacher run by an installed runtime instead of by torch, in fp32 or int8: where only its logits are asked for, that is often several times faster on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.data.augment import to_float
from edgekd.errors import BackendError
from edgekd.export.onnx import export_onnx, input_of
from edgekd.models.spec import ModelSpec
from edgekd.profile.device import load_device
from edgekd.profile.host import HOST
from edgekd.train.black_box import RuntimeTeacher
from edgekd.train.speed import Speed
from edgekd.train.views import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.data.dataset import Dataset

_CALIBRATION = 128  # training images that ranges are read from
_BATCH = 32


def ways() -> list[str]:
    """Runtimes of this machine that take graphs as they are, each in fp32 and int8."""
    host = load_device(HOST)
    backends = {name: registry.load("backend", name)() for name in registry.names("backend")}
    here = [n for n, b in backends.items() if not b.builds and b.available() is None and b.runs_on(host)]
    return [f"{name} {precision}" for name in here for precision in ("fp32", "int8")]


def by_runtime(model: nn.Module, spec: ModelSpec, way: str, images: Tensor, folder: Path, *, threads: int, batch: int) -> RuntimeTeacher:
    """The teacher as `way` says, from files in `folder` that are made where they are not there: a function of the model and of `images`.

    images: (n, 3, h, w) in [0, 1], for the ranges of int8. Raises BackendError for a model that the runtime or the quantizer does not take.
    """
    name, precision = way.split(" ")
    backend, host = registry.load("backend", name)(), load_device(HOST)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "teacher.onnx"
    if not file.is_file():
        made = folder / "part.onnx"
        if not export_onnx(model, spec.shape, made)["dynamic_batch"]:
            raise BackendError("it exports with a fixed batch only")
        made.replace(file)
    if precision == "int8":
        flavour = host.flavour_for(name)
        rounded = folder / f"teacher-{flavour}.onnx"
        if not rounded.is_file():
            quantizer = registry.load("quantize", "ptq")
            quantizer(quantizer.Config(calibration="minmax", samples=len(images))).quantize(
                file, folder / "part.onnx", _seen(images, spec), flavour
            )
            (folder / "part.onnx").replace(rounded)
        file = rounded
    engine = folder / f"{name}-{precision}"
    engine.mkdir(exist_ok=True)
    meta = backend.convert(file, host, engine, {}, batch=batch)
    session = backend.open(engine / meta["model_file"], threads=threads, device=host, options=meta.get("options"))
    return RuntimeTeacher(session, input_of(spec.shape), spec, Speed(runtime=way))


def calibration_images(dataset: Dataset) -> Tensor:
    """Training images (n, 3, h, w) in [0, 1], always the same."""
    from edgekd.stages._common import drawn

    return to_float(torch.from_numpy(dataset.images(drawn(dataset, "train", _CALIBRATION))))


def _seen(images: Tensor, spec: ModelSpec) -> Iterator[NDArray[np.float32]]:
    view = View(spec)
    for start in range(0, len(images), _BATCH):
        yield view(images[start : start + _BATCH]).contiguous().numpy()
