"""What each loss term of a distiller compares, seen by running it once: no method has to describe itself, a user's own neither.

The student's side by gradients: what a term reaches learns from it. The teacher's side by change: a term that moves when something else stands in for
an output of the teacher reads that output.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgekd.models.taps import TappedModel
from edgekd.train.distiller import Batch, Outputs
from edgekd.train.pair import Wired, set_up

if TYPE_CHECKING:
    from edgekd.models.spec import ModelSpec
    from edgekd.train.distiller import Distiller

Place = str | int  # logits, embedding, or the place of a tap
_BATCH = 4
_PROGRESS = 0.5  # past every warm-up, before every end


@dataclass(frozen=True)
class Link:
    """One loss term."""

    term: str
    student: tuple[Place, ...]  # what of the student learns from it, beside all that comes before
    teacher: tuple[Place, ...]  # what of the teacher it reads
    layers: Mapping[str, int]  # kinds of projector layers that learn from it, and how many of each
    parameters: int  # of those layers


def links(distiller: Distiller, student: tuple[nn.Module, ModelSpec], teacher: tuple[nn.Module, ModelSpec], images: int) -> list[Link]:
    """The terms on a batch of noise; `images`: how many there are to train on. The models are left as they were.

    Raises UsageError for families that the distiller is not made for.
    """

    def any_means(model: TappedModel) -> Tensor:
        with torch.no_grad():
            read = model(_noise(teacher[1])).embedding
        return torch.randn(teacher[1].num_classes, read.shape[1] if read is not None else 0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wired = set_up(distiller, student, teacher, torch.arange(images).numpy(), any_means, seed=0)
        try:
            return _links(distiller, wired, student[1], teacher[1])
        finally:
            wired.student.close()
            wired.teacher.close()


def _noise(spec: ModelSpec) -> Tensor:
    return torch.randn(_BATCH, 3, spec.image_size, spec.image_size)


def _links(distiller: Distiller, wired: Wired, student: ModelSpec, teacher: ModelSpec) -> list[Link]:
    with torch.no_grad():
        seen, answer = (Outputs.of(*model(_noise(spec)), copy=True) for model, spec in ((wired.student, student), (wired.teacher, teacher)))
    # noise of the same shapes: an untrained classifier may give zeros, for which every teacher is as good
    embedding = None if seen.embedding is None else torch.randn_like(seen.embedding)
    given = Outputs(torch.randn_like(seen.logits), tuple(map(torch.randn_like, seen.taps)), embedding)
    leaves = dict(_places(given))
    for leaf in leaves.values():
        leaf.requires_grad_()
    batch = Batch(given, answer, torch.arange(_BATCH) % student.num_classes, torch.arange(_BATCH), _PROGRESS)
    before = copy.deepcopy(wired.projectors.state_dict()) if wired.projectors is not None else None

    def terms(teacher: Outputs) -> dict[str, Tensor]:
        """The same draws and the same memories each time."""
        if wired.projectors is not None and before is not None:
            wired.projectors.load_state_dict(copy.deepcopy(before))
        torch.manual_seed(1)
        return distiller.terms(replace(batch, teacher=teacher))

    found = terms(answer)
    learns = {name: _learns(term, leaves, wired.projectors) for name, term in found.items()}
    values = {name: float(term.detach()) for name, term in found.items()}
    with torch.no_grad():
        moved = {place: terms(_without(answer, place)) for place, _ in _places(answer)}
    return [
        Link(name, mine, tuple(p for p, other in moved.items() if float(other[name]) != values[name]), layers, parameters)
        for name, (mine, layers, parameters) in learns.items()
    ]


def _places(outputs: Outputs) -> Iterator[tuple[Place, Tensor]]:
    yield "logits", outputs.logits
    yield from enumerate(outputs.taps)
    if outputs.embedding is not None:
        yield "embedding", outputs.embedding


def _without(outputs: Outputs, place: Place) -> Outputs:
    """The same outputs with something else at one place."""

    def other(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor) - tensor

    if isinstance(place, int):
        return replace(outputs, taps=tuple(other(t) if i == place else t for i, t in enumerate(outputs.taps)))
    if place == "logits":
        return replace(outputs, logits=other(outputs.logits))
    return replace(outputs, embedding=None if outputs.embedding is None else other(outputs.embedding))


def _learns(term: Tensor, leaves: Mapping[Place, Tensor], projectors: nn.Module | None) -> tuple[tuple[Place, ...], dict[str, int], int]:
    """(what of the student, kinds of projector layers and how many of each, their parameters) a term has gradients for."""
    if not term.requires_grad:
        return (), {}, 0
    own = [(m, p) for m in projectors.modules() for p in m.parameters(recurse=False) if p.requires_grad] if projectors is not None else []
    gradients = torch.autograd.grad(term, [*leaves.values(), *(p for _, p in own)], retain_graph=True, allow_unused=True)
    mine = tuple(place for place, gradient in zip(leaves, gradients, strict=False) if gradient is not None)
    touched = [(m, p) for (m, p), gradient in zip(own, gradients[len(leaves) :], strict=True) if gradient is not None]
    layers = {id(m): type(m).__name__ for m, _ in touched}
    return mine, dict(Counter(layers.values())), sum(p.numel() for _, p in touched)
