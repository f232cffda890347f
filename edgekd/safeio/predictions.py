"""Files of precomputed predictions from outside: .npz or .csv, of bounded size, numbers and names only; or a refusal that names file and row.

An .npz holds `ids` (n,), `logits` or `probabilities` (n, classes), and, if they are known, `classes` (classes,). A .csv has the header `id,<class>,<class>...`
and a row for each image. An id is what the dataset calls the image: for folders and lists the path below `data.root`, with `/`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EdgekdError, FileMissing, PredictionsRefused
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAX_BYTES = 4 * 2**30
_NAMES = {"ids", "logits", "probabilities", "classes"}
_NPZ = "ids, logits or probabilities, and optionally classes"
_CSV = "the header id,<class>,<class>... and a number for each class in every row"


@dataclass(frozen=True, eq=False)
class Predictions:
    """values (n, outputs) in float32, finite; `names` of the outputs and `kind` (logits, probabilities) are empty where the file does not say."""

    ids: tuple[str, ...]
    values: NDArray[np.float32]
    names: tuple[str, ...]
    kind: str


def read_predictions(path: Path) -> Predictions:
    """Raises FileMissing, and PredictionsRefused for pickles, damage, numbers that are not finite, and ids that come twice."""
    if not path.is_file():
        raise FileMissing("no such file", where=str(path), expected="a file of predictions", hint="correct the path")
    if path.stat().st_size > _MAX_BYTES:
        raise PredictionsRefused(f"it has {path.stat().st_size} bytes", where=str(path), expected=f"at most {_MAX_BYTES}")
    readers = {".npz": _npz, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise PredictionsRefused(f"files named *{path.suffix} are not read", where=str(path), expected=".npz or .csv")
    found = readers[path.suffix.lower()](path)
    _check(found, str(path))
    return found


def columns_of(path: Path) -> tuple[str, ...]:
    """Names of the outputs, their numbers where the file has none; nothing where it cannot be read, which `read_predictions` will say."""
    try:
        found = read_predictions(path)
    except EdgekdError:
        return ()
    return found.names or tuple(map(str, range(found.values.shape[1])))


def _check(found: Predictions, where: str) -> None:
    import numpy as np

    if len(set(found.ids)) < len(found.ids):
        seen: set[str] = set()
        twice = next(i for i in found.ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        number = len(found.ids) - len(set(found.ids))
        raise PredictionsRefused(
            f"{number} ids come twice, the first {twice!a}", where=where, expected="each image once", hint="remove one of the two"
        )
    bad = ~np.isfinite(found.values).all(1)
    if bad.any():
        first = found.ids[int(np.flatnonzero(bad)[0])]
        raise PredictionsRefused(
            f"the predictions of {int(bad.sum())} images are not finite, the first {first!a}",
            where=where,
            expected="finite numbers",
            hint="predict these images again, in fp32",
        )


# ------------------------------------------------------------------------------------------------------------ .npz
def _npz(path: Path) -> Predictions:
    import numpy as np

    from edgekd.safeio.arrays import read_arrays

    arrays = read_arrays(path, PredictionsRefused, expected=_NPZ, max_bytes=_MAX_BYTES, max_arrays=len(_NAMES))
    kinds = sorted({"logits", "probabilities"} & arrays.keys())
    if not arrays.keys() <= _NAMES or "ids" not in arrays or len(kinds) != 1:
        raise PredictionsRefused(f"it holds {', '.join(sorted(arrays)[:8]) or 'nothing'}", where=str(path), expected=_NPZ)
    ids, values, names = arrays["ids"], arrays[kinds[0]], arrays.get("classes")
    texts = [a for a in (ids, names) if a is not None]
    if (
        values.ndim != 2
        or values.dtype.kind != "f"
        or ids.shape != values.shape[:1]
        or any(a.dtype.kind != "U" or a.ndim != 1 for a in texts)
    ):
        shown = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in arrays.items())
        raise PredictionsRefused(f"its arrays do not fit: {shown}", where=str(path), expected="ids as text (n,), floats (n, classes)")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        values = values.astype(np.float32)
    return Predictions(tuple(ids.tolist()), values, () if names is None else tuple(names.tolist()), kinds[0])


# ------------------------------------------------------------------------------------------------------------ .csv
def _csv(path: Path) -> Predictions:
    import numpy as np

    ids: list[str] = []
    values: list[NDArray[np.float32]] = []
    with resource_errors(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if len(header) < 2 or header[0] != "id":
                raise PredictionsRefused(f"its header is {','.join(header)[:80]!a}", where=f"{path}:1", expected=_CSV)
            for row in rows:
                ids.append(row[0] if row else "")
                values.append(np.array([float(v) for v in row[1:]], np.float32))
                if len(row) != len(header):
                    raise PredictionsRefused(f"the row has {len(row)} fields", where=f"{path}:{rows.line_num}", expected=f"{len(header)}")
        except (csv.Error, ValueError) as e:  # ValueError: no number, or no UTF-8
            raise PredictionsRefused("the row cannot be read", where=f"{path}:{rows.line_num}", expected=_CSV) from e
    if not ids:
        raise PredictionsRefused("it has no rows", where=str(path), expected=_CSV)
    return Predictions(tuple(ids), np.stack(values), tuple(header[1:]), "")
