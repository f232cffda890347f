"""The search for operators worth quantizing, with injected latencies; and which operators follow those that are kept in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch

from edgekd.backends.openvino import OpenVino
from edgekd.console import Console
from edgekd.errors import BackendError, RecipeError
from edgekd.export.onnx import export_onnx
from edgekd.plan import build_plan
from edgekd.quantize._static import _layout
from edgekd.quantize.ptq import PTQ
from edgekd.recipe import load
from edgekd.stages.mix import Mix, _Search

NODES = [f"n{i}" for i in range(20)]  # in the order of the graph


class Search(_Search):
    """Times that follow from which nodes are quantized, and a drop of accuracy that follows as well."""

    def __init__(self, cost: Callable[[set[str]], float], evaluations: int, drop: Callable[[set[str]], float] = lambda _: 0.0):
        self.cost, self.drop = cost, drop
        self.config: Any = Mix.Config(evaluations=evaluations)
        self.ctx: Any = SimpleNamespace(console=Console(quiet=True), stop=SimpleNamespace(check=lambda: None))
        self.order = [(n, 1.0) for n in reversed(NODES)]  # the last ones are the densest
        self.method: Any = SimpleNamespace(in_order=lambda _, names: sorted(names, key=NODES.index))
        self.graph, self.trials = Path("base.onnx"), []

    def _against(self, chosen: set[str], other: set[str] | None) -> float:
        found = self.cost(chosen) / (1.0 if other is None else self.cost(other))
        self.trials.append({"quantized": sorted(chosen), "against": "it", "ratio": found})
        return found * 1.01

    def _ratio_of(self, chosen: set[str]) -> float:
        return self.cost(chosen)

    def _scores(self, graph: Any) -> Any:
        return np.zeros(4) if graph == self.graph else np.full(4, -self.drop(graph))

    def _built(self, chosen: set[str]) -> Any:
        return chosen

    def _worst(self, best: set[str]) -> set[str]:
        return {max(best, key=NODES.index)}


def additive(gains: dict[str, float]) -> Callable[[set[str]], float]:
    return lambda chosen: 1 - sum(gains[n] for n in chosen)


def test_nothing_is_quantized_where_every_set_is_slower() -> None:
    found = Search(additive(dict.fromkeys(NODES, -0.01)), 30).run()
    assert (found["quantized"], len(found["keep"])) == (0, 20)
    assert (found["chosen"], found["verdict"]) == ("before", "rolled back")


def test_everything_is_quantized_where_everything_gains() -> None:
    found = Search(additive(dict.fromkeys(NODES, 0.03)), 30).run()
    assert (found["keep"], found["quantized"]) == ([], 20)
    assert "0.40x the latency" in found["reason"]


def test_only_the_part_that_pays_is_quantized() -> None:
    gains = {n: (0.03 if i >= 12 else -0.03) for i, n in enumerate(NODES)}
    found = Search(additive(gains), 60).run()
    assert set(NODES) - set(found["keep"]) == set(NODES[12:])


def test_a_part_in_the_middle_is_found_by_switching_stretches() -> None:
    gains = {n: (0.04 if 6 <= i < 10 or i >= 18 else -0.02) for i, n in enumerate(NODES)}
    found = Search(additive(gains), 100).run()
    assert set(NODES) - set(found["keep"]) == {*NODES[6:10], *NODES[18:]}


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_no_more_graphs_are_measured_than_allowed(limit: int) -> None:
    found = Search(additive(dict.fromkeys(NODES, 0.01)), limit).run()
    assert sum("against" in t for t in found["trials"]) <= limit


def test_operators_go_back_until_the_drop_is_inside_the_limit() -> None:
    search = Search(additive(dict.fromkeys(NODES, 0.03)), 10, drop=lambda chosen: 0.002 * len(chosen))
    found = search.run()
    assert found["quantized"] == 5  # 0.002 * 5 is the limit of 0.01
    assert [t["drop"] for t in found["trials"] if "drop" in t][-1] <= 0.01


# ------------------------------------------------------------------------------------------------------------ the graph
@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("graph")
    export_onnx(timm.create_model("resnet10t", num_classes=4).eval(), 32, folder / "m.onnx")
    PTQ.prepare(folder / "m.onnx", folder / "prepared.onnx")
    return folder / "prepared.onnx"


def batches() -> Any:
    return iter([np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)])


def rounded(path: Path) -> set[str]:
    """Operators of which an input comes from a DequantizeLinear."""
    body = onnx.load(path).graph
    made = {o for n in body.node if n.op_type == "DequantizeLinear" for o in n.output}
    return {n.name for n in body.node if set(n.input) & made and n.op_type != "QuantizeLinear"}


def test_what_is_kept_stays_in_fp32_and_so_does_what_only_it_feeds(graph: Path, tmp_path: Path) -> None:
    names = [n for n, _ in PTQ.candidates(graph)]
    chosen = set(names[:3])
    keep = tuple(n for n in names if n not in chosen)
    PTQ(PTQ.Config(keep_nodes=keep)).quantize(graph, tmp_path / "m.onnx", batches(), "u8s8")
    assert {n for n in rounded(tmp_path / "m.onnx") if n in names} == chosen
    adds = {n.name for n in onnx.load(graph).graph.node if n.op_type == "Add"}
    assert adds
    assert set(_layout(graph, keep).left) >= adds | set(keep)  # each of them gets a tensor from a convolution in fp32


def test_known_ranges_give_the_same_graph_without_data(graph: Path, tmp_path: Path) -> None:
    quantizer = PTQ(PTQ.Config())
    quantizer.quantize(graph, tmp_path / "a.onnx", batches(), "u8s8", ranges=tmp_path / "ranges.json")
    quantizer.quantize(graph, tmp_path / "b.onnx", iter([]), "u8s8", ranges=tmp_path / "ranges.json")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_graph_of_which_everything_is_kept_is_not_called_int8(graph: Path, tmp_path: Path) -> None:
    keep = tuple(n for n, _ in PTQ.candidates(graph))
    done = PTQ(PTQ.Config(keep_nodes=keep)).quantize(graph, tmp_path / "m.onnx", batches(), "u8s8")
    assert (done["precision"], done["QuantizeLinear"]) == ("fp32", 0)


def test_without_known_times_everything_is_quantized_and_that_is_said() -> None:
    class Slow(Search):
        def _against(self, chosen: set[str], other: set[str] | None) -> float:
            self.trials.append({"quantized": sorted(chosen), "against": "it", "ratio": None})
            return float("inf")

    search = Slow(additive(dict.fromkeys(NODES, 0.1)), 5)
    found = search.run()
    assert (found["keep"], found["chosen"]) == ([], "after")
    assert "everything is quantized" in search.ctx.console.warnings[0]


def test_nodes_without_a_name_are_candidates_too(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, tmp_path / "bare.onnx")
    PTQ.prepare(tmp_path / "bare.onnx", tmp_path / "named.onnx")
    found = [n for n, _ in PTQ.candidates(tmp_path / "named.onnx")]
    assert len(found) == len(set(found)) == len(PTQ.candidates(graph))


def test_a_node_to_keep_that_is_not_there_is_named(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no node 'conv99'"):
        PTQ(PTQ.Config(keep_nodes=("conv99",))).quantize(graph, tmp_path / "m.onnx", batches(), "u8s8")


# ------------------------------------------------------------------------------------------------------------ the plan
RECIPE = "version: 1\ndata: {format: digits, image_size: 32}\nmodel: {arch: resnet10t}\nstages: [{quantize: {METHOD}}]\ntargets: {host: {}, rpi5: {}}\n"


def test_a_search_is_planned_for_targets_that_can_be_measured_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "available", lambda self: "not installed")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("METHOD", "search: 6"))
    plan = build_plan(load(str(tmp_path / "r.yaml")))
    assert [s.name for s in plan.steps if s.stage == "mix"] == ["quantize.mix"]
    assert plan.step("quantize").inputs["mix?"] == "quantize.mix"
    assert any("a search needs the device" in note for note in plan.notes)


def test_no_search_by_latency_where_the_budget_names_the_size(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("METHOD", "search: 6").replace("host: {}", "host: {budget: {size_mb: 4}}"))
    plan = build_plan(load(str(tmp_path / "r.yaml")))
    assert not [s.name for s in plan.steps if s.stage == "mix"]
    assert "host: 'quantize' quantizes everything, the budget names the size" in plan.notes


def test_a_method_without_operators_to_choose_from_cannot_search(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("METHOD", "method: weight_only, search: 6"))
    with pytest.raises(RecipeError, match="no operators to choose from"):
        build_plan(load(str(tmp_path / "r.yaml")))
