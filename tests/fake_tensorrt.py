"""A TensorRT with a GPU in main memory: an engine that multiplies its first pixel, and says and times two layers. Its names are held against the API.

`MODULE` stands for the imported bindings; bytes that start with `fake` are an engine, with `lean` in them a version-compatible one, which holds host
code. Others are refused in TensorRT's own words.
"""

from __future__ import annotations

import ctypes
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

INPUT, OUTPUT, CLASSES = "images", "logits", 4
REFUSALS = {  # first bytes -> what the runtime logs; of TensorRT as in NVIDIA/TensorRT issues 564 and 2072, of RTX 1.7 as it said here
    b"vold": "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION "
    "failed.Version tag does not match. Note: Current Version: 237, Serialized Engine Version: 239)",
    b"agpu": "The engine plan file is generated on an incompatible device, expecting compute 6.1 got compute 7.5, please rebuild.",
    b"driv": "Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)",
}
LAYERS = [
    {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": INPUT, "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "t", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
    },
    {
        "Name": "head",
        "LayerType": "gemm",
        "Inputs": [{"Name": "t", "DataType": "FP16", "Format": "Channel major FP16 format where channel % 8 == 0"}],
        "Outputs": [{"Name": OUTPUT, "DataType": "FP16", "Format": "Row major linear FP16 format (kLINEAR)"}],
    },
]
TIMES_MS = {"conv + relu": 0.3, "head": 0.1}


class ILogger:
    ERROR, INTERNAL_ERROR = "error", "internal"


class IProfiler: ...


class IProgressMonitor: ...


class TensorIOMode:
    INPUT, OUTPUT = "in", "out"


class LayerInformationFormat:
    JSON = "json"


class EngineInspector:
    execution_context: Any = None

    def get_engine_information(self, format: str) -> str:
        return json.dumps({"Layers": LAYERS, "Bindings": [INPUT, OUTPUT]})


class IExecutionContext:
    profiler: Any = None

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return len(shape) == 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._shape[0], CLASSES)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        images = np.ctypeslib.as_array(ctypes.cast(self._at[INPUT], ctypes.POINTER(ctypes.c_float)), self._shape)
        out = np.ctypeslib.as_array(ctypes.cast(self._at[OUTPUT], ctypes.POINTER(ctypes.c_float)), (self._shape[0], CLASSES))
        out[:] = images[:, 0, 0, 0, None] * np.arange(CLASSES)
        for name, ms in TIMES_MS.items() if self.profiler is not None else ():
            self.profiler.report_layer_time(name, ms)
        return True


class ICudaEngine:
    num_io_tensors = 2

    def get_tensor_name(self, index: int) -> str:
        return (INPUT, OUTPUT)[index]

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name == INPUT else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext()

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: Any):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if serialized_engine[:4] == b"fake" and (self.engine_host_code_allowed or b"lean" not in serialized_engine):
            return ICudaEngine()
        self._logger.log(ILogger.ERROR, REFUSALS.get(serialized_engine[:4], "something else"))
        return None


CLASSES_OF_THE_API = (
    *(ILogger, IProfiler, IProgressMonitor, TensorIOMode, LayerInformationFormat),
    *(EngineInspector, IExecutionContext, ICudaEngine, Runtime),
)
MODULE = ModuleType("tensorrt")
vars(MODULE).update({c.__name__: c for c in CLASSES_OF_THE_API}, __version__="10.3.0", nptype=lambda _: np.float32)


def on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """torch's side of the GPU in main memory, and the fake in place of the bindings of both backends."""
    import torch

    patch.setattr(torch.Tensor, "cuda", lambda self: self)
    patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    patch.setattr("edgekd.backends.tensorrt.TensorRT.runtime", lambda _: MODULE)
    patch.setattr("edgekd.backends.tensorrt.TensorRT.available", lambda _: None)
    patch.setattr("edgekd.backends.tensorrt.TensorRT.version", lambda _: MODULE.__version__)
    patch.setattr("edgekd.backends.tensorrt.TensorRT.runs_on", lambda _, device: device.arch.gpu is not None)
