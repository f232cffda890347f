"""Two forms of one model whose outputs are of any shape: they are compared, and what is proposed fits how they differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support import run_here

X = ("n", 2, 4, 4)
TAILS = {  # shape of the output -> what makes it of (n, 2, 4, 4)
    "(n, 2, 4, 4)": ("Identity", {}, X),
    "(n, 2, 4)": ("ReduceMax", {"axes": [3], "keepdims": 0}, X[:3]),
    "(n, 2)": ("ReduceMax", {"axes": [2, 3], "keepdims": 0}, X[:2]),
    "(n)": ("ReduceMax", {"axes": [1, 2, 3], "keepdims": 0}, X[:1]),
    "()": ("ReduceMax", {"keepdims": 0}, ()),
}


def model(path: Path, factor: float, tail: str = "(n, 2, 4, 4)", *, half: bool = False) -> Path:
    """x * factor, reduced; `half`: through fp16."""
    kind, attributes, shape = TAILS[tail]
    constant = numpy_helper.from_array(np.array(factor, np.float16 if half else np.float32), "factor")
    nodes = [helper.make_node("Mul", ["low" if half else "x", "factor"], ["scaled"], "scale")]
    if half:
        nodes = [helper.make_node("Cast", ["x"], ["low"], "down", to=TensorProto.FLOAT16), *nodes]
        nodes += [helper.make_node("Cast", ["scaled"], ["high"], "up", to=TensorProto.FLOAT)]
    nodes += [helper.make_node(kind, ["high" if half else "scaled"], ["y"], "tail", **attributes)]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", X), ("y", shape))]
    body = helper.make_graph(nodes, "g", values[:1], values[1:], [constant])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("tail", TAILS)
def test_outputs_of_any_rank_are_compared(tmp_path: Path, tail: str) -> None:
    one, same, other = (model(tmp_path / f"{n}.onnx", f, tail) for n, f in (("one", 1.5), ("same", 1.5), ("other", -1.5)))
    found = run_here("verify", same, "--against", one, "--json")
    assert found.code == 0, found.text
    [row] = found.json()["rungs"]
    assert (row["ok"], row["max_abs"], "metric_delta" in row) == (True, 0, False)  # labels are not known
    assert run_here("verify", other, "--against", one).code == 4


def test_a_precision_is_proposed_only_where_one_was_lowered(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one.onnx", 1.5), model(tmp_path / "other.onnx", -1.5)
    for file, words in ((other, "export it again"), (model(tmp_path / "half.onnx", -1.5, half=True), "keep in higher precision: ")):
        refused = run_here("verify", file, "--against", one, "--json")
        assert (refused.code, words in refused.json()["error"]["hint"]) == (4, True), refused.text
