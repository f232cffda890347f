"""Structured pruning: cutting internal units equals zeroing what reads them; widths, targets and recalibration keep their promises."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import run

import pytest
import timm
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.errors import DataRefused, EdgekdError, StructureRefused, TrainingDiverged, UsageError
from edgekd.prune._calibrate import collect_gradients, recalibrate_bn
from edgekd.prune._count import count_macs, count_params
from edgekd.prune._cut import choose_width, prune_model, score_model, select
from edgekd.prune._group import Group
from edgekd.prune._groups import find_groups
from edgekd.prune._target import Limits, find_ratio
from edgekd.prune._tensors import cut
from edgekd.prune.bn_scale import BnScale
from edgekd.prune.l1 import L1
from edgekd.prune.random import Random
from edgekd.prune.taylor import Taylor

CNNS = ("resnet18", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto")
SMALL = {  # architecture -> arguments and image size that keep the test quick
    **{arch: ({}, 32) for arch in CNNS},
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 3}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 2, "depths": (2, 1, 1, 1)}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "regnety_002": ({}, 32),
    "densenet121": ({}, 32),
    "ghostnet_100": ({}, 32),
    "repvit_m0_9": ({}, 32),
    "mobilenetv4_conv_small": ({}, 32),
}
NAMED = tuple(SMALL)[:7]
EQUIVALENCE = 5e-6  # relative, float32: pruning only leaves out terms that are zero, in another order of summation
WRONG_TIE = 1e-3  # relative; one swapped pair of indices per width changes the output by far more than rounding


def fresh(arch: str) -> tuple[nn.Module, Tensor]:
    """A model whose every weight matters: default initialisation (zeros, ones, equal statistics) hides wrong ties."""
    torch.manual_seed(0)
    args, size = SMALL[arch]
    model, images = timm.create_model(arch, num_classes=5, **args), torch.randn(4, 3, size, size)
    for name, parameter in model.named_parameters():
        if "gamma" in name or (parameter.dim() == 1 and "weight" in name):
            nn.init.uniform_(parameter, 0.5, 1.0)
        elif parameter.dim() == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        model.train()(images)  # statistics of one batch
    return model.eval(), images


def output(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def zero_readers(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """The oracle: the uncut model in which the weights that read a removed unit are zero."""
    zeroed = copy.deepcopy(model)
    for group in groups:
        gone = sorted(set(range(group.width)) - set(kept[group.name]))
        for member in group.members:
            if member.role == "in":
                layer = zeroed.get_submodule(member.name)
                rows = len(layer.weight) // getattr(layer, "groups", 1)
                for place in member.positions[gone].flatten().tolist():
                    part, column = divmod(place, layer.weight.shape[1])
                    layer.weight.data[part * rows : (part + 1) * rows, column] = 0
    return zeroed


def halves(groups: Sequence[Group]) -> dict[str, list[int]]:
    random = Random(Random.Config())
    return {group.name: select(random.score(group), group, choose_width(group.width, 0.5, group.blocks)) for group in groups}


def equivalence(arch: str, *, attack: bool = False) -> float:
    model, images = fresh(arch)
    groups, _ = find_groups(model, images, "internal")
    kept = halves(groups)
    zeroed = zero_readers(model, groups, kept)
    cut(model, [swap_two(group, kept[group.name]) for group in groups] if attack else groups, kept)
    assert count_params(model) < count_params(zeroed)
    return relative(output(model, images), output(zeroed, images))


def swap_two(group: Group, kept: Sequence[int]) -> Group:
    """The wrong tie: one reader takes a kept and a removed unit for each other."""
    keep, gone = kept[0], next(unit for unit in range(group.width) if unit not in kept)
    reader = max(index for index, member in enumerate(group.members) if member.role == "in")
    order = list(range(group.width))
    order[keep], order[gone] = gone, keep
    members = list(group.members)
    members[reader] = replace(members[reader], positions=members[reader].positions[order])
    return replace(group, members=tuple(members))


# ---------------------------------------------------------------------------------------------------- zero equivalence
@pytest.mark.parametrize("arch", NAMED)
def test_cutting_internal_units_equals_zeroing_the_weights_that_read_them(arch: str) -> None:
    assert equivalence(arch) <= EQUIVALENCE


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small_100", "convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_wrong_tie_of_two_units_is_caught_by_zero_equivalence(arch: str) -> None:
    assert equivalence(arch, attack=True) > WRONG_TIE


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(SMALL) - set(NAMED)))
def test_cutting_internal_units_of_more_families_equals_zeroing_their_readers(arch: str) -> None:
    assert equivalence(arch) <= EQUIVALENCE


class _Grouped(nn.Module):
    """A grouped convolution, a concatenation and a depthwise convolution, where positions are easily confused."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 8, 1)
        self.depth, self.four, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(20, 6, 1), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = self.two(self.one(images).relu()).relu()
        second = self.depth(self.three(first).relu()).relu()
        return self.head(self.four(torch.cat([second, first[..., 1:-1, 1:-1]], 1)).relu().mean((2, 3)))


