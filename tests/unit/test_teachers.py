"""A teacher as it must not be: fed with another model's images, silent about numbers that are none, or no better than its student."""

from __future__ import annotations

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
from edgekd.errors import TrainingDiverged
from edgekd.lessons import lessons
from edgekd.models import build as models
from edgekd.models.spec import ModelConfig, ModelSpec
from edgekd.stages._stage import DECISION, Settings
from edgekd.stages.preflight import Preflight, Probe
from edgekd.tasks.classification import Classification
from edgekd.train.config import TrainConfig
from edgekd.train.loop import Job, Speed, Teacher, fit
from edgekd.train.pair import teach
from edgekd.train.views import View

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
