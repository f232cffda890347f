"""The one mutable file of a run: model, optimizer, EMA, projectors and step, SHA-256 framed, two generations in `work/<key>/`.

No random state is stored: every draw is a function of (seed, purpose, epoch, index), so a resumed run is byte-identical on the same
versions, instruction set and thread count.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgekd.safeio.files import write_atomic
from edgekd.safeio.tensors import pack_state, unpack_state

_HASH_BYTES = 32
_NEW, _OLD = "checkpoint", "checkpoint.previous"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Writes the next generation; the one before it stays until this one is durable."""
    new = folder / _NEW
    if new.exists():
        new.replace(folder / _OLD)
    body = pack_state(state)
    write_atomic(new, hashlib.sha256(body).digest() + body)


def load(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None: a torn one is passed over, never used."""
    for name in (_NEW, _OLD):
        path = folder / name
        if not path.is_file():
            continue
        raw = path.read_bytes()
        if hashlib.sha256(raw[_HASH_BYTES:]).digest() == raw[:_HASH_BYTES]:
            return unpack_state(raw[_HASH_BYTES:])
    return None
