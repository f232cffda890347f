"""Where the shipped recipes and device profiles lie: package data in a wheel, folders beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgekd.errors import ResourceError

_PACKAGE = Path(__file__).parent


def shipped_dir(kind: Literal["recipes", "hardware"]) -> Path:
    """The folder of the shipped recipes or device profiles; raises ResourceError where the installation lacks it."""
    for folder in (_PACKAGE / "_data" / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise ResourceError(
        f"the shipped folder '{kind}' is missing", where=str(_PACKAGE), hint="reinstall edgekd: its package data is incomplete"
    )
