"""`labels: none`: a folder of images and a teacher are enough, and what is measured is agreement with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekd.data.dataset import Dataset
from edgekd.plan import build_plan
from edgekd.recipe import load
from edgekd.safeio.arrays import write_arrays
from tests.support import Result, artifacts, linear_onnx, run_here, write_images

pytestmark = pytest.mark.usefixtures("quick", "stored")
RECIPE = """version: 1
data: {format: image_folder, root: images, image_size: 16, labels: none, classes: 3, split: {val: 0.3, test: 0.3}}
teacher: {onnx: teacher.onnx, mean: [0, 0, 0], std: [1, 1, 1]}
model: {arch: resnet10t, args: {zero_init_last: false}}
stages:
  - distill: {epochs: 2, batch_size: 16, keep: best, evaluations: 2, autocast: "off", channels_last: "off"}
targets: {host: {backend: onnxruntime, precision: fp32}}
accept: {accuracy_drop_max: 1}
"""


def by_colour(side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The linear classifier of `write_images`' three colours."""
    weights = np.zeros((3, 3, side, side))
    for c in range(3):
        weights[c, c] = 20 / side**2
    return weights.reshape(3, -1), np.zeros(3)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """60 images without a label: in the folder itself, in folders, and in folders of folders."""
    made = write_images(tmp_path / "made", each=20, side=16)
    for i, path in enumerate(sorted(made.rglob("*.png"))):
        place = tmp_path / "images" / ("", "some", "some/more")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / f"{path.parent.name}-{path.name}")
    linear_onnx(tmp_path / "teacher.onnx", side=16, classes=3, weights=by_colour())
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def compressed(recipe: Path, *more: str) -> Result:
    return run_here("compress", recipe, "--json", "--out", recipe.parent / f"run{len(list(recipe.parent.iterdir()))}", *more)


def said_of(recipe: Path, path: str) -> tuple[object, str]:
    rows = {r["path"]: (r["value"], r["source"]) for r in run_here("show", recipe, "--json").json()}
    return rows[path]


def test_a_folder_of_images_and_a_teacher_are_enough(recipe: Path, home: Path) -> None:
    result = compressed(recipe)
    assert result.code == 0, result.err
    assert "every metric is agreement with the teacher" in result.err
    run, steps = result.json(), artifacts(home)
    data = Dataset.open(steps["data"].path)
    assert sorted(data.ids)[:2] == ["class0-000.png", "class0-003.png"]
    assert any(i.startswith("some/more/class2") for i in data.ids)
    true = np.array([int(Path(i).name[5]) for i in data.ids])
    assert np.array_equal(data.labels, true)  # this teacher is always right
    assert (data.labelled, Dataset.open(steps["data.images"].path).labelled) == (True, False)
    assert {s["metric_name"] for s in run["stages"] if s["metric"] is not None} == {"agreement"}
    assert (run["teacher"]["metric_name"], run["teacher"]["metric"]) == ("agreement", 1.0)
    assert run["targets"][0]["metrics"].keys() == {"agreement"}
    assert "agreement with the teacher on test within 100 points" in run["accept"]["reason"]
    assert all(row["terms"]["label"] == 0 for row in run["curves"]["distill"])
    assert [row["val_metric"] for row in run["curves"]["distill"]][-1] is not None
    card = Path(run["targets"][0]["bundle"]) / "MODEL_CARD.md"
    assert "Its images had no labels." in card.read_text(encoding="utf-8")
    assert "against its teacher's decisions" in card.with_name("PROVENANCE.md").read_text(encoding="utf-8")


def test_the_resolved_recipe_says_what_follows_from_it(recipe: Path) -> None:
    assert said_of(recipe, "distill.label_weight") == (0.0, "data.labels")
    text = recipe.read_text().replace(", classes: 3", "").replace("onnx: teacher.onnx", "classes: [red, green, blue], onnx: teacher.onnx")
    recipe.write_text(text)
    assert said_of(recipe, "data.classes") == (["red", "green", "blue"], "teacher")


def test_gates_and_pruning_read_agreement_too(recipe: Path) -> None:
    more = "\n  - prune: {criterion: taylor, target: {macs: 0.7}}\n  - distill: {name: recover, epochs: 1, batch_size: 16}\ntargets:"
    recipe.write_text(recipe.read_text().replace("\ntargets:", more))
    result = compressed(recipe)
    assert result.code == 0, result.err
    [prune] = [s for s in result.json()["stages"] if s["name"] == "prune"]
    assert "agreement with the teacher" in prune["reason"]
    assert "accuracy" not in prune["reason"]


