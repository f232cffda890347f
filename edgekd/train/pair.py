"""Two models and a distiller: hooks for what it needs of each, its projectors, and whether it is made for such a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd.data.augment import to_float
from edgekd.data.loader import batches
from edgekd.errors import UsageError
from edgekd.models.taps import TappedModel, classifier_of, family, stage_taps
from edgekd.train.distiller import Side, black_box_lack
from edgekd.train.images import Job, Teacher
from edgekd.train.views import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.data.dataset import Dataset
    from edgekd.models.spec import ModelSpec
    from edgekd.train.answers import Answers
    from edgekd.train.black_box import BlackBox, RuntimeTeacher
    from edgekd.train.distiller import Distiller

FAMILIES = {"cnn": "CNN", "vit": "ViT", "swin": "Swin", "mlp": "MLP"}
_BATCH = 128


@dataclass(frozen=True)
class Wired:
    """A pair of models, ready for a distiller's terms."""

    student: TappedModel
    teacher: TappedModel
    projectors: nn.Module | None


def teach(job: Job, distiller: Distiller, teacher: Teacher | Answers | RuntimeTeacher, model: nn.Module, spec: ModelSpec) -> None:
    """Gives a job its teacher, the distiller's loss, its projectors and hooks on both models; `model` is what answered, or answers.

    Raises UsageError for families that the distiller is not made for.
    """
    job.distiller, job.label_weight, job.teacher = distiller, distiller.config.label_weight, teacher
    live = teacher if isinstance(teacher, Teacher) else None
    view = live.view if live else View(spec)
    wired = wire(distiller, (job.model, job.spec), (model, spec), view, job.dataset, job.dataset.split("train"), seed=job.seed)
    job.projectors, job.tapped = wired.projectors, wired.student
    if live:
        live.tapped = wired.teacher


def listen(job: Job, distiller: Distiller, teacher: BlackBox | Answers) -> None:
    """As `teach`, for a teacher of which only the outputs are known: hooks and projectors are the student's alone.

    Raises UsageError for a distiller that needs more than outputs.
    """
    job.distiller, job.label_weight, job.teacher = distiller, distiller.config.label_weight, teacher
    job.tapped, job.projectors = wire_student(distiller, job.model, job.spec, job.dataset.split("train"), seed=job.seed)


def wire(
    distiller: Distiller,
    student: tuple[nn.Module, ModelSpec],
    teacher: tuple[nn.Module, ModelSpec],
    view: View,
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    seed: int,
) -> Wired:
    """Sets the distiller up for two models; `view` is the teacher's, `positions` those of the training images."""
    return set_up(distiller, student, teacher, positions, lambda model: class_means(model, view, dataset, positions), seed=seed)


def set_up(
    distiller: Distiller,
    student: tuple[nn.Module, ModelSpec],
    teacher: tuple[nn.Module, ModelSpec],
    positions: NDArray[np.int64],
    means_of: Callable[[TappedModel], Tensor],
    *,
    seed: int,
) -> Wired:
    """The same with the teacher's class means, where they are asked for, from wherever."""
    needs, asked = distiller.needs, getattr(distiller, "pairs", None)
    here = side(*student, taps="taps" in needs or bool(asked), embedding="embedding" in needs)
    there = side(*teacher, taps=bool(needs & {"taps", "teacher_taps"}) or bool(asked), embedding="embedding" in needs)
    if asked:
        check_pair(distiller, here, there)
    tapped = (
        TappedModel(student[0], here.taps if "taps" in needs else (), here.classifier),
        TappedModel(teacher[0], there.taps if "teacher_taps" in needs else (), there.classifier),
    )
    means = means_of(tapped[1]) if "class_means" in needs else None
    at = torch.from_numpy(positions).sort().values
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = distiller.setup(replace(here, positions=at), replace(there, positions=at, class_means=means))
    return Wired(*tapped, projectors)


def wire_student(
    distiller: Distiller, model: nn.Module, spec: ModelSpec, positions: NDArray[np.int64], *, seed: int
) -> tuple[TappedModel, nn.Module | None]:
    """The student's side of `wire`, for a teacher of which only the outputs are known; widths that depend on the teacher's are the student's."""
    if lack := black_box_lack(distiller):
        name = type(distiller).__module__.rpartition(".")[2]
        what = f"method '{name}' needs {lack}, and only the teacher's outputs are known"
        raise UsageError(what, where="method", hint="methods that need no more: kd, dkd, dist, ofa")
    here = side(model, spec, taps="taps" in distiller.needs)
    there = Side(nn.Identity(), (), here.num_features, here.num_classes)
    at = torch.from_numpy(positions).sort().values
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = distiller.setup(replace(here, positions=at), replace(there, positions=at))
    return TappedModel(model, here.taps, None), projectors


def side(model: nn.Module, spec: ModelSpec, *, taps: bool = True, embedding: bool = False) -> Side:
    """One model of the pair as a distiller sees it; only what is needed, for not every model has stages or a linear classifier."""
    found = stage_taps(model, spec.image_size) if taps else ()
    name, width = classifier_of(model, spec.image_size, spec.num_classes) if embedding else (None, 0)
    return Side(model, found, found[-1].channels if found else 0, spec.num_classes, name, width)


def class_means(model: Callable[[Tensor], Any], view: View, dataset: Dataset, positions: NDArray[np.int64]) -> Tensor:
    """Mean embedding of each class over images as they are, (classes, width) in fp32; zeros for a class without images."""
    labels, sums = torch.from_numpy(dataset.labels), torch.zeros(0)
    counts = torch.bincount(labels[torch.from_numpy(positions)], minlength=len(dataset.classes))
    for batch in batches(dataset, positions, _BATCH):
        with torch.inference_mode():
            found = model(view(to_float(batch.images.to(view.scale.device)))).embedding.double().cpu()
        sums = sums if len(sums) else torch.zeros(len(counts), found.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels[torch.from_numpy(batch.positions)], found)
    return (sums / counts.clamp(min=1)[:, None]).float()


def check_pair(distiller: Distiller, student: Side, teacher: Side) -> None:
    """Raises UsageError unless the distiller, or each part of a combined one, is made for the families of the two."""
    for part in getattr(distiller, "parts", {}).values():
        check_pair(part, student, teacher)
    asked: frozenset[tuple[str, str]] = getattr(distiller, "pairs", frozenset())
    found = family(teacher.taps, teacher.model), family(student.taps, student.model)
    if not asked or found in asked:
        return
    name = type(distiller).__module__.rpartition(".")[2]
    known = sorted(f"{FAMILIES[t]} -> {FAMILIES[s]}" for t, s in asked)
    raise UsageError(
        f"method '{name}' is not made for the pair {FAMILIES[found[0]]} teacher, {FAMILIES[found[1]]} student",
        where="method",
        expected=f"teacher -> student: {', '.join(known)}",
        hint="methods for any pair: ofa, rsd, kd, dkd",
    )
