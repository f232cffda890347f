"""What onnxruntime refuses in a user's own ONNX file: the file's fault, said with its path, its node and a way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekd.errors import GraphRefused, OnnxRefused
from edgekd.export.opset import too_new
from edgekd.safeio.onnxfile import check_onnx, stamp_hint

_OPSET = re.compile(r"Opset (\d+) is under development")
_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_TWICE = re.compile(r"two nodes with same node name \((.*)\)")
_UNKNOWN = re.compile(r"(?:Fatal error: )?([\w.]*):(\w+)\(-?\d+\) is not a registered function/op")
_NAMES = (
    "name its nodes apart: python -c \"import onnx; m = onnx.load('OLD.onnx'); "
    "[setattr(n, 'name', f'{n.op_type}_{i}') for i, n in enumerate(m.graph.node)]; onnx.save(m, 'NEW.onnx')\""
)
_AGAIN = "export it again: torch.onnx.export(..., dynamo=True), and run it with onnxruntime where it was made"


@contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Inside, what a runtime refuses is refused as the file of that path."""
    try:
        yield
    except GraphRefused as problem:
        proto = check_onnx(path, trusted=True) if path.is_file() else None  # else a bundle
        raise _refusal(problem, str(path), proto) from problem


def _refusal(problem: GraphRefused, where: str, proto: Any) -> OnnxRefused:
    said = problem.what
    if found := _OPSET.search(said):
        return too_new(int(found[1]), where)
    if found := _IR.search(said):
        what = f"its IR version is {found[1]}, newer than onnxruntime takes"
        return OnnxRefused(what, where=where, expected=f"at most {found[2]}", hint=stamp_hint(proto) if proto else None)
    if found := _TWICE.search(said):
        return OnnxRefused(f"two of its nodes have the name '{found[1]}'", where=where, expected="a name for each node", hint=_NAMES)
    if found := _UNKNOWN.search(said):
        wanted, here = (found[2], found[1] or "ai.onnx"), proto.graph.node if proto else ()
        nodes = ", ".join(f"'{n.name}'" for n in here if (n.op_type, n.domain or "ai.onnx") == wanted)
        what = f"onnxruntime has no operator '{found[2]}' of domain '{found[1]}' (node {nodes or 'inside a subgraph'})"
        return OnnxRefused(
            what[:500], where=where, expected="standard operators", hint="export it again: torch.onnx.export(..., dynamo=True)"
        )
    return OnnxRefused(said, where=where, expected=problem.expected or "a graph that onnxruntime runs", hint=_AGAIN)
