"""Which features of teacher and student are compared, for methods on features."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekd.train.distiller import Side


def stage_pairs(student: Side, teacher: Side) -> list[tuple[int, int]]:
    """Places of taps, deepest with deepest: a model with fewer stages has the last ones."""
    count = min(len(student.taps), len(teacher.taps))
    return [(len(student.taps) - n, len(teacher.taps) - n) for n in range(count, 0, -1)]
