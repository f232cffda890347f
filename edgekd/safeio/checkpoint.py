"""Checkpoints from outside: only tensors come in. Pickles are opened in a confined process and leave it as safetensors."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import CheckpointRefused, FileMissing, ResourceError
from edgekd.safeio._child import run_confined
from edgekd.safeio.files import resource_errors

if TYPE_CHECKING:
    import torch

_SUFFIXES = frozenset({".th", ".pt", ".pth", ".tar", ".bin", ".ckpt"})
_MAX_FILE_BYTES, _MAX_HEADER_BYTES = 4 * 2**30, 16 * 2**20
_MAX_TENSORS, _MAX_NAME, _MAX_NESTS = 100_000, 1_024, 4
_DTYPES = frozenset({"F16", "BF16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL"})
_NESTS = ("state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile
_ADVICE = re.compile("In PyTorch 2.6|Check the documentation|This is an internal|The following argument types")
_SHOWN = 5
_CONVERTED = "weights.safetensors"
_TENSORS_ONLY = "a file that holds tensors and nothing else"
_RESAVE = "where it was trained: torch.save(model.state_dict(), 'weights.pt'), or safetensors.torch.save_file, then import that file"


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and text metadata of a safetensors file or a checkpoint, told apart by content. Raises FileMissing, CheckpointRefused."""
    if path.suffix == ".safetensors" or _starts_like_safetensors(path):
        return read_safetensors(path)
    return import_checkpoint(path), {}


