"""Run by path in a fresh process: opens one engine, runs it once, reports how long that took and how much memory it needed.

Request on stdin: {"backend", "engine", "device", "threads", "options", "inputs": {name: [dtype, shape]}}.
Reply on stdout: {"load_ms", "peak_mib"}, or {"error", "graph": 1 where the runtime refuses the graph, "where", "expected", "hint"}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def main() -> None:
    request = json.loads(sys.stdin.read())
    try:
        reply: dict[str, Any] = load_and_run(**request)
    except Exception as err:  # whatever went wrong is the answer
        reply = {"error": getattr(err, "what", None) or str(err) or type(err).__name__, "graph": int(getattr(err, "code", "") == "graph")}
        reply |= {n: said for n in ("where", "expected", "hint") if (said := getattr(err, n, None))}
    sys.stdout.write(json.dumps(reply))


def load_and_run(
    backend: str, engine: str, device: str, threads: int, options: dict[str, Any], inputs: dict[str, tuple[str, list[int]]]
) -> dict[str, float]:
    """Milliseconds until the engine is ready for inputs of these shapes, and how far the peak resident size (MiB) rose over what imports had taken before."""
    import numpy as np

    from edgekd.profile.device import load_device
    from edgekd.registry import load

    runtime, profile = load("backend", backend)(), load_device(device)
    runtime.prepare()
    feeds = {name: np.zeros(shape, dtype) for name, (dtype, shape) in inputs.items()}
    before, start = _status_mib("VmRSS"), time.perf_counter_ns()
    session = runtime.open(Path(engine), threads=threads, device=profile, options=options)
    if (ready := getattr(session, "ready", None)) is not None:
        ready(feeds)
    load_ms = (time.perf_counter_ns() - start) / 1e6
    session.run(feeds)
    return {"load_ms": load_ms, "peak_mib": max(0.0, _status_mib("VmHWM") - before)}


def _status_mib(field: str) -> float:
    """From the kernel's account of this process, not getrusage: its maximum survives exec and would be the parent's."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `-I` hides a checkout
    main()
