"""Where nodes lie: walks along edges only, nodes that walk together lie together, hidden nodes take the mean of the neighbours that are known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from edgekd.data.nodes_config import PositionsConfig
from edgekd.data.positions import positions, walks
from edgekd.graph._run import features_of
from tests.graphs import opened, save_npz, toy_arrays

FEW = PositionsConfig(size=6, walks=4, length=12, window=3, epochs=2)


def two_rings(size: int = 12) -> tuple[Any, Any]:
    """(indptr, neighbours) of two rings of `size` nodes that nothing joins, and one node without edges at the end."""
    ends = [sorted(((i + 1) % size + part, (i - 1) % size + part)) for part in (0, size) for i in range(size)]
    counts = [len(e) for e in ends] + [0]
    return np.concatenate([[0], np.cumsum(counts)]), np.array([n for e in ends for n in e])


def test_walks_go_along_edges_and_stop_where_there_are_none() -> None:
    indptr, neighbours = two_rings()
    found = walks(indptr, neighbours, np.arange(25), 9, seed=3, number=0)
    assert (found[:, 0] == np.arange(25)).all()
    assert (found[24, 1:] == -1).all()
    for walk in found[:24].tolist():
        assert all(b in neighbours[indptr[a] : indptr[a + 1]] for a, b in pairwise(walk))
    other = walks(indptr, neighbours, np.arange(25), 9, seed=3, number=1)
    assert (other[:24] != found[:24]).any()
    turns = np.concatenate([walks(indptr, neighbours, np.array([0]), 2, seed=0, number=n)[:, 1] for n in range(400)])
    assert 140 < (turns == 1).sum() < 260  # each neighbour as often as the other


def test_nodes_of_one_ring_lie_nearer_to_each_other_and_every_time_at_the_same_place() -> None:
    indptr, neighbours = two_rings()
    hidden = np.zeros(25, bool)
    cfg = PositionsConfig(size=8, walks=20, length=20, window=5, epochs=5)
    found = positions(indptr, neighbours, hidden, (indptr, neighbours), cfg, 0)
    assert found.shape == (25, 8)
    assert found.tobytes() == positions(indptr, neighbours, hidden, (indptr, neighbours), cfg, 0).tobytes()
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert alike[:12, :12].mean() > alike[:12, 12:24].mean() + 0.2


def test_a_hidden_node_lies_between_its_known_neighbours_and_changes_nothing_for_them(tmp_path: Path) -> None:
    toy = toy_arrays()
    hiding = {"format": "arrays", "setting": "inductive", "positions": FEW}
    nodes = opened(tmp_path / "one", root=save_npz(tmp_path / "one.npz", **toy), **hiding)
    assert nodes.places is not None
    for node in np.flatnonzero(nodes.hidden):
        near = nodes.neighbours[nodes.indptr[node] : nodes.indptr[node + 1]]
        near = near[~nodes.hidden[near]]
        want = nodes.places[near].mean(0) if len(near) else np.zeros(6, np.float32)
        np.testing.assert_array_equal(nodes.places[node], want)
    first = int(np.flatnonzero(nodes.hidden)[0])
    more = toy | {"edge_index": np.concatenate([toy["edge_index"], [[first] * 5, [int(n) for n in nodes.seen[:5]]]], axis=1)}
    other = opened(tmp_path / "two", root=save_npz(tmp_path / "two.npz", **more), **hiding)
    assert other.places is not None
    np.testing.assert_array_equal(other.places[nodes.seen], nodes.places[nodes.seen])
    assert (other.places[first] != nodes.places[first]).any()


def test_models_of_rows_see_positions_and_models_of_graphs_do_not(tmp_path: Path) -> None:
    nodes = opened(tmp_path / "out", format="arrays", root=save_npz(tmp_path / "g.npz", **toy_arrays()), positions=FEW)
    asked = np.array([4, 1])
    assert nodes.places is not None
    np.testing.assert_array_equal(nodes.samples(asked), np.concatenate([nodes.rows(asked), nodes.places[asked]], axis=1))
    assert (nodes.width, nodes.sample_width) == (5, 11)
    assert features_of(nodes, asked, looks_at="rows").shape == (2, 11)
    assert features_of(nodes, asked).shape == (2, 5)


@pytest.mark.parametrize("settings", [{"size": 0}, {"walks": 0}, {"length": 1}, {"wide": 3}])
def test_settings_have_limits(settings: Any) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        PositionsConfig(**settings)
