"""Q/DQ nodes by onnxruntime's static quantizer, in the flavour of a device; ranges are calibrated, or given by what was trained."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import BackendError, EdgekdError, OnnxRefused
from edgekd.quantize._quantizer import tidied

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTED = ("Conv", "Gemm", "MatMul")
_OPS = [*WEIGHTED, "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat"]
_ACTIVATIONS = ("Relu", "Clip")  # what runtimes fuse with the rounding that follows
_PASSING = ("Relu", "Clip", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")  # as int8 as what they get
_ROUNDED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
Overrides = dict[str, list[dict[str, Any]]]  # tensor -> onnxruntime's TensorQuantOverrides


def prepare(graph: Path, out: Path) -> None:
    """The graph as it is quantized: batch norms folded, constants computed, shapes inferred, every node with a name."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quiet():
        quant_pre_process(str(graph), str(out), skip_symbolic_shape=True)
    proto = onnx.load_model_from_string(out.read_bytes())
    taken = {n.name for n in proto.graph.node}
    for number, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = next(
                f"{node.op_type}_{number}{mark}"
                for mark in ("", *(f"_{i}" for i in range(99)))
                if f"{node.op_type}_{number}{mark}" not in taken
            )
    out.write_bytes(proto.SerializeToString(deterministic=True))


def static_int8(
    graph: Path,
    out: Path,
    samples: Iterator[NDArray[np.float32]],
    *,
    flavour: str,
    calibration: str = "minmax",
    per_channel: bool = True,
    keep: tuple[str, ...] = (),
    ranges: Path | None = None,
    trained: Callable[[Any], Overrides] | None = None,
) -> dict[str, Any]:
    """Writes the int8 graph; raises BackendError with the quantizer's reason. `ranges` keeps what calibration found for the next call.

    `trained` may change the prepared graph, and returns the scales that it wants to have.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    prepared = out.with_name("prepared.onnx")
    symmetric = flavour == "s8s8"
    method = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}[
        calibration
    ]
    extra: dict[str, Any] = (
        {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": False}
        if symmetric
        else {"WeightSymmetric": True}
    )
    if calibration != "minmax":
        samples = _equal(samples)
    try:
        _assert_fp32(onnx.load_model_from_string(graph.read_bytes()), graph.name)
        prepare(graph, prepared)
        if trained is not None:
            proto = onnx.load_model_from_string(prepared.read_bytes())
            extra["TensorQuantOverrides"] = trained(proto)
            prepared.write_bytes(proto.SerializeToString(deterministic=True))
        with _quiet():
            quantize_static(
                str(prepared),
                str(out),
                _Reader(samples, _input_name(prepared)),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_OPS,
                per_channel=per_channel,
                reduce_range=flavour == "u8s8_reduced",
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_left_out(prepared, keep),
                calibrate_method=method,
                calibration_cache_path=ranges,
                extra_options=extra,
            )
    except (OSError, MemoryError, EdgekdError):  # the machine's, or said already
        raise
    except Exception as error:  # the quantizer raises many unrelated types
        raise BackendError(
            f"the graph cannot be quantized: {error}", where=graph.name, hint="leave the quantize stage out, or precision: fp32"
        ) from error
    finally:
        prepared.unlink(missing_ok=True)
    proto = tidied(_rounded_once(onnx.load_model_from_string(out.read_bytes())))
    out.write_bytes(proto.SerializeToString(deterministic=True))
    counts = {op: sum(n.op_type == op for n in proto.graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
    precision = "int8" if counts["QuantizeLinear"] else "fp32"  # where every operator is kept
    return {"precision": precision, "flavour": flavour, "calibration": calibration, **counts}


def _assert_fp32(proto: Any, where: str) -> None:
    """Rounding twice loses accuracy for nothing."""
    found = next((n for n in proto.graph.node if n.op_type in _ROUNDED or n.op_type.startswith("QLinear")), None)
    if found is not None:
        raise OnnxRefused(
            f"it is quantized already: node '{found.name}' is a {found.op_type}",
            where=where,
            expected="a graph in fp32",
            hint="leave the stage out",
        )


def _left_out(prepared: Path, keep: tuple[str, ...]) -> list[str]:
    """`keep`, and the operators without weights that get a tensor from an operator in fp32: they would only be rounded for their own sake."""
    if not keep:
        return []
    import onnx

    body = onnx.load_model_from_string(prepared.read_bytes()).graph
    missing = set(keep) - {n.name for n in body.node}
    if missing:
        raise ValueError(f"there is no node '{min(missing)}' to keep")
    rounded: set[str] = {t.name for t in body.initializer}
    left = []
    for node in body.node:
        inside = all(n in rounded for n in node.input if n)
        if node.op_type in _OPS:
            if node.name in keep or (node.op_type not in WEIGHTED and not inside):
                left.append(node.name)
            else:
                rounded.update(node.output)
        elif node.op_type in _PASSING and inside:
            rounded.update(node.output)
    return left


def _rounded_once(proto: Any) -> Any:
    """Without the pairs between an operator and its activation, where the activation's output is rounded as well.

    Runtimes fuse operator, activation and rounding into one int8 kernel; a pair between them makes two, and requantizes every value in fp32.
    """
    body = proto.graph
    makers = {name: node for node in body.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in body.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    given = {value.name for value in body.output}
    gone = []
    for node in body.node:
        if node.op_type not in _ACTIVATIONS or any(r.op_type != "QuantizeLinear" for r in readers.get(node.output[0], [node])):
            continue
        back = makers.get(node.input[0])
        there = makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if back is None or there is None or there.op_type != "QuantizeLinear" or there.input[0] in given:
            continue
        if all(len(readers[name]) == 1 for name in (there.input[0], there.output[0], back.output[0])):
            node.input[0] = there.input[0]
            gone += [there, back]
    for node in gone:
        body.node.remove(node)
    used = {name for node in body.node for name in node.input}
    for tensor in [t for t in body.initializer if t.name not in used and any(t.name in node.input for node in gone)]:
        body.initializer.remove(tensor)
    return proto


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
