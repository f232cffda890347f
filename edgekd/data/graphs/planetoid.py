"""The raw files of Planetoid (Cora, Citeseer, Pubmed): `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`.

Source: Yang, Cohen, Salakhutdinov, Revisiting Semi-Supervised Learning with Graph Embeddings, 2016; the split that its files imply: the first nodes train,
the next 500 are val, those of test.index are test. Published tables divide each row of features by its sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.data.nodes_config import GraphConfig
from edgekd.errors import DataRefused, FileMissing
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data.nodes import Raw

_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_VAL = 500
_MAX_INDEX_BYTES = 1 << 27


@register("graph")
class Planetoid:
    """`data.root` is the folder with the files, or the one above raw/ or NAME/raw/."""

    def files(self, cfg: GraphConfig) -> dict[str, Path]:
        """Raises FileMissing where a file is not there, or nothing says which graph is meant."""
        from edgekd.data.graphs._files import root_of

        root = root_of(cfg, or_else="or --allow-download, for cora and citeseer")
        places = [root, root / "raw", *([root / cfg.name / "raw", root / cfg.name.capitalize() / "raw"] if cfg.name else [])]
        found = sorted(
            {(p.name[4:-6], folder) for folder in places for p in folder.glob("ind.*.graph") if cfg.name in (None, p.name[4:-6])}
        )
        if len(found) != 1:
            seen = "no such files" if not found else f"several graphs: {', '.join(n for n, _ in found)}"
            raise FileMissing(
                f"the folder holds {seen}", where=str(root), expected=f"ind.{cfg.name or 'NAME'}.x and its like", hint="-o data.name=NAME"
            )
        [(name, folder)] = found
        files = {part: folder / f"ind.{name}.{part}" for part in _PARTS}
        if lost := [p.name for p in files.values() if not p.is_file()]:
            raise FileMissing(f"{lost[0]} is not there", where=str(folder), expected=f"all of {', '.join(_PARTS)}", hint="fetch it again")
        return files

    def read(self, cfg: GraphConfig) -> Raw:
        """Raises DataRefused for files that do not fit each other."""
        import numpy as np

        from edgekd.data.nodes import REST, UNLABELLED, Raw
        from edgekd.safeio.arrays import Csr
        from edgekd.safeio.pickles import read_pickle

        files = self.files(cfg)
        where = str(files["graph"].parent)
        tx, allx = (_of(read_pickle(files[n]), Csr, files[n]) for n in ("tx", "allx"))
        y, ty, ally = (_of(read_pickle(files[n]), np.ndarray, files[n]) for n in ("y", "ty", "ally"))
        table = _of(read_pickle(files["graph"]), dict, files["graph"])
        test = _test_index(files["test.index"])
        known = allx.shape[0]
        fits = (
            y.ndim == ty.ndim == ally.ndim == 2
            and len(ally) == known
            and len(test) == tx.shape[0] == len(ty)
            and tx.shape[1] == allx.shape[1]
            and y.shape[1] == ty.shape[1] == ally.shape[1]
            and len(set(test.tolist())) == len(test)
            and bool((test >= known).all())
        )
        if not fits:
            raise DataRefused("the files do not fit each other", where=where, expected="the files of one graph", hint="fetch them again")
        nodes = max(known, int(test.max()) + 1, max(table, default=0) + 1)
        counts = np.zeros(nodes, np.int64)  # nodes that test.index leaves out have neither features nor a label
        counts[:known], counts[test] = np.diff(allx.indptr), np.diff(tx.indptr)
        order = np.concatenate([np.arange(known), test])
        rows, columns = np.concatenate([allx.indices, tx.indices]), np.repeat(order, counts[order])
        by_row = np.argsort(columns, kind="stable")
        values = np.concatenate([allx.values, tx.values])[by_row]
        features = Csr((nodes, allx.shape[1]), np.concatenate([[0], counts.cumsum()]), rows[by_row], values)
        marks = np.zeros((nodes, ally.shape[1]))
        marks[:known], marks[test] = ally, ty
        labels = np.where(marks.any(1), marks.argmax(1), UNLABELLED).astype(np.int64)
        parts = np.full(nodes, REST, np.int8)
        parts[: len(y)], parts[len(y) : len(y) + _VAL], parts[test] = 0, 1, 2
        notes = [f"{lost} nodes have neither features nor a label"] if (lost := int((labels == UNLABELLED).sum())) else []
        parts[labels == UNLABELLED] = REST
        ends = np.array([(i, j) for i, others in table.items() for j in others], np.int64).reshape(-1, 2).T
        return Raw(features, ends, labels, tuple(map(str, range(ally.shape[1]))), where, parts=parts, normalise=True, notes=notes)


def _of(value: Any, kind: type, path: Path) -> Any:
    if not isinstance(value, kind):
        raise DataRefused(f"it holds a {type(value).__name__}", where=str(path), expected=kind.__name__, hint="fetch it again")
    return value


def _test_index(path: Path) -> Any:
    import numpy as np

    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError
        return np.array([int(line) for line in path.read_text(encoding="ascii").split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise DataRefused("it is no list of numbers", where=str(path), expected="a position in each line", hint="fetch it again") from error
