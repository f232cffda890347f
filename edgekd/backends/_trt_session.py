"""An opened TensorRT engine: it runs on this machine's GPU, and tells what each of its layers is and costs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.backends import Layer
from edgekd.backends._trt_callbacks import log_of, profiler_of
from edgekd.errors import BackendError

if TYPE_CHECKING:
    from edgekd.backends import Array, Feeds

_WARMUP, _RUNS = 3, 20
_AGAIN = "build it again on the device: edgekd verify FOLDER --build, or python3 build.py in the bundle"
_FLAWS = {  # what TensorRT says -> what it means; the words of 8 to 10 come from NVIDIA's issue tracker, those of RTX 1.7 from running it
    re.compile(r"header\.size == blobSize|cursor < blobSize"): "its file is cut short, or longer than what was built",
    re.compile(r"magicTag|magic tag|bufferSize >= minBufferSize|empty memory buffer"): "it is no engine of this runtime",
    re.compile(r"incompatible device|expecting compute"): "it was built for another GPU",
    re.compile(r"[Vv]ersion tag does not match|different version|incompatible serialization version"): "it was built with another version",
}
_TYPES = {
    **dict.fromkeys(("float", "fp32"), "fp32"),
    **dict.fromkeys(("half", "fp16"), "fp16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **{name: name for name in ("fp8", "fp4", "int8", "uint8", "int4", "int32", "int64", "bool")},
}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)


class TrtSession:
    """An engine with one execution context; inputs and outputs live in torch tensors on the GPU.

    One that was built to last (`version_compatible`) brings its own runtime, which is code of this machine's processor: no other is allowed any.
    """

    def __init__(self, trt: Any, engine: Path, *, lasting: bool = False):
        self._where, self._trt, self._log = engine.name, trt, log_of(trt).clear()
        runtime = trt.Runtime(self._log)
        runtime.engine_host_code_allowed = lasting
        self._engine = runtime.deserialize_cuda_engine(_bytes_of(engine))
        if self._engine is None:
            raise self._refused()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"the engine does not start: {self._log.said('no memory of the GPU is left')}", where=self._where)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.input_names = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.output_names = [n for n in names if n not in self.input_names]

    def _refused(self) -> BackendError:
        """What is wrong with an engine that was not opened."""
        told = "\n".join(self._log.errors)
        said = self._log.said("the CUDA driver is missing, or older than this runtime needs" if self._log.no_driver else "no reason given")
        flaw = next((f"{means} ({said})" for words, means in _FLAWS.items() if words.search(told)), said)
        return BackendError(
            f"the engine cannot be opened: {flaw}",
            where=self._where,
            expected=f"an engine of version {self._trt.__version__} for this GPU",
            hint=_AGAIN if told else "edgekd doctor",
        )

    def run(self, feeds: Feeds) -> list[Array]:
        import numpy as np
        import torch

        if self._context is None:
            raise BackendError("the session is closed", where=self._where)
        if set(feeds) != set(self.input_names):
            raise BackendError(f"inputs {sorted(feeds)}", where=self._where, expected=f"{sorted(self.input_names)}")
        held = []
        for name, value in feeds.items():
            wanted = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            if value.dtype != wanted or not self._context.set_input_shape(name, value.shape):
                raise BackendError(
                    f"input '{name}' is {value.dtype} {value.shape}",
                    where=self._where,
                    expected=f"{wanted} in a shape of the engine's profile",
                )
            held.append(torch.from_numpy(np.ascontiguousarray(value)).cuda())
            self._context.set_tensor_address(name, held[-1].data_ptr())
        outputs = []
        for name in self.output_names:
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            empty = torch.from_numpy(np.empty(tuple(self._context.get_tensor_shape(name)), dtype)).cuda()
            outputs.append(empty)
            self._context.set_tensor_address(name, empty.data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise BackendError(f"the engine failed while running: {self._log.said('no reason given')}", where=self._where)
        stream.synchronize()
        return [t.cpu().numpy() for t in outputs]

    def layers(self, feeds: Feeds) -> list[Layer]:
        """Time of each layer as TensorRT's own profiler sees it, and its type, precision and format as the inspector does; slowest first."""
        for _ in range(_WARMUP):
            self.run(feeds)
        profiler = profiler_of(self._trt)  # alive as long as the context that calls it
        self._context.profiler = self._profiler = profiler
        for _ in range(_RUNS):
            self.run(feeds)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # with the shapes that ran
        return layer_table(profiler.ms, inspector.get_engine_information(self._trt.LayerInformationFormat.JSON), _RUNS)

    def close(self) -> None:
        self._context = self._engine = None


def layer_table(ms: Mapping[str, Sequence[float]], inspected: str, runs: int) -> list[Layer]:
    """Layers that were timed or that the inspector lists; what is not JSON, or only names (an engine built without details), adds no facts."""
    try:
        listed = list(json.loads(inspected)["Layers"])
    except (ValueError, KeyError, TypeError):
        listed = []
    facts = {str(layer.get("Name")): layer for layer in listed if isinstance(layer, dict)}
    names = dict.fromkeys([*ms, *facts, *(layer for layer in listed if isinstance(layer, str))])
    whole = 1e3 * sum(map(sum, ms.values())) / runs or 1.0
    rows = []
    for name in names:
        own, times = facts.get(name, {}), ms.get(name, ())
        us = 1e3 * sum(times) / runs
        rows.append(Layer(name, str(own.get("LayerType", "")), us, us / whole, len(times) // runs, _precision(own), _format(own)))
    return sorted(rows, key=lambda layer: -layer.total_us)


def _precision(layer: Mapping[str, Any]) -> str:
    """`int8`, or `fp32 -> int8` where what comes out differs from what goes in."""
    sides = [[" ".join(_fields(facts)) for facts in layer.get(side, [])] for side in ("Inputs", "Outputs")]
    words = ["+".join(dict.fromkeys(_TYPES[m[0].lower()] for text in side if (m := _TYPE.search(text)))) for side in sides]
    return " -> ".join(dict.fromkeys(filter(None, words)))


def _format(layer: Mapping[str, Any]) -> str:
    """How the first output lies in memory, in the inspector's words."""
    told = next((_fields(facts)[-1:] for facts in layer.get("Outputs", [])), [])
    return "".join(text for text in told if text.lower() not in _TYPES)


def _fields(facts: Mapping[str, Any]) -> list[str]:
    """Type, then format, of a tensor: one field up to 10 (`Format/Datatype`), two from 11 on."""
    lower = {k.lower(): str(v) for k, v in facts.items()}
    return [lower[k] for k in ("datatype", "format/datatype", "format") if k in lower]


def _bytes_of(engine: Path) -> bytes:
    try:
        return engine.read_bytes()
    except OSError as error:
        raise BackendError(f"the engine cannot be read: {error.strerror}", where=str(engine), hint=_AGAIN) from error
