"""A pruned model as data: what differs from the architecture it came from, in JSON, and how to apply it to a fresh one.

The diff names modules and holds numbers: never code, never a value larger than the architecture's own, so that a hostile one can
neither run anything nor ask for memory. Weights are not part of it; persistent tensors of another shape start at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, ValidationError

from edgekd.config import Config
from edgekd.errors import StructureRefused

if TYPE_CHECKING:
    from torch import Tensor, nn

_MAX_MODULES, _MAX_ENTRIES, _MAX_ITEMS, _MAX_DIMS, _MAX_NAME = 20_000, 64, 65_536, 8, 256
_SKIPPED = ("training", "fused_attn")  # a mode, and a property of the machine
_CACHE_SUFFIX = "_cache"  # filled by forward, empty in a fresh model

_Name = Annotated[str, Field(max_length=_MAX_NAME)]
_Number = StrictBool | StrictInt | StrictFloat
_Items = Annotated[list[_Number | Annotated[list[_Number], Field(max_length=_MAX_DIMS)]], Field(max_length=_MAX_ITEMS)]
_Shape = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(max_length=_MAX_DIMS)]


class Take(Config):
    """The slices of the fresh buffer, along one axis, that the changed one consists of."""

    axis: int = Field(ge=0, lt=_MAX_DIMS, strict=True)
    index: list[Annotated[int, Field(strict=True, ge=0)]] = Field(max_length=_MAX_ITEMS)


class TensorChange(Config):
    """A parameter or buffer of another shape; take: how to rebuild one that is not saved with the weights."""

    base: _Shape
    shape: _Shape
    take: Take | None = None


class ModuleChange(Config):
    """What differs in one module; identity: it was replaced by nn.Identity."""

    attributes: dict[_Name, _Number | _Items] = Field(default_factory=dict, max_length=_MAX_ENTRIES)
    tensors: dict[_Name, TensorChange] = Field(default_factory=dict, max_length=_MAX_ENTRIES)
    identity: bool = False


class StructureDiff(Config):
    """Changes by module name, "" being the model itself."""

    version: Literal[1] = 1
    modules: dict[_Name, ModuleChange] = Field(max_length=_MAX_MODULES)


def structure_diff(base: nn.Module, model: nn.Module) -> dict[str, Any]:
    """JSON that turns a fresh `base` into the structure of `model`; empty if they agree.

    Raises StructureRefused for what JSON cannot carry: other modules, changed attributes that are no numbers, non-persistent buffers
    that a fresh model would not have.
    """
    changes = {name: change for name, old, new in _pairs(base, model) if (change := _module_change(name, old, new)) != ModuleChange()}
    if not changes:
        return {}
    diff = StructureDiff(modules=changes).model_dump(mode="json", exclude_defaults=True)
    return {"version": 1, **diff}


def apply_structure(model: nn.Module, diff: dict[str, Any]) -> nn.Module:
    """Gives a fresh model the structure of the diff, in place, and returns it; load the weights next.

    Everything is checked before anything is changed. Raises StructureRefused naming the module for an unknown module, attribute or
    tensor, a value of another type or larger than the fresh one, and a base shape that differs.
    """
    if not diff:
        return model
    modules = dict(model.named_modules())
    changes = _parse(diff).modules
    for name, change in changes.items():
        _check_module(name, modules.get(name), change)
    for name, change in changes.items():
        _apply_module(model, name, modules[name], change)
    return model


def _parse(diff: dict[str, Any]) -> StructureDiff:
    try:
        return StructureDiff.model_validate(diff)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        raise StructureRefused(
            f"the structural diff is malformed: {first['msg']}", where=where or None, hint="prune again from the base model"
        ) from error


def _refused(name: str, what: str, expected: str | None = None) -> StructureRefused:
    return StructureRefused(what, where=f"module '{name}'", expected=expected, hint="prune again with the installed timm")


# ---------------------------------------------------------------------------------------------------- reading a difference
def _pairs(base: nn.Module, model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules of the same name; the inside of one that became an identity is left out."""
    yield name, base, model
    if _became_identity(base, model):
        return
    olds, news = dict(base.named_children()), dict(model.named_children())
    if list(olds) != list(news):
        raise _refused(name, f"its parts are {sorted(news)}", f"{sorted(olds)}")
    for child, old in olds.items():
        yield from _pairs(old, news[child], f"{name}.{child}" if name else child)


