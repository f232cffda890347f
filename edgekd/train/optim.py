"""Optimizer, learning rate and averaged weights, each a function of the config and the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from edgekd.train.config import LearnConfig


def make_optimizer(modules: Iterable[nn.Module], cfg: LearnConfig) -> Optimizer:
    """Vectors (norms, biases) are not decayed."""
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if cfg.optimizer == "dot":
        return Dot(groups, lr=cfg.lr, momentum=cfg.momentum, delta=cfg.dot_delta)
    if cfg.optimizer == "sgd":
        return SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, foreach=True)
    return (Adam if cfg.optimizer == "adam" else AdamW)(groups, lr=cfg.lr, foreach=True)


class Dot(Optimizer):
    """SGD with two momentum buffers: the gradient of distillation is remembered for longer than that of the labels.

    `add_task` takes the gradients of the label loss; those of all other terms are in `.grad`, as ever. A parameter that only one of the two reaches
    (projectors) has plain momentum. Source: Zhao et al. 2023, "DOT: A Distillation-Oriented Trainer" (arXiv 2307.08436), section 4; authors' code:
    no Nesterov, weight decay in the buffer of the labels.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, delta: float = 0.075, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_task(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients of the label loss, in the order of `parameters`, to those of earlier parts of the batch."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                held = self.state[p].get("task")
                self.state[p]["task"] = gradient.detach().clone() if held is None else held + gradient

    def task_gradients(self) -> list[Tensor]:
        """Of the label loss, a parameter each that has one."""
        return [held for p in self.parameters if (held := self.state[p].get("task")) is not None]

    def gradients(self) -> list[Tensor]:
        """Of the sum of all terms, a parameter each that has one."""
        sums = []
        for p in self.parameters:
            found = [g for g in (self.state[p].get("task"), p.grad) if g is not None]
            sums += [sum(found[1:], start=found[0])] if found else []
        return sums

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Clips both alike: their sum is what is too large."""
        for p in self.parameters:
            for gradient in (self.state[p].get("task"), p.grad):
                if gradient is not None:
                    gradient.mul_(factor)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        task, other = state.get("task"), p.grad
        if task is None and other is None:
            return
        delta = group["delta"] if task is not None and other is not None else 0.0
        decay = group["weight_decay"] * p
        for name, gradient, momentum in (("v_task", task, group["momentum"] - delta), ("v_kd", other, group["momentum"] + delta)):
            if gradient is None:
                continue
            if name == "v_task" or task is None:
                gradient = gradient + decay
            held = state.get(name)
            state[name] = gradient.clone() if held is None else held.mul_(momentum).add_(gradient)
            p.sub_(state[name], alpha=group["lr"])
        state.pop("task", None)


def learning_rate(cfg: LearnConfig, step: int, steps: int) -> float:
    """Linear warm-up, then lr, or a cosine from it to min_lr."""
    warm = min(cfg.warmup_epochs / cfg.epochs, 0.1) * steps
    if step < warm:
        return cfg.lr * (step + 1) / (warm + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - warm) / max(steps - warm, 1)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Exponential moving average of weights and buffers; ramps up so that early steps do not linger."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, theirs = self.model.state_dict(), model.state_dict()
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, tensor in mine.items():
            if tensor.is_floating_point():
                floats[0].append(tensor)
                floats[1].append(theirs[name])
            else:
                tensor.copy_(theirs[name])
        torch._foreach_lerp_(floats[0], floats[1], share)
