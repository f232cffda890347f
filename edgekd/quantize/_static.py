"""Q/DQ nodes by onnxruntime's static quantizer, in the flavour of a device; ranges are calibrated, or given by what was trained."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import BackendError, DataRefused, EdgekdError, OnnxRefused
from edgekd.profile.precision import assert_fp32
from edgekd.quantize._finite import first_not_finite
from edgekd.quantize._lower import lower
from edgekd.quantize._quantizer import inner_nodes, tidied

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTED = ("Conv", "Gemm", "MatMul")
_FLOAT_OUT = ["Gemm", "MatMul"]  # runtimes give their sums in fp32 for nothing, and what follows is mostly computed in it
_OPS = (*WEIGHTED, "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat", "Relu")
_MORE_OPS = {"x8s8": ("Mul",)}  # OpenVINO has int8 products of two tensors
_ACTIVATIONS = ("Relu", "Clip")  # what runtimes fuse with the rounding that follows
_MORE_ACTIVATIONS = {
    "x8s8": ("HardSwish", "HardSigmoid", "Sigmoid", "Elu", "LeakyRelu", "Gelu", "Tanh", "Mish")
}  # OpenVINO fuses nearly all
_PASSING = ("Clip", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Pad", "Split")  # int8 as what they get
AUTO, CALIBRATIONS = "auto", ("minmax", "entropy", "percentile")
Overrides = dict[str, list[dict[str, Any]]]  # tensor -> onnxruntime's TensorQuantOverrides


def prepare(graph: Path, out: Path) -> None:
    """The graph as it is quantized: batch norms folded, constants computed, shapes inferred, every node with a name, lowered to what has int8 kernels.

    Raises OnnxRefused for a graph that is quantized already, BackendError with the preparation's reason.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _refused(graph), _quiet():
        assert_fp32(onnx.load_model_from_string(graph.read_bytes()), graph.name)
        quant_pre_process(str(graph), str(out), skip_symbolic_shape=True)
        proto = onnx.load_model_from_string(out.read_bytes())
        _named(proto.graph)
        out.write_bytes(tidied(lower(proto)).SerializeToString(deterministic=True))


@contextlib.contextmanager
def _refused(graph: Path) -> Iterator[None]:
    """Any failure of onnxruntime's quantizer, which raises many unrelated types, is a BackendError with its reason."""
    try:
        yield
    except (OSError, MemoryError, EdgekdError):  # the machine's, or said already
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise BackendError(
            f"the graph cannot be quantized: {reason}", where=graph.name, hint="leave the quantize stage out, or precision: fp32"
        ) from error


def _named(body: Any) -> None:
    """Gives nodes without a name one of their own; that two have the same is refused by onnxruntime."""
    taken = {n.name for n in body.node}
    for number, node in enumerate(body.node):
        if not node.name:
            node.name = next(name for mark in itertools.count(number) if (name := f"{node.op_type}_{mark}") not in taken)
            taken.add(node.name)