def test_concatenated_grouped_and_depthwise_widths_are_zero_equivalent_when_cut_together() -> None:
    torch.manual_seed(0)
    model, images = _Grouped().eval(), torch.randn(2, 3, 12, 12)
    groups, scope = find_groups(model, images)
    assert (scope, {group.name: group.blocks for group in groups}) == ("all", {"one": 3, "two": 3, "three": 1, "four": 1})
    kept = halves(groups)
    zeroed = zero_readers(model, groups, kept)
    cut(model, groups, kept)
    assert (model.two.weight.shape, model.depth.groups, model.four.in_channels) == ((6, 2, 3, 3), 4, 10)
    assert relative(output(model, images), output(zeroed, images)) <= EQUIVALENCE


# ---------------------------------------------------------------------------------------------------- whole models
@pytest.mark.parametrize("arch", NAMED)
def test_every_named_model_prunes_to_widths_of_the_quantum_and_keeps_its_classes(arch: str) -> None:
    model, images = fresh(arch)
    before = count_macs(model, images), count_params(model)
    report = prune_model(model, images, L1(L1.Config()), keep=0.5, quantum=8)
    assert report.scope == ("all" if arch in CNNS else "internal")
    assert output(model, images).shape == (4, 5)
    assert model.get_classifier().out_features == 5
    assert all(after % 8 == 0 or after == width for width, after in report.widths.values())
    assert (report.macs, report.params) == ((before[0], count_macs(model, images)), (before[1], count_params(model)))
    assert report.params[1] < before[1]
    assert report.macs[1] < before[0] * (0.4 if arch in CNNS else 0.85)
    assert model.get_classifier().in_features == model.head_hidden_size


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small_100"])
def test_a_pruned_convolutional_net_runs_at_other_image_and_batch_sizes(arch: str) -> None:
    model, images = fresh(arch)
    prune_model(model, images, Random(Random.Config()), keep=0.4, quantum=4)
    assert output(model, torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert output(model, torch.randn(3, 3, 48, 80)).shape == (3, 5)


def test_widths_can_be_given_by_name_and_the_others_stay_whole() -> None:
    model, images = fresh("resnet18")
    report = prune_model(model, images, L1(L1.Config()), keep={"layer1.0.conv1": 24}, scope="internal")
    assert report.widths.pop("layer1.0.conv1") == [64, 24]
    assert all(before == after for before, after in report.widths.values())
    assert model.layer1[0].conv2.weight.shape == (64, 24, 3, 3)


def test_scores_taken_once_cut_a_copy_the_same_way_as_the_criterion() -> None:
    model, images = fresh("mobilenetv3_small_100")
    scores, other = score_model(model, images, L1(L1.Config())), copy.deepcopy(model)
    assert prune_model(model, images, L1(L1.Config()), keep=0.5) == prune_model(other, images, scores, keep=0.5)
    assert torch.equal(output(model, images), output(other, images))


def test_scores_of_another_model_are_refused() -> None:
    model, images = fresh("resnet18")
    with pytest.raises(UsageError, match="another model"):
        prune_model(model, images, {"conv1": torch.zeros(3)}, keep=0.5)
    with pytest.raises(UsageError, match="another model"):
        prune_model(model, images, {"blocks.0": torch.zeros(3)}, keep=0.5)


def test_the_units_with_the_largest_weights_survive() -> None:
    model, images = fresh("resnet18")
    model.layer1[0].conv1.weight.data[5::8] *= 100
    expected = model.layer1[0].conv1.weight.data[5::8].clone()
    prune_model(model, images, L1(L1.Config()), keep={"layer1.0.conv1": 8}, scope="internal")
    assert torch.equal(model.layer1[0].conv1.weight, expected)


def test_a_criterion_that_cannot_score_a_group_leaves_it_whole_and_says_so() -> None:
    model, images = fresh("mobilenetv3_small_100")
    report = prune_model(model, images, BnScale(BnScale.Config()), keep=0.5, quantum=8)
    assert report.unscored
    assert all(report.widths[name][0] == report.widths[name][1] for name in report.unscored)
    assert any(before > after for before, after in report.widths.values())


def test_pruning_leaves_modes_and_frozen_weights_as_they_were() -> None:
    model, images = fresh("resnet18")
    model.train().bn1.eval()
    model.conv1.requires_grad_(False)
    prune_model(model, images, L1(L1.Config()), keep=0.5)
    assert model.training
    assert not model.bn1.training
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad


@pytest.mark.parametrize(
    ("arch", "options", "error", "words"),
    [
        ("vit_tiny_patch16_224", {"keep": 0.5, "scope": "all"}, UsageError, "mixes tokens"),
        ("vit_tiny_patch16_224", {"keep": 0.5, "criterion": "bn_scale"}, UsageError, "nothing to score"),
        ("resnet18", {"keep": 0.0}, UsageError, "cannot keep"),
        ("resnet18", {"keep": 1.5}, UsageError, "cannot keep"),
        ("resnet18", {"keep": 0.5, "quantum": 0}, UsageError, "cannot keep"),
        ("resnet18", {"keep": {"layer1.0.conv9": 8}}, UsageError, "did you mean"),
        ("resnet18", {"keep": {"layer1.0.conv1": 65}}, UsageError, "cannot become"),
        ("resnet18", {"keep": {"fc": 3}}, UsageError, "no width named"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(arch: str, options: dict[str, object], error: type, words: str) -> None:
    model, images = fresh(arch)
    before = count_params(model)
    criterion = registry.load("criterion", str(options.pop("criterion", "l1")))
    with pytest.raises(error, match=words):
        prune_model(model, images, criterion(criterion.Config()), **options)
    assert count_params(model) == before


def test_a_model_without_prunable_widths_is_refused() -> None:
    with pytest.raises(StructureRefused, match="no width"):
        find_groups(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.zeros(1, 3, 8, 8))


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(StructureRefused, match="cannot be traced"):
        find_groups(nn.Linear(3, 4), torch.zeros(1, 7))


def test_criteria_and_their_settings_are_listed_without_torch() -> None:
    code = (
        "import sys; from edgekd import registry\n"
        "for name in registry.names('criterion'): registry.load('criterion', name).Config()\n"
        "assert len(registry.names('criterion')) >= 4, registry.names('criterion')\n"
        "assert 'torch' not in sys.modules"
    )
    done = run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- data
def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def test_gradients_of_uneven_batches_equal_those_of_all_samples_at_once() -> None:
    model, images = fresh("resnet18")
    targets = torch.tensor([0, 1, 2, 3])
    assert collect_gradients(model.train(), [(images[:3], targets[:3]), (images[3:], targets[3:])], _cross_entropy) == 4
    assert model.training
    found = model.conv1.weight.grad.clone()
    model.zero_grad()
    _cross_entropy(model.eval()(images), targets).backward()
    torch.testing.assert_close(found, model.conv1.weight.grad, rtol=1e-3, atol=1e-6)


def test_taylor_prunes_with_collected_gradients() -> None:
    model, images = fresh("vit_tiny_patch16_224")
    collect_gradients(model, [(images, torch.tensor([0, 1, 2, 3]))], _cross_entropy)
    report = prune_model(model, images, Taylor(Taylor.Config()), keep=0.5, quantum=16)
    assert set(map(tuple, report.widths.values())) == {(768, 384)}


def test_gradients_need_samples_and_a_finite_loss() -> None:
    model, images = fresh("resnet18")
    with pytest.raises(DataRefused):
        collect_gradients(model, [], _cross_entropy)
    with pytest.raises(TrainingDiverged, match="nan"):
        collect_gradients(model, [(images * float("nan"), torch.zeros(4, dtype=torch.long))], _cross_entropy)


def test_recalibrated_statistics_are_the_average_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model[0].running_mean += 7
    batches = [torch.randn(8, 3, dtype=torch.float64).float() * 3 + 1 for _ in range(4)]
    assert recalibrate_bn(model, batches) == 1
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model.training
    assert model[0].momentum == 0.1
    assert model[0].weight.grad is None


def test_only_batchnorm_is_in_training_mode_while_recalibrating() -> None:
    model, seen = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), []
    model[1].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    recalibrate_bn(model, [torch.randn(4, 3)])
    assert seen == [(False, False)]


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 3)]])
def test_recalibration_refuses_no_batches_and_single_samples(batches: list[Tensor]) -> None:
    with pytest.raises(DataRefused):
        recalibrate_bn(nn.Sequential(nn.BatchNorm1d(3)), batches)


