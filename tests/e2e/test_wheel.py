"""The wheel carries recipes and devices: unzipped and run from another folder, it is the whole program."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY, TINY, environment, run_here


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unzipped wheel, built from a copy so that the checkout stays clean."""
    missing = [m for m in ("pip", "setuptools") if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: make dev")
    folder = tmp_path_factory.mktemp("wheel")
    tracked = ("edgekd", "recipes", "hardware")
    for name in tracked:
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), "./source"]
    p = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    [wheel] = folder.glob("edgekd-*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")
    return folder / "site"


def run(site: Path, *args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python from an empty folder, with nothing importable but the unzipped wheel and the dependencies."""
    elsewhere = site.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    program = ["-c", code] if code else ["-m", "edgekd", *args]
    env = environment(PYTHONPATH=str(site), EDGEKD_HOME=str(site.parent / "home"))
    return subprocess.run([sys.executable, "-P", *program], cwd=elsewhere, env=env, capture_output=True, text=True, timeout=900)


def test_what_runs_is_the_wheel(site: Path) -> None:
    where = run(site, code="import edgekd; print(edgekd.__file__)").stdout.strip()
    assert Path(where).is_relative_to(site)


@pytest.mark.parametrize("what", ["recipes", "devices", "methods"])
def test_it_lists_what_the_checkout_lists(site: Path, what: str) -> None:
    p = run(site, what, "list", "--json")
    assert p.returncode == 0, p.stderr
    mine, theirs = (sorted(x.get("id") or x["name"] for x in json.loads(text)) for text in (run_here(what, "list", "--json").out, p.stdout))
    assert mine == theirs
    assert mine


def test_every_data_file_of_the_checkout_is_in_it_unchanged(site: Path) -> None:
    for kind in ("recipes", "hardware"):
        ours = {p.relative_to(REPOSITORY): p.read_bytes() for p in (REPOSITORY / kind).rglob("*") if p.suffix in (".yaml", ".py")}
        assert ours
        assert all((site / "edgekd" / "_data" / name).read_bytes() == body for name, body in ours.items())
    assert (site / "edgekd" / "py.typed").is_file()
    assert (site / "edgekd" / "templates" / "predict.py").is_file()


def test_the_quickstart_plans_by_name_and_by_its_documented_path(site: Path) -> None:
    for name in ("quickstart", "recipes/quickstart.yaml"):
        p = run(site, "plan", name, "--json")
        assert p.returncode == 0, p.stderr
        assert {"distill", "prune", "recover", "quantize", "host.bundle"} <= {r["step"] for r in json.loads(p.stdout)}


def test_the_wheel_names_its_program_and_its_licence(site: Path) -> None:
    [info] = site.glob("edgekd-*.dist-info")
    assert "edgekd = edgekd.cli:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: MIT" in (info / "METADATA").read_text()


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel(site: Path) -> None:
    p = run(site, "compress", "quickstart", *TINY, "--no-gate", "--out", "run", "--json")
    assert p.returncode in (0, 4), p.stderr
    bundle = site.parent / "elsewhere" / json.loads(p.stdout)["targets"][0]["bundle"]
    assert run(site, "verify", str(bundle)).returncode == 0
