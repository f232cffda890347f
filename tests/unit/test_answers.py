"""Teachers' answers that are kept: unbiased where they are sampled, what a live teacher says where they are not, and whole after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgekd.data.augment import augment
from edgekd.data.config import AugmentConfig
from edgekd.data.rng import uniform
from edgekd.distill.kd import kd_loss, sampled_kd_loss
from edgekd.errors import TrainingDiverged
from edgekd.models.spec import ModelSpec
from edgekd.train.answers import ABOUT, ANSWERS, About, Answers, Writer, draw, estimate
from edgekd.train.config import TrainConfig
from edgekd.train.images import Speed, Teacher
from edgekd.train.views import View

POSITIONS = np.array([1, 4, 5, 9, 12])
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((5, 40))).astype(np.float32)


def written(folder: Path, about: About, stop: int | None = None) -> None:
    """All views, two images at a time; killed after `stop` batches."""
    writer = Writer(folder, about, POSITIONS, seed=0)
    while writer.done < writer.total:
        view, rest = writer.rest()
        for start in range(0, len(rest), 2):
            at = np.searchsorted(POSITIONS, rest[start : start + 2])
            writer.add(LOGITS[at, : about.classes] + view)
            if stop is not None:
                stop -= 1
                writer.save()
                if stop == 0:
                    return
    out = folder / "out"
    out.mkdir()
    writer.publish(out)


@pytest.mark.parametrize("samples", [1, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_drawn_classes_are_on_average_the_probabilities(samples: int, temperature: float) -> None:
    about, trials = About(40, 1, samples, temperature), 4000
    offsets = (np.arange(trials) + 0.5) / trials  # an even grid stands for the uniform draw: what is left is the error of the grid
    repeated = np.repeat(LOGITS[:1], trials, axis=0)
    found = estimate(torch.from_numpy(draw(repeated, about, offsets).astype(np.int64)), about)
    wanted = F.softmax(torch.from_numpy(LOGITS[0].astype(np.float64)) / temperature, dim=0)
    assert torch.allclose(found.double().mean(0), wanted, atol=3e-4)
    assert torch.allclose(found.sum(1), torch.ones(trials))
    assert found.std(0).max() > 0  # each is an estimate, not the probabilities themselves


def test_a_sample_gives_the_gradient_of_all_logits_on_average_and_top_k_does_not() -> None:
    teacher = torch.from_numpy(LOGITS[:1])
    student = torch.from_numpy(LOGITS[1:2]).clone().requires_grad_()
    [wanted] = torch.autograd.grad(kd_loss(student, teacher, 2.0), student)
    about, trials = About(40, 1, 4, 2.0), 20_000
    drawn = draw(np.repeat(LOGITS[:1], trials, 0), about, uniform(0, "test", 0, np.arange(trials), 1)[:, 0])
    shares = estimate(torch.from_numpy(drawn.astype(np.int64)), about)
    [found] = torch.autograd.grad(sampled_kd_loss(student.expand(trials, -1), shares, 2.0), student)
    top = torch.zeros_like(teacher)
    best = teacher.topk(4).indices
    top.scatter_(1, best, F.softmax(teacher.gather(1, best) / 2.0, dim=1))
    [biased] = torch.autograd.grad(sampled_kd_loss(student, top, 2.0), student)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (biased - wanted).norm() > 0.2 * wanted.norm()


@pytest.mark.parametrize("about", [About(10, 3), About(40, 2, 7, 2.0)], ids=["logits", "sampled"])
def test_a_kill_anywhere_leaves_the_same_bytes(about: About, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    written(tmp_path / "whole", about)
    for stop in range(1, 3 * about.views + 1):
        folder = tmp_path / str(stop)
        folder.mkdir()
        written(folder, about, stop)
        written(folder, about)
        for name in (ANSWERS, ABOUT):
            assert (folder / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


def test_kept_answers_are_those_of_the_live_teacher_for_the_same_view(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)).eval()
    teacher = Teacher(model, View(ModelSpec(arch="t", num_classes=10, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, timm="none")), Speed())
    images = torch.from_numpy(RNG.integers(0, 256, (len(POSITIONS), 8, 8, 3), dtype=np.uint8))
    index, cfg = torch.from_numpy(POSITIONS), AugmentConfig(policy="crop_flip", pad=2)
    views = [augment(images, index, cfg, seed=0, epoch=view) for view in range(2)]
    writer = Writer(tmp_path, About(10, 2), POSITIONS, seed=0)
    for view, pixels in enumerate(views):
        writer.add(teacher(pixels, index, view).logits.numpy())
    out = tmp_path / "out"
    out.mkdir()
    writer.publish(out)
    kept, shuffled = Answers(out, POSITIONS), torch.tensor([3, 0, 2])
    for epoch in range(5):
        wanted = teacher(views[epoch % 2][shuffled], index[shuffled], epoch).logits
        assert torch.allclose(kept(torch.empty(0), index[shuffled], epoch).logits, wanted, rtol=1e-3, atol=1e-3)


def test_an_answer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = LOGITS[:, :10].copy()
    broken[2, 3] = np.nan
    with pytest.raises(TrainingDiverged, match="for image 5 are not finite"):
        Writer(tmp_path, About(10, 1), POSITIONS, seed=0).add(broken)


@pytest.mark.parametrize(
    ("values", "views"),
    [
        ({}, 1),  # nothing is augmented
        ({"augment": {"policy": "shift"}}, 0),
        ({"augment": {"policy": "shift"}, "views": 4}, 4),
        ({"augment": {"erase": 0.5}}, 0),
        ({"augment": {"mixup": 0.2}}, 0),
    ],
)
def test_how_many_views_an_image_has(values: dict[str, object], views: int) -> None:
    assert TrainConfig(**values).fixed_views == views


def test_views_of_mixed_images_are_refused() -> None:
    with pytest.raises(ValueError, match="mixup and cutmix make new images"):
        TrainConfig(views=2, augment=AugmentConfig(mixup=0.2))
