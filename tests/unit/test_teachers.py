"""A teacher as it must not be: fed with another model's images, with numbers that are none, other labels, or no better than its student."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.console import Console
from edgekd.context import Context
from edgekd.data.config import DataConfig
from edgekd.data.dataset import Dataset, build
from edgekd.data.normalise import normalised
from edgekd.errors import InputRefused, TrainingDiverged
from edgekd.lessons import lessons
from edgekd.models import build as models
from edgekd.models.labels import in_order_of
from edgekd.models.spec import ModelConfig, ModelSpec
from edgekd.stages._stage import DECISION, Settings
from edgekd.stages.preflight import Preflight, Probe
from edgekd.tasks.classification import Classification
from edgekd.train.config import TrainConfig
from edgekd.train.images import Job, Speed, Teacher
from edgekd.train.loop import fit
from edgekd.train.pair import teach
from edgekd.train.views import View
from tests.support import Result, run_here, write_images

SMALL = ModelConfig(arch="resnet10t", args={"channels": [8, 8, 16, 16]})
TOKENS = ModelConfig(arch="vit_tiny_patch16_224", args={"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 4})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("data")
    build(DataConfig(format="digits", image_size=32, max_per_class=4), 0, folder)
    return Artifact("0" * 64, Kind.DATA, folder, "")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return Context(store=None, console=Console(quiet=True), work=tmp_path)  # type: ignore[arg-type]  # nothing here touches the store


def saved(folder: Path, config: ModelConfig, *, times: float = 1.0) -> Artifact:
    """A model artifact with untrained weights; `times` spoils those of the classifier."""
    spec = models.make_spec(config, num_classes=10, image_size=32)
    model = models.build(spec)
    with torch.no_grad():
        for parameter in list(model.parameters())[-2:]:
            parameter.uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).mul_(times)
    folder.mkdir()
    models.save_model(model, spec, folder)
    return Artifact("0" * 64, Kind.MODEL, folder, "")


# ------------------------------------------------------------------------------------------------------------ preprocessing
class Recorder(nn.Module):
    """Keeps what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.fed = nn.Linear(3, 10), []

    def forward(self, images: Tensor) -> Tensor:
        self.fed.append(images.detach().clone())
        out: Tensor = self.head(images.mean((2, 3)))
        return out


def spec_of(size: int, mean: float, std: float) -> ModelSpec:
    return ModelSpec(arch="recorder", num_classes=10, image_size=size, mean=(mean,) * 3, std=(std,) * 3, timm="none")


def test_each_model_of_a_pair_is_fed_with_its_own_mean_deviation_and_size(data: Artifact, ctx: Context, tmp_path: Path) -> None:
    student, teacher = Recorder(), Recorder()
    small, large = spec_of(32, 0.5, 0.25), spec_of(48, 0.1, 0.5)
    dataset = Dataset.open(data.path)
    cfg = TrainConfig(epochs=1, batch_size=8, autocast="off", channels_last="off", evaluations=1)
    job = Job("pair", student, small, dataset, Classification(), cfg, 0, tmp_path, Speed())
    kd = registry.load("distill", "kd")
    teach(job, kd(kd.Config()), Teacher(teacher.eval(), View(large), Speed()), teacher, large)
    teacher.fed.clear()
    student.fed.clear()
    fit(job, ctx)
    mine, its = student.fed[0], teacher.fed[0]
    assert mine.shape[-2:] == (32, 32)
    assert its.shape[-2:] == (48, 48)
    pixels = mine * 0.25 + 0.5
    resized = nn.functional.interpolate(pixels, (48, 48), mode="bilinear", antialias=True, align_corners=False)
    assert torch.allclose(its, (resized - 0.1) / 0.5, atol=1e-5)


