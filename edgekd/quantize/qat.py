"""Quantized distillation with int8 arithmetic: weights and inputs are rounded while the student trains, with the teacher's loss in it.

When: `ptq` loses too much, or fewer than 8 bits are wanted. Cost: a training run. Steps are learned with the weights (`lsq`) or follow what is seen
(`minmax`); the first and the last layer keep 8 bits. The file has standard Q/DQ nodes with int8 codes: fewer bits make neither the file smaller nor
the runtime faster by themselves, they are for accuracy experiments and for hardware that has them.
Source: LSQ, Esser et al. 2020 (arXiv 1902.08153); ranges and folding: Jacob et al. 2018 (arXiv 1712.05877), section 3; distillation while quantizing:
Polino et al. 2018 (arXiv 1802.05668), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.quantize._learned import LearnedConfig, Seen, load_grid
from edgekd.quantize._match import find_weights
from edgekd.quantize._static import Overrides, static_int8
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

Width = Literal[2, 3, 4, 8]
_EDGE = 8  # bits of the first and the last layer


@register("quantize")
class QAT:
    """Quantization-aware training with a teacher."""

    class Config(LearnedConfig):
        weight_bits: Width = Field(8, description="bits of the weights")
        activation_bits: Width = Field(8, description="bits of the layers' inputs")
        steps: Literal["lsq", "minmax"] = Field("lsq", description="lsq learns step sizes, minmax takes the largest magnitude")
        edges: bool = Field(True, description="keep 8 bits in the first and the last layer")
        optimizer: Literal["adamw", "sgd"] = Field("sgd", description="AdamW, or SGD with Nesterov momentum")
        lr: float = Field(0.01, gt=0, description="peak learning rate")
        weight_decay: float = Field(
            1e-4, ge=0, description="decay of matrices and kernels; LSQ: 1e-4 at 4 and 8 bits, 5e-5 at 3, 2.5e-5 at 2"
        )

    level = "model"
    precision = "int8"
    needs = "int8"

    def __init__(self, config: Config):
        self.config = config

    def attach(self, model: nn.Module, seen: Seen, flavour: str) -> None:
        """Quantizers on every convolution and linear layer; raises InputRefused where there is none."""
        from edgekd.quantize._attach import Bits, attach, sites

        found = sites(model, seen.batches)
        plain, edge = Bits(self.config.weight_bits, self.config.activation_bits), Bits(_EDGE, _EDGE)
        edges = {found[0].name, found[-1].name} if self.config.edges else set()
        bits = {s.name: edge if s.name in edges else plain for s in found}
        attach(model, found, bits, learned=self.config.steps == "lsq", unsigned_high=127 if flavour == "s8s8" else 255)

    def bake(self, model: nn.Module) -> dict[str, Any]:
        import numpy as np

        from edgekd.quantize._attach import bake

        grid = bake(model)
        arrays = {f"{layer}/codes": codes for layer, codes in grid.codes.items()}
        arrays |= {f"{layer}/steps": steps for layer, steps in grid.steps.items()}
        return arrays | {f"{layer}/input": np.array(limits, np.float64) for layer, limits in grid.inputs.items()}

    def quantize(
        self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str, *, grid: Path | None = None
    ) -> dict[str, Any]:
        """Writes the Q/DQ graph on the trained grid; tensors without a trained range (residual sums) get a calibrated one of 8 bits."""
        arrays = load_grid(grid) if grid is not None else {}
        done = static_int8(graph, out, samples, flavour=flavour, trained=lambda proto: _overrides(proto, arrays, flavour))
        return done | {"weight_bits": self.config.weight_bits, "activation_bits": self.config.activation_bits}


def _overrides(proto: Any, arrays: dict[str, Any], flavour: str) -> Overrides:
    """The trained scales as onnxruntime's quantizer takes them, after clips were put before inputs of fewer than 8 bits."""
    import numpy as np

    layers = [n.removesuffix("/codes") for n in arrays if n.endswith("/codes")]
    weights = {
        n: arrays[f"{n}/codes"].astype(np.float64) * arrays[f"{n}/steps"].reshape(-1, *[1] * (arrays[f"{n}/codes"].ndim - 1))
        for n in layers
    }
    places, found = find_weights(proto, weights), Overrides()
    readers = {p.initializer: layer for layer, p in places.items()}
    clips: dict[tuple[str, float, float], str] = {}
    for node in proto.graph.node:
        layer = next((readers[n] for n in node.input[1:2] if n in readers), None)
        if layer is None:
            continue
        place = places[layer]
        # With 7-bit weights (x86 without VNNI) the trained 8-bit codes may not be used: their products could overflow.
        if flavour != "u8s8_reduced" or np.abs(arrays[f"{layer}/codes"]).max(initial=0) < 64:
            steps = place.factor * arrays[f"{layer}/steps"]
            found[place.initializer] = [
                {"axis": place.axis, "scale": np.array(s if s else 1.0, np.float32), "zero_point": np.array(0, np.int8)}
                for s in np.abs(steps)
            ]
        if f"{layer}/input" not in arrays:
            continue
        step, low, high = (float(v) for v in arrays[f"{layer}/input"])
        if high - low < 127:
            wanted = (str(node.input[0]), step * low, step * high)
            node.input[0] = clips.setdefault(wanted, f"{node.input[0]}.clipped{len(clips)}")
        found[node.input[0]] = [_input_scale(step, int(low), int(high), flavour)]
    _insert(proto, clips)
    return found


def _input_scale(step: float, low: int, high: int, flavour: str) -> dict[str, Any]:
    """Scale and zero point of an input: the trained grid itself, or the same range in other steps where the type does not hold it."""
    import numpy as np
    from onnxruntime.quantization import QuantType

    if flavour == "s8s8" or (flavour == "x8s8" and low < 0):
        wider = step * max(high, 127) / 127 if low == 0 and high > 127 else step
        return {"scale": np.array(wider, np.float32), "zero_point": np.array(0, np.int8), "quant_type": QuantType.QInt8}
    if low == 0:
        return {"scale": np.array(step * 127 / 255 if high == 127 else step, np.float32), "zero_point": np.array(0, np.uint8)}
    return {"scale": np.array(step, np.float32), "zero_point": np.array(128, np.uint8)}


def _insert(proto: Any, clips: dict[tuple[str, float, float], str]) -> None:
    """A clip before the first node that reads its output."""
    import numpy as np
    from onnx import helper, numpy_helper

    waiting, nodes = {name: wanted for wanted, name in clips.items()}, []
    for node in list(proto.graph.node):
        for name in [n for n in node.input if n in waiting]:
            source, low, high = waiting.pop(name)
            ends = {f"{name}.low": low, f"{name}.high": high}
            proto.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), n) for n, v in ends.items())
            nodes.append(helper.make_node("Clip", [source, *ends], [name], name))
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
