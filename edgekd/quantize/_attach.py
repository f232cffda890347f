"""Quantizers in and on a model: found sites, attached before training, baked into plain weights on their grid afterwards.

Weights get theirs as a parametrization, so the layer and all code around it stay as they are; inputs get theirs by a hook. Layers that read the
same tensor share one quantizer. A batch norm stays live while training. Jacob et al. 2018, section 3.2, round the folded weight g*w and divide by g
again; with one step a channel that is the same function, since FQ(g*w; |g|*s) = g * FQ(w; s), so w itself is rounded here and the exporter, which
multiplies each channel by its g, keeps it on the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgekd.errors import InputRefused
from edgekd.quantize._steps import Quantizer, initial_step

_HOLDER = "input_quantizers"
_LAYERS = (nn.Conv2d, nn.Linear)


@dataclass
class Site:
    """A layer with weights, in the order of execution, and what flows into it."""

    name: str
    module: nn.Module
    source: str = ""  # the first layer that read the same tensor
    mean_abs: float = 0.0
    largest: float = 0.0
    smallest: float = 0.0


@dataclass(frozen=True)
class Bits:
    """Widths of one layer."""

    weights: int
    inputs: int


@dataclass
class Grid:
    """What training chose: integer codes and steps a layer, and the range of each input."""

    codes: dict[str, Any] = field(default_factory=dict)  # layer -> int8 (out, ...)
    steps: dict[str, Any] = field(default_factory=dict)  # layer -> float32 (out,)
    inputs: dict[str, tuple[float, int, int]] = field(default_factory=dict)  # layer -> step, low, high


def sites(model: nn.Module, batches: Sequence[Tensor]) -> list[Site]:
    """Layers in the order in which a batch passes them, with statistics of their inputs; the model's mode is restored."""
    found: dict[str, Site] = {}
    seen: list[dict[int, str]] = [{}]
    alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            site = found.setdefault(name, Site(name, module))
            alive.append(args[0])
            site.source = seen[0].setdefault(id(args[0]), name)
            site.mean_abs += float(x.abs().mean()) / len(batches)
            site.largest, site.smallest = max(site.largest, float(x.max())), min(site.smallest, float(x.min()))

        return hook

    was = model.training
    handles = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if isinstance(m, _LAYERS)]
    try:
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch)
                seen[0] = {}
                alive.clear()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was)
    if not found:
        raise InputRefused(
            "the model has no convolution and no linear layer", where=type(model).__name__, hint="another quantizer, or none"
        )
    return list(found.values())


def attach(model: nn.Module, found: Sequence[Site], bits: Mapping[str, Bits], *, learned: bool, unsigned_high: int) -> None:
    """Quantizers on the weights and inputs of every site; `unsigned_high` is the largest code of an 8-bit input that is never negative."""
    holder = nn.ModuleDict()
    for site in found:
        low, high = signed(bits[site.name].weights)
        weight: Tensor = site.module.weight  # type: ignore[assignment]
        magnitude = weight.detach().abs().flatten(1)
        step = _first(magnitude.mean(1), magnitude.amax(1), high, learned)
        parametrize.register_parametrization(site.module, "weight", Quantizer(step, low, high, learned=learned, follows=False))
        key = site.source.replace(".", "-")
        if key not in holder:
            low, high = signed(bits[site.name].inputs, full=True)
            if site.smallest >= 0:
                low, high = 0, unsigned_high if bits[site.name].inputs == 8 else 2 ** bits[site.name].inputs - 1
            reach = max(site.largest, -site.smallest)
            step = _first(torch.tensor([site.mean_abs]), torch.tensor([reach]), high, learned)
            holder[key] = Quantizer(step, low, high, learned=learned, follows=True)
        site.module.register_forward_pre_hook(_Input(holder[key]))
    setattr(model, _HOLDER, holder)


def _first(mean_abs: Tensor, reach: Tensor, high: int, learned: bool) -> Tensor:
    """The step to start from. That of LSQ is meant for few bits; at 8 it spans many times the largest value, so it is no wider than needed."""
    needed = (reach / high).clamp_min(1e-8)
    return torch.minimum(initial_step(mean_abs, high), needed) if learned else needed


class _Input:
    """The hook that rounds a layer's input; an object, so that a deep copy of the model gets its own."""

    def __init__(self, quantizer: nn.Module):
        self.quantizer = quantizer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.quantizer(args[0]), *args[1:])


def bake(model: nn.Module) -> Grid:
    """Plain weights that lie on the grid, no quantizer left; returns the grid."""
    grid = Grid()
    for name, module in model.named_modules():
        hooks = module._forward_pre_hooks
        for number, hook in [(n, h) for n, h in hooks.items() if isinstance(h, _Input)]:
            quantizer: Any = hook.quantizer
            grid.inputs[name] = (float(quantizer.step.detach().clamp_min(1e-8)), quantizer.low, quantizer.high)
            del hooks[number]
        if parametrize.is_parametrized(module, "weight"):
            quantizer = module.parametrizations.weight[0]
            with torch.no_grad():
                raw = module.parametrizations.weight.original
                steps = quantizer.steps(raw)
                grid.codes[name] = (raw / steps).round().clamp(quantizer.low, quantizer.high).to(torch.int8).cpu().numpy()
                grid.steps[name] = steps.flatten().expand(len(raw)).contiguous().cpu().numpy()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    delattr(model, _HOLDER)
    return grid


def round_inputs(model: nn.Module, inputs: Mapping[str, Sequence[float]]) -> None:
    """A baked model computes as it was trained: inputs (layer -> step, low, high) are rounded again."""
    modules = dict(model.named_modules())
    for layer, (step, low, high) in inputs.items():
        quantizer = Quantizer(torch.tensor([float(step)]), int(low), int(high), learned=False, follows=True)
        modules[layer].register_forward_pre_hook(_Input(quantizer.eval()))


def signed(bits: int, *, full: bool = False) -> tuple[int, int]:
    """Bounds of a signed grid; 8-bit weights leave out the lowest code unless `full`, as runtimes expect."""
    return -(2 ** (bits - 1)) + (bits == 8 and not full), 2 ** (bits - 1) - 1
