"""The DATA artifact of link prediction: pairs of nodes, linked or not, and a graph that holds the training links only.

Links are shared out between train, val and test at random; as many pairs that are no link anywhere in the graph stand beside those of each part, drawn once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.data.graphs import graph_format
from edgekd.data.nodes import ABOUT, PARTS, REST, UNLABELLED, VERSION, Nodes, check, edges_of, features_as, indptr_of, write_features
from edgekd.data.nodes_config import LinksConfig
from edgekd.data.rng import uniform
from edgekd.errors import DataRefused
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float32]

CLASSES = ("no link", "link")
PAIRS = "pairs.npy"
_ROUNDS = 200  # of drawing pairs, before a graph counts as too dense for them


def build(cfg: LinksConfig, seed: int, out: Path) -> dict[str, Any]:
    """Writes the artifact into the folder `out` and returns its meta. Raises DataRefused, FileMissing, ResourceError."""
    raw = graph_format(cfg.format).read(cfg)
    nodes = raw.features.shape[0]
    raw = replace(raw, labels=np.full(nodes, UNLABELLED), classes=CLASSES, parts=None, times=None)
    check(raw)
    indptr, neighbours = edges_of(raw, cfg)
    start = np.repeat(np.arange(nodes), np.diff(indptr))
    linked = np.stack([start, neighbours], axis=1)[start < neighbours]
    seed = seed if cfg.split.seed is None else cfg.split.seed
    parts = _parts(len(linked), cfg, seed, raw.where)
    apart = unlinked(linked, nodes, len(linked), seed, raw.where)
    seen = linked[parts == 0]
    both = np.concatenate([seen, seen[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    features = features_as(raw, cfg)
    about = {
        "version": VERSION,
        "classes": CLASSES,
        "ids": raw.ids,
        "normalise": cfg.features == "rows" or (cfg.features == "auto" and raw.normalise),
    }
    with resource_errors(out):
        write_features(out, features)
        arrays = {"indptr": indptr_of(both[:, 0], nodes), "neighbours": both[:, 1].astype(np.int32), "labels": raw.labels}
        arrays |= {"parts": np.full(nodes, REST, np.int8), "hidden": np.zeros(nodes, np.bool_)}
        arrays |= {
            "pairs": np.concatenate([linked, apart]),
            "pair_labels": np.repeat([1, 0], len(linked)),
            "pair_parts": np.concatenate([parts, parts]),
        }
        for name, array in arrays.items():
            np.save(out / f"{name}.npy", np.asarray(array))
        (out / ABOUT).write_text(json.dumps(about | {"directed": False}), encoding="utf-8")
    return {
        "classes": list(CLASSES),
        "samples": {name: int(2 * (parts == i).sum()) for i, name in enumerate(PARTS)},
        "nodes": nodes,
        "edges": 2 * len(linked),
        "features": features.shape[1],
        "assumed": raw.notes,
        "skipped": {},
    }


@dataclass(frozen=True, eq=False)
class Links:
    """Pairs of nodes of a DATA artifact by position 0..n-1; `nodes` has the training links only."""

    nodes: Nodes
    pairs: Ints  # (n, 2)
    labels: Ints  # (n,) 1: linked
    parts: NDArray[np.int8]
    classes: tuple[str, ...] = CLASSES
    labelled: bool = True

    @classmethod
    def open(cls, path: Path) -> Links:
        """path: the artifact's folder."""
        return cls(Nodes.open(path), *(np.load(path / f"{name}.npy") for name in ("pairs", "pair_labels", "pair_parts")))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ids(self) -> tuple[str, ...]:
        """Both nodes' names."""
        names = self.nodes.ids
        return tuple(f"{names[a]} {names[b]}" for a, b in self.pairs)

    def split(self, name: str) -> Ints:
        """Positions of the pairs of train, val or test, ascending."""
        return np.flatnonzero(self.parts == PARTS.index(name)).astype(np.int64)

    def samples(self, positions: Ints) -> Floats:
        """(len(positions), twice the features): the rows of both nodes side by side."""
        return np.concatenate([self.nodes.rows(self.pairs[positions, side]) for side in (0, 1)], axis=1)


def unlinked(linked: Ints, nodes: int, count: int, seed: int, where: str) -> Ints:
    """(count, 2) pairs of different nodes that are not in `linked` (both ascending by row), each once. Raises DataRefused where there are too few."""
    taken = linked[:, 0] * nodes + linked[:, 1]
    found = np.empty(0, np.int64)
    for number in range(_ROUNDS):
        drawn = (uniform(seed, "unlinked", number, np.arange(count), 2) * nodes).astype(np.int64)
        low, high = drawn.min(1), drawn.max(1)
        code = (low * nodes + high)[low < high]
        code = code[~np.isin(code, taken) & ~np.isin(code, found)]
        _, first = np.unique(code, return_index=True)
        found = np.concatenate([found, code[np.sort(first)]])[:count]
        if len(found) == count:
            return np.stack([found // nodes, found % nodes], axis=1)
    raise DataRefused(
        f"only {len(found)} pairs without a link were found for {count} links",
        where=where,
        expected="a graph in which most pairs are not linked",
    )


def _parts(count: int, cfg: LinksConfig, seed: int, where: str) -> NDArray[np.int8]:
    """(links,) position in PARTS."""
    val, test = round(count * cfg.split.val), round(count * cfg.split.test)
    if not val or not test or val + test >= count:
        raise DataRefused(
            f"the graph has {count} links, which gives val {val} and test {test} of them",
            where=where,
            expected="links to train on, to decide on and to test",
            hint="larger parts: -o data.split.val=0.1 -o data.split.test=0.2",
        )
    order = np.argsort(uniform(seed, "links", 0, np.arange(count), 1)[:, 0], kind="stable")
    found = np.zeros(count, np.int8)
    found[order[:val]], found[order[val : val + test]] = 1, 2
    return found
