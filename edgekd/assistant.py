"""Which model stands between a large teacher and a small student, where a recipe says `assistant: auto`. No weights are needed.

The rule is our own. The paper of teacher assistants (Mirzadeh et al. 2020, arXiv 1902.03393) finds that one near the middle of both accuracies serves best,
which nobody knows beforehand; the middle of both sizes, on a logarithmic scale, is known. Whether it helped is measured on val (stages/assist.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekd.errors import UsageError
from edgekd.recipe import AUTO, AssistantConfig, Loaded

if TYPE_CHECKING:
    from torch import nn

    from edgekd.wiring import Pair

SMALLEST_GAP = 4.0  # times the student's parameters: below it there is hardly room for a third model
_APART = 1.25  # an assistant differs by so much from both
_SCALES = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)
_WIDTHS = ("channels", "stem_width", "dims", "embed_dim", "embed_dims", "hidden_dim", "width")  # arguments that make a model wider
_SHAPE = ("img_size", "patch_size", "in_chans")  # arguments that fit a model to its images, and so to every sibling


def settled(loaded: Loaded, pair: Pair) -> tuple[Loaded, str]:
    """The recipe with the assistant that `auto` stands for, or without one where the gap is small; and a sentence about it.

    Raises UsageError where no architecture lies between teacher and student.
    """
    teacher, student = pair.facts.teacher_parameters, pair.facts.student_parameters
    gap = teacher / student
    if gap < SMALLEST_GAP:
        return replace(loaded, recipe=loaded.recipe.model_copy(update={"assistant": None})), (
            f"assistant: none. The teacher has {gap:.1f} times the student's parameters, and auto adds one from {SMALLEST_GAP:g} times on"
        )
    middle = math.sqrt(teacher * student)
    for candidates in _by_kinship(pair):
        sized = [(c, size) for c in candidates if (size := _parameters(c, pair.classes)) is not None]
        between = [(c, size) for c, size in sized if student * _APART <= size <= teacher / _APART]
        if between:
            chosen, size = min(between, key=lambda found: abs(math.log(found[1] / middle)))
            return _with(loaded, chosen), (
                f"assistant: {_words(chosen)}, {size} parameters, of {len(between)} between the student's {student} and the teacher's {teacher} "
                f"the nearest to their middle"
            )
    raise UsageError(
        f"no architecture was found between the student of {student} and the teacher of {teacher} parameters",
        where="assistant",
        expected="one of the student's or the teacher's kind",
        hint="name one: -o assistant={arch: NAME}",
    )


def _with(loaded: Loaded, chosen: AssistantConfig) -> Loaded:
    sources = {n: w for n, w in loaded.sources.items() if not n.startswith("assistant")}
    sources |= dict.fromkeys(("assistant.arch", *(f"assistant.args.{n}" for n in chosen.args)), "assistant: auto")
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"assistant": chosen}), sources=sources)


def _words(config: AssistantConfig) -> str:
    args = ", ".join(f"{n} {v}" for n, v in config.args.items())
    return f"{config.arch} with {args}" if args else str(config.arch)


def _by_kinship(pair: Pair) -> Iterator[list[AssistantConfig]]:
    """Candidates, the most alike first: the student or the teacher at other widths, their siblings."""
    for config in (pair.loaded.recipe.model, pair.loaded.recipe.teacher):
        if config is not None and config.arch is not None:
            yield [AssistantConfig(arch=config.arch, args=dict(config.args) | args) for args in _scaled(config.args)]
            kept = {n: v for n, v in config.args.items() if n in _SHAPE}
            yield [AssistantConfig(arch=name, args=kept) for name in _siblings(config.arch)]


def _scaled(args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Widths among the arguments, made larger and smaller: multiples of 8, or of the number of heads."""
    widths = {n: v for n, v in args.items() if n in _WIDTHS and isinstance(v, int | list)}
    quantum = int(args["num_heads"]) if isinstance(args.get("num_heads"), int) else 8

    def times(value: Any, scale: float) -> Any:
        if isinstance(value, list):
            return [times(v, scale) for v in value]
        return max(round(value * scale / quantum), 1) * quantum

    for scale in _SCALES if widths else ():
        yield {n: times(v, scale) for n, v in widths.items()}


def _siblings(arch: str) -> list[str]:
    """Architectures that are defined in the same file and whose names begin with the same word."""
    import timm

    module, [word, *_] = timm.model_entrypoint(arch).__module__, re.split("[^a-z]", arch)
    return [name for name in timm.list_models(f"{word}*") if name != arch and timm.model_entrypoint(name).__module__ == module]


def _parameters(config: AssistantConfig, classes: int) -> int | None:
    """Of a model that is built without memory for its weights; None where it cannot be built so."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(str(config.arch), pretrained=False, num_classes=classes, **config.args)
    except Exception:  # an architecture that does not take the arguments of its sibling, or computes with its weights as it is built
        return None
    return sum(p.numel() for p in model.parameters())


def is_auto(loaded: Loaded) -> bool:
    """Whether the recipe leaves its assistant open."""
    return loaded.recipe.assistant is not None and loaded.recipe.assistant.arch == AUTO
