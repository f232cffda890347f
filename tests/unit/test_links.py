"""Pairs of nodes: what is held back stays unseen, how links rank, the model of two rows, and a training that goes on after any kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgekd import registry
from edgekd.console import Console
from edgekd.context import Context
from edgekd.data.links import Links, build, unlinked
from edgekd.data.nodes_config import LinksConfig
from edgekd.errors import DataRefused, InputRefused, Interrupted
from edgekd.graph._links import LinkJob, LinkRun, LinkTeacher, embeddings_of, pair_logits
from edgekd.graph._run import features_of
from edgekd.graph._serve import OfPairs, served
from edgekd.models.build import build as build_model
from edgekd.models.spec import ModelSpec
from edgekd.stages.distill_links import assert_tells_links
from edgekd.stages.node_groups import of_links
from edgekd.train.config import LinkTrainConfig
from edgekd.train.loop import Trained, fit
from tests.graphs import save_npz, toy_arrays

TASK = registry.load("task", "link_prediction")()


def opened(folder: Path, seed: int = 0, **settings: Any) -> Links:
    folder.mkdir(parents=True, exist_ok=True)
    build(LinksConfig(**settings), seed, folder)
    return Links.open(folder)


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Links:
    folder = tmp_path_factory.mktemp("links")
    return opened(folder / "out", format="arrays", root=save_npz(folder / "graph.npz", **toy_arrays()))


# ------------------------------------------------------------------------------------------------------------ data
@pytest.mark.parametrize("seed", [0, 7])
def test_what_is_held_back_is_nowhere_to_be_seen_and_pairs_without_a_link_are_none(tmp_path: Path, seed: int) -> None:
    toy = toy_arrays()
    links = opened(tmp_path / "out", seed, format="arrays", root=save_npz(tmp_path / "graph.npz", **toy), split={"val": 0.1, "test": 0.2})
    every = {frozenset(e) for e in toy["edge_index"].T.tolist()}
    told = {frozenset(p) for p in links.pairs[links.labels == 1].tolist()}
    assert told == every
    apart = links.pairs[links.labels == 0]
    assert not {frozenset(p) for p in apart.tolist()} & every
    assert len({frozenset(p) for p in apart.tolist()}) == len(apart)
    assert (apart[:, 0] != apart[:, 1]).all()
    nodes = links.nodes
    seen = {frozenset((i, int(j))) for i in range(60) for j in nodes.neighbours[nodes.indptr[i] : nodes.indptr[i + 1]]}
    train = links.split("train")
    assert seen == {frozenset(p) for p in links.pairs[train[links.labels[train] == 1]].tolist()}
    sizes = [len(links.split(n)) for n in ("train", "val", "test")]
    assert sizes == [
        2 * n for n in (len(every) - round(0.1 * len(every)) - round(0.2 * len(every)), round(0.1 * len(every)), round(0.2 * len(every)))
    ]
    assert all(links.labels[links.split(n)].mean() == 0.5 for n in ("train", "val", "test"))
    again = opened(tmp_path / "again", seed, format="arrays", root=tmp_path / "graph.npz", split={"val": 0.1, "test": 0.2})
    assert (again.pairs == links.pairs).all()
    assert (again.parts == links.parts).all()


def test_a_sample_is_the_rows_of_both_nodes(links: Links) -> None:
    a, b = links.pairs[5]
    np.testing.assert_array_equal(
        links.samples(np.array([5]))[0], [*links.nodes.rows(np.array([a]))[0], *links.nodes.rows(np.array([b]))[0]]
    )
    assert links.ids[5] == f"{a} {b}"


def test_graphs_without_labels_are_read(tmp_path: Path) -> None:
    toy = toy_arrays()
    bare = {n: toy[n] for n in ("x", "edge_index")}
    assert len(opened(tmp_path / "a", format="arrays", root=save_npz(tmp_path / "graph.npz", **bare))) == 2 * 120
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "nodes.csv").write_text("id,f\n" + "".join(f"n{i},{i}\n" for i in range(30)))
    (tmp_path / "tables" / "edges.csv").write_text("source,target\n" + "".join(f"n{i},n{(i + 1) % 30}\n" for i in range(30)))
    assert len(opened(tmp_path / "b", format="tables", root=tmp_path / "tables").split("train")) == 2 * (30 - 2 - 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edge_index": np.zeros((2, 0), np.int64)}, "the graph has 0 links"),
        ({"edge_index": np.array([[0, 1, 2], [1, 2, 3]])}, "which gives val 0 and test 0"),
        ({"edge_index": np.array([[0], [99]])}, "edges lead to nodes that are not there"),
        ({"x": np.full((60, 2), np.nan)}, "is not a finite number"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(DataRefused, match=said):
        opened(tmp_path / "out", format="arrays", root=save_npz(tmp_path / "graph.npz", **(toy_arrays() | change)))


@given(st.integers(4, 12), st.integers(0, 5))
def test_pairs_that_are_drawn_are_no_links_each_comes_once_and_too_few_are_said(nodes: int, seed: int) -> None:
    every = np.array([(a, b) for a in range(nodes) for b in range(a + 1, nodes)])
    linked = every[np.random.default_rng(seed).permutation(len(every))[: len(every) // 2]]
    linked = linked[np.lexsort((linked[:, 1], linked[:, 0]))]
    found = unlinked(linked, nodes, len(every) - len(linked), seed, "here")
    assert {tuple(p) for p in found.tolist()} == {tuple(p) for p in every.tolist()} - {tuple(p) for p in linked.tolist()}
    with pytest.raises(DataRefused, match="only 0 pairs without a link"):
        unlinked(every, nodes, 1, seed, "here")


# ------------------------------------------------------------------------------------------------------------ metrics
def outputs(scores: list[float]) -> Any:
    return np.stack([np.zeros(len(scores)), scores], 1).astype(np.float32)


def test_links_are_ranked_as_loops_rank_them() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [40, 60])
    scores = np.round(rng.standard_normal(100) + labels, 1)  # with equals
    said = outputs(scores.tolist())
    links, others = scores[labels == 1], scores[labels == 0]
    wins = [np.mean([1.0 if s > o else 0.5 if s == o else 0.0 for o in others]) for s in links]
    np.testing.assert_allclose(TASK.scores(said, labels), wins, rtol=1e-6)
    found = TASK.metrics(said, labels, None)
    assert found["auc"] == pytest.approx(np.mean(wins), abs=1e-6)
    assert found["mrr"] == pytest.approx(np.mean([1 / (1 + sum(o > s for o in others)) for s in links]))
    for k in (10, 20, 50):
        assert found[f"hits@{k}"] == np.mean([s > sorted(others)[-k] for s in links])


def test_answers_that_are_not_finite_rank_last_and_without_rivals_nothing_is_known() -> None:
    labels = np.array([1, 1, 0, 0])
    said = outputs([np.nan, 2.0, 1.0, 0.0])
    np.testing.assert_array_equal(TASK.scores(said, labels), [0, 1])
    assert TASK.scores(said[:2], labels[:2]).tolist() == [0.5, 0.5]


# ------------------------------------------------------------------------------------------------------------ models and training
def spec(arch: str, links: Links, **args: Any) -> ModelSpec:
    return ModelSpec(arch=arch, args={"hidden": 8, "dropout": 0.3} | args, num_classes=2, features=links.nodes.width, pairs=True)


def test_a_pair_is_two_rows_by_one_encoder_in_either_order(links: Links) -> None:
    model = build_model(spec("mlp", links)).eval()
    x = torch.from_numpy(links.samples(np.arange(6)))
    a, b = (model.encoder(side) for side in x.chunk(2, 1))  # type: ignore[operator]
    torch.testing.assert_close(model(x), model.scored(a, b))  # type: ignore[operator]
    torch.testing.assert_close(model(x), model(torch.cat(x.chunk(2, 1)[::-1], 1)))
    np.testing.assert_allclose(pair_logits(model, links, links.pairs[:6], None), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_teachers_layers_alone_say_what_it_says(links: Links) -> None:
    model = build_model(spec("sage", links)).eval()
    edges = model.encoder.edges(links.nodes.indptr, links.nodes.neighbours)  # type: ignore[operator,union-attr]
    layers = [model.get_parameter(n).detach() for n in ("hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias")]
    teacher = LinkTeacher(embeddings_of(model, links, edges), (layers[0], layers[1], layers[2], layers[3]))
    want = pair_logits(model, links, links.pairs[:9], edges).softmax(1)[:, 1]
    a, b = torch.from_numpy(links.pairs[:9]).T
    torch.testing.assert_close(teacher.probability(a, b), want)


@pytest.mark.parametrize("arch", ["gcn", "sage", "gat"])
def test_the_ways_in_which_a_graph_model_serves_say_what_it_says_of_all(arch: str, links: Links) -> None:
    model = build_model(spec(arch, links)).eval()
    encoder: Any = model.get_submodule("encoder")
    want = pair_logits(model, links, links.pairs[:5], encoder.edges(links.nodes.indptr, links.nodes.neighbours)).numpy()
    for way in served(encoder, links.nodes).values():
        asked = OfPairs(way, model, links)
        for i in range(5):
            np.testing.assert_allclose(asked(i), want[i], rtol=1e-4, atol=1e-5)


def test_links_are_grouped_by_what_both_nodes_share(links: Links) -> None:
    test = links.split("test")[links.labels[links.split("test")] == 1]
    near = [set(links.nodes.neighbours[links.nodes.indptr[i] : links.nodes.indptr[i + 1]].tolist()) for i in range(60)]
    groups = of_links(links, test)
    for place, (a, b) in enumerate(links.pairs[test]):
        shared, least = len(near[a] & near[b]), min(len(near[a]), len(near[b]))
        [name] = [n for n, m in groups["shared neighbours"].items() if m[place]]
        assert name == (str(shared) if shared < 2 else "2 to 3" if shared < 4 else "4 or more")
        [name] = [n for n, m in groups["degree of the lesser"].items() if m[place]]
        assert int(name.split()[0]) <= least
    assert all(sum(m.sum() for m in g.values()) == len(test) for g in groups.values())


class Watch(Console):
    """A quiet console that tells `each` of every step."""

    def __init__(self, each: Callable[[int], None]):
        super().__init__(quiet=True)
        self.each = each

    @contextmanager
    def bar(self, name: str, total: float) -> Iterator[Any]:
        yield self

    def update(self, done: float, **_figures: str) -> None:
        self.each(int(done))


def context(each: Callable[[int], None] = lambda _: None) -> Context:
    return Context(store=None, console=Watch(each))  # type: ignore[arg-type]  # the loop never touches the store


def job(links: Links, work: Path, arch: str = "mlp", distill: bool = False, **settings: Any) -> LinkJob:
    work.mkdir(parents=True, exist_ok=True)
    cfg = LinkTrainConfig(**({"epochs": 4, "patience": 0, "log_seconds": 1e-9} | settings))
    looks_at = registry.load("architecture", arch).looks_at
    made = LinkJob("tiny", build_model(spec(arch, links)), spec(arch, links), looks_at, links, TASK, cfg, 0, work)
    if distill:
        cls = registry.load("graph_distill", "llp")
        draw = torch.Generator().manual_seed(1)
        parts = [torch.randn(shape, generator=draw) for shape in ((60, 5), (5, 5), (5,), (2, 5), (2,))]
        made.distiller, made.label_weight = cls(cls.Config()), 0.5
        made.teacher = LinkTeacher(parts[0], (parts[1], parts[2], parts[3], parts[4]))
    return made


def weights(trained: Trained) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in trained.model.state_dict().items()}


@pytest.mark.parametrize("settings", [{}, {"batch_size": 40}])
@pytest.mark.parametrize(("arch", "distill"), [("mlp", False), ("gcn", False), ("mlp", True)])
def test_a_training_killed_anywhere_goes_on_to_the_same_weights(
    arch: str, distill: bool, settings: Any, links: Links, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = fit(job(links, tmp_path / "once", arch, distill, **settings), context())
    monkeypatch.setattr("edgekd.train.loop._CHECKPOINT_SECONDS", 0.0)
    for stop in sorted({1, once.steps // 2, once.steps - 1}):
        ctx = context()
        ctx.console = Watch(lambda step, ctx=ctx, stop=stop: setattr(ctx.stop, "code", 130 if step == stop else None))
        with pytest.raises(Interrupted):
            fit(job(links, tmp_path / str(stop), arch, distill, **settings), ctx)
        again = fit(job(links, tmp_path / str(stop), arch, distill, **settings), context())
        assert weights(again) == weights(once)
        assert again.curves == once.curves


def test_each_step_draws_other_pairs_that_are_no_training_links_and_contexts_of_every_node_once_an_epoch(
    links: Links, tmp_path: Path
) -> None:
    run = LinkRun(job(links, tmp_path, distill=True, batch_size=40))
    known = {frozenset(p) for p in run.linked.tolist()}
    anchors, last = [], None
    for _ in run.remaining():
        if run.step >= run.per_epoch:
            break
        drawn = run._drawn(25)
        assert len(drawn) == 25
        assert not known & {frozenset(p) for p in drawn.tolist()}
        assert all(a != b for a, b in drawn.tolist())
        assert last is None or (drawn != last).any()
        last = drawn
        nodes, context = run._contexts(0)
        assert context.shape == (len(nodes), 3 * 2 * 2)
        near = links.nodes
        for node, members in zip(nodes, context, strict=True):
            around = set(near.neighbours[near.indptr[node] : near.indptr[node + 1]].tolist())
            assert set(members[:6:2].tolist()) <= (around or {node})  # the first step of each walk
        anchors += nodes.tolist()
        run.step += 1
    assert sorted(anchors) == list(range(60))


def test_links_that_are_held_back_change_nothing_of_a_training(tmp_path: Path) -> None:
    """Two graphs that differ in one link of test: the same weights."""
    links = opened(tmp_path / "a", format="arrays", root=save_npz(tmp_path / "graph.npz", **toy_arrays()))
    other = Links(links.nodes, links.pairs.copy(), links.labels, links.parts)
    test = links.split("test")
    other.pairs[test] = other.pairs[test][::-1]
    results = [weights(fit(job(each, tmp_path / str(i), "sage", keep="last"), context())) for i, each in enumerate((links, other))]
    assert results[0] == results[1]


def test_a_student_that_cannot_tell_links_is_refused_unless_its_teacher_cannot_either(links: Links, tmp_path: Path) -> None:
    labels = links.labels[links.split("val")]
    flat = job(links, tmp_path / "flat")
    for parameter in flat.model.parameters():
        parameter.data.zero_()
    for name, right in (("knows", True), ("guesses", False)):
        (tmp_path / name).mkdir()
        scores = labels if right else np.zeros(len(labels))
        np.save(tmp_path / name / "val.npy", np.stack([np.zeros(len(labels)), scores], 1).astype(np.float32))
    answers = {n: SimpleNamespace(path=tmp_path / n) for n in ("knows", "guesses")}
    with pytest.raises(InputRefused, match=r"no better than luck \(area under the curve 50.0%; the teacher's 100.0%\): it has collapsed"):
        assert_tells_links(flat, answers["knows"])  # type: ignore[arg-type]
    assert_tells_links(flat, answers["guesses"])  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["mlp", "gcn", "sage", "gat"])
def test_every_encoder_learns_links_that_can_be_told(arch: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    group = np.arange(80) % 4
    edges = np.argwhere(np.triu((group[:, None] == group) & (rng.random((80, 80)) < 0.4), 1)).T
    graph = save_npz(tmp_path / "graph.npz", x=np.eye(4)[group] + 0.1 * rng.standard_normal((80, 4)), edge_index=edges)
    links = opened(tmp_path / "out", format="arrays", root=graph, split={"val": 0.2, "test": 0.2})
    trained = fit(job(links, tmp_path / "work", arch, epochs=150), context())
    assert max(row["val_metric"] for row in trained.curves) > 0.9
    assert features_of(links.nodes).shape == (80, 4)
