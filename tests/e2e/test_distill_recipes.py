"""The recipes for teachers that are not a timm model, and for images without labels, run to the end on built-in data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from tests.e2e.test_predictions_teacher import IDS, LOGITS
from tests.support import digits_model, linear_onnx, run_here

pytestmark = [pytest.mark.usefixtures("quick", "stored"), pytest.mark.slow]
SMALL = ("data.format=digits", "data.image_size=32", "distill.epochs=1", "distill.batch_size=64", "accept.accuracy_drop_max=1")


def files(folder: Path) -> dict[str, list[str]]:
    """What each recipe's teacher is, made here."""
    linear_onnx(folder / "teacher.onnx", side=16, classes=10, weights=digits_model(), softmax=True)
    rows = [",".join([i, *(f"{v:.9g}" for v in row)]) for i, row in zip(IDS, LOGITS, strict=True)]
    (folder / "said.csv").write_text("\n".join([f"id,{','.join(map(str, np.arange(10)))}", *rows]), encoding="utf-8")
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), folder / "teacher.safetensors")
    onnx = [f"teacher.onnx={folder / 'teacher.onnx'}", "teacher.mean=[0, 0, 0]", "teacher.std=[1, 1, 1]"]
    return {
        "black-box-onnx": [*onnx, "data.max_per_class=20"],
        "predictions": [f"teacher.predictions={folder / 'said.csv'}", "data.max_per_class=20"],
        "label-free": ["teacher.arch=resnet10t", f"teacher.weights={folder / 'teacher.safetensors'}", "data.split={val: 0.4, test: 0.4}"],
    }


@pytest.mark.parametrize("name", ["black-box-onnx", "predictions", "label-free"])
def test_the_recipe_runs_to_the_end(name: str, tmp_path: Path) -> None:
    changes = [part for c in (*SMALL, *files(tmp_path)[name]) for part in ("-o", c)]
    result = run_here(
        "compress", f"distill/{name}", "--no-gate", "--json", "--out", tmp_path / "run", *changes, "-o", "targets.host.precision=int8"
    )
    assert result.code in (0, 4), result.err
    run = result.json()
    assert run["teacher"]["metric_name"] == ("agreement" if name == "label-free" else "top1")
    assert run["targets"][0]["precision"] == "int8"


def test_an_assistant_is_measured_beside_the_direct_way_and_the_decision_can_be_replayed(tmp_path: Path) -> None:
    short = ["-o", "teacher.train.epochs=1", "-o", "distill.epochs=1", "-o", "accept.accuracy_drop_max=1", "--json"]
    run = run_here("compress", "distill/assistant", *short, "--out", tmp_path / "run").json()
    rows = {r["name"]: r for r in run["stages"]}
    assert rows["assistant"]["metric"] is not None
    assert rows["distill"]["size_bytes"] < rows["assistant"]["size_bytes"] < run["teacher"]["size_bytes"]
    assert rows["distill.assisted"]["verdict"] in ("kept", "neutral", "rolled back")
    decisions = json.loads((tmp_path / "run" / "decisions.json").read_text())
    flipped = "before" if decisions["distill.assistant"]["chosen"] == "after" else "after"
    decisions["distill.assistant"]["chosen"] = flipped
    (tmp_path / "d.json").write_text(json.dumps(decisions))
    again = run_here("compress", "distill/assistant", *short, "--replay", tmp_path / "d.json", "--out", tmp_path / "again").json()
    assert all(r["cached"] for r in again["stages"] if r["kind"] in ("train", "distill"))
    shipped = [next(r["key"] for r in found["stages"] if r["name"] == "export") for found in (run, again)]
    assert shipped[0] != shipped[1]  # the other student's graph
