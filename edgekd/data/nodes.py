"""The DATA artifact of a graph: `build` reads, checks and splits it; `Nodes` gives rows of features, and the edges for those who learn.

What was assumed (edges one way only, loops, nodes without edges) is counted and said, never silently mended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.data.graphs import graph_format
from edgekd.data.nodes_config import GraphConfig, NodesConfig, PositionsConfig
from edgekd.data.rng import uniform
from edgekd.errors import DataRefused, FileMissing
from edgekd.safeio.arrays import Csr, read_arrays
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float32]

PARTS = ("train", "val", "test")
REST, UNLABELLED = -1, -1
ABOUT = "nodes.json"
VERSION = 1
_SPARSE_BELOW = 0.2  # share of features that are not 0, below which rows are kept by places
_MAX_BYTES = 1 << 30
_PLACES = "positions"


@dataclass
class Raw:
    """What a format reads, unchecked."""

    features: Csr | Floats  # (nodes, features)
    edges: Ints  # (2, edges) as written: from, to
    labels: Ints  # (nodes,), UNLABELLED where there is none
    classes: tuple[str, ...]
    where: str
    ids: tuple[str, ...] = ()  # none: row numbers
    parts: NDArray[np.int8] | None = None  # (nodes,) position in PARTS, or REST
    times: NDArray[np.float64] | None = None  # (nodes,)
    normalise: bool = False  # whether published tables divide rows by their sum
    notes: list[str] = field(default_factory=list)


def build(cfg: NodesConfig, seed: int, out: Path) -> dict[str, Any]:
    """Writes the artifact into the folder `out` and returns its meta. Raises DataRefused, FileMissing, ResourceError."""
    raw = graph_format(cfg.format).read(cfg)
    check(raw)
    indptr, neighbours = edges_of(raw, cfg)
    if cfg.split.largest_component:
        raw, indptr, neighbours = _largest(raw, indptr, neighbours)
    if (alone := int((np.diff(indptr) == 0).sum())) and cfg.edges == "undirected":
        raw.notes.append(f"{alone} nodes have no edges")
    parts = _parts(raw, cfg, seed)
    hidden = _hidden(parts, cfg, seed)
    features = features_as(raw, cfg)
    with resource_errors(out):
        write_features(out, features)
        arrays = {"indptr": indptr, "neighbours": neighbours.astype(np.int32), "labels": raw.labels, "parts": parts, "hidden": hidden}
        for name, array in arrays.items():
            np.save(out / f"{name}.npy", np.asarray(array))
        if cfg.positions is not None:
            np.save(out / f"{_PLACES}.npy", _places(indptr, neighbours, hidden, cfg.positions, seed))
        about = {
            "version": VERSION,
            "classes": raw.classes,
            "ids": raw.ids,
            "normalise": cfg.features == "rows" or (cfg.features == "auto" and raw.normalise),
        }
        (out / ABOUT).write_text(json.dumps(about | {"directed": cfg.edges == "directed"}), encoding="utf-8")
    counts = {name: int((parts == i).sum()) for i, name in enumerate(PARTS)}
    return {
        "classes": list(raw.classes),
        "samples": counts,
        "nodes": len(raw.labels),
        "edges": len(neighbours),
        "features": features.shape[1],
        "unseen": int(hidden.sum()),
        "positions": cfg.positions.size if cfg.positions else 0,
        "assumed": raw.notes,
        "skipped": {},
    }


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of a DATA artifact by position 0..n-1."""

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: Ints  # (n,), UNLABELLED where there is none
    features: Csr | Floats
    indptr: Ints  # (n + 1,): the neighbours of node i are neighbours[indptr[i]:indptr[i + 1]]
    neighbours: NDArray[np.int32]
    hidden: NDArray[np.bool_]  # unseen while training
    parts: NDArray[np.int8]
    normalised: bool  # whether rows were divided by their sum: whoever brings new rows must do the same
    directed: bool
    places: Floats | None = None  # (n, size): where a node lies in the graph, for models of rows
    labelled: bool = True

    @classmethod
    def open(cls, path: Path) -> Nodes:
        """path: the artifact's folder. Dense features are mapped, not read."""
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        if about["version"] != VERSION:
            raise DataRefused(f"the graph has version {about['version']}", where=str(path), expected=str(VERSION), hint="build it again")

        def array(name: str) -> Any:
            return np.load(path / f"{name}.npy")

        labels = array("labels")
        features: Csr | Floats
        if (path / "x_indptr.npy").exists():
            shape = tuple(int(n) for n in array("x_shape"))
            features = Csr((shape[0], shape[1]), *(array(f"x_{n}") for n in ("indptr", "indices", "values")))
        else:
            features = np.load(path / "features.npy", mmap_mode="r")
        ids = tuple(about["ids"]) or tuple(map(str, range(len(labels))))
        indptr, neighbours, hidden, parts = (array(n) for n in ("indptr", "neighbours", "hidden", "parts"))
        said = bool(about["normalise"]), bool(about["directed"]), array(_PLACES) if (path / f"{_PLACES}.npy").exists() else None
        return cls(tuple(about["classes"]), ids, labels, features, indptr, neighbours, hidden, parts, *said)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Features of a node: its own."""
        return int(self.features.shape[1])

    @property
    def sample_width(self) -> int:
        """Numbers that a model of rows takes."""
        return self.width + (0 if self.places is None else self.places.shape[1])

    def split(self, name: str) -> Ints:
        """Positions of the nodes of train, val or test, ascending."""
        return np.flatnonzero(self.parts == PARTS.index(name)).astype(np.int64)

    @property
    def seen(self) -> Ints:
        """Positions of all nodes that may be looked at while training, labelled or not."""
        return np.flatnonzero(~self.hidden).astype(np.int64)

    def rows(self, positions: Ints) -> Floats:
        """(len(positions), width) a node's own features, as models of graphs take them."""
        if isinstance(self.features, Csr):
            return self.features.take(positions).dense()
        return np.ascontiguousarray(self.features[positions], dtype=np.float32)

    def samples(self, positions: Ints) -> Floats:
        """(len(positions), sample_width) what a model of rows takes: a node's features, and where it lies."""
        rows = self.rows(positions)
        return rows if self.places is None else np.concatenate([rows, self.places[positions]], axis=1)

    def observed(self) -> tuple[Ints, NDArray[np.int32]]:
        """(indptr, neighbours) without the edges of hidden nodes: what there is while training."""
        return _observed(self.indptr, self.neighbours, self.hidden)


