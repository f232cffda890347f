"""The parity ladder: a deliberately broken graph in each rung is found, with the node, and the torch module, at which it breaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.artifact import Artifact
from edgekd.backends.openvino import OpenVino
from edgekd.console import Console
from edgekd.context import Context
from edgekd.quantize.ptq import PTQ
from edgekd.stages._stage import Settings
from edgekd.stages.compile import Compile
from edgekd.stages.parity import Parity
from edgekd.store import Store
from tests.support import artifacts, run_here

pytestmark = pytest.mark.usefixtures("quick")
needs_openvino = pytest.mark.skipif(OpenVino().available() is not None, reason=str(OpenVino().available()))
RECIPE = """version: 1
data: {format: digits, image_size: 32, max_per_class: 20}
model: {arch: resnet10t, args: {zero_init_last: false}}
stages: [{quantize: {}}]
targets: {host: {backend: onnxruntime}}
"""


def chain(folder: Path, recipe: str) -> dict[str, Artifact]:
    """Every step of a recipe by name."""
    (folder / "r.yaml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_HOME", str(folder / "home"))
        result = run_here("compress", folder / "r.yaml", "--no-gate", "--out", folder / "run", "--json")
    assert result.code in (0, 4), result.err
    return artifacts(folder / "home")


@pytest.fixture(scope="module")
def rungs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """What the chain made: model, both graphs, and the data."""
    steps = chain(tmp_path_factory.mktemp("ladder"), RECIPE)
    return {"model": steps["student"], "fp32": steps["student.export"], "graph": steps["quantize"], "data": steps["data"]}


def climbed(inputs: Mapping[str, Artifact], out: Path) -> list[dict[str, Any]]:
    """The rows of the ladder."""
    out.mkdir()
    settings = Settings("host.parity", Parity.Config(samples=32), facts={"task": "classification"})
    Parity().run(settings, inputs, out, Context(Store(out / "home"), Console(quiet=True)))
    rows: list[dict[str, Any]] = json.loads((out / "parity.json").read_text())
    return rows


def damaged(artifact: Artifact, there: Path, layer: str) -> Artifact:
    """A copy whose weights of one layer stand in reverse order, with the other sign."""
    shutil.copytree(artifact.path, there)
    break_layer(there / "model.onnx", layer)
    return replace(artifact, path=there, digest="0" * 64)


def break_layer(file: Path, layer: str) -> None:
    proto = onnx.load(file)
    weight = next(t for t in proto.graph.initializer if t.name.startswith(layer) and len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(-numpy_helper.to_array(weight)[::-1]), weight.name))
    onnx.save(proto, file)


def test_an_intact_ladder_holds_and_names_nothing(rungs: dict[str, Artifact], tmp_path: Path) -> None:
    rows = climbed(rungs, tmp_path / "out")
    assert [r["rung"] for r in rows] == ["torch fp32 -> ONNX fp32", "ONNX fp32 -> optimized", "optimized -> int8"]
    assert rows[0]["ok"]
    assert rows[1]["ok"]
    assert not any("first_break" in row for row in rows[:2])


@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv2", "layer3.0.downsample"])
def test_a_broken_export_is_found_with_its_module(rungs: dict[str, Artifact], tmp_path: Path, layer: str) -> None:
    broken = damaged(rungs["fp32"], tmp_path / "fp32", layer)
    row = climbed(rungs | {"fp32": broken, "graph": broken}, tmp_path / "out")[0]
    assert (row["rung"], row["ok"]) == ("torch fp32 -> ONNX fp32", False)
    assert f"module '{layer}" in row["first_break"]


@pytest.mark.parametrize("layer", ["layer2.0.conv2", "layer3.0.downsample"])
def test_an_optimization_that_changes_the_graph_is_found(
    rungs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    real = PTQ.prepare

    def wrong(graph: Path, out: Path) -> None:
        real(graph, out)
        break_layer(out, layer)

    monkeypatch.setattr(PTQ, "prepare", staticmethod(wrong))
    row = climbed(rungs, tmp_path / "out")[1]
    assert (row["rung"], row["ok"]) == ("ONNX fp32 -> optimized", False)
    assert f"module '{layer}" in row["first_break"]


@pytest.mark.parametrize("layer", ["layer2.0.conv2", "layer3.0.downsample"])
def test_a_broken_quantized_graph_is_found_with_its_module(rungs: dict[str, Artifact], tmp_path: Path, layer: str) -> None:
    row = climbed(rungs | {"graph": damaged(rungs["graph"], tmp_path / "int8", layer)}, tmp_path / "out")[2]
    assert (row["rung"], row["ok"]) == ("optimized -> int8", False)
    assert f"module '{layer}" in row["first_break"]


def test_a_broken_graph_is_found_where_the_model_was_trained_with_rounded_inputs(tmp_path: Path) -> None:
    trained = "quantize: {method: qat, steps: minmax, epochs: 1, batch_size: 16, lr: 1e-4}"
    steps = chain(tmp_path, RECIPE.replace("quantize: {}", trained))
    made = {"model": steps["quantize.train"], "fp32": steps["quantize.train.export"], "graph": steps["quantize"], "data": steps["data"]}
    intact = climbed(made, tmp_path / "intact")
    assert [(r["rung"], r["ok"]) for r in intact] == [("torch fp32 -> ONNX fp32", True), ("torch rounded -> int8", True)]
    row = climbed(made | {"graph": damaged(made["graph"], tmp_path / "int8", "layer2.0.conv2")}, tmp_path / "out")[1]
    assert (row["rung"], row["ok"]) == ("torch rounded -> int8", False)
    assert "module 'layer2.0.conv2" in row["first_break"]


@needs_openvino
def test_a_runtime_that_computes_wrongly_is_found_with_the_node(
    rungs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., dict[str, Any]] = OpenVino.convert

    def wrong(self: OpenVino, graph: Path, device: Any, out: Path, options: Mapping[str, Any], *, batch: int = 1) -> dict[str, Any]:
        copy = tmp_path / "wrong.onnx"
        shutil.copyfile(graph, copy)
        break_layer(copy, "layer2.0.conv2")
        return real(self, copy, device, out, options, batch=batch)

    monkeypatch.setattr(OpenVino, "convert", wrong)
    (tmp_path / "engine").mkdir()
    context = Context(Store(tmp_path / "home"), Console(quiet=True))
    Compile().run(Settings("e", Compile.Config(backend="openvino")), {"graph": rungs["fp32"]}, tmp_path / "engine", context)
    engine = replace(rungs["graph"], path=tmp_path / "engine", digest="1" * 64)
    row = climbed(rungs | {"graph": rungs["fp32"], "engine": engine}, tmp_path / "out")[-1]
    assert (row["rung"], row["ok"]) == ("ONNX fp32 -> openvino", False)
    assert "module 'layer2.0.conv2" in row["first_break"]


def test_what_cannot_be_looked_into_says_why_and_stays_broken(
    rungs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.export import bisect

    def fails(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bisect, "compare_tensors", fails)
    row = climbed(rungs | {"graph": damaged(rungs["graph"], tmp_path / "int8", "layer2.0.conv2")}, tmp_path / "out")[2]
    assert not row["ok"]
    assert row["first_break"] == "not found: RuntimeError: out of luck"
