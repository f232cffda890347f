"""What a quantizer is: graph -> graph (calibrated), or model -> model (trained), never both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgekd.config import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class GraphQuantizer(Protocol):
    """One file of this folder, registered with `@register("quantize")`, that works on an exported graph."""

    Config: ClassVar[type[Config]]
    level: ClassVar[str]  # "graph"
    precision: ClassVar[str]  # what its graphs are called from here on
    needs: ClassVar[str]  # what the runtime must compute in: fp32, fp16 or int8

    def __init__(self, config: Any) -> None: ...

    def quantize(self, graph: Path, out: Path, samples: Iterator[NDArray[np.float32]], flavour: str) -> dict[str, Any]:
        """Writes the quantized graph to `out`; `samples` are normalised inputs (batch, 3, h, w). Returns what was done."""


def tidied(proto: Any) -> Any:
    """Without the opset imports that nothing uses any more, and without names of the tool that made it."""
    used = {n.domain for n in proto.graph.node} | {"", "ai.onnx"}
    kept = [o for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.producer_name, proto.producer_version = "edgekd", ""
    del proto.metadata_props[:]
    return proto
