"""Learning from a graph: models against dense oracles, the sampler against sets, batches, resuming, teachers that say nothing, students that collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import registry
from edgekd.console import Console
from edgekd.context import Context
from edgekd.data.nodes import Nodes
from edgekd.errors import InputRefused, Interrupted
from edgekd.graph._run import NodeJob, class_weights, features_of, whole_graph_logits
from edgekd.graph._sampler import neighbours_of, surroundings
from edgekd.graph._serve import EveryRow, WholeGraph, seconds_a_row, served
from edgekd.graph._teacher import calibrate, noisy_entropy
from edgekd.models.architectures._stack import dropped
from edgekd.models.architectures._tokenizer import Codebook
from edgekd.models.spec import ModelSpec
from edgekd.stages.node_groups import degrees, homophily, seen
from edgekd.train.config import NodeTrainConfig
from edgekd.train.loop import Trained, fit
from tests.graphs import opened, save_npz, taught, toy_arrays

TASK = registry.load("task", "node_classification")()
GRAPH_MODELS = [n for n in registry.names("architecture") if registry.load("architecture", n).looks_at == "graph"]


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


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    folder = tmp_path_factory.mktemp("toy")
    return opened(folder / "out", format="arrays", root=save_npz(folder / "graph.npz", **toy_arrays()))


@pytest.fixture(scope="module")
def sparse_nodes(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    folder = tmp_path_factory.mktemp("sparse")
    toy = toy_arrays()
    x = np.zeros((60, 30), np.float32)
    x[np.arange(60), np.arange(60) % 3] = 1
    x[np.arange(60), 3 + np.arange(60) % 27] = 2
    return opened(folder / "out", format="arrays", root=save_npz(folder / "graph.npz", **toy | {"x": x}))


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    folder = tmp_path_factory.mktemp("hiding")
    return opened(folder / "out", format="arrays", root=save_npz(folder / "graph.npz", **toy_arrays()), setting="inductive")


def model(name: str, nodes: Nodes, **args: Any) -> Any:
    cls = registry.load("architecture", name)
    torch.manual_seed(0)
    return cls().create(cls.Config(**({"hidden": 8, "dropout": 0.0} | args)), nodes.width, len(nodes.classes))


def job(nodes: Nodes, work: Path, arch: str = "mlp", distill: str | None = None, args: Any = (), **settings: Any) -> NodeJob:
    work.mkdir(parents=True, exist_ok=True)
    cfg = NodeTrainConfig(**({"epochs": 6, "log_seconds": 1e-9} | settings))
    spec = ModelSpec(arch=arch, num_classes=len(nodes.classes), features=nodes.width)
    looks_at = registry.load("architecture", arch).looks_at
    made = NodeJob("tiny", model(arch, nodes, **dict(args)), spec, looks_at, nodes, TASK, cfg, 0, work)
    if distill:
        cls = registry.load("graph_distill", distill)
        made.distiller, made.teacher = (
            cls(cls.Config(label_weight=0.2)),
            torch.randn(len(nodes.seen), 3, generator=torch.Generator().manual_seed(1)),
        )
        made.label_weight = 0.2
        torch.manual_seed(0)
        made.projectors = made.distiller.setup(taught(made.teacher))
    return made


def weights(trained: Trained) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in trained.model.state_dict().items()}


def adjacency(nodes: Nodes) -> Any:
    found = np.zeros((len(nodes),) * 2)
    found[np.repeat(np.arange(len(nodes)), np.diff(nodes.indptr)), nodes.neighbours] = 1
    return found


# ------------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("name", ["gcn", "sage"])
def test_a_graph_layer_is_the_dense_product_of_its_paper(name: str, norm: str, sparse_nodes: Nodes) -> None:
    a, eye = adjacency(sparse_nodes), np.eye(60)
    degree = (a + eye).sum(1)
    by = (a + eye) / np.sqrt(np.outer(degree, degree)) if name == "gcn" else (a + 2 * eye) / (a.sum(1) + 2)[:, None]
    made = model(name, sparse_nodes, layers=3, norm=norm).eval()
    h = torch.from_numpy(sparse_nodes.rows(np.arange(60))).double()
    for i, layer in enumerate([*made.body, made.classifier]):
        h = torch.from_numpy(by) @ (h @ layer.lin.weight.double().T) + layer.bias.double()
        h = torch.relu(made.norms[i].double()(h)) if i < 2 else h
    made = model(name, sparse_nodes, layers=3, norm=norm).eval()
    found = made(features_of(sparse_nodes), made.edges(sparse_nodes.indptr, sparse_nodes.neighbours))
    torch.testing.assert_close(found.double(), h, rtol=1e-5, atol=1e-6)


def test_the_papers_sage_has_a_weight_for_the_node_and_one_for_the_mean_of_its_neighbours(sparse_nodes: Nodes) -> None:
    made = model("sage", sparse_nodes, layers=1, kind="mean").eval()
    a, x = adjacency(sparse_nodes), sparse_nodes.rows(np.arange(60)).astype(float)
    mean = a @ x / a.sum(1, keepdims=True)
    layer = made.classifier
    want = mean @ layer.lin_l.weight.detach().numpy().T + layer.lin_l.bias.detach().numpy() + x @ layer.lin_r.weight.detach().numpy().T
    found = made(features_of(sparse_nodes), made.edges(sparse_nodes.indptr, sparse_nodes.neighbours))
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_attention_is_that_of_the_paper(nodes: Nodes) -> None:
    """One head, one layer: softmax over the neighbours and the node itself of LeakyReLU(a . [Wh_i, Wh_j])."""
    made = model("gat", nodes, layers=1).eval()
    layer, x = made.classifier, torch.from_numpy(nodes.rows(np.arange(60)))
    h = (x @ layer.lin.weight.T).detach()
    own, other = (h @ layer.att_dst.detach().view(-1)), (h @ layer.att_src.detach().view(-1))
    scores = torch.nn.functional.leaky_relu(own[:, None] + other[None], 0.2)
    scores[torch.from_numpy(adjacency(nodes) + np.eye(60) == 0)] = -math.inf
    want = scores.softmax(1) @ h + layer.bias.detach()
    torch.testing.assert_close(made(x, made.edges(nodes.indptr, nodes.neighbours)).detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", registry.names("architecture"))
def test_sparse_rows_give_what_dense_rows_give_and_gradients_as_well(name: str, sparse_nodes: Nodes) -> None:
    answers = []
    for x in (features_of(sparse_nodes), features_of(sparse_nodes).to_dense()):
        made = model(name, sparse_nodes)
        edges = (made.edges(sparse_nodes.indptr, sparse_nodes.neighbours),) if name in GRAPH_MODELS else ()
        out = made(x, *edges)
        out.square().sum().backward()
        answers.append([out.detach(), *(p.grad for p in made.parameters())])
    for one, two in zip(*answers, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_codebook_moves_towards_the_mean_direction_of_those_who_chose_a_code() -> None:
    """By loops, in float64; codes that nobody chose stay, and the gradient of a code is that of its row."""
    torch.manual_seed(0)
    book, x = Codebook(5, 4, decay=0.8).double(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    before = book.codes.clone()
    rows, codes = x.detach().numpy(), before.numpy()
    chosen = [int(np.argmax([r @ c / np.linalg.norm(r) / np.linalg.norm(c) for c in codes])) for r in rows]
    assert 1 < len(set(chosen)) < 5
    out = book.train()(x)
    np.testing.assert_allclose(out.detach(), codes[chosen], rtol=1e-12)
    out.square().sum().backward()
    np.testing.assert_allclose(x.grad, 2 * codes[chosen], rtol=1e-12)
    for i, code in enumerate(codes):
        mine = [r / np.linalg.norm(r) for r, c in zip(rows, chosen, strict=True) if c == i]
        want = code / np.linalg.norm(code)
        if mine:
            mean = np.mean(mine, axis=0)
            want = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(book.codes[i], 0.8 * code + 0.2 * want, rtol=1e-10)
    book.eval()(x)
    moved = book.codes.clone()
    book(x)
    assert torch.equal(book.codes, moved)


def test_a_tokenizers_own_losses_are_of_its_codes_its_nodes_and_every_pair_of_nodes(nodes: Nodes) -> None:
    made = model("vqgcn", nodes, codes=6, commitment=0.5, node=0.25, edge=2.0).double().train()
    x, edges = features_of(nodes).double(), made.edges(nodes.indptr, nodes.neighbours).double()
    codes = made.codebook.codes.clone()
    made(x, edges)
    found = {n: float(v.detach()) for n, v in made.own_terms().items()}
    h = made._first(x, edges).detach().numpy()
    near = codes.numpy()[(h @ codes.T.numpy() / np.linalg.norm(codes.numpy(), axis=1)).argmax(1)]
    assert found["commitment"] == pytest.approx(0.5 * ((h - near) ** 2).mean())
    decoded = {
        n: (torch.from_numpy(near) @ getattr(made, n).weight.T + getattr(made, n).bias).detach().numpy() for n in ("to_node", "to_edges")
    }
    assert found["node"] == pytest.approx(0.25 * ((decoded["to_node"] - h) ** 2).mean())
    products = decoded["to_edges"] @ decoded["to_edges"].T
    scaled = (products - products.min()) / (products.max() - products.min())
    there = np.eye(60)
    for node in range(60):
        there[node, nodes.neighbours[nodes.indptr[node] : nodes.indptr[node + 1]]] = 1
    assert found["edge"] == pytest.approx(2.0 * ((scaled - there) ** 2).mean() ** 0.5)
    assert made.own_terms() == {}
    nearness, codebook = made.tokens(x, edges)
    want = [[row @ c / np.linalg.norm(row) / np.linalg.norm(c) for c in codebook.numpy()] for row in h]
    np.testing.assert_allclose(nearness, want, atol=1e-10)


def test_features_are_dropped_alike_in_dense_and_sparse_rows_and_only_while_training(sparse_nodes: Nodes) -> None:
    x = features_of(sparse_nodes)
    torch.manual_seed(0)
    kept = dropped(x, 0.5)
    assert kept.layout == torch.sparse_csr
    values, before = kept.to_dense(), x.to_dense()
    there = before != 0
    assert torch.equal(values[~there], before[~there])
    assert set((values[there] / before[there]).tolist()) == {0.0, 2.0}
    made = model("gat", sparse_nodes, feature_dropout=0.9)
    edges = made.edges(sparse_nodes.indptr, sparse_nodes.neighbours)
    assert torch.equal(made.eval()(x, edges), made(x, edges))
    assert not torch.equal(made.train()(x, edges), made.eval()(x, edges))


# ------------------------------------------------------------------------------------------------------------ neighbours
def test_all_neighbours_are_found_and_some_are_drawn_without_replacement(nodes: Nodes) -> None:
    asked = np.array([5, 0, 17, 5])
    rows, found = neighbours_of(nodes.indptr, nodes.neighbours, asked, None)
    for row, node in enumerate(asked):
        assert found[rows == row].tolist() == nodes.neighbours[nodes.indptr[node] : nodes.indptr[node + 1]].tolist()
    seen = set()
    for epoch in range(60):
        rows, found = neighbours_of(nodes.indptr, nodes.neighbours, asked[:3], 2, seed=1, epoch=epoch)
        assert np.bincount(rows).tolist() == [2, 2, 2]
        for row, node in enumerate(asked[:3]):
            drawn = found[rows == row].tolist()
            assert len(set(drawn)) == 2
            assert set(drawn) <= set(nodes.neighbours[nodes.indptr[node] : nodes.indptr[node + 1]].tolist())
            seen |= {(row, n) for n in drawn}
    assert len(seen) == 3 * 4  # each neighbour has its turn
    same = neighbours_of(nodes.indptr, nodes.neighbours, asked[:3], 2, seed=1, epoch=59)
    assert (same[1] == found).all()


@pytest.mark.parametrize("name", GRAPH_MODELS)
def test_the_surroundings_of_some_nodes_give_them_what_the_whole_graph_gives(name: str, nodes: Nodes) -> None:
    """With all neighbours, exactly: for models whose weights of an edge depend on both ends' degrees, one step further out."""
    made = model(name, nodes, layers=2).eval()
    whole = whole_graph_logits(made, features_of(nodes), made.edges(nodes.indptr, nodes.neighbours))
    asked = np.array([7, 30, 2])
    part = surroundings(nodes.indptr, nodes.neighbours, asked, 3, None)
    assert part.nodes[:3].tolist() == asked.tolist()
    assert len(set(part.nodes.tolist())) == len(part.nodes)
    found = whole_graph_logits(made, features_of(nodes, part.nodes), made.edges(part.indptr, part.neighbours))[:3]
    torch.testing.assert_close(found, whole[asked], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("settings", [{}, {"batch_size": 7}, {"batch_size": 7, "neighbours": 2}, {"class_weights": "balanced"}])
@pytest.mark.parametrize(
    ("arch", "distill"),
    [("gcn", None), ("gat", None), ("vqgcn", None), ("mlp", None), *(("mlp", d) for d in registry.names("graph_distill") if d != "llp")],
)
def test_a_training_killed_anywhere_goes_on_to_the_same_weights(
    arch: str, distill: str | None, settings: Any, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"epochs": 60 if distill == "krd" and not settings.get("batch_size") else 4, "patience": 0} | settings
    once = fit(job(nodes, tmp_path / "once", arch, distill, {"dropout": 0.3}, **settings), context())
    total = once.steps
    monkeypatch.setattr("edgekd.train.loop._CHECKPOINT_SECONDS", 0.0)
    for stop in sorted({1, total // 2, total - 1}):
        if not 0 < stop < total:
            continue
        ctx = context()
        ctx.console = Watch(lambda step, ctx=ctx, stop=stop: setattr(ctx.stop, "code", 130 if step == stop else None))
        with pytest.raises(Interrupted):
            fit(job(nodes, tmp_path / str(stop), arch, distill, {"dropout": 0.3}, **settings), ctx)
        again = fit(job(nodes, tmp_path / str(stop), arch, distill, {"dropout": 0.3}, **settings), context())
        assert weights(again) == weights(once)
        assert again.curves == once.curves


@pytest.mark.parametrize("arch", registry.names("architecture"))
def test_every_architecture_learns_the_toy_graph(arch: str, nodes: Nodes, tmp_path: Path) -> None:
    trained = fit(job(nodes, tmp_path, arch, epochs=80), context())
    assert max(row["val_metric"] for row in trained.curves) > 0.75
    sampled = fit(job(nodes, tmp_path / "sampled", arch, epochs=80, batch_size=8, neighbours=3), context())
    assert max(row["val_metric"] for row in sampled.curves) > 0.75


def test_patience_ends_a_training_and_the_end_survives_a_kill(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1, 0.9])

    class Scripted(registry.load("task", "node_classification")):  # type: ignore[misc]
        def scores(self, outputs: Any, labels: Any) -> Any:
            return np.array([next(metrics)])

    made = job(nodes, tmp_path, epochs=50, patience=3)
    made.task = Scripted()
    trained = fit(made, context())
    assert [row["val_metric"] for row in trained.curves] == [0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1]
    assert trained.steps == 7


def test_hidden_nodes_teach_nothing(hiding: Nodes, tmp_path: Path) -> None:
    """Whatever their features are."""
    results = []
    for noise in (0.0, 1e6):
        made = job(hiding, tmp_path / str(noise), "mlp", "ffg2m", epochs=5)
        changed = np.array(hiding.rows(np.arange(60)))
        changed[hiding.hidden] += noise
        made.nodes = Nodes(**{**hiding.__dict__, "features": changed})
        results.append(weights(fit(made, context())))
    assert results[0] == results[1]
    with_graph = [fit(job(hiding, tmp_path / f"g{i}", "gcn", epochs=5), context()) for i in range(2)]
    assert weights(with_graph[0]) == weights(with_graph[1])


def test_rare_classes_count_as_much_as_frequent_ones() -> None:
    found = class_weights(np.array([0, 0, 0, 1]), 3)
    assert found.tolist() == pytest.approx([4 / (2 * 3), 4 / 2, 0])
    assert float((found[torch.tensor([0, 0, 0, 1])]).mean()) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ teachers
@pytest.mark.parametrize("factor", [0.02, 1.0, 30.0])
def test_calibration_undoes_a_factor_of_the_logits(factor: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 4)).astype(np.float32) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(4, p=p) for p in shares.astype(float) / shares.astype(float).sum(1, keepdims=True)])
    found, said = calibrate(logits * np.float32(factor), labels, "teacher")
    assert said.temperature == pytest.approx(factor, rel=0.1)
    np.testing.assert_allclose(found, logits, rtol=0.12, atol=1e-3)


