"""Which of fp32 or bf16 autocast, which memory layout, compiled, or by a runtime, is fastest for this model here: measured, recorded, replayed. Not a fixed rule.

bf16 is slower than fp32 for 16-channel convolutions on some CPUs and several times faster for transformers on others; so a few steps of each are timed,
interleaved, and the fastest is kept. Compiling takes up to a minute, so it is tried, on the fastest of them, only where the training is long; so are runtimes,
for teachers of which only the logits are asked for. A teacher's answers must also agree with its fp32 answers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import BackendError, InputRefused
from edgekd.models.spec import ModelSpec
from edgekd.train.compiled import Compiled
from edgekd.train.loop import reproducible
from edgekd.train.speed import Speed, SpeedConfig
from edgekd.train.views import View

_ROUNDS = 2
_BUDGET_SECONDS = 3.0
_AGREEMENT = 0.98  # share of the clear answers on which a faster teacher must decide as in fp32
_CLEAR = 0.05  # lead of the likeliest class in probability, without which a decision is a matter of rounding
_APART = 0.02  # mean total variation between its probabilities and those of fp32: what is imitated is more than decisions
_GAIN = 0.95  # a choice other than plain fp32 must be at least 5 % faster: noise should not change results
_LONG = 600.0  # seconds of a training that may repay compiling
_REPAID = 2.0  # what compiling saves is at least so many times what it took

Step = Callable[[], object]
Others = Mapping[str, Callable[[], Callable[[Tensor], Tensor]]]  # way -> what prepares it -> logits of images (batch, 3, h, w) in [0, 1]


class _Unfit(Exception):
    """A way to run the model that is out, and why."""


def options(config: SpeedConfig) -> list[Speed]:
    """The combinations that the settings leave open, plain fp32 first; compiled only where they say so."""
    casts = {"off": [False], "bf16": [True], "auto": [False, True]}[config.autocast]
    layouts = {"off": [False], "on": [True], "auto": [False, True]}[config.channels_last]
    return [Speed(cast, layout, config.compile == "on") for cast, layout in product(casts, layouts)]


def tune_student(model: nn.Module, spec: ModelSpec, images: Tensor, config: SpeedConfig, steps: int = 0) -> dict[str, Any]:
    """The fastest way to take training steps on `images` (batch, 3, h, w) in [0, 1], of which there will be `steps`."""

    def prepare(speed: Speed) -> Step:
        net, view = _laid_out(model, speed, images.device).train(), _view(spec, speed, images.device)
        forward = Compiled(net, len(images)) if speed.compiled else net
        target = torch.zeros(len(images), dtype=torch.long, device=images.device)

        def step() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=speed.autocast):
                loss = F.cross_entropy(forward(view(images)).float(), target)
            loss.backward()  # type: ignore[no-untyped-call]
            net.zero_grad(set_to_none=True)

        return _started(step, forward)

    with reproducible(images.device.type):
        return _choose(config, prepare, images.device, steps)


def tune_teacher(
    model: nn.Module, spec: ModelSpec, images: Tensor, config: SpeedConfig, steps: int = 0, others: Others = MappingProxyType({})
) -> dict[str, Any]:
    """The fastest forward pass whose answers agree with plain fp32; `others` may raise BackendError or InputRefused."""
    with torch.inference_mode():
        said = model.to(images.device)(_view(spec, Speed(), images.device)(images)).float().softmax(1)
        first = said.topk(min(2, said.shape[1]), dim=1).values
    clear = first[:, 0] - first[:, -1] > _CLEAR if said.shape[1] > 1 else torch.ones(len(said), dtype=torch.bool)

    def prepare(speed: Speed) -> Step:
        net, view = _laid_out(model, speed, images.device).eval().requires_grad_(False), _view(spec, speed, images.device)
        forward = Compiled(net, len(images), frozen=True) if speed.compiled else net

        def step() -> Tensor:
            with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=speed.autocast):
                out: Tensor = forward(view(images))
            return out

        _started(step, forward)
        agrees(step())
        return step

    def agrees(found: Tensor) -> None:
        """Raises _Unfit for answers that are others than in fp32."""
        shares = found.float().softmax(1)
        agreement = float((shares.argmax(1) == said.argmax(1))[clear].float().mean()) if bool(clear.any()) else 1.0
        if agreement < _AGREEMENT:
            raise _Unfit(f"it agrees with fp32 on {agreement:.1%} of the clear answers to a batch")
        apart = float((shares - said).abs().sum(1).mean() / 2)
        if apart > _APART:
            raise _Unfit(f"its probabilities are {apart:.1%} away from those in fp32")

    def another(make: Callable[[], Callable[[Tensor], Tensor]]) -> Step:
        try:
            answer = make()
            agrees(answer(images))
        except (BackendError, InputRefused) as problem:  # a quicker way that fails is out; it never ends the run
            raise _Unfit(problem.what) from problem
        return lambda: answer(images)

    ways = (
        {name: partial(another, make) for name, make in others.items()} if config.runtime == "auto" and images.device.type == "cpu" else {}
    )
    return _choose(config, prepare, images.device, steps, ways)


def _started(step: Step, forward: object) -> Step:
    """A step that ran once; raises _Unfit where its model would not compile."""
    step()
    if isinstance(forward, Compiled) and forward.refused:
        raise _Unfit(forward.refused)
    return step


def _laid_out(model: nn.Module, speed: Speed, device: torch.device) -> nn.Module:
    layout = torch.channels_last if speed.channels_last else torch.contiguous_format
    laid: nn.Module = copy.deepcopy(model).to(device).to(memory_format=layout)
    return laid


def _view(spec: ModelSpec, speed: Speed, device: torch.device) -> View:
    return View(spec, channels_last=speed.channels_last, device=device.type)


def _choose(
    config: SpeedConfig,
    prepare: Callable[[Speed], Step],
    device: torch.device,
    steps: int,
    ways: Mapping[str, Callable[[], Step]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The decision: what was chosen, the seconds of a step of each, and what is out and why."""
    choices, out = options(config), {}
    if len(choices) == 1 and config.compile != "auto" and not ways:
        return asdict(choices[0]) | {"seconds": {}, "out": {}}
    runs: dict[Speed, Step] = {}
    for speed in choices:
        try:
            runs[speed] = prepare(speed)
        except _Unfit as problem:
            out[str(speed)] = str(problem)
    if not runs:  # none of those that the settings allow agrees with fp32
        runs = {Speed(): prepare(Speed())}
    cost = _measured(runs, device)
    first, best = next(iter(cost)), min(cost, key=lambda s: cost[s])
    chosen = best if cost[best] < _GAIN * cost[first] else first
    fused = replace(chosen, compiled=True)
    if config.compile == "auto":
        if cost[chosen] * steps < _LONG:
            out["compiled"] = f"{steps} steps take less than {_LONG / 60:.0f} minutes, which would hardly repay compiling"
        else:
            began = time.perf_counter()
            try:
                again = {chosen: runs[chosen], fused: prepare(fused)}
            except _Unfit as problem:
                out[str(fused)] = str(problem)
            else:
                spent = time.perf_counter() - began
                both = _measured(again, device)
                cost |= {fused: both[fused]}
                runs |= again
                saved = (both[chosen] - both[fused]) * steps
                if both[fused] >= _GAIN * both[chosen]:
                    out[str(fused)] = f"a step takes {both[fused] / both[chosen]:.0%} of the time"
                elif saved < _REPAID * spent:
                    out[str(fused)] = f"compiling takes {spent:.0f} s and saves {saved:.0f} s"
                else:
                    chosen = fused
            torch.compiler.reset()  # the training compiles again, from the programs that are kept, with its own taps
    chosen = _by_another(chosen, runs, ways, cost, out, steps, device)
    return asdict(chosen) | {"seconds": {str(s): round(c, 5) for s, c in cost.items()}, "out": out}


