"""Static int8 after training: Q/DQ nodes by onnxruntime's quantizer, calibrated on training images.

When: the target runs int8 faster than fp32, or the file must be four times smaller. Cost: seconds. The flavour comes from the device: unsigned
activations on x86 (with 7-bit weights where there is no VNNI), symmetric ones without int32 biases for ARM and TensorRT, which are slow on x86.
Source: Jacob et al. 2018 (arXiv 1712.05877); rules for graphs that runtimes accept: NVIDIA and onnxruntime documentation.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.config import Config as Base
from edgekd.errors import BackendError
from edgekd.quantize._quantizer import tidied
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_OPS = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat"]


@register("quantize")
class PTQ:
    """Post-training static quantization."""

    class Config(Base):
        samples: int = Field(
            256,
            ge=1,
            le=100_000,
            description="training images used for calibration; entropy and percentile keep every activation of them in memory",
        )
        calibration: Literal["minmax", "entropy", "percentile"] = Field("minmax", description="how activation ranges are chosen")
        per_channel: bool = Field(True, description="one weight scale an output channel")

    level = "graph"
    precision = "int8"
    needs = "int8"

    def __init__(self, config: Config):
        self.config = config

    def quantize(self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str) -> dict[str, Any]:
        """Writes the int8 graph; raises BackendError with the quantizer's reason."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = out.with_name("prepared.onnx")
        symmetric = flavour == "s8s8"
        method = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}[
            self.config.calibration
        ]
        extra = (
            {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": False}
            if symmetric
            else {"WeightSymmetric": True}
        )
        if self.config.calibration != "minmax":
            samples = _equal(samples)
        try:
            with _quiet():
                quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True)  # folds batch norms, infers shapes
                quantize_static(
                    str(prepared),
                    str(out),
                    _Reader(samples, _input_name(prepared)),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=_OPS,
                    per_channel=self.config.per_channel,
                    reduce_range=flavour == "u8s8_reduced",
                    activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=method,
                    extra_options=extra,
                )
        except Exception as error:  # the quantizer raises many unrelated types
            raise BackendError(
                f"the graph cannot be quantized: {error}", where=graph.name, hint="leave the quantize stage out, or precision: fp32"
            ) from error
        finally:
            prepared.unlink(missing_ok=True)
        proto = tidied(onnx.load_model_from_string(out.read_bytes()))
        out.write_bytes(proto.SerializeToString(deterministic=True))
        counts = {op: sum(n.op_type == op for n in proto.graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
        return {"flavour": flavour, "calibration": self.config.calibration, "samples": self.config.samples, **counts}


def _equal(samples: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Batches as large as the first: onnxruntime's histograms cannot take a short last one."""
    size = 0
    for batch in samples:
        size = size or len(batch)
        if len(batch) == size:
            yield batch


class _Reader:
    """Feeds calibration batches to onnxruntime."""

    def __init__(self, samples: Iterator[NDArray[np.float32]], name: str):
        self.samples, self.name = samples, name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self.samples, None)
        return None if batch is None else {self.name: batch}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Part of onnxruntime's interface; used only with strided calibration."""


def _input_name(graph: Path) -> str:
    import onnx

    from edgekd.safeio.onnxfile import fed_inputs

    return str(fed_inputs(onnx.load_model_from_string(graph.read_bytes()))[0].name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer warns on the root logger about its own defaults, and its calibrators print to stdout, which is for data."""
    import logging

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
