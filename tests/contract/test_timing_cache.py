"""The timing cache only ever saves time: whatever is wrong with its file is a note, and concurrent builds lose nothing of each other's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgekd.artifact import Artifact, Kind
from edgekd.backends._timing import TimingCache
from edgekd.backends.tensorrt_rtx import TensorRTForRTX
from edgekd.console import Console
from edgekd.errors import ResourceError
from edgekd.export.onnx import export_onnx
from edgekd.profile.device import load_device
from edgekd.stages._stage import Settings
from edgekd.stages.compile import Compile
from edgekd.stages.export import FACTS, GRAPH

RTX = load_device("rtx4090")
needs_rtx = pytest.mark.skipif(TensorRTForRTX().available() is not None, reason=str(TensorRTForRTX().available()))


class Cache:
    """An ITimingCache of words."""

    def __init__(self, words: set[str]):
        self.words = words

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        self.words |= other.words if "foreign" not in other.words else set()
        return "foreign" not in other.words

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.words)).encode()


class Config:
    """As much of an IBuilderConfig as timing needs."""

    cache: Cache

    def create_timing_cache(self, blob: bytes) -> Cache | None:
        return None if blob == b"[]!" else Cache(set(json.loads(blob or b"[]")))

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "foreign" not in cache.words:
            self.cache = cache
        return "foreign" not in cache.words

    def get_timing_cache(self) -> Cache:
        return self.cache


def build(*learnt: str, version: str = "10.3.0") -> tuple[TimingCache, Config]:
    """One build that learns some words."""
    timing, config = TimingCache("tensorrt", version, "Orin (nvgpu)"), Config()
    timing.attach(config)
    config.cache.words |= set(learnt)
    assert timing.keep(config) == len(config.cache.serialize())
    return timing, config


def known(**which: str) -> set[str]:
    return build(**which)[1].cache.words


def test_what_one_build_learnt_the_next_one_knows_but_no_other_version(home: Path) -> None:
    timing, _ = build("conv")
    assert timing.path == home / "timing" / "tensorrt-10.3.0-orin-nvgpu.cache"
    build("gemm")
    assert known() == {"conv", "gemm"}
    assert known(version="10.16.1") == set()
    assert (home / "timing").stat().st_mode & 0o777 == 0o700


def test_builds_at_the_same_time_lose_nothing(home: Path) -> None:
    timings = [(TimingCache("tensorrt", "10.3.0", "Orin (nvgpu)"), Config()) for _ in range(8)]
    for i, (timing, config) in enumerate(timings):
        timing.attach(config)
        config.cache.words.add(f"kernel {i}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda both: both[0].keep(both[1]), timings))
    assert known() == {f"kernel {i}" for i in range(8)}
    assert [t.note for t, _ in timings] == [None] * 8


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "link", "writable", "huge"])
def test_a_damaged_cache_is_noted_and_replaced(home: Path, tmp_path: Path, damage: str) -> None:
    path = build("conv")[0].path
    data = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        if damage == "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        elif damage == "writable":
            path.chmod(0o666)
        elif damage == "huge":
            patch.setattr("edgekd.backends._timing._MAX_BYTES", len(data) - 1)
        else:
            path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-3], "empty": b"", "longer": data + b" "}[damage])
        timing, config = build("gemm")
    assert config.cache.words == {"gemm"}
    assert "damaged: it is replaced" in str(timing.note)
    again, config = build()
    assert (config.cache.words, again.note) == ({"gemm"}, None)


def test_a_cache_that_the_builder_calls_foreign_is_noted_and_replaced(home: Path) -> None:
    build("conv")
    timing, config = TimingCache("tensorrt", "10.3.0", "Orin (nvgpu)"), Config()
    timing.attach(config)
    config.cache.words = {"foreign"}
    timing.keep(config)
    timing, config = build("gemm")
    assert config.cache.words == {"gemm"}
    assert "another version or GPU: it is replaced" in str(timing.note)
    assert known() == {"gemm"}


@pytest.mark.parametrize("problem", [OSError(28, "no space left on device"), ResourceError("no space left on device")])
def test_a_cache_that_cannot_be_written_ends_no_build(home: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def fails(*_: object) -> None:
        raise problem

    monkeypatch.setattr("edgekd.backends._timing.write_atomic", fails)
    timing, config = TimingCache("tensorrt", "10.3.0", "gpu"), Config()
    timing.attach(config)
    config.cache.words = {"conv"}
    assert timing.keep(config) is None
    assert "no space left on device" in str(timing.note)


def test_a_home_that_is_a_file_ends_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "file"))
    timing, config = TimingCache("tensorrt", "10.3.0", "gpu"), Config()
    timing.attach(config)
    config.cache.words = {"conv"}
    assert timing.keep(config) is None


# ------------------------------------------------------------------------------------------------------------ the real API
@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("graph")
    export_onnx(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 4)).eval(), 16, folder / GRAPH
    )
    (folder / FACTS).write_text("{}")
    return Artifact("0" * 64, Kind.GRAPH, folder, "")


def compiled(graph: Artifact, out: Path) -> dict[str, Any]:
    out.mkdir()
    ctx: Any = SimpleNamespace(console=Console())
    return Compile().run(Settings("compile", Compile.Config(device="rtx4090", backend="tensorrt_rtx")), {"graph": graph}, out, ctx)


@needs_rtx
def test_a_real_builder_takes_fills_and_merges_its_own_cache(
    graph: Artifact, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The calls as `tensorrt` makes them, with the builder that is here: that of RTX, whose cache stays empty."""
    monkeypatch.setattr(TensorRTForRTX, "times_kernels", True)
    first = compiled(graph, tmp_path / "first")
    [file] = (home / "timing").glob("*.cache")
    assert file.name == f"tensorrt-rtx-{first['version']}-rtx4090.cache"
    assert first["timing_cache"] == file.stat().st_size - 32 > 0
    file.write_bytes(file.read_bytes()[:-1])
    assert capsys.readouterr().err == ""
    second = compiled(graph, tmp_path / "second")
    assert "is damaged: it is replaced" in capsys.readouterr().err
    assert second["timing_cache"] == first["timing_cache"]
    compiled(graph, tmp_path / "third")
    assert capsys.readouterr().err == ""


@needs_rtx
def test_rtx_keeps_no_cache(graph: Artifact, home: Path, tmp_path: Path) -> None:
    assert compiled(graph, tmp_path / "a")["timing_cache"] is None
    assert not (home / "timing").exists()
