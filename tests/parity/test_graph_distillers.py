"""Distillers of graphs against loops over edges in float64, written from the papers; gradients, and properties that hold for any input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd import registry
from edgekd.graph._distiller import LinkBatch, NodeBatch
from edgekd.graph.krd import fitted_power
from tests.graphs import taught

NODES, CLASSES = 7, 3
OF_NODES = [n for n in registry.names("graph_distill") if not getattr(registry.load("graph_distill", n), "of_pairs", False)]
EDGES = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 6], [1, 2, 0, 0, 4, 3, 6, 5, 0]])


def softmax(row: Any, temperature: float) -> list[float]:
    e = [math.exp(v / temperature) for v in row]
    return [v / sum(e) for v in e]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits(seed: int) -> Tensor:
    return torch.randn(NODES, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(student: Tensor, teacher: Tensor, *, epoch: int = 0, decisions: Tensor | None = None, hidden: Tensor | None = None) -> NodeBatch:
    """All nodes at once, of a student whose hidden layer is made up and whose answers to other features are linear in them."""
    draw = torch.Generator().manual_seed(9)
    inside, x, weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(student.dtype) for shape in ((NODES, 3), (NODES, 4), (4, CLASSES))
    )
    inside = inside if hidden is None else hidden
    batch = NodeBatch(student, torch.arange(NODES), NODES, teacher, EDGES, EDGES[1], decisions, epoch, 0.5)
    batch.hidden, batch.embedding, batch.features = inside, inside.relu(), x
    batch.ask = lambda rows: rows @ weight
    return batch


def distiller(name: str, **settings: Any) -> Any:
    cls = registry.load("graph_distill", name)
    return cls(cls.Config(**settings))


def ready(name: str, teacher: Tensor, **settings: Any) -> Any:
    made = distiller(name, **settings)
    torch.manual_seed(0)
    projectors = made.setup(taught(teacher, student_width=3))
    if projectors is not None:
        projectors.to(teacher.dtype)
    return made


def total(terms: dict[str, Tensor]) -> float:
    return float(sum(t.detach() for t in terms.values()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_glnn_is_the_mean_divergence_of_each_node_from_its_teacher(temperature: float) -> None:
    z, t = logits(0), logits(1)
    want = sum(kl(softmax(t[i], temperature), softmax(z[i], temperature)) for i in range(NODES)) / NODES
    assert total(distiller("glnn", temperature=temperature).terms(whole(z, t))) == pytest.approx(want, rel=1e-12)
    assert total(distiller("glnn", temperature=temperature, label_weight=0.3).terms(whole(z, t))) == pytest.approx(0.7 * want, rel=1e-12)


def test_ffg2m_low_is_over_edges_and_loops_and_high_over_edges() -> None:
    z, t, tau, share = logits(0), logits(1), 1.3, 0.6
    pairs = [*zip(*EDGES.tolist(), strict=True), *((i, i) for i in range(NODES))]
    low = sum(kl(softmax(t[j], 1), softmax(z[i], 1)) for i, j in pairs) / len(pairs)
    ends = list(zip(*EDGES.tolist(), strict=True))
    high = sum(kl(softmax((t[i] - t[j]).abs(), tau), softmax((z[i] - z[j]).abs(), tau)) for i, j in ends) / len(ends)
    found = distiller("ffg2m", temperature=tau, label_weight=1 - share).terms(whole(z, t))
    assert float(found["low"]) == pytest.approx(share * low, rel=1e-12)
    assert float(found["high"]) == pytest.approx(share * high, rel=1e-12)


def test_krd_uses_every_edge_and_loop_during_its_warm_up() -> None:
    z, t, tau = logits(0), logits(1), 0.8
    pairs = [*zip(*EDGES.tolist(), strict=True), *((i, i) for i in range(NODES))]
    want = sum(kl(softmax(t[j], tau), softmax(z[i], tau)) for i, j in pairs) / len(pairs)
    assert total(ready("krd", t, temperature=tau).terms(whole(z, t, epoch=49))) == pytest.approx(want, rel=1e-12)


def test_krd_samples_an_edge_by_the_reliability_of_the_node_that_teaches() -> None:
    """Over many draws an edge is used as often as 1 - rho^a says; the least reliable node never teaches, loops always do."""
    z, t = logits(0), logits(1)
    made = ready("krd", t, warmup=0, power=2.0)
    p = 1 - made.state.rho**2
    assert float(p.min()) == 0
    counts = torch.zeros(EDGES.shape[1])
    rounds = 3000
    torch.manual_seed(0)
    for _ in range(rounds):
        counts += (torch.rand(EDGES.shape[1]) < p[EDGES[1]]).float()
    torch.manual_seed(0)
    losses = [total(made.terms(whole(z, t, epoch=60))) for _ in range(rounds)]
    spread = 5 * (0.25 / rounds) ** 0.5
    assert torch.allclose(counts.double() / rounds, p[EDGES[1]], atol=spread)
    divergences = torch.tensor([kl(softmax(t[j], 1), softmax(z[i], 1)) for i, j in zip(*EDGES.tolist(), strict=True)])
    loops = torch.tensor([kl(softmax(t[i], 1), softmax(z[i], 1)) for i in range(NODES)])
    torch.manual_seed(0)
    wanted = []
    for _ in range(rounds):
        kept = torch.rand(EDGES.shape[1]) < p[EDGES[1]]
        wanted.append(float((divergences[kept].sum() + loops.sum()) / (int(kept.sum()) + NODES)))
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)


def test_krds_reliability_is_the_change_of_entropy_over_its_maximum() -> None:
    t = logits(1)
    noisy = torch.linspace(0, 1, NODES, dtype=torch.float64)
    clean = [-sum(p * math.log(p) for p in softmax(row, 1)) for row in t]
    change = [abs(float(n) - c) for n, c in zip(noisy, clean, strict=True)]
    np.testing.assert_allclose(ready("krd", t).state.rho, np.array(change) / max(change), rtol=1e-12)


def test_krds_power_follows_the_fit_by_momentum_and_survives_a_checkpoint() -> None:
    z, t = logits(0), logits(1)
    made = ready("krd", t, warmup=0, momentum=0.9, bins=5)
    agree = (z.argmax(1) == t.argmax(1)).numpy()
    found = fitted_power(made.state.rho.numpy(), agree, 5, 1.0)
    made.terms(whole(z, t, epoch=1, decisions=z))
    assert float(made.state.power) == pytest.approx(0.9 * 1.0 + 0.1 * found)
    again = ready("krd", t, warmup=0)
    again.state.load_state_dict(made.state.state_dict())
    assert float(again.state.power) == float(made.state.power)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_fit_is_the_least_squares_one_of_the_papers_code(power: float) -> None:
    """Rates in 50 bins, min-max scaled, each taken to be at its left edge plus 0.05; the best a of 1 - x^a by trying them all."""
    rng = np.random.default_rng(0)
    rho = rng.random(50_000)
    agree = rng.random(len(rho)) < 1 - rho**power
    bins = np.minimum((rho * 50).astype(int), 49)
    rate = np.array([agree[bins == b].mean() for b in range(50)])
    rate = (rate - rate.min()) / (rate.max() - rate.min())
    tried = np.arange(0.05, 8, 0.001)
    x = np.arange(50) / 50 + 0.05
    best = tried[((1 - x[:, None] ** tried - rate[:, None]) ** 2).sum(0).argmin()]
    assert fitted_power(rho, agree, 50, 1.0) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("agree", [np.ones(40, bool), np.zeros(40, bool)])
def test_the_fit_keeps_the_power_where_nothing_can_be_fitted(agree: Any) -> None:
    assert fitted_power(np.full(40, 0.3), agree[:40], 1, 1.7) == 1.7


@pytest.mark.parametrize("name", OF_NODES)
def test_gradients(name: str) -> None:
    t = logits(1)
    made = ready(name, t, **({"tokens": 1.0} if name == "vqgraph" else {}))

    def loss(z: Tensor, hidden: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.stack(list(made.terms(whole(z, t, epoch=60, hidden=hidden)).values())).sum()

    hidden = torch.randn(NODES, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (logits(0).requires_grad_(), hidden.requires_grad_()))


@pytest.mark.parametrize("name", OF_NODES)
def test_terms_are_finite_and_not_negative_in_any_precision_and_vanish_with_their_weight(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        t = (100 * logits(1)).to(dtype)
        terms = ready(name, t).terms(whole((100 * logits(0)).to(dtype), t, epoch=60))
        assert all(bool(v.isfinite()) and float(v.detach()) >= 0 for v in terms.values())
    assert total(ready(name, logits(1), label_weight=1.0).terms(whole(logits(0), logits(1)))) == 0


def test_nosmogs_terms_are_the_divergence_the_same_for_pushed_features_and_the_difference_of_products() -> None:
    z, t = logits(0), logits(1)
    made = ready("nosmog", t, bound=0.3, adversarial=0.2, similarity=0.7, label_weight=0.25)
    batch = whole(z, t)
    torch.manual_seed(4)
    found = {n: float(v.detach()) for n, v in made.terms(batch).items()}
    plain = sum(kl(softmax(t[i], 1), softmax(z[i], 1)) for i in range(NODES)) / NODES
    assert found["kd"] == pytest.approx(0.75 * plain, rel=1e-12)
    layer, hidden = made.project[0], batch.hidden
    mine = [
        [max(0.0, float(layer.bias[o] + sum(layer.weight[o, i] * hidden[n, i] for i in range(3)))) for o in range(3)] for n in range(NODES)
    ]
    theirs = made.hidden.tolist()
    gaps = [
        (sum(a * b for a, b in zip(theirs[i], theirs[j], strict=True)) - sum(a * b for a, b in zip(mine[i], mine[j], strict=True))) ** 2
        for i in range(NODES)
        for j in range(NODES)
    ]
    assert found["similarity"] == pytest.approx(0.75 * 0.7 * sum(gaps) / NODES**2, rel=1e-12)
    # five signed steps of a quarter of the bound from the same random start, with the gradient by differences
    torch.manual_seed(4)
    x, delta = batch.features, (torch.rand(NODES, 4, dtype=torch.float64) * 2 - 1) * 0.3

    def mean(pushed: Tensor) -> float:
        said = batch.ask(pushed)
        return sum(kl(softmax(t[i], 1), softmax(said[i], 1)) for i in range(NODES)) / NODES

    start = mean(x + delta)
    for _ in range(5):
        slope = torch.zeros_like(delta)
        for i in range(NODES):
            for j in range(4):
                nudge = torch.zeros_like(delta)
                nudge[i, j] = 1e-6
                slope[i, j] = mean(x + delta + nudge) - mean(x + delta - nudge)
        delta = (delta + 0.3 / 4 * slope.sign()).clamp(-0.3, 0.3)
    assert found["adversarial"] == pytest.approx(0.75 * 0.2 * mean(x + delta), rel=1e-9)
    assert mean(x + delta) > start


def test_pushing_leaves_no_gradient_in_the_student() -> None:
    z, t = logits(0), logits(1)
    batch, weight = whole(z, t), torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True)
    batch.ask = lambda rows: rows @ weight
    made = ready("nosmog", t, similarity=0.0)
    found = made.terms(batch)
    assert weight.grad is None
    found["adversarial"].backward()
    assert weight.grad is not None


def test_vqgraphs_tokens_are_the_divergence_of_soft_assignments_times_the_square_of_the_temperature() -> None:
    z, t = logits(0), logits(1)
    made, batch = ready("vqgraph", t, tokens=0.5, token_temperature=3.0, label_weight=0.2), whole(z, t)
    layer = made.project
    want = 0.0
    for n in range(NODES):
        row = [float(layer.bias[o] + sum(layer.weight[o, i] * batch.embedding[n, i] for i in range(3))) for o in range(4)]
        near = [-math.dist(row, code) for code in made.codebook.tolist()]
        want += kl(softmax(taught(t).nearness[n], 3.0), softmax(near, 3.0)) / NODES  # type: ignore[index]
    assert float(made.terms(batch)["tokens"]) == pytest.approx(0.8 * 0.5 * 9 * want, rel=1e-9)
    assert "tokens" not in ready("vqgraph", t, tokens=0.0).terms(batch)


def test_llps_terms_are_the_divergence_over_a_context_and_the_margins_between_every_two_of_it() -> None:
    draw = torch.Generator().manual_seed(0)
    mine, theirs = (torch.rand(5, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    found = distiller("llp", distribution=0.3, rank=2.0, margin=0.15).terms(LinkBatch(mine, theirs))
    apart = sum(kl(softmax(theirs[i], 1), softmax(mine[i], 1)) for i in range(5)) / 5
    assert float(found["distribution"]) == pytest.approx(0.3 * apart, rel=1e-12)
    losses = []
    for s, t in zip(mine.tolist(), theirs.tolist(), strict=True):
        for i in range(6):
            for j in range(i + 1, 6):
                y = 1 if t[i] > t[j] + 0.15 else -1 if t[i] < t[j] - 0.15 else 0
                losses.append(max(0.0, -y * (s[i] - s[j]) + 0.15))
    assert float(found["rank"]) == pytest.approx(2.0 * sum(losses) / len(losses), rel=1e-12)
    whole = distiller("llp")
    assert torch.autograd.gradcheck(lambda s: sum(whole.terms(LinkBatch(s, theirs)).values()), (mine.clone().requires_grad_(),))
    assert float(whole.terms(LinkBatch(theirs, theirs))["distribution"]) == pytest.approx(0, abs=1e-12)


def test_a_batch_of_some_nodes_has_the_terms_of_its_own_edges() -> None:
    """Rows of a batch are its nodes, then the ends of their edges."""
    z, t = logits(0), logits(1)
    own, ends = [0, 3], [1, 2, 4]
    rows = torch.tensor([own.index(i) for i in EDGES[0].tolist() if i in own])
    others = torch.tensor([j for i, j in zip(*EDGES.tolist(), strict=True) if i in own])
    asked = [*own, *ends]
    places = torch.tensor([asked.index(j) for j in others.tolist()])
    batch = NodeBatch(z[asked], torch.tensor(asked), 2, t, torch.stack([rows, others]), places, None, 0, 0.0)
    pairs = [*zip(*EDGES.tolist(), strict=True), *((i, i) for i in range(NODES))]
    mine = [(i, j) for i, j in pairs if i in own]
    low = sum(kl(softmax(t[j], 1), softmax(z[i], 1)) for i, j in mine) / len(mine)
    high = [(i, j) for i, j in mine if i != j]
    want = sum(kl(softmax((t[i] - t[j]).abs(), 1.5), softmax((z[i] - z[j]).abs(), 1.5)) for i, j in high) / len(high)
    found = distiller("ffg2m").terms(batch)
    assert float(found["low"]) == pytest.approx(low, rel=1e-12)
    assert float(found["high"]) == pytest.approx(want, rel=1e-12)
