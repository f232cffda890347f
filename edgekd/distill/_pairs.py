"""Which stages of teacher and student are compared, for methods on features. The last stage of any model is 4; one with fewer has the last ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.models.taps import Tap
    from edgekd.train.distiller import Side

_LAST = 4


def stage_pairs(student: Side, teacher: Side, asked: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Places of taps (student's, teacher's): of the stages asked for, else as many as the smaller model has, by resolution, then by depth.

    Raises UsageError for a stage that is not there.
    """
    if asked:
        return [(_place(student.taps, mine, "student"), _place(teacher.taps, its, "teacher")) for mine, its in asked]
    count = min(len(student.taps), len(teacher.taps))
    return min(_pairings(len(student.taps), len(teacher.taps), count), key=lambda pairs: _apart(student.taps, teacher.taps, pairs))


def stage_of(taps: Sequence[Tap], place: int) -> int:
    """The number of the stage that a tap ends."""
    return _LAST - len(taps) + 1 + place


def _place(taps: Sequence[Tap], stage: int, whose: str) -> int:
    place = stage - stage_of(taps, 0)
    if not 0 <= place < len(taps):
        raise UsageError(
            f"the {whose} has no stage {stage}",
            where="stages",
            expected=f"{stage_of(taps, 0)} to {_LAST}",
            hint="edgekd wire RECIPE lists them",
        )
    return place


def _pairings(mine: int, its: int, count: int) -> Iterator[list[tuple[int, int]]]:
    for a in combinations(range(mine), count):
        for b in combinations(range(its), count):
            yield list(zip(a, b, strict=True))


def _apart(mine: Sequence[Tap], its: Sequence[Tap], pairs: Sequence[tuple[int, int]]) -> tuple[float, float, int]:
    """How far the pairs lie apart: in octaves of resolution, then in shares of the depth; of equals the deepest are the nearest."""
    octaves = sum(abs(math.log2(mine[i].grid[0] / its[j].grid[0])) for i, j in pairs)
    depth = sum(abs((i + 1) / len(mine) - (j + 1) / len(its)) for i, j in pairs)
    return round(octaves, 6), round(depth, 6), -sum(i + j for i, j in pairs)
