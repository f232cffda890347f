"""Which of fp32 or bf16 autocast, and which memory layout, is faster for this model here: measured, recorded, replayed. Not a fixed rule.

bf16 is slower than fp32 for 16-channel convolutions on some CPUs and several times faster for transformers; so a few steps of each are timed,
interleaved, and the fastest is kept. A teacher's answers must also agree with its fp32 answers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.models.spec import ModelSpec
from edgekd.train.loop import Speed
from edgekd.train.views import View

_ROUNDS = 2
_BUDGET_SECONDS = 3.0
_AGREEMENT = 0.98  # share of a batch on which a faster teacher must decide as in fp32
_GAIN = 0.95  # a choice other than plain fp32 must be at least 5 % faster: noise should not change results


def options(autocast: str, channels_last: str) -> list[Speed]:
    """The combinations that the settings leave open; plain fp32 first."""
    casts = {"off": [False], "bf16": [True], "auto": [False, True]}[autocast]
    layouts = {"off": [False], "on": [True], "auto": [False, True]}[channels_last]
    return [Speed(cast, layout) for cast, layout in product(casts, layouts)]


def tune_student(model: nn.Module, spec: ModelSpec, images: Tensor, choices: list[Speed]) -> dict[str, Any]:
    """The fastest way to take a training step on `images` (batch, 3, h, w) in [0, 1]."""

    def prepare(speed: Speed) -> Callable[[], object]:
        net, view = _laid_out(model, speed, images.device).train(), _view(spec, speed, images.device)
        target = torch.zeros(len(images), dtype=torch.long, device=images.device)

        def step() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=speed.autocast):
                loss = F.cross_entropy(net(view(images)).float(), target)
            loss.backward()  # type: ignore[no-untyped-call]
            net.zero_grad(set_to_none=True)

        return step

    return _choose(choices, prepare, images.device)


def tune_teacher(model: nn.Module, spec: ModelSpec, images: Tensor, choices: list[Speed]) -> dict[str, Any]:
    """The fastest forward pass whose decisions agree with plain fp32."""
    with torch.inference_mode():
        plain = model.to(images.device)(_view(spec, Speed(), images.device)(images)).argmax(1)

    def prepare(speed: Speed) -> Callable[[], object] | None:
        net, view = _laid_out(model, speed, images.device).eval(), _view(spec, speed, images.device)

        def forward() -> Tensor:
            with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=speed.autocast):
                out: Tensor = net(view(images))
            return out

        agrees = float((forward().argmax(1) == plain).float().mean()) >= _AGREEMENT
        return forward if agrees else None

    return _choose(choices, prepare, images.device)


def _laid_out(model: nn.Module, speed: Speed, device: torch.device) -> nn.Module:
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    laid: nn.Module = copy.deepcopy(model).to(device).to(memory_format=layout)
    return laid


def _view(spec: ModelSpec, speed: Speed, device: torch.device) -> View:
    return View(spec, channels_last=speed.channels_last, device=device.type)


def _wait(device: torch.device) -> None:
    """Kernels on a GPU run behind the program's back."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _choose(choices: list[Speed], prepare: Callable[[Speed], Callable[[], object] | None], device: torch.device) -> dict[str, Any]:
    """Interleaved rounds within a time budget; the first round of each warms up and is not counted."""
    if len(choices) == 1:
        return {"autocast": choices[0].autocast, "channels_last": choices[0].channels_last, "seconds": {}}
    runs = {speed: run for speed in choices if (run := prepare(speed)) is not None}
    if not runs and (plain := prepare(Speed())) is not None:  # none of those that the settings allow agrees with fp32
        runs = {Speed(): plain}
    taken: dict[Speed, list[float]] = {speed: [] for speed in runs}
    started = time.monotonic()
    for number in range(_ROUNDS + 1):
        for speed, run in runs.items():
            begin = time.perf_counter()
            run()
            _wait(device)
            if number:
                taken[speed].append(time.perf_counter() - begin)
        if number and time.monotonic() - started > _BUDGET_SECONDS:
            break
    cost = {speed: median(times) for speed, times in taken.items()}
    first = next(iter(cost))
    best = min(cost, key=lambda s: cost[s])
    chosen = best if cost[best] < _GAIN * cost[first] else first
    shown = {f"{'bf16' if s.autocast else 'fp32'}{' channels_last' if s.channels_last else ''}": round(c, 5) for s, c in cost.items()}
    return {"autocast": chosen.autocast, "channels_last": chosen.channels_last, "seconds": shown}
