"""Two tables, .csv or .parquet: `nodes` (id, label, numbers...) and `edges` (source, target). Ids may be anything that is written down.

Columns of `nodes`: id; label (empty: none); split (train, val, test or empty) and time (a number), where they are known; every other one is a feature.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import DataRefused
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw

_SUFFIXES = (".csv", ".parquet")
_MAX_BYTES = 16 << 30
_OWN = ("id", "label", "split", "time")


@register("graph")
class Tables:
    """`data.root` is the folder with both tables."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        from edgekd.data.graphs._files import one_of

        return {name: one_of(cfg, (name,), _SUFFIXES) for name in ("nodes", "edges")}

    def read(self, cfg: GraphConfig) -> Raw:
        """Raises DataRefused with file:line for a row that cannot be read, an id that comes twice, or an edge to a node that is not there."""
        import numpy as np

        from edgekd.data.nodes import PARTS, REST, UNLABELLED, Raw

        files = self.files(cfg)
        where = str(files["nodes"])
        nodes, edges = (_columns(files[n]) for n in ("nodes", "edges"))
        if not cfg.labelled:
            nodes["label"] = [""] * len(next(iter(nodes.values()), []))
        if lost := [n for n in ("id", "label") if n not in nodes]:
            raise DataRefused(f"there is no column {lost[0]}", where=where, expected="id, label and features", hint="name the columns so")
        if lost := [n for n in ("source", "target") if n not in edges]:
            raise DataRefused(
                f"there is no column {lost[0]}", where=str(files["edges"]), expected="source and target", hint="name the columns so"
            )
        ids = [_text(v) for v in nodes["id"]]
        place = {name: i for i, name in enumerate(ids)}
        if len(place) < len(ids):
            twice = next(n for i, n in enumerate(ids) if place[n] != i)
            raise DataRefused(f"the node {twice!a} is listed twice", where=where, expected="each node once", hint="remove one of the two")
        names = [_text(v) for v in nodes["label"]]
        classes = tuple(sorted({n for n in names if n}, key=_number_or_text))
        of = {name: i for i, name in enumerate(classes)} | {"": UNLABELLED}
        features = [n for n in nodes if n not in _OWN]
        if not features:
            raise DataRefused("there is no column of features", where=where, expected="a column of numbers for each feature")
        x = np.stack([_numbers(nodes[n], n, where) for n in features], axis=1).astype(np.float32)
        parts = None
        if "split" in nodes:
            marks = [_text(v) for v in nodes["split"]]
            if wrong := sorted({m for m in marks if m and m not in PARTS}):
                raise DataRefused(f"the split {wrong[0]!a} is unknown", where=where, expected="train, val, test or nothing")
            parts = np.array([PARTS.index(m) if m else REST for m in marks], np.int8)
        times = _numbers(nodes["time"], "time", where).astype(np.float64) if "time" in nodes else None
        ends = _ends(edges, place, files["edges"])
        labels = np.array([of[n] for n in names], np.int64)
        return Raw(x, ends, labels, classes, where, tuple(ids), parts, times)


def _ends(edges: dict[str, list[Any]], place: dict[str, int], path: Path) -> Any:
    import numpy as np

    found = np.empty((2, len(edges["source"])), np.int64)
    for side, name in enumerate(("source", "target")):
        for row, value in enumerate(edges[name]):
            at = place.get(_text(value))
            if at is None:
                raise DataRefused(
                    f"the {name} {_text(value)!a} is not among the nodes",
                    where=f"{path}:{row + 2}",
                    expected="an id of the nodes' table",
                    hint="add the node, or remove the edge",
                )
            found[side, row] = at
    return found


def _columns(path: Path) -> dict[str, list[Any]]:
    """Columns by name, in the file's order."""
    if path.stat().st_size > _MAX_BYTES:
        raise DataRefused("the file is too large", where=str(path), expected=f"at most {_MAX_BYTES >> 30} GiB", hint="use format: arrays")
    return _parquet(path) if path.suffix == ".parquet" else _csv(path)


def _csv(path: Path) -> dict[str, list[Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [h.strip() for h in next(rows, [])]
            if len(set(header)) < len(header) or not header:
                raise DataRefused("the header is empty or names a column twice", where=f"{path}:1", expected="a name for each column")
            columns: list[list[str]] = [[] for _ in header]
            for row in rows:
                if len(row) != len(header):
                    raise DataRefused(f"the row has {len(row)} fields", where=f"{path}:{rows.line_num}", expected=f"{len(header)}")
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
        except (csv.Error, UnicodeDecodeError) as e:
            raise DataRefused("the row cannot be read", where=f"{path}:{rows.line_num}", expected="a table in UTF-8") from e
    return dict(zip(header, columns, strict=True))


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from pyarrow import parquet
    except ImportError as e:
        raise DataRefused(
            "parquet tables are read by pyarrow, which is not installed",
            where=str(path),
            hint="pip install 'edgekd[tables]', or save them as .csv",
        ) from e
    try:
        table = parquet.read_table(path, memory_map=False)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataRefused("it is no parquet table, or it is damaged", where=str(path), expected="a table", hint="write it again") from e
    return {str(name): table.column(name).to_pylist() for name in table.column_names}


def _text(value: Any) -> str:
    """An id or a label as it is written; 3.0 of a table of numbers is 3."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _numbers(values: list[Any], name: str, where: str) -> Any:
    import numpy as np

    try:
        return np.array([np.nan if v is None or v == "" else float(v) for v in values], np.float64)
    except (TypeError, ValueError) as e:
        row = next(i for i, v in enumerate(values) if not _is_number(v))
        raise DataRefused(f"{values[row]!a} in the column {name} is no number", where=f"{where}:{row + 2}", expected="numbers") from e


def _is_number(value: Any) -> bool:
    try:
        return float(value) is not None if value not in (None, "") else True
    except (TypeError, ValueError):
        return False


def _number_or_text(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 10 else (1, 0, name)
