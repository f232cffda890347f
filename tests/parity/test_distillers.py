"""Distillers against golden values of the published references and float64 oracles written another way, with gradient checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.distill.kd import kd_loss
from edgekd.distill.ofa import ofa_loss
from edgekd.models.projectors import SepConv, ofa_branches
from edgekd.models.taps import Tap
from edgekd.train.distiller import Batch, Outputs, Side


def seq(*shape: int, a: float, b: float = 0.0, k: float = 1.0) -> Tensor:
    """The closed-form inputs that the golden values were computed from."""
    index = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (k * torch.sin(a * index + b)).reshape(shape)


S, T = seq(4, 10, a=0.7, k=2), seq(4, 10, a=0.31, b=0.5, k=3)
Y = torch.tensor([1, 3, 5, 7])
M = nn.functional.one_hot(Y, 10).double()


@pytest.mark.parametrize(("temperature", "golden"), [(4.0, 1.1564597669679508), (1.0, 0.8604167719844253)])
def test_kd_gives_the_references_value(temperature: float, golden: float) -> None:
    assert float(kd_loss(S, T, temperature)) == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize(
    ("gamma", "temperature", "golden"),
    [
        (1.0, 1.0, 2.7381902957231734),
        (1.0, 2.0, 2.444926957842468),
        (1.5, 1.0, 1.4450970443594893),
        (1.5, 2.0, 1.1311633317421033),
        (2.0, 1.0, 1.1004529828720222),
        (2.0, 2.0, 0.7974343830220694),
    ],
)
def test_ofa_gives_the_references_value(gamma: float, temperature: float, golden: float) -> None:
    assert float(ofa_loss(S, T, M, gamma, temperature)) == pytest.approx(golden, rel=1e-9)


def test_kd_equals_a_plain_numpy_oracle() -> None:
    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    s, t = softmax(S.numpy() / 3), softmax(T.numpy() / 3)
    oracle = 9 * np.mean(np.sum(t * (np.log(t) - np.log(s)), axis=1))
    assert float(kd_loss(S, T, 3.0)) == pytest.approx(oracle, rel=1e-12)


def test_ofa_with_gamma_one_is_kd_plus_the_teachers_entropy() -> None:
    p = T.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert float(ofa_loss(S, T, M, 1.0)) == pytest.approx(float(kd_loss(S, T, 1.0) + entropy), rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 1.3, 2.0])
def test_the_gradient_of_ofa_is_the_closed_form(gamma: float) -> None:
    s = S.clone().requires_grad_()
    ofa_loss(s, T, M, gamma, 2.0).backward()
    w = (T.div(2).softmax(1) + M) ** gamma - M
    closed = (w.sum(1, keepdim=True) * S.div(2).softmax(1) - w) / len(S) / 2
    assert torch.allclose(s.grad, closed, rtol=1e-10, atol=1e-13)  # type: ignore[arg-type]
    assert bool((w >= 0).all())


@pytest.mark.parametrize("loss", [lambda s: kd_loss(s, T, 4.0), lambda s: ofa_loss(s, T, M, 1.4, 2.0)], ids=["kd", "ofa"])
def test_gradients_pass_a_numeric_check(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (S.clone().requires_grad_(),), eps=1e-6, atol=1e-7)


def test_kd_is_zero_and_flat_where_the_student_is_the_teacher() -> None:
    s = T.clone().requires_grad_()
    value = kd_loss(s, T, 4.0)
    value.backward()
    assert abs(float(value.detach())) < 1e-12
    assert float(s.grad.abs().max()) < 1e-12  # type: ignore[union-attr]


def test_the_target_weight_of_ofa_grows_with_gamma() -> None:
    weights = [((T.softmax(1) + M) ** g - M)[0, 1] for g in (1.0, 1.2, 1.6, 2.0)]
    assert weights == sorted(weights)


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_stay_finite_where_the_references_log_of_a_softmax_does_not(scale: float) -> None:
    assert torch.isfinite(ofa_loss((S * scale).float(), (T * scale).float(), M.float(), 1.5))
    assert torch.isfinite(kd_loss((S * scale).float(), (T * scale).float(), 1.0))


@pytest.mark.parametrize("name", registry.names("distill"))
def test_every_distiller_gives_finite_terms_in_bf16(name: str) -> None:
    cls = registry.load("distill", name)
    distiller = cls(cls.Config())
    taps = tuple(Tap(f"layer{i + 1}", "NCHW", 4 * 2**i, (8 >> i, 8 >> i)) for i in range(4))
    side = Side(nn.Identity(), taps, 32, 10)
    projectors = distiller.setup(side, side)
    features = tuple(torch.randn(4, t.channels, *t.grid) for t in taps)
    with torch.autocast("cpu", torch.bfloat16):
        terms = distiller.terms(Batch(Outputs(S.float(), features), Outputs(T.float(), features), Y, torch.arange(4), 0.5))
    assert terms
    assert all(bool(t.isfinite()) for t in terms.values())
    sum(terms.values(), start=torch.zeros(())).backward() if projectors is not None else None
    assert all(p.grad is not None for p in projectors.parameters()) if projectors is not None else True


# ---------------------------------------------------------------------------------------------------------- OFA branches
def test_a_cnn_branch_has_the_papers_shape_and_size() -> None:
    taps = tuple(Tap(f"layer{i + 1}", "NCHW", c, (g, g)) for i, (c, g) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)]))
    branches = ofa_branches(taps, "cnn", (512, 192), 100, (1, 2, 3, 4))
    first = branches["0"]
    assert [m.__class__ for m in first[:3]] == [SepConv] * 3

    def sepconv(i: int, o: int) -> int:
        return 9 * i + i * i + 2 * i + 9 * i + i * o + 2 * o

    wanted = sepconv(64, 128) + sepconv(128, 256) + sepconv(256, 512) + 512 * 100 + 100
    assert sum(p.numel() for p in first.parameters()) == wanted
    x = torch.randn(2, 64, 56, 56)
    assert first[:3](x).shape == (2, 512, 7, 7)
    assert first(x).shape == (2, 100)
    last = branches["3"]
    assert sum(p.numel() for p in last.parameters()) == 512 * 512 + 512 + 512 * 100 + 100


def test_a_token_branch_merges_patches_and_keeps_the_class_token() -> None:
    taps = tuple(Tap(f"blocks.{i}", "NLC", 192, (14, 14), prefix=1) for i in (1, 3, 9, 11))
    branches = ofa_branches(taps, "vit", (192, 512), 10, (1, 4))
    branch = branches["0"]
    assert len(branch.mergers) == 1
    assert len(branch.blocks) == 3
    assert branch.mergers(torch.randn(2, 196, 192)).shape == (2, 49, 192)
    assert branch(torch.randn(2, 197, 192)).shape == (2, 10)
    assert len(branches["3"].blocks) == 1


def test_kd_asks_for_no_features_so_a_model_without_stages_can_learn() -> None:
    from torch import nn

    from edgekd.models.spec import ModelSpec
    from edgekd.stages.distill import side

    spec = ModelSpec(arch="x", num_classes=3, image_size=8, mean=(0, 0, 0), std=(1, 1, 1), timm="1")
    flat = side(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), spec, taps="taps" in registry.load("distill", "kd").needs)
    assert flat.taps == ()


def test_combined_methods_add_up_and_keep_their_own_weights() -> None:
    cls = registry.load("distill", "combined")
    combined = cls(cls.Config(methods=[{"kd": {"weight": 0.5}}, "ofa"]))
    assert (combined.needs, combined.config.label_weight) == ({"logits", "taps"}, 0.1)  # the label's weight is the first method's
    assert cls(cls.Config(methods=["kd"], label_weight=2.0)).config.label_weight == 2.0
    taps = tuple(Tap(f"layer{i + 1}", "NCHW", 4 * 2**i, (8 >> i, 8 >> i)) for i in range(4))
    side, features = Side(nn.Identity(), taps, 32, 10), tuple(torch.randn(4, t.channels, *t.grid) for t in taps)
    projectors = combined.setup(side, side)
    assert set(projectors) == {"ofa"}
    batch = Batch(Outputs(S.float(), features), Outputs(T.float(), features), Y, torch.arange(4), 0.5)
    terms = combined.terms(batch)
    assert set(terms) == {"kd", "ofa.logits", "ofa1", "ofa2", "ofa3", "ofa4"}
    kd = registry.load("distill", "kd")
    assert torch.equal(terms["kd"], kd(kd.Config(weight=0.5)).terms(batch)["kd"])
    assert torch.equal(terms["ofa.logits"], combined.parts["ofa"].terms(batch)["logits"])
