"""A pruned model is JSON and weights: it comes back bit-identical, and a hostile diff is refused before anything changes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load, save
from torch import nn

from edgekd.errors import StructureRefused
from edgekd.models.structure import apply_structure, structure_diff
from edgekd.prune._cut import prune_model
from edgekd.prune.random import Random

SMALL = {  # architecture -> arguments and image size that keep the test quick
    "resnet18": ({}, 64),
    "mobilenetv3_small_100": ({}, 64),
    "convnextv2_atto": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 8, "depth": 3}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "window_size": 2, "depths": (2, 1, 1, 1)}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
}
MORE = {
    **{
        arch: ({}, 64)
        for arch in ("efficientnet_b0", "densenet121", "repvit_m0_9", "ghostnet_100", "convnext_atto", "mobilenetv4_conv_small")
    },
    "regnety_002": ({}, 64),
    "levit_128s": ({}, 224),
    "mobilevit_xxs": ({}, 64),
}


def fresh(arch: str) -> nn.Module:
    return timm.create_model(arch, num_classes=7, **(SMALL | MORE)[arch][0]).eval()


def pruned(arch: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    size = (SMALL | MORE)[arch][1]
    model, image = fresh(arch), torch.randn(2, 3, size, size)
    for parameter in model.parameters():  # the Mixer head starts at zero, which would hide everything before it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    prune_model(model, image, Random(Random.Config()), keep=0.6, quantum=4)
    return model, image


@pytest.fixture(scope="module")
def resnet_diff() -> dict[str, Any]:
    return structure_diff(fresh("resnet18"), pruned("resnet18")[0])


@pytest.mark.parametrize("arch", SMALL)
def test_a_pruned_model_comes_back_bit_identical_from_json_and_safetensors(arch: str) -> None:
    model, image = pruned(arch)
    with torch.no_grad():
        expected = model(image)
    text = json.dumps(structure_diff(fresh(arch), model))
    weights = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    rebuilt = apply_structure(fresh(arch), json.loads(text))
    rebuilt.load_state_dict(load(weights), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(image), expected)
    assert structure_diff(fresh(arch), rebuilt) == json.loads(text)
    assert sum(p.numel() for p in rebuilt.parameters()) < sum(p.numel() for p in fresh(arch).parameters())


@pytest.mark.parametrize("arch", SMALL)
def test_an_unpruned_model_has_an_empty_diff(arch: str) -> None:
    model = fresh(arch)
    with torch.no_grad():
        model(torch.zeros(1, 3, SMALL[arch][1], SMALL[arch][1]))
    assert structure_diff(fresh(arch), model) == {}


def test_an_empty_diff_changes_nothing() -> None:
    model = fresh("resnet18")
    assert apply_structure(model, {}) is model
    assert structure_diff(fresh("resnet18"), model) == {}


def test_the_widths_that_timm_notes_come_back_with_the_diff(resnet_diff: dict[str, Any]) -> None:
    model = apply_structure(fresh("resnet18"), resnet_diff)
    assert model.num_features == model.fc.in_features == model.head_hidden_size < 512


def test_a_frozen_layer_stays_frozen() -> None:
    base, model = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 2))
    diff = structure_diff(base, model)
    assert not apply_structure(base.requires_grad_(False), diff)[0].weight.requires_grad


class _Block(nn.Module):
    """Attributes of every kind that a diff must carry, and a table that is not saved with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.pair, self.window, self.scale, self.on = [4, 6], (3, (8, 2)), torch.Size([7, 7]), 0.5, True
        self.name, self.act, self.fused_attn = "gelu", nn.functional.gelu, True
        self.branch = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4), persistent=False)


def test_lists_tuples_and_sizes_keep_their_types() -> None:
    model = _Block()
    model.sizes, model.pair, model.window, model.scale, model.on = [4, 5], (3, (6, 2)), torch.Size([5, 7]), 0.25, False
    rebuilt = apply_structure(_Block(), json.loads(json.dumps(structure_diff(_Block(), model))))
    for name in ("sizes", "pair", "window", "scale", "on"):
        assert getattr(rebuilt, name) == getattr(model, name)
        assert type(getattr(rebuilt, name)) is type(getattr(model, name))


def test_the_kernel_choice_of_the_machine_is_not_part_of_the_structure() -> None:
    model = _Block()
    model.fused_attn = False
    assert structure_diff(_Block(), model) == {}


def test_a_table_that_is_not_saved_is_rebuilt_from_the_fresh_one() -> None:
    model = _Block()
    model.table = model.table[:, [0, 3]]
    rebuilt = apply_structure(_Block(), json.loads(json.dumps(structure_diff(_Block(), model))))
    assert torch.equal(rebuilt.table, torch.tensor([[0.0, 3.0], [4.0, 7.0], [8.0, 11.0]]))
    assert "table" not in rebuilt.state_dict()


def test_a_part_replaced_by_an_identity_is_recorded_and_applied() -> None:
    model = _Block()
    model.branch = nn.Identity()
    rebuilt = apply_structure(_Block(), json.loads(json.dumps(structure_diff(_Block(), model))))
    assert type(rebuilt.branch) is nn.Identity


def _break(block: _Block, case: str) -> None:
    if case == "text":
        block.name = "relu"
    elif case == "function":
        block.act = "relu"  # type: ignore[assignment]
    elif case == "new attribute":
        block.extra = 1
    elif case == "grown":
        block.sizes = [4, 60]
    elif case == "invented table":
        block.table = torch.full((3, 2), 99.0)
    elif case == "overwritten table":
        block.table = block.table + 1
    elif case == "other layer":
        block.branch = nn.Conv1d(4, 4, 1)  # type: ignore[assignment]
    elif case == "added layer":
        block.more = nn.Linear(2, 2)
    elif case == "no bias":
        block.branch.bias = None


