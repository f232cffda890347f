"""Where a graph's values stop being finite on some images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def first_not_finite(graph: Path, images: NDArray[np.float32]) -> Any:
    """The first node whose output is not finite while its inputs are, else the first that makes a NaN of none; of the first image with such a node.

    Infinities among the constants (they mask attention) are meant, and so are those that come of them. None where there is no such node.
    """
    import numpy as np
    import onnx

    from edgekd.safeio.onnxfile import fed_inputs

    proto = onnx.load_model_from_string(graph.read_bytes())
    [entry] = fed_inputs(proto)
    session, size = _showing_all(proto), int(entry.type.tensor_type.shape.dim[0].dim_value) or 1
    names = [o.name for o in session.get_outputs() if o.type in ("tensor(float)", "tensor(float16)", "tensor(double)")]
    constants = {t.name for t in proto.graph.initializer if not _finite(onnx.numpy_helper.to_array(t))}
    for start in range(0, len(images) - size + 1, size):  # one at a time: every tensor of the graph is held
        feeds = {entry.name: images[start : start + size]}
        values = dict(zip(names, session.run(names, feeds), strict=True))
        infinite = {n for n, v in values.items() if not np.isfinite(v).all()}
        undefined = {n for n in infinite if np.isnan(values[n]).any()}
        for bad, given in ((infinite, constants), (undefined, set[str]())):
            for node in proto.graph.node:
                if bad & set(node.output) and not (bad | given) & set(node.input):
                    return node
    return None


def _finite(values: Any) -> bool:
    import numpy as np

    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _showing_all(proto: Any) -> Any:
    """A session that gives every tensor of the graph, unfused, as its output."""
    import onnx
    import onnxruntime as ort

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for node in copy.graph.node for name in node.output if name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
