"""Quantizers that train: qat, qd and dq on a user's own model, for several devices, and with a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch.nn import functional as F

from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from tests.support import Result, run_here, write_images

pytestmark = pytest.mark.usefixtures("quick", "stored")
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))
SIDE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "data", each=24)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned its three colours, so that its decisions do not hang on rounding."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(12):
        target = torch.randint(0, 3, (24,))
        images = torch.rand(24, 3, SIDE, SIDE) * 0.3 + F.one_hot(target, 3)[..., None, None] * 0.5
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))
        optimizer.zero_grad()
        F.cross_entropy(model((images - mean) / std), target).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(model.state_dict(), path)
    return path


def quantized(method: str, model: Path, data: Path, out: Path, *more: str) -> Result:
    arch = ("--arch", "resnet10t") if model.suffix != ".onnx" else ()
    few = [x for o in ("epochs=1", "batch_size=8", "lr=1e-4") for x in ("-o", f"quantize.{o}")]
    command = ("quantize", model, "--data", data, *arch, "--method", method, "--image-size", str(SIDE), "--no-gate")
    return run_here(*command, *few, *more, "--out", out, "--json")


def graph_of(run: Result) -> onnx.GraphProto:
    return onnx.load(Path(run.json()["targets"][0]["bundle"]) / "model.onnx").graph


def weight_codes(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """int8 weights by the node that dequantizes them."""
    known = {t.name: t for t in graph.initializer}
    named = [(n.name, known[n.input[0]]) for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in known]
    return {name: numpy_helper.to_array(t) for name, t in named if len(t.dims) > 1}


@pytest.mark.parametrize(("bits", "steps"), [(8, "minmax"), pytest.param(4, "lsq", marks=pytest.mark.slow), (2, "lsq")])
def test_qat_ships_the_codes_that_it_trained(weights: Path, photos: Path, tmp_path: Path, bits: int, steps: str) -> None:
    run = quantized("qat", weights, photos, tmp_path, "-o", f"quantize.weight_bits={bits}", "-o", f"quantize.steps={steps}")
    assert run.code in (0, 4), run.err
    target = run.json()["targets"][0]
    assert target["precision"] == "int8"
    rungs = {r["rung"]: r for r in run.json()["parity"]}
    assert rungs["torch fp32 -> ONNX fp32"]["ok"]
    assert rungs["torch rounded -> int8"]["ok"] or bits < 8
    codes = weight_codes(graph_of(run))
    assert len(codes) == 15  # every convolution, and the classifier
    edges = [n for n in codes if n.startswith(("conv1.0.weight", "fc.weight"))]
    assert len(edges) == 2, list(codes)
    assert all(int(np.abs(codes.pop(n).astype(int)).max()) > 2 ** (bits - 1) or bits == 8 for n in edges)  # these keep 8 bits
    assert all(int(np.abs(c.astype(int)).max()) <= 2 ** (bits - 1) for c in codes.values())
    assert run_here("verify", target["bundle"]).code == 0


@pytest.mark.parametrize("method", ["qd", "dq"])
def test_codebooks_ship_what_was_trained_in_a_small_file(weights: Path, photos: Path, tmp_path: Path, method: str) -> None:
    run = quantized(method, weights, photos, tmp_path, "-o", "quantize.bits=3")
    assert run.code == 0, run.err
    target = run.json()["targets"][0]
    assert target["precision"] == "codebook"
    assert all(r["ok"] for r in run.json()["parity"])
    assert target["size_bytes"] < weights.stat().st_size * (3 + 64 / 256) / 32 * 1.15  # three bits a weight and two floats a bucket
    assert run_here("verify", target["bundle"]).code == 0


@needs_rtx
def test_a_second_device_gets_the_same_training_in_its_own_flavour(weights: Path, photos: Path, tmp_path: Path) -> None:
    run = quantized("qat", weights, photos, tmp_path, "-o", "quantize.steps=minmax", "--device", "host", "--device", "rtx4090")
    assert run.code in (0, 4), run.err
    bundles = [Path(t["bundle"]) for t in run.json()["targets"]]
    assert (bundles[1] / "model.engine").is_file()
    zeros = []
    for bundle in bundles:
        graph = onnx.load(bundle / "model.onnx").graph
        points = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        zeros.append({(str(points[n.input[2]].dtype), int(points[n.input[2]].max())) for n in graph.node if n.op_type == "QuantizeLinear"})
    assert ("uint8", 0) in zeros[0]
    assert zeros[1] == {("int8", 0)}
    assert sum(s["name"] == "quantize" for s in run.json()["stages"]) == 1


def test_the_teachers_loss_is_in_the_training(weights: Path, photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
version: 1
data: {{format: image_folder, root: photos, image_size: {SIDE}}}
teacher: {{arch: resnet10t, weights: mine.safetensors}}
model: {{arch: resnet10t, weights: mine.safetensors}}
stages:
  - quantize: {{method: qat, epochs: 1, batch_size: 8, lr: 1e-4, distiller: ofa, distiller_options: {{gamma: 1.2}}}}
"""
    )
    run = run_here(
        "compress", recipe, "-o", f"data.root={photos}", "-o", f"teacher.weights={weights}", "-o", f"model.weights={weights}", "--json"
    )
    assert run.code in (0, 4), run.err
    [epoch] = run.json()["curves"]["quantize.train"]
    assert {"label", "logits", "ofa4"} <= set(epoch["terms"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distiller: nothing", "nothing"),
        ("distiller_options: {gama: 2}", "gama"),
        ("weight_bits: 5", "weight_bits"),
        ("search: 5", "no operators to choose from"),
    ],
)
def test_settings_that_do_not_exist_are_2(weights: Path, photos: Path, tmp_path: Path, change: str, words: str) -> None:
    name, _, value = change.partition(": ")
    run = quantized("qat", weights, photos, tmp_path, "-o", f"quantize.{name}={value}")
    assert (run.code, words in run.err) == (2, True), run.err


def test_an_onnx_file_cannot_be_trained(weights: Path, photos: Path, tmp_path: Path) -> None:
    import timm

    from edgekd.export.onnx import export_onnx

    export_onnx(timm.create_model("resnet10t", num_classes=3).eval(), SIDE, tmp_path / "mine.onnx")
    run = quantized("qat", tmp_path / "mine.onnx", photos, tmp_path / "run")
    assert run.code == 2
    assert "cannot be trained" in run.err
    assert json.loads(run.out)["error"]["code"] == "recipe"


def test_a_quantizer_that_trains_comes_first(weights: Path, photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
version: 1
data: {{format: image_folder, root: ., image_size: {SIDE}}}
model: {{arch: resnet10t}}
stages:
  - quantize: {{name: first, method: ptq}}
  - quantize: {{name: second, method: qd}}
"""
    )
    run = run_here("check", recipe)
    assert run.code == 2
    assert "must be the first that quantizes" in run.err