def test_what_is_evaluated_is_brought_to_the_models_own_size_as_in_training() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    spec = spec_of(48, 0.1, 0.5)
    found = normalised(pixels, {"image_size": 48, "mean": spec.mean, "std": spec.std})
    trained = View(spec)(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert found.shape == (2, 3, 48, 48)
    assert float(np.abs(found - trained.numpy()).max()) <= 1.1 / 255 / 0.5  # it rounds to bytes


def test_a_teacher_may_take_larger_images_than_the_data_and_the_student_may_not(tmp_path: Path) -> None:
    taken = ("-o", "teacher.args={}", "-o", "teacher.image_size=224")
    result = run_here("wire", "quickstart", *taken, "--json")
    assert result.code == 0, result.text
    assert [m["input"] for m in result.json()["models"]] == [224, 32]
    refused = run_here("check", "quickstart", "-o", "model.image_size=64")
    assert refused.code == 2
    assert "the student takes images of data.image_size" in refused.err


# ------------------------------------------------------------------------------------------------------------ not finite
def test_a_teacher_that_stops_being_finite_is_named_and_not_the_loss(data: Artifact, ctx: Context, tmp_path: Path) -> None:
    calls: list[int] = []

    class Spoilt(Recorder):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(images) * (math.nan if len(calls) == 3 else 1.0)

    student, teacher, spec = Recorder(), Spoilt(), spec_of(32, 0.5, 0.5)
    cfg = TrainConfig(epochs=2, batch_size=8, autocast="off", channels_last="off", evaluations=1)
    job = Job("pair", student, spec, Dataset.open(data.path), Classification(), cfg, 0, tmp_path, Speed())
    kd = registry.load("distill", "kd")
    teach(job, kd(kd.Config()), Teacher(teacher.eval(), View(spec), Speed()), teacher, spec)
    calls.clear()
    with pytest.raises(TrainingDiverged, match="the teacher's outputs are not finite at step 2") as caught:
        fit(job, ctx)
    assert caught.value.where == "pair"
    assert "pair.autocast=off" in str(caught.value.hint)


def flight(data: Artifact, folder: Path, ctx: Context, teacher: Artifact, student: ModelConfig, method: str, **config: Any) -> list[str]:
    """Preflight of one distill stage, without targets; its warnings."""
    cls = registry.load("distill", method)
    probe = Probe(stage="distill", name="distill", method=method, config=cls.Config().model_dump(mode="json"))
    (folder / "out").mkdir()
    inputs = {"student": saved(folder / "student", student), "teacher?": teacher, "teacher": teacher, "data": data}
    settings = Settings("preflight", Preflight.Config(probes=(probe,), **config))
    Preflight().run(settings, inputs, folder / "out", ctx)
    decided = Artifact("0" * 64, Kind.DECISION, folder / "out", "").json(DECISION)
    return list(decided["warnings"])


def test_preflight_stops_at_a_teacher_whose_answers_are_not_finite(data: Artifact, tmp_path: Path, ctx: Context) -> None:
    spoilt = saved(tmp_path / "teacher", TOKENS, times=3.3e38)
    with pytest.raises(TrainingDiverged, match="the teacher's outputs are not finite on the first batch") as caught:
        flight(data, tmp_path, ctx, spoilt, SMALL, "kd")
    assert (caught.value.exit_code, caught.value.where) == (3, "preflight of stage 'distill'")
    assert "teacher.mean" in str(caught.value.hint)


def test_preflight_writes_down_what_is_known_to_go_wrong(data: Artifact, tmp_path: Path, ctx: Context) -> None:
    [relations] = flight(data, tmp_path, ctx, saved(tmp_path / "teacher", TOKENS), SMALL, "rkd")
    assert relations.startswith("distill: rkd compares images with each other")


def test_preflight_knows_the_teachers_smoothing(data: Artifact, tmp_path: Path, ctx: Context) -> None:
    [smoothed] = flight(data, tmp_path, ctx, saved(tmp_path / "teacher", SMALL), SMALL, "kd", teacher_smoothing=0.1)
    assert smoothed.startswith("distill: kd has temperature 4")


# ------------------------------------------------------------------------------------------------------------ other classes, another order
@pytest.mark.parametrize("config", [SMALL, TOKENS, ModelConfig(arch="mobilenetv3_small_050"), ModelConfig(arch="repghostnet_050")])
def test_weights_of_other_classes_answer_in_the_datas_order(config: ModelConfig) -> None:
    spec = models.make_spec(config, num_classes=6, image_size=32)
    model = models.build(spec).eval()
    ordered, fewer = in_order_of(model, spec, "abcdef", "eba")
    assert fewer.num_classes == 3
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ordered.eval()(images), model(images)[:, [4, 1, 0]], atol=1e-6)


def test_a_class_that_the_weights_do_not_know_is_refused_with_the_datas_classes() -> None:
    spec = models.make_spec(SMALL, num_classes=3, image_size=32)
    with pytest.raises(InputRefused, match="the weights know no class 'dog' and 1 more") as caught:
        in_order_of(models.build(spec), spec, ["cat", "cow", "hen"], ["cow", "dog", "pig"])
    assert "cow, dog, pig" in str(caught.value.hint)


def test_a_model_with_two_classifiers_cannot_be_put_in_order() -> None:
    config = ModelConfig(arch="deit_tiny_distilled_patch16_224", args=TOKENS.args)
    spec = models.make_spec(config, num_classes=4, image_size=32)
    for wanted in ("abc", "dcba"):
        with pytest.raises(InputRefused, match="cannot be put in another order"):
            in_order_of(models.build(spec), spec, "abcd", wanted)


def answers_of(labels: np.ndarray[Any, Any], order: list[int], right: float) -> np.ndarray[Any, Any]:
    """Outputs whose number `i` stands for class order[i], right for that share of the images."""
    rng, numbers = np.random.default_rng(0), np.argsort(order)
    said = np.where(rng.random(len(labels)) < right, numbers[labels], rng.integers(0, len(order), len(labels)))
    return np.eye(len(order), dtype=np.float32)[said]


