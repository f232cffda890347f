"""The quickstart for several seeds, each with an empty store: `python tools/bench_quickstart.py [--seeds 0 1 2] [--baseline]`.

Prints one row a seed in Markdown: seconds, teacher and shipped accuracy on test, latency and size against the teacher, verdicts; then the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, home: str, *more: str) -> tuple[dict[str, Any], float]:
    """run.json of one run and its wall seconds."""
    command = [
        sys.executable,
        "-m",
        "edgekd",
        "compress",
        "recipes/quickstart.yaml",
        "-o",
        f"seed={seed}",
        "--out",
        f"{home}/run",
        "--json",
        *more,
    ]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "EDGEKD_HOME": f"{home}/store"}, stdout=subprocess.PIPE, text=True, check=False
    )
    return json.loads(done.stdout), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baseline", action="store_true", help="also train the student alone (its time is not counted)")
    args = parser.parse_args()
    shipped, alone = [], []
    print("| seed | seconds | teacher top-1 | shipped top-1 | latency | file | verdicts | second run |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as home:
            found, seconds = run(seed, home)
            again = run(seed, home)[1]
            teacher, target = found["teacher"], found["targets"][0]
            shipped.append(target["metric"])
            faster = teacher["latency_ms"]["p50"] / target["latency_ms"]["p50"]
            smaller = teacher["size_bytes"] / target["size_bytes"]
            verdicts = ", ".join(f"{s['name']} {s['verdict']}" for s in found["stages"] if s["verdict"])
            print(
                f"| {seed} | {seconds:.0f} | {teacher['metric']:.2%} | {target['metric']:.2%} | {teacher['latency_ms']['p50']:.2f} -> "
                f"{target['latency_ms']['p50']:.3f} ms, {faster:.1f}x | {smaller:.1f}x smaller | {verdicts} | {again:.1f} s |",
                flush=True,
            )
            for stage in found["stages"]:
                if stage["reason"]:
                    print(f"    {stage['name']}: {stage['reason']}", file=sys.stderr)
            if args.baseline:
                alone.append(run(seed, home, "-o", "baselines=[student]")[0]["baselines"][0]["metric"])
    print(f"\nshipped on test: mean {statistics.mean(shipped):.2%} of {len(shipped)} seeds")
    if alone:
        print(f"student trained alone, same epochs, on test: mean {statistics.mean(alone):.2%}")


if __name__ == "__main__":
    main()
