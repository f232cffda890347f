"""A teacher by a runtime: its answers are torch's, it is chosen where that is faster, long enough and true, and a training with it can be replayed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from edgekd.errors import BackendError, EdgekdError, OnnxRefused
from edgekd.models.spec import ModelSpec
from edgekd.stages._runtimes import by_runtime, ways
from edgekd.store import Store
from edgekd.train import tune
from edgekd.train.images import Teacher
from edgekd.train.speed import Speed, SpeedConfig
from edgekd.train.views import View
from tests.support import TINY, run_here, short_measurements

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLAIN, LAID = Speed(), Speed(channels_last=True)


def spec(size: int = 32) -> ModelSpec:
    return ModelSpec(arch="resnet10t", num_classes=4, image_size=size, mean=MEAN, std=STD, timm="none")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("resnet10t", num_classes=4).eval()
    for p in made.parameters():
        p.data *= 1.5 if p.ndim > 1 else 1  # logits far enough apart to be decisions
    return made


def images(count: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------ answers
@pytest.mark.parametrize("size", [32, 24])
@pytest.mark.parametrize("way", ways())
def test_its_answers_are_those_of_torch_with_the_models_own_view(way: str, size: int, net: nn.Module, tmp_path: Path) -> None:
    index = torch.arange(6)
    want = Teacher(net, View(spec()), Speed())(images(6, size), index, 0).logits
    made = by_runtime(net, spec(), way, images(32), tmp_path, threads=1, batch=6)
    found = made(images(6, size), index, 0)
    assert made.speed == Speed(runtime=way)
    assert str(made.speed) == way
    assert found.taps == ()
    limit = 1e-4 if way.endswith("fp32") else 0.2
    assert float((found.logits - want).abs().max()) <= limit * float(want.abs().max())
    assert made(images(3, size), index[:3], 0).logits.shape == (3, 4)  # the last batch of an epoch may be short


def test_what_was_made_is_used_again(net: nn.Module, tmp_path: Path) -> None:
    first = by_runtime(net, spec(), "onnxruntime int8", images(16), tmp_path, threads=1, batch=4)(images(4), torch.arange(4), 0).logits
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.onnx")}
    again = by_runtime(net, spec(), "onnxruntime int8", torch.zeros(0), tmp_path, threads=1, batch=4)(images(4), torch.arange(4), 0).logits
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.onnx")}
    assert torch.equal(first, again)


def test_there_are_runtimes_that_take_graphs_as_they_are() -> None:
    assert {"onnxruntime fp32", "onnxruntime int8"} <= set(ways())
    assert not any(way.startswith("tensorrt") for way in ways())


# ------------------------------------------------------------------------------------------------------------ the choice
def tuned(
    monkeypatch: pytest.MonkeyPatch,
    net: nn.Module,
    others: dict[str, Callable[[], Any]],
    cost: dict[Speed, float],
    steps: int = 1000,
    **config: Any,
) -> dict[str, Any]:
    """The decision about a teacher whose steps take so many seconds."""
    monkeypatch.setattr(tune, "_measured", lambda runs, _device: {s: cost[s] for s in runs})
    settings = SpeedConfig(**({"autocast": "off", "channels_last": "off", "compile": "off"} | config))
    return tune.tune_teacher(net, spec(), images(16), settings, steps, others)


def said(net: nn.Module, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> Callable[[], Callable[[Tensor], Tensor]]:
    def make() -> Callable[[Tensor], Tensor]:
        def answer(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return change(net(View(spec())(x)))

        return answer

    return make


FAST, FASTER = Speed(runtime="onnxruntime fp32"), Speed(runtime="openvino int8")


def test_the_fastest_that_agrees_is_chosen(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> None:
    others = {"onnxruntime fp32": said(net), "openvino int8": said(net)}
    found = tuned(monkeypatch, net, others, {PLAIN: 1.0, FAST: 0.5, FASTER: 0.3})
    assert Speed.of(found) == FASTER
    assert Speed.of(json.loads(json.dumps(found))) == FASTER
    assert found["seconds"] == {"fp32": 1.0, "onnxruntime fp32": 0.5, "openvino int8": 0.3}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda z: z.flip(1), "agrees with fp32 on"),
        (lambda z: 0.5 * z, "away from those in fp32"),
        (lambda z: z * float("nan"), "agrees with fp32 on"),
    ],
)
def test_one_that_says_something_else_is_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, change: Any, why: str
) -> None:
    found = tuned(
        monkeypatch, net, {"openvino int8": said(net, change), "onnxruntime fp32": said(net)}, {PLAIN: 1.0, FAST: 0.5, FASTER: 0.1}
    )
    assert Speed.of(found) == FAST
    assert why in found["out"]["openvino int8"]


def test_decisions_that_are_a_matter_of_rounding_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Level(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 4)

    nudge = said(Level(), lambda z: z + torch.tensor([0.0, 1e-6, 0.0, 0.0]))
    assert Speed.of(tuned(monkeypatch, Level(), {"openvino int8": nudge}, {PLAIN: 1.0, FASTER: 0.1})) == FASTER


@pytest.mark.parametrize("kind", [BackendError, OnnxRefused])
def test_a_runtime_that_refuses_the_model_is_out_with_its_words(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, kind: type[EdgekdError]
) -> None:
    def refuses() -> Any:
        raise kind("no such operator")

    found = tuned(monkeypatch, net, {"openvino int8": refuses}, {PLAIN: 1.0})
    assert Speed.of(found) == PLAIN
    assert found["out"]["openvino int8"] == "no such operator"


@pytest.mark.parametrize(
    ("cost", "steps", "config"),
    [
        ({PLAIN: 1.0, FASTER: 0.1}, 599, {}),  # too short to repay it
        ({PLAIN: 1.0, FASTER: 0.97}, 10_000, {}),  # hardly faster
        ({PLAIN: 1.0, FASTER: 0.1}, 10_000, {"runtime": "off"}),
    ],
)
def test_otherwise_torch_stays(monkeypatch: pytest.MonkeyPatch, net: nn.Module, cost: dict[Speed, float], steps: int, config: Any) -> None:
    assert Speed.of(tuned(monkeypatch, net, {"openvino int8": said(net)}, cost, steps, **config)) == PLAIN


def test_what_takes_longer_to_make_than_it_saves_is_not_taken(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> None:
    clock = iter(range(0, 10**6, 10_000))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: float(next(clock)))
    found = tuned(monkeypatch, net, {"openvino int8": said(net)}, {PLAIN: 1.0, FASTER: 0.5}, steps=10_000)
    assert Speed.of(found) == PLAIN
    assert found["out"]["openvino int8"] == "making it takes 10000 s and saves 5000 s"


def test_it_is_compared_with_the_best_of_torch(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> None:
    found = tuned(monkeypatch, net, {"openvino int8": said(net)}, {PLAIN: 1.0, LAID: 0.2, FASTER: 0.3}, 10_000, channels_last="auto")
    assert Speed.of(found) == LAID


# ------------------------------------------------------------------------------------------------------------ in a run
@pytest.mark.parametrize("method", ["kd", "ofa", "rkd"])
def test_a_decision_for_a_runtime_is_replayed_and_only_methods_of_logits_are_offered_one(method: str, home: Path, tmp_path: Path) -> None:
    own = (f"distill.method={method}", "distill.augment.policy=shift", "recover.augment.policy=shift")
    changes = (*TINY, *(part for text in own for part in ("-o", text)), "--no-gate")
    with short_measurements():
        first = run_here("compress", "quickstart", *changes, "--out", tmp_path / "first", "--json")
        assert first.code in (0, 4), first.err
        decisions = json.loads((tmp_path / "first" / "decisions.json").read_text())
        offered = "runtimes" in decisions["distill.speed"]["teacher"]["out"]
        assert offered == (method != "rkd")  # ofa reads the student's features, rkd the teacher's as well
        if not offered:
            return
        decisions["distill.speed"]["teacher"]["runtime"] = "onnxruntime fp32"
        (tmp_path / "d.json").write_text(json.dumps(decisions))
        again = run_here("compress", "quickstart", *changes, "--replay", tmp_path / "d.json", "--out", tmp_path / "again", "--json")
    assert again.code in (0, 4), again.err
    speeds = [m.meta.get("teacher_speed") for m, *_ in Store(home).entries() if m.recipe["step"] == "distill"]
    assert len(speeds) == 2
    assert "onnxruntime fp32" in speeds
