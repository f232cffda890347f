"""Which of a teacher's outputs belongs to which class of the data."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd.errors import InputRefused, suggest

_SHOWN = 10


def outputs_of(classes: Sequence[str], outputs: int, names: Sequence[str], where: str) -> list[int]:
    """For each class of the data, the position of the teacher's output for it; a teacher may know more classes.

    `outputs`: how many the teacher has. `names`: their names, in order; without any they are taken to be the data's, in the data's order.
    Raises InputRefused where that cannot be, with the mapping to write.
    """
    wanted = f"teacher.classes=[{', '.join(classes[:_SHOWN])}{', ...' if len(classes) > _SHOWN else ''}]"
    if not names:
        if outputs != len(classes):
            hint = f"name the teacher's outputs in its order, and those of the data are picked: -o '{wanted}'"
            raise InputRefused(f"it has {outputs} outputs, the data have {len(classes)} classes", where=where, hint=hint)
        return list(range(outputs))
    if len(names) != outputs:
        raise InputRefused(f"{len(names)} classes are named, and it has {outputs} outputs", where=where, expected="a name for each output")
    if twice := [n for n in dict.fromkeys(names) if list(names).count(n) > 1]:
        raise InputRefused(f"the class '{twice[0]}' is named twice", where=where, expected="a name for each output")
    if missing := [c for c in classes if c not in names]:
        raise InputRefused(
            f"it has no output for {len(missing)} classes of the data, the first '{missing[0]}'{suggest(missing[0], names)}",
            where=where,
            expected="an output for each class of the data",
            hint=f"name the teacher's outputs in its order, with the data's names: -o '{wanted}'",
        )
    return [list(names).index(c) for c in classes]
