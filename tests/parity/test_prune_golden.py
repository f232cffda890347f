"""Criteria and kept widths against values computed independently in numpy float64 (formulas: Torch-Pruning and the cited papers)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import InputRefused, UsageError
from edgekd.prune._cut import choose_width, select
from edgekd.prune._graph import Graph
from edgekd.prune._group import Group, Member
from edgekd.prune._score import combine
from edgekd.prune.bn_scale import BnScale
from edgekd.prune.l1 import L1
from edgekd.prune.l2 import L2
from edgekd.prune.random import Random
from edgekd.prune.taylor import Taylor

TOLERANCE = 1e-9  # relative; both sides are float64 and only the order of summation differs


def seq(*shape: int, a: float, b: float, k: float = 1.0) -> Tensor:
    """k * sin(a i + b) over the row-major index i."""
    size = torch.Size(shape).numel()
    return (k * torch.sin(a * torch.arange(size, dtype=torch.float64) + b)).reshape(shape)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def group() -> Group:
    """conv A out -> BN -> conv B in, 4 channels, with gradients."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).double()
    found = Graph(net, torch.zeros(1, 3, 4, 4, dtype=torch.float64)).group("0")
    assert found is not None
    first, norm, second = (net[i].weight for i in range(3))
    first.data, first.grad = seq(4, 3, 2, 2, a=0.7, b=0.1), seq(4, 3, 2, 2, a=0.45, b=0.3, k=0.1)
    norm.data, norm.grad = doubles(0.9, 0.2, 1.4, 0.5), doubles(0.03, -0.02, 0.01, 0.05)
    second.data, second.grad = seq(5, 4, 1, 1, a=0.53, b=0.4), seq(5, 4, 1, 1, a=0.81, b=0.2, k=0.1)
    return found


def convolutions_only(group: Group) -> Group:
    members = tuple(member for member in group.members if member.role != "norm")
    return Group(group.name, group.width, members)


def check(found: Tensor | None, expected: list[float]) -> None:
    assert found is not None
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, doubles(*expected), rtol=TOLERANCE, atol=1e-12)


L1_GOLDEN = {
    "none": [3.807032586889843, 3.3608151021186945, 4.334728864726935, 3.911602674459821],
    "mean": [0.9879300170394019, 0.872135986578166, 1.1248679026121453, 1.0150660937702862],
}
L2_GOLDEN = {
    ("mean", "none"): [2.9350780130693743, 2.5360313344282885, 3.732376616649715, 3.1356591878137174],
    ("mean", "mean"): [0.9514688341608152, 0.8221092476654204, 1.2099303705999498, 1.016491547573815],
    ("sum", "none"): [8.805234039208123, 7.608094003284865, 11.197129849949146, 9.406977563441153],
    ("max", "none"): [6.030512486012187, 5.397857546949548, 6.5242757833712, 6.119097198455589],
    ("prod", "none"): [9.597105065049139, 0.4685850893797856, 34.690839857173366, 4.6472713076566015],
    ("first", "none"): [6.030512486012187, 5.397857546949548, 6.5242757833712, 6.119097198455589],
    ("mean", "sum"): [0.2378672085402038, 0.2055273119163551, 0.30248259264998745, 0.25412288689345375],
    ("mean", "max"): [0.7863831318566082, 0.6794682302732623, 1.0, 0.8401240040530454],
    ("mean", "standard"): [0.3335547698776148, 0.0, 0.9999999916412092, 0.5012163773152929],
    ("mean", "gaussian"): [-0.30031767712811686, -1.1008129848090096, 1.2990786470313362, 0.10205201490579198],
}
TAYLOR_GOLDEN = {
    "with the scale": ([0.933307815088083, 0.9361823352490405, 1.1760006217475998, 0.954509227915277], False),
    "convolutions only": ([0.9178680663660914, 0.9541059619258666, 1.1855246337588063, 0.9425013379492355], False),
    "convolutions only, signed": ([0.5328749468574309, 1.1006833064468857, 1.2381835457696917, 1.1282582009259916], True),
}
WIDTHS = [  # (width, ratio removed, quantum, kept)
    *[(16, 0.3, 8, 8), (16, 0.3, 16, 16), (16, 0.3, 32, 16), (16, 0.5, 8, 8), (16, 0.5, 16, 16), (16, 0.5, 32, 16)],
    *[(24, 0.3, 8, 16), (24, 0.3, 16, 16), (24, 0.3, 32, 24), (24, 0.5, 8, 16), (24, 0.5, 16, 16), (24, 0.5, 32, 24)],
    *[(40, 0.3, 8, 32), (40, 0.3, 16, 32), (40, 0.3, 32, 32), (40, 0.5, 8, 24), (40, 0.5, 16, 16), (40, 0.5, 32, 32)],
    *[(64, 0.3, 8, 48), (64, 0.3, 16, 48), (64, 0.3, 32, 32), (64, 0.5, 8, 32), (64, 0.5, 16, 32), (64, 0.5, 32, 32)],
    *[(96, 0.3, 8, 64), (96, 0.3, 16, 64), (96, 0.3, 32, 64), (96, 0.5, 8, 48), (96, 0.5, 16, 48), (96, 0.5, 32, 64)],
]


