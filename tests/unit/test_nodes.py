"""Graphs from files: every layout, splits, settings, what is assumed and said, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from edgekd.data.graphs import _published, fingerprint
from edgekd.data.nodes import Nodes, build
from edgekd.data.nodes_config import NodesConfig
from edgekd.errors import DataRefused, FileMissing
from tests.graphs import opened, save_npz, save_planetoid, toy_arrays
from tests.support import run_here


def refused(folder: Path, **settings: Any) -> str:
    """What is said of a graph that is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises((DataRefused, FileMissing)) as problem:
        build(NodesConfig(**settings), 0, folder)
    assert problem.value.exit_code == 3
    return str(problem.value)


def dense(nodes: Nodes) -> Any:
    return nodes.rows(np.arange(len(nodes)))


def pairs(nodes: Nodes) -> set[tuple[int, int]]:
    start = np.repeat(np.arange(len(nodes)), np.diff(nodes.indptr))
    return set(zip(start.tolist(), nodes.neighbours.tolist(), strict=True))


def arrays(tmp_path: Path, **changes: Any) -> Path:
    """The toy graph with some of its arrays replaced; None leaves one out."""
    return save_npz(tmp_path / "graph.npz", **{n: a for n, a in (toy_arrays() | changes).items() if a is not None})


# ------------------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("lost", [0, 3])
def test_planetoid_files_are_put_in_the_order_of_their_ids(tmp_path: Path, lost: int) -> None:
    wrote = save_planetoid(tmp_path / "raw", lost=lost)
    nodes = opened(tmp_path / "out", format="planetoid", root=tmp_path, features="raw")
    there = np.array(sorted({*range(wrote["known"]), *wrote["test"].tolist()}))
    assert len(nodes) <= wrote["total"]
    np.testing.assert_array_equal(dense(nodes)[there], wrote["x"][there])
    np.testing.assert_array_equal(nodes.labels[there], wrote["y"][there])
    missing = np.setdiff1d(np.arange(len(nodes)), there)
    assert (nodes.labels[missing] == -1).all()
    assert not dense(nodes)[missing].any()
    assert nodes.split("train").tolist() == [0, 1, 2, 3]
    assert nodes.split("val").tolist() == list(range(4, wrote["known"]))
    assert nodes.split("test").tolist() == sorted(wrote["test"].tolist())
    want = {(i, j) for i, others in wrote["table"].items() for j in others if i != j}
    assert pairs(nodes) == want | {(j, i) for i, j in want}


def test_planetoid_rows_are_divided_by_their_sum_unless_asked_for_raw(tmp_path: Path) -> None:
    wrote = save_planetoid(tmp_path)
    nodes = opened(tmp_path / "out", format="planetoid", root=tmp_path)
    sums = wrote["x"].sum(1, keepdims=True)
    np.testing.assert_allclose(dense(nodes), wrote["x"] / np.where(sums == 0, 1, sums), rtol=1e-6)
    assert nodes.normalised
    assert not opened(tmp_path / "raw", format="planetoid", root=tmp_path, features="raw").normalised


def test_a_folder_with_several_planetoid_graphs_asks_for_the_name(tmp_path: Path) -> None:
    save_planetoid(tmp_path)
    (tmp_path / "ind.other.graph").write_bytes(b"")
    assert "several graphs: other, toy" in refused(tmp_path / "out", format="planetoid", root=tmp_path)
    assert len(opened(tmp_path / "toy", format="planetoid", root=tmp_path, name="toy")) == 40
    (tmp_path / "ind.toy.ally").unlink()
    assert "ind.toy.ally is not there" in refused(tmp_path / "lost", format="planetoid", root=tmp_path, name="toy")


def test_one_npz_by_rows_is_read_with_and_without_values(tmp_path: Path) -> None:
    wide = {
        "adj_indptr": [0, 1, 2, 4, 4],
        "adj_indices": [2, 2, 0, 1],
        "x_indptr": [0, 2, 3, 3, 4],
        "x_indices": [0, 4, 1, 2],
        "y": [0, 1, 0, 1],
    }
    save_npz(tmp_path / "graph.npz", **{n: np.array(a) for n, a in wide.items()}, shape=np.array([4, 6]))
    masks = save_npz(tmp_path / "masks", train=np.array([0, 1]), val=np.array([2]), test=np.array([3]))
    nodes = opened(tmp_path / "out", format="csr_npz", root=tmp_path, split={"file": masks})
    np.testing.assert_array_equal(dense(nodes), [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]])
    assert pairs(nodes) == {(0, 2), (2, 0), (1, 2), (2, 1)}
    renamed = {n.replace("x_", "attr_").replace("y", "labels") if n != "adj_indptr" else n: a for n, a in wide.items()}
    save_npz(tmp_path / "other.npz", **{n: np.array(a) for n, a in renamed.items()}, attr_data=np.array([2.0, 3, 4, 5]))
    nodes = opened(tmp_path / "own", format="csr_npz", root=tmp_path / "other.npz", split={"file": masks})
    np.testing.assert_array_equal(dense(nodes)[0], [2, 0, 0, 0, 3])