# ------------------------------------------------------------------------------------------------------------ reading
def check(raw: Raw) -> None:
    """Raises DataRefused for what no assumption can mend."""
    nodes, where = len(raw.labels), raw.where
    if nodes == 0 or not raw.features.shape[1]:
        raise DataRefused("the graph has no nodes or no features", where=where, expected="rows of features, one a node")
    if raw.features.shape[0] != nodes:
        raise DataRefused(f"{raw.features.shape[0]} rows of features, {nodes} labels", where=where, expected="one of each for every node")
    values = raw.features.values if isinstance(raw.features, Csr) else raw.features
    if not np.isfinite(values).all():
        what = f"a feature of node {_name(raw, _first_bad(raw.features))} is not a finite number"
        raise DataRefused(what, where=where, expected="finite features", hint="fill it, or leave the node out")
    outside = (raw.edges < 0) | (raw.edges >= nodes)
    if outside.any():
        at = int(np.flatnonzero(outside.any(0))[0])
        raise DataRefused(
            f"{int(outside.any(0).sum())} edges lead to nodes that are not there, the first is {int(raw.edges[0, at])} -> {int(raw.edges[1, at])}",
            where=where,
            expected=f"nodes 0 to {nodes - 1}",
            hint="add the nodes, or remove the edges",
        )
    if len(raw.classes) < 2:
        raise DataRefused(f"the graph has {len(raw.classes)} class", where=where, expected="two or more")
    if ((raw.labels < UNLABELLED) | (raw.labels >= len(raw.classes))).any():
        raise DataRefused("a label is outside the classes", where=where, expected=f"0 to {len(raw.classes) - 1}, or -1 for none")


def _first_bad(features: Csr | Floats) -> int:
    """The first row with a number that is not finite."""
    if isinstance(features, Csr):
        return int(np.searchsorted(features.indptr, np.flatnonzero(~np.isfinite(features.values))[0], "right")) - 1
    return int(np.flatnonzero(~np.isfinite(features).all(1))[0])


def _name(raw: Raw, row: int) -> str:
    return raw.ids[row] if raw.ids else str(row)