def test_a_teacher_that_knows_nothing_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputRefused, match="nearly uniform"):
        calibrate(rng.standard_normal((500, 5)).astype(np.float32), rng.integers(0, 5, 500), "teacher")


def test_entropy_under_noise_is_of_one_seeded_draw(nodes: Nodes) -> None:
    made = model("gcn", nodes)
    edges = made.edges(nodes.indptr, nodes.neighbours)
    one, two, three = (noisy_entropy(made, nodes, edges, 1.0, seed) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert one.shape == (60,)
    assert float(one.max()) <= math.log(3) + 1e-6


# ------------------------------------------------------------------------------------------------------------ what neighbours cost
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(("arch", "args"), [("gcn", {}), ("sage", {}), ("sage", {"kind": "mean"}), ("gat", {})])
def test_an_answer_for_one_node_is_that_of_the_whole_graph(arch: str, args: Any, norm: str, nodes: Nodes, sparse_nodes: Nodes) -> None:
    for graph in (nodes, sparse_nodes):
        made = model(arch, graph, layers=3, norm=norm, **args).eval()
        whole = whole_graph_logits(made, features_of(graph), made.edges(graph.indptr, graph.neighbours)).numpy()
        ways = served(made, graph)
        assert set(ways) == ({"fetched"} if arch == "gat" else {"fetched", "cached"})
        for answer in ways.values():
            for node in (0, 7, 59):
                np.testing.assert_allclose(answer(node), whole[node], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed", [None, 7])
def test_every_row_is_answered_once_in_batches_and_the_whole_graph_at_once(
    fixed: int | None, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubling:
        def run(self, feeds: Any) -> Any:
            assert fixed is None or len(feeds["x"]) == fixed
            return [2 * feeds["x"]]

    monkeypatch.setattr("edgekd.graph._serve._BATCH", 16)
    student = EveryRow(Doubling(), {"input": "x", "fixed_batch": fixed, "features": 5}, nodes)  # type: ignore[arg-type]
    np.testing.assert_array_equal(student(), 2 * nodes.rows(np.arange(60)))
    made = model("gcn", nodes)
    whole = WholeGraph(made, nodes)
    want = whole_graph_logits(made, features_of(nodes), made.edges(nodes.indptr, nodes.neighbours))
    np.testing.assert_array_equal(whole(), want)
    found = seconds_a_row({"teacher": whole, "student": student}, 2)
    assert set(found) == {"teacher", "student"}
    assert all(0 < s < 1 for s in found.values())


def test_groups_of_test_nodes_share_them_out_by_what_a_loop_says(hiding: Nodes) -> None:
    graph = Nodes(
        **{
            **hiding.__dict__,
            "labels": np.where(np.arange(60) % 7 == 0, -1, hiding.labels),
            "hidden": np.arange(60) == hiding.split("test")[0],
        }
    )
    test = graph.split("test")
    for groups in (degrees(graph, test), homophily(graph, test), seen(graph, test)):
        assert sum(int(members.sum()) for members in groups.values()) == len(test)
    for position, node in enumerate(test):
        others = graph.neighbours[graph.indptr[node] : graph.indptr[node + 1]]
        assert degrees(graph, test)["4 to 7"][position] == (4 <= len(others) <= 7)
        known = [o for o in others if graph.labels[o] >= 0]
        share = np.mean([graph.labels[o] == graph.labels[node] for o in known]) if known else -1
        alike = homophily(graph, test)
        assert alike["75% to 100%"][position] == (share >= 0.75)
        assert alike["0% to 25%"][position] == (0 <= share < 0.25)
        assert alike["no labelled neighbours"][position] == (not known)
    assert seen(graph, test)["unseen"].tolist() == [True] + [False] * (len(test) - 1)
