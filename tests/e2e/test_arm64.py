"""Bundles run for arm64 under emulation: the same answers as here, and every difference comes from onnxruntime's own fused kernels. No latency."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import REPOSITORY, run_here, write_images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="needs Debian's apt-get and dpkg-deb"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos") / "data", each=16, suffix=".png")


@pytest.fixture(scope="module")
def userland(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arm64")


@pytest.mark.parametrize(
    ("arch", "args", "device", "form"),
    [
        ("resnet10t", {}, "host", "quantize"),  # unsigned activations
        ("resnet10t", {}, "rpi5", "quantize"),  # symmetric ones
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, "host", "export"),
    ],
)
def test_a_bundle_answers_on_arm64_as_it_does_here(
    arch: str, args: dict[str, Any], device: str, form: str, photos: Path, userland: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    from edgekd.export.onnx import export_onnx

    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    export_onnx(timm.create_model(arch, num_classes=3, **args).eval(), 32, tmp_path / "mine.onnx")
    more = ("--search", "0", "--no-gate") if form == "quantize" else ()
    where = ("--data", photos, "--image-size", "32", "--device", device, "--out", tmp_path / "run", "--json")
    result = run_here(form, tmp_path / "mine.onnx", *where, *more)
    assert result.code in (0, 4), result.err  # 4: random weights need not keep their labels in int8
    bundle = tmp_path / "run" / device
    command = [sys.executable, str(REPOSITORY / "tools" / "arm64.py"), str(bundle), str(photos), "--root", str(userland)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["predict"] == {"images": 48, "same_top1": 48}
    assert found["optimized"]["agreement"] == found["as written"]["agreement"] == 1
    assert found["as written"]["largest"] <= 1e-5 * found["scale"]  # the file means the same there
    alone = max(found["optimizations alone"].values())
    assert found["optimized"]["largest"] <= max(alone, 1e-5 * found["scale"])  # what is left is no more than fusing kernels changes anyway
