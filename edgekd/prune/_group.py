"""A prunable width and the tensors it ties together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["out", "in", "depthwise", "norm", "tensor"]


@dataclass(frozen=True)
class Member:
    """One tensor axis that follows a width: `positions` (units, n) are the places along it that belong to each unit."""

    name: str  # of the module, or of the parameter for a bare tensor
    role: Role
    positions: Tensor
    owner: Any = field(repr=False)  # that module or parameter
    axis: int = 0  # of a bare tensor; the role says it for a module

    def slices(self, *, grad: bool = False) -> Tensor | None:
        """Weights, or their gradients, of every unit: (units, elements). None for bare tensors, which are not scored."""
        weight = None if self.role == "tensor" else self.owner.weight
        tensor = weight.grad if grad and weight is not None else weight
        if tensor is None:
            return None
        rows = _columns_first(tensor.detach(), getattr(self.owner, "groups", 1)) if self.role == "in" else tensor.detach()
        return rows[self.positions.to(rows.device)].flatten(1)


@dataclass(frozen=True)
class Group:
    """A width named after its first layer, and everything that shrinks with it.

    blocks: grouped convolutions and GroupNorm must lose the same units in each of so many equal parts.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    blocks: int = 1


def _columns_first(weight: Tensor, groups: int) -> Tensor:
    """(inputs, ...): input i of a grouped convolution is column i mod (inputs / groups) of the filters of its own part."""
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
