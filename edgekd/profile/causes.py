"""Why a compressed graph is not faster: causes that can be read from the two files, in words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

_HEAVY = ("Conv", "Gemm", "MatMul")


def slow_causes(before: Path, after: Path, quantum: int) -> list[str]:
    """Sentences for the gate's reason; empty where nothing is known. `quantum`: the channel multiple that the device prefers."""
    from edgekd.safeio.onnxfile import check_onnx  # onnx

    files = [f.with_suffix(".onnx") for f in (before, after)]  # a file in ORT format has its graph beside it
    if not all(f.is_file() for f in files):
        return []
    old, new = (check_onnx(f, trusted=True).graph for f in files)
    return [*_conversions(old, new), *_still_float(new), *_odd_widths(old, new, quantum)]


def _conversions(old: Any, new: Any) -> list[str]:
    count = [Counter(n.op_type for n in g.node) for g in (old, new)]
    added = {op: count[1][op] - count[0][op] for op in ("QuantizeLinear", "DequantizeLinear", "Cast")}
    return (
        [f"{added['QuantizeLinear']} quantize and {added['DequantizeLinear']} dequantize nodes were added"]
        if added["QuantizeLinear"] > 0
        else []
    )


def _still_float(new: Any) -> list[str]:
    dequantized = {n.output[0] for n in new.node if n.op_type == "DequantizeLinear"}
    heavy = [n for n in new.node if n.op_type in _HEAVY]
    plain = [n for n in heavy if not any(i in dequantized for i in n.input)]
    return [f"{len(plain)} of {len(heavy)} heavy operators are still fp32"] if dequantized and plain else []


def _odd_widths(old: Any, new: Any, quantum: int) -> list[str]:
    if quantum <= 1:
        return []
    width = [{t.dims[0] for t in g.initializer if len(t.dims) == 4 and t.dims[0] > 1} for g in (old, new)]
    odd = sorted(w for w in width[1] - width[0] if w % quantum)
    return [f"{len(odd)} channel widths ({', '.join(map(str, odd[:4]))}) are no multiples of {quantum}"] if odd else []