@pytest.mark.parametrize(
    ("order", "right", "found"),
    [
        ([2, 0, 1, 4, 3], 0.9, True),  # all of them elsewhere
        ([1, 0, 2, 3, 4], 0.95, True),  # two swapped: far above chance, and still wrong
        ([0, 1, 2, 3, 4], 0.9, False),
        ([2, 0, 1, 4, 3], 0.2, False),  # knows too little to tell
        ([0, 1, 2, 3, 4], 0.0, False),  # guesses
    ],
)
def test_another_order_is_seen_only_where_the_answers_show_it(order: list[int], right: float, found: bool) -> None:
    labels = np.sort(np.arange(300) % 5)
    assert Classification().order(answers_of(labels, order, right), labels) == (order if found else None)


NET = """import torch
from timm.models import register_model

class Colour(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = torch.nn.Linear(3, num_classes)
    def forward(self, images):
        return self.head(images.mean((2, 3)))

@register_model
def colour_net(pretrained=False, num_classes=3, **_):
    return Colour(num_classes)
"""
COLOURS = """version: 1
data: {format: image_folder, root: data, image_size: 32}
teacher: {arch: colour_net, weights: teacher.safetensors, mean: [0.5, 0.5, 0.5], std: [0.1, 0.1, 0.1]}
model: {arch: resnet10t, args: {channels: [8, 8, 16, 16]}}
stages:
  - distill: {method: kd, epochs: 1}
"""


@pytest.fixture
def colours(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a teacher whose outputs are these classes, with these overrides."""
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", each=40)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "r.yaml").write_text(COLOURS)

    def run(classes: list[int], *more: str) -> Result:
        rows = torch.eye(3)[[c % 3 for c in classes]] * torch.tensor([[0.0 if c > 2 else 9.0] for c in classes])
        save_file({"head.weight": rows, "head.bias": torch.tensor([-99.0 if c > 2 else 0.0 for c in classes])}, "teacher.safetensors")
        return run_here("compress", "r.yaml", "--code", "net.py", *(x for o in more for x in ("-o", o)))

    return run


def test_a_teacher_with_another_order_of_labels_is_3_and_the_mapping_is_offered(colours: Any, quick: None) -> None:
    result = colours([1, 2, 0])
    assert result.code == 3, result.text
    assert "right in another order of the classes" in result.err
    offered = '-o teacher.classes=["class1", "class2", "class0"]'
    assert offered in result.err
    mapped = colours([1, 2, 0], offered.removeprefix("-o "), "stages=[{distill: {method: kd, epochs: 1, name: learnt}}]")
    assert mapped.code in (0, 4), mapped.text


def test_a_teacher_with_a_size_of_its_own_goes_through_the_chain(colours: Any, quick: None) -> None:
    """Exported, evaluated and imitated at its own size."""
    result = colours([0, 1, 2], "teacher.image_size=48")
    assert result.code in (0, 4), result.text
    [run] = Path("runs").glob("*/run.json")
    assert json.loads(run.read_text())["teacher"]["metric"] == 1.0


def test_a_teacher_with_more_classes_is_3_and_says_how_to_name_them(colours: Any) -> None:
    result = colours([0, 3, 1, 2])
    assert result.code == 3, result.text
    assert "head.weight [4, 3] instead of [3, 3]" in result.err
    assert "-o teacher.classes=[A,B]" in result.err


def test_names_of_outputs_without_weights_are_2(tmp_path: Path) -> None:
    result = run_here("check", "quickstart", "-o", "teacher.classes=[a, b]")
    assert result.code == 2
    assert "they name the outputs of given weights, and none are given" in result.err


# ------------------------------------------------------------------------------------------------------------ no better than the student
def finished(folder: Path, *, teacher: float, alone: float, measured: bool = True) -> Any:
    """A plan and its finished steps: val predictions right for a share of 400 images."""
    labels, artifacts = np.arange(400) % 10, {}
    for name, share in (("teacher.val", teacher), ("student alone.val", alone)):
        there = folder / name
        there.mkdir(parents=True)
        answers = np.where(np.arange(400) < share * 400, labels, (labels + 1) % 10)
        np.save(there / "outputs.npy", np.eye(10, dtype=np.float32)[answers])
        np.save(there / "labels.npy", labels)
        artifacts[name] = Artifact("0" * 64, Kind.METRICS, there, "")
    metrics = {"teacher": "teacher.val"} | ({"student alone": "student alone.val"} if measured else {})
    loaded = SimpleNamespace(recipe=SimpleNamespace(task="classification"))
    return SimpleNamespace(metrics=metrics, baselines=["student alone"] if measured else [], loaded=loaded), SimpleNamespace(
        artifacts=artifacts
    )


def test_a_student_that_is_certainly_better_alone_than_its_teacher_is_said(tmp_path: Path) -> None:
    [text] = lessons(*finished(tmp_path, teacher=0.8, alone=0.9))
    assert text.startswith("on val the student trained alone is 10.00 points better than its teacher (95 % ")


@pytest.mark.parametrize(("teacher", "alone", "measured"), [(0.9, 0.8, True), (0.9, 0.9025, True), (0.8, 0.9, False)])
def test_a_teacher_that_is_better_or_may_be_is_not_spoken_of(tmp_path: Path, teacher: float, alone: float, measured: bool) -> None:
    assert lessons(*finished(tmp_path, teacher=teacher, alone=alone, measured=measured)) == []