CASES = ["text", "function", "new attribute", "grown", "invented table", "overwritten table", "other layer", "added layer", "no bias"]


@pytest.mark.parametrize("case", CASES)
def test_what_json_cannot_carry_is_refused_when_the_diff_is_made(case: str) -> None:
    model = _Block()
    _break(model, case)
    with pytest.raises(StructureRefused):
        structure_diff(_Block(), model)


def _set(diff: dict[str, Any], path: str, value: Any) -> None:
    """path: steps separated by '/', as module names contain dots."""
    *steps, last = path.split("/")
    for step in steps:
        diff = diff.setdefault(step, {})
    diff[last] = value


ATTACKS = {
    "wrong module": ("modules/layer9.0.conv1", {"attributes": {"out_channels": 8}}, "layer9.0.conv1"),
    "unknown attribute": ("modules/layer1.0.conv1/attributes/code", 1, "layer1.0.conv1"),
    "private attribute": ("modules/layer1.0.conv1/attributes/_forward_hooks", [], "layer1.0.conv1"),
    "method": ("modules/layer1.0.conv1/attributes/forward", 1, "layer1.0.conv1"),
    "mode": ("modules/bn1/attributes/training", True, "bn1"),
    "wrong type: float for int": ("modules/layer1.0.conv1/attributes/out_channels", 32.0, "layer1.0.conv1"),
    "wrong type: bool for int": ("modules/layer1.0.conv1/attributes/out_channels", True, "layer1.0.conv1"),
    "wrong type: text": ("modules/layer1.0.conv1/attributes/padding_mode", "reflect", "layer1.0.conv1"),
    "wrong type: list for int": ("modules/layer1.0.conv1/attributes/out_channels", [32], "layer1.0.conv1"),
    "wrong type: object": ("modules/layer1.0.conv1/attributes/out_channels", {"a": 1}, "layer1.0.conv1"),
    "code": ("modules/layer1.0.conv1/class", "os.system", "layer1.0.conv1"),
    "more channels": ("modules/layer1.0.conv1/attributes/out_channels", 10**9, "layer1.0.conv1"),
    "no channels": ("modules/layer1.0.conv1/attributes/out_channels", 0, "layer1.0.conv1"),
    "memory bomb in padding": ("modules/layer1.0.conv1/attributes/padding", [10**6, 10**6], "layer1.0.conv1"),
    "long list": ("modules/layer1.0.conv1/attributes/padding", [1] * 100_000, "layer1.0.conv1"),
    "oversize tensor": ("modules/layer1.0.conv1/tensors/weight/shape", [10**6, 10**6, 3, 3], "layer1.0.conv1"),
    "negative size": ("modules/layer1.0.conv1/tensors/weight/shape", [-1, 8, 3, 3], "layer1.0.conv1"),
    "other rank": ("modules/layer1.0.conv1/tensors/weight/shape", [8], "layer1.0.conv1"),
    "wrong base shape": ("modules/layer1.0.conv1/tensors/weight/base", [65, 64, 3, 3], "layer1.0.conv1"),
    "unknown tensor": ("modules/layer1.0.conv1/tensors/bias", {"base": [64], "shape": [8]}, "layer1.0.conv1"),
    "invented rule": ("modules/layer1.0.conv1/tensors/weight/take", {"axis": 0, "index": [0]}, "layer1.0.conv1"),
    "identity with contents": ("modules/layer1.0.conv1/identity", True, "layer1.0.conv1"),
    "identity of everything": ("modules/", {"identity": True}, "module ''"),
    "other version": ("version", 2, "version"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_diff_is_refused_by_name_and_changes_nothing(attack: str, resnet_diff: dict[str, Any]) -> None:
    path, value, named = ATTACKS[attack]
    diff = copy.deepcopy(resnet_diff)
    _set(diff, path, value)
    model = fresh("resnet18")
    with pytest.raises(StructureRefused) as refusal:
        apply_structure(model, diff)
    assert named in str(refusal.value)
    assert structure_diff(fresh("resnet18"), model) == {}


def test_too_many_modules_are_refused() -> None:
    with pytest.raises(StructureRefused, match="malformed"):
        apply_structure(fresh("resnet18"), {"version": 1, "modules": {f"m{i}": {} for i in range(30_000)}})


def test_a_diff_of_another_architecture_is_refused(resnet_diff: dict[str, Any]) -> None:
    with pytest.raises(StructureRefused):
        apply_structure(fresh("vit_tiny_patch16_224"), resnet_diff)


@pytest.mark.parametrize("rule", [{"axis": 1, "index": [0, 4]}, {"axis": 0, "index": [0, 1]}, {"axis": 7, "index": [0, 1]}, None])
def test_a_rule_that_does_not_rebuild_the_table_is_refused(rule: dict[str, Any] | None) -> None:
    diff = {"modules": {"": {"tensors": {"table": {"base": [3, 4], "shape": [3, 2], "take": rule}}}}}
    with pytest.raises(StructureRefused, match="rule to rebuild"):
        apply_structure(_Block(), diff)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MORE)
def test_more_families_come_back_bit_identical(arch: str) -> None:
    test_a_pruned_model_comes_back_bit_identical_from_json_and_safetensors(arch)
