"""SIGKILL at any moment of a whole run: nothing is lost, nothing half-written is ever used (G2)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from contextlib import suppress
from os import killpg
from pathlib import Path

import pytest

from tests.support import QUICKSTART, REPOSITORY, TINY, environment, run_apart


def killed_run(tmp_path: Path, kills: int, shortest_s: float, longest_s: float, seed: int) -> None:
    rng, home = random.Random(seed), tmp_path / "home"
    args = ("compress", QUICKSTART, *TINY, "--no-gate", "--out", str(tmp_path / "run"), "--json")
    survived = 0
    for _ in range(kills):
        p = subprocess.Popen(
            [sys.executable, "-m", "edgekd", *args],
            cwd=REPOSITORY,
            env=environment(EDGEKD_HOME=str(home)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(subprocess.TimeoutExpired):
            p.wait(rng.uniform(shortest_s, longest_s))
        survived += p.poll() is not None
        with suppress(ProcessLookupError):
            killpg(p.pid, signal.SIGKILL)  # its limited children as well
        p.wait()
    assert survived < kills, "no run was killed: nothing was tested"
    done = run_apart(*args, env={"EDGEKD_HOME": str(home)})
    assert done.code in (0, 4), done.err
    assert all(not path.is_dir() for path in (home / "quarantine").iterdir()), "a torn entry was published"
    verified = run_apart("store", "verify", "--json", env={"EDGEKD_HOME": str(home)})
    assert (verified.code, verified.json()["problems"]) == (0, [])
    bundle = json.loads(done.out)["targets"][0]["bundle"]
    assert run_apart("verify", bundle).code == 0


def test_a_run_killed_a_few_times_completes_and_the_store_verifies(tmp_path: Path) -> None:
    killed_run(tmp_path, kills=2, shortest_s=4, longest_s=9, seed=2)


@pytest.mark.slow
def test_a_run_killed_many_times_completes_and_the_store_verifies(tmp_path: Path) -> None:
    killed_run(tmp_path, kills=25, shortest_s=1, longest_s=14, seed=3)
