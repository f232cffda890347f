"""Where a node lies in its graph, as numbers: DeepWalk. Known nodes look theirs up; a new one takes the mean of the neighbours that are known.

Source: Perozzi, Al-Rfou, Skiena, DeepWalk, KDD 2014, algorithms 1 and 2: skip-gram with a hierarchical softmax, by gensim; what for, Tian et al., NOSMOG, ICLR 2023,
section 4.1, whose code samples negatives as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.data.rng import seed_of, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekd.data.nodes_config import PositionsConfig

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float32]


def walks(indptr: Ints, neighbours: NDArray[Any], starts: Ints, length: int, seed: int, number: int) -> NDArray[np.int64]:
    """(starts, length): each goes on to any neighbour alike; -1 once there is none."""
    found = np.full((len(starts), length), -1, np.int64)
    found[:, 0] = starts
    chance = uniform(seed, "walks", number, starts, length)
    for step in range(1, length):
        at = found[:, step - 1]
        count = np.where(at >= 0, indptr[at + 1] - indptr[at], 0)
        on = count > 0
        found[on, step] = neighbours[indptr[at[on]] + (chance[on, step] * count[on]).astype(np.int64)]
    return found


def positions(
    indptr: Ints, neighbours: NDArray[Any], hidden: NDArray[np.bool_], whole: tuple[Ints, NDArray[Any]], cfg: PositionsConfig, seed: int
) -> Floats:
    """(nodes, size). indptr, neighbours: without the edges of hidden nodes; `whole`: with them, for the means that hidden nodes get.

    A hidden node without known neighbours is at 0. One thread: the same numbers every time.
    """
    from gensim.models import Word2Vec  # type: ignore[import-untyped]  # it takes a second to import

    nodes = len(indptr) - 1
    known = np.flatnonzero(~hidden)
    names = known.astype(
        str
    ).tolist()  # gensim takes a whole number for a place in its own list: wrong codes, or a worker that dies and is waited for
    rounds = (walks(indptr, neighbours, known, cfg.length, seed, number) for number in range(cfg.walks))
    sentences = [walk[walk >= 0].astype(str).tolist() for part in rounds for walk in part]
    model = Word2Vec(
        sentences=sentences,
        vector_size=cfg.size,
        window=cfg.window,
        epochs=cfg.epochs,
        min_count=0,
        sg=1,
        hs=1,
        negative=0,
        workers=1,
        seed=seed_of(seed, "positions") % 2**32,
    )
    found = np.zeros((nodes, cfg.size), np.float32)
    found[known] = model.wv[names]
    for node in np.flatnonzero(hidden):
        near = whole[1][whole[0][node] : whole[0][node + 1]]
        near = near[~hidden[near]]
        if len(near):
            found[node] = found[near].mean(0)
    return found