# ---------------------------------------------------------------------------------------------------- targets
def staircase(ratio: float) -> float:
    """Parameters kept of a width of 64 in multiples of 8, squared."""
    return (choose_width(64, 1 - ratio, 8) / 64) ** 2


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.3, 0.1])
def test_the_smallest_ratio_that_reaches_a_size_is_found(target: float) -> None:
    found = find_ratio(lambda ratio: (1 - ratio) ** 2, "macs", target)
    assert found.met
    assert found.value <= target
    assert found.ratio == pytest.approx(1 - target**0.5, abs=0.012)
    assert len(found.trials) <= Limits().evaluations


@pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
def test_a_staircase_is_left_at_its_edge(target: float) -> None:
    found = find_ratio(staircase, "params", target)
    assert found.met
    assert staircase(found.ratio) <= target < staircase(found.ratio - 2 * Limits().resolution)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_speed_up_ends_with_a_ratio_that_was_measured_to_reach_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def measure(ratio: float) -> float:
        return (1 / (0.2 + 0.8 * (1 - ratio) ** 2)) * (0.96 + 0.08 * torch.rand((), generator=generator).item())

    found = find_ratio(measure, "speedup", 1.7)
    assert found.met
    assert (found.ratio, found.value) in found.trials
    assert found.value >= 1.7
    assert 0.2 < found.ratio < 0.4