def import_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.th .pt .pth .tar .bin .ckpt` file, unwrapped, without `module.`. Raises FileMissing, CheckpointRefused."""
    _check_file(path)
    if path.suffix not in _SUFFIXES:
        expected = f"one of {' '.join(sorted(_SUFFIXES))} .safetensors"
        raise CheckpointRefused(f"'{path.suffix}' is not a checkpoint format", where=str(path), expected=expected, hint=_RESAVE)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as name, resource_errors(Path(name)):
        outcome = run_confined("checkpoint", path, Path(name))
        if not outcome.started:
            raise ResourceError(outcome.problem or "the confined reader could not start", where=str(path), hint="edgekd doctor")
        if outcome.problem is not None:
            raise CheckpointRefused(_sentence(outcome.problem), where=str(path), expected=outcome.expected or _TENSORS_ONLY, hint=_RESAVE)
        return _read(Path(name) / _CONVERTED, path)[0]


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and text metadata. Raises FileMissing, and CheckpointRefused for a damaged file, another dtype, NaN or infinity."""
    _check_file(path)
    with resource_errors(path):
        return _read(path, path)


def fit_state_dict(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], where: str) -> dict[str, torch.Tensor]:
    """`state`, if it has exactly the expected names and shapes; else CheckpointRefused with the first missing, extra and wrong ones.

    Files of before PyTorch 0.4.1 have no BatchNorm counters at all (`num_batches_tracked`, used by no default BatchNorm): they get zeros.
    """
    state = {**_old_counters(state, expected), **state}
    missing = [f"{k} {list(expected[k])}" for k in expected if k not in state]
    extra = [f"{k} {list(state[k].shape)}" for k in state if k not in expected]
    wrong = [f"{k} {list(state[k].shape)} instead of {list(expected[k])}" for k in expected if k in state and state[k].shape != expected[k]]
    parts = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("extra", extra), ("of wrong shape", wrong))
        if names
    ]
    if parts:
        hint = "name the architecture (and its args, such as num_classes) that these weights were trained with"
        raise CheckpointRefused("the weights do not fit: " + "; ".join(parts), where=where, expected=f"{len(expected)} tensors", hint=hint)
    return state


def _old_counters(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    import torch

    names = [name for name in expected if name.endswith(".num_batches_tracked")]
    return {} if any(name in state for name in names) else {name: torch.zeros(expected[name], dtype=torch.int64) for name in names}


# ------------------------------------------------------------------------------------------------- in the confined process
def convert(source: Path, folder: Path) -> dict[str, Any]:
    """Job of `_child`: opens a pickled checkpoint and writes its state dict as safetensors."""
    import torch  # in the confined process
    from safetensors.torch import save_file

    loaded = torch.load(source, weights_only=True, map_location="cpu")
    state = {name: _plain(name, tensor) for name, tensor in _without_prefix(_state_dict(loaded)).items()}
    save_file(state, folder / _CONVERTED)
    return {"tensors": len(state)}


def _state_dict(loaded: Any) -> dict[str, Any]:
    for _ in range(_MAX_NESTS):
        if not isinstance(loaded, dict):
            raise CheckpointRefused(f"it holds a {type(loaded).__name__}", expected="a state dict (name -> tensor)")
        nest = next((n for n in _NESTS if isinstance(loaded.get(n), dict)), None)
        if nest is None:
            break
        loaded = loaded[nest]
    tensors = {name: value for name, value in loaded.items() if _is_tensor(value)}
    if not tensors:
        raise CheckpointRefused("it holds no tensors", expected="a state dict (name -> tensor)")
    odd = [name for name in tensors if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME]
    if odd or len(tensors) > _MAX_TENSORS:
        raise CheckpointRefused(
            "its tensors have no usable names, or there are too many", expected=f"up to {_MAX_TENSORS} tensors with short names"
        )
    return tensors


def _is_tensor(value: object) -> bool:
    import torch  # in the confined process

    return isinstance(value, torch.Tensor)


def _without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    import torch  # in the confined process

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointRefused(f"tensor '{name}' is sparse, quantized or empty of data", expected="dense tensors")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------ reading
def _read(path: Path, shown: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """`shown` is the file that a refusal names: the one the user gave."""
    import torch  # heavy
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()  # once: what was checked is what is used, whatever happens to the file meanwhile
    try:
        metadata = _checked_header(data)
        tensors = load(data)
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            raise CheckpointRefused(f"NaN or infinity in {_first(broken)}", expected="finite weights")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
        what = f"not a sound safetensors file: {_sentence(str(e))}"
        raise CheckpointRefused(what, where=str(shown), expected="a safetensors file", hint=_RESAVE) from e
    except CheckpointRefused as e:
        raise CheckpointRefused(e.what, where=str(shown), expected=e.expected, hint=_RESAVE) from e
    return tensors, metadata


def _checked_header(data: bytes) -> dict[str, str]:
    """Caps and dtypes that the library does not check; returns the metadata."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError("the header is longer than the file or than the limit")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", {})
    if len(header) > _MAX_TENSORS:
        raise CheckpointRefused(f"more than {_MAX_TENSORS} tensors", expected="fewer")
    odd = sorted({str(entry["dtype"]) for entry in header.values()} - _DTYPES)
    if odd:
        raise CheckpointRefused(f"dtype {_first(odd)} cannot be used", expected=f"one of {' '.join(sorted(_DTYPES))}")
    return {str(k): str(v) for k, v in metadata.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return found


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileMissing("no such file", where=str(path), expected="a checkpoint file", hint="correct the path")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointRefused("the file is too large", where=str(path), expected=f"at most {_MAX_FILE_BYTES} bytes", hint=_RESAVE)


def _starts_like_safetensors(path: Path) -> bool:
    _check_file(path)
    with path.open("rb") as f:
        start = f.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _sentence(text: str) -> str:
    """The reason in one line, without torch's advice to switch its protection off."""
    if code := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it refers to code ({code[1][:100]}), which was not run"
    if operand := re.search(r"Unsupported operand (\d+)", text):
        return f"it is not a checkpoint, or does more than hold tensors (pickle instruction {operand[1]})"
    if "TorchScript" in text:
        return "it is a TorchScript program, which is code"
    if text.startswith("EOFError"):
        return "it ends too early"
    reason = _ADVICE.split(text.partition("WeightsUnpickler error:")[2] or text)[0]
    return ascii(" ".join(reason.split()))[1:-1][:300]
