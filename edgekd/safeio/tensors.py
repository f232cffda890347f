"""Nested state of tensors and numbers <-> bytes, through torch's restricted loader."""

from __future__ import annotations

import io
from typing import Any

import torch


def pack_state(state: dict[str, Any]) -> bytes:
    """Bytes of a nested dict of tensors, numbers, strings and lists."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack_state(data: bytes) -> dict[str, Any]:
    """The state again, on the CPU. Only tensors and plain values can be in it."""
    state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return state