def test_labels_of_val_and_test_are_used_where_both_have_them(recipe: Path, home: Path) -> None:
    folder = recipe.parent / "images"
    for part, start in (("val", 0), ("test", 6)):
        for c in range(3):
            place = folder / part / f"class{c}"
            place.mkdir(parents=True)
            for k in range(start, start + 6):
                [found] = folder.rglob(f"class{c}-{k:03d}.png")
                found.rename(place / found.name)
    (folder / "train").mkdir()
    for rest in list(folder.glob("*.png")) + list(folder.glob("some")):
        rest.rename(folder / "train" / rest.name)
    wrong = np.roll(by_colour()[0], 1, axis=0)  # a teacher that is wrong about every image, which only labels can tell
    linear_onnx(recipe.parent / "teacher.onnx", side=16, classes=3, weights=(wrong, np.zeros(3)))
    result = compressed(recipe, "-o", "data.classes=[class0, class1, class2]", "--no-gate")
    assert result.code in (0, 4), result.err
    run, data = result.json(), Dataset.open(artifacts(home)["data"].path)
    assert (run["teacher"]["metric_name"], run["teacher"]["metric"]) == ("top1", 0.0)
    true = np.array([int(Path(i).name[5]) for i in data.ids])
    assert np.array_equal(data.labels[data.split("test")], true[data.split("test")])
    assert np.array_equal(data.labels[data.split("train")], (true[data.split("train")] + 1) % 3)
    shutil.rmtree(folder / "test" / "class2")
    (folder / "test" / "other").mkdir()
    write_images(recipe.parent / "extra", classes=1, each=2, side=16)
    (recipe.parent / "extra" / "class0" / "000.png").rename(folder / "test" / "other" / "x.png")
    notes = build_plan(load(str(recipe), ["data.classes=[class0, class1, class2]"])).notes
    assert any("every metric is agreement with the teacher" in note for note in notes)  # one image of test has no label


def test_predictions_name_the_classes(recipe: Path, home: Path) -> None:
    ids = sorted(p.relative_to(recipe.parent / "images").as_posix() for p in (recipe.parent / "images").rglob("*.png"))
    logits = 5 * np.eye(3)[[int(Path(i).name[5]) for i in ids]]
    write_arrays(recipe.parent / "said.npz", {"ids": np.array(ids), "logits": logits, "classes": np.array(["red", "green", "blue"])})
    text = (
        recipe.read_text()
        .replace(", classes: 3", "")
        .replace("onnx: teacher.onnx, mean: [0, 0, 0], std: [1, 1, 1]", "predictions: said.npz")
    )
    recipe.write_text(text)
    result = compressed(recipe)
    assert result.code == 0, result.err
    data = Dataset.open(artifacts(home)["data"].path)
    assert data.classes == ("red", "green", "blue")
    assert np.array_equal(data.labels, [int(Path(i).name[5]) for i in data.ids])


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("distill.label_weight=0.5", 2, "distill.label_weight: there are no labels, so its weight is 0"),
        ("distill.method=dkd", 2, "dkd needs labels, and data.labels is none; methods without:"),
        ("distill.method=[kd, {ofa: {gamma: 1.2}}]", 2, "combined needs labels"),
        ("baselines=[student]", 2, "a student alone is trained with labels"),
        ("data.max_per_class=5", 2, "max_per_class and train_per_class count by label, and there are none"),
        ("data.labels=given", 2, "classes are those of the labels"),
        ("teacher=null", 2, "without labels there is nothing to learn from but a teacher"),
        ("data.classes=null", 3, "nothing says how many classes there are"),
        ("data.classes=4", 3, "it has 3 outputs, the data have 4 classes"),
        ("data.root=nowhere", 3, "data folder not found"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(recipe: Path, change: str, code: int, said: str) -> None:
    result = compressed(recipe, "-o", change)
    assert (result.code, said in result.text.replace("\n", " ")) == (code, True), result.text
    assert "] distill" not in result.err


def test_a_stage_that_learns_from_labels_is_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("  - distill: {", "  - train: {"))
    result = run_here("check", recipe)
    assert (result.code, "stage 'train' learns from labels, and data.labels is none; use distill" in result.err) == (2, True)


def test_a_teacher_that_says_one_thing_is_stopped(recipe: Path) -> None:
    linear_onnx(recipe.parent / "teacher.onnx", side=16, classes=3, weights=(by_colour()[0], np.array([100.0, 0, 0])))
    result = compressed(recipe)
    assert (result.code, json.loads(result.out)["error"]["code"]) == (3, "refused"), result.text
