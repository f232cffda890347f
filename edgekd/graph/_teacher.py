"""What a teacher says of every node, made fit to learn from: sharpened or softened on val, and refused where it says nothing.

The best epoch on val may be one of the first, right and nearly uniform: its softmax teaches the uniform distribution. Dividing its logits by one temperature
that fits val (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2) mends that without changing a decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.data.nodes import Nodes
from edgekd.data.rng import seed_of
from edgekd.errors import InputRefused, UsageError
from edgekd.graph._kl import entropy
from edgekd.graph._run import features_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLAT = 0.95  # mean entropy over that of the uniform distribution, above which there is nothing to learn
_RANGE, _STEPS = (-4.0, 4.0), 81  # of log T, searched twice


@dataclass(frozen=True)
class Calibration:
    """temperature: what logits are divided by; entropy: mean over all nodes afterwards, as a part of the largest possible."""

    temperature: float
    entropy: float


def calibrate(logits: NDArray[np.float32], labels: NDArray[np.int64], where: str) -> tuple[NDArray[np.float32], Calibration]:
    """Logits (nodes, classes) of all nodes over the temperature that fits the labelled ones of val; `labels` is UNLABELLED elsewhere.

    Raises InputRefused for a teacher that stays flat.
    """
    known = labels >= 0
    z, y = torch.from_numpy(logits[known]).double(), torch.from_numpy(labels[known])
    centre, width = 0.0, _RANGE[1]
    for _ in range(2):
        grid = torch.linspace(centre - width, centre + width, _STEPS, dtype=torch.float64)
        losses = torch.stack([F.cross_entropy(z / t.exp(), y) for t in grid])
        centre, width = float(grid[int(losses.argmin())]), 2 * width / (_STEPS - 1)
    temperature = math.exp(centre)
    found = (logits / np.float32(temperature)).astype(np.float32)
    part = float(entropy(torch.from_numpy(found).double()).mean()) / math.log(logits.shape[1])
    if part > FLAT:
        raise InputRefused(
            f"its answers are nearly uniform (entropy {part:.0%} of the largest), even at the temperature that fits val: nothing can be learned from it",
            where=where,
            expected=f"at most {FLAT:.0%}",
            hint="train it longer: -o teacher.train.patience=200; or check its features and labels; -o teacher.calibrated=false goes on",
        )
    return found, Calibration(temperature, part)


def hidden_of(model: nn.Module, x: Tensor, edges: Tensor | None) -> Tensor:
    """(nodes, width) what a model's last hidden layer gives before norm and ReLU, in eval mode. Raises UsageError for one that has none."""
    *_, last = getattr(model, "body", None) or (None,)
    if last is None:
        raise UsageError(
            "the teacher has no hidden layer", where="teacher.args.layers", expected="2 or more", hint="-o teacher.args.layers=2"
        )
    found: list[Tensor] = []
    hook = last.register_forward_hook(lambda _module, _args, out: found.append(out))
    with torch.no_grad():
        model.eval()(x, *(() if edges is None else (edges,)))
    hook.remove()
    return found[0].float()


def noisy_entropy(model: nn.Module, nodes: Nodes, edges: Tensor, temperature: float, seed: int) -> Tensor:
    """(nodes,) entropies of a graph model's answers with one draw of unit noise on the features (KRD, equation 5)."""
    generator = torch.Generator().manual_seed(seed_of(seed, "noise") % 2**63)
    x = features_of(nodes)
    x = x.to_dense() if x.layout != torch.strided else x
    with torch.no_grad():
        said: Any = model.eval()(x + torch.randn(x.shape, generator=generator), edges)
    return entropy(said.float() / temperature)
