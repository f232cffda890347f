"""Features by stage of any vision model: where to tap it, and what shape comes out.

timm's `feature_info` names the modules (CNN stages, transformer blocks); models without it are tapped where the stride changes, found by
hooks during one traced forward pass. Widths are read from that pass, so pruned models are right too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgekd.errors import UsageError

STAGES = 4
_BATCH = 2  # what merges windows or heads into the batch has another length
# Block boundaries of a uniform network: those of a 2-2-6-2 hierarchy, which gives blocks 1, 3, 9 and 11 of twelve (OFA's taps).
_BOUNDARIES = (1 / 6, 1 / 3, 5 / 6, 1.0)


@dataclass(frozen=True)
class Tap:
    """One place where features are read."""

    module: str
    layout: str  # NCHW, NHWC (Swin) or NLC (tokens)
    channels: int
    grid: tuple[int, int]  # height and width in positions
    prefix: int = 0  # class and register tokens before the patch tokens


class Seen(NamedTuple):
    """What one run of a tapped model gave."""

    logits: Tensor
    taps: tuple[Tensor, ...]
    embedding: Tensor | None  # (batch, width), what the classifier reads


class TappedModel:
    """Runs a model once and returns logits, the features at its taps and, where its classifier is named, what that reads."""

    def __init__(self, model: nn.Module, taps: tuple[Tap, ...], classifier: str | None = None):
        self.model, self.taps, self._seen, self._read = model, taps, {}, []  # type: ignore[var-annotated]
        self._batch = 0
        modules = dict(model.named_modules())
        self._handles = [modules[t.module].register_forward_hook(self._keep(t.module)) for t in taps]
        if classifier is not None:
            self._handles.append(modules[classifier].register_forward_pre_hook(self._read_by_classifier))

    def __call__(self, images: Tensor) -> Seen:
        self._seen.clear()
        self._read.clear()
        self._batch = len(images)
        logits = self.model(images)
        return Seen(logits, tuple(self._seen[t.module] for t in self.taps), self._read[-1] if self._read else None)

    def close(self) -> None:
        """Removes the hooks; the model is as it was."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if (features := _features(output, self._batch)) is not None:
                self._seen[name] = features

        return hook

    def _read_by_classifier(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._read.append(inputs[0].flatten(1))


def stage_taps(model: nn.Module, image_size: int) -> tuple[Tap, ...]:
    """Up to four taps, shallow to deep."""
    shapes = _trace(model, image_size)
    info = _feature_modules(model)
    named = [name for name in dict.fromkeys(info) if name in shapes]
    if not named:  # a model without timm's interface
        return tuple(_by_stride(model, shapes)[-STAGES:])
    taps = [_tap(model, name, shapes[name]) for name in named]
    if len({t.grid for t in taps}) == 1:  # uniform: ViT, Mixer
        return tuple(taps[i] for i in _uniform(len(taps)))
    deepest = {t.grid: t for t in taps}  # a hierarchy: the last tap at each resolution
    last = list(deepest.values())
    return tuple((last if len(last) >= STAGES else taps)[-STAGES:])


def classifier_of(model: nn.Module, image_size: int, classes: int) -> tuple[str, int]:
    """Name and input width of the layer that gives the logits: the last linear one, or convolution of one position, with as many outputs as classes.

    Raises UsageError for a model that ends in anything else.
    """
    ran: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.shape[1:].numel() == output.shape[1] == classes and inputs[0].shape[1:].numel() == inputs[0].shape[1]:
                ran.append((name, inputs[0].shape[1]))

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n and isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        with torch.no_grad(), _evaluating(model):
            model(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise UsageError(
            f"{type(model).__name__} does not end in a linear classifier, so there is no embedding to compare",
            hint="methods that compare logits only: kd, dkd, dist",
        )
    return ran[-1]


def patch_tokens(features: Tensor, tap: Tap) -> Tensor:
    """Features of any layout as (batch, positions, channels), row by row, without class and register tokens."""
    if tap.layout == "NCHW":
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, 2) if tap.layout == "NHWC" else features[:, tap.prefix :]


def feature_map(features: Tensor, tap: Tap) -> Tensor:
    """Features of any layout as (batch, channels, height, width), without class and register tokens."""
    if tap.layout == "NCHW":
        return features
    return patch_tokens(features, tap).transpose(1, 2).reshape(len(features), tap.channels, *tap.grid)


def family(taps: tuple[Tap, ...], model: nn.Module) -> str:
    """cnn, swin (hierarchical tokens), vit (uniform tokens with attention) or mlp (uniform tokens without, or nothing with positions)."""
    if not taps:
        return "mlp"
    if taps[-1].layout == "NCHW":
        return "cnn"
    if taps[-1].layout == "NHWC" or len({t.grid for t in taps}) > 1:
        return "swin"
    return "vit" if any(_attends(m) for m in model.modules()) else "mlp"


def _attends(module: nn.Module) -> bool:
    return "att" in type(module).__name__.lower() or hasattr(module, "num_heads")


def _uniform(depth: int) -> list[int]:
    picks = sorted({max(round(depth * b) - 1, 0) for b in _BOUNDARIES})
    return picks if len(picks) == min(STAGES, depth) else list(range(depth))[-STAGES:]


def _feature_modules(model: nn.Module) -> list[str]:
    info = getattr(model, "feature_info", None)
    if info is None:
        return []
    rows = info if isinstance(info, list) else info.get_dicts()
    return [str(row["module"]) for row in rows if isinstance(row, dict) and "module" in row]


def _trace(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the features that modules give, in execution order."""
    shapes: dict[str, tuple[int, ...]] = {}
    with _hooks(model, shapes), torch.no_grad(), _evaluating(model):
        model(torch.zeros(_BATCH, 3, image_size, image_size, device=next(model.parameters()).device))
    return shapes


def _features(output: object, batch: int) -> Tensor | None:
    """The features among what a module gives: a tensor of the batch with positions; of several (with the class token, sizes, skips) the first."""
    if isinstance(output, Tensor):
        return output if output.ndim in (3, 4) and len(output) == batch else None
    found = (_features(part, batch) for part in output) if isinstance(output, tuple | list) else ()
    return next((f for f in found if f is not None), None)


@contextmanager
def _hooks(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if (features := _features(output, _BATCH)) is not None:
                shapes.pop(name, None)  # keeps the order of the last call
                shapes[name] = tuple(features.shape)

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _tap(model: nn.Module, name: str, shape: tuple[int, ...]) -> Tap:
    """Images are square, and so are grids: that tells layouts apart, and tokens before the patches from patches."""
    if len(shape) == 3:
        own = int(getattr(model, "num_prefix_tokens", 0))
        # Some models (CaiT, XCiT) join the class token after these blocks only, some (CoaT, CrossViT) do not say that they have one.
        prefix = next((n for n in (own, 0, 1) if math.isqrt(shape[1] - n) ** 2 == shape[1] - n), own)
        side = math.isqrt(shape[1] - prefix)
        return Tap(name, "NLC", shape[2], (side, (shape[1] - prefix) // max(side, 1)), prefix)
    if getattr(model, "output_fmt", None) == "NHWC" or shape[1] == shape[2] != shape[3]:
        return Tap(name, "NHWC", shape[3], (shape[1], shape[2]))
    return Tap(name, "NCHW", shape[1], (shape[2], shape[3]))


def _by_stride(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[Tap]:
    """The last module at each resolution, where the resolution changes; of a network with one resolution, blocks as of a uniform one."""
    inside = [f"{name}." for name, module in model.named_modules() if name and "att" in type(module).__name__.lower()]
    taps = [_tap(model, name, shape) for name, shape in shapes.items() if not name.startswith(tuple(inside))]
    taps = [t for t in taps if t.grid[0] == t.grid[1] > 1]
    last: dict[int, Tap] = {}
    for tap in taps:
        last.pop(tap.grid[0], None)
        last[tap.grid[0]] = tap
    if len(last) != 1:
        return list(last.values())
    [end] = last.values()
    blocks = [t for t in taps if t.module.rpartition(".")[2].isdigit() and (t.layout, t.channels) == (end.layout, end.channels)]
    return [blocks[i] for i in _uniform(len(blocks))] if blocks else [end]