def _by_another(
    chosen: Speed,
    runs: dict[Speed, Step],
    ways: Mapping[str, Callable[[], Step]],
    cost: dict[Speed, float],
    out: dict[str, str],
    steps: int,
    device: torch.device,
) -> Speed:
    """The fastest of other ways where the training is long enough to repay making it, else what was chosen; `cost` and `out` are added to."""
    if not ways:
        return chosen
    if cost[chosen] * steps < _LONG:
        out["runtimes"] = f"{steps} steps take less than {_LONG / 60:.0f} minutes, which would hardly repay making them"
        return chosen
    made: dict[Speed, Step] = {}
    spent: dict[Speed, float] = {}
    for name, make in ways.items():
        began, speed = time.perf_counter(), Speed(runtime=name)
        try:
            made[speed] = make()
        except _Unfit as problem:
            out[name] = str(problem)
        spent[speed] = time.perf_counter() - began
    taken = _measured({chosen: runs[chosen], **made}, device)
    cost |= {speed: taken[speed] for speed in made}
    best = min(taken, key=lambda s: taken[s])
    saved = (taken[chosen] - taken[best]) * steps
    if best == chosen or taken[best] >= _GAIN * taken[chosen]:
        return chosen
    if saved < _REPAID * spent[best]:
        out[str(best)] = f"making it takes {spent[best]:.0f} s and saves {saved:.0f} s"
        return chosen
    return best


def _measured(runs: dict[Speed, Step], device: torch.device) -> dict[Speed, float]:
    """Median seconds of each: interleaved rounds within a time budget; the first round of each warms up and is not counted."""
    taken: dict[Speed, list[float]] = {speed: [] for speed in runs}
    started = time.monotonic()
    for number in range(_ROUNDS + 1):
        for speed, run in runs.items():
            begin = time.perf_counter()
            run()
            if device.type == "cuda":  # kernels on a GPU run behind the program's back
                torch.cuda.synchronize()
            if number:
                taken[speed].append(time.perf_counter() - begin)
        if number and time.monotonic() - started > _BUDGET_SECONDS:
            break
    return {speed: median(times) for speed, times in taken.items()}