def _became_identity(old: nn.Module, new: nn.Module) -> bool:
    from torch import nn  # heavy, as are the imports below: the spec is read without torch

    return type(new) is nn.Identity and type(old) is not nn.Identity


def _module_change(name: str, old: nn.Module, new: nn.Module) -> ModuleChange:
    if _became_identity(old, new):
        return ModuleChange(identity=True)
    if type(old) is not type(new):
        raise _refused(name, f"it is a {type(new).__name__}", type(old).__name__)
    return ModuleChange(attributes=_changed_attributes(name, old, new), tensors=_changed_tensors(name, old, new))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key not in _SKIPPED and not key.endswith(_CACHE_SUFFIX)
    }


def _changed_attributes(name: str, old: nn.Module, new: nn.Module) -> dict[str, Any]:
    olds, news = _attributes(old), _attributes(new)
    if unknown := sorted(set(olds) ^ set(news)):
        raise _refused(name, f"attribute '{unknown[0]}' is only in one of both", "the attributes of a fresh model")
    changed = {key: news[key] for key in news if not _same(olds[key], news[key])}
    for key, value in changed.items():
        if problem := _misfit(olds[key], _to_json(value)):
            raise _refused(name, f"attribute '{key}' cannot be stored: {problem}")
    return {key: _to_json(value) for key, value in changed.items()}


