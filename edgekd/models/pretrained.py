"""timm's published weights: opted into on the command line, https only, and kept only if the hash in the recipe matches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import CheckpointRefused, UsageError
from edgekd.safeio.download import Opener, download

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.models.spec import ModelConfig


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
        download(address, config.sha256, path, CheckpointRefused, hint="download it by hand and give it as model.weights", opener=opener)
    return path


def _address(arch: str) -> str:
    """Where timm publishes the weights of an architecture."""
    import timm

    cfg = timm.get_pretrained_cfg(arch)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise UsageError(f"timm publishes no weights for '{arch}'", where="model.pretrained", hint="give a file: model.weights")
    return f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors" if cfg.hf_hub_id else str(cfg.url)
