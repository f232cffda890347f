"""Other devices, backends and precisions than the host's own: what ships, what is said, and how two forms of a model are compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgekd import registry
from edgekd.backends.openvino import OpenVino
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from edgekd.bundle import SIGNATURE
from tests.support import Result, run_here, write_images

pytestmark = pytest.mark.usefixtures("quick", "stored")
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))
needs_openvino = pytest.mark.skipif(OpenVino().available() is not None, reason=str(OpenVino().available()))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "data", each=16, suffix=".png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    from edgekd.export.onnx import export_onnx

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "mine.onnx"
    export_onnx(timm.create_model("resnet10t", num_classes=3, zero_init_last=False).eval(), 32, path)
    return path


def quantized(model: Path, data: Path, out: Path, *more: str) -> Result:
    more = more if any(m.startswith("--method") or "search" in m for m in more) else ("--search", "0", *more)
    return run_here("quantize", model, "--data", data, "--image-size", "32", "--no-gate", *more, "--out", out, "--json")


def bundle_of(result: Result) -> Path:
    return Path(result.json()["targets"][0]["bundle"])


# ------------------------------------------------------------------------------------------------------------ devices
@needs_rtx
def test_a_target_that_is_not_here_gets_a_really_built_engine_and_no_measured_figure(model: Path, photos: Path, tmp_path: Path) -> None:
    result = quantized(model, photos, tmp_path / "run", "--device", "rtx4090")
    assert result.code in (0, 4), result.err  # 4: random weights need not keep their labels in int8
    [target] = result.json()["targets"]
    assert (target["backend"], target["measured"], target["budget_met"]) == ("tensorrt_rtx", False, None)
    bundle = bundle_of(result)
    assert (bundle / "model.engine").stat().st_size > 50_000
    graph = onnx.load(bundle / "model.onnx")
    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    points = [held[n.input[2]] for n in graph.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 2]
    assert points
    assert all(p.dtype == np.int8 and not p.any() for p in points)
    assert run_here("verify", bundle).code == 0
    before = json.loads((bundle / "manifest.json").read_text())
    (bundle / SIGNATURE).write_bytes(bytes(64))
    again = run_here("verify", bundle, "--build", "--json")
    assert (again.code, again.json()["differs"]) == (0, []), again.err
    assert again.json()["signature"].startswith("removed")
    assert not (bundle / SIGNATURE).exists()
    after = json.loads((bundle / "manifest.json").read_text())
    assert after["engine"] == before["engine"]
    assert {n for n, entry in after["files"].items() if entry != before["files"].get(n)} <= {
        "model.engine"
    }  # RTX's builder is not deterministic
    assert after["files"].keys() == before["files"].keys()
    assert after["engine"]["flags"] == ["STRONGLY_TYPED"]
    assert again.json()["engine"] == "the engine was not opened: rtx4090 is not this machine"


def test_a_device_that_builds_its_own_engine_gets_the_script_and_the_command_for_it(model: Path, photos: Path, tmp_path: Path) -> None:
    result = quantized(model, photos, tmp_path / "run", "--device", "jetson-orin-nano")
    assert result.code in (0, 4), result.err
    bundle = bundle_of(result)
    assert result.json()["targets"][0]["measured"] is False
    assert "no engine is built here" in result.err
    assert (bundle / "build.py").is_file()
    facts = json.loads((bundle / "bundle.json").read_text())
    assert facts["build"]["compute_capability"] == "8.7"
    command = next(line for line in (bundle / "PROVENANCE.md").read_text().splitlines() if "--onnx=model.onnx" in line)
    assert command.split()[0] == "trtexec"
    assert "--optShapes=images:1x3x32x32" in command
    assert "--int8" not in command
    assert run_here("verify", bundle, "--build").code == 5
    assert run_here("verify", bundle).code == 0  # as it was


@needs_openvino
def test_another_runtime_of_this_machine_is_measured_and_stands_in_the_parity_table(model: Path, photos: Path, tmp_path: Path) -> None:
    result = quantized(model, photos, tmp_path / "run", "-o", "targets.host.backend=openvino")
    assert result.code in (0, 4), result.err
    [target] = result.json()["targets"]
    assert (target["backend"], target["measured"]) == ("openvino", True)
    assert "sample images give the stored label" in run_here("verify", bundle_of(result), "--json").json()["engine"]
    assert 'model.reshape({"images": [1, 3, 32, 32]})' in (bundle_of(result) / "PROVENANCE.md").read_text()
    assert "ONNX int8 -&gt; openvino" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("device", ["host", "rpi5"])
def test_a_target_in_ort_format_ships_the_file_and_its_operators_beside_the_graph(
    model: Path, photos: Path, tmp_path: Path, device: str
) -> None:
    options = ("-o", f"targets.{device}.options={{format: ort}}", "-o", f"targets.{device}.backend=onnxruntime")
    result = quantized(model, photos, tmp_path / "run", "--device", device, *options)
    assert result.code in (0, 4), result.err
    bundle = bundle_of(result)
    [target] = result.json()["targets"]
    assert (target["model_file"], target["size_bytes"]) == ("model.ort", (bundle / "model.ort").stat().st_size)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {"model.onnx", "model.ort", "required_operators.config"} < set(manifest["files"])
    assert manifest["engine"]["options"] == {"format": "ort"}
    assert "--include_ops_by_config required_operators.config" in (bundle / "PROVENANCE.md").read_text()
    assert ("ONNX int8 -&gt; ORT format" in (tmp_path / "run" / "report.html").read_text()) == (
        device == "host"
    )  # of rpi5 nothing runs here
    said = run_here("verify", bundle, "--run-engine", "--json").json()["engine"]
    assert ("sample images give the stored label" if device == "host" else "the engine was not opened: rpi5 is not this machine") in said
    measured = run_here("profile", bundle, "--seconds", "0.2", "--json").json()
    assert measured["size_bytes"] == (bundle / ("model.ort" if device == "host" else "model.onnx")).stat().st_size
    assert run_here("predict", bundle, "--device", "rpi5").code == 0
    for command in (("profile", "--device", "host"), ("predict", "--device", "rpi5")):
        refused = run_here(command[0], bundle / "model.ort", *command[1:])
        assert (refused.code, "files in ORT format are not read" in refused.err) == (3, True)
    said = subprocess.run([sys.executable, bundle / "predict.py", photos], capture_output=True, text=True, check=True)
    assert len(said.stdout.splitlines()) == 48
    (bundle / "required_operators.config").write_text("ai.onnx;13;Gemm\n")
    assert "'required_operators.config' was changed" in run_here("verify", bundle).err


def test_options_of_a_builder_are_checked_before_anything_runs(model: Path, photos: Path, tmp_path: Path) -> None:
    result = quantized(model, photos, tmp_path / "run", "--device", "rtx4090", "-o", "targets.rtx4090.options={turbo: 1}")
    assert result.code == 2
    assert "targets.rtx4090.options.turbo" in result.err
    assert not (tmp_path / "run" / "run.json").exists()


# ------------------------------------------------------------------------------------------------------------ precisions
@pytest.mark.parametrize(("method", "precision", "ratio"), [("fp16", "fp16", 0.6), ("weight_only", "int8_weights", 0.35)])
def test_methods_without_int8_arithmetic(model: Path, photos: Path, tmp_path: Path, method: str, precision: str, ratio: float) -> None:
    device = ("--device", "rtx4090", "-o", "targets.rtx4090.backend=onnxruntime") if method == "fp16" else ()  # x86 has no fp16
    result = quantized(model, photos, tmp_path / "run", "--method", method, *device)
    assert result.code in (0, 4), result.err
    [target] = result.json()["targets"]
    assert target["precision"] == precision
    assert target["size_bytes"] < ratio * model.stat().st_size
    assert run_here("verify", bundle_of(result)).code == 0


def test_an_output_that_overflows_fp16_is_computed_in_fp32(model: Path, photos: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    [last] = [n for n in proto.graph.node if proto.graph.output[0].name in n.output]
    for tensor in [t for t in proto.graph.initializer if t.name in last.input]:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e6), tensor.name))
    onnx.save(proto, tmp_path / "large.onnx")
    device = ("--device", "rtx4090", "-o", "targets.rtx4090.backend=onnxruntime")
    result = quantized(tmp_path / "large.onnx", photos, tmp_path / "run", "--method", "fp16", *device)
    assert result.code == 0, result.err
    decision = json.loads((tmp_path / "run" / "decisions.json").read_text())["quantize.trial"]
    assert last.name in decision["keep"]
    assert "values over 32752" in decision["reason"]
    assert [r["ok"] for r in decision["rounds"]] == [True]
    shipped = onnx.load(bundle_of(result) / "model.onnx").graph
    [maker] = [n for n in shipped.node if shipped.output[0].name in n.output]
    assert maker.name == last.name  # not cast to fp16 and back behind it, where a GPU would make it infinite
    [other] = [n for n in shipped.node if maker.input[0] in n.output]
    assert other.op_type == "Cast"


def test_a_search_finds_operators_and_its_decision_can_be_replayed(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = quantized(model, photos, tmp_path / "run", "--search", "3", "-o", "targets.host.backend=onnxruntime")
    assert result.code in (0, 4), result.err
    decision = json.loads((tmp_path / "run" / "decisions.json").read_text())["quantize.mix"]
    assert decision["quantized"] + len(decision["keep"]) == decision["candidates"] > 5
    assert 1 <= sum("against" in t for t in decision["trials"]) <= 3
    [found] = result.json()["sensitivity"]
    assert len(found["operators"]) == 3  # no more of them than graphs
    assert {o["node"] for o in found["operators"] if not o["quantized"]} <= set(decision["keep"])
    assert all(o["ratio"] is None or o["ratio"] > 0 for o in found["operators"])  # on a busy machine a short series may be incomplete
    assert all(o["error"] > 0 for o in found["operators"])
    rows = {r["path"]: r for r in result.json()["recipe"]["resolved"]}
    if decision["keep"]:  # --no-gate: what was searched ships
        assert set(rows["quantize.keep_nodes"]["value"]) >= set(decision["keep"])
        assert "measured by quantize.mix" in rows["quantize.keep_nodes"]["source"]
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))  # where nothing was searched yet
    for kind in ("mix", "sensitivity", "trial", "gate"):
        monkeypatch.setattr(registry.load("stage", kind), "run", None)  # nothing is decided again
    more = ("--search", "3", "-o", "targets.host.backend=onnxruntime", "--replay", str(tmp_path / "run"))
    again = quantized(model, photos, tmp_path / "again", *more)
    assert again.code == result.code, again.err
    assert (tmp_path / "again" / "decisions.json").read_bytes() == (tmp_path / "run" / "decisions.json").read_bytes()
    assert (bundle_of(again) / "model.onnx").read_bytes() == (bundle_of(result) / "model.onnx").read_bytes()


@needs_openvino
def test_a_target_that_leaves_its_runtime_open_ships_what_the_race_chose_and_shows_all(model: Path, photos: Path, tmp_path: Path) -> None:
    result = quantized(model, photos, tmp_path / "run", "--search", "2")
    assert result.code in (0, 4), result.err
    [target] = result.json()["targets"]
    rows = {c["name"]: c for c in target["candidates"]}
    assert set(rows) == {f"{b} {form}" for b in ("onnxruntime", "openvino") for form in ("fp32", "quantize", "quantize, searched")}
    [chosen] = [c for c in rows.values() if c["chosen"]]
    assert (target["backend"], target["precision"]) == (chosen["backend"], chosen["precision"])
    assert chosen["name"] not in ("onnxruntime fp32", "openvino fp32")  # --no-gate: a rounded one ships
    assert rows["onnxruntime fp32"]["ratio"] == 1
    bundle = bundle_of(result)
    assert json.loads((bundle / "manifest.json").read_text())["engine"]["runtime"] == chosen["backend"]
    assert run_here("verify", bundle).code == 0


@needs_openvino
def test_what_a_runtime_refuses_is_a_row_with_the_reason_and_the_run_goes_on(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.errors import BackendError

    def refuses(*_: object, **__: object) -> None:
        raise BackendError("openvino cannot open the graph: no such operator")

    monkeypatch.setattr(OpenVino, "convert", refuses)
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    result = quantized(model, photos, tmp_path / "run")
    assert result.code in (0, 4), result.err
    rows = {c["name"]: c["refused"] for c in result.json()["targets"][0]["candidates"]}
    assert rows["openvino fp32"] == rows["openvino quantize"] == "openvino cannot open the graph: no such operator"
    assert rows["onnxruntime quantize"] is None
    assert result.json()["targets"][0]["backend"] == "onnxruntime"


@pytest.mark.parametrize("chosen", ["onnxruntime fp32", "tpu int4"])
def test_a_race_is_replayed_and_a_decision_that_names_no_candidate_is_refused(
    model: Path, photos: Path, tmp_path: Path, chosen: str
) -> None:
    recipe = "version: 1\ndata: {format: image_folder, image_size: 32}\nmodel: {onnx: mine.onnx}\nstages: [{quantize: {}}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    shutil.copyfile(model, tmp_path / "mine.onnx")
    decision = {"chosen": chosen, "verdict": "rolled back", "reason": "as replayed", "rows": []}
    (tmp_path / "decisions.json").write_text(
        json.dumps({"host.race": decision, "quantize.gate": decision | {"chosen": "before" if "fp32" in chosen else chosen}})
    )
    result = run_here(
        "compress",
        tmp_path / "recipe.yaml",
        "--replay",
        tmp_path / "decisions.json",
        "-o",
        f"data.root={photos}",
        "--out",
        tmp_path / "run",
        "--json",
    )
    if chosen == "tpu int4":
        assert result.code == 3, result.text
        assert "the decision is 'tpu int4'" in result.err
    else:
        assert result.code in (0, 4), result.text
        [target] = result.json()["targets"]
        assert (target["precision"], target["backend"]) == ("fp32", "onnxruntime")


# ------------------------------------------------------------------------------------------------------------ one form against another
@pytest.fixture(scope="module")
def int8(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekd.quantize.ptq import PTQ

    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    images = np.random.default_rng(0).standard_normal((32, 3, 32, 32), dtype=np.float32)
    PTQ(PTQ.Config()).quantize(model, path, iter([images]), "u8s8")
    return path


def test_a_model_agrees_with_itself_and_with_its_quantized_form(model: Path, int8: Path) -> None:
    for other, cosine in ((model, 1.0), (int8, 0.95)):
        result = run_here("verify", other, "--against", model, "--json")
        assert result.code == 0, result.err
        assert result.json()["rungs"][0]["cosine"] >= cosine - 1e-9
        assert "seeded noise" in result.json()["source"]


@pytest.mark.parametrize("which", ["fp32", "int8"])
def test_a_damaged_copy_is_found_with_its_node_and_module(model: Path, int8: Path, tmp_path: Path, which: str) -> None:
    source = model if which == "fp32" else int8
    proto = onnx.load(source)
    weight = next(t for t in proto.graph.initializer if t.name.startswith("layer2.0.downsample") and len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight)[::-1]), weight.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    result = run_here("verify", tmp_path / "broken.onnx", "--against", source)
    assert result.code == 4
    assert "breaks first at node" in result.err
    assert "module 'layer2.0.downsample" in result.err


def test_two_different_models_are_refused(model: Path, tmp_path: Path) -> None:
    from edgekd.export.onnx import export_onnx

    other = tmp_path / "other.onnx"
    export_onnx(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)), 16, other)
    result = run_here("verify", other, "--against", model)
    assert result.code == 3
    assert "two forms of one model" in result.err
    assert run_here("verify", tmp_path / "nothing.onnx", "--against", model).code == 3
    shutil.copyfile(__file__, tmp_path / "text.onnx")
    assert run_here("verify", tmp_path / "text.onnx", "--against", model).code == 3


# ------------------------------------------------------------------------------------------------------------ nodes that rounding breaks
@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net in which one channel is ten thousand times as large as those that decide, and is multiplied by nothing afterwards."""
    from edgekd.export.onnx import export_onnx

    torch.manual_seed(0)
    first, second, last = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Linear(16, 3)
    with torch.no_grad():
        first.weight[0] *= 1e4
        second.weight[:, 0] = 0
        for layer in (first, second, last):
            layer.bias.zero_()  # type: ignore[union-attr]
    pooled = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), last)
    path = tmp_path_factory.mktemp("fragile") / "fragile.onnx"
    export_onnx(torch.nn.Sequential(first, torch.nn.ReLU(), second, *pooled).eval(), 32, path)
    return path


