"""Cuts units out of the tensors of a model, each tensor once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.prune._group import Group, Member

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def cut(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Sequence[int]]) -> None:
    """Keeps only these units of each group, in place; groups not named stay whole. The groups may come from any copy of the model."""
    gone: dict[tuple[str, str], tuple[Member, set[int]]] = {}
    for group in groups:
        lost = sorted(set(range(group.width)) - set(kept.get(group.name, range(group.width))))
        for member in group.members if lost else ():
            _, places = gone.setdefault((member.name, member.role), (member, set()))
            places.update(member.positions[lost].flatten().tolist())
    for member, places in gone.values():
        _cut_member(model, member, places)


def _cut_member(model: nn.Module, member: Member, places: set[int]) -> None:
    if member.role == "tensor":
        path, _, name = member.name.rpartition(".")
        return _shrink(model.get_submodule(path), (name,), member.axis, places)
    layer: Any = model.get_submodule(member.name)
    if member.role == "in":
        # Every part of a grouped convolution loses the same inputs, so the first part speaks for all.
        part = layer.weight.shape[1]
        _shrink(layer, ("weight",), 1, {place for place in places if place < part})
        return _narrow(layer, ("in_channels", "in_features"), len(places))
    if member.role == "norm":
        _shrink(layer, _NORM_TENSORS, 0, places)
        if hasattr(layer, "normalized_shape"):
            layer.normalized_shape = (layer.normalized_shape[0] - len(places),)
        return _narrow(layer, ("num_features", "num_channels"), len(places))
    _shrink(layer, ("weight", "bias"), 0, places)
    _narrow(layer, ("out_channels", "out_features"), len(places))
    if member.role == "depthwise":
        _narrow(layer, ("in_channels", "groups"), len(places))
    return None


def _shrink(module: nn.Module, names: Sequence[str], axis: int, places: set[int]) -> None:
    """Takes the places out of parameters and buffers, those that the module has."""
    from torch import nn  # heavy

    for name in names:
        tensor: Tensor | None = getattr(module, name, None)
        if tensor is None:
            continue
        keep = [place for place in range(tensor.shape[axis]) if place not in places]
        rest = tensor.detach().index_select(axis, tensor.new_tensor(keep).long())
        setattr(module, name, nn.Parameter(rest, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rest)


def _narrow(module: nn.Module, names: Sequence[str], by: int) -> None:
    """Lowers the width attributes that the module has."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, getattr(module, name) - by)
