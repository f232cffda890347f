"""The recipes for teachers that are not a timm model, and for images without labels, run to the end on built-in data."""

from __future__ import annotations

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
