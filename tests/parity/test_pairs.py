"""Every distiller on every ordered pair of the four families: it teaches the pairs that it is made for and refuses the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.data.config import DataConfig
from edgekd.data.dataset import Dataset, build
from edgekd.errors import UsageError
from edgekd.models.spec import ModelSpec
from edgekd.train.distiller import Batch, Outputs
from edgekd.train.pair import class_means, wire
from edgekd.train.views import View

FAMILIES = ("cnn", "vit", "swin", "mlp")


@cache
def tiny(kind: str, width: int) -> nn.Module:
    """An untrained model of a family at 32 pixels; `width` tells teachers from students."""
    import timm

    small = {"img_size": 32, "num_classes": 10}
    torch.manual_seed(width)
    if kind == "cnn":
        return timm.create_model("resnet10t", num_classes=10, channels=(width, width, 2 * width, 2 * width)).eval()
    if kind == "vit":
        args = {"patch_size": 8, "embed_dim": width, "num_heads": 2, "depth": 4}
        return timm.create_model("vit_tiny_patch16_224", **small, **args).eval()
    if kind == "swin":
        args = {"embed_dim": width, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
        return timm.create_model("swin_tiny_patch4_window7_224", **small, **args).eval()
    return timm.models.MlpMixer(**small, patch_size=8, embed_dim=width, num_blocks=4).eval()


SPEC = ModelSpec(arch="tiny", num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, timm="none")
COVERED = [
    (name, teacher, student)
    for name in registry.names("distill")
    for teacher in FAMILIES
    for student in FAMILIES
    if (teacher, student) in getattr(registry.load("distill", name), "pairs", {(teacher, student)})
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("digits")
    build(DataConfig(format="digits", image_size=32, max_per_class=2), 0, folder)
    return Dataset.open(folder)


def wired(
    name: str, teacher: str, student: str, data: Dataset
) -> tuple[Any, nn.Module, nn.Module | None, Callable[..., dict[str, Tensor]]]:
    """(distiller, student, projectors, one batch's terms as the loop computes them, in bf16); the terms take how far the labels are shifted."""
    cls = registry.load("distill", name)
    distiller, net, guide = cls(cls.Config()), copy.deepcopy(tiny(student, 16)).train(), tiny(teacher, 24)
    view, positions = View(SPEC), data.split("train")
    guide.requires_grad_(False)
    pair = wire(distiller, (net, SPEC), (guide, SPEC), view, data, positions, seed=0)

    def terms(shift: int = 0) -> dict[str, Tensor]:
        images = torch.from_numpy(data.images(positions[:6])).permute(0, 3, 1, 2) / 255
        target = (torch.from_numpy(data.labels[positions[:6]]) + shift) % 10
        with torch.autocast("cpu", torch.bfloat16):
            given = Outputs.of(*pair.student(view(images)))
            with torch.inference_mode():
                seen = pair.teacher(view(images))
            answer = Outputs.of(*seen, copy=True)
            return distiller.terms(Batch(given, answer, target, torch.from_numpy(positions[:6]), 0.5))

    return distiller, net, pair.projectors, terms


@pytest.mark.parametrize(("name", "teacher", "student"), COVERED)
def test_a_distiller_teaches_every_pair_that_it_is_made_for(name: str, teacher: str, student: str, digits: Dataset) -> None:
    """Finite in bf16; every projector learns; the student learns and is no larger than before."""
    _, net, projectors, terms = wired(name, teacher, student, digits)
    found = terms()
    assert found
    assert all(t.ndim == 0 and bool(t.isfinite()) for t in found.values())
    sum(found.values(), start=torch.zeros(())).backward()
    learned = [p for p in net.parameters() if p.grad is not None]
    assert any(bool(p.grad.any()) for p in learned)  # type: ignore[union-attr]
    assert all(bool(p.grad.isfinite().all()) for p in learned)  # type: ignore[union-attr]
    for parameter in projectors.parameters() if projectors is not None else ():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
    assert net.state_dict().keys() == tiny(student, 16).state_dict().keys()
    assert all(p.grad is None for p in tiny(teacher, 24).parameters())


@pytest.mark.parametrize("name", [n for n in registry.names("distill") if hasattr(registry.load("distill", n), "pairs")])
def test_a_distiller_refuses_every_other_pair_and_names_what_it_is_for(name: str, digits: Dataset) -> None:
    pairs = registry.load("distill", name).pairs
    others = [(t, s) for t in FAMILIES for s in FAMILIES if (t, s) not in pairs]
    assert others
    for teacher, student in others:
        with pytest.raises(UsageError, match=rf"method '{name}' is not made for the pair \w+ teacher, \w+ student") as caught:
            wired(name, teacher, student, digits)
        assert caught.value.exit_code == 2
        assert len(str(caught.value.expected).split("->")) == len(pairs) + 2
        assert "ofa" in str(caught.value.hint)


def test_class_means_are_those_of_a_plain_loop(digits: Dataset) -> None:
    positions, view = digits.split("train")[:13], View(SPEC)
    flat = nn.Flatten()

    def model(images: Tensor) -> Any:
        return Outputs(images, (), flat(images))

    found = class_means(model, view, digits, positions)
    for label in range(10):
        mine = [
            flat(view(torch.from_numpy(digits.images(p[None])).permute(0, 3, 1, 2) / 255))[0]
            for p in positions
            if digits.labels[p] == label
        ]
        expected = torch.stack(mine).double().mean(0) if mine else torch.zeros(3 * 32 * 32)
        assert torch.allclose(found[label], expected.float(), atol=1e-6)


@pytest.mark.parametrize("name", [n for n in registry.names("distill") if n != "combined"])
def test_a_distiller_reads_labels_just_where_it_says_so(name: str, digits: Dataset) -> None:
    """`labels: none` offers the methods that do not."""
    teacher, student = next((t, s) for n, t, s in COVERED if n == name)
    found = []
    for shift in (0, 3):
        terms = wired(name, teacher, student, digits)[3]
        torch.manual_seed(0)  # as the loop does before a step
        found.append(torch.stack(list(terms(shift).values())))
    if "labels" in registry.load("distill", name).needs:
        assert not torch.equal(*found)
    else:
        assert torch.allclose(*found, rtol=1e-2)  # a target that ofa adds and takes away again leaves a rounding error in bf16
