"""What a transport is: a way to have one request measured in another process or on another machine. One file per transport."""

from __future__ import annotations

from typing import Any, Protocol


class Transport(Protocol):
    """Sends a request, returns the reply. A slow, silent, dead or lying peer is a DeviceError, and leaves nothing behind."""

    name: str

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]: ...
