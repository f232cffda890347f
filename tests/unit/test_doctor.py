"""`edgekd doctor`: each finding names what was seen, what is wanted and what to do."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd import doctor
from edgekd.doctor import Check, examine
from edgekd.errors import ResourceError


def _by_name(store: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(store)}


def _versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Pretends that these distributions have these versions (None: are not installed)."""
    real = metadata.version
    wanted = {name.replace("_", "-"): version for name, version in changed.items()}

    def version(name: str) -> str:
        if name not in wanted:
            return real(name)
        found = wanted[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)


def test_every_finding_but_an_ok_one_says_what_to_do(tmp_path: Path) -> None:
    checks = examine(tmp_path)
    assert len({c.name for c in checks}) == len(checks)
    assert all(c.seen and c.wanted for c in checks)
    assert all(c.hint for c in checks if c.status != "ok")


def test_this_environment_meets_every_floor(tmp_path: Path) -> None:
    checks = _by_name(tmp_path)
    assert {"torch", "onnx", "Pillow", "timm", "pydantic", "numpy"} <= set(doctor.floors())  # read from the installed distribution
    assert [c for n, c in checks.items() if n in doctor.floors() and c.status == "fail"] == []


@pytest.mark.parametrize(
    ("seen", "status"), [("2.9.1", "fail"), ("2.10.0", "ok"), ("2.10.0+cu130", "ok"), ("2.15.0a0", "ok"), ("1.99", "fail"), (None, "fail")]
)
def test_a_library_below_its_floor_fails_with_the_command_that_repairs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str | None, status: str
) -> None:
    _versions(monkeypatch, torch=seen)
    found = _by_name(tmp_path)["torch"]
    assert found.status == status
    assert found.hint.endswith("'torch>=2.10'") is (status == "fail")


@pytest.mark.parametrize(
    ("cpu", "gpu", "status", "said"),
    [
        ("1.31.1", None, "ok", "onnxruntime 1.31.1"),
        (None, "1.31.1", "ok", "onnxruntime-gpu 1.31.1"),
        ("1.30.0", "1.31.1", "fail", "onnxruntime 1.30.0, onnxruntime-gpu 1.31.1"),
        (None, None, "fail", "not installed"),
    ],
)
def test_two_onnxruntime_wheels_clash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: str | None, gpu: str | None, status: str, said: str
) -> None:
    _versions(monkeypatch, onnxruntime=cpu, onnxruntime_gpu=gpu)
    found = _by_name(tmp_path)["onnxruntime"]
    assert (found.status, found.seen) == (status, said)


def test_an_old_python_fails_and_an_untested_one_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status in (((3, 10, 2), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "warn")):
        monkeypatch.setattr(doctor, "sys", SimpleNamespace(version_info=version))
        assert doctor._python().status == status


def test_another_platform_is_called_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert doctor._platform().status == "warn"


def test_a_gpu_without_the_cuda_provider_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(gpu="NVIDIA Something")
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    )
    found = doctor._providers(machine)  # type: ignore[arg-type]
    assert (found.status, found.hint) == ("warn", "install onnxruntime-gpu: this build lacks CUDAExecutionProvider")


def test_a_broken_onnxruntime_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = doctor._providers(SimpleNamespace(gpu=None))  # type: ignore[arg-type]
    assert found.status == "fail"
    assert "undefined symbol" in found.seen


def test_a_cpu_without_dot_products_is_told_that_int8_gains_little() -> None:
    assert doctor._vectors(SimpleNamespace(isa=("x86-64", "avx2"))).status == "warn"  # type: ignore[arg-type]
    assert doctor._vectors(SimpleNamespace(isa=("x86-64", "avx2", "avx_vnni"))).status == "ok"  # type: ignore[arg-type]
    assert doctor._vectors(SimpleNamespace(isa=("armv8", "neon", "dotprod"))).status == "ok"  # type: ignore[arg-type]


def test_a_nearly_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    found = _by_name(tmp_path / "not" / "there")["disk"]
    assert (found.status, "2.0 GB free" in found.seen) == ("warn", True)


def test_a_store_without_file_locks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise ResourceError("file locks do not work here")

    monkeypatch.setattr(doctor, "check_locks_work", refuse)
    assert _by_name(tmp_path)["locking"].status == "fail"


def test_a_store_that_is_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    assert _by_name(tmp_path / "store")["locking"].status == "fail"


def test_looking_leaves_nothing_behind_in_the_store(tmp_path: Path) -> None:
    examine(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_examining_imports_neither_torch_nor_onnx(tmp_path: Path) -> None:
    code = "import sys; from edgekd.doctor import examine; examine(); sys.exit(','.join({'torch', 'timm', 'onnx'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], env={"EDGEKD_HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
