"""The CIFAR-10 recipes with few epochs: `python tools/bench_cifar10.py --data FOLDER --weights RESNET56.th [--epochs 1 5] [--per-class 1000]`.

FOLDER holds train/<class>/*.jpg and test/<class>/*.jpg. The teacher starts from the published weights and is tuned on the same images (`--teacher-epochs`), one
store serves all runs, and the student trained alone for as many epochs is the baseline. Prints one Markdown row a run; all accuracies are on test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = ["--code", "recipes/cifar10/resnet_cifar.py"]


def edgekd(*args: str, home: Path) -> Any:
    """The JSON document of a command; exit 4 (a goal missed) still has one."""
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", *args, "--json"],
        cwd=ROOT,
        env={**os.environ, "EDGEKD_HOME": str(home / "store")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 4):
        sys.exit(f"edgekd {' '.join(args)} ended with {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["cifar10/resnet56-to-resnet20", "cifar10/resnet56-to-vit"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--per-class", type=int, help="images of each class; default: all")
    args = parser.parse_args()
    few = ["-o", f"data.max_per_class={args.per_class}"] if args.per_class else []
    with tempfile.TemporaryDirectory() as folder:
        home, weights = Path(folder), Path(folder) / "teacher.safetensors"
        edgekd("import", str(args.weights.resolve()), "--arch", "resnet56_cifar", *CODE, "--out", str(weights), home=home)
        print("| recipe | epochs | minutes | teacher | student alone | distilled (val) | shipped | latency | file | verdicts |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for recipe in args.recipes:
            for epochs in args.epochs:
                start = time.perf_counter()
                settings = {
                    "data.root": str(args.data.resolve()),
                    "teacher.weights": str(weights),
                    "teacher.train.epochs": args.teacher_epochs,
                    "distill.epochs": epochs,
                    "recover.epochs": epochs,
                    "baselines": "[student]",
                }
                overrides = [x for name, value in settings.items() for x in ("-o", f"{name}={value}")]
                run = edgekd(
                    "compress", recipe, *CODE, *overrides, *few, "--out", f"{home}/{recipe.rpartition('/')[2]}-{epochs}", home=home
                )
                print(row(recipe, epochs, (time.perf_counter() - start) / 60, run), flush=True)
                for stage in run["stages"]:
                    if stage["reason"]:
                        print(f"    {stage['name']}: {stage['reason']}", file=sys.stderr)


def row(recipe: str, epochs: int, minutes: float, run: dict[str, Any]) -> str:
    teacher, target, [alone] = run["teacher"], run["targets"][0], run["baselines"]
    distilled = next(s["metric"] for s in run["stages"] if s["name"] == "distill")
    was, now = teacher["latency_ms"]["p50"], target["latency_ms"]["p50"]
    verdicts = ", ".join(f"{s['name']} {s['verdict']}" for s in run["stages"] if s["verdict"])
    return (
        f"| `{recipe}` | {epochs} | {minutes:.1f} | {teacher['metric']:.2%} | {alone['metric']:.2%} | {distilled:.2%} | {target['metric']:.2%} | "
        f"{was:.2f} -> {now:.3f} ms, {was / now:.1f}x | {teacher['size_bytes'] / target['size_bytes']:.1f}x smaller | {verdicts} |"
    )


if __name__ == "__main__":
    main()
