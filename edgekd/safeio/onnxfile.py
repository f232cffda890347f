"""ONNX files from outside: one self-contained file of bounded size with known operators, or a refusal that names file and reason."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import FileMissing, OnnxRefused, ResourceError
from edgekd.safeio._child import run_confined
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    import onnx

_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_FOREIGN_OPS = frozenset({"EPContext"})  # holds, or names the path of, a compiled engine
_MAX_BYTES = 2 * 2**30 - 1  # what protobuf can hold
_MAX_NODES, _MAX_FUNCTIONS, _MAX_DEPTH = 100_000, 500, 8
_MAX_ELEMENTS, _MAX_ITERATIONS = 2**30, 2**20
_EXPECTED, _ALONE = "a valid ONNX model", "a self-contained ONNX model"
_AGAIN = "export it again: torch.onnx.export(model, inputs, 'NEW.onnx', dynamo=True)"
_ONE_FILE = "export it again into one file: torch.onnx.export(..., external_data=False)"
_STANDARD = "export it again with standard operators: torch.onnx.export(..., dynamo=True); what has none may be a function inside the file"
_STAMP = "if it was only stamped by a newer onnx: python -c \"import onnx; m = onnx.load('OLD.onnx'); m.ir_version = {version}; onnx.save(m, 'NEW.onnx')\""


def check_onnx(path: Path, *, max_bytes: int = _MAX_BYTES, trusted: bool = False, where: Path | None = None) -> onnx.ModelProto:
    """The parsed model. `trusted` (a verified store entry) skips the confined process and its full check. `where` is what messages call
    the file: a copy of it is what is read.

    Raises FileMissing, and OnnxRefused for damage, external data, unknown operators, and anything beyond the limits.
    """
    _check_file(path, max_bytes)
    shown = str(where or path)
    refuse = partial(OnnxRefused, where=shown)
    known = None if trusted else _examined(path, shown)
    with resource_errors(path):
        data = path.read_bytes()
    if known is not None and known != hashlib.sha256(data).hexdigest():
        raise refuse("the file changed while it was checked", expected="a file that nobody writes to", hint="run the same command again")
    try:
        model = _parsed(data)
        if trusted:
            _check_structure(model)
    except OnnxRefused as e:
        raise refuse(e.what, expected=e.expected, hint=e.hint or _AGAIN) from e
    return model


def _check_file(path: Path, max_bytes: int) -> None:
    if not path.is_file():
        raise FileMissing("no such file", where=str(path), expected="an ONNX model", hint="correct the path")
    if path.suffix.lower() == ".ort":  # of any file with that name onnxruntime reads a flatbuffer, so nothing here would have looked at it
        hint = "name the ONNX file that it was made of; in a bundle it lies beside it"
        raise OnnxRefused("files in ORT format are not read", where=str(path), expected="an ONNX model", hint=hint)
    if not 0 < path.stat().st_size <= max_bytes:
        raise OnnxRefused(f"it has {path.stat().st_size} bytes", where=str(path), expected=f"1 to {max_bytes} bytes", hint=_AGAIN)


def _examined(path: Path, where: str) -> str:
    """SHA-256 of the bytes that passed every check in a confined process."""
    with tempfile.TemporaryDirectory(prefix="edgekd-") as name, resource_errors(Path(name)):
        outcome = run_confined("onnx", path, Path(name))
    if not outcome.started:
        raise ResourceError(outcome.problem or "the confined reader could not start", where=where, hint="edgekd doctor")
    if outcome.problem is not None:
        raise OnnxRefused(outcome.problem, where=where, expected=outcome.expected or _EXPECTED, hint=outcome.hint or _AGAIN)
    return str(outcome.value["sha256"])


# ------------------------------------------------------------------------------------------------- in the confined process
def examine(source: Path, _folder: Path) -> dict[str, Any]:
    """Job of `_child`: structure, then ONNX's own full check, then the shapes it infers."""
    from onnx import checker, inliner, shape_inference  # in the confined process

    data = source.read_bytes()
    model = _parsed(data)
    _check_structure(model)
    _check_ir_version(model)
    try:
        checker.check_model(model, full_check=True)
    except Exception as e:  # ValidationError, InferenceError, and what protobuf and pybind raise
        raise OnnxRefused(f"it is not valid ONNX: {_one_line(e)}", expected=_EXPECTED) from e
    flat = inliner.inline_local_functions(model) if model.functions else model
    for message, _ in _messages(shape_inference.infer_shapes(flat, data_prop=True)):
        _check_dims(message)
    return {"sha256": hashlib.sha256(data).hexdigest()}


# ------------------------------------------------------------------------------------------------------------ the rules
def _parsed(data: bytes) -> onnx.ModelProto:
    import onnx  # heavy

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as e:  # protobuf's DecodeError
        raise OnnxRefused("it is not an ONNX file, or it is damaged", expected=_EXPECTED) from e
    if not model.HasField("graph") or not model.ir_version:
        raise OnnxRefused("it holds no model", expected=_EXPECTED)
    return model


def _check_structure(model: onnx.ModelProto) -> None:
    """Everything that can be told without running any of ONNX's own code."""
    own = {(f.domain, f.name) for f in model.functions}
    imports: set[str] = set()
    for message, depth in _messages(model):
        if depth > _MAX_DEPTH:
            raise OnnxRefused("its subgraphs are nested too deep", expected=f"at most {_MAX_DEPTH} levels")
        _check_external(message)
        _check_dims(message)
        _check_operator(message, own)
        if message.DESCRIPTOR.name == "OperatorSetIdProto":
            imports.add(message.domain)
    if unknown := imports - _DOMAINS - {domain for domain, _ in own}:  # after the nodes, which say more
        raise OnnxRefused(f"operator domain {min(unknown)[:80]!a} is not known", expected=f"one of {sorted(_DOMAINS)}", hint=_STANDARD)
    _check_size(model)
    _check_loops(model)


