"""Features by stage: every family is tapped where its stages end, the tapped model answers as the model itself, and OFA's branches fit."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import nn

from edgekd.api import run_code
from edgekd.errors import UsageError
from edgekd.models.projectors import PatchMerging, ofa_branches
from edgekd.models.taps import Tap, TappedModel, classifier_of, family, feature_map, patch_tokens, stage_taps
from edgekd.prune._cut import prune_model
from edgekd.prune.l1 import L1
from edgekd.shipped import shipped_dir

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
# architecture -> arguments, image size, family, layout, tapped modules, channels, grid sides
FAMILIES: dict[str, tuple[dict[str, Any], int, str, str, list[str], list[int], list[int]]] = {
    "resnet10t": ({}, 64, "cnn", "NCHW", ["layer1", "layer2", "layer3", "layer4"], [64, 128, 256, 512], [16, 8, 4, 2]),
    "convnext_atto": ({}, 64, "cnn", "NCHW", [f"stages.{i}" for i in range(4)], [40, 80, 160, 320], [16, 8, 4, 2]),
    "mobilenetv3_small_100": ({}, 64, "cnn", "NCHW", [f"blocks.{i}" for i in (0, 1, 3, 5)], [16, 24, 48, 576], [16, 8, 4, 2]),
    "efficientnet_b0": ({}, 64, "cnn", "NCHW", [f"blocks.{i}" for i in (1, 2, 4, 6)], [24, 40, 112, 320], [16, 8, 4, 2]),
    "regnety_002": ({}, 64, "cnn", "NCHW", ["s1", "s2", "s3", "s4"], [24, 56, 152, 368], [16, 8, 4, 2]),
    "vit_tiny_patch16_224": (VIT, 32, "vit", "NLC", [f"blocks.{i}" for i in (1, 3, 9, 11)], [48] * 4, [4] * 4),
    "deit_tiny_distilled_patch16_224": (VIT | {"depth": 6}, 32, "vit", "NLC", [f"blocks.{i}" for i in (0, 1, 4, 5)], [48] * 4, [4] * 4),
    "cait_xxs24_224": (VIT | {"num_heads": 4, "depth": 4}, 32, "vit", "NLC", [f"blocks.{i}" for i in range(4)], [48] * 4, [4] * 4),
    "mixer_s32_224": ({"img_size": 64}, 64, "mlp", "NLC", [f"blocks.{i}" for i in (0, 2, 6, 7)], [512] * 4, [2] * 4),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "depths": (2, 1, 1, 1), "embed_dim": 48},
        *(64, "swin", "NHWC", [f"layers.{i}" for i in range(4)], [48, 96, 192, 384], [16, 8, 4, 2]),
    ),
    "resnet20_cifar": ({}, 32, "cnn", "NCHW", ["layer1", "layer2", "layer3"], [16, 32, 64], [32, 16, 8]),
}


@cache
def model_of(arch: str) -> nn.Module:
    """Shared by the tests of this file, which leave it in eval mode and without hooks."""
    if arch.endswith("_cifar"):
        run_code(shipped_dir("recipes") / "cifar10" / "resnet_cifar.py")  # a plain module: no feature_info, found by stride
    torch.manual_seed(0)
    return timm.create_model(arch, num_classes=10, **FAMILIES[arch][0]).eval()


def shape(tap: Tap, batch: int) -> tuple[int, ...]:
    """What the stated layout, channels, grid and prefix say."""
    (h, w), c = tap.grid, tap.channels
    return {"NCHW": (batch, c, h, w), "NHWC": (batch, h, w, c), "NLC": (batch, tap.prefix + h * w, c)}[tap.layout]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("arch", FAMILIES)
def test_each_family_is_tapped_at_its_stages(arch: str) -> None:
    _, size, kind, layout, modules, channels, sides = FAMILIES[arch]
    model = model_of(arch)
    taps = stage_taps(model, size)
    assert [t.module for t in taps] == modules
    assert [t.layout for t in taps] == [layout] * len(taps)
    assert [t.channels for t in taps] == channels
    assert [t.grid for t in taps] == [(n, n) for n in sides]
    assert family(taps, model) == kind
    assert hooks(model) == 0
    assert not model.training


@pytest.mark.parametrize(("arch", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("cait_xxs24_224", 0)])
def test_tokens_before_the_patches_are_counted_only_where_they_are(arch: str, prefix: int) -> None:
    """CaiT joins its class token after the tapped blocks."""
    assert {t.prefix for t in stage_taps(model_of(arch), 32)} == {prefix}


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_tapped_model_answers_as_the_model_and_its_features_have_the_stated_shapes(arch: str) -> None:
    model, size = model_of(arch), FAMILIES[arch][1]
    taps, images = stage_taps(model, size), torch.randn(3, 3, size, size)
    tapped = TappedModel(model, taps)
    with torch.no_grad():
        logits, features, _ = tapped(images)
        assert [tuple(f.shape) for f in features] == [shape(t, 3) for t in taps]
        tapped.close()
        assert torch.equal(logits, model(images))
    assert hooks(model) == 0


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_embedding_is_what_the_classifier_reads(arch: str) -> None:
    model, size = model_of(arch), FAMILIES[arch][1]
    name, width = classifier_of(model, size, 10)
    tapped = TappedModel(model, (), name)
    with torch.no_grad():
        logits, taps, embedding = tapped(torch.randn(3, 3, size, size))
        assert (tuple(embedding.shape), taps) == ((3, width), ())
        own = model.get_submodule(name)(embedding)
    tapped.close()
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 0
    if arch.startswith("deit"):  # its answer is the mean of two classifiers
        assert name == "head_dist"
    else:
        assert torch.equal(own, logits)


def test_a_model_without_a_linear_classifier_has_no_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UsageError, match="does not end in a linear classifier") as caught:
        classifier_of(model, 8, 10)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("arch", ["resnet10t", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_features_of_every_layout_are_read_by_position(arch: str) -> None:
    model, size = model_of(arch), FAMILIES[arch][1]
    tap = stage_taps(model, size)[-1]
    features = torch.arange(math.prod(shape(tap, 2))).reshape(shape(tap, 2))
    (h, w), b = tap.grid, 1
    tokens, image = patch_tokens(features, tap), feature_map(features, tap)
    assert (tokens.shape, image.shape) == ((2, h * w, tap.channels), (2, tap.channels, h, w))
    for i, j in ((0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1)):
        at = {"NCHW": (b, slice(None), i, j), "NHWC": (b, i, j), "NLC": (b, tap.prefix + i * w + j)}[tap.layout]
        assert torch.equal(tokens[b, i * w + j], features[at])
        assert torch.equal(image[b, :, i, j], features[at])


@pytest.mark.parametrize(
    ("depth", "picks"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 1, 4, 5]), (24, [3, 7, 19, 23])]
)
def test_uniform_networks_of_any_depth_have_up_to_four_taps(depth: int, picks: list[int]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **(VIT | {"embed_dim": 12, "depth": depth})).eval()
    assert [t.module for t in stage_taps(model, 32)] == [f"blocks.{i}" for i in picks]


def test_a_pruned_model_is_tapped_with_the_widths_that_it_has() -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    before = stage_taps(model, 32)
    prune_model(model, torch.zeros(1, 3, 32, 32), L1(L1.Config()), keep=0.5, quantum=8)
    after = stage_taps(model, 32)
    assert [t.module for t in after] == [t.module for t in before]
    assert all(a.channels < b.channels for a, b in zip(after, before, strict=True))
    with torch.no_grad():
        _, features, _ = TappedModel(model, after)(torch.randn(2, 3, 32, 32))
    assert [tuple(f.shape) for f in features] == [shape(t, 2) for t in after]


@pytest.mark.parametrize("arch", FAMILIES)
def test_ofa_branches_of_each_family_learn_and_pass_gradients_to_the_student(arch: str) -> None:
    model, size, classes = model_of(arch), FAMILIES[arch][1], 7
    taps = stage_taps(model, size)
    branches = ofa_branches(taps, (taps[-1].channels, 96), classes, (1, 2, 3, 4))
    assert len(branches) == len(taps)
    tapped = TappedModel(model, taps)
    _, features, _ = tapped(torch.randn(2, 3, size, size))
    answers = [branches[i](features[int(i)]) for i in branches]
    tapped.close()
    assert [tuple(a.shape) for a in answers] == [(2, classes)] * len(taps)
    for feature in features:
        feature.retain_grad()
    torch.stack(answers).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branches.parameters())
    assert all(f.grad is not None and bool(f.grad.any()) for f in features)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("side", [15, 20, 30])
def test_branches_take_grids_that_do_not_halve_evenly(side: int) -> None:
    """A ViT at 240 pixels has 15 x 15 patches."""
    tap = Tap("blocks.0", "NLC", 16, (side, side), 1)
    branches = ofa_branches((tap,) * 4, (16, 16), 5, (1, 4))
    for branch in branches.values():
        assert branch(torch.randn(2, 1 + side * side, 16)).shape == (2, 5)


def test_merging_joins_two_by_two_neighbours_and_leaves_an_odd_edge_out() -> None:
    merge = PatchMerging((3, 4), 1, 4, nn.Identity())
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    tokens = torch.arange(12.0).view(1, 12, 1)  # rows 0-3, 4-7, 8-11: the last row has no partner
    assert sorted(map(tuple, map(sorted, merge(tokens)[0].tolist()))) == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_a_stage_that_a_shallow_student_lacks_is_refused() -> None:
    taps = stage_taps(model_of("resnet20_cifar"), 32)  # three stages: those count as 2, 3 and 4
    assert list(ofa_branches(taps, (64, 64), 10, (1, 2))) == ["0"]
    with pytest.raises(UsageError, match=r"none of the stages \[1\] exists"):
        ofa_branches(taps, (64, 64), 10, (1,))


@pytest.mark.parametrize(
    ("arch", "args", "size", "kind", "layouts", "grids"),
    [
        ("levit_128s", {"img_size": 128}, 128, "swin", "NLC NLC NLC", [8, 4, 2]),  # tokens whose number falls
        (
            "efficientformer_l1",
            {"depths": (1, 1, 1, 1), "num_vit": 1},
            224,
            "swin",
            "NCHW NCHW NCHW NLC",
            [56, 28, 14, 7],
        ),  # maps, then tokens
        ("pit_ti_224", {"img_size": 96, "depth": (1, 1, 1)}, 96, "cnn", "NCHW NCHW NCHW", [11, 6, 3]),  # stages give (map, class token)
        ("tnt_s_patch16_224", {"img_size": 64, "depth": 4}, 64, "vit", "NLC NLC NLC NLC", [4, 4, 4, 4]),  # blocks give (pixels, patches)
        ("convit_tiny", {"img_size": 64, "depth": 4}, 64, "vit", "NLC NLC NLC NLC", [4, 4, 4, 4]),  # attention by other names
        ("volo_d1_224", {"img_size": 64}, 64, "swin", "NHWC NHWC NHWC NHWC", [8, 4, 4, 4]),  # does not say its layout
        (
            "coat_lite_tiny",
            {"img_size": 64},
            64,
            "swin",
            "NLC NLC NLC NLC",
            [16, 8, 4, 2],
        ),  # no feature_info; a class token that it does not name
        ("twins_svt_small", {"img_size": 64, "depths": (1, 1, 1, 1)}, 64, "swin", "NLC NLC NLC NLC", [16, 8, 4, 2]),
    ],
)
def test_models_that_give_more_than_one_plain_map_are_tapped_too(
    arch: str, args: dict[str, Any], size: int, kind: str, layouts: str, grids: list[int]
) -> None:
    model = timm.create_model(arch, num_classes=10, **args).eval()
    taps = stage_taps(model, size)
    assert [t.layout for t in taps] == layouts.split()
    assert [t.grid for t in taps] == [(g, g) for g in grids]
    assert family(taps, model) == kind
    with torch.no_grad():
        _, features, _ = TappedModel(model, taps)(torch.randn(3, 3, size, size))
    assert [tuple(f.shape) for f in features] == [shape(t, 3) for t in taps]
    branches = ofa_branches(taps, (taps[-1].channels, 96), 7, (1, 2, 3, 4))
    assert [tuple(b(features[int(i)]).shape) for i, b in branches.items()] == [(3, 7)] * len(taps)