def test_arrays_are_read_from_npz_and_safetensors_alike(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    toy = toy_arrays()
    save_npz(tmp_path / "graph.npz", **toy)
    (tmp_path / "st").mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in toy.items()}, tmp_path / "st" / "graph.safetensors")
    one, two = (opened(tmp_path / f"out{i}", format="arrays", root=r) for i, r in enumerate((tmp_path, tmp_path / "st")))
    np.testing.assert_allclose(dense(one), toy["x"].astype(np.float32))
    np.testing.assert_array_equal(dense(one), dense(two))
    np.testing.assert_array_equal(one.parts, two.parts)
    assert pairs(one) == pairs(two)


def tables(folder: Path, nodes: str, edges: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodes.csv").write_text(nodes)
    (folder / "edges.csv").write_text(edges)
    return folder


ROWS = ["a,cat,train,0.5,1", "b,dog,train,1,0", "7,cat,val,0,0", "d d,dog,test,2.5,1", "e,,,1,1"]
NODES = "\n".join(["id,label,split,u,v", *ROWS]) + "\n"
EDGES = "source,target\na,b\n7,a\nd d,7\ne,b\n"


def test_tables_with_ids_of_any_kind(tmp_path: Path) -> None:
    nodes = opened(tmp_path / "out", format="tables", root=tables(tmp_path / "in", NODES, EDGES))
    assert nodes.ids == ("a", "b", "7", "d d", "e")
    assert nodes.classes == ("cat", "dog")
    assert nodes.labels.tolist() == [0, 1, 0, 1, -1]
    assert [nodes.split(p).tolist() for p in ("train", "val", "test")] == [[0, 1], [2], [3]]
    np.testing.assert_array_equal(dense(nodes)[3], [2.5, 1])
    assert pairs(nodes) == {(0, 1), (1, 0), (2, 0), (0, 2), (3, 2), (2, 3), (4, 1), (1, 4)}


def test_tables_as_parquet_say_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import csv as arrow

    folder = tables(tmp_path / "in", NODES, EDGES)
    (tmp_path / "pq").mkdir()
    for name in ("nodes", "edges"):
        parquet.write_table(arrow.read_csv(folder / f"{name}.csv"), tmp_path / "pq" / f"{name}.parquet")
    one, two = (opened(tmp_path / f"o{i}", format="tables", root=r) for i, r in enumerate((folder, tmp_path / "pq")))
    assert one.ids == two.ids
    np.testing.assert_array_equal(dense(one), dense(two))
    assert pairs(one) == pairs(two)
    (tmp_path / "pq" / "nodes.parquet").write_bytes(b"PAR1 nonsense")
    assert "no parquet table" in refused(tmp_path / "bad", format="tables", root=tmp_path / "pq")


@pytest.mark.parametrize("name", ["karate", "blocks"])
def test_built_in_graphs_need_nothing_and_are_always_the_same(tmp_path: Path, name: str) -> None:
    one, two = (opened(tmp_path / str(i), format=name) for i in range(2))
    np.testing.assert_array_equal(dense(one), dense(two))
    assert all(len(one.split(p)) for p in ("train", "val", "test"))


# ------------------------------------------------------------------------------------------------------------ edges
def test_what_is_assumed_of_edges_is_counted_and_said(tmp_path: Path) -> None:
    edges = np.array([[0, 0, 0, 1, 2, 3], [0, 1, 1, 0, 3, 4]])
    root = arrays(tmp_path, edge_index=edges)
    folder = tmp_path / "out"
    folder.mkdir()
    said = build(NodesConfig(format="arrays", root=root), 0, folder)["assumed"]
    assert "1 self loops are left out: every method adds its own" in said
    assert "1 edges come more than once and count once" in said
    assert any(text.startswith("2 of 4 edges are listed one way only and taken both ways") for text in said)
    assert "55 nodes have no edges" in said
    assert pairs(Nodes.open(folder)) == {(0, 1), (1, 0), (2, 3), (3, 2), (3, 4), (4, 3)}
    assert pairs(opened(tmp_path / "directed", format="arrays", root=root, edges="directed")) == {(0, 1), (1, 0), (2, 3), (3, 4)}


def test_the_largest_component_is_kept_where_asked(tmp_path: Path) -> None:
    edges = np.concatenate([np.stack([np.arange(29), np.arange(1, 30)]), np.stack([np.arange(30, 50), np.arange(31, 51)])], axis=1)
    root = arrays(tmp_path, edge_index=edges, train_mask=None, val_mask=None, test_mask=None)
    nodes = opened(tmp_path / "out", format="arrays", root=root, split={"by": "class", "train": 3, "val": 2, "largest_component": True})
    assert nodes.ids == tuple(map(str, range(30)))
    assert len(nodes.neighbours) == 58
    np.testing.assert_allclose(dense(nodes), toy_arrays()["x"][:30].astype(np.float32))


# ------------------------------------------------------------------------------------------------------------ splits
def test_by_class_takes_as_many_of_each_as_asked_and_goes_by_seed(tmp_path: Path) -> None:
    root = arrays(tmp_path)
    split = {"by": "class", "train": 4, "val": 5}
    nodes = opened(tmp_path / "a", format="arrays", root=root, split=split)
    counts = [np.bincount(nodes.labels[nodes.split(p)]).tolist() for p in ("train", "val", "test")]
    assert counts == [[4] * 3, [5] * 3, [11] * 3]
    again, other = (opened(tmp_path / n, format="arrays", root=root, split=split | {"seed": s}) for n, s in (("b", 0), ("c", 1)))
    np.testing.assert_array_equal(again.parts, nodes.parts)
    assert (other.parts != nodes.parts).any()


def test_by_time_the_earliest_train_and_the_latest_test(tmp_path: Path) -> None:
    root = arrays(tmp_path, time=np.arange(60)[::-1].astype(float), train_mask=None, val_mask=None, test_mask=None)
    nodes = opened(tmp_path / "out", format="arrays", root=root)
    assert nodes.split("test").tolist() == list(range(9))
    assert nodes.split("val").tolist() == list(range(9, 18))


def test_hidden_nodes_are_test_nodes_and_their_edges_are_not_observed(tmp_path: Path) -> None:
    root = arrays(tmp_path)
    nodes = opened(tmp_path / "out", format="arrays", root=root, setting="inductive", hidden=0.5)
    hidden = np.flatnonzero(nodes.hidden)
    assert len(hidden) == 10
    assert set(hidden) <= set(nodes.split("test"))
    indptr, neighbours = nodes.observed()
    start = np.repeat(np.arange(len(nodes)), np.diff(indptr))
    assert not set(hidden) & {*start.tolist(), *neighbours.tolist()}
    seen = {(i, j) for i, j in pairs(nodes) if i not in hidden and j not in hidden}
    assert set(zip(start.tolist(), neighbours.tolist(), strict=True)) == seen
    assert set(nodes.seen) == set(range(60)) - set(hidden)


# ------------------------------------------------------------------------------------------------------------ refusals
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an edge to a missing node": (
        {"edge_index": np.array([[0, 1], [1, 99]])},
        "edges lead to nodes that are not there, the first is 1 -> 99",
    ),
    "a negative node": ({"edge_index": np.array([[0, -1], [1, 2]])}, "not there"),
    "edges of one row": ({"edge_index": np.array([[0, 1]])}, "edge_index"),
    "no edges": ({"edge_index": None}, "it has no edge_index"),
    "NaN in a feature": ({"x": np.where(np.arange(300).reshape(60, 5) == 37, np.nan, 1.0)}, "a feature of node 7 is not a finite number"),
    "fewer labels": ({"y": np.zeros(3, int)}, "y is"),
    "labels as text": ({"y": np.array(["a"] * 60)}, "y is"),
    "one class": ({"y": np.zeros(60, int)}, "1 class"),
    "masks that overlap": ({"val_mask": toy_arrays()["train_mask"]}, "20 nodes are in val and in train"),
    "a mask of another length": ({"val_mask": np.ones(5, bool)}, "val is bool"),
    "a mask that is missing": ({"val_mask": None}, "nothing is named val"),
    "an empty part": ({"val_mask": np.zeros(60, bool)}, "the val part is empty"),
    "no label in train": ({"y": np.where(toy_arrays()["train_mask"], -1, np.arange(60) % 3)}, "20 nodes of train have no label"),
    "a class that is not in train": ({"train_mask": toy_arrays()["train_mask"] & (np.arange(60) % 3 != 2)}, "class 2 has no training node"),
    "a label below none": ({"y": np.where(np.arange(60) == 5, -2, np.arange(60) % 3)}, "outside the classes"),
    "objects": ({"y": np.array([{}] * 60, dtype=object)}, "pickled objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_assumed_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, said = BAD[name]
    assert said in refused(tmp_path / "out", format="arrays", root=arrays(tmp_path, **changes))


@pytest.mark.parametrize(
    ("nodes", "edges", "said"),
    [
        (NODES, EDGES + "x,a\n", "edges.csv:6"),
        (NODES + "a,cat,train,1,1\n", EDGES, "'a' is listed twice"),
        (NODES.replace("0.5", "much"), EDGES, "'much' in the column u is no number"),
        (NODES.replace("val", "valid"), EDGES, "the split 'valid' is unknown"),
        (NODES.replace("label", "kind"), EDGES, "no column label"),
        (NODES, EDGES.replace("source", "from"), "no column source"),
        (NODES + "f,cat\n", EDGES, "nodes.csv:7"),
        ("id,label\na,cat\nb,dog\n", "source,target\n", "no column of features"),
        (NODES.replace("0.5", ""), EDGES, "a feature of node a is not a finite number"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_with_their_place(tmp_path: Path, nodes: str, edges: str, said: str) -> None:
    assert said in refused(tmp_path / "out", format="tables", root=tables(tmp_path / "in", nodes, edges))


def test_a_folder_that_is_not_there_or_empty_is_said(tmp_path: Path) -> None:
    assert "data folder not found" in refused(tmp_path / "out", format="planetoid", root=tmp_path / "none")
    assert "data folder not given" in refused(tmp_path / "out2", format="arrays")
    assert "no such files" in refused(tmp_path / "out3", format="planetoid", root=tmp_path)


def test_too_few_nodes_of_a_class_are_said_with_what_to_change(tmp_path: Path) -> None:
    assert "class 0 has 20 nodes" in refused(tmp_path / "out", format="arrays", root=arrays(tmp_path), split={"by": "class", "train": 20})


def test_the_fingerprint_follows_the_content_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    found = [fingerprint(NodesConfig(format="arrays", root=p)) for p in (one, two)]
    assert found[0] == found[1]
    arrays(tmp_path / "b", y=(np.arange(60) + 1) % 3)
    assert fingerprint(NodesConfig(format="arrays", root=two)) != found[0]


def test_the_artifact_says_its_version(tmp_path: Path) -> None:
    opened(tmp_path / "out", format="blocks")
    about = json.loads((tmp_path / "out" / "nodes.json").read_text())
    (tmp_path / "out" / "nodes.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(DataRefused, match="version 99"):
        Nodes.open(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ published graphs
def served_by(folder: Path, spoil: str = "") -> tuple[Callable[[str], IO[bytes]], list[str]]:
    """What opens addresses that end with names of files in a folder, and the addresses that it was asked for."""
    asked: list[str] = []

    def opener(address: str) -> IO[bytes]:
        asked.append(address)
        name = address.rpartition("/")[2]
        return io.BytesIO((folder / name).read_bytes() + (b"!" if name == spoil else b""))

    return opener, asked


def test_a_published_graph_is_fetched_once_over_https_and_only_as_it_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_planetoid(tmp_path / "there")
    hashes = {p.name.removeprefix("ind.toy."): hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "there").iterdir()}
    monkeypatch.setitem(_published.HASHES, "toy", hashes)
    cfg = NodesConfig(format="planetoid", name="toy")
    assert _published.wanted(cfg)
    opener, asked = served_by(tmp_path / "there")
    folder = _published.fetch(cfg, tmp_path / "store", opener=opener)
    assert len(asked) == 8
    assert all(a.startswith("https://") for a in asked)
    assert _published.fetch(cfg, tmp_path / "store", opener=opener) == folder
    assert len(asked) == 8
    whole = opened(tmp_path / "out", format="planetoid", root=folder, name="toy")
    assert len(whole) == 40
    opener, _ = served_by(tmp_path / "there", spoil="ind.toy.graph")
    with pytest.raises(DataRefused, match="its SHA-256 is"):
        _published.fetch(cfg, tmp_path / "other", opener=opener)
    assert not list((tmp_path / "other").rglob("ind.toy.graph"))


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    for settings in ({"root": "x", "name": "cora"}, {"name": "mine"}, {}):
        assert not _published.wanted(NodesConfig(format="planetoid", **settings))
    result = run_here("compress", "graph/cora-krd", "--out", tmp_path / "run")
    assert result.code == 3
    assert "or --allow-download, for cora and citeseer" in result.err
