"""Which method suits a pair of models, and what is known to go wrong with one. Sentences with their sources; nothing here stops a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from edgekd.distill.combined import Combined

if TYPE_CHECKING:
    from edgekd.train.distiller import Distiller, Side

_KINDS = {"cnn": "CNN", "vit": "transformer", "swin": "transformer", "mlp": "MLP"}
_MANY_CLASSES = 1000
_WIDEST_GAP = 20  # times the student's parameters


class Advice(NamedTuple):
    """A method with the settings that differ from its defaults, and why."""

    method: str
    settings: dict[str, Any]
    why: str


class Facts(NamedTuple):
    """What is known of a pair before training."""

    teacher: str  # family: cnn, vit, swin or mlp
    student: str
    teacher_parameters: int
    student_parameters: int
    teacher_smoothing: float = 0.0  # label smoothing that the teacher was, or will be, trained with
    assisted: bool = False  # a model of a size between them teaches too


def facts_of(student: Side, teacher: Side, smoothing: float = 0.0, *, assisted: bool = False) -> Facts:
    """The facts of two models with their taps."""
    from edgekd.models.taps import family  # torch stays out of the CLI's start

    sides = teacher, student
    sizes = [sum(p.numel() for p in side.model.parameters()) for side in sides]
    families = [family(side.taps, side.model) for side in sides]
    return Facts(families[0], families[1], sizes[0], sizes[1], smoothing, assisted)


def advise(teacher: str, student: str, classes: int, *, labelled: bool = True) -> Advice:
    """The method for a pair of families (cnn, vit, swin, mlp)."""
    ours, theirs = _KINDS[student], _KINDS[teacher]
    if ours != theirs:
        why = f"{theirs} to {ours}: made for different families; its paper has it ahead of kd, dkd, dist, crd, rkd and fitnet in all its pairs (arXiv 2310.19444)"
        return Advice("ofa", {}, why)
    if ours != "CNN":
        return Advice(
            "kd", {}, f"{theirs} to {ours}: level with dist from ViT-L to ViT-S, 75.33 against 74.91 % (arXiv 2506.12542), and cheap"
        )
    if not labelled:
        return Advice("kd", {}, "CNN to CNN without labels: dkd weighs the right class against the rest, and nothing says which that is")
    if classes < 3:
        return Advice("kd", {}, "CNN to CNN with two classes: dkd ranks the classes beside the right one, and there is one")
    settings = {"beta": 0.5, "temperature": 1.0} if classes >= _MANY_CLASSES else {}
    why = "CNN to CNN: ahead of kd in all eleven CIFAR-100 pairs and both ImageNet pairs of its authors' tables (mdistiller; arXiv 2203.08679)"
    return Advice("dkd", settings, why)


def cautions(method: str, distiller: Distiller, facts: Facts) -> list[str]:
    """What to expect of the pair, each with its reason."""
    parts = distiller.parts if isinstance(distiller, Combined) else {method: distiller}
    found = [_gap(facts)]
    for name, part in parts.items():
        found += [_smoothed(name, part, facts), _relational(name, part, facts)]
    return [text for text in found if text]


def _gap(facts: Facts) -> str:
    times = facts.teacher_parameters / max(facts.student_parameters, 1)
    if times <= _WIDEST_GAP or facts.assisted:
        return ""
    return (
        f"the teacher has {times:.0f} times the student's parameters: a student learns less from a teacher that is far above it than from one between"
        f" (Mirzadeh et al. 2020, arXiv 1902.03393; more than {_WIDEST_GAP} times is edgekd's own mark); try a smaller teacher, or -o assistant=auto"
    )


def _smoothed(name: str, distiller: Distiller, facts: Facts) -> str:
    temperature = getattr(distiller.config, "temperature", 1.0)
    if not facts.teacher_smoothing or temperature <= 1:
        return ""
    return (
        f"{name} has temperature {temperature:g} and the teacher is trained with label_smoothing {facts.teacher_smoothing:g}: a high temperature moves"
        " what smoothing left of the likeness of classes (Chandrasegaran et al. 2022, arXiv 2206.14532); use temperature 1, or a teacher without smoothing"
    )


def _relational(name: str, distiller: Distiller, facts: Facts) -> str:
    ours, theirs = _KINDS[facts.student], _KINDS[facts.teacher]
    if ours == theirs or not getattr(distiller, "relational", False):
        return ""
    return (
        f"{name} compares images with each other, and from {theirs} to {ours} that can leave the student below one trained alone"
        " (OFA, arXiv 2310.19444, its tables of crd and rkd); methods made for such pairs: ofa, rsd"
    )
