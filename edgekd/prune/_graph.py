"""Torch-Pruning's dependency graph, asked for groups and translated to names and positions.

It traces a copy; every position refers to the uncut model, so that any number of groups can be cut at once, in any copy of it.
Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from typing import TYPE_CHECKING, Any

from edgekd.errors import StructureRefused
from edgekd.prune._group import Group, Member, Role

if TYPE_CHECKING:
    from torch import Tensor, nn


class Graph:
    """Which tensors of a model are tied together; example_input: (batch, channels, height, width).

    Raises StructureRefused where the model cannot be traced.
    """

    def __init__(self, model: nn.Module, example_input: Tensor):
        import torch  # heavy, as are all imports below: this folder is listed without torch
        import torch_pruning

        traced = copy.deepcopy(model).eval().requires_grad_(True)  # tracing needs gradients and changes the mode
        self._ops = torch_pruning.ops
        self._owners: dict[str, Any] = {**dict(model.named_modules()), **dict(model.named_parameters())}
        self._names: dict[Any, str] = {owner: name for name, owner in traced.named_modules()}
        self._names.update({owner: name for name, owner in traced.named_parameters()})
        self._model_name = type(model).__name__
        self._graph: Any = torch_pruning.DependencyGraph()
        with torch.enable_grad(), self._refusing():
            self._graph.build_dependency(traced, example_input, verbose=False)
        self._roots = {name: layer for layer, name in self._names.items() if self._is_root(layer)}

    def roots(self) -> list[str]:
        """Names of the layers that have an output width, in network order."""
        return list(self._roots)

    def groups(self) -> Iterator[Group]:
        """Every width that can be cut unit by unit, but the model's own output."""
        seen: set[str] = set()
        for root in self._roots:
            if root not in seen and (group := self.group(root)):
                seen.update(member.name for member in group.members if member.role in ("out", "depthwise"))
                yield group

    def group(self, root: str) -> Group | None:
        """The group of one layer's output, or None where its units cannot be cut one by one."""
        layer = self._roots[root]
        width = int(self._graph.get_out_channels(layer))
        items = self._ask(layer, list(range(width)))
        if width < 2 or self._reaches_output(items):
            return None
        members = [member for item in self._tensors(items) if (member := self._member(item, width))]
        if len(members) < len(self._tensors(items)) or not all(self._alone(layer, unit, members) for unit in (0, width - 1)):
            return None
        blocks = lcm(*(_blocks(member) for member in members))
        aligned = all(_is_identity(member) for member in members if _blocks(member) > 1)
        return Group(root, width, tuple(members), blocks) if aligned else None

    def _is_root(self, layer: Any) -> bool:
        return layer in self._graph.module2node and isinstance(layer, (self._ops.TORCH_CONV, self._ops.TORCH_LINEAR))

    def _ask(self, layer: Any, units: list[int]) -> list[Any]:
        """All that goes with these output units of a layer, the steps between the layers included."""
        prune = self._graph.get_pruner_of_module(layer).prune_out_channels
        with self._refusing():
            return list(self._graph.get_pruning_group(layer, prune, units).items)

    def _reaches_output(self, items: list[Any]) -> bool:
        """True where the units are outputs of the model: classes must stay."""
        return any(not item.dep.target.outputs and self._graph.is_out_channel_pruning_fn(item.dep.handler) for item in items)

    def _tensors(self, items: list[Any]) -> list[Any]:
        owners = [(item, item.dep.target.module) for item in items]
        return [
            item for item, owner in owners if owner in self._names and getattr(owner, "num_parameters", 0) != 1
        ]  # one PReLU slope for all

    def _member(self, item: Any, width: int) -> Member | None:
        import torch

        if None in item.root_idxs:
            return None  # heads that share keys: the tracer does not say which unit owns a place
        places: list[list[int]] = [[] for _ in range(width)]
        for place, unit in zip(item.idxs, item.root_idxs, strict=True):
            places[unit].append(place)
        role, node = self._role(item.dep), item.dep.target
        if role is None or len({len(found) for found in places}) > 1 or not places[0]:
            return None
        size = self._graph.get_in_channels(node) if role == "in" else self._graph.get_out_channels(node)
        if len(set(item.idxs)) < len(item.idxs) or not set(item.idxs) <= set(range(size)):
            return None  # the tracer lost count
        name = self._names[node.module]
        return Member(name, role, torch.tensor(places), self._owners[name], node.pruning_dim if role == "tensor" else 0)

    def _role(self, dep: Any) -> Role | None:
        """How the member's axis is cut, or None where edgekd cannot."""
        layer, kinds = dep.target.module, self._ops
        if isinstance(layer, kinds.TORCH_PARAMETER):
            return "tensor"
        if isinstance(layer, (kinds.TORCH_BATCHNORM, kinds.TORCH_LAYERNORM, kinds.TORCH_GROUPNORM, kinds.TORCH_INSTANCENORM)):
            return "norm" if len(getattr(layer, "normalized_shape", (0,))) == 1 else None
        if not isinstance(layer, (kinds.TORCH_CONV, kinds.TORCH_LINEAR)) or getattr(layer, "transposed", False):
            return None
        if getattr(layer, "groups", 1) == getattr(layer, "out_channels", 0) > 1:
            return "depthwise" if layer.in_channels == layer.out_channels else None
        return "out" if self._graph.is_out_channel_pruning_fn(dep.handler) else "in"

    def _alone(self, layer: Any, unit: int, members: list[Member]) -> bool:
        """True if the graph ties exactly the places listed for this unit to it; a gated MLP, say, ties two units to one."""
        asked = {(self._names[i.dep.target.module], self._role(i.dep)): set(i.idxs) for i in self._tensors(self._ask(layer, [unit]))}
        return asked == {(member.name, member.role): set(member.positions[unit].tolist()) for member in members}

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever the tracer trips over becomes a refusal."""
        try:
            yield
        except Exception as error:
            raise StructureRefused(
                f"the layers of this model cannot be traced ({type(error).__name__}: {error})",
                where=self._model_name,
                hint="set prune.scope to internal",
            ) from error


def _blocks(member: Member) -> int:
    """In how many equal parts a grouped convolution or GroupNorm splits the axis."""
    if member.role in ("in", "out"):
        return int(getattr(member.owner, "groups", 1))
    return int(getattr(member.owner, "num_groups", 1)) if member.role == "norm" else 1


def _is_identity(member: Member) -> bool:
    return member.positions.shape[1] == 1 and member.positions.flatten().tolist() == list(range(len(member.positions)))
