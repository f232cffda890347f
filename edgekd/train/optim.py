"""Optimizer, learning rate and averaged weights, each a function of the config and the step."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from edgekd.train.config import TrainConfig


def make_optimizer(modules: Iterable[nn.Module], cfg: TrainConfig) -> Optimizer:
    """AdamW or Nesterov SGD; vectors (norms, biases) are not decayed."""
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if cfg.optimizer == "sgd":
        return SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, foreach=True)
    return AdamW(groups, lr=cfg.lr, foreach=True)


def learning_rate(cfg: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to min_lr."""
    warm = min(cfg.warmup_epochs / cfg.epochs, 0.1) * steps
    if step < warm:
        return cfg.lr * (step + 1) / (warm + 1)
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