def _messages(root: Any) -> Iterator[tuple[Any, int]]:
    """Every message below `root` with its graph depth: whatever field a tensor or node hides in, it is seen."""
    stack = [(root, 0)]
    while stack:
        message, depth = stack.pop()
        depth += message.DESCRIPTOR.name == "GraphProto"
        yield message, depth
        for field, value in message.ListFields():
            if field.message_type is not None:
                stack.extend((child, depth) for child in ([value] if hasattr(value, "ListFields") else value))


def _check_external(message: Any) -> None:
    if message.DESCRIPTOR.name == "TensorProto" and (message.data_location or message.external_data):
        raise OnnxRefused(f"tensor {message.name[:80]!a} keeps its data in another file", expected=_ALONE, hint=_ONE_FILE)


def _check_dims(message: Any) -> None:
    kind = message.DESCRIPTOR.name
    if kind in ("TensorProto", "SparseTensorProto"):
        dims = list(message.dims)
    elif kind == "TensorShapeProto":
        dims = [d.dim_value for d in message.dim if d.HasField("dim_value")]
    else:
        return
    if min(dims, default=0) < 0 or math.prod(max(d, 1) for d in dims) > _MAX_ELEMENTS:
        raise OnnxRefused(f"a tensor of shape {dims[:8]} is too large", expected=f"at most {_MAX_ELEMENTS} elements")


def _check_operator(message: Any, own: set[tuple[str, str]]) -> None:
    if message.DESCRIPTOR.name != "NodeProto":
        return
    if (message.domain not in _DOMAINS and (message.domain, message.op_type) not in own) or message.op_type in _FOREIGN_OPS:
        raise OnnxRefused(
            f"operator {message.op_type[:80]!a} of domain {message.domain[:80]!a} is not known (node {message.name[:80]!a})",
            expected="standard operators",
            hint=_STANDARD,
        )


def _check_ir_version(model: onnx.ModelProto) -> None:
    """The checker's own words for it name no way out."""
    import onnx

    if model.ir_version > onnx.IR_VERSION:
        raise OnnxRefused(
            f"its IR version is {model.ir_version}, newer than onnx {onnx.__version__} reads",
            expected=f"at most {onnx.IR_VERSION}",
            hint=stamp_hint(model),
        )


def stamp_hint(model: onnx.ModelProto) -> str:
    """How a file gets the lowest IR version that its operators allow."""
    from onnx import helper

    known = [o for o in model.opset_import if (o.domain or "ai.onnx") in ("ai.onnx", "ai.onnx.ml")]
    return _STAMP.format(version=max(helper.find_min_ir_version_for(known, ignore_unknown=True), 8))


def _check_size(model: onnx.ModelProto) -> None:
    """Counts nodes as they will be once every function is written out where it is called."""
    if len(model.functions) > _MAX_FUNCTIONS:
        raise OnnxRefused(f"it has {len(model.functions)} functions", expected=f"at most {_MAX_FUNCTIONS}")
    bodies = {(f.domain, f.name): list(_nodes(f)) for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: list[Any], callers: frozenset[tuple[str, str]]) -> int:
        total = 0
        for node in nodes:
            name = (node.domain, node.op_type)
            if name in callers:
                raise OnnxRefused(f"function {node.op_type[:80]!a} calls itself", expected=_EXPECTED)
            if name in bodies and name not in sizes:
                sizes[name] = size(bodies[name], callers | {name})
            total += sizes.get(name, 1)
        return total

    total = max(size(nodes, frozenset({name})) for name, nodes in [*bodies.items(), (("graph", ""), list(_nodes(model.graph)))])
    if total > _MAX_NODES:
        raise OnnxRefused(f"it has {total} nodes", expected=f"at most {_MAX_NODES}")


def _check_loops(model: onnx.ModelProto) -> None:
    """A Loop must run a small constant number of times, or a file of a few bytes could run for years."""
    constants = _small_constants(model)
    total = 1
    for node in _nodes(model):
        if node.op_type == "Loop":
            counts = constants.get(node.input[0] if node.input else "", [])
            if not counts:
                raise OnnxRefused("a Loop runs an unknown number of times", expected=f"at most {_MAX_ITERATIONS} iterations")
            total *= max(1, *counts)
    if total > _MAX_ITERATIONS:
        raise OnnxRefused(f"its loops run {total} times", expected=f"at most {_MAX_ITERATIONS} iterations")


def _small_constants(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Name -> values of one-element integer constants of that name in any scope."""
    from onnx import numpy_helper

    found: dict[str, list[int]] = defaultdict(list)
    for message, _ in _messages(model):
        kind = message.DESCRIPTOR.name
        named = [(t.name, t) for t in message.initializer] if kind == "GraphProto" else []
        if kind == "NodeProto" and message.op_type == "Constant" and message.output:
            named = [(message.output[0], a.t) for a in message.attribute if a.name == "value"]
        for name, tensor in named:
            if tensor.data_type == tensor.INT64 and math.prod(tensor.dims) == 1:
                found[name].append(int(numpy_helper.to_array(tensor).reshape(-1)[0]))
    return found


def _nodes(root: Any) -> Iterator[Any]:
    return (message for message, _ in _messages(root) if message.DESCRIPTOR.name == "NodeProto")


def _one_line(e: Exception) -> str:
    return ascii(" ".join(str(e).split()))[1:-1][:300]


def fed_inputs(proto: Any) -> list[Any]:
    """The inputs that a caller feeds: some files list their weights among the inputs too."""
    held = {t.name for t in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in held]
