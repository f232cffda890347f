"""A user's own trained model and no teacher: export, quantize, prune, train and import, one command each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from tests.support import REPOSITORY, Result, run_here, write_images, write_keys

RESNET_CIFAR = REPOSITORY / "recipes" / "cifar10" / "resnet_cifar.py"

pytestmark = pytest.mark.usefixtures("quick", "stored")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of JPEGs, one of which does not decode."""
    data = write_images(tmp_path_factory.mktemp("photos") / "data", each=16, suffix=".jpg")
    (data / "class2" / "015.jpg").write_bytes(b"\xff\xd8\xff no jpeg")
    return data


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=3).state_dict(), path)
    return path


def single(command: str, model: Path, data: Path, out: Path, *more: str) -> Result:
    arch = ("--arch", "resnet10t") if model.suffix != ".onnx" else ()
    skip = ("-o", "data.on_bad_image=skip", "-o", "data.max_bad=0.1")
    skip += ("--search", "0") if command == "quantize" else ()  # test_targets.py searches
    return run_here(command, model, "--data", data, "--image-size", "32", *arch, *skip, *more, "--out", out, "--json")


def bundle_of(result: Result) -> Path:
    return Path(result.json()["targets"][0]["bundle"])


@pytest.fixture(scope="module")
def exported(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory, own_store: Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_HOME", str(own_store))
        return single("export", weights, photos, tmp_path_factory.mktemp("export") / "run")


def test_export_gives_a_verified_bundle_and_a_report_and_names_the_image_it_left_out(exported: Result) -> None:
    assert exported.code == 0, exported.err
    run = exported.json()
    assert run["targets"][0]["precision"] == "fp32"
    assert "class2/015.jpg" in exported.err
    assert Path(run["report"]).is_file()
    assert run_here("verify", bundle_of(exported)).code == 0
    assert json.loads((bundle_of(exported) / "bundle.json").read_text())["labels"] == ["class0", "class1", "class2"]


def test_verify_says_what_differs_here_and_that_an_onnx_bundle_needs_no_build(exported: Result, tmp_path: Path) -> None:
    from edgekd.bundle import write_manifest

    bundle = tmp_path / "moved"
    shutil.copytree(bundle_of(exported), bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").unlink()
    kept = {n: v for n, v in manifest.items() if n not in ("schema", "files", "digest")}
    write_manifest(bundle, kept | {"made_on": kept["made_on"] | {"cpu": "another"}, "engine": kept["engine"] | {"version": "0.1"}})
    found = run_here("verify", bundle, "--json").json()["differs"]
    assert [line.partition(":")[0] for line in found] == ["cpu", "onnxruntime"]
    refused = run_here("verify", bundle, "--build")
    assert (refused.code, "nothing to build" in refused.err) == (5, True)


def test_the_bill_of_materials_reads_back_with_the_manifests_hashes_and_the_card_has_the_metrics(exported: Result) -> None:
    from cyclonedx.model.bom import Bom

    bundle = bundle_of(exported)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    bom = Bom.from_json(json.loads((bundle / "sbom.cdx.json").read_text()))  # type: ignore[attr-defined]
    listed = {c.name: next(iter(c.hashes)).content for c in bom.components if c.type.value == "file"}
    assert listed == {n: f["sha256"] for n, f in files.items() if n != "sbom.cdx.json"}
    assert {c.name for c in bom.components if c.scope and c.scope.value == "required"} == {"onnxruntime", "numpy", "Pillow"}
    card = (bundle / "MODEL_CARD.md").read_text()
    assert f"| top1 | {exported.json()['targets'][0]['metric']:.4f} |" in card
    assert "torch fp32 -> ONNX fp32" in card


@pytest.mark.parametrize("method", ["ptq", "fp16", "weight_only"])  # fp16 would be left out on a CPU, with exit 0
def test_a_file_that_is_quantized_already_is_refused_before_anything_is_measured(
    exported: Result, photos: Path, tmp_path: Path, method: str
) -> None:
    import numpy as np

    from edgekd.quantize.ptq import PTQ

    images = np.zeros((4, 3, 32, 32), np.float32) + np.linspace(-1, 1, 32, dtype=np.float32)
    PTQ(PTQ.Config()).quantize(bundle_of(exported) / "model.onnx", tmp_path / "mine.onnx", iter([images]), "u8s8")
    refused = single("quantize", tmp_path / "mine.onnx", photos, tmp_path / "run", "--method", method)
    assert (refused.code, refused.json()["error"]["where"]) == (3, str(tmp_path / "mine.onnx"))
    assert "DequantizeLinear" in refused.json()["error"]["what"]
    assert "model.engine" not in refused.err


def test_the_exported_graph_computes_what_the_weights_do(exported: Result, weights: Path) -> None:
    import numpy as np
    import onnxruntime
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("resnet10t", num_classes=3)
    model.load_state_dict(load_file(weights))
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval()(images).numpy()
    session = onnxruntime.InferenceSession(bundle_of(exported) / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_quantize_of_weights_and_of_their_onnx_file_both_ship_int8(exported: Result, weights: Path, photos: Path, tmp_path: Path) -> None:
    onnx = Path(shutil.copyfile(bundle_of(exported) / "model.onnx", tmp_path / "mine.onnx"))
    for model in (weights, onnx):
        result = single("quantize", model, photos, tmp_path / f"run-{model.suffix[1:]}", "--no-gate")
        assert result.code in (0, 4), result.err  # 4: random weights need not keep their labels in int8
        [target] = result.json()["targets"]
        assert target["precision"] == "int8"
        assert target["size_bytes"] < onnx.stat().st_size / 2
        assert run_here("verify", target["bundle"]).code == 0


def test_a_quantize_that_costs_accuracy_is_rolled_back_with_its_reason(
    exported: Result, weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.stages import gate

    monkeypatch.setattr(gate, "drop_of", lambda *_: (0.5, (0.4, 0.6)))
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))  # the faked verdict stays out of the shared store
    one = ("-o", "targets.host.backend=onnxruntime")  # of several runtimes a race chooses: test_targets.py
    result = single("quantize", bundle_of(exported) / "model.onnx", photos, tmp_path / "run", *one)
    assert result.code == 0, result.err
    [stage] = [s for s in result.json()["stages"] if s["kind"] == "quantize"]
    assert stage["verdict"] == "rolled back"
    assert "50.00 points" in stage["reason"]
    assert result.json()["targets"][0]["precision"] == "fp32"


def test_prune_searches_for_a_measured_speed_up_and_recovers(weights: Path, photos: Path, tmp_path: Path) -> None:
    few = ("-o", "prune.evaluations=1", "--recover", "1", "--no-gate")
    result = single("prune", weights, photos, tmp_path / "run", "--speedup", "1.2", *few)
    assert result.code in (0, 4), result.err
    run = result.json()
    assert [(s["name"], s["kind"]) for s in run["stages"]][:2] == [("prune", "prune"), ("recover", "train")]
    decision = json.loads((tmp_path / "run" / "decisions.json").read_text())["prune.widths"]
    assert (decision["goal"], decision["target"]) == ("speedup", 1.2)
    assert 1 <= len(decision["trials"]) <= 2
    assert decision["speedup"] > 0
    before, after = decision["macs"]
    assert after < before
    assert run["targets"][0]["size_bytes"] < weights.stat().st_size


def test_train_from_scratch_learns_colours(photos: Path, tmp_path: Path) -> None:
    more = ("--image-size", "32", "--epochs", "6", "-o", "train.batch_size=8", "-o", "data.on_bad_image=skip", "-o", "data.max_bad=0.1")
    result = run_here("train", "resnet10t", "--data", photos, *more, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json()["targets"][0]["metric"] > 0.5  # chance is a third


def test_distill_learns_from_a_teachers_weights_and_from_an_onnx_file(
    weights: Path, photos: Path, exported: Result, tmp_path: Path
) -> None:
    few = ("--image-size", "32", "--epochs", "1", "-o", "data.on_bad_image=skip", "-o", "data.max_bad=0.1", "--no-gate", "--json")
    teacher = ("--teacher", weights, "--teacher-arch", "resnet10t", "--method", "dkd")
    result = run_here("distill", "resnet10t", "--data", photos, *teacher, *few, "--out", tmp_path / "one")
    assert result.code in (0, 4), result.err
    assert [(s["kind"], s["method"]) for s in result.json()["stages"] if s["kind"] == "distill"] == [("distill", "dkd")]
    graph = ("--teacher", bundle_of(exported) / "model.onnx", "--teacher-mean", "0.5,0.5,0.5", "--teacher-std", "0.2,0.2,0.2")
    result = run_here("distill", "resnet10t", "--data", photos, *graph, *few, "--out", tmp_path / "two")
    assert result.code in (0, 4), result.err
    refused = run_here("distill", "resnet10t", "--data", photos, *graph, "--method", "rkd", *few, "--out", tmp_path / "three")
    assert refused.code == 2
    assert "rkd" in refused.out


@pytest.mark.parametrize(("teacher", "code", "words"), [("nowhere.safetensors", 3, "no such teacher"), ("weights", 2, "--teacher-arch")])
def test_a_teacher_that_cannot_be_used_is_said(weights: Path, photos: Path, tmp_path: Path, teacher: str, code: int, words: str) -> None:
    given = weights if teacher == "weights" else tmp_path / teacher
    result = run_here("distill", "resnet10t", "--data", photos, "--teacher", given, "--out", tmp_path / "run")
    assert result.code == code
    assert words in result.err


def test_data_that_is_not_there_is_3(weights: Path, tmp_path: Path) -> None:
    result = run_here("export", weights, "--arch", "resnet10t", "--data", tmp_path / "nowhere")
    assert result.code == 3
    assert "nowhere" in result.err


# ------------------------------------------------------------------------------------------------------------ import
def test_import_of_a_th_checkpoint_with_module_prefixes_and_user_code(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import load_file

    assert run_here("check", "quickstart", "--code", RESNET_CIFAR).code == 0  # registers the architectures
    state = timm.create_model("resnet20_cifar").state_dict()
    checkpoint = {"state_dict": {f"module.{n}": t for n, t in state.items()}, "best_prec1": 91.7, "epoch": 3}
    torch.save(checkpoint, tmp_path / "resnet20.th")
    args = ("--arch", "resnet20_cifar", "--code", RESNET_CIFAR, "--out", tmp_path / "out.safetensors", "--json")
    result = run_here("import", tmp_path / "resnet20.th", *args)
    assert result.code == 0, result.err
    found = result.json()
    assert (found["num_classes"], found["tensors"]) == (10, len(state))
    loaded = load_file(tmp_path / "out.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[n], state[n]) for n in state)


def test_import_does_not_overwrite_what_it_reads(tmp_path: Path, weights: Path) -> None:
    copy = Path(shutil.copyfile(weights, tmp_path / "w.safetensors"))
    result = run_here("import", copy, "--arch", "resnet10t")
    assert result.code == 2
    assert "--out" in result.err
    assert copy.read_bytes() == weights.read_bytes()


def test_normalisation_that_import_was_told_is_used_where_none_is_given(photos: Path, tmp_path: Path, weights: Path) -> None:
    run_here("import", weights, "--arch", "resnet10t", "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--out", tmp_path / "w.safetensors")
    shipped = json.loads((bundle_of(single("export", tmp_path / "w.safetensors", photos, tmp_path / "run")) / "bundle.json").read_text())
    assert (shipped["preprocess"]["mean"], shipped["preprocess"]["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    asked = single("export", tmp_path / "w.safetensors", photos, tmp_path / "asked", "--mean", "0,0,0")
    assert json.loads((bundle_of(asked) / "bundle.json").read_text())["preprocess"]["mean"] == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ a user's ONNX file
def onnx_net(path: Path, classes: int, *, batch: int | None = None, shape: tuple[int, int] = (32, 32)) -> Path:
    """A file as a user has it: exported by torch, one convolution and a classifier."""
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)).eval()
    shapes = None if batch else ({0: torch.export.Dim("n", min=1, max=64)},)
    torch.onnx.export(
        model, (torch.zeros(batch or 2, 3, *shape),), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
    )
    return path


@pytest.mark.parametrize("classes", [2, 1000])
def test_an_onnx_file_with_another_number_of_classes_is_refused(photos: Path, tmp_path: Path, classes: int) -> None:
    result = single("quantize", onnx_net(tmp_path / "m.onnx", classes), photos, tmp_path / "run")
    assert result.code == 3, result.text
    assert f"the model gives outputs of shape ({classes},), the data have 3 classes" in result.err


def test_an_onnx_file_for_other_images_is_refused(photos: Path, tmp_path: Path) -> None:
    result = single("quantize", onnx_net(tmp_path / "m.onnx", 3, batch=1, shape=(32, 24)), photos, tmp_path / "run")
    assert result.code == 3, result.text
    assert "it is not a classifier of square images" in result.err


def test_outputs_that_are_not_finite_are_counted_and_said(photos: Path, tmp_path: Path) -> None:
    path = onnx_net(tmp_path / "m.onnx", 3)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1e30), tensor.name))
    onnx.save(proto, path)
    result = single("export", path, photos, tmp_path / "run")
    assert "images are not finite" in result.err, result.text


@pytest.mark.parametrize("batch", [3, 16])
def test_an_onnx_file_for_a_fixed_batch_ships_verifies_predicts_and_is_profiled_as_it_is(photos: Path, tmp_path: Path, batch: int) -> None:
    import subprocess
    import sys

    file = onnx_net(tmp_path / "m.onnx", 3, batch=batch)
    result = single("quantize", file, photos, tmp_path / "run", "--no-gate", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert result.code in (0, 4), result.text
    assert result.json()["targets"][0]["batch"] == batch
    bundle = bundle_of(result)
    assert run_here("verify", bundle).code == 0
    answer = subprocess.run([sys.executable, bundle / "predict.py", photos / "class0"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) == 16
    refused = run_here("profile", bundle, "--batch", "2")
    assert refused.code == 2
    assert f"--batch {batch}" in refused.err


def test_an_onnx_file_that_says_nothing_of_its_normalisation_is_warned_about(photos: Path, tmp_path: Path) -> None:
    result = single("export", onnx_net(tmp_path / "m.onnx", 3), photos, tmp_path / "run")
    assert "mean and std 0.5 are assumed" in result.err
    assert any("mean and std 0.5 are assumed" in w for w in result.json()["warnings"])


def test_weights_that_are_not_there_are_not_trained_from_scratch(photos: Path, tmp_path: Path) -> None:
    result = single("train", tmp_path / "wieghts.safetensors", photos, tmp_path / "run")
    assert result.code == 3
    assert "there is no such model" in result.err


# ------------------------------------------------------------------------------------------------------------ bundles of strangers
def test_verify_opens_no_file_but_the_bundles_own_checked_model(exported: Result, tmp_path: Path) -> None:
    from edgekd.bundle import MANIFEST, write_manifest

    names = {"../../x.onnx": "is not in the manifest", "bundle.json": "", "model.ort": "files in ORT format are not read"}
    for name, words in names.items():
        bundle = Path(shutil.copytree(bundle_of(exported), tmp_path / name.replace("/", "_")))
        shutil.copyfile(bundle / "model.onnx", bundle / "model.ort")  # a sound graph, of which onnxruntime would read something else
        facts = json.loads((bundle / "bundle.json").read_text()) | {"model_file": name}
        (bundle / "bundle.json").write_text(json.dumps(facts))
        manifest = json.loads((bundle / MANIFEST).read_text())
        manifest["engine"]["file"] = name
        (bundle / MANIFEST).unlink()
        write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files", "digest")})
        result = run_here("verify", bundle)
        assert result.code == 3, result.text  # refused as a bundle, or as an ONNX file before any runtime opens it
        assert words in result.err
        assert "onnxruntime" not in result.err


def test_verify_opens_no_graph_as_an_engine_that_nobody_checked(exported: Result, tmp_path: Path) -> None:
    from edgekd.bundle import MANIFEST, write_manifest

    bundle = Path(shutil.copytree(bundle_of(exported), tmp_path / "b"))
    (bundle / "other.onnx").write_bytes(b"not read by anyone")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["engine"]["file"] = "other.onnx"
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files", "digest")})
    for command in (("verify", bundle), ("profile", bundle)):
        result = run_here(*command)
        assert (result.code, "its engine 'other.onnx' is another graph than its model" in result.err) == (3, True), result.text


def test_a_bundle_is_signed_and_verified_and_verify_says_when_it_did_not_look_at_the_signature(exported: Result, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="pip install 'edgekd[sign]'")
    bundle, (key, public) = Path(shutil.copytree(bundle_of(exported), tmp_path / "b")), write_keys(tmp_path / "keys")
    verified = ("verify", bundle, "--json")
    assert run_here(*verified).json()["signature"] is None
    refused = run_here(*verified, "--signed-by", public)
    assert (refused.code, refused.json()["error"]["code"]) == (3, "bundle")
    assert run_here("sign", bundle, "--key", key, "--json").json() == {"bundle": str(bundle), "signature": str(bundle / "manifest.sig")}
    assert run_here(*verified).json()["signature"] == "signed, not checked: give --signed-by PUBLIC.pem"
    passed = run_here("verify", bundle, "--signed-by", public)
    assert (passed.code, f"signed by the private half of {public}" in passed.err) == (0, True)
    for more in (("--build",), ("--against", bundle)):
        assert run_here("verify", bundle, "--signed-by", public, *more).code == 2


def test_verify_fails_where_outputs_differ_even_if_the_labels_agree(exported: Result, tmp_path: Path) -> None:
    import numpy as np

    from edgekd.bundle import MANIFEST, write_manifest
    from edgekd.safeio.arrays import write_arrays

    bundle = Path(shutil.copytree(bundle_of(exported), tmp_path / "b"))
    with np.load(bundle / "samples.npz") as stored:
        arrays = {n: stored[n] for n in stored.files}
    (bundle / "samples.npz").unlink()
    write_arrays(bundle / "samples.npz", arrays | {"outputs": arrays["outputs"] * 1.5})
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files", "digest")})
    result = run_here("verify", bundle)
    assert result.code == 4
    assert "outputs differ by up to" in result.err


def test_samples_and_parity_images_come_from_all_classes(exported: Result) -> None:
    import numpy as np

    with np.load(bundle_of(exported) / "samples.npz") as stored:
        assert set(stored["labels"].tolist()) == {0, 1, 2}
