"""Writes edgekd/models/timm_names.txt from the installed timm: `python tools/update_names.py`."""

from __future__ import annotations

from pathlib import Path

import timm

target = Path(__file__).parent.parent / "edgekd" / "models" / "timm_names.txt"
target.write_text("\n".join(sorted(timm.list_models())) + "\n", encoding="utf-8")
