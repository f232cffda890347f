"""DOT's optimizer against the golden values of its authors' code (methods/vision2.md, section 17)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekd.train.config import TrainConfig
from edgekd.train.optim import Dot


def seq(n: int, a: float, b: float = 0.0) -> Tensor:
    return torch.sin(a * torch.arange(n, dtype=torch.float64) + b)


def test_three_steps_give_the_golden_values() -> None:
    p = nn.Parameter(seq(4, 0.5))
    dot = Dot([p], lr=0.1, momentum=0.9, delta=0.075, weight_decay=5e-4)
    for k in range(3):
        p.grad = seq(4, 0.7, 0.2 * k)
        dot.add_task([seq(4, 0.3, 0.1 * k)])
        dot.step()
    assert p.detach().tolist() == pytest.approx([-0.1162640661667, -0.1460381617328, -0.07260578995373, 0.09863954310495], rel=1e-9)


@pytest.mark.parametrize("which", ["labels", "distillation"])
def test_a_parameter_that_one_loss_reaches_has_plain_momentum(which: str) -> None:
    mine, theirs = nn.Parameter(seq(4, 0.5)), nn.Parameter(seq(4, 0.5))
    dot, sgd = Dot([mine], lr=0.1, weight_decay=5e-4), torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for k in range(4):
        theirs.grad = seq(4, 0.7, 0.2 * k)
        if which == "labels":
            dot.add_task([theirs.grad])
        else:
            mine.grad = theirs.grad.clone()
        dot.step()
        sgd.step()
    assert torch.allclose(mine, theirs, rtol=1e-12)


def test_parts_of_a_batch_add_up_and_clipping_scales_both() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    dot = Dot([p], lr=1.0)
    dot.add_task([seq(4, 0.3)])
    dot.add_task([seq(4, 0.4)])
    p.grad = seq(4, 0.7)
    wanted = seq(4, 0.3) + seq(4, 0.4) + seq(4, 0.7)
    assert torch.allclose(dot.gradients()[0], wanted)
    dot.scale(0.5)
    dot.step()
    assert torch.allclose(p.detach(), -0.5 * wanted)
    assert "task" not in dot.state[p]


def test_momenta_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves the range from 0 to 1"):
        TrainConfig(optimizer="dot", momentum=0.95)
