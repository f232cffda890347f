"""timm's published weights: opted into on the command line, https only, and kept only if the hash in the recipe matches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgekd.errors import CheckpointRefused, UsageError
from edgekd.safeio.files import resource_errors, write_atomic

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.models.spec import ModelConfig

_MAX_BYTES = 4 * 2**30
_CHUNK_BYTES = 2**20
Opener = Callable[[str], IO[bytes]]


def published_weights(config: ModelConfig, ctx: Context, *, opener: Opener | None = None) -> Path:
    """The local file of an architecture's published weights, downloaded once; raises UsageError without --allow-download or a hash."""
    if not ctx.allow_download:
        raise UsageError(
            f"'{config.arch}' asks for published weights, which are downloaded", where="model.pretrained", hint="allow it: --allow-download"
        )
    if config.sha256 is None:
        raise UsageError(
            "published weights need the hash of the file", where="model.sha256", expected="the SHA-256 of the weights file, 64 hex digits"
        )
    address = _address(str(config.arch))
    path = ctx.store.root / "downloads" / f"{config.sha256}{Path(address).suffix}"  # the reader of checkpoints goes by it
    if not path.is_file():
        _download(address, config.sha256, path, opener or _open)
    return path


def _address(arch: str) -> str:
    """Where timm publishes the weights of an architecture."""
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise UsageError(f"timm publishes no weights for '{arch}'", where="model.pretrained", hint="give a file: model.weights")
    return f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else str(cfg.url)


def _download(address: str, sha256: str, path: Path, opener: Opener) -> None:
    if not address.startswith("https://"):
        raise CheckpointRefused("weights are taken over https only", where=address)
    parts, digest, size = [], hashlib.sha256(), 0
    try:
        with opener(address) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > _MAX_BYTES:
                    raise CheckpointRefused(f"the file is larger than {_MAX_BYTES} bytes", where=address)
                digest.update(chunk)
                parts.append(chunk)
    except (OSError, HTTPException) as error:
        raise CheckpointRefused(
            f"it cannot be downloaded: {error}", where=address, hint="download it by hand and give it as model.weights"
        ) from error
    if digest.hexdigest() != sha256:
        raise CheckpointRefused(f"its SHA-256 is {digest.hexdigest()}", where=address, expected=sha256)
    with resource_errors(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, b"".join(parts))


def _open(address: str) -> IO[bytes]:
    from urllib.request import urlopen

    stream: IO[bytes] = urlopen(address, timeout=30)  # noqa: S310 - https was checked by the caller
    return stream