def edges_of(raw: Raw, cfg: GraphConfig) -> tuple[Ints, NDArray[np.int64]]:
    """(indptr, neighbours), each edge once, loops dropped; both ways unless they are directed."""
    nodes, (start, end) = len(raw.labels), raw.edges
    loops = start == end
    if loops.any():
        raw.notes.append(f"{int(loops.sum())} self loops are left out: every method adds its own")
    code = np.unique(start[~loops] * nodes + end[~loops])
    if twice := int((~loops).sum()) - len(code):
        raw.notes.append(f"{twice} edges come more than once and count once")
    if cfg.edges == "undirected":
        back = code % nodes * nodes + code // nodes
        both = np.union1d(code, back)
        if one_way := len(both) - len(code):
            raw.notes.append(
                f"{one_way} of {len(code)} edges are listed one way only and taken both ways; edges: directed keeps the direction"
            )
        code = both
    return indptr_of(code // nodes, nodes), code % nodes


def indptr_of(start: NDArray[Any], nodes: int) -> Ints:
    return np.concatenate([[0], np.bincount(start, minlength=nodes).cumsum()]).astype(np.int64)


def _observed(indptr: Ints, neighbours: NDArray[Any], hidden: NDArray[np.bool_]) -> tuple[Ints, NDArray[Any]]:
    """The edges between nodes that are not hidden."""
    if not hidden.any():
        return indptr, neighbours
    start = np.repeat(np.arange(len(hidden)), np.diff(indptr))
    kept = ~hidden[start] & ~hidden[neighbours]
    return indptr_of(start[kept], len(hidden)), neighbours[kept]


def _places(indptr: Ints, neighbours: NDArray[Any], hidden: NDArray[np.bool_], cfg: PositionsConfig, seed: int) -> Floats:
    from edgekd.data.positions import positions

    return positions(*_observed(indptr, neighbours, hidden), hidden, (indptr, neighbours), cfg, seed)


def _largest(raw: Raw, indptr: Ints, neighbours: NDArray[np.int64]) -> tuple[Raw, Ints, NDArray[np.int64]]:
    """The largest connected part; of equals the one with the first node."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    nodes = len(raw.labels)
    matrix = csr_matrix((np.ones(len(neighbours), np.int8), neighbours, indptr), shape=(nodes, nodes))
    count, of = connected_components(matrix, directed=False)
    kept = np.flatnonzero(of == np.bincount(of).argmax())
    if count > 1:
        raw.notes.append(f"{nodes - len(kept)} nodes outside the largest connected part are left out")
    part = matrix[kept][:, kept].tocsr()
    part.sort_indices()
    features: Csr | Floats
    if isinstance(raw.features, Csr):
        whole = csr_matrix((raw.features.values, raw.features.indices, raw.features.indptr), shape=raw.features.shape)[kept]
        features = Csr((len(kept), raw.features.shape[1]), whole.indptr.astype(np.int64), whole.indices.astype(np.int64), whole.data)
    else:
        features = raw.features[kept]
    ids = tuple(_name(raw, int(i)) for i in kept)
    few = {n: None if (a := getattr(raw, n)) is None else a[kept] for n in ("parts", "times")}
    found = Raw(features, raw.edges, raw.labels[kept], raw.classes, raw.where, ids, few["parts"], few["times"], raw.normalise, raw.notes)
    return found, part.indptr.astype(np.int64), part.indices.astype(np.int64)


def features_as(raw: Raw, cfg: GraphConfig) -> Csr | Floats:
    """As models take them: divided by the sum of the row where that is asked for (a row of zeros stays)."""
    divide = cfg.features == "rows" or (cfg.features == "auto" and raw.normalise)
    found = raw.features
    if not isinstance(found, Csr) and np.count_nonzero(found) < _SPARSE_BELOW * found.size:
        start, places = np.nonzero(found)
        found = Csr(found.shape, indptr_of(start, len(found)), places.astype(np.int64), found[start, places])
    if not divide:
        return found
    if isinstance(found, Csr):
        rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
        sums = np.bincount(rows, found.values.astype(np.float64), found.shape[0])
        return Csr(found.shape, found.indptr, found.indices, (found.values / np.where(sums == 0, 1, sums)[rows]).astype(np.float32))
    totals = found.sum(1, keepdims=True, dtype=np.float64)
    return (found / np.where(totals == 0, 1, totals)).astype(np.float32)


def write_features(out: Path, features: Csr | Floats) -> None:
    if not isinstance(features, Csr):
        np.save(out / "features.npy", features)
        return
    for name, array in {
        "shape": np.asarray(features.shape),
        "indptr": features.indptr,
        "indices": features.indices,
        "values": features.values,
    }.items():
        np.save(out / f"x_{name}.npy", array)


# ------------------------------------------------------------------------------------------------------------ splits
def _parts(raw: Raw, cfg: NodesConfig, seed: int) -> NDArray[np.int8]:
    """(nodes,) position in PARTS or REST. Raises DataRefused for parts that cannot be learned from or judged on."""
    split = cfg.split
    if split.file is not None:
        found = _from_file(split.file, len(raw.labels))
    elif split.by == "time" or (split.by == "auto" and raw.parts is None and raw.times is not None):
        found = _by_time(raw, cfg)
    elif split.by == "class" or (split.by == "auto" and raw.parts is None):
        found = _by_class(raw, cfg, seed if split.seed is None else split.seed)
    elif raw.parts is None:
        raise DataRefused("the files say nothing of train, val and test", where=raw.where, hint="-o data.split.by=class")
    else:
        found = raw.parts.astype(np.int8)
    for i, part in enumerate(PARTS):
        lost = np.flatnonzero((found == i) & (raw.labels == UNLABELLED))
        if len(lost):
            raise DataRefused(
                f"{len(lost)} nodes of {part} have no label, the first {_name(raw, int(lost[0]))}",
                where=raw.where,
                expected="a label for each",
            )
        if not (found == i).any():
            raise DataRefused(f"the {part} part is empty", where=raw.where, expected="nodes to train on, to decide on and to test")
    counts = np.bincount(raw.labels[found == 0], minlength=len(raw.classes))
    if (counts == 0).any():
        missing = raw.classes[int(np.flatnonzero(counts == 0)[0])]
        raise DataRefused(
            f"class {missing} has no training node", where=raw.where, expected="at least one", hint="another split: -o data.split.by=class"
        )
    return found


def _by_class(raw: Raw, cfg: NodesConfig, seed: int) -> NDArray[np.int8]:
    found = np.where(raw.labels == UNLABELLED, REST, PARTS.index("test")).astype(np.int8)
    order = np.argsort(uniform(seed, "split", 0, np.arange(len(raw.labels)), 1)[:, 0], kind="stable")
    for label, name in enumerate(raw.classes):
        pool = order[raw.labels[order] == label]
        if len(pool) <= cfg.split.train:
            raise DataRefused(
                f"class {name} has {len(pool)} nodes",
                where=raw.where,
                expected=f"more than {cfg.split.train}, the training nodes of each",
                hint="-o data.split.train=N",
            )
        found[pool[: cfg.split.train]] = 0
        found[pool[cfg.split.train : cfg.split.train + cfg.split.val]] = 1
    return found


def _by_time(raw: Raw, cfg: NodesConfig) -> NDArray[np.int8]:
    if raw.times is None:
        raise DataRefused(
            "no column says the time of a node", where=raw.where, expected="a column named time", hint="-o data.split.by=class"
        )
    known = np.flatnonzero(raw.labels != UNLABELLED)
    if not np.isfinite(raw.times[known]).all():
        raise DataRefused("the time of a labelled node is not a number", where=raw.where, expected="a finite number for each")
    first, second = np.quantile(raw.times[known], [1 - cfg.split.val_part - cfg.split.test_part, 1 - cfg.split.test_part])
    found = np.full(len(raw.labels), REST, np.int8)
    found[known] = np.digitize(raw.times[known], [first, second], right=True)  # nodes of one moment stay together
    return found


def _from_file(path: Path, nodes: int) -> NDArray[np.int8]:
    if not path.is_file():
        raise FileMissing("no such file", where=str(path), expected="masks or positions named train, val and test, .npz")
    arrays = read_arrays(path, DataRefused, expected="train, val and test", max_bytes=_MAX_BYTES, max_arrays=8)
    return masks(arrays, nodes, str(path))


def masks(arrays: Mapping[str, NDArray[Any]], nodes: int, where: str) -> NDArray[np.int8]:
    """Parts from arrays named train, val and test (or train_mask ...): masks, or positions. Raises DataRefused where they overlap or do not fit."""
    found = np.full(nodes, REST, np.int8)
    for i, part in enumerate(PARTS):
        given = arrays.get(part, arrays.get(f"{part}_mask"))
        if given is None:
            raise DataRefused(f"nothing is named {part}", where=where, expected="masks or positions named train, val and test")
        mask = np.zeros(nodes, bool)
        if given.dtype == np.bool_ and given.shape == (nodes,):
            mask = given
        elif given.ndim == 1 and given.dtype.kind in "iu" and ((given >= 0) & (given < nodes)).all():
            mask[given.astype(np.int64)] = True
        else:
            raise DataRefused(
                f"{part} is {given.dtype} {given.shape}", where=where, expected=f"booleans ({nodes},), or positions below {nodes}"
            )
        if (both := mask & (found != REST)).any():
            other = PARTS[int(found[both][0])]
            raise DataRefused(
                f"{int(both.sum())} nodes are in {part} and in {other}", where=where, expected="each node in one part at most"
            )
        found[mask] = i
    return found


def _hidden(parts: NDArray[np.int8], cfg: NodesConfig, seed: int) -> NDArray[np.bool_]:
    """Which test nodes are unseen while training."""
    found = np.zeros(len(parts), np.bool_)
    if cfg.setting == "inductive":
        test = np.flatnonzero(parts == PARTS.index("test"))
        order = np.argsort(uniform(seed, "hidden", 0, test, 1)[:, 0], kind="stable")
        found[test[order[: max(1, round(len(test) * cfg.hidden))]]] = True
    return found
