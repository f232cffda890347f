"""Where two graphs of one model part: intermediate tensors of the same name are compared in order, and the first that breaks names its node.

Graphs share names as far as the exporter and the quantizer keep them: a quantized graph computes `x` and goes on with its rounded copy, so `x` still
shows what reached it. Both run without graph optimization, which would fuse the tensors away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import Tensor, nn

    Feeds = Mapping[str, np.ndarray[Any, Any]]
    Values = dict[str, np.ndarray[Any, Any]]
    Runner = Callable[[onnx.ModelProto, list[str], Feeds], Values]  # intermediate tensors of a graph by name

_LIMITS = {"fp32": {"min_cosine": 0.999, "max_relative": 1e-2}, "fp16": {"min_cosine": 0.99, "max_relative": 0.1}}
_ROUNDED = {"min_cosine": 0.9, "max_relative": float("inf")}  # one value of a rounded tensor may be far off; its direction may not
_FOLDED = 2  # layers that an exporter may fold into the one before
_CHUNK = 40  # intermediate tensors that are held at once
_EPS = 1e-12
_ROUNDING = ("QuantizeLinear", "DequantizeLinear", "Cast")


@dataclass(frozen=True)
class Compared:
    """A node of the second graph whose output the first one has too: cosine and error relative to the largest value."""

    node: str
    op: str
    module: str
    tensor: str
    cosine: float
    max_relative: float

    def said(self) -> str:
        part = f", module '{self.module}'" if self.module else ""
        return f"node '{self.node}' ({self.op}{part}): cosine {self.cosine:.4f}, error {self.max_relative:.2g} of the largest value"


def compare_tensors(
    reference: onnx.ModelProto, other: onnx.ModelProto, feeds: Feeds, other_feeds: Feeds, run: Runner | None = None
) -> list[Compared]:
    """Every tensor that both graphs compute under one name with one shape, in the order of `other`, which `run` may run on another runtime.

    Where `other` only rounds or casts to get a tensor, the node is the one of `reference` that computes it.
    """
    makers = {name: node for node in reference.graph.node for name in node.output if name}
    places = {name: node for node in other.graph.node for name in node.output if name in makers}
    places = {name: makers[name] if node.op_type in _ROUNDING else node for name, node in places.items()}
    modules, found = _modules(reference) | _modules(other), []
    names = list(places)
    for start in range(0, len(names), _CHUNK):
        chunk = names[start : start + _CHUNK]
        a, b = _values(reference, chunk, feeds), (run or _values)(other, chunk, other_feeds)
        for name in chunk:
            if name in a and name in b and a[name].shape == b[name].shape and a[name].size:
                node = places[name]
                cosine, relative = _distance(a[name], b[name])
                found.append(Compared(node.name or name, node.op_type, modules.get(name, ""), name, cosine, relative))
    return found


def compare_modules(module: nn.Module, images: Tensor, proto: onnx.ModelProto, feeds: Feeds) -> list[Compared]:
    """Every tensor that a node with weights makes, against what torch computes there, in the order of the graph.

    Exporters fold what follows a layer into it (a batch norm, a bias, an activation), so a tensor may be the output of the layer of its weights or of
    one of the next two that run; the nearest counts.
    """
    order, seen = _recorded(module, images)
    modules = _modules(proto)
    held = {t.name for t in proto.graph.initializer}
    places = {n.output[0]: n for n in proto.graph.node if any(i in held and "." in i for i in n.input) and modules.get(n.output[0]) in seen}
    found = []
    names = list(places)
    for start in range(0, len(names), _CHUNK):
        chunk = names[start : start + _CHUNK]
        for name, value in _values(proto, chunk, feeds).items():
            at = order.index(modules[name])
            near = [seen[m] for m in order[at : at + 1 + _FOLDED] if seen[m].shape == value.shape]
            if near and value.size:
                cosine, relative = min((_distance(other, value) for other in near), key=lambda d: (d[1], -d[0]))
                found.append(Compared(places[name].name or name, places[name].op_type, modules[name], name, cosine, relative))
    return found


def _recorded(module: nn.Module, images: Tensor) -> tuple[list[str], Values]:
    """Names of the leaves in the order in which they first run, and what each gives then."""
    import torch

    seen: Values = {}
    leaves = {name: m for name, m in module.named_modules() if name and not any(True for _ in m.children())}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen.setdefault(name, output.detach().numpy())

        return hook

    hooks = [m.register_forward_hook(keep(name)) for name, m in leaves.items()]
    try:
        with torch.inference_mode():
            module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen), seen


def tensor_limits(precision: str) -> dict[str, float]:
    """How far an intermediate tensor may be off in a precision."""
    return _LIMITS.get(precision, _ROUNDED)


def first_break(tensors: list[Compared], *, min_cosine: float, max_relative: float) -> Compared | None:
    """The first tensor that lies outside the limits."""
    return next((t for t in tensors if not (t.cosine >= min_cosine and t.max_relative <= max_relative)), None)


def steepest(tensors: list[Compared], count: int) -> list[Compared]:
    """The nodes at which the cosine falls most: what to keep in a higher precision first."""
    drops, before = [], 1.0
    for t in tensors:
        drops.append((before - t.cosine, t))
        before = min(before, t.cosine)
    return [t for drop, t in sorted(drops, key=lambda d: -d[0])[:count] if drop > 0]


def beyond(model: onnx.ModelProto, feeds: Feeds, limit: float) -> set[str]:
    """The nodes that make or read a value whose size is over `limit`."""
    import numpy as np

    names, large = [name for node in model.graph.node for name in node.output if name], set[str]()
    for start in range(0, len(names), _CHUNK):
        values = _values(model, names[start : start + _CHUNK], feeds)
        large |= {name for name, value in values.items() if value.size and float(np.abs(value).max()) > limit}
    return {node.name for node in model.graph.node if large & {*node.input, *node.output}}


def with_makers(model: onnx.ModelProto, nodes: set[str]) -> set[str]:
    """The nodes and what makes their inputs, back to the nearest nodes with weights: a tensor is rounded where it is made."""
    held = {t.name for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    named = {node.name: node for node in model.graph.node}
    found, waiting = set(nodes), [makers[i] for n in nodes if n in named for i in named[n].input if i in makers]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            if not any(i in held and "." in i for i in node.input):
                waiting += [makers[i] for i in node.input if i in makers]
    return found


def _distance(a: Any, b: Any) -> tuple[float, float]:
    import numpy as np

    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not np.isfinite(y).all():
        return 0.0, float("inf")
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    same = bool(np.array_equal(x, y))
    return 1.0 if same else float(x @ y) / max(size, _EPS), float(np.abs(x - y).max()) / max(float(np.abs(x).max()), _EPS)


def showing(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy that gives these intermediate tensors as its outputs."""
    import onnx

    own = {n for node in model.graph.node for n in node.output}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n in own)  # runtimes infer their types
    return copy


def _values(model: onnx.ModelProto, names: list[str], feeds: Feeds) -> dict[str, Any]:
    """Values of intermediate tensors, floats only."""
    import onnxruntime as ort

    copy = showing(model, names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    floats = [o.name for o in session.get_outputs() if o.type in ("tensor(float)", "tensor(float16)")]
    return dict(zip(floats, session.run(floats, dict(feeds)), strict=True)) if floats else {}


def _modules(model: onnx.ModelProto) -> dict[str, str]:
    """Tensor -> the torch module whose parameters its node uses, read from the parameters' names, or that of the nearest node before it."""
    held = {t.name for t in model.graph.initializer}
    found: dict[str, str] = {}
    origin: dict[str, str] = {name: name for name in held}  # a weight behind Q/DQ nodes is still that weight
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        own = next((origin[n] for n in node.input if n in origin and "." in origin[n]), "")  # `layer1.0.conv1.weight` and what made it
        before = next((found[n] for n in node.input if found.get(n)), "")
        for name in node.output:
            found[name] = own.rpartition(".")[0] if own else before
    return found
