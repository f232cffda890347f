"""OpenVINO: Intel's runtime for CPUs, often the fastest one for int8 graphs on x86; the engine is the ONNX file itself.

Sessions compute in fp32 unless the graph says otherwise (Q/DQ pairs, casts): by itself OpenVINO would use bf16 where the CPU has it, and what was judged
would not be what another CPU gives. One inference runs at a time, on `threads` threads.
Source: OpenVINO's documentation of the CPU plug-in, properties `inference_precision`, `inference_num_threads`, `num_streams`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.backends import asked, version_of
from edgekd.config import Config
from edgekd.errors import BackendError
from edgekd.profile.device import same_machine
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.backends import Array, Feeds
    from edgekd.profile.schema import DeviceProfile


_NOISE = ("Exception from", "Check '", "While ", "FrontEnd API failed", "Model wasn't fully converted")
_USAGE = """\
`model.onnx`, by OpenVINO {version}. The shape is fixed before compiling: a plan for any batch takes up to a fifth longer for one image. Without the
precision hint OpenVINO may compute in bf16, and neither the outputs nor the latency are those that were measured here.

    threads = json.load(open("bundle.json"))["threads"]
    core = openvino.Core()
    model = core.read_model("model.onnx")
    model.reshape({shapes})
    compiled = core.compile_model(model, "CPU", {settings})
