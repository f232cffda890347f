"""How long a graph model takes to answer for one node, as it would be deployed: its neighbours are fetched, and only what the answer needs is computed.

Two ways. `fetched`: features of all nodes within reach are read, multiplied and propagated. `cached`: the first product, features times weights, was computed for
every node beforehand and is only read: the strongest honest baseline, where features do not change. Both in scipy's compiled kernels, on one thread. Models whose
edges depend on what they see (gat, a user's own) have the first way only, by torch, on the part of the graph that is within reach.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import nn

from edgekd.data.normalise import normalised
from edgekd.graph._run import features_of
from edgekd.graph._sampler import surroundings
from edgekd.models.architectures._architecture import hops_of
from edgekd.safeio.arrays import Csr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekd.backends import Session
    from edgekd.data.links import Links
    from edgekd.data.nodes import Nodes
    from edgekd.stages._common import Samples

    Floats = NDArray[np.float32]


_BATCH, _MOST = 4096, 65_536  # rows of a batch, and of all of them


class Propagated:
    """A model of layers A H W + b (gcn, sage), layer by layer over the nodes that one answer needs."""

    def __init__(self, model: nn.Module, nodes: Nodes, *, cached: bool):
        edges: Any = model.edges(nodes.indptr, nodes.neighbours)  # type: ignore[operator]
        parts = [edges.values(), edges.col_indices(), edges.crow_indices()]
        self.by = csr_matrix(tuple(p.numpy() for p in parts), shape=(len(nodes), len(nodes)))
        self.layers = [_weights(layer) for layer in [*model.body, model.classifier]]  # type: ignore[misc]
        self.norms: Any = model.norms
        x = nodes.features
        self.x = csr_matrix((x.values, x.indices, x.indptr), shape=x.shape) if isinstance(x, Csr) else np.asarray(x, np.float32)
        first = self.layers[0]
        self.known = [None if w is None else np.ascontiguousarray(self.x @ w) for w in first[:2]] if cached else None

    def __call__(self, node: int) -> Floats:
        """Logits (classes,)."""
        needed, steps = np.array([node]), []
        for _ in self.layers:
            rows = self.by[needed]
            before, at = np.unique(np.concatenate([rows.indices, needed]), return_inverse=True)
            local = csr_matrix((rows.data, at[: len(rows.indices)], rows.indptr), shape=(len(needed), len(before)))
            steps.append((local, at[len(rows.indices) :]))
            needed = before
        h: Any = needed if self.known is not None else self.x[needed]
        for number, ((local, own), (spread, kept, bias)) in enumerate(zip(reversed(steps), self.layers, strict=True)):
            if number == 0 and self.known is not None:
                product, mine = (None if k is None else k[needed] for k in self.known)
            else:
                product, mine = h @ spread, None if kept is None else h @ kept
            h = local @ product + bias
            if mine is not None:
                h += mine[own]
            if number < len(self.layers) - 1:
                h = np.maximum(self._normed(h, number), 0)
        found: Floats = h[0]
        return found

    def _normed(self, h: Floats, number: int) -> Floats:
        norm = self.norms[number]
        if isinstance(norm, nn.Identity):
            return h
        with torch.inference_mode():
            found: Floats = norm(torch.from_numpy(h)).numpy()
        return found


def _weights(layer: Any) -> tuple[Floats, Floats | None, Floats]:
    """(weights of what neighbours bring, weights of the node's own where they are others, bias) of a layer."""

    def array(tensor: Any) -> Floats:
        found: Floats = np.ascontiguousarray(tensor.detach().numpy())
        return found

    if hasattr(layer, "lin_l"):
        return array(layer.lin_l.weight.T), array(layer.lin_r.weight.T), array(layer.lin_l.bias)
    return array(layer.lin.weight.T), None, array(layer.bias)


class WithinReach:
    """Any graph model, on the part of the graph that one answer needs; one step more than it has layers, for weights that depend on degrees."""

    def __init__(self, model: nn.Module, nodes: Nodes):
        self.model, self.nodes = model.eval(), nodes
        self.hops = hops_of(model) + 1

    def __call__(self, node: int) -> Floats:
        part = surroundings(self.nodes.indptr, self.nodes.neighbours, np.array([node]), self.hops, None)
        with torch.inference_mode():
            said = self.model(features_of(self.nodes, part.nodes), self.model.edges(part.indptr, part.neighbours))  # type: ignore[operator]
        found: Floats = said[0].float().numpy()
        return found


class Student:
    """The shipped engine: a row of features is read, or those of a pair, and it answers."""

    def __init__(self, session: Session, facts: Mapping[str, Any], nodes: Samples):
        self.session, self.facts, self.nodes = session, facts, nodes

    def __call__(self, node: int) -> Floats:
        row = normalised(self.nodes.samples(np.array([node])), self.facts)
        found: Floats = self.session.run({self.facts["input"]: np.repeat(row, self.facts["fixed_batch"] or 1, axis=0)})[0][0]
        return found


class OfPairs:
    """A way to answer for single nodes, asked for the embeddings of both nodes of a pair, and the layers that score them."""

    def __init__(self, way: Any, model: nn.Module, links: Links):
        self.way, self.pairs = way, links.pairs
        names = ("hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias")
        self.layers = [np.ascontiguousarray(model.get_parameter(n).detach().numpy().T) for n in names]

    def __call__(self, position: int) -> Floats:
        """Logits (2,) of the pair at a position."""
        a, b = self.pairs[position]
        one, shift, two, last = self.layers
        found: Floats = np.maximum((self.way(int(a)) * self.way(int(b))) @ one + shift, 0) @ two + last
        return found


class WholeGraph:
    """A graph model that is asked about every node at once, so that it fetches nothing."""

    def __init__(self, model: nn.Module, nodes: Nodes):
        self.model, self.x, self.rows = model.eval(), features_of(nodes), len(nodes)
        self.edges: Any = model.edges(nodes.indptr, nodes.neighbours)  # type: ignore[operator]

    def __call__(self) -> Floats:
        """Logits (nodes, classes)."""
        with torch.inference_mode():
            found: Floats = self.model(self.x, self.edges).float().numpy()
        return found


class EveryRow:
    """The shipped engine, asked about every node, or the first of very many, in batches."""

    def __init__(self, session: Session, facts: Mapping[str, Any], nodes: Nodes):
        self.session, self.name, self.fixed = session, str(facts["input"]), facts["fixed_batch"]
        self.rows = min(len(nodes), _MOST)
        self.x = normalised(nodes.samples(np.arange(self.rows)), facts)

    def __call__(self) -> Floats:
        """Logits (rows, classes)."""
        parts, size = [], self.fixed or _BATCH
        for start in range(0, self.rows, size):
            part = self.x[start : start + size]
            given = np.resize(part, (size, *part.shape[1:])) if self.fixed else part
            parts.append(self.session.run({self.name: given})[0][: len(part)])
        return np.concatenate(parts)


def seconds_a_row(ways: Mapping[str, WholeGraph | EveryRow], rounds: int) -> dict[str, float]:
    """Median seconds of each over its rows, in turns; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number:
                taken[name].append(time.perf_counter() - began)
    return {name: median(seconds) / ways[name].rows for name, seconds in taken.items()}


class Asked:
    """Something that answers, as a session that is measured: each run is the next of a fixed round of random nodes."""

    input_names: list[str] = []
    output_names: list[str] = []

    def __init__(self, answers: Any, asked: NDArray[np.int64]):
        self.answers, self.asked = answers, cycle(asked.tolist())

    def run(self, _: Any) -> list[Any]:
        return [self.answers(next(self.asked))]

    def close(self) -> None:
        """Nothing is held."""


def served(model: nn.Module, nodes: Nodes) -> dict[str, Any]:
    """The ways in which a graph model may answer, by name."""
    layers = [*getattr(model, "body", ()), getattr(model, "classifier", None)]
    if all(hasattr(layer, "lin_l") or (hasattr(layer, "lin") and not hasattr(layer, "att_src")) for layer in layers):
        return {"fetched": Propagated(model, nodes, cached=False), "cached": Propagated(model, nodes, cached=True)}
    return {"fetched": WithinReach(model, nodes)}
