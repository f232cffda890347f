"""In which precision a graph is, read from its nodes; and that nothing that is rounded already is rounded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekd import registry
from edgekd.console import Console
from edgekd.errors import OnnxRefused
from edgekd.export.onnx import export_onnx
from edgekd.models.spec import ModelConfig
from edgekd.profile.precision import precision_of, rounded_nodes
from edgekd.quantize.fp16 import FP16
from edgekd.quantize.ptq import PTQ
from edgekd.quantize.weight_only import WeightOnly
from edgekd.stages import _common
from edgekd.stages._stage import Settings
from edgekd.stages.read_graph import ReadGraph

SIZE = 16
ROUNDED: dict[str, Any] = {"int8": PTQ, "fp16": FP16, "int8_weights": WeightOnly}
GRAPH_QUANTIZERS = [n for n in registry.names("quantize") if registry.load("quantize", n).level == "graph"]


def batches() -> Any:
    return iter([np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE), dtype=np.float32)])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small net in fp32, and what each quantizer makes of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1), nn.ReLU(), nn.Conv2d(40, 17, 3), nn.Flatten(), nn.Linear(17 * 36, 3)).eval()
    folder = tmp_path_factory.mktemp("graphs")
    export_onnx(net, SIZE, folder / "fp32.onnx")
    for name, method in ROUNDED.items():
        method(method.Config()).quantize(folder / "fp32.onnx", folder / f"{name}.onnx", batches(), "u8s8")
    return {name: folder / f"{name}.onnx" for name in ("fp32", *ROUNDED)}


@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_what_a_quantizer_made_is_told_from_the_nodes(graphs: dict[str, Path], precision: str) -> None:
    assert precision_of(onnx.load(graphs[precision])) == precision


def model_of(nodes: list[Any], constants: list[Any] = ()) -> Any:  # type: ignore[assignment]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:], constants))


@pytest.mark.parametrize(
    ("op", "precision"),
    [("QLinearConv", "int8"), ("MatMulInteger", "int8"), ("DynamicQuantizeMatMul", "int8"), ("QGemm", "int8"), ("Relu", "fp32")],
)
def test_an_operator_in_integers_is_known_by_its_name(op: str, precision: str) -> None:
    assert precision_of(model_of([helper.make_node(op, ["x"], ["y"], "it")])) == precision


def test_the_coarsest_node_counts_and_the_first_is_named_wherever_it_is() -> None:
    half = numpy_helper.from_array(np.zeros(3, np.float16), "w")
    branch = helper.make_graph([helper.make_node("Cast", ["x"], ["c"], "deep", to=TensorProto.FLOAT16)], "b", [], [])
    nodes = [
        helper.make_node("If", ["x"], ["a"], "if", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["a", "w"], ["h"], "add"),
        helper.make_node("ConvInteger", ["h"], ["y"], "conv"),
    ]
    assert [(r.node, r.precision) for r in rounded_nodes(model_of(nodes, [half]))] == [
        ("deep", "fp16"),
        ("deep", "fp16"),
        ("add", "fp16"),
        ("conv", "int8"),
    ]
    assert precision_of(model_of(nodes, [half])) == "int8"


def test_weights_as_indices_of_a_table_are_a_codebook() -> None:
    planes = numpy_helper.from_array(np.zeros((4, 8, 1), np.uint8), "w.planes")
    assert precision_of(model_of([helper.make_node("Cast", ["w.planes"], ["y"], "unpack", to=6)], [planes])) == "codebook"


@pytest.mark.parametrize("precision", list(ROUNDED))
@pytest.mark.parametrize("method", GRAPH_QUANTIZERS)
def test_every_quantizer_of_graphs_refuses_a_rounded_one_and_names_its_first_node(
    graphs: dict[str, Path], tmp_path: Path, method: str, precision: str
) -> None:
    cls = registry.load("quantize", method)
    first = next(rounded_nodes(onnx.load(graphs[precision])))
    with pytest.raises(OnnxRefused, match=f"quantized already: node '{first.node}' is a {first.op}") as caught:
        cls(cls.Config()).quantize(graphs[precision], tmp_path / "again.onnx", batches(), "u8s8")
    assert caught.value.exit_code == 3
    assert "edgekd profile" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ the stage
@pytest.fixture
def read(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`read_graph` on one of the graphs; the facts that it wrote."""

    def reads(name: str, *, side: int = SIZE, **facts: Any) -> dict[str, Any]:
        import json

        monkeypatch.setattr(_common, "open_dataset", lambda *_: SimpleNamespace(image_size=side, labelled=True))
        inputs: Any = {"data": None}
        context: Any = SimpleNamespace(console=Console(quiet=True), threads=1)
        ReadGraph().run(Settings("model", ModelConfig(onnx=graphs[name]), facts=facts), inputs, tmp_path, context)
        found: dict[str, Any] = json.loads((tmp_path / "graph.json").read_text())
        return found

    return reads


@pytest.mark.parametrize("precision", ["fp32", *ROUNDED])
def test_a_users_graph_is_called_what_it_is(read: Callable[..., dict[str, Any]], precision: str) -> None:
    assert read(precision)["precision"] == precision


def test_a_users_rounded_graph_is_refused_at_once_where_it_would_be_quantized(
    graphs: dict[str, Path], read: Callable[..., dict[str, Any]]
) -> None:
    assert read("fp32", quantizes=True)["precision"] == "fp32"
    with pytest.raises(OnnxRefused, match="quantized already") as caught:
        read("int8", quantizes=True)
    assert caught.value.where == str(graphs["int8"])


def test_a_size_that_does_not_fit_names_the_option_of_commands_and_of_recipes(read: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(OnnxRefused, match="its input is 16 x 16 pixels, the data are 64") as caught:
        read("fp32", side=64)
    assert f"--image-size {SIZE} for" in str(caught.value.hint)
    assert f"-o data.image_size={SIZE} for" in str(caught.value.hint)