def test_the_group_is_the_convolution_its_norm_and_the_reader(group: Group) -> None:
    assert [(member.name, member.role) for member in group.members] == [("0", "out"), ("1", "norm"), ("2", "in")]


@pytest.mark.parametrize("normalize", L1_GOLDEN)
def test_l1_matches_the_golden_values(group: Group, normalize: str) -> None:
    check(L1(L1.Config(normalize=normalize)).score(group), L1_GOLDEN[normalize])


@pytest.mark.parametrize(("aggregate", "normalize"), L2_GOLDEN)
def test_l2_matches_the_golden_values_for_every_aggregate_and_scale(group: Group, aggregate: str, normalize: str) -> None:
    check(L2(L2.Config(aggregate=aggregate, normalize=normalize)).score(group), L2_GOLDEN[aggregate, normalize])


def test_bn_scale_matches_the_golden_values(group: Group) -> None:
    check(BnScale(BnScale.Config()).score(group), [1.2, 0.26666666666666666, 1.8666666666666665, 0.6666666666666666])


@pytest.mark.parametrize("case", TAYLOR_GOLDEN)
def test_taylor_matches_the_golden_values(group: Group, case: str) -> None:
    expected, signed = TAYLOR_GOLDEN[case]
    scored = group if case == "with the scale" else convolutions_only(group)
    check(Taylor(Taylor.Config(signed=signed)).score(scored), expected)


def test_taylor_without_gradients_says_what_is_missing(group: Group) -> None:
    group.members[1].owner.weight.grad = None
    with pytest.raises(UsageError, match="no gradient"):
        Taylor(Taylor.Config()).score(group)


@pytest.mark.parametrize("criterion", [L1, L2, BnScale, Taylor])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_group(group: Group, criterion: type, bad: float) -> None:
    group.members[1].owner.weight.data[2] = bad
    with pytest.raises(InputRefused, match=r"^0: "):
        criterion(criterion.Config()).score(group)


def test_a_group_of_zeros_gets_equal_scores() -> None:
    check(combine([torch.zeros(3)], L1.Config(), "g"), [1.0, 1.0, 1.0])


def test_a_group_without_batchnorm_has_no_bn_scale(group: Group) -> None:
    assert BnScale(BnScale.Config()).score(convolutions_only(group)) is None


def test_random_depends_on_seed_and_name_only(group: Group) -> None:
    torch.manual_seed(1)
    first = Random(Random.Config(seed=3, normalize="none")).score(group)
    torch.manual_seed(2)
    assert torch.equal(first, Random(Random.Config(seed=3, normalize="none")).score(group))
    assert not torch.equal(first, Random(Random.Config(seed=4, normalize="none")).score(group))
    assert not torch.equal(first, Random(Random.Config(seed=3, normalize="none")).score(Group("other", 4, ())))
    assert ((first >= 0) & (first < 1)).all()


def test_a_grouped_convolution_reads_input_i_through_column_i_modulo_its_part() -> None:
    conv = nn.Conv2d(6, 4, 1, groups=2, bias=False)
    conv.weight.data = torch.arange(12.0).reshape(4, 3, 1, 1)
    member = Member("c", "in", torch.arange(6)[:, None], conv)
    assert member.slices().tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]


@pytest.mark.parametrize(("width", "ratio", "quantum", "kept"), WIDTHS)
def test_kept_width_is_the_nearest_multiple_of_the_quantum(width: int, ratio: float, quantum: int, kept: int) -> None:
    assert choose_width(width, 1 - ratio, quantum) == kept


def test_the_best_units_are_kept_and_the_lower_index_wins_a_tie() -> None:
    group = Group("g", 6, ())
    assert select(torch.tensor([1.0, 5.0, 2.0, 2.0, 2.0, 0.0]), group, 3) == [1, 2, 3]


def test_every_block_of_a_grouped_width_keeps_the_same_units() -> None:
    group = Group("g", 6, (), blocks=2)
    assert select(torch.tensor([1.0, 2.0, 3.0, 9.0, 5.0, 6.0]), group, 4) == [0, 2, 3, 5]


def test_columns_that_are_pruned_and_columns_that_are_zeroed_give_the_golden_output() -> None:
    first, second, image = seq(4, 3, a=0.7, b=0.1), seq(2, 4, a=0.53, b=0.4), seq(3, a=0.9, b=0.2)
    hidden = torch.relu(first @ image + seq(4, a=0.5, b=0.0))
    check(second @ hidden, [3.326374159406123, -1.171199666496304])
    check(second[:, [0, 2]] @ hidden[[0, 2]], [0.6098939585726991, 0.9120267497696752])
