"""A teacher in an ONNX file, from the recipe to the report: live, kept, refused, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import Result, artifacts, digits_model, linear_onnx, run_here

pytestmark = pytest.mark.usefixtures("quick", "stored")
RECIPE = """version: 1
data: {format: digits, image_size: 16, max_per_class: 20}
teacher: {onnx: teacher.onnx, mean: [0, 0, 0], std: [1, 1, 1]}
model: {arch: resnet10t, args: {zero_init_last: false}}
stages:
  - distill: {epochs: 1, batch_size: 32, augment: {policy: shift, pad: 1}, autocast: "off", channels_last: "off"}
targets: {host: {backend: onnxruntime, precision: fp32}}
accept: {accuracy_drop_max: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    linear_onnx(tmp_path / "teacher.onnx", side=16, classes=10, weights=digits_model())
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def compressed(recipe: Path, *more: str) -> Result:
    return run_here("compress", recipe, "--json", "--out", recipe.parent / f"run{len(list(recipe.parent.iterdir()))}", *more)


def test_a_student_learns_from_an_onnx_file(recipe: Path, home: Path) -> None:
    result = compressed(recipe)
    assert result.code == 0, result.err
    run = result.json()
    assert (run["teacher"]["arch"], run["teacher"]["metric"] > 0.8) == ("teacher.onnx", True)
    assert [s["name"] for s in run["stages"]][:2] == ["teacher", "distill"]
    assert run["curves"]["distill"][0]["terms"].keys() == {"label", "kd"}
    assert artifacts(home)["teacher"].meta["gives"] == "logits"
    again = compressed(
        recipe, "-o", "distill.views=1", "-o", "distill.method=ofa"
    )  # branches on the student; the teacher's outputs are enough
    assert again.code == 0, again.err
    kept = compressed(recipe, "-o", "distill.views=1", "-o", "distill.epochs=2")
    assert (kept.code, "distill.answers" in kept.err) == (0, True), kept.err


def test_the_same_teacher_with_softmax_larger_input_other_order_and_a_fixed_batch_says_the_same(recipe: Path, home: Path) -> None:
    """What it gives is brought to the data's classes as logits, so val metrics are equal."""
    weights, biases = digits_model(20)
    order = [*range(3, 10), 0, 1, 2]
    linear_onnx(recipe.parent / "teacher.onnx", side=20, classes=10, weights=(weights[order], biases[order]), softmax=True, batch=4)
    wrong = compressed(recipe)
    offered = f"-o teacher.classes={json.dumps([str(n) for n in order])}"
    assert (wrong.code, offered in wrong.err) == (3, True), wrong.err
    result = compressed(recipe, "-o", f"teacher.classes={[str(n) for n in order]}")
    assert result.code == 0, result.err
    assert result.json()["teacher"]["metric"] > 0.8
    meta = artifacts(home)["teacher"].meta
    assert (meta["gives"], meta["side"]) == ("probabilities", 20)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            "distill.method=at",
            2,
            "at needs teacher_taps, and only the teacher's outputs are known; methods for it: dist, dkd, kd, ofa",
        ),
        ("distill.method=[kd, nd]", 2, "combined needs class_means and embedding"),
        (
            "teacher.train.epochs=1",
            2,
            "teacher.train: a teacher given by onnx does not take it; it takes classes, image_size, mean, outputs, std",
        ),
        ("teacher.arch=resnet10t", 2, "teacher: expected one of arch, onnx and predictions"),
        ("teacher.mean=null", 2, "an ONNX file does not say how its input is normalised"),
        ("teacher.onnx=nowhere.onnx", 3, "nowhere.onnx"),
        ("teacher.image_size=24", 3, "its input is 16 x 16 pixels"),
        ("teacher.outputs=probabilities", 3, "its outputs are not probabilities"),
        ("teacher.classes=[a, b]", 3, "2 classes are named, and it has 10 outputs"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(recipe: Path, change: str, code: int, said: str) -> None:
    result = compressed(recipe, "-o", change)
    assert (result.code, said in result.text.replace("\n", " ")) == (code, True), result.text
    assert "] distill" not in result.err


def test_a_file_of_other_classes_is_refused_with_the_way_to_map_them(recipe: Path) -> None:
    linear_onnx(recipe.parent / "teacher.onnx", side=16, classes=12)
    result = compressed(recipe)
    assert result.code == 3
    assert "it has 12 outputs, the data have 10 classes" in result.out
    assert "teacher.classes=[0, 1, 2" in json.loads(result.out)["error"]["hint"]


def test_a_damaged_file_is_refused_by_its_own_name(recipe: Path) -> None:
    (recipe.parent / "teacher.onnx").write_bytes(b"not onnx")
    result = compressed(recipe)
    assert (result.code, json.loads(result.out)["error"]["code"]) == (3, "onnx")
    assert "teacher.onnx" in json.loads(result.out)["error"]["where"]


def test_a_teacher_that_knows_nothing_is_stopped(recipe: Path) -> None:
    linear_onnx(recipe.parent / "teacher.onnx", side=16, classes=10)
    result = compressed(recipe)
    assert (result.code, "a student learns nothing from it" in result.text) == (3, True), result.text
    assert compressed(recipe, "--no-gate").code in (0, 4)