def static_int8(
    graph: Path,
    out: Path,
    samples: Iterator[NDArray[np.float32]],
    *,
    flavour: str,
    calibration: str = CALIBRATIONS[0],
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
    how = CALIBRATIONS[0] if calibration == AUTO else calibration  # a search looks at latency: any ranges will do
    method = dict(zip(CALIBRATIONS, (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile), strict=True))[how]
    kept = ranges or out.with_name("ranges.json")
    extra: dict[str, Any] = (
        {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": False}
        if symmetric
        else {"WeightSymmetric": True}
    )
    extra |= {"OpTypesToExcludeOutputQuantization": _FLOAT_OUT, "QDQKeepRemovableActivations": True}  # activations are merged below
    try:
        with _refused(graph):
            prepare(graph, prepared)
            if trained is not None:
                proto = onnx.load_model_from_string(prepared.read_bytes())
                extra["TensorQuantOverrides"] = trained(proto)
                prepared.write_bytes(proto.SerializeToString(deterministic=True))
            layout = _layout(prepared, keep, flavour)
            if not kept.is_file():
                _calibrate(prepared, kept, samples, method, layout.ops, graph.name)
            if flavour == "x8s8":
                extra["TensorQuantOverrides"] = _signed(kept) | extra.get("TensorQuantOverrides", {})
            with _quiet():
                quantize_static(
                    str(prepared),
                    str(out),
                    None,
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(layout.ops),
                    per_channel=per_channel,
                    reduce_range=flavour == "u8s8_reduced",
                    activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=sorted(layout.left),
                    calibrate_method=method,
                    calibration_cache_path=kept,
                    extra_options=extra,
                )
    finally:
        prepared.unlink(missing_ok=True)
        if ranges is None:
            kept.unlink(missing_ok=True)
    proto = tidied(_without_detours(onnx.load_model_from_string(out.read_bytes()), layout))
    out.write_bytes(proto.SerializeToString(deterministic=True))
    counts = {op: sum(n.op_type == op for n in proto.graph.node) for op in ("QuantizeLinear", "DequantizeLinear")}
    precision = "int8" if counts["QuantizeLinear"] else "fp32"  # where every operator is kept
    return {"precision": precision, "flavour": flavour, "calibration": how, **counts}


def _signed(ranges: Path) -> Overrides:
    """Signed and symmetric for every tensor that is negative somewhere: with unsigned ones from zero on, no zero point is left."""
    from onnxruntime.quantization import QuantType, load_tensors_data

    found = load_tensors_data(ranges)
    return {t: [{"quant_type": QuantType.QInt8, "symmetric": True}] for t in found if float(found[t].range_value[0].min()) < 0}


@dataclass(frozen=True)
class _Layout:
    """Which operators stay in fp32, which tensors runtimes hold as int8, and what they fuse with the rounding behind it."""

    left: frozenset[str]
    rounded: frozenset[str]
    ops: tuple[str, ...] = _OPS
    activations: tuple[str, ...] = _ACTIVATIONS

    def computes(self, node: Any) -> bool:
        """Whether an operator takes rounded inputs."""
        return node.op_type in self.ops and node.name not in self.left


def _layout(prepared: Path, keep: tuple[str, ...], flavour: str) -> _Layout:
    """`keep` stays, and the operators without weights that get a tensor in fp32 (a transformer's residual sum): they would be rounded for their own sake."""
    import onnx

    ops, activations = _OPS + _MORE_OPS.get(flavour, ()), _ACTIVATIONS + _MORE_ACTIVATIONS.get(flavour, ())
    proto = onnx.load_model_from_string(prepared.read_bytes())
    body, swish = proto.graph, {product.name for _, product in _swishes(_Wires(proto))}
    missing = set(keep) - {n.name for n in body.node}
    if missing:
        raise ValueError(f"there is no node '{min(missing)}' to keep")
    constants = {t.name for t in body.initializer}
    rounded: set[str] = set(constants)
    left = []
    for node in body.node:
        inside = all(n in rounded for n in node.input if n)
        if node.name in swish:
            left.append(node.name)  # it computes in the kernel before it, or in fp32
            rounded.update(node.output if inside and "Sigmoid" in activations else ())
        elif node.op_type in ops:
            scaled = node.op_type == "Mul" and constants & set(node.input)  # by a vector of its own: its few values take no rounding
            if node.name in keep or scaled or (node.op_type not in WEIGHTED and not inside):
                left.append(node.name)
            elif node.op_type not in _FLOAT_OUT:
                rounded.update(node.output)
        elif node.op_type in (*_PASSING, *activations) and inside:
            rounded.update(node.output)
    return _Layout(frozenset(left), frozenset(rounded), ops, activations)


def _without_detours(proto: Any, layout: _Layout) -> Any:
    """Q/DQ pairs only where int8 kernels read them."""
    graph = _Wires(proto)
    _merge_activations(graph, layout)
    _free_readers(graph, layout)
    graph.tidy()
    return proto


class _Wires:
    """Who makes and who reads a tensor of a graph that is being changed."""

    def __init__(self, proto: Any):
        self.body = proto.graph
        self.makers = {name: node for node in self.body.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.body.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.given = {value.name for value in self.body.output} | {name for n in inner_nodes(self.body) for name in n.input}

    def rewire(self, reader: Any, old: str, new: str) -> None:
        for place, name in enumerate(reader.input):
            if name == old:
                reader.input[place] = new
        self.readers[old].remove(reader)
        self.readers.setdefault(new, []).append(reader)

    def tidy(self) -> None:
        """Takes out the pairs that nobody reads any more, and their constants."""
        for op in ("DequantizeLinear", "QuantizeLinear"):
            for node in [n for n in self.body.node if n.op_type == op]:
                if not self.readers.get(node.output[0]) and node.output[0] not in self.given:
                    self.body.node.remove(node)
                    for name in dict.fromkeys(node.input):
                        self.readers[name].remove(node)
        unread = {name for name, readers in self.readers.items() if not readers} - self.given
        for tensor in [t for t in self.body.initializer if t.name in unread]:
            self.body.initializer.remove(tensor)


def _merge_activations(graph: _Wires, layout: _Layout) -> None:
    """No pair between an operator and its activation where that one's output is rounded: runtimes fuse all three, and two roundings make two kernels."""
    found = [([node], node) for node in graph.body.node if node.op_type in layout.activations]
    if "Sigmoid" in layout.activations:
        found += [([gate, product], product) for gate, product in _swishes(graph)]
    for parts, last in found:
        if any(r.op_type != "QuantizeLinear" for r in graph.readers.get(last.output[0], [last])):
            continue
        back = graph.makers.get(parts[0].input[0])
        there = graph.makers.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
        if back is None or there is None or there.op_type != "QuantizeLinear":
            continue
        alone = all(len(graph.readers[name]) == 1 for name in (there.input[0], there.output[0]))
        if alone and len(graph.readers[back.output[0]]) == len(parts):
            for node in parts:
                graph.rewire(node, back.output[0], there.input[0])


def _swishes(graph: _Wires) -> list[tuple[Any, Any]]:
    """(Sigmoid, Mul) of every x * sigmoid(x)."""
    found = []
    for gate in [n for n in graph.body.node if n.op_type == "Sigmoid"]:
        readers = graph.readers.get(gate.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Mul" and set(readers[0].input) == {gate.input[0], gate.output[0]}:
            found.append((gate, readers[0]))
    return found


def _free_readers(graph: _Wires, layout: _Layout) -> None:
    """What computes in fp32 reads what was made in fp32, though a neighbour rounds it for itself."""
    for there in [n for n in graph.body.node if n.op_type == "QuantizeLinear"]:
        source = there.input[0]
        if source in layout.rounded or source not in graph.makers:
            continue
        for back in graph.readers.get(there.output[0], []):
            for reader in [r for r in graph.readers.get(back.output[0], []) if not layout.computes(r)]:
                graph.rewire(reader, back.output[0], source)


def _calibrate(prepared: Path, out: Path, samples: Iterator[NDArray[np.float32]], method: Any, ops: tuple[str, ...], where: str) -> None:
    """Writes the range of every tensor, batch by batch: a histogram of all activations at once would fill the memory.

    Raises DataRefused without images, and OnnxRefused for a tensor that is not finite on them.
    """
    import numpy as np
    import onnx
    from onnxruntime.quantization import create_calibrator, save_tensors_data

    with tempfile.TemporaryDirectory() as folder, _quiet():
        augmented = str(Path(folder) / "augmented.onnx")
        calibrator = create_calibrator(str(prepared), list(ops), augmented_model_path=augmented, calibrate_method=method)
        name, seen = _input_name(prepared), 0
        for batch in samples:
            _collect(calibrator, _Reader(batch, name), prepared, where)
            seen += len(batch)
        if not seen:
            raise DataRefused(
                "there is no image to calibrate with", where="the training part", hint="more images; or a smaller fixed batch"
            )
        found = calibrator.compute_data()
    for node in onnx.load_model_from_string(prepared.read_bytes()).graph.node:  # infinities that came of the graph's own
        if broken := [o for o in node.output if o in found and not all(np.isfinite(v).all() for v in found[o].range_value)]:
            raise _not_finite(node, broken[0], where)
    save_tensors_data(found, out)


def _collect(calibrator: Any, reader: _Reader, prepared: Path, where: str) -> None:
    """Adds one batch to the ranges; raises OnnxRefused with the node at which its values stop being finite.

    Of a NaN calibrators tell by a warning only (its range may be lost among those of other batches), or by an error about a histogram without a range.
    """
    import numpy as np

    batch, problem = next(iter(reader.left[0].values())), None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            calibrator.collect_data(reader)
        except ValueError as error:
            problem = error
    ranges = getattr(calibrator, "calibrate_tensors_range", None) or {}  # of minmax, so far
    broken = any(not np.isfinite(v).all() for tensor in ranges.values() for v in tensor.range_value)
    if (problem or broken or said) and (node := first_not_finite(prepared, batch)) is not None:
        raise _not_finite(node, node.output[0], where)
    if problem:
        raise problem


def _not_finite(node: Any, tensor: str, where: str) -> OnnxRefused:
    return OnnxRefused(
        f"on the calibration images tensor '{tensor}' is not finite, made by node '{node.name}' ({node.op_type})",
        where=where,
        expected="finite activations",
        hint="its weights or its normalisation are wrong: model.mean, model.std",
    )


class _Reader:
    """Feeds one calibration batch to onnxruntime."""

    def __init__(self, batch: NDArray[np.float32], name: str):
        self.left = [{name: batch}]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return self.left.pop() if self.left else None

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
