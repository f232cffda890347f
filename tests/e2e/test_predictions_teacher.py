"""A teacher that is a file of predictions, from the recipe to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.data.dataset import Dataset
from edgekd.safeio.arrays import write_arrays
from tests.support import Result, artifacts, digits_model, run_here

pytestmark = pytest.mark.usefixtures("quick", "stored")
RECIPE = """version: 1
data: {format: digits, image_size: 16, max_per_class: 20}
teacher: {predictions: teacher.npz}
model: {arch: resnet10t, args: {zero_init_last: false}}
stages:
  - distill: {epochs: 1, batch_size: 32, autocast: "off", channels_last: "off"}
targets: {host: {backend: onnxruntime, precision: fp32}}
accept: {accuracy_drop_max: 1}
"""


def said() -> tuple[list[str], np.ndarray[Any, Any]]:
    """Ids and logits (n, 10) of all digits by a linear model."""
    from edgekd.data.config import DataConfig
    from edgekd.data.formats.digits import Digits
    from edgekd.data.preprocess import preprocess

    digits, (weights, biases) = Digits(), digits_model()
    ids = [s.id for s in digits.scan(DataConfig(format="digits", image_size=16)).samples]
    images = np.stack([preprocess(digits.image(digits.read(Path(), i), i), 16, "squash", "bilinear") for i in ids])
    return ids, images.transpose(0, 3, 1, 2).reshape(len(ids), -1) / 255 @ weights.T + biases


IDS, LOGITS = said()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_arrays(tmp_path / "teacher.npz", {"ids": np.array(IDS), "logits": LOGITS})
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def compressed(recipe: Path, *more: str) -> Result:
    return run_here("compress", recipe, "--json", "--out", recipe.parent / f"run{len(list(recipe.parent.iterdir()))}", *more)


def test_a_student_learns_from_predictions(recipe: Path, home: Path) -> None:
    result = compressed(recipe, "-o", "distill.augment.policy=shift")
    assert result.code == 0, result.err
    assert "the teacher's predictions are of the images as they are" in result.err
    run, steps = result.json(), artifacts(home)
    assert (run["teacher"]["arch"], run["teacher"]["size_bytes"], run["teacher"]["latency_ms"]) == ("teacher.npz", None, None)
    data = Dataset.open(steps["data"].path)
    rows = {i: n for n, i in enumerate(IDS)}
    for part in ("train", "val", "test"):
        wanted = LOGITS[[rows[data.ids[i]] for i in data.split(part)]]
        found = np.load(steps["teacher"].path / "answers.npy")[0] if part == "train" else np.load(steps["teacher"].path / f"{part}.npy")
        assert np.allclose(found, wanted, rtol=1e-3, atol=2e-3)
    right = LOGITS[[rows[data.ids[i]] for i in data.split("test")]].argmax(1) == data.labels[data.split("test")]
    assert run["teacher"]["metric"] == pytest.approx(right.mean())
    assert run["accept"]["reference"] == "teacher"


def test_probabilities_with_columns_in_another_order_are_the_same_teacher(recipe: Path, home: Path) -> None:
    order = [*range(3, 10), 0, 1, 2]
    shares = np.exp(LOGITS - LOGITS.max(1, keepdims=True))
    shares = (shares / shares.sum(1, keepdims=True))[:, order]
    rows = [",".join([i, *(f"{v:.9g}" for v in row)]) for i, row in zip(IDS, shares, strict=True)]
    (recipe.parent / "teacher.csv").write_text("\n".join([f"id,{','.join(map(str, order))}", *rows]), encoding="utf-8")
    result = compressed(recipe, "-o", f"teacher.predictions={recipe.parent / 'teacher.csv'}")
    assert result.code == 0, result.err
    steps = artifacts(home)
    assert steps["teacher"].meta["gives"] == "probabilities"
    data, at = Dataset.open(steps["data"].path), {i: n for n, i in enumerate(IDS)}
    wanted = LOGITS[[at[data.ids[i]] for i in data.split("val")]]
    assert np.array_equal(np.load(steps["teacher"].path / "val.npy").argmax(1), wanted.argmax(1))


# ------------------------------------------------------------------------------------------------------------ bad input
def test_images_that_the_file_misses_are_counted_and_named(recipe: Path) -> None:
    write_arrays(recipe.parent / "teacher.npz", {"ids": np.array(IDS[100:]), "logits": LOGITS[100:]})
    result = compressed(recipe, "-o", "data.max_per_class=null")
    error = json.loads(result.out)["error"]
    assert (result.code, error["code"]) == (3, "predictions")
    assert "it misses 100 of 1797 images" in error["what"]
    assert "the first '0000', '0001', '0002'" in error["what"]
    assert "predict the missing images too" in error["hint"]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            "distill.method=fitnet",
            2,
            "fitnet needs teacher_taps, and only the teacher's outputs are known; methods for it: dist, dkd, kd, ofa",
        ),
        ("distill.augment.mixup=0.2", 2, "distill.augment.mixup: mixed images are new, and a file of predictions says nothing of them"),
        ("teacher.mean=[0, 0, 0]", 2, "a teacher given by predictions does not take it; it takes classes, outputs"),
        ("teacher.onnx=t.onnx", 2, "expected one of arch, onnx and predictions"),
        ("teacher.outputs=probabilities", 3, "its outputs are not probabilities"),
        ("teacher.classes=[a, b]", 3, "2 classes are named, and it has 10 outputs"),
        ("teacher.predictions=nowhere.npz", 3, "nowhere.npz"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(recipe: Path, change: str, code: int, said: str) -> None:
    result = compressed(recipe, "-o", change)
    assert (result.code, said in result.text.replace("\n", " ")) == (code, True), result.text
    assert "] distill" not in result.err


def test_predictions_of_other_classes_in_another_order_and_of_chance_are_refused(recipe: Path) -> None:
    write_arrays(recipe.parent / "teacher.npz", {"ids": np.array(IDS), "logits": LOGITS, "classes": np.array([f"n{i}" for i in range(10)])})
    result = compressed(recipe)
    assert (result.code, "it has no output for 10 classes of the data" in result.out) == (3, True), result.text
    assert "teacher.classes=[0, 1, 2" in json.loads(result.out)["error"]["hint"]
    write_arrays(recipe.parent / "teacher.npz", {"ids": np.array(IDS), "logits": np.roll(LOGITS, 1, axis=1)})
    result = compressed(recipe)
    assert (result.code, "another order of the classes" in result.text) == (3, True), result.text
    write_arrays(recipe.parent / "teacher.npz", {"ids": np.array(IDS), "logits": np.random.default_rng(0).permutation(LOGITS)})
    result = compressed(recipe)
    assert (result.code, "a student learns nothing from it" in result.text) == (3, True), result.text
