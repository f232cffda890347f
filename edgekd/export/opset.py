"""Opsets: which versions of ONNX's operators runtimes take; an older graph is brought up to one that can be quantized, and compared with itself."""

from __future__ import annotations

from typing import Any

from edgekd.errors import OnnxRefused

OLDEST, NEWEST = 7, 26  # what onnxruntime 1.31 runs, and the newest that it supports officially
QUANTIZES = 13  # scales along an axis came with it
_TARGET = 18
_CLOSE = 1e-4  # of the largest output; a converter that changes more has changed the model
_EXPECTED = f"opset {OLDEST} to {NEWEST}"
_AGAIN = f"export it again: torch.onnx.export(..., opset_version={_TARGET})"


def opset_of(proto: Any) -> int:
    """The version of ONNX's own operators; 0 where the file names none."""
    return next((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def raised(proto: Any, where: str) -> Any:
    """The graph in an opset that can be quantized; itself where it is. Raises OnnxRefused for one that is too old, too new or cannot be brought up."""
    from onnx import helper, version_converter

    found = opset_of(proto)
    if found > NEWEST:
        raise too_new(found, where)
    if found < OLDEST:
        raise OnnxRefused(f"it uses opset {found}, older than runtimes take", where=where, expected=_EXPECTED, hint=_AGAIN)
    if found >= QUANTIZES:
        return proto
    try:
        newer = version_converter.convert_version(proto, _TARGET)
        newer.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(newer.opset_import))
        error = _difference(proto, newer)
    except Exception as problem:  # the converter's RuntimeError, and what a runtime raises on its result
        raise OnnxRefused(
            f"it uses opset {found} and cannot be brought to {_TARGET}: {(str(problem).strip() or type(problem).__name__).splitlines()[0][:200]}",
            where=where,
            expected=f"opset {QUANTIZES} to {NEWEST}",
            hint=_AGAIN,
        ) from problem
    if not error <= _CLOSE:
        raise OnnxRefused(
            f"it uses opset {found}, and brought to {_TARGET} its outputs differ by {error:.1e} of the largest",
            where=where,
            expected=f"opset {QUANTIZES} to {NEWEST}",
            hint=_AGAIN,
        )
    return newer


def too_new(opset: int, where: str) -> OnnxRefused:
    """The refusal of a file with newer operators than runtimes have."""
    return OnnxRefused(f"it uses opset {opset}, newer than runtimes take", where=where, expected=_EXPECTED, hint=_AGAIN)


def _difference(old: Any, new: Any) -> float:
    """Largest difference of the outputs on one random input, relative to the largest output."""
    import numpy as np
    import onnxruntime

    from edgekd.safeio.onnxfile import fed_inputs

    side = 64  # where the file leaves it open
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in fed_inputs(old)}
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal([d or (1, 3, side, side)[min(i, 3)] for i, d in enumerate(dims)], dtype=np.float32)
        for name, dims in shapes.items()
    }
    outputs = []
    for proto in (old, new):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, feeds)[0].astype(np.float64))
    return float(np.abs(outputs[0] - outputs[1]).max() / max(np.abs(outputs[0]).max(), 1e-12))
