"""A confined process for reading hostile bytes: no environment, no open files, little memory and time; its crash is a refusal.

The parent calls `run_confined`. The child is this same file run by its path under `python -I`, so it is stdlib only at the top.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_JOBS = {  # name -> what is imported before the last limit, module and function of the job
    "checkpoint": (("torch", "safetensors.torch"), "edgekd.safeio.checkpoint", "convert"),
    "onnx": (("onnx", "onnx.checker", "onnx.shape_inference"), "edgekd.safeio.onnxfile", "examine"),
}
_GB = 2**30
_MEMORY_BYTES = 6 * _GB  # importing torch with its CUDA libraries alone maps 3 GB
_CPU_S, _WALL_S = 120, 600
_MAX_REPLY_BYTES, _MAX_TEXT = 2**20, 2_000
_READY, _REPLY, _LOG = "ready", "reply.json", "log"


@dataclass(frozen=True)
class Outcome:
    """What a job returned, or why it did not: `problem` is a sentence (with `expected` and `hint`) or the text of a foreign exception."""

    value: dict[str, Any]
    problem: str | None = None
    expected: str | None = None
    hint: str | None = None
    started: bool = True  # False: the process could not even import its libraries, so the file is not to blame


# ------------------------------------------------------------------------------------------------------------ the parent
def run_confined(job: str, source: Path, folder: Path) -> Outcome:
    """Runs a job on `source` in a confined process whose files go to `folder`, a fresh empty one."""
    script, roots = str(Path(__file__).resolve()), json.dumps(_import_roots(job))
    command = [sys.executable, "-I", script, job, str(source.resolve()), str(folder.resolve()), roots]
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder), "HOME": str(folder)}
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        env["LD_LIBRARY_PATH"] = libraries
    with (folder / _LOG).open("wb") as log, suppress(subprocess.TimeoutExpired):
        done = subprocess.run(  # noqa: S603 - our own interpreter and script, no shell
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=_WALL_S, check=False
        )
        return _outcome(folder, done.returncode)
    return Outcome({}, f"reading it took more than {_WALL_S} seconds")


def _outcome(folder: Path, code: int) -> Outcome:
    if not (folder / _READY).exists():
        last = (folder / _LOG).read_text(errors="replace").strip().splitlines()[-1:]
        return Outcome({}, f"the confined reader could not start (status {code}): {''.join(last)[:_MAX_TEXT]}", started=False)
    try:
        with (folder / _REPLY).open("rb") as f:
            reply = json.loads(f.read(_MAX_REPLY_BYTES))
        return Outcome(dict(reply["value"]), reply["problem"], reply["expected"], reply.get("hint"))
    except (OSError, ValueError, KeyError, TypeError):
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Outcome({}, f"reading it crashed or ran out of its limits ({how})")


def _import_roots(job: str) -> list[str]:
    """Folders of edgekd and of the job's libraries: `-I` hides user and editable installs."""
    specs = [importlib.util.find_spec(name.partition(".")[0]) for name in _JOBS[job][0]]
    return sorted({str(Path(__file__).resolve().parents[2])} | {str(Path(s.origin).parents[1]) for s in specs if s and s.origin})


# ------------------------------------------------------------------------------------------------------------- the child
def serve(job: str, source: Path, folder: Path) -> None:
    """Confines this process, runs the job and leaves its reply in `folder`. Never returns to wider limits."""
    libraries, module, function = _JOBS[job]
    _limit(source.stat().st_size)
    for library in libraries:
        importlib.import_module(library)
    work = getattr(importlib.import_module(module), function)
    (folder / _READY).touch()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # only now: importing may start threads, reading may not
    (folder / _REPLY).write_text(json.dumps(_reply(work, source, folder)))


def _reply(work: Any, source: Path, folder: Path) -> dict[str, Any]:
    try:
        return {"value": work(source, folder), "problem": None, "expected": None, "hint": None}
    except Exception as e:  # whatever a parser raises on hostile bytes is the reason of the refusal
        problem = getattr(e, "what", None) or f"{type(e).__name__}: {e}"
        return {"value": {}, "problem": problem[:_MAX_TEXT], "expected": getattr(e, "expected", None), "hint": getattr(e, "hint", None)}


def _limit(size: int) -> None:
    limits = {
        resource.RLIMIT_AS: _MEMORY_BYTES + 4 * size,
        resource.RLIMIT_CPU: _CPU_S,
        resource.RLIMIT_FSIZE: 2 * size + 2**24,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the parent's own edgekd, whatever else is installed
    sys.path.extend(json.loads(sys.argv[4]))
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
