"""A fresh child process of the same interpreter: for what cannot be measured in a process that has already loaded something."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekd.errors import BackendError, DeviceError, GraphRefused
from edgekd.registry import register

_PROBE = Path(__file__).parent.parent / "probe.py"
_MAX_REPLY_BYTES, _MAX_TEXT = 1_000_000, 500
_KEPT_ENV = ("PATH", "LD_LIBRARY_PATH", "LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "EDGEKD_HOME")


@register("transport")
class Local:
    """JSON on stdin, one JSON object of finite numbers and strings back."""

    name = "local"

    def ask(self, request: dict[str, Any], *, timeout_s: float = 120.0) -> dict[str, Any]:
        """The probe's reply; raises DeviceError if the child is late, dies or says anything unexpected, BackendError if it refuses."""
        with tempfile.TemporaryFile() as reply:  # a file, not a pipe: a flooding child fills no memory of ours
            status = _run(json.dumps(request).encode(), reply.fileno(), timeout_s)
            reply.seek(0)
            data = reply.read(_MAX_REPLY_BYTES + 1)
        if status != 0:
            raise DeviceError(f"the measuring process ended with status {status}", where=self.name, hint="edgekd doctor")
        answer = parse(data, self.name)
        if "error" in answer:
            kind = GraphRefused if answer.get("graph") == 1 else BackendError
            where, expected, hint = (str(answer[n])[:_MAX_TEXT] if n in answer else None for n in ("where", "expected", "hint"))
            raise kind(str(answer["error"])[:_MAX_TEXT], where=where or self.name, expected=expected, hint=hint or "edgekd doctor")
        return answer


def parse(data: bytes, where: str) -> dict[str, Any]:
    """A reply as a flat object of strings and finite numbers; raises DeviceError for anything else."""
    if len(data) > _MAX_REPLY_BYTES:
        raise DeviceError("the reply is too long", where=where, expected=f"at most {_MAX_REPLY_BYTES} bytes")
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise DeviceError("the reply is not JSON", where=where) from err
    if not isinstance(answer, dict) or not all(_plain(v) for v in answer.values()):
        raise DeviceError("the reply is not a flat object of strings and finite numbers", where=where)
    return answer


def _run(stdin: bytes, stdout: int, timeout_s: float) -> int:
    """The child's exit status; it and its whole group are gone afterwards."""
    env = {name: os.environ[name] for name in _KEPT_ENV if name in os.environ}
    command = [sys.executable, "-I", str(_PROBE)]  # our interpreter and our file: nothing of the request is in it
    try:
        done = subprocess.run(command, input=stdin, stdout=stdout, stderr=subprocess.DEVNULL, env=env, timeout=timeout_s, check=False)  # noqa: S603 fixed argv
    except subprocess.TimeoutExpired as err:
        raise DeviceError(
            f"the measuring process said nothing for {timeout_s:g} s", where="local", hint="try fewer threads or a smaller batch"
        ) from err
    return done.returncode


def _plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int)
