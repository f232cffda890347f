"""The quickstart, end to end with a tiny teacher: its contract, its cache, its bundle, its replay. One run serves most tests."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekd.artifact import Kind
from tests.support import Finished, artifacts, environment, run_apart, run_here, short_measurements

STAGE_FIELDS = {
    "name",
    "kind",
    "method",
    "key",
    "cached",
    "seconds",
    "metric",
    "metric_name",
    "size_bytes",
    "latency_ms",
    "verdict",
    "reason",
}
TARGET_FIELDS = {"device", "backend", "precision", "measured", "latency_ms", "metric", "size_bytes", "model_file", "budget_met", "bundle"}
HEAVY = ("torch", "timm", "torch_pruning", "sklearn")


def rows(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {s["name"]: s for s in run["stages"]}


# ------------------------------------------------------------------------------------------------------------ the contract
def test_it_ends_with_accepted_or_missed_and_says_so_in_one_json_object(quickstart: Finished) -> None:
    assert quickstart.result.code == (0 if quickstart.run["accepted"] else 4)
    assert {"run", "report", "teacher", "stages", "targets", "accepted"} <= set(quickstart.run)


def test_every_stage_and_target_has_the_fields_of_the_contract(quickstart: Finished) -> None:
    assert all(set(s) >= STAGE_FIELDS for s in quickstart.run["stages"])
    [target] = quickstart.run["targets"]
    assert set(target) >= TARGET_FIELDS
    assert set(target["latency_ms"]) >= {"p50", "p95", "p99", "ci95"}
    assert target["measured"] is True
    teacher = quickstart.run["teacher"]
    assert teacher["latency_ms"]["p50"] > 0
    assert teacher["size_bytes"] > 0
    assert all(0 <= m["metric"] <= 1 for m in (teacher, target))


def test_the_chain_is_the_recipe_s_followed_by_the_inserted_end(quickstart: Finished) -> None:
    chain = [(s["name"], s["kind"], s["method"]) for s in quickstart.run["stages"]]
    assert chain[0] == ("teacher", "train", None)
    assert chain[1:5] == [
        ("distill", "distill", "ofa"),
        ("prune", "prune", "l1"),
        ("recover", "distill", "kd"),
        ("quantize", "quantize", "ptq"),
    ]
    assert [k for _, k, _ in chain[5:]] == ["export", "compile", "profile", "bundle"]


def test_every_compressing_stage_has_a_verdict_with_its_reason(quickstart: Finished) -> None:
    for name in ("prune", "quantize"):
        stage = rows(quickstart.run)[name]
        assert stage["verdict"] == "kept"
        assert "the gate is off" in stage["reason"]


def test_without_gates_the_shipped_model_is_quantized_and_smaller_than_the_teacher(quickstart: Finished) -> None:
    [target] = quickstart.run["targets"]
    assert target["precision"] == "int8"
    stage = rows(quickstart.run)
    assert target["size_bytes"] == stage["quantize"]["size_bytes"] < stage["prune"]["size_bytes"] < stage["distill"]["size_bytes"]


# ------------------------------------------------------------------------------------------------------------ the run folder
def test_the_run_folder_holds_run_report_decisions_and_bundle(quickstart: Finished) -> None:
    assert {p.name for p in quickstart.folder.iterdir()} == {"run.json", "report.html", "decisions.json", "host"}
    assert json.loads((quickstart.folder / "run.json").read_text()) == quickstart.run
    decisions = json.loads((quickstart.folder / "decisions.json").read_text())
    assert {"prune.widths", "prune.gate", "preflight"} <= set(decisions)
    assert {"quantize.gate", "host.race"} & set(decisions)  # one runtime, or several that are measured against each other


def test_the_stated_size_is_the_shipped_file_s_size(quickstart: Finished) -> None:
    [target] = quickstart.run["targets"]
    assert (quickstart.bundle / target["model_file"]).stat().st_size == target["size_bytes"]


def test_the_report_loads_nothing_from_elsewhere(quickstart: Finished) -> None:
    html = (quickstart.folder / "report.html").read_text()
    page = re.sub(r"(<script[^>]*>).*?</script>", r"\1", html, flags=re.S)
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=["']?(https?:)?//""", page)
    assert "quantize" in page


