"""What an engine costs besides time per run: its file, the time to load it, the memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import DeviceError, FileMissing
from edgekd.profile.transports import Transport

if TYPE_CHECKING:
    from edgekd.backends import Feeds
    from edgekd.profile.schema import DeviceProfile


def load_facts(
    engine: Path,
    backend: str,
    *,
    device: DeviceProfile,
    feeds: Feeds,
    threads: int = 1,
    options: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
    transport: Transport | None = None,
) -> dict[str, Any]:
    """`file_bytes`, `load_ms`, and `peak_mib`: peak resident memory over that of an idle process. One load and one run in a fresh child.

    Raises DeviceError or BackendError where the child fails or is late.
    """
    if not engine.is_file():
        raise FileMissing("there is no such engine", where=str(engine))
    inputs = {name: [str(value.dtype), list(value.shape)] for name, value in feeds.items()}
    request = {"backend": backend, "engine": str(engine.resolve()), "device": device.id, "threads": threads}
    request |= {"options": dict(options or {}), "inputs": inputs}
    reply = (transport or _local()).ask(request, timeout_s=timeout_s)
    facts = {name: reply.get(name) for name in ("load_ms", "peak_mib")}
    if not all(isinstance(value, int | float) for value in facts.values()):
        raise DeviceError("the measuring process left out a number", where=engine.name, expected="load_ms and peak_mib")
    return {"file_bytes": engine.stat().st_size, **facts}


def _local() -> Transport:
    from edgekd.profile.transports.local import Local  # starts a process: only when asked

    return Local()
