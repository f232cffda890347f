"""One file over https, kept only where its hash is the one that was expected."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO

from edgekd.errors import InputRefused
from edgekd.safeio.files import resource_errors, write_atomic

_MAX_BYTES = 4 * 2**30
_CHUNK_BYTES = 2**20
Opener = Callable[[str], IO[bytes]]


def download(address: str, sha256: str, path: Path, refused: type[InputRefused], *, hint: str, opener: Opener | None = None) -> None:
    """Writes the file to `path`; raises `refused` for another scheme, a failure, or another content, and then keeps nothing."""
    if not address.startswith("https://"):
        raise refused("files are taken over https only", where=address)
    parts, digest, size = [], hashlib.sha256(), 0
    try:
        with (opener or _open)(address) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > _MAX_BYTES:
                    raise refused(f"the file is larger than {_MAX_BYTES} bytes", where=address)
                digest.update(chunk)
                parts.append(chunk)
    except (OSError, HTTPException) as error:
        raise refused(f"it cannot be downloaded: {error}", where=address, hint=hint) from error
    if digest.hexdigest() != sha256:
        raise refused(f"its SHA-256 is {digest.hexdigest()}", where=address, expected=sha256)
    with resource_errors(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, b"".join(parts))


def _open(address: str) -> IO[bytes]:
    from urllib.request import urlopen

    stream: IO[bytes] = urlopen(address, timeout=30)  # noqa: S310 - https was checked by the caller
    return stream