def test_nothing_in_the_run_folder_names_a_place_of_this_machine_inside_the_model(quickstart: Finished) -> None:
    model = (quickstart.bundle / "model.onnx").read_bytes()
    assert str(quickstart.home).encode() not in model
    assert not re.search(rb"/(home|root|work|tmp|Users|opt)/[\w.-]+/", model)


def test_explain_and_report_read_the_run_again(quickstart: Finished, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(quickstart.folder, tmp_path / "run"))
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert run_here("report", copy).code == 0
    assert (copy / "report.html").read_bytes() == before
    verdicts = run_here("explain", copy, "--json").json()
    assert {v["stage"] for v in verdicts} >= {"prune", "quantize"}


# ------------------------------------------------------------------------------------------------------------ the cache
SECOND = """
import sys
from edgekd.cli import main
sys.argv = ["edgekd", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(*sorted(m for m in %r if m in sys.modules), file=sys.stderr)
    raise
"""


def test_a_second_run_builds_nothing_and_loads_no_torch(quickstart: Finished, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SECOND % (HEAVY,), "compress", *quickstart.args, "--out", str(tmp_path / "run"), "--json"]
    p = subprocess.run(command, env=environment(EDGEKD_HOME=str(quickstart.home)), capture_output=True, text=True, timeout=120)
    assert p.returncode == quickstart.result.code, p.stderr
    again = json.loads(p.stdout)
    assert [s["name"] for s in again["stages"] if not s["cached"]] == []
    assert p.stderr.strip().splitlines()[-1:] in ([], [""]), "the last line names what was loaded"
    assert again["targets"][0] | {"bundle": ""} == quickstart.run["targets"][0] | {"bundle": ""}
    assert hashes(tmp_path / "run" / "host") == hashes(quickstart.bundle)


def test_plan_shows_all_steps_as_cached(quickstart_home: Finished) -> None:
    steps = run_here("plan", *quickstart_home.args, "--json").json()
    assert {s["step"]: s["state"] for s in steps if s["state"] not in ("cached", "skipped")} == {}


def test_more_epochs_of_distillation_leave_the_teacher_s_steps_cached(quickstart_home: Finished) -> None:
    steps = run_here("plan", *quickstart_home.args, "-o", "distill.epochs=2", "--json").json()
    state = {s["step"]: s["state"] for s in steps}
    kept = {name for name, s in state.items() if s == "cached"}
    assert kept == {n for n in state if n.startswith("teacher")} | {"data", "student", "preflight"}  # a longer training may repay compiling
    assert state["distill"] == "run"


def test_a_later_change_runs_only_what_depends_on_it_and_a_baseline_is_added_beside(quickstart_home: Finished, tmp_path: Path) -> None:
    with short_measurements():
        args = (*quickstart_home.args, "-o", "recover.epochs=2", "-o", "baselines=[student]")
        result = run_here("compress", *args, "--out", tmp_path / "run", "--json")
    assert result.code in (0, 4), result.err
    run = result.json()
    first, now = rows(quickstart_home.run), rows(run)
    assert {n for n in now if now[n]["cached"]} == {"teacher", "distill", "prune"}
    assert all(now[n]["key"] == first[n]["key"] for n in ("teacher", "distill", "prune"))
    assert all(now[n]["key"] != first[n]["key"] for n in ("recover", "quantize"))
    [baseline] = run["baselines"]
    assert baseline["name"] == "student alone"
    assert 0 <= baseline["metric"] <= 1
    assert baseline["size_bytes"] == now["distill"]["size_bytes"]  # the same architecture, unpruned


