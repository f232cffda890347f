"""Which features of teacher and student are compared, for methods on features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.train.distiller import Side


def stage_pairs(student: Side, teacher: Side) -> list[tuple[int, int]]:
    """Places of taps, deepest with deepest: a model with fewer stages has the last ones."""
    count = min(len(student.taps), len(teacher.taps))
    return [(len(student.taps) - n, len(teacher.taps) - n) for n in range(count, 0, -1)]


def assert_maps(name: str, student: Side, teacher: Side) -> None:
    """Raises UsageError unless both models give feature maps: what a position means differs between families."""
    for whose, side in (("student", student), ("teacher", teacher)):
        if not side.taps or any(tap.layout != "NCHW" for tap in side.taps):
            raise UsageError(
                f"{name} compares feature maps, and the {whose} has none",
                expected="a CNN as teacher and as student",
                hint="across architectures: method: ofa; on logits: kd, dkd, dist",
            )
