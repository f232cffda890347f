"""Half precision: every float tensor in 16 bits with explicit casts, except the operators of a keep-list.

When: the device computes fp16 faster than fp32 (GPUs, ARM with fp16), or the file must be half the size. Cost: seconds, no data. On x86 it is slower:
runtimes cast to fp32 around every operator. Range is the danger, not rounding: values beyond 65504 become infinite, so what sums or squares many of
them stays in fp32. Inputs and outputs keep their fp32 type.
Source: onnxruntime's float16 converter; keep-list after Micikevicius et al. 2018 (arXiv 1710.03740), section 3.3: reductions accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.config import Config as Base
from edgekd.errors import BackendError
from edgekd.profile.precision import assert_fp32
from edgekd.quantize._quantizer import tidied
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_REDUCTIONS = (
    "ReduceMean",
    "ReduceSum",
    "ReduceL2",
    "ReduceSumSquare",
    "Pow",
    "LayerNormalization",
    "InstanceNormalization",
    "LpNormalization",
)
_FLOAT = 1  # onnx.TensorProto.FLOAT; onnx itself is imported late


@register("quantize")
class FP16:
    """Casts a graph to 16-bit floats."""

    class Config(Base):
        keep_ops: tuple[str, ...] = Field(_REDUCTIONS, description="operators that stay in fp32")
        keep_nodes: tuple[str, ...] = Field((), description="nodes that stay in fp32, by name; `edgekd verify --against` proposes them")

    level = "graph"
    precision = "fp16"
    needs = "fp16"

    def __init__(self, config: Config):
        self.config = config

    def quantize(self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str) -> dict[str, Any]:
        """Writes the fp16 graph; raises BackendError with the converter's reason, or for a node of the keep-list that does not exist."""
        import onnx
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        proto = onnx.load_model_from_string(graph.read_bytes())
        assert_fp32(proto, graph.name)
        known = {n.name for n in proto.graph.node}
        missing = set(self.config.keep_nodes) - known
        if missing:
            raise BackendError(f"there is no node '{min(missing)}'", where=graph.name, hint="names as edgekd verify --against gives them")
        del proto.graph.value_info[:]  # the exporter's name weights as well, and the converter would cast those that it keeps
        try:
            proto = convert_float_to_float16(
                proto,
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *self.config.keep_ops],
                node_block_list=list(self.config.keep_nodes),
            )
            _without_twins(proto)
            _without_detours(proto, known)
            OnnxModel(proto).topological_sort(is_deterministic=True)  # the converter appends its casts at the end
        except (OSError, MemoryError):  # the machine's, not the graph's
            raise
        except Exception as error:  # the converter raises many unrelated types
            raise BackendError(f"the graph cannot be cast to fp16: {error}", where=graph.name, hint="leave the stage out") from error
        out.write_bytes(tidied(proto).SerializeToString(deterministic=True))
        return {"flavour": flavour, "Cast": sum(n.op_type == "Cast" for n in proto.graph.node)}


def _without_twins(proto: Any) -> None:
    """The converter casts a tensor once for each kept node that reads it, always under one name: one cast is enough."""
    seen: set[str] = set()
    for node in list(proto.graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            proto.graph.node.remove(node)
        seen.update(node.output)


def _without_detours(proto: Any, known: set[str]) -> None:
    """What one kept node hands to another, or to an output, stays in fp32: the converter casts it down and up again, and what is large becomes infinite.

    Casts of the graph's own, whose names are `known`, mean what they say.
    """
    body = proto.graph
    makers = {name: node for node in body.node for name in node.output}
    outputs = {o.name for o in body.output}
    for up in [n for n in body.node if n.op_type == "Cast" and n.name not in known]:
        down = makers.get(up.input[0])
        if down is None or down.op_type != "Cast" or down.name in known or down.input[0] not in makers or _to(up) != _FLOAT:
            continue
        source, target = down.input[0], up.output[0]
        body.node.remove(up)
        if target in outputs:  # an output keeps its name, so its maker takes it
            maker = makers[source]
            maker.output[list(maker.output).index(source)] = target
            makers[target] = maker
            source, target = target, source
        for node in body.node:
            node.input[:] = [source if name == target else name for name in node.input]
    read = {name for node in body.node for name in node.input} | outputs
    for node in [n for n in body.node if n.op_type == "Cast" and n.name not in known and n.output[0] not in read]:
        body.node.remove(node)


def _to(cast: Any) -> int:
    return int(next(a.i for a in cast.attribute if a.name == "to"))
