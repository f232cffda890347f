"""Training survives real SIGKILLs with byte-identical results (G3), and its checkpoint survives a fault at every file operation (G1).

Run as a program, this file is a laboratory: it loads torch once and forks a child per training, so that a kill costs milliseconds. The laboratory
itself never trains, since a fork after a backward pass would inherit half of autograd's threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
KILLS_PER_RUN = 3
RUNS: dict[str, dict[str, Any]] = {  # name -> training settings, and how often a checkpoint is due
    "sgd, a checkpoint each step": {"optimizer": "sgd", "seconds": 0.0},
    "adamw, averaged, accumulated": {"ema": 0.9, "accumulate": 3, "seconds": 0.01},
    "mixed, best on val": {"keep": "best", "augment": {"policy": "crop_flip", "pad": 1, "mixup": 0.5, "cutmix": 0.5}, "seconds": 0.02},
    "distilled": {"optimizer": "sgd", "clip_grad": 1.0, "distill": "kd", "seconds": 0.005},
    "distilled with projectors": {"distill": "ofa", "accumulate": 2, "ema": 0.5, "seconds": 0.03},
    "distilled from an ONNX file": {"listen": "ofa", "augment": {"policy": "shift", "pad": 1}, "seconds": 0.02},
}


# ------------------------------------------------------------------------------------------------------------ one training
def train(settings: dict[str, Any], data: Path, work: Path, told: int) -> None:
    """Trains to the end; writes a line for each step, and at last the SHA-256 of the weights and curves, to the descriptor `told`."""
    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.models.spec import ModelSpec
    from edgekd.tasks.classification import Classification
    from edgekd.train import images, loop
    from edgekd.train.config import TrainConfig

    own = dict(settings)
    loop._CHECKPOINT_SECONDS, method, heard = own.pop("seconds"), own.pop("distill", None), own.pop("listen", None)
    cfg = TrainConfig(epochs=12, batch_size=8, log_seconds=1e-9, **own)
    spec = ModelSpec(arch="tiny", num_classes=10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, timm="none")
    job = images.Job("tiny", _net(0), spec, Dataset.open(data), Classification(), cfg, 0, work)
    if method:
        _teach(job, method)
    if heard:
        _listen(job, heard)
    trained = loop.fit(job, Context(store=None, console=_teller(told)))  # type: ignore[arg-type]
    digest = hashlib.sha256(json.dumps(trained.curves).encode())
    for tensor in trained.model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    os.write(told, f"end {digest.hexdigest()}\n".encode())


def _net(seed: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in ((3, 8, 1), (8, 16, 2), (16, 16, 2))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))


def _teach(job: Any, method: str) -> None:
    from edgekd import registry
    from edgekd.train.images import Speed, Teacher
    from edgekd.train.pair import teach
    from edgekd.train.views import View

    cls, teacher = registry.load("distill", method), _net(7).eval().requires_grad_(False)
    teach(job, cls(cls.Config()), Teacher(teacher, View(job.spec), Speed()), teacher, job.spec)


def _listen(job: Any, method: str) -> None:
    from edgekd import registry
    from edgekd.profile.device import load_device
    from edgekd.train.black_box import BlackBox
    from edgekd.train.pair import listen
    from tests.support import linear_onnx

    linear_onnx(job.work / "teacher.onnx", side=8, classes=10)
    session = registry.load("backend", "onnxruntime")().open_beside(job.work / "teacher.onnx", threads=1, device=load_device("host"))
    cls, facts = registry.load("distill", method), {"input": "x", "fixed_batch": None, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    listen(job, cls(cls.Config()), BlackBox(session, facts))


def _teller(told: int) -> Any:
    from edgekd.console import Console

    class Teller(Console):
        @contextmanager
        def bar(self, name: str, total: float) -> Iterator[Any]:
            yield self

        def update(self, done: float, **_figures: str) -> None:
            os.write(told, f"{int(done)}\n".encode())

    return Teller(quiet=True)


# ------------------------------------------------------------------------------------------------------------ kills
def attempt(settings: dict[str, Any], data: Path, work: Path, kill_after: int | None) -> tuple[int, list[str]]:
    """(exit status, lines) of a child that trains; it gets SIGKILL once it told of `kill_after` steps."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(settings, data, work, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    lines: list[str] = []
    with os.fdopen(read) as told:
        for line in told:
            lines.append(line.strip())
            if len(lines) == kill_after:
                os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines


def killed_run(name: str, draw: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=FAST) as folder:
        data = _data(Path(folder))
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for work in (whole, killed):
            work.mkdir()
        _, undisturbed = attempt(RUNS[name], data, whole, None)
        kills, starts = 0, []
        for _ in range(KILLS_PER_RUN):
            code, lines = attempt(RUNS[name], data, killed, draw.randint(2, 12))
            kills += code == -signal.SIGKILL
            starts.append(int(lines[0]))
        code, lines = attempt(RUNS[name], data, killed, None)
        return {"kills": kills, "starts": [*starts, int(lines[0])], "code": code, "end": lines[-1], "undisturbed": undisturbed[-1]}


def _data(folder: Path) -> Path:
    from edgekd.data.config import DataConfig
    from edgekd.data.dataset import build

    out = folder / "data"
    out.mkdir()
    build(DataConfig(format="digits", image_size=8, max_per_class=4), 0, out)
    return out


def kills() -> dict[str, Any]:
    from edgekd.train.config import TrainConfig
    from edgekd.train.optim import make_optimizer

    make_optimizer([_net(0)], TrainConfig())  # makes torch load the rest of itself, once for all children
    draw = random.Random(0)
    return {name: killed_run(name, draw) for name in RUNS}


# ------------------------------------------------------------------------------------------------------------ checkpoint faults
def checkpoint_faults() -> dict[str, dict[str, int]]:
    import torch  # noqa: F401 - once, for all children
    from test_store_faults import MODES

    return {mode: _every_point(mode) for mode in MODES}


def _every_point(mode: str) -> dict[str, int]:
    from test_store_faults import Fault, forked  # beside this file

    seen = dict.fromkeys(("points", "previous", "new", "torn", "unclean", "recovered"), 0)
    at = 1
    while True:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            work = Path(folder)
            for step in (1, 2):
                _save(work, step)

            def run(work: Path = work, at: int = at) -> None:
                fault = Fault(mode, at)
                fault.arm()
                _save(work, 3)
                if fault.count < at:
                    os._exit(42)  # every point was tried

            code = forked(run)
            if code == 42:
                return seen
            seen["points"] += 1
            seen["unclean"] += code != (-signal.SIGKILL if mode == "KILL" else 6)
            found = _load(work)
            seen["previous" if found == 2 else "new" if found == 3 else "torn"] += 1
            _save(work, 4)
            seen["recovered"] += _load(work) == 4
        at += 1


def _save(work: Path, step: int) -> None:
    import torch

    from edgekd.safeio.files import resource_errors
    from edgekd.train import checkpoint

    with resource_errors(work):  # as run.py does around every stage
        checkpoint.save(work, {"weights": torch.full((1000,), float(step)), "step": step})


def _load(work: Path) -> int | None:
    from edgekd.train import checkpoint

    found = checkpoint.load(work)
    whole = found is not None and bool((found["weights"] == found["step"]).all())
    return int(found["step"]) if found is not None and whole else None


# ------------------------------------------------------------------------------------------------------------ the tests
EXPERIMENTS = {"kills": kills, "checkpoint_faults": checkpoint_faults}


def experiment(name: str) -> Any:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, timeout=300, env=env, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def test_runs_killed_at_random_end_in_the_same_bytes() -> None:
    found = experiment("kills")
    assert found.keys() == RUNS.keys()
    assert sum(run["kills"] for run in found.values()) >= 12
    for name, run in found.items():
        assert run["code"] == 0, name
        assert run["undisturbed"].startswith("end "), name
        assert run["end"] == run["undisturbed"], (name, run)
    assert sum(start > 1 for run in found.values() for start in run["starts"]) >= 5  # they continued, and did not merely start anew


def test_a_fault_at_any_file_operation_leaves_the_new_or_the_previous_checkpoint() -> None:
    for mode, seen in experiment("checkpoint_faults").items():
        assert seen["points"] >= 7, (mode, seen)
        assert (seen["torn"], seen["unclean"]) == (0, 0), (mode, seen)
        assert min(seen["previous"], seen["new"]) > 0, (mode, seen)
        assert seen["recovered"] == seen["points"], (mode, seen)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(EXPERIMENTS[sys.argv[1]]()))