"""
_PLAN = "openvino.json"  # beside an engine whose operators must not be fused; what it says is in PROVENANCE.md
_UNFUSED = {
    "SNIPPETS_MODE": "DISABLE"
}  # int8 graphs take 2 to 5 % longer (measured: vit_tiny, mobilenetv3, swin_tiny, convnext_atto), so only where needed
_APART = {"fp32": 1e-3, "int8": 0.05}  # of the largest output: beyond what another order of sums, or another rounding, may change


class OpenVinoSession:
    """One model for one inference at a time; a single sample is computed by a plan for its exact shape, batches by one for any size.

    A plan for any size costs 0.3 to 0.7 ms an inference more (a fifth of mobilenetv3's time for one image, measured): the latency of a device that
    sees one image at a time must not pay for it. Each is compiled when it is first needed.
    """

    def __init__(self, model: Any, settings: dict[str, Any], where: str):
        self._model, self._settings, self._where = model, settings, where
        self._types = {i.any_name: i.element_type.to_dtype() for i in model.inputs}
        self._requests: dict[bool, Any] = {}  # by whether it is for a single sample
        self.input_names, self.output_names = list(self._types), [o.any_name for o in model.outputs]

    def run(self, feeds: Feeds) -> list[Array]:
        if self._model is None:
            raise BackendError("the session is closed", where=self._where)
        if set(feeds) != set(self._types):
            raise BackendError(f"inputs {sorted(feeds)}", where=self._where, expected=f"{sorted(self._types)}")
        for name, value in feeds.items():  # OpenVINO would convert silently
            if value.dtype != self._types[name]:
                raise BackendError(f"input '{name}' is {value.dtype}", where=self._where, expected=str(self._types[name]))
        try:
            found = self._request(feeds).infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"openvino cannot run this input: {_first_line(error)}", where=self._where) from error
        return [found[name].copy() for name in self.output_names]  # the request reuses its memory

    def ready(self, feeds: Feeds) -> None:
        """Compiles the plan that inputs of these shapes are computed by."""
        self._request(feeds)

    def _request(self, feeds: Feeds) -> Any:
        single = all(value.shape[:1] == (1,) for value in feeds.values())
        if single not in self._requests:
            model = self._model.clone()
            if single:
                model.reshape({name: list(value.shape) for name, value in feeds.items()})
            self._requests[single] = _compiled(model, self._settings, self._where).create_infer_request()
        return self._requests[single]

    def close(self) -> None:
        self._model, self._requests = None, {}


@register("backend")
class OpenVino:
    """Runs ONNX files on x86 and ARM CPUs."""

    name = "openvino"
    suffix = ".onnx"
    builds = False

    class Options(Config):
        """None."""

    def available(self) -> str | None:
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed: pip install 'edgekd[openvino]'"
        return None

    def builds_for(self, device: DeviceProfile) -> str | None:
        return self.available()

    def runs_on(self, device: DeviceProfile) -> bool:
        return self.available() is None and device.is_cpu and same_machine(device)

    def version(self) -> str:
        return version_of(self.name)

    def prepare(self) -> None:
        _runtime()

    def convert(self, graph: Path, device: DeviceProfile, out: Path, options: Mapping[str, Any], *, batch: int = 1) -> dict[str, Any]:
        """Compiles the graph once on this machine's CPU, and copies it. `options` must be empty."""
        asked(self, options, graph)
        model, settings = _read(graph), _settings(1)
        sizes = {i.any_name: [d.get_length() if d.is_static else -1 for d in i.partial_shape] for i in model.inputs}
        shapes = {name: [batch if size[:1] == [-1] else size[0], *size[1:]] for name, size in sizes.items() if size}
        compiled = _compiled(model, settings, graph.name)
        # plans differ by more than time where OpenVINO has a fault (tools/families.md): it is judged by the plan that its target's batch gets
        meta: dict[str, Any] = {"model_file": "model.onnx", "runtime": self.name, "version": self.version(), "judged_batch": batch}
        (out / _PLAN).unlink(missing_ok=True)  # of another graph that was converted here
        if _fuses_wrongly(model, compiled, shapes, graph.name):
            settings |= _UNFUSED
            (out / _PLAN).write_text(json.dumps(_UNFUSED), encoding="utf-8")
            meta |= {"beside": [_PLAN], "note": f"{self.name} fuses operators of this graph wrongly; its plan computes them one by one"}
        shutil.copyfile(graph, out / "model.onnx")
        return meta | {
            "usage": _USAGE.format(
                version=self.version(),
                shapes=json.dumps(shapes),
                settings=json.dumps(settings | {"INFERENCE_NUM_THREADS": 0}).replace(": 0", ": threads"),
            )
        }

    def open(self, engine: Path, *, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None) -> OpenVinoSession:
        settings = _settings(threads) | (_UNFUSED if engine.with_name(_PLAN).is_file() else {})
        return OpenVinoSession(_read(engine), settings, engine.name)


def _settings(threads: int) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


def _fuses_wrongly(model: Any, dynamic: Any, shapes: Mapping[str, list[int]], where: str) -> bool:
    """Whether the plan for exactly `shapes` is apart from both the plan for any batch and the one that fuses nothing, which agree.

    Seen with OpenVINO 2026.4: attention of windows (swin_tiny, 4 heads of 4 tokens) is off by up to 14 % for an exact shape, and right unfused.
    """
    import numpy as np

    if not shapes or min(min(size) for size in shapes.values()) < 1:
        return False
    rng = np.random.default_rng(0)
    types = {i.any_name: i.element_type.to_dtype() for i in model.inputs}
    feeds = {name: rng.standard_normal(shapes[name]).astype(types[name]) for name in shapes}
    plans = []
    for settings in (_settings(1), _settings(1) | _UNFUSED):
        exact = model.clone()
        exact.reshape(shapes)
        plans.append(_compiled(exact, settings, where))
    try:
        fused, unfused, free = ([np.asarray(v, np.float64) for v in plan(feeds).values()] for plan in (*plans, dynamic))
    except RuntimeError as error:
        raise _unopened(error, where) from error
    rounded = any(operator.get_type_name() == "FakeQuantize" for operator in model.get_ops())
    limit = _APART["int8" if rounded else "fp32"]

    def apart(first: list[Any], second: list[Any]) -> bool:
        with np.errstate(invalid="ignore"):  # what is not finite parts nothing: it is counted where the model is judged
            return any(float(np.abs(a - b).max()) > limit * max(float(np.abs(a).max()), 1e-12) for a, b in zip(first, second, strict=True))

    return apart(unfused, fused) and not apart(unfused, free)


def _read(graph: Path) -> Any:
    try:
        return _core().read_model(str(graph))
    except RuntimeError as error:
        raise _unopened(error, graph.name) from error


def _compiled(model: Any, settings: dict[str, Any], where: str) -> Any:
    try:
        return _core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise _unopened(error, where) from error


def _unopened(error: RuntimeError, where: str) -> BackendError:
    return BackendError(
        f"openvino cannot open the graph: {_first_line(error)}", where=where, hint="another runtime: -o targets.DEVICE.backend=onnxruntime"
    )


@cache
def _core() -> Any:
    """One for the life of the process: of two, the first to go unmaps the signal stack that the second puts back, and the next Ctrl-C crashes."""
    return _runtime().Core()


def _runtime() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise BackendError(f"openvino cannot be imported: {_first_line(error)}", hint="edgekd doctor") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("No conversion rule")] or [line for line in lines if not line.startswith(_NOISE)]
    return (told or lines or [type(error).__name__])[0][:300]
