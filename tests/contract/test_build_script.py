"""build.py is killed after each of its steps: the bundle is then intact, or running build.py or `edgekd verify --build` again completes it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edgekd.bundle import SIGNATURE, verify_files, write_facts, write_manifest
from edgekd.errors import BundleRefused

TEMPLATE = Path(sys.modules["edgekd"].__file__ or "").parent / "templates" / "build.py"


class Killed(BaseException):
    """Nothing after it runs."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A signed bundle without an engine, as far as build.py reads it where there is no GPU."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    shutil.copyfile(TEMPLATE, folder / "build.py")
    write_facts(folder, {"model_file": "model.onnx", "build": {"backend": "tensorrt"}, "labels": ["\u00e9"]})
    write_manifest(folder, {"recipe": "r", "target": "jetson-orin-nano"})
    (folder / SIGNATURE).write_bytes(bytes(64))
    return folder


def script(folder: Path, plan: bytes, cache: bytes) -> ModuleType:
    """The bundle's build.py, whose builder gives these bytes."""
    spec = importlib.util.spec_from_file_location("build_script", folder / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    module.load = lambda _: SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    module.build = lambda *_: (plan, cache, {"runtime": "tensorrt", "version": "10.3.0"})
    module.Cuda.find = staticmethod(lambda: None)
    return module  # type: ignore[no-any-return]


def killed_at(step: int, patch: pytest.MonkeyPatch, call: Callable[[], None]) -> bool:
    """True if `call` was ended before its step-th change of a file; False if it has fewer."""
    left = step

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real(*args, **more)

        return made

    with patch.context() as inside:
        for name in ("replace", "unlink", "fsync"):
            inside.setattr(os, name, counted(getattr(os, name)))
        try:
            call()
        except Killed:
            return True
    return False


def refused(folder: Path) -> BundleRefused | None:
    try:
        verify_files(folder)
    except BundleRefused as refusal:
        return refusal
    return None


@pytest.mark.parametrize("built_before", [False, True])
@pytest.mark.parametrize("cache", [b"", b"kernels"])
def test_a_build_that_was_killed_is_completed_by_the_next(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_before: bool, cache: bytes
) -> None:
    if built_before:
        script(bundle, b"older engine", b"older kernels").main()
        (bundle / SIGNATURE).write_bytes(bytes(64))
    step, states = 0, []
    while True:
        step += 1
        folder = Path(shutil.copytree(bundle, tmp_path / str(step) / "bundle"))
        if not killed_at(step, monkeypatch, script(folder, b"first engine", cache).main):
            break
        refusal = refused(folder)
        states.append(refusal is None)
        assert refusal is None or "build.py" in str(refusal.hint)  # the way out
        verify_files(folder, rebuilding=True)  # edgekd verify --build takes it up
        again = script(folder, b"second engine", b"")
        again.main()
        manifest = verify_files(folder)
        assert (folder / "model.engine").read_bytes() == b"second engine"
        assert sorted(p.name for p in folder.iterdir()) == ["build.py", "bundle.json", "manifest.json", "model.engine", "model.onnx"]
        assert manifest["engine"]["runtime"] == "tensorrt"
    assert len(states) >= 5  # the engine and the manifest written and replaced, the signature removed
    assert refused(folder) is None  # whole where it was not killed
    assert not (folder / SIGNATURE).exists()
