"""Which widths of a model can be pruned: by the names their family uses, by a rule, or all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from edgekd.errors import StructureRefused, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.prune._group import Group

Scope = Literal["auto", "internal", "all"]

# Asking for one named layer takes milliseconds on any model; listing every group of some transformers takes minutes and 10 GB.
_NAMED_ROOTS = ("mlp.fc1", "mlp_tokens.fc1", "mlp_channels.fc1", "mlp.fc1.conv", "mlp.ln1.linear", "pw_exp.conv")
_TOKEN_MIXERS = ("mlp_tokens", "linear_tokens", "sgu")
_NOT_BLOCKS = ("Sequential", "ModuleList", "ModuleDict", "Stage")


def find_groups(model: nn.Module, example_input: Tensor, scope: Scope = "auto") -> tuple[list[Group], str]:
    """All prunable widths in network order, and the scope used; example_input: (batch, channels, height, width).

    internal: widths inside one block (MLP hidden, bottleneck, expansion). all: residual streams as well, convolutional nets only.
    auto: all where it is possible, else internal. Raises StructureRefused where nothing can be pruned.
    """
    from edgekd.prune._graph import Graph  # heavy: traces with torch

    mixer = example_input.ndim > 2 and _mixes_tokens(model)  # rows of features have no tokens
    if scope == "all" and mixer:
        raise UsageError("the streams of a model that mixes tokens cannot be pruned", where=type(model).__name__, expected="scope internal")
    graph = Graph(model, example_input)
    if scope != "internal" and not mixer:
        try:
            return _some(graph.groups(), model), "all"
        except StructureRefused:
            if scope == "all":
                raise
    named = [graph.group(root) for root in graph.roots() if root.endswith(_NAMED_ROOTS)]
    found = [group for group in named if group] or (group for group in graph.groups() if _is_internal(group, model))
    return _some(found, model), "internal"


def _some(groups: Iterable[Group], model: nn.Module) -> list[Group]:
    listed = list(groups)
    if not listed:
        raise StructureRefused("no width of this architecture can be pruned", where=type(model).__name__, hint="leave out the prune stage")
    return listed


def _mixes_tokens(model: nn.Module) -> bool:
    """True with attention or a token MLP, and for nets whose only spatial convolution is the patch embedding."""
    from torch import nn

    modules = list(model.named_modules())
    if any(hasattr(module, "num_heads") or name.endswith(_TOKEN_MIXERS) for name, module in modules):
        return True
    return sum(isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 for _, module in modules) < 2


def _is_internal(group: Group, model: nn.Module) -> bool:
    """The members' lowest common module is a block and reads the width; no attention and no normalisation over the width inside."""
    from torch import nn

    if not any(member.role == "in" for member in group.members):
        return False
    if any(member.role == "norm" and isinstance(member.owner, nn.LayerNorm | nn.GroupNorm) for member in group.members):
        return False
    path = _common([member.name for member in group.members])
    inside = [name for member in group.members for name in _ancestors(member.name) if len(name) > len(path)]
    if any(hasattr(module, "num_heads") or "RmsNorm" in type(module).__name__ for module in map(model.get_submodule, inside)):
        return False
    return path != "" and not type(model.get_submodule(path)).__name__.endswith(_NOT_BLOCKS)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _common(names: list[str]) -> str:
    """Path of the lowest module that holds all of these; "" for the model itself."""
    shared = [*reversed(_ancestors(names[0]))]
    return next((path for path in shared if all(name.startswith(f"{path}.") for name in names)), "")
