"""Static int8 after training: Q/DQ nodes by onnxruntime's quantizer, calibrated on training images.

When: the target runs int8 faster than fp32, or the file must be four times smaller. Cost: seconds. The flavour comes from the device: unsigned
activations on x86 (with 7-bit weights where there is no VNNI), symmetric ones without int32 biases for ARM and TensorRT, which are slow on x86.
Source: Jacob et al. 2018 (arXiv 1712.05877); rules for graphs that runtimes accept: NVIDIA and onnxruntime documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.config import Config as Base
from edgekd.quantize._static import WEIGHTED, prepare, static_int8
from edgekd.registry import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@register("quantize")
class PTQ:
    """Post-training static quantization."""

    class Config(Base):
        samples: int = Field(
            256,
            ge=1,
            le=100_000,
            description="training images used for calibration",
        )
        calibration: Literal["auto", "minmax", "entropy", "percentile"] = Field(
            "auto", description="how activation ranges are chosen; auto: by accuracy on val"
        )
        per_channel: bool = Field(True, description="one weight scale an output channel")
        keep_nodes: tuple[str, ...] = Field((), description="nodes that stay in fp32, by name; `edgekd verify --against` proposes them")

    level = "graph"
    precision = "int8"
    needs = "int8"
    prepare = staticmethod(prepare)

    def __init__(self, config: Config):
        self.config = config

    @staticmethod
    def candidates(prepared: Path) -> list[tuple[str, float]]:
        """Names of the operators with weights and their operations for each byte that passes, densest first."""
        import onnx

        from edgekd.profile.workload import works

        proto = onnx.load_model_from_string(prepared.read_bytes())
        known = {n.name for n in proto.graph.node if n.op_type in WEIGHTED}
        dense = [(w.name, w.flops / max(w.activation_bytes, 1.0)) for w in works(proto) if w.name in known]
        return sorted(dense, key=lambda d: (-d[1], d[0]))

    @staticmethod
    def in_order(prepared: Path, names: list[str]) -> list[str]:
        """The same names in the order of the graph."""
        import onnx

        wanted = set(names)
        return [n.name for n in onnx.load_model_from_string(prepared.read_bytes()).graph.node if n.name in wanted]

    def quantize(
        self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str, *, ranges: Path | None = None
    ) -> dict[str, Any]:
        """Writes the int8 graph; raises BackendError with the quantizer's reason. `ranges` keeps what calibration found for the next call."""
        done = static_int8(
            graph,
            out,
            samples,
            flavour=flavour,
            calibration=self.config.calibration,
            per_channel=self.config.per_channel,
            keep=self.config.keep_nodes,
            ranges=ranges,
        )
        return done | {"samples": self.config.samples}
