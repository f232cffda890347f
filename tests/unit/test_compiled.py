"""A model that learns or teaches as one compiled program: the same answers, a reason where it cannot be had, and tried only where it pays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from edgekd.models.taps import TappedModel, stage_taps
from edgekd.train import compiled, tune
from edgekd.train.compiled import Compiled, keep_programs_in
from edgekd.train.speed import Speed, SpeedConfig

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


def model(arch: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if arch == "vit":
        net: nn.Module = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    else:
        net = timm.create_model("test_resnet", num_classes=5)
    return net.eval().requires_grad_(False), torch.rand(4, 3, 8 if arch == "vit" else 32, 8 if arch == "vit" else 32)


@needs_compiler
@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_a_compiled_teacher_answers_as_the_model_and_its_taps_do(arch: str) -> None:
    net, images = model(arch)
    tapped = TappedModel(net, stage_taps(net, images.shape[-1]))
    with torch.inference_mode():
        expected, found = tapped(images), Compiled(tapped, 4, frozen=True)
        got = found(images)
    assert not found.refused
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(got.taps) == len(expected.taps) > 1
    for one, other in zip(got.taps, expected.taps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batches_of_other_sizes_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(compiled.torch, "compile", lambda run, **_: lambda x: seen.append(len(x)) or run(x))
    run = Compiled(lambda x: 2 * x, 4)
    for size in (4, 3, 4):
        assert torch.equal(run(torch.ones(size)), 2 * torch.ones(size))
    assert seen == [4, 4]


def test_what_does_not_compile_runs_as_it_is_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more lines")

    monkeypatch.setattr(compiled.torch, "compile", lambda run, **_: broken)
    run = Compiled(lambda x: 2 * x, 4)
    assert torch.equal(run(torch.ones(4)), 2 * torch.ones(4))
    assert torch.equal(run(torch.ones(4)), 2 * torch.ones(4))
    assert run.refused == "InvalidCxxCompiler: No working C++ compiler found"


def test_programs_are_kept_where_they_are_told_to_be_and_a_users_choice_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_programs_in(tmp_path / "a")
    keep_programs_in(tmp_path / "b")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------ tune
PLAIN, FUSED = Speed(), Speed(compiled=True)


def chosen(monkeypatch: pytest.MonkeyPatch, cost: dict[Speed, float], steps: int, *, refused: str = "", **config: Any) -> dict[str, Any]:
    """The decision for steps that take so many seconds; compiling takes none."""

    def prepare(speed: Speed) -> Callable[[], object]:
        if refused and speed.compiled:
            raise tune._Unfit(refused)
        return lambda: None

    monkeypatch.setattr(tune, "_measured", lambda runs, _device: {speed: cost[speed] for speed in runs})
    return tune._choose(SpeedConfig(**({"autocast": "off", "channels_last": "off"} | config)), prepare, torch.device("cpu"), steps)


def test_a_long_training_is_compiled_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, {PLAIN: 1.0, FUSED: 0.5}, steps=1000)
    assert Speed.of(found) == FUSED
    assert found["seconds"] == {"fp32": 1.0, "fp32 compiled": 0.5}


@pytest.mark.parametrize(
    ("cost", "steps", "refused", "why"),
    [
        ({PLAIN: 1.0, FUSED: 0.5}, 599, "", "599 steps take less than 10 minutes"),
        ({PLAIN: 1.0, FUSED: 0.97}, 1000, "", "97% of the time"),
        ({PLAIN: 1.0, FUSED: 2.0}, 1000, "", "200% of the time"),
        ({PLAIN: 1.0, FUSED: 0.5}, 1000, "no compiler", "no compiler"),
    ],
)
def test_otherwise_it_is_not_and_the_decision_says_why(
    monkeypatch: pytest.MonkeyPatch, cost: dict[Speed, float], steps: int, refused: str, why: str
) -> None:
    found = chosen(monkeypatch, cost, steps, refused=refused)
    assert Speed.of(found) == PLAIN
    assert why in " ".join(found["out"].values())


def test_the_fastest_of_the_others_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {PLAIN: 3.0, Speed(channels_last=True): 2.0, Speed(channels_last=True, compiled=True): 1.0}
    assert Speed.of(chosen(monkeypatch, cost, 1000, channels_last="auto")) == Speed(channels_last=True, compiled=True)


def test_a_training_whose_steps_are_not_known_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Speed.of(chosen(monkeypatch, {PLAIN: 1.0, FUSED: 0.1}, steps=0)) == PLAIN


def test_settings_that_leave_nothing_open_are_not_measured() -> None:
    def prepare(_: Speed) -> Callable[[], object]:
        raise AssertionError("nothing is to be measured")

    config = SpeedConfig(autocast="bf16", channels_last="off", compile="on")
    assert Speed.of(tune._choose(config, prepare, torch.device("cpu"), 10)) == config.speed == Speed(autocast=True, compiled=True)


@needs_compiler
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_both_sides_are_really_compiled_and_timed(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.models.spec import ModelSpec

    monkeypatch.setattr(tune, "_LONG", 0.0)
    net, images = model("cnn")
    spec = ModelSpec(arch="test_resnet", num_classes=5, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, timm="none")
    config = SpeedConfig(autocast="off", channels_last="off")
    found = getattr(tune, f"tune_{side}")(net.requires_grad_(side == "student"), spec, images, config, 10**6)
    assert list(found["seconds"]) == ["fp32", "fp32 compiled"]
    assert min(found["seconds"].values()) > 0
