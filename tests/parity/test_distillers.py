"""Distillers against golden values of the published references and float64 oracles written another way, with gradient checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.distill.at import at_loss
from edgekd.distill.cakd import attention_loss
from edgekd.distill.crd import contrast
from edgekd.distill.cskd import dense_loss, fused, global_loss, local_share
from edgekd.distill.dist import pearson_distance
from edgekd.distill.dkd import dkd_terms
from edgekd.distill.fitnet import hint_loss, projector
from edgekd.distill.kd import kd_loss
from edgekd.distill.nd import nd_loss
from edgekd.distill.ofa import ofa_loss
from edgekd.distill.rkd import rkd_terms
from edgekd.distill.rsd import rsd_loss
from edgekd.distill.scalekd import frequency_loss, spatial_loss
from edgekd.distill.vkd import vkd_loss
from edgekd.errors import UsageError
from edgekd.models.attention import CrossAttentionProjector, GroupLinear
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
FS, FT = seq(6, 8, a=0.37, b=0.2), seq(6, 8, a=0.53, b=0.9)
F4S, F4T, FT3 = seq(2, 4, 6, 6, a=0.17), seq(2, 4, 6, 6, a=0.29, b=0.4), seq(2, 5, 3, 3, a=0.29, b=0.4)


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


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: kd_loss(s, T, 4.0),
        lambda s: ofa_loss(s, T, M, 1.4, 2.0),
        lambda s: sum(dkd_terms(s, T, Y, 4.0)),
        lambda s: pearson_distance((s / 4).softmax(1), (T / 4).softmax(1)),
        lambda s: pearson_distance((s / 4).softmax(1).T, (T / 4).softmax(1).T),
    ],
    ids=["kd", "ofa", "dkd", "dist inter", "dist intra"],
)
def test_gradients_pass_a_numeric_check(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (S.clone().requires_grad_(),), eps=1e-6, atol=1e-7)


def terms_of(name: str, student: Tensor, teacher: Tensor, progress: float = 1.0, **options: float) -> dict[str, Tensor]:
    cls = registry.load("distill", name)
    return dict(cls(cls.Config(**options)).terms(Batch(Outputs(student), Outputs(teacher), Y, torch.arange(len(Y)), progress)))


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"alpha": 1, "beta": 8}, 8.923488936671),
        ({"alpha": 1, "beta": 1}, 1.271846352522),
        ({"alpha": 1, "beta": 0}, 0.1787545547865),
        ({"alpha": 0, "beta": 1}, 1.093091797736),
        ({"alpha": 1, "beta": 0.5, "temperature": 1}, 0.541729665682),
    ],
)
def test_dkd_has_the_references_values(options: dict[str, float], golden: float) -> None:
    assert float(sum(terms_of("dkd", S, T, **options).values())) == pytest.approx(golden, rel=1e-9)


def test_kd_is_dkd_with_the_weight_that_the_teacher_gives_the_other_classes() -> None:
    per_image = [dkd_terms(S[i : i + 1], T[i : i + 1], Y[i : i + 1], 4.0) for i in range(len(Y))]
    rest = 1 - (T / 4).softmax(1)[torch.arange(len(Y)), Y]
    total = sum(target + share * others for (target, others), share in zip(per_image, rest, strict=True)) / len(Y)
    assert float(total) == pytest.approx(float(kd_loss(S, T, 4.0)), rel=1e-12)


def test_dkd_warms_up_and_refuses_two_classes() -> None:
    early, late = (sum(terms_of("dkd", S, T, progress).values()) for progress in (0.0415, 0.5))
    assert float(early) == pytest.approx(0.5 * float(late), rel=1e-9)
    cls = registry.load("distill", "dkd")
    side = Side(nn.Identity(), (), 8, 2)
    with pytest.raises(UsageError, match="ranks the classes"):
        cls(cls.Config()).setup(side, side)


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"beta": 1, "gamma": 1, "temperature": 1}, 1.649166711416),
        ({"beta": 2, "gamma": 2, "temperature": 4}, 51.50307036315),
        ({"beta": 1, "gamma": 1, "temperature": 2}, 6.479393733733),
    ],
)
def test_dist_has_the_references_values(options: dict[str, float], golden: float) -> None:
    assert float(sum(terms_of("dist", S, T, **options).values())) == pytest.approx(golden, rel=1e-9)


def test_dist_does_not_see_the_size_of_what_it_compares() -> None:
    shares = torch.rand(6, 10, dtype=torch.float64)
    assert float(pearson_distance(3 * shares + 1, shares)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", ["dkd", "dist"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    assert all(abs(float(v)) < 1e-3 for v in terms_of(name, T, T).values())  # the epsilon of dist's denominator


# ---------------------------------------------------------------------------------------------------------- features
def test_attention_transfer_has_the_references_values() -> None:
    assert float(at_loss(F4S, F4T)) == pytest.approx(0.009684838568087, rel=1e-9)
    assert float(at_loss(F4S, F4T, 4)) == pytest.approx(0.01525436622012, rel=1e-9)
    assert float(at_loss(F4S, FT3)) == pytest.approx(0.029106609633, rel=1e-9)
    scale = torch.rand(2, 1, 1, 1, dtype=torch.float64) + 0.5
    assert float(at_loss(F4S * scale, F4T)) == pytest.approx(float(at_loss(F4S, F4T)), rel=1e-9)  # maps have no size


def test_rkd_has_the_references_value_and_does_not_see_rotation_scale_or_place() -> None:
    distance, angle = rkd_terms(FS, FT)
    assert float(25 * distance + 50 * angle) == pytest.approx(15.15435324779, rel=1e-6)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    moved = 3 * FS @ turn + 2
    assert all(float(v) < 1e-12 for v in rkd_terms(moved, FS))


def test_nd_has_the_references_value() -> None:
    means = seq(10, 8, a=0.41, b=0.3)[torch.tensor([1, 3, 5, 7, 0, 2])]
    assert float(nd_loss(FS, FT, means)) == pytest.approx(1.036668901633, rel=1e-9)


def test_rsd_has_the_references_value_and_does_not_see_scale_or_place() -> None:
    assert float(rsd_loss(FS, FT, 0.01)) == pytest.approx(6.570289736513, rel=1e-9)
    assert float(rsd_loss(5 * FS + 1, FT, 0.01)) == pytest.approx(float(rsd_loss(FS, FT, 0.01)), rel=1e-4)  # the epsilon of the deviation


def test_crds_contrast_has_the_references_value() -> None:
    out = (seq(4, 17, a=0.61, b=0.2) * 0.5 + 0.6) / 1000
    assert float(contrast(out, 50_000)) == pytest.approx(16.58191552649, rel=1e-9)


def test_crd_remembers_each_image_by_its_position_and_sets_its_constants_once() -> None:
    cls = registry.load("distill", "crd")
    crd = cls(cls.Config(width=4, negatives=3))
    side = Side(nn.Identity(), (), 8, 10, embedding=8, positions=torch.tensor([2, 3, 5, 7, 11, 13]))
    parts = crd.setup(side, side)
    before = {n: b.clone() for n, b in parts.named_buffers()}
    features, constants, index = torch.randn(4, 8), [], torch.tensor([13, 3, 2, 5])
    for _ in range(2):
        crd.terms(Batch(Outputs(S, embedding=features), Outputs(T, embedding=features), Y, index, 0.5))
        constants.append([float(b) for n, b in parts.named_buffers() if n.endswith("scale")])
    assert constants[0] == constants[1]
    assert min(constants[0]) > 0
    changed = (parts.student_memory != before["student_memory"]).any(1)
    assert changed.tolist() == [True, True, True, False, False, True]
    assert torch.allclose(parts.student_memory[changed].norm(dim=1), torch.ones(4))


def test_fitnets_projectors_have_the_references_values() -> None:
    assert float(hint_loss(F4S, F4T)) == pytest.approx(1.028064796885, rel=1e-9)
    same = projector(Tap("s", "NCHW", 4, (6, 6)), Tap("t", "NCHW", 4, (6, 6))).double()
    half = projector(Tap("s", "NCHW", 4, (6, 6)), Tap("t", "NCHW", 5, (3, 3))).double()
    with torch.no_grad():
        same[0].weight.copy_(seq(4, 4, 1, 1, a=0.21, b=0.4, k=0.5))
        same[0].bias.copy_(seq(4, a=0.9, b=0.1, k=0.1))
        half[0].weight.copy_(seq(5, 4, 3, 3, a=0.21, b=0.4, k=0.3))
        half[0].bias.zero_()
    assert float(nn.functional.mse_loss(same(F4S).relu(), F4T).detach()) == pytest.approx(0.9808425147901, rel=1e-9)
    assert float(nn.functional.mse_loss(half(F4S).relu(), FT3).detach()) == pytest.approx(1.084339929231, rel=1e-9)


@pytest.mark.parametrize("mine", [3, 5, 6, 7, 12, 13, 56])
def test_a_hint_meets_the_teachers_map_whatever_the_sizes(mine: int) -> None:
    project = projector(Tap("s", "NCHW", 4, (mine, mine)), Tap("t", "NCHW", 5, (6, 6)))
    found = project(torch.randn(2, 4, mine, mine))
    side = min(mine, 6) if 2 * mine != 6 else 6
    assert found.shape == (2, 5, side, side)
    assert bool(hint_loss(found, torch.rand(2, 5, 6, 6)).isfinite())


def test_a_hint_is_rectified_where_the_teachers_features_are() -> None:
    below = -torch.ones(1, 1, 2, 2)
    assert float(hint_loss(below, torch.zeros(1, 1, 2, 2))) == 0
    assert float(hint_loss(below, below)) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda f: at_loss(f, F4T),
        lambda f: hint_loss(f, F4T),
        lambda f: sum(rkd_terms(f.flatten(1)[:, :8].reshape(2, 8).repeat(3, 1) + FS, FT)),
        lambda f: nd_loss(f.flatten(1)[:, :8], FT[:2], FS[:2]),
        lambda f: rsd_loss(f.flatten(1)[:, :48].reshape(12, 8)[:6] + FS, FT, 0.01),
        lambda f: vkd_loss(f.flatten(1)[:, :48].reshape(12, 8)[:6] + FS, FT),
        lambda f: dense_loss(f[:, :2, :2, :2].repeat(1, 5, 1, 1) + DT, fused(DT, 0.5), soft=True, temperature=2.0),
        lambda f: dense_loss(f[:, :2, :2, :2].repeat(1, 5, 1, 1) + DT, fused(DT, 0.5), soft=False),
        lambda f: contrast(
            (nn.functional.normalize(f.flatten(1)[:, :8], dim=1) @ nn.functional.normalize(FT, dim=1).T / 0.07).exp() / 40, 50
        ),
        lambda f: spatial_loss(f.flatten(2).transpose(1, 2), TOK),
        lambda f: frequency_loss(f.flatten(2).transpose(1, 2), TOK),
        lambda f: attention_loss(
            [f.flatten(2), f.flatten(2), f.flatten(2)], [F4T.flatten(2)] * 3, [f.flatten(2), F4T.flatten(2), f.flatten(2)]
        ),
        lambda f: global_loss(f[:, :, 0, :1].reshape(2, 4).repeat(1, 3)[:, :10] + D, DT.mean((2, 3)), soft=True),
    ],
    ids=[
        "at",
        "fitnet",
        "rkd",
        "nd",
        "rsd",
        "vkd",
        "cskd dense soft",
        "cskd dense hard",
        "crd",
        "scalekd spatial",
        "scalekd frequency",
        "cakd",
        "cskd global soft",
    ],
)
def test_gradients_of_features_pass_a_numeric_check(loss: object) -> None:
    assert torch.autograd.gradcheck(loss, (F4S.clone().requires_grad_(),), eps=1e-6, atol=1e-6)


def test_vkd_compares_with_the_standardised_teacher_and_a_turn_keeps_lengths() -> None:
    its = (FT - FT.mean(1, keepdim=True)) / (FT.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    apart = (FS - its).abs()
    assert float(vkd_loss(FS, FT)) == pytest.approx(float(torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean()), rel=1e-12)
    assert float(vkd_loss(FS, 3 * FT + 2)) == pytest.approx(float(vkd_loss(FS, FT)), rel=1e-4)  # the epsilon of the norm
    cls = registry.load("distill", "vkd")
    wide, narrow = Tap("a", "NCHW", 8, (2, 2)), Tap("b", "NLC", 5, (2, 2), 1)
    for mine, its_tap in ((narrow, wide), (wide, narrow)):
        matrix = cls(cls.Config()).setup(Side(nn.Identity(), (mine,), 0, 3), Side(nn.Identity(), (its_tap,), 0, 3)).weight.detach()
        small = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
        torch.testing.assert_close(small, torch.eye(5), rtol=0, atol=1e-5)


DS, DT, D = (
    seq(2, 16, 10, a=0.23, b=0.1, k=2).transpose(1, 2).reshape(2, 10, 4, 4),
    seq(2, 10, 2, 2, a=0.31, b=0.5, k=3),
    seq(2, 10, a=0.47, b=0.2, k=2),
)


@pytest.mark.parametrize(("progress", "golden"), [(0.0, 2.301165321890269), (0.5, 2.3119305713624096), (1.0, 2.308248883146443)])
def test_cskds_dense_loss_has_the_sources_value(progress: float, golden: float) -> None:
    pooled = nn.functional.adaptive_avg_pool2d(DS, 2)
    assert float(dense_loss(pooled, fused(DT, local_share(progress, "linear")), soft=False)) == pytest.approx(golden, rel=1e-9)


def test_cskds_soft_and_global_losses_have_the_sources_values() -> None:
    pooled = nn.functional.adaptive_avg_pool2d(DS, 2)
    soft = dense_loss(pooled, fused(DT, local_share(0.5, "linear")), soft=True)
    assert 4 * float(soft) == pytest.approx(3.085185329768325, rel=1e-9)  # the source sums over the four positions
    other = dense_loss(pooled, fused(DT, local_share(0.3, "cos")), soft=True, temperature=2.0)
    assert 4 * float(other) == pytest.approx(6.231307795064572, rel=1e-9)
    whole, labels = DT.mean((2, 3)), torch.tensor([1, 3])
    assert float(global_loss(D, whole, soft=True)) == pytest.approx(0.14205510230783935, rel=1e-9)
    assert float(global_loss(D, whole, soft=False)) == pytest.approx(2.2665816180078737, rel=1e-9)
    dense = dense_loss(pooled, fused(DT, 0.5), soft=False)
    total = 0.5 * nn.functional.cross_entropy(S[:2], labels) + 0.5 * global_loss(D, whole, soft=False) + dense
    assert float(total) == pytest.approx(4.528526755490605, rel=1e-9)


def test_cskd_refuses_classifiers_that_do_not_read_the_last_features() -> None:
    cls, tap = registry.load("distill", "cskd"), Tap("a", "NCHW", 8, (2, 2))
    fits, other = Side(nn.Identity(), (tap,), 8, 10, "fc", 8), Side(nn.Identity(), (tap,), 8, 10, "fc", 16)
    for student, teacher, name in ((other, fits, "student"), (fits, other, "teacher")):
        with pytest.raises(UsageError, match=f"the classifier of the {name} reads 16 values and its last features have 8"):
            cls(cls.Config()).setup(student, teacher)


TOK, MAP = seq(2, 36, 4, a=0.23, b=0.1), seq(2, 4, 6, 6, a=0.29, b=0.4)


def test_scalekds_two_views_have_the_references_values() -> None:
    target = MAP.flatten(2).transpose(1, 2)
    assert 0.08 * float(spatial_loss(TOK, target)) == pytest.approx(5.68746274277, rel=1e-9)
    assert 0.06 * float(frequency_loss(TOK, target)) == pytest.approx(4.27207084883, rel=1e-9)
    assert float(spatial_loss(target, target)) == float(frequency_loss(target, target)) == 0
    assert float(frequency_loss(TOK + 3, target)) == pytest.approx(float(frequency_loss(TOK, target)), rel=1e-9)  # it does not see a mean


def test_scalekds_projector_is_a_sharpened_attention_of_torchs_own() -> None:
    torch.manual_seed(0)
    ours = CrossAttentionProjector(6, (4, 4), 8, 9, 2, 5.0, own_queries=True).double().eval()
    plain = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True).double()
    with torch.no_grad():
        for name, layer in (("q", ours.q), ("k", ours.k), ("v", ours.v)):
            getattr(plain, f"{name}_proj_weight").copy_(layer.weight)
        plain.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        plain.out_proj.weight.copy_(ours.out.weight)
        plain.out_proj.bias.copy_(ours.out.bias)
        plain.q_proj_weight.mul_(5)  # torch's softmax is not sharpened, so its queries are
        plain.in_proj_bias[:8].mul_(5)
        features = seq(2, 6, 4, 4, a=0.3)
        seen = (ours.map(features) + ours.places).flatten(2).transpose(1, 2)
        asked = ours.before(ours.queries.expand(2, -1, -1))
        attended = nn.functional.layer_norm(plain(asked, seen, seen)[0], (8,), ours.norm.weight, ours.norm.bias)
        torch.testing.assert_close(ours(features), attended + ours.ffn(attended), rtol=0, atol=1e-10)
        assert ours(features, seq(2, 9, 8, a=0.2)).shape == (2, 9, 8)  # its own queries win


def test_cakds_attention_has_the_sources_values_plain_and_crossed() -> None:
    student = [seq(2, 9, 8, a=a, b=b) for a, b in ((0.17, 0), (0.23, 0.1), (0.29, 0.4))]
    teacher = [seq(2, 9, 8, a=a, b=b) for a, b in ((0.31, 0.5), (0.37, 0.2), (0.41, 0.3))]
    gram = [v @ v.transpose(-1, -2) / 8**0.5 for v in (student[2], teacher[2])]
    grams = float(nn.functional.mse_loss(*gram))
    assert grams == pytest.approx(2.633020401259387, rel=1e-9)
    assert float(attention_loss(student, teacher, student)) == pytest.approx(2.875037831984477, rel=1e-9)
    even = (torch.arange(2 * 9 * 8) % 2 == 0).view(2, 9, 8)
    crossed = [torch.where(even, t, s) for s, t in zip(student, teacher, strict=True)]
    assert float(attention_loss(student, teacher, crossed)) == pytest.approx(2.762960435047358, rel=1e-9)
    assert float(attention_loss(teacher, teacher, teacher)) == 0


def test_cakds_groups_share_a_layer_by_neighbourhood() -> None:
    layer = GroupLinear(4, (6, 6), 8, 0.0).double()
    weights, biases = seq(4, 8, 4, a=0.19, b=0.3, k=0.5), seq(4, 8, a=0.27, b=0.6, k=0.1)
    with torch.no_grad():
        for part, w, b in zip(layer.layers, weights, biases, strict=True):
            part.weight.copy_(w)
            part.bias.copy_(b)
    target = seq(2, 36, 8, a=0.13, b=0.2)
    assert float(nn.functional.mse_loss(layer(F4S), target).detach()) == pytest.approx(1.4751423941834392, rel=1e-9)
    assert sorted(len(m) for m in GroupLinear(4, (14, 14), 8, 0.0).members) == [4] + [8] * 6 + [16] * 9


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
    assert all(torch.isfinite(v) for v in dkd_terms((S * scale).float(), (T * scale).float(), Y, 4.0))
    assert torch.isfinite(ofa_loss((S * scale).float(), (T * scale).float(), M.float(), 1.5))
    assert torch.isfinite(kd_loss((S * scale).float(), (T * scale).float(), 1.0))


# ---------------------------------------------------------------------------------------------------------- OFA branches
def test_a_cnn_branch_has_the_papers_shape_and_size() -> None:
    taps = tuple(Tap(f"layer{i + 1}", "NCHW", c, (g, g)) for i, (c, g) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)]))
    branches = ofa_branches(taps, (512, 192), 100, (1, 2, 3, 4))
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
    branches = ofa_branches(taps, (192, 512), 10, (1, 4))
    branch = branches["0"]
    assert len(branch.mergers) == 1
    assert len(branch.blocks) == 3
    assert branch.mergers(torch.randn(2, 196, 192)).shape == (2, 49, 192)
    assert branch(torch.randn(2, 197, 192)).shape == (2, 10)
    assert len(branches["3"].blocks) == 1


def test_kd_asks_for_no_features_so_a_model_without_stages_can_learn() -> None:
    from torch import nn

    from edgekd.models.spec import ModelSpec
    from edgekd.train.pair import side

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
