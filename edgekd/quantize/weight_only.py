"""int8 weights, fp32 arithmetic: each block of weights becomes bytes and one scale; the runtime multiplies them out once, when it loads the file.

When: flash or download size is the limit and the device computes in fp32 anyway, or accuracy after `ptq` is lost in the activations. Cost: nothing at
run time, no data; the file is nearly four times smaller, memory and latency stay as they were.
Source: block-wise absolute-maximum quantization as in Dettmers et al. 2022 (arXiv 2110.02861), section 2.1, with a linear grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.config import Config as Base
from edgekd.profile.precision import assert_fp32
from edgekd.quantize._quantizer import take_out, tidied
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LEVELS = 127


@register("quantize")
class WeightOnly:
    """Stores large float weights as int8 blocks."""

    class Config(Base):
        block: int = Field(64, ge=8, le=65_536, description="weights that share a scale")
        smallest: int = Field(512, ge=1, description="matrices with fewer values stay in fp32, and so do biases and norms")

    level = "graph"
    precision = "int8_weights"
    needs = "fp32"

    def __init__(self, config: Config):
        self.config = config

    def quantize(self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str) -> dict[str, Any]:
        """Writes the graph with packed weights; says how many tensors were packed and how far the worst is off, relative to its largest value."""
        import onnx
        from onnx import numpy_helper

        proto = onnx.load_model_from_string(graph.read_bytes())
        assert_fp32(proto, graph.name)
        body, worst, packed = proto.graph, 0.0, 0
        nodes: list[Any] = []
        for tensor in list(body.initializer):
            count = math.prod(tensor.dims)
            if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2 or count < max(self.config.smallest, self.config.block):
                continue
            values = numpy_helper.to_array(tensor)
            codes, scales = pack(values, self.config.block)
            worst = max(worst, float(abs(unpack(codes, scales, values.shape) - values).max() / max(abs(values).max(), 1e-30)))
            take_out(body, tensor.name)
            body.initializer.extend(_stored(tensor.name, codes, scales, values))
            nodes.extend(_restore(tensor.name, codes.size != values.size))
            packed += 1
        for node in reversed(nodes):
            body.node.insert(0, node)
        out.write_bytes(tidied(proto).SerializeToString(deterministic=True))
        return {"flavour": flavour, "tensors": packed, "max_relative_error": worst}


def pack(values: NDArray[np.float32], block: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes (blocks, block) and scales (blocks, 1); the last block is filled up with zeros."""
    import numpy as np

    flat = values.astype(np.float32).ravel()
    rows = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    scales = (np.abs(rows).max(1, keepdims=True) / np.float32(_LEVELS)).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(rows / scales).astype(np.int8), scales


def unpack(codes: NDArray[np.int8], scales: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """What the runtime computes when it loads the file."""
    return (codes.astype("float32") * scales).ravel()[: math.prod(shape)].reshape(shape)


def _stored(name: str, codes: Any, scales: Any, values: Any) -> list[Any]:
    import numpy as np
    from onnx import numpy_helper

    stored = {"codes": codes, "scales": scales, "shape": np.array(values.shape, np.int64)}
    if codes.size != values.size:
        stored |= {"flat": np.array([-1], np.int64), "start": np.array([0], np.int64), "end": np.array([values.size], np.int64)}
    return [numpy_helper.from_array(np.ascontiguousarray(v), f"{name}.{part}") for part, v in stored.items()]


def _restore(name: str, padded: bool) -> list[Any]:
    """Cast, multiply and reshape of constants, which every runtime folds at load."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", [f"{name}.codes"], [f"{name}.cast"], f"{name}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.cast", f"{name}.scales"], [f"{name}.scaled"], f"{name}.scale"),
    ]
    scaled = f"{name}.scaled"
    if padded:
        nodes.append(helper.make_node("Reshape", [scaled, f"{name}.flat"], [f"{name}.row"], f"{name}.flatten"))
        nodes.append(helper.make_node("Slice", [f"{name}.row", f"{name}.start", f"{name}.end"], [f"{name}.cut"], f"{name}.cut"))
        scaled = f"{name}.cut"
    return [*nodes, helper.make_node("Reshape", [scaled, f"{name}.shape"], [name], f"{name}.restore")]
