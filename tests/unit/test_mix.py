"""The search for operators worth quantizing, with injected latencies; and which operators follow those that are kept in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnxruntime.quantization import shape_inference

from edgekd.backends.openvino import OpenVino
from edgekd.console import Console
from edgekd.errors import BackendError, RecipeError
from edgekd.export.onnx import export_onnx
from edgekd.plan import build_plan
from edgekd.quantize._static import _layout
from edgekd.quantize.ptq import PTQ
from edgekd.recipe import load
from edgekd.stages import _common
from edgekd.stages._partial import PartialGraphs
from edgekd.stages._stage import Settings
from edgekd.stages.mix import _TRIES, Mix, _Search
from edgekd.stages.sensitivity import _rows

NODES = [f"n{i}" for i in range(20)]  # in the order of the graph


Cost = Callable[[set[str]], float]


class Graphs:
    """Operators with nothing behind them; the last ones are the densest."""

    unknown = ""
    operators = list(reversed(NODES))

    def in_order(self) -> list[str]:
        return NODES


class Search(_Search):
    """Times that follow from which nodes are quantized, and a drop of accuracy that follows as well."""

    def __init__(self, cost: Cost, evaluations: int, drop: Cost = lambda _: 0.0, alone: tuple[str, ...] = ()):
        rows = [{"node": n, "ratio": cost({n}), "ci95": [cost({n})] * 2, "drop": drop({n}), "error": 0.0} for n in alone]
        context: Any = SimpleNamespace(console=Console(quiet=True), stop=SimpleNamespace(check=lambda: None))
        super().__init__(Graphs(), rows, Mix.Config(evaluations=evaluations), context)  # type: ignore[arg-type]
        self.cost, self.drop = cost, drop

    def _against(self, chosen: set[str], other: set[str] | None) -> float:
        found = self.cost(chosen) / (1.0 if other is None else self.cost(other))
        self.trials.append({"quantized": sorted(chosen), "against": "it", "ratio": found})
        return found * 1.01

    def _compared(self, chosen: set[str], other: set[str] | None) -> dict[str, Any]:
        ratio = self.cost(chosen)
        return {"ratio": ratio, "ci95": [ratio * 0.99, ratio * 1.01]}

    def _scores(self, chosen: set[str]) -> Any:
        return np.full(4, -self.drop(chosen) if chosen else 0.0)

    def _steepest(self, best: set[str]) -> list[str]:
        return sorted(best, key=NODES.index, reverse=True)


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


def test_operators_that_gain_alone_are_found_wherever_they_are() -> None:
    gaining = {NODES[2], NODES[7], NODES[13]}
    gains = {n: (0.05 if n in gaining else -0.03) for n in NODES}
    assert set(NODES) - set(Search(additive(gains), 12, alone=tuple(NODES)).run()["keep"]) == gaining
    assert set(NODES) - set(Search(additive(gains), 12).run()["keep"]) != gaining  # nested sets and stretches alone do not see them


def test_the_operator_that_costs_most_accuracy_for_its_gain_goes_back_first() -> None:
    gains = dict.fromkeys(NODES, 0.03) | {NODES[4]: 0.01}
    losing = {NODES[4]: 0.02, NODES[9]: 0.02}
    search = Search(additive(gains), 4, drop=lambda chosen: sum(losing.get(n, 0.0) for n in chosen), alone=tuple(NODES))
    found = search.run()
    assert {NODES[4], NODES[9]} <= set(found["keep"])
    assert len(found["keep"]) <= 4  # two at a time


ALL_GAIN = additive(dict.fromkeys(NODES, 0.03))


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [t for t in found["trials"] if "drop" in t]


def test_where_known_operators_cost_nothing_they_stay_and_others_go_back() -> None:
    search = Search(ALL_GAIN, 10, drop=lambda chosen: 0.05 * (NODES[19] in chosen), alone=tuple(NODES[:6]))
    assert search.run()["keep"] == [NODES[19]]  # its neighbour, which went with it, came again


def test_where_no_known_operator_is_in_the_set_others_go_back() -> None:
    gains = dict.fromkeys(NODES, 0.03) | {NODES[0]: -0.03}
    search = Search(additive(gains), 40, drop=lambda chosen: 0.05 * (NODES[19] in chosen), alone=(NODES[0],))
    assert search.run()["keep"] == [NODES[0], NODES[19]]


def test_all_of_the_operators_that_cost_accuracy_go_back_though_some_are_known_and_some_are_not() -> None:
    losing = {NODES[2], NODES[3], NODES[17]}
    search = Search(ALL_GAIN, 40, drop=lambda chosen: 0.02 * len(losing & chosen), alone=tuple(NODES[:6]))
    assert losing <= set(search.run()["keep"])


@pytest.mark.parametrize("evaluations", [1, 10, 60])
@pytest.mark.parametrize("alone", [(), tuple(NODES)])
def test_an_accuracy_that_never_comes_back_ends_with_nothing_after_a_bounded_number_of_tries(
    evaluations: int, alone: tuple[str, ...]
) -> None:
    search = Search(ALL_GAIN, evaluations, drop=lambda chosen: 0.5, alone=alone)
    found = search.run()
    assert 1 < len(judged(found)) <= _TRIES
    assert (found["quantized"], found["chosen"]) == (0, "before")
    assert "loses at most 1 points" in found["why"]


@pytest.mark.parametrize("accurate", [1, 2, 3, 7, 19])
def test_however_few_operators_keep_the_accuracy_some_are_found(accurate: int) -> None:
    found = Search(ALL_GAIN, 10, drop=lambda chosen: 0.5 * (len(chosen) > accurate)).run()
    assert found["quantized"] == accurate


def test_the_search_for_accuracy_shows_its_progress() -> None:
    shown: list[tuple[str, float, list[float]]] = []

    class Told(Console):
        @contextmanager
        def bar(self, name: str, total: float) -> Iterator[Any]:
            shown.append((name, total, []))
            yield SimpleNamespace(update=lambda done, **_: shown[-1][2].append(done))

    search = Search(ALL_GAIN, 10, drop=lambda chosen: 0.002 * len(chosen))
    search.ctx.console = Told(quiet=True)
    found = search.run()
    assert [name for name, *_ in shown] == ["search", "accuracy"]
    _, total, steps = shown[1]
    assert steps == list(range(1, len(judged(found)) + 1))
    assert steps[-1] <= total


def test_a_set_that_a_runtime_refuses_on_val_is_a_trial_like_others() -> None:
    class Refusing(Search):
        def _scores(self, chosen: set[str]) -> Any:
            if NODES[19] in chosen:
                raise BackendError("no kernel for it")
            return super()._scores(chosen)

    found = Refusing(ALL_GAIN, 10).run()
    assert judged(found)[0]["drop"] is None
    assert found["keep"] == [NODES[19]]


def test_tensors_that_cannot_be_compared_do_not_end_the_search() -> None:
    class Blind(Search):
        def _steepest(self, best: set[str]) -> list[str]:
            raise RuntimeError("onnxruntime has no such kernel")

    found = Blind(ALL_GAIN, 10, drop=lambda chosen: 0.05 * (NODES[0] in chosen)).run()
    assert found["keep"] == [NODES[0]]  # the least dense


def test_what_is_left_must_still_be_faster_than_fp32() -> None:
    found = Search(lambda chosen: 0.8 if len(chosen) == 20 else 1.02, 1, drop=lambda chosen: 0.05 * (NODES[19] in chosen)).run()
    assert (found["quantized"], found["keep"], found["chosen"]) == (0, sorted(NODES), "before")
    assert "19 of 20 operators in int8 are not certainly faster than fp32 at the end: 1.02x" in found["why"]


def test_what_cannot_be_measured_at_the_end_is_not_kept() -> None:
    class Refusing(Search):
        def _compared(self, chosen: set[str], other: set[str] | None) -> dict[str, Any]:
            raise BackendError("no kernel for it")

    found = Refusing(ALL_GAIN, 10).run()
    assert (found["quantized"], found["chosen"]) == (0, "before")
    assert "could not be measured" in found["why"]


# ------------------------------------------------------------------------------------------------------------ one operator at a time
def test_each_operator_is_quantized_alone_and_a_refused_one_is_a_row(tmp_path: Path) -> None:
    class Alone(Graphs):
        fp32: Any = {"n0"} - {"n0"}

        def built(self, chosen: set[str]) -> Path:
            if chosen == {"n18"}:
                raise BackendError("no kernel for it")
            [name] = chosen
            (tmp_path / name).touch()
            return tmp_path / name

        def open(self, graph: Path) -> set[str]:
            return {graph.name}

        def outputs(self, session: set[str]) -> Any:
            return np.array([[1.0, 0.0], [0.0, 1.0]]) if not session else np.array([[1.0, 0.0], [1.0, 0.0]])

        def scores(self, outputs: Any) -> Any:
            return (outputs.argmax(1) == [0, 1]).astype(float)

        def ratio(self, new: set[str], old: set[str]) -> dict[str, Any]:
            return {"ratio": 0.9, "ci95": [0.8, 1.0]}

    context: Any = SimpleNamespace(console=Console(quiet=True), stop=SimpleNamespace(check=lambda: None))
    rows = list(_rows(Alone(), 3, context))  # type: ignore[arg-type]
    assert [r["node"] for r in rows] == ["n19", "n18", "n17"]
    assert rows[1]["refused"] == "no kernel for it"
    assert (rows[0]["drop"], rows[0]["error"], rows[0]["ratio"]) == (0.5, 1.0, 0.9)
    assert not list(tmp_path.iterdir())  # a graph of every operator of a large model would fill a disk


# ------------------------------------------------------------------------------------------------------------ the graph
@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("graph")
    export_onnx(timm.create_model("resnet10t", num_classes=4).eval(), 32, folder / "model.onnx")
    PTQ.prepare(folder / "model.onnx", folder / "prepared.onnx")
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
    assert set(_layout(graph, keep, "u8s8").left) >= adds | set(keep)  # each of them gets a tensor from a convolution in fp32


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


def test_a_graph_that_onnxruntime_cannot_prepare_ends_a_search_with_its_reason(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no optimizer for it\nand a stack of C++")

    monkeypatch.setattr(shape_inference, "quant_pre_process", fails)
    for name in ("open_samples", "drawn"):
        monkeypatch.setattr(_common, name, lambda *_: None)
    inputs: Any = {"graph": SimpleNamespace(path=graph.parent, json=lambda _: {}), "data": None}
    settings = Settings("quantize.mix", Mix.Config(), "ptq", PTQ.Config(), {"flavour": "u8s8"})
    with pytest.raises(BackendError, match=r"the graph cannot be quantized: no optimizer for it$") as caught:
        PartialGraphs(settings, settings.config, inputs, tmp_path, SimpleNamespace())  # type: ignore[arg-type]
    assert (caught.value.exit_code, "leave the quantize stage out" in str(caught.value.hint)) == (5, True)


# ------------------------------------------------------------------------------------------------------------ the plan
RECIPE = "version: 1\ndata: {format: digits, image_size: 32}\nmodel: {arch: resnet10t}\nstages: [{quantize: {METHOD}}]\ntargets: {host: {}, rpi5: {}}\n"


def test_a_search_is_planned_for_targets_that_can_be_measured_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "available", lambda self: "not installed")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("METHOD", "search: 6"))
    plan = build_plan(load(str(tmp_path / "r.yaml")))
    assert [s.name for s in plan.steps if s.stage == "mix"] == ["quantize.mix"]
    assert plan.step("quantize").inputs["mix?"] == "quantize.mix"
    assert plan.step("quantize.mix").inputs["sensitivity"] == "quantize.sensitivity"
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
