"""`torchrun -m edgekd compress`: two processes train, one is killed, the same command goes on and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from edgekd.train import checkpoint
from tests.support import artifacts, environment

RECIPE = """
version: 1
data: {format: digits, image_size: 32, max_per_class: 16, split: {val: 0.2, test: 0.2}}
model: {arch: test_vit, args: {img_size: 32, patch_size: 8}}
stages:
  - train: {epochs: 150, batch_size: 16, optimizer: sgd, lr: 0.01, autocast: "off", channels_last: "off", compile: "off"}
targets: {host: {backend: onnxruntime, precision: fp32}}
"""
COMMAND = ("compress", "recipe.yaml", "--out", "run", "-o", "train.evaluations=1")


def together(folder: Path) -> subprocess.Popen[str]:
    """The command under torchrun, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "edgekd", *COMMAND]
    env = environment(EDGEKD_HOME=str(folder / "home"), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def second_of(launcher: int) -> int:
    """The process of rank 1."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the second process")
def test_a_training_goes_on_after_one_of_its_processes_was_killed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = together(tmp_path)
    home, limit = tmp_path / "home", time.monotonic() + 200
    # a checkpoint is written each ten seconds
    while not (saved := list((home / "work").glob("*/checkpoint"))) and time.monotonic() < limit:
        time.sleep(0.2)
    assert saved, run.communicate()[0][-2000:]
    os.kill(second_of(run.pid), signal.SIGKILL)
    said = run.communicate(timeout=200)[0]
    assert run.returncode != 0
    assert not (tmp_path / "run" / "run.json").exists(), said
    state = checkpoint.load(saved[0].parent)
    assert state is not None
    assert 0 < state["step"] < 150 * 8
    assert state["environment"]["processes"] == "2"

    again = together(tmp_path)
    said = again.communicate(timeout=300)[0]
    assert (tmp_path / "run" / "run.json").exists(), said
    assert said.count("] train\n") == 1, "the first process alone reports"
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert "train" in [row["name"] for row in steps]
    assert not saved[0].exists(), "what was published leaves no checkpoint"
    model = artifacts(home)["train"]
    assert model.meta["steps"] > state["step"]
    assert all(bool(t.isfinite().all()) for t in load_file(model.path / "model.safetensors").values())