def test_a_goal_out_of_reach_ends_with_the_floor_and_the_reason() -> None:
    found = find_ratio(lambda ratio: 1 - 0.6 * ratio, "macs", 0.3)
    assert (found.met, found.ratio) == (False, 0.9)
    assert found.value == pytest.approx(0.46)
    assert "removing 90% of every width gives 0.46" in found.reason


def test_a_goal_that_is_met_already_costs_nothing() -> None:
    def never(ratio: float) -> float:
        raise AssertionError(ratio)

    assert find_ratio(never, "speedup", 1.0).ratio == 0
    assert find_ratio(never, "macs", 1.0).met


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5])
def test_the_number_of_evaluations_is_bounded_and_a_reachable_goal_is_still_met(evaluations: int) -> None:
    found = find_ratio(lambda ratio: 1 / (1 - ratio), "speedup", 6.0, limits=Limits(evaluations=evaluations))
    assert len(found.trials) <= evaluations
    assert found.met


def test_a_pruned_model_that_is_never_faster_ends_with_the_best_trial() -> None:
    found = find_ratio(lambda ratio: 1 - ratio / 2, "speedup", 1.5)
    assert not found.met
    assert found.value == max(value for _, value in found.trials)


@pytest.mark.parametrize(("goal", "target"), [("macs", 0.0), ("macs", 1.2), ("params", -1.0), ("speedup", 0.0), ("speedup", float("nan"))])
def test_an_impossible_target_is_refused(goal: str, target: float) -> None:
    with pytest.raises(UsageError):
        find_ratio(lambda _: 1.0, goal, target)


def test_a_measurement_that_is_not_a_number_stops_the_search() -> None:
    with pytest.raises(EdgekdError, match="nan"):
        find_ratio(lambda _: float("nan"), "speedup", 2.0)
