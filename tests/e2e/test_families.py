"""Architectures of many families go through export, int8, onnxruntime, OpenVINO and engines of TensorRT for RTX, with parity at each step."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgekd.backends.openvino import OpenVino
from edgekd.backends.tensorrt_rtx import TensorRTForRTX

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZE = 64
SIX: dict[str, dict[str, Any]] = {  # one of each kind of block, with few of them
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": SIZE, "depth": 2},
    "mixer_s32_224": {"img_size": SIZE},
    "swin_tiny_patch4_window7_224": {
        "img_size": SIZE,
        "window_size": 4,
        "depths": (1, 1, 2, 1),
        "embed_dim": 24,
        "num_heads": (1, 2, 3, 4),
    },
}
_MISSING = [reason for backend in (OpenVino, TensorRTForRTX) if (reason := backend().available()) is not None]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason="; ".join(_MISSING))


def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_families", TOOLS / "sweep_families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Answers(dict[str, str]):
    def put(self, answer: tuple[str, str]) -> None:
        self.update([answer])


@pytest.mark.parametrize("arch", SIX)
def test_six_kinds_of_models_reach_every_runtime_in_every_precision(arch: str) -> None:
    found, module = Answers(), sweep()
    module.examine(arch, SIZE, found, SIX[arch])
    assert found == dict.fromkeys(module.COLUMNS, "ok")


def table() -> dict[str, list[str]]:
    """Architecture -> the cells of the committed table."""
    rows = [
        [c.strip() for c in line.strip("|\n").split(" | ")] for line in (TOOLS / "families.md").read_text(encoding="utf-8").splitlines()
    ]
    return {row[0]: row[1:] for row in rows if len(row) > 2 and row[1].isdigit()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(table()))
def test_every_family_does_what_the_table_says(arch: str) -> None:
    size, *cells = table()[arch]
    found = list(sweep().row(arch, int(size)).values())
    kinds = [[c.split(":")[0] for c in row] for row in (found, cells)]  # figures differ between machines, what goes wrong does not
    assert kinds[0] == kinds[1], found
