"""`edgekd compile`: a user's own model -> engines in bundles, with data or without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from edgekd.backends.openvino import OpenVino
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from tests.support import Result, run_here, write_images

pytestmark = pytest.mark.usefixtures("quick", "stored")
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))
needs_openvino = pytest.mark.skipif(OpenVino().available() is not None, reason=str(OpenVino().available()))


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, zero_init_last=False).eval()


@pytest.fixture(scope="module")
def model(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekd.export.onnx import export_onnx

    path = tmp_path_factory.mktemp("model") / "mine.onnx"
    export_onnx(net, 32, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "data", each=16)


def compiled(model: Path, out: Path, *more: str | Path) -> Result:
    return run_here("compile", model, *more, "--out", out, "--json")


def bundle_of(result: Result) -> Path:
    return Path(result.json()["targets"][0]["bundle"])


# ------------------------------------------------------------------------------------------------------------ what is built
@needs_rtx
def test_an_onnx_file_alone_becomes_an_engine_for_a_device_that_is_not_here(model: Path, tmp_path: Path) -> None:
    result = compiled(model, tmp_path / "run", "--device", "rtx4090", "-o", "targets.rtx4090.options.max_batch=4")
    assert result.code == 0, result.err
    [target] = result.json()["targets"]
    assert (target["backend"], target["model_file"], target["measured"]) == ("tensorrt_rtx", "model.engine", False)
    assert (target["metric"], target["metrics"]) == (None, {})
    assert target["reason"] == "rtx4090 is not this machine: latency was not measured"
    assert "accuracy was not measured" in result.json()["accept"]["reason"]
    bundle = bundle_of(result)
    assert (bundle / "model.engine").stat().st_size == target["size_bytes"] > 50_000
    manifest, facts = (json.loads((bundle / n).read_text()) for n in ("manifest.json", "bundle.json"))
    assert manifest["engine"]["options"]["max_batch"] == 4
    assert (manifest["metrics"], manifest["data"]) == ({}, "64 generated images, seed 0")
    assert (facts["labels"], facts["preprocess"]["image_size"]) == (["0", "1", "2"], 32)
    for name in ("bundle.json", "PROVENANCE.md", "MODEL_CARD.md"):
        assert "ccuracy was not measured" in (bundle / name).read_text()
    assert run_here("verify", bundle).code == 0


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_an_onnx_file_alone_is_built_checked_and_measured_for_this_machine(model: Path, tmp_path: Path, backend: str) -> None:
    result = compiled(model, tmp_path / "run", "-o", f"targets.host.backend={backend}")
    assert result.code == 0, result.err
    [target] = result.json()["targets"]
    assert (target["backend"], target["measured"], target["metric"]) == (backend, True, None)
    rungs = [(r["rung"], r["ok"], "metric_lost" in r) for r in result.json()["parity"]]
    assert rungs == ([("ONNX fp32 -> openvino", True, False)] if backend == "openvino" else [])
    assert run_here("verify", bundle_of(result)).code == 0
    again = compiled(model, tmp_path / "again", "-o", f"targets.host.backend={backend}")
    assert [s["cached"] for s in again.json()["stages"]] == [True] * 5
    assert (bundle_of(again) / "manifest.json").read_bytes() == (bundle_of(result) / "manifest.json").read_bytes()


@needs_openvino
def test_without_data_no_race_is_run_and_the_choice_is_said(model: Path, tmp_path: Path) -> None:
    result = compiled(model, tmp_path / "run")
    assert (result.code, result.json()["targets"][0]["backend"]) == (0, "onnxruntime"), result.err
    assert any("-o targets.host.backend=openvino" in w for w in result.json()["warnings"])


def test_weights_alone_are_exported_compared_with_torch_and_built(net: torch.nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    size = ("--arch", "resnet10t", "--image-size", "32", "-o", "targets.host.backend=onnxruntime")
    result = compiled(tmp_path / "mine.safetensors", tmp_path / "run", *size)
    assert result.code == 0, result.err
    assert [(r["rung"], r["ok"]) for r in result.json()["parity"]] == [("torch fp32 -> ONNX fp32", True)]
    assert "on generated images" in (bundle_of(result) / "MODEL_CARD.md").read_text()


def test_with_data_the_engine_is_judged_on_them(model: Path, photos: Path, tmp_path: Path) -> None:
    result = compiled(model, tmp_path / "run", "--data", photos, "--device", "rpi5")
    assert result.code == 0, result.err
    [target] = result.json()["targets"]
    assert 0 <= target["metric"] <= 1
    facts = json.loads((bundle_of(result) / "bundle.json").read_text())
    assert (facts["labels"], facts["samples"]) == (["class0", "class1", "class2"], "images of val")


def test_a_graph_that_is_quantized_already_is_judged_as_one(model: Path, tmp_path: Path) -> None:
    from edgekd.quantize.ptq import PTQ

    images = np.random.default_rng(0).standard_normal((32, 3, 32, 32), dtype=np.float32)
    PTQ(PTQ.Config()).quantize(model, tmp_path / "int8.onnx", iter([images]), "u8s8")
    result = compiled(tmp_path / "int8.onnx", tmp_path / "run", "--device", "rpi5")
    assert result.code == 0, result.err
    assert result.json()["targets"][0]["precision"] == "int8"
    assert "8-bit integers" in (bundle_of(result) / "MODEL_CARD.md").read_text()


@needs_rtx
def test_what_the_builder_refuses_is_named_by_the_users_file_and_the_step(model: Path, tmp_path: Path) -> None:
    from edgekd.quantize.ptq import PTQ

    images = np.random.default_rng(0).standard_normal((32, 3, 32, 32), dtype=np.float32)
    PTQ(PTQ.Config()).quantize(model, tmp_path / "x86.onnx", iter([images]), "u8s8")
    result = compiled(tmp_path / "x86.onnx", tmp_path / "run", "--device", "rtx4090")
    assert result.code == 5
    error = result.json()["error"]
    assert error["where"] == f"{tmp_path / 'x86.onnx'}, step 'rtx4090.compile'"
    assert "edgekd quantize MODEL --data FOLDER --device rtx4090" in error["hint"]


def test_export_needs_no_data_either_and_gives_the_script_that_builds_on_the_device(model: Path, tmp_path: Path) -> None:
    result = run_here("export", model, "--device", "jetson-orin-nano", "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert (bundle_of(result) / "build.py").is_file()


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_missing_builder_is_5_with_the_way_to_build_on_the_device(model: Path, tmp_path: Path) -> None:
    result = compiled(model, tmp_path / "run", "--device", "jetson-orin-nano")
    assert result.code == 5
    error = result.json()["error"]
    assert (error["code"], error["where"]) == ("backend", "jetson-orin-nano")
    assert "tensorrt" in error["what"]
    assert error["hint"].endswith("edgekd export MODEL --device jetson-orin-nano")
    assert not (tmp_path / "run").exists()


def test_where_several_runtimes_could_build_all_that_are_missing_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRTForRTX, "available", lambda self: f"{self.name} is not installed: {self.install}")
    result = compiled(model, tmp_path / "run", "--device", "rtx4090")
    assert result.code == 5
    assert "tensorrt is not installed" in result.err
    assert "pip install 'edgekd[tensorrt-rtx]'" in result.err
    other = compiled(model, tmp_path / "run", "--device", "rtx4090", "-o", "targets.rtx4090.backend=tensorrt")
    assert (other.code, "tensorrt-rtx" in other.err) == (5, False)


def test_junk_instead_of_onnx_is_3(tmp_path: Path) -> None:
    (tmp_path / "not.onnx").write_bytes(b"not a model" * 99)
    result = compiled(tmp_path / "not.onnx", tmp_path / "run")
    assert result.code == 3
    assert "not.onnx: it is not an ONNX file, or it is damaged" in result.err


def net_with_output(path: Path, shape: list[int | str], *, pool: bool = True) -> Path:
    """One operator on images of 32 x 32, with an output that is declared as told."""
    node = helper.make_node("ReduceMean" if pool else "Relu", ["images"], ["out"], **({"axes": [2, 3], "keepdims": 0} if pool else {}))
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_classes_that_the_file_does_not_declare_are_inferred_and_what_classifies_nothing_is_3(tmp_path: Path) -> None:
    result = compiled(net_with_output(tmp_path / "open.onnx", ["n", "k"]), tmp_path / "run", "--device", "rpi5")
    assert result.code == 0, result.err
    assert json.loads((bundle_of(result) / "bundle.json").read_text())["labels"] == ["0", "1", "2"]
    refused = compiled(net_with_output(tmp_path / "map.onnx", ["n", 3, 32, 32], pool=False), tmp_path / "other")
    assert refused.code == 3
    assert "it is not a classifier: output out ['n', 3, 32, 32]" in refused.err


def test_classes_that_cannot_be_counted_are_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv.weight": torch.zeros(3, 3, 1, 1)}, tmp_path / "w.safetensors")
    result = compiled(tmp_path / "w.safetensors", tmp_path / "run", "--arch", "resnet10t")
    assert result.code == 3
    assert "its number of classes cannot be read" in result.err
    assert "--data FOLDER" in result.err


def test_the_help_says_what_data_are_for() -> None:
    result = run_here("compile", "--help")
    assert result.code == 0
    assert "samples are generated and accuracy is not" in " ".join(result.out.split())
    assert "compile" in run_here("--help").out