def _same(old: Any, new: Any) -> bool:
    """Equal as data; of functions and other objects only the type counts, every build makes its own."""
    import torch

    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return torch.equal(old, new)
    if type(old) is not type(new):
        return False
    if isinstance(old, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return bool(old == new) if isinstance(old, bool | int | float | str | set | None) else True


def _to_json(value: Any) -> Any:
    return [_to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _changed_tensors(name: str, old: nn.Module, new: nn.Module) -> dict[str, TensorChange]:
    olds, news = _tensors(old), _tensors(new)
    if set(olds) != set(news):
        raise _refused(name, f"its tensors are {sorted(news)}", f"{sorted(olds)}")
    changed = {}
    for key, before in olds.items():
        after, lost = news[key], key in old._non_persistent_buffers_set
        if before.dtype != after.dtype:
            raise _refused(name, f"tensor '{key}' is {after.dtype}", str(before.dtype))
        if before.shape != after.shape:
            take = _find_take(name, key, before, after) if lost else None
            changed[key] = TensorChange(base=list(before.shape), shape=list(after.shape), take=take)
        elif lost and not before.equal(after.to(before.device)):
            raise _refused(name, f"buffer '{key}' changed and is not saved with the weights", "the value of a fresh model")
    return changed


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters and buffers."""
    return {key: tensor for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}


def _find_take(name: str, key: str, before: Tensor, after: Tensor) -> Take:
    """Which slices of the fresh buffer, in order, make the changed one."""
    after = after.to(before.device)
    axes = [axis for axis in range(before.dim()) if before.dim() == after.dim() and before.shape[axis] != after.shape[axis]]
    for axis in axes if len(axes) == 1 else ():
        index, sources = [], enumerate(before.unbind(axis))
        for part in after.unbind(axis):
            index += [next((place for place, source in sources if source.equal(part)), -1)]
        if -1 not in index:
            return Take(axis=axis, index=index)
    raise _refused(name, f"buffer '{key}' cannot be rebuilt from a fresh one and is not saved with the weights", "a subset of its slices")


# ---------------------------------------------------------------------------------------------------- checking a change
def _check_module(name: str, module: nn.Module | None, change: ModuleChange) -> None:
    if module is None:
        raise _refused(name, "there is no such module in the architecture")
    if change.identity and (not name or change.attributes or change.tensors):
        raise _refused(name, "only a part that nothing else is said about can become an identity")
    attributes, tensors = _attributes(module), _tensors(module)
    for key, value in change.attributes.items():
        if key not in attributes:
            raise _refused(name, f"there is no attribute '{key}'")
        if problem := _misfit(attributes[key], value):
            raise _refused(name, f"attribute '{key}' {problem}")
    for key, tensor in change.tensors.items():
        if key not in tensors:
            raise _refused(name, f"there is no tensor '{key}'")
        _check_tensor(name, key, tensors[key], tensor, lost=key in module._non_persistent_buffers_set)


def _misfit(old: Any, value: Any) -> str | None:
    """Why a JSON value cannot stand in for the fresh one: another type, or larger. Pruning only shrinks."""
    if isinstance(old, list | tuple):
        if not isinstance(value, list) or len(value) > len(old):
            return f"is {value!r:.60}, a fresh model has a list of {len(old)}"
        return next((problem for before, after in zip(old, value, strict=False) if (problem := _misfit(before, after))), None)
    if type(old) is not type(value) or not isinstance(old, bool | int | float):
        return f"is {value!r:.60}, a fresh model has {type(old).__name__}"
    if type(old) is int and value != old and not 1 <= value < old:
        return f"is {value!r:.60}, a fresh model has {old}"
    return None


def _check_tensor(name: str, key: str, tensor: Tensor, change: TensorChange, *, lost: bool) -> None:
    if list(tensor.shape) != change.base:
        raise _refused(name, f"tensor '{key}' has shape {list(tensor.shape)} in this architecture", f"{change.base}")
    if len(change.shape) != len(change.base) or any(new > old for new, old in zip(change.shape, change.base, strict=True)):
        raise _refused(name, f"tensor '{key}' would become {change.shape}", f"at most {change.base}")
    if lost != (change.take is not None):
        raise _refused(name, f"tensor '{key}' {'lacks' if lost else 'has'} the rule to rebuild it")
    if change.take and not _take_fits(change, change.take):
        raise _refused(name, f"the rule to rebuild tensor '{key}' does not give {change.shape}")


def _take_fits(change: TensorChange, take: Take) -> bool:
    if take.axis >= len(change.base) or any(place >= change.base[take.axis] for place in take.index):
        return False
    return change.shape == [*change.base[: take.axis], len(take.index), *change.base[take.axis + 1 :]]


# ---------------------------------------------------------------------------------------------------- applying a change
def _apply_module(model: nn.Module, name: str, module: nn.Module, change: ModuleChange) -> None:
    from torch import nn

    if change.identity:
        path, _, child = name.rpartition(".")
        setattr(model.get_submodule(path), child, nn.Identity())
    for key, value in change.attributes.items():
        setattr(module, key, _like(getattr(module, key), value))
    for key, tensor in change.tensors.items():
        fresh = _tensors(module)[key]
        resized = _resized(fresh, tensor)
        setattr(module, key, nn.Parameter(resized, requires_grad=fresh.requires_grad) if isinstance(fresh, nn.Parameter) else resized)


def _like(old: Any, value: Any) -> Any:
    """The JSON value in the container types of the fresh one."""
    if not isinstance(old, list | tuple):
        return value
    return type(old)([_like(before, after) for before, after in zip(old, value, strict=False)])


def _resized(fresh: Tensor, change: TensorChange) -> Tensor:
    if change.take is None:
        return fresh.detach().new_zeros(change.shape)
    return fresh.index_select(change.take.axis, fresh.new_tensor(change.take.index).long())