def test_nodes_that_rounding_breaks_stay_in_fp32_and_the_decision_says_so(fragile: Path, photos: Path, tmp_path: Path) -> None:
    here = ("-o", "targets.host.backend=onnxruntime", "-o", "targets.host.precision=int8")  # whichever is faster
    broken = quantized(fragile, photos, tmp_path / "broken", "-o", "accept.keep_nodes=false", *here)
    assert broken.code == 4
    assert [(r["rung"], r["ok"]) for r in broken.json()["parity"]] == [("ONNX fp32 -> optimized", True), ("optimized -> int8", False)]
    mended = quantized(fragile, photos, tmp_path / "mended", *here)
    assert mended.code == 0, mended.err
    assert all(r["ok"] for r in mended.json()["parity"])
    decision = json.loads((tmp_path / "mended" / "decisions.json").read_text())["quantize.trial"]
    assert [r["ok"] for r in decision["rounds"]][:1] + [r["ok"] for r in decision["rounds"]][-1:] == [False, True]
    assert decision["keep"]
    assert "first at node" in decision["reason"]
    [stage] = [s for s in mended.json()["stages"] if s["name"] == "quantize"]
    assert "stay in higher precision" in stage["reason"]
    assert mended.json()["targets"][0]["precision"] == "int8"  # the rest is rounded
