"""The command line as a user and as a script meet it: what it imports, prints, and exits with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgekd
from tests.support import QUICKSTART, Finished, environment, run_apart, run_here

HEAVY = ("torch", "timm", "onnxruntime", "torch_pruning", "sklearn")
LIGHT = {
    "--help": ["--help"],
    "devices list": ["devices", "list"],
    "devices show": ["devices", "show", "rpi5"],
    "check": ["check", QUICKSTART],
    "show": ["show", QUICKSTART],
    "recipes list": ["recipes", "list"],
    "methods list": ["methods", "list"],
    "plan": ["plan", QUICKSTART],
    "store list": ["store", "list"],
    "a mistake": ["check", QUICKSTART, "-o", "model.arch=resnet19"],
}
WATCH = """
import sys
from edgekd.cli import main
sys.argv = ["edgekd", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("LOADED", *[m for m in %r if m in sys.modules], file=sys.stderr)
    raise
"""


# ------------------------------------------------------------------------------------------------------------ imports
@pytest.mark.parametrize("name", LIGHT)
def test_commands_that_do_no_work_load_no_heavy_library(name: str, home: Path) -> None:
    command = [sys.executable, "-c", WATCH % (HEAVY,), *LIGHT[name]]
    p = subprocess.run(command, env=environment(EDGEKD_HOME=str(home)), capture_output=True, text=True, timeout=60)
    assert p.returncode == (2 if name == "a mistake" else 0), p.stderr
    assert p.stderr.splitlines()[-1] == "LOADED"


def test_python_m_edgekd_is_the_same_program() -> None:
    assert run_apart("recipes", "list").out == run_here("recipes", "list").out != ""


# ------------------------------------------------------------------------------------------------------------ json
@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (("devices", "list"), {"id", "name", "kind", "runtimes", "confidence"}),
        (("recipes", "list"), {"name", "about"}),
        (("methods", "list"), {"kind", "name", "about"}),
        (("plan", QUICKSTART), {"step", "stage", "method", "gives", "state", "why", "seconds", "bytes"}),
        (("show", QUICKSTART), {"path", "value", "source"}),
        (("doctor",), {"status", "name", "seen", "wanted", "hint"}),
    ],
)
def test_lists_are_json_arrays_of_objects(args: tuple[str, ...], fields: set[str], home: Path) -> None:
    result = run_here(*args, "--json")
    rows = result.json()
    assert result.code == 0 or args == ("doctor",)  # doctor: 5 where this machine lacks something
    assert rows
    assert all(set(row) >= fields for row in rows)


def test_in_a_pipe_a_table_has_one_line_a_row() -> None:
    rows, listed = run_here("devices", "list", "--json").json(), run_here("devices", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == ["id", *(row["id"] for row in rows)]


def test_the_version_is_one_line() -> None:
    assert run_here("--version").out == f"edgekd {edgekd.__version__}\n"


def test_a_shipped_recipe_as_json_holds_its_text() -> None:
    assert run_here("recipes", "show", "quickstart", "--json").json()["text"] == run_here("recipes", "show", "quickstart").out.rstrip()


def test_check_as_json_names_stages_and_targets() -> None:
    found = run_here("check", QUICKSTART, "--json").json()
    assert found["ok"] is True
    assert (found["stages"], found["targets"]) == (["distill", "prune", "recover", "quantize"], ["host"])


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (("compress", "nowhere.yaml"), 2, "usage"),
        (("check", QUICKSTART, "-o", "distill.epochs=many"), 2, "recipe"),
        (("devices", "show", "rpi55"), 2, "unknown_name"),
        (("methods", "show", "offa"), 2, "unknown_name"),
        (("profile", "nowhere.onnx"), 3, "file_missing"),
        (("predict", "nowhere.onnx", "--device", "rpi5"), 3, "file_missing"),
        (("verify", "nowhere"), 3, "file_missing"),
        (("compile", "nowhere.onnx"), 3, "file_missing"),
        (("export", "nowhere.onnx"), 3, "file_missing"),
        (("import", "nowhere.pt", "--arch", "resnet18"), 3, "file_missing"),
        (("store", "why", "abc"), 2, "usage"),
        (("no-such-command",), 2, "usage"),
        (("check", QUICKSTART, "--no-such-option"), 2, "usage"),
        (("check",), 2, "usage"),
        (("profile", "x.onnx", "--threads", "0"), 2, "usage"),
    ],
)
def test_errors_are_json_objects_on_stdout_with_a_sentence_on_stderr(args: tuple[str, ...], code: int, kind: str, home: Path) -> None:
    result = run_here(*args, "--json")
    assert result.code == code, result.text
    assert set(result.json()) == {"error"}
    assert set(result.json()["error"]) == {"code", "what", "where", "hint"}
    assert result.json()["error"]["code"] == kind
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.text


def test_without_json_an_error_leaves_stdout_empty() -> None:
    result = run_here("check", "nowhere.yaml")
    assert (result.code, result.out) == (2, "")
    assert "nowhere.yaml" in result.err
    assert "hint: " in result.err


# ------------------------------------------------------------------------------------------------------------ manners
def test_no_color_and_no_terminal_mean_no_escape_codes(home: Path) -> None:
    for args in (("devices", "list"), ("check", QUICKSTART, "-o", "distill.method=offa")):
        assert "\x1b" not in run_apart(*args).text


def test_no_color_holds_even_where_colour_is_forced() -> None:
    coloured = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}
    said = run_apart("check", QUICKSTART, "-o", "distill.method=offa", env=coloured).err
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", said)


def test_a_traceback_comes_with_debug_only(tmp_path: Path) -> None:
    plain, debug = run_apart("check", "nowhere.yaml"), run_apart("--debug", "check", "nowhere.yaml")
    assert "Traceback" not in plain.text
    assert "Traceback (most recent call last)" in debug.err
    assert "UsageError" in debug.err


def test_a_fault_of_edgekd_itself_is_7_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.api

    def broken() -> None:
        raise ZeroDivisionError("one by none")

    monkeypatch.setattr(edgekd.api, "list_recipes", broken)
    result = run_here("recipes", "list")
    assert result.code == 7
    assert "ZeroDivisionError: one by none" in result.err
    assert "--debug" in result.err
    assert "Traceback" not in result.text


def test_no_arguments_show_the_help() -> None:
    result = run_here()
    assert "compress" in result.text
    assert result.code in (0, 2)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m edgekd methods list architectures --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    p = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
    assert (p.returncode, p.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------ values
def test_an_override_may_hold_an_equals_sign_and_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "a=b c"
    folder.mkdir()
    rows = {r["path"]: r for r in run_here("show", QUICKSTART, "-o", f"data.root={folder}", "--json").json()}
    assert rows["data.root"]["value"] == str(folder)
    assert rows["data.root"]["source"].startswith("-o ")


def test_an_override_without_an_equals_sign_says_what_was_expected() -> None:
    result = run_here("check", QUICKSTART, "-o", "distill.epochs")
    assert result.code == 2
    assert "NAME.FIELD=VALUE" in result.err


def test_the_last_of_two_overrides_wins_and_show_says_which() -> None:
    rows = {r["path"]: r for r in run_here("show", QUICKSTART, "-o", "distill.epochs=3", "-o", "distill.epochs=4", "--json").json()}
    assert (rows["distill.epochs"]["value"], rows["distill.epochs"]["source"]) == (4, "-o distill.epochs=4")
    assert re.search(r"quickstart\.yaml:\d+:\d+", rows["data.format"]["source"])


# ------------------------------------------------------------------------------------------------------------ lists
def test_methods_show_tells_when_to_use_ofa_and_its_knobs() -> None:
    found = run_here("methods", "show", "ofa", "--json").json()
    assert found["kind"] == "distill"
    assert found["fields"]
    assert all(f["description"] for f in found["fields"])
    assert "2310.19444" in found["about"]
    assert "description" in run_here("methods", "show", "ofa").out


def test_methods_show_tells_what_each_distiller_was_measured_to_cost_and_where_it_refuses() -> None:
    for name in [r["name"] for r in run_here("methods", "list", "distill", "--json").json() if r["name"] != "combined"]:
        costs = run_here("methods", "show", name, "--json").json()["costs"]
        assert "tools/bench_costs.py" in costs["measured"]
        assert costs["rows"], f"{name} was not measured: python tools/bench_costs.py"
    rows = {r["pair"]: r["step"] for r in run_here("methods", "show", "cskd", "--json").json()["costs"]["rows"]}
    assert rows["ViT to CNN"] == "refused"
    assert float(rows["CNN to ViT"].removesuffix("x")) > 1
    assert "Measured: a training step" in run_here("methods", "show", "kd").out
    assert "costs" not in run_here("methods", "show", "ptq", "--json").json()


def test_devices_show_gives_each_number_with_its_origin() -> None:
    assert run_here("devices", "show", "rpi5", "--json").json()["id"] == "rpi5"
    said = run_here("devices", "show", "rpi5").out
    assert "origin" in said
    assert "data sheet" in said


def test_host_is_the_first_device() -> None:
    assert run_here("devices", "list", "--json").json()[0]["id"] == "host"


# ------------------------------------------------------------------------------------------------------------ the store
def test_store_list_why_verify_and_gc_speak_of_the_run(quickstart_home: Finished) -> None:
    listed = run_here("store", "list", "--json").json()
    assert {"teacher", "distill", "prune", "quantize", "host.bundle"} <= {r["step"] for r in listed}
    key = next(r["key"] for r in listed if r["step"] == "distill")
    why = {r["ingredient"]: r["value"] for r in run_here("store", "why", key, "--json").json()}
    assert why["config.epochs"] >= 1
    assert why["method.name"] == "ofa"
    verified = run_here("store", "verify", "--json")
    assert (verified.code, verified.json()["problems"]) == (0, [])
    collected = run_here("store", "gc", "--older-than", "1000", "--dry-run", "--json").json()
    assert collected["kept"] == len(listed)


def test_store_why_of_two_keys_names_what_differs(quickstart_home: Finished) -> None:
    keys = {r["step"]: r["key"] for r in run_here("store", "list", "--json").json()}
    rows = run_here("store", "why", keys["distill.export"], keys["teacher.export"], "--json").json()
    assert {r["ingredient"] for r in rows} == {"inputs.model", "step"}


def test_damage_in_the_store_is_found_with_exit_3_and_then_gone(
    quickstart: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    home = Path(shutil.copytree(quickstart.home, tmp_path / "home"))
    monkeypatch.setenv("EDGEKD_HOME", str(home))
    victim = home / quickstart.steps["distill"].path.relative_to(quickstart.home) / "model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    victim.write_bytes(raw)
    found = run_here("store", "verify")
    assert found.code == 3
    assert "model.safetensors" in found.out
    assert run_here("store", "verify").code == 0


# ------------------------------------------------------------------------------------------------------------ measuring
@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x @ w, 8 inputs to 4 outputs, dynamic batch."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="head")],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_profile_measures_a_file_of_one_s_own(onnx_file: Path) -> None:
    result = run_here("profile", onnx_file, "--seconds", "0.3", "--layers", "--json")
    assert result.code == 0, result.err
    found = result.json()
    assert found["measured"] is True
    assert found["size_bytes"] == onnx_file.stat().st_size
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p95"] <= found["latency_ms"]["p99"]
    assert found["latency_ms"]["ci95"][0] <= found["latency_ms"]["p50"] <= found["latency_ms"]["ci95"][1]
    assert [o["op_type"] for o in found["operators"]] == ["MatMul"]


def test_profile_measures_a_verified_bundle(quickstart: Finished) -> None:
    said = run_here("profile", quickstart.bundle, "--seconds", "0.3")
    assert said.code == 0, said.err
    assert "p50" in said.out


def test_profile_on_a_device_that_is_not_here_is_5_and_points_at_predict(onnx_file: Path) -> None:
    result = run_here("profile", onnx_file, "--device", "rpi5", "--json")
    assert result.code == 5
    assert result.json()["error"]["code"] == "device"
    assert "predict" in result.json()["error"]["hint"]


def test_a_transport_that_does_not_exist_yet_is_refused(onnx_file: Path) -> None:
    result = run_here("profile", onnx_file, "--device", "rpi5", "--via", "ssh")
    assert result.code == 5
    assert "host" in result.err


@pytest.mark.parametrize("device", ["host", "rpi5", "x86-vnni", "jetson-orin-nano", "rtx4090", "nvidia-h200"])
def test_predict_labels_its_figure_on_every_device(onnx_file: Path, device: str) -> None:
    result = run_here("predict", onnx_file, "--device", device, "--json")
    assert result.code == 0, result.err
    assert "predicted" in json.dumps(result.json())
    assert result.json()["low_ms"] < result.json()["p50_ms"] < result.json()["high_ms"]
    assert run_here("predict", onnx_file, "--device", device).out.startswith("predicted, not measured")


def test_doctor_prints_a_line_per_check(home: Path) -> None:
    result = run_here("doctor")
    assert result.code in (0, 5)
    assert "torch" in result.out
    assert "Traceback" not in result.text
