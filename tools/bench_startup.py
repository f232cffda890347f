"""Wall time of the commands that must feel instant, interleaved, medians: `python tools/bench_startup.py [ROUNDS]`.

Prints each median in ms, the bare interpreter for comparison, and the overhead of store and manifest for one 20 MB artifact.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "edgekd --help": ["-m", "edgekd", "--help"],
    "edgekd devices list": ["-m", "edgekd", "devices", "list"],
    "edgekd check quickstart": ["-m", "edgekd", "check", "recipes/quickstart.yaml"],
    "edgekd plan quickstart": ["-m", "edgekd", "plan", "recipes/quickstart.yaml"],
}
LIMITS_MS = {"edgekd --help": 400, "edgekd devices list": 400, "edgekd check quickstart": 400, "edgekd plan quickstart": 1000}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "EDGEKD_HOME": home, "NO_COLOR": "1"}
        for number in range(rounds + 1):
            for name, args in COMMANDS.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *args], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, check=True)
                if number:  # the first round fills the file cache
                    taken[name].append((time.perf_counter() - start) * 1e3)
        for name, times in taken.items():
            limit = f"   limit {LIMITS_MS[name]} ms" if name in LIMITS_MS else ""
            print(f"{name:28s} {statistics.median(times):7.0f} ms   (min {min(times):.0f}){limit}")
        _store_overhead(Path(home))


def _store_overhead(home: Path) -> None:
    """Seconds that publishing and reading one 20 MB artifact cost, beside the stage that made it."""
    sys.path.insert(0, str(ROOT))
    from edgekd.artifact import Kind
    from edgekd.store import Store

    store, body = Store(home / "bench"), os.urandom(20_000_000)
    puts, gets = [], []
    for number in range(7):
        key = f"{number:064x}"
        built = []

        def build(out: Path, built: list[float] = built) -> dict[str, object]:
            start = time.perf_counter()
            (out / "model.safetensors").write_bytes(body)
            built.append(time.perf_counter() - start)
            return {}

        start = time.perf_counter()
        store.put(key, Kind.MODEL, build)
        puts.append(time.perf_counter() - start - built[0])
        start = time.perf_counter()
        store.get(key)
        gets.append(time.perf_counter() - start)
    print(f"store, 20 MB artifact: publish {statistics.median(puts) * 1e3:.0f} ms, verified read {statistics.median(gets) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
