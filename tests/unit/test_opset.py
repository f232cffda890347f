"""Opsets: old graphs are brought up with the same outputs, what no runtime takes is refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import OnnxRefused
from edgekd.export.opset import NEWEST, OLDEST, QUANTIZES, opset_of, raised


def net(opset: int, *, op: str = "Relu") -> Any:
    """A convolution, an activation, a mean and a matrix product, as exporters of that time wrote them: weights among the inputs."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 3, 3, 3)).astype("f"), "m": rng.standard_normal((8, 3)).astype("f")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", kernel_shape=[3, 3]),
        helper.make_node(op, ["c"], ["r"], "act"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], "mean"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "m"], ["y"], "fc"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(v.shape)) for n, v in weights.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if opset < QUANTIZES else 8)


@pytest.mark.parametrize("opset", [OLDEST, 9, 11, 12])
def test_an_old_graph_is_brought_up_and_stays_the_same_function(opset: int) -> None:
    import onnxruntime

    old = net(opset)
    new = raised(old, "old.onnx")
    assert opset_of(new) >= QUANTIZES
    onnx.checker.check_model(new)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 32, 32), dtype=np.float32)}
    outputs = [
        onnxruntime.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0] for p in (old, new)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5)


@pytest.mark.parametrize("opset", [QUANTIZES, 18, NEWEST])
def test_a_graph_that_can_be_quantized_stays_as_it_is(opset: int) -> None:
    proto = net(opset)
    assert raised(proto, "new.onnx") is proto


@pytest.mark.parametrize(("opset", "words"), [(OLDEST - 1, "older than runtimes take"), (NEWEST + 1, "newer than runtimes take")])
def test_what_no_runtime_takes_is_refused(opset: int, words: str) -> None:
    with pytest.raises(OnnxRefused, match=f"opset {opset}, {words}") as caught:
        raised(net(opset), "odd.onnx")
    assert "opset_version" in str(caught.value.hint)


def test_what_the_converter_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = net(18)
    changed = next(t for t in wrong.graph.initializer if t.name == "m")
    changed.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(changed) * 2, "m"))
    monkeypatch.setattr(onnx.version_converter, "convert_version", lambda *_: wrong)
    with pytest.raises(OnnxRefused, match="outputs differ by"):
        raised(net(11), "old.onnx")


def test_what_the_converter_cannot_do_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no adapter for Upsample")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuses)
    with pytest.raises(OnnxRefused, match="cannot be brought to 18: no adapter for Upsample"):
        raised(net(11), "old.onnx")