def test_what_was_distilled_with_branches_holds_the_students_tensors_only(quickstart: Finished) -> None:
    from safetensors.torch import load_file

    first, distilled = (load_file(quickstart.steps[n].path / "model.safetensors") for n in ("student", "distill"))
    assert distilled.keys() == first.keys()
    assert {n: t.shape for n, t in distilled.items()} == {n: t.shape for n, t in first.items()}


# ------------------------------------------------------------------------------------------------------------ the bundle
def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_verify_accepts_the_bundle_and_its_samples(quickstart: Finished) -> None:
    found = run_here("verify", quickstart.bundle, "--json")
    assert found.code == 0, found.err
    assert "sample images give the stored label" in found.json()["samples"]


def test_predict_py_gives_the_labels_of_the_shipped_engine(quickstart: Finished, tmp_path: Path) -> None:
    from edgekd.data.dataset import Dataset

    dataset, test = Dataset.open(quickstart.steps["data"].path), quickstart.steps["host.test"]
    positions = dataset.split("test")[:24]
    for p, pixels in zip(positions, dataset.images(positions), strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{p:05d}.png")
    outputs = np.load(test.path / "outputs.npy")[:24]
    expected = {f"{p:05d}.png": dataset.classes[int(row.argmax())] for p, row in zip(positions, outputs, strict=True)}
    alone = {"PYTHONPATH": ""}  # edgekd is not needed there
    command = [sys.executable, "-P", str(quickstart.bundle / "predict.py"), str(tmp_path)]
    p = subprocess.run(command, cwd=tmp_path, env=environment(**alone), capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    said = [line.split("\t") for line in p.stdout.splitlines()]
    assert {name: label for name, label, _ in said} == expected
    assert all(0 < float(share) <= 1 for *_, share in said)


def test_predict_py_names_an_image_it_cannot_read_and_goes_on(quickstart: Finished, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    p = subprocess.run([sys.executable, quickstart.bundle / "predict.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert p.returncode == 0
    assert [line.split("\t")[0] for line in p.stdout.splitlines()] == ["good.png"]
    assert "bad.png" in p.stderr
    assert "Traceback" not in p.stderr


@pytest.fixture(scope="module")
def shipped_predict(quickstart: Finished) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped_predict", quickstart.bundle / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 127 * np.sin(x / 3 + y / 5)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


SOURCES: dict[str, Callable[[Path], None]] = {
    "wide.jpg": lambda f: gradient(91, 40).save(f),
    "tall.jpg": lambda f: gradient(33, 80).save(f, quality=60),
    "grey.jpg": lambda f: gradient(50, 50).convert("L").save(f),
    "cmyk.jpg": lambda f: gradient(50, 45).convert("CMYK").save(f),
    "palette.png": lambda f: gradient(64, 41).convert("P").save(f),
    "alpha.png": lambda f: gradient(40, 64).convert("RGBA").save(f),
    "exif.jpg": lambda f: _turned(gradient(70, 30), f),
}


def _turned(image: Image.Image, file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to look at it
    image.save(file, exif=exif)


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", SOURCES)
def test_predict_py_makes_the_tensor_that_training_makes(
    shipped_predict: ModuleType, tmp_path: Path, name: str, resize: str, interpolation: str
) -> None:
    from edgekd.data.normalise import normalised
    from edgekd.data.preprocess import preprocess
    from edgekd.safeio.images import decode

    SOURCES[name](tmp_path / name)
    settings = {"image_size": 32, "resize": resize, "interpolation": interpolation, "mean": [0.48, 0.45, 0.4], "std": [0.22, 0.23, 0.24]}
    trained = normalised(preprocess(decode((tmp_path / name).read_bytes(), name), 32, resize, interpolation)[None], settings)
    shipped = shipped_predict.preprocess(Image.open(tmp_path / name).convert("RGB"), settings)
    np.testing.assert_allclose(shipped, trained, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ replay (G28)
def test_replayed_decisions_give_the_same_bytes_in_a_clean_store(
    quickstart: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    with short_measurements():
        args = (*quickstart.args, "--replay", quickstart.folder, "--out", tmp_path / "run", "--json")
        result = run_here("compress", *args)
    assert result.code == quickstart.result.code, result.err
    assert not [s["name"] for s in result.json()["stages"] if s["cached"]], "a clean store holds nothing"
    assert hashes(tmp_path / "run" / "host") == hashes(quickstart.bundle)
    first, second = quickstart.steps, artifacts(tmp_path / "home")
    assert set(first) == set(second)
    assert {n for n in second if second[n].digest != first[n].digest} == {"host.profile"}  # timings, of which nothing is decided
    shipped = {n for n, a in second.items() if a.kind in (Kind.MODEL, Kind.GRAPH, Kind.BUNDLE)}
    assert shipped >= {"teacher", "distill", "prune", "recover", "recover.export", "quantize", "host.bundle"}


def test_replay_of_something_else_is_a_usage_error(quickstart_home: Finished, tmp_path: Path) -> None:
    result = run_here("compress", *quickstart_home.args, "--replay", tmp_path)
    assert result.code == 2
    assert "decisions" in result.err


# ------------------------------------------------------------------------------------------------------------ another device
def test_a_device_that_is_not_here_is_predicted_never_measured(quickstart_home: Finished, tmp_path: Path) -> None:
    with short_measurements():
        result = run_here("compress", *quickstart_home.args, "--device", "rpi5", "--out", tmp_path / "run", "--json")
    assert result.code in (0, 4), result.err
    run = result.json()
    [target] = run["targets"]
    assert (target["device"], target["measured"], target["budget_met"], target["latency_ms"]) == ("rpi5", False, None, None)
    assert target["predicted_ms"]["label"] == "predicted"
    assert target["predicted_ms"]["low"] < target["predicted_ms"]["p50"] < target["predicted_ms"]["high"]
    assert "not this machine" in result.err
    assert rows(run)["teacher"]["cached"]
    assert rows(run)["distill"]["cached"]
    assert run_here("verify", tmp_path / "run" / "rpi5").code == 0


def test_require_measured_refuses_it_before_any_work(quickstart: Finished, home: Path) -> None:
    result = run_here("compress", *quickstart.args, "--device", "rpi5", "--require-measured")
    assert result.code == 5
    assert "rpi5" in result.err
    assert not list((home / "v1").glob("*/*"))


# ------------------------------------------------------------------------------------------------------------ budgets and gates
def test_a_budget_that_cannot_be_met_ends_with_4_and_keeps_the_bundle(quickstart_home: Finished, tmp_path: Path) -> None:
    with short_measurements():
        args = (*quickstart_home.args, "-o", "targets.host.budget.p95_ms=0.000001", "-o", "targets.host.budget.size_mb=0.001")
        result = run_here("compress", *args, "--out", tmp_path / "run", "--json")
    assert result.code == 4
    run = result.json()
    assert run["accepted"] is False
    assert run["targets"][0]["budget_met"] is False
    assert "the budget of 0.001 MB" in run["targets"][0]["reason"]
    assert run_here("verify", run["targets"][0]["bundle"]).code == 0


@pytest.mark.slow
def test_the_shipped_recipe_as_it_is_reaches_its_bars(tmp_path: Path) -> None:
    """Accuracy and size; latency is for the bench tools, on a quiet machine."""
    result = run_apart("compress", "quickstart", "--out", tmp_path / "run", "--json", env={"EDGEKD_HOME": str(tmp_path / "home")})
    assert result.code == 0, result.err
    run = result.json()
    assert run["targets"][0]["metric"] >= 0.97
    assert run["teacher"]["size_bytes"] / run["targets"][0]["size_bytes"] >= 15
    assert all(s["verdict"] and s["reason"] for s in run["stages"] if s["kind"] in ("prune", "quantize"))
