"""What a quantizer is: graph -> graph (calibrated), or model -> model (trained), never both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgekd.config import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from edgekd.quantize._learned import Seen


class GraphQuantizer(Protocol):
    """One file of this folder, registered with `@register("quantize")`, that works on an exported graph."""

    Config: ClassVar[type[Config]]
    level: ClassVar[str]  # "graph"
    precision: ClassVar[str]  # what its graphs are called from here on
    needs: ClassVar[str]  # what the runtime must compute in: fp32, fp16 or int8

    def __init__(self, config: Any) -> None: ...

    def quantize(self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str) -> dict[str, Any]:
        """Writes the quantized graph to `out`; `samples` are normalised inputs (batch, 3, h, w). Returns what was done."""


class ModelQuantizer(Protocol):
    """One file of this folder, registered with `@register("quantize")`, whose weights are trained.

    The stage `quantize_train` attaches, trains and bakes; the stage `quantize` then writes the grid into the exported graph, for each target.
    """

    Config: ClassVar[type[Config]]  # a `_learned.LearnedConfig`
    level: ClassVar[str]  # "model"
    precision: ClassVar[str]
    needs: ClassVar[str]

    def __init__(self, config: Any) -> None: ...

    def attach(self, model: nn.Module, seen: Seen, flavour: str) -> None:
        """Makes the model compute with quantized values, in place; what it adds is trained with the rest."""

    def bake(self, model: nn.Module) -> dict[str, Any]:
        """Leaves plain weights on the grid, in place; returns the grid as arrays by name."""

    def quantize(
        self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str, *, grid: Path | None = None
    ) -> dict[str, Any]:
        """Writes the exported graph with its weights as codes on the grid; returns what was done."""


def take_out(body: Any, weight: str) -> None:
    """Removes an initializer from a graph, and from its inputs: some files list their weights there as well."""
    for held in (body.initializer, body.input):
        for entry in [e for e in held if e.name == weight]:
            held.remove(entry)


def inner_nodes(body: Any) -> Iterator[Any]:
    """The nodes of the branches and loops of a graph, at any depth; they may read the graph's tensors by name."""
    for node in body.node:
        for attribute in node.attribute:
            for inside in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from inside.node
                yield from inner_nodes(inside)


def tidied(proto: Any) -> Any:
    """Without the opset imports that nothing uses any more, and without names of the tool that made it."""
    used = {n.domain for n in (*proto.graph.node, *inner_nodes(proto.graph))} | {"", "ai.onnx"}
    kept = [o for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.producer_name, proto.producer_version = "edgekd", ""
    del proto.metadata_props[:]
    return proto
