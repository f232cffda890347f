"""Neighbours of many nodes at once from an adjacency by rows: all of them, or so many drawn without replacement. No Python per node.

torch_geometric's loader needs compiled packages that are not served for every torch; this needs numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.data.rng import uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Surroundings:
    """A part of a graph: nodes by their number in the whole, the first ones those that were asked for, and the edges between them."""

    nodes: Ints
    indptr: Ints
    neighbours: Ints  # positions in `nodes`


def neighbours_of(
    indptr: Ints, neighbours: NDArray[Any], nodes: Ints, most: int | None, *, seed: int = 0, epoch: int = 0
) -> tuple[Ints, Ints]:
    """(position in `nodes`, neighbour) of each edge; with `most`, as many at random of a node that has more, a function of seed, epoch and edge."""
    starts, counts = indptr[nodes], indptr[nodes + 1] - indptr[nodes]
    rows = np.repeat(np.arange(len(nodes)), counts)
    at = np.arange(int(counts.sum())) - np.repeat(counts.cumsum() - counts, counts) + np.repeat(starts, counts)
    if most is not None and counts.max(initial=0) > most:
        order = np.lexsort((uniform(seed, "neighbours", epoch, at, 1)[:, 0], rows))  # by node, then by chance
        rank = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        kept = np.sort(order[rank < most])
        rows, at = rows[kept], at[kept]
    return rows, neighbours[at].astype(np.int64)


def surroundings(
    indptr: Ints, neighbours: NDArray[Any], nodes: Ints, hops: int, most: int | None, *, seed: int = 0, epoch: int = 0
) -> Surroundings:
    """Everything within `hops` steps of `nodes` (each once), with edges that lead there; nodes at the rim have none of their own."""
    known, frontier = nodes, nodes
    starts: list[Ints] = []
    ends: list[Ints] = []
    for hop in range(hops):
        rows, found = neighbours_of(indptr, neighbours, frontier, most, seed=seed + hop, epoch=epoch)
        starts.append(frontier[rows])
        ends.append(found)
        frontier = np.setdiff1d(found, known)
        known = np.concatenate([known, frontier])
    place = np.argsort(known, kind="stable")
    ordered = known[place]
    start, end = (place[np.searchsorted(ordered, np.concatenate(side))] for side in (starts, ends))
    order = np.lexsort((end, start))
    counts = np.bincount(start, minlength=len(known))
    return Surroundings(known, np.concatenate([[0], counts.cumsum()]), end[order])
