"""What a training step of each distiller costs: `python tools/bench_costs.py [--blocks N] [--steps N] [--methods NAME ...]`;
writes edgekd/distill/costs.json, which `edgekd methods show` reads.

Pairs at 224 x 224, batch 8, ten classes, untrained, the teacher running in every step: ResNet-50 to ResNet-18, ResNet-50 to ViT-tiny, ViT-small to
MobileNetV3-small. Our loop in fp32, one thread; blocks of steps of all methods are interleaved, and the figures are of the fastest block of each,
relative to the student alone. `--methods` measures some and leaves the others' figures as they are.
What a method does once a step whatever the batch, such as making vkd's matrix orthogonal, weighs less in larger batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_distill import CLASSES, Pair, block, images, opened, timed  # noqa: E402

from edgekd import registry  # noqa: E402
from edgekd.data.dataset import Dataset  # noqa: E402
from edgekd.errors import UsageError  # noqa: E402
from edgekd.listing import COSTS  # noqa: E402
from edgekd.sweep import ALONE  # noqa: E402
from edgekd.tasks.classification import Classification  # noqa: E402
from edgekd.train.images import ImageRun, Job, Speed, Teacher  # noqa: E402
from edgekd.train.memory import kept_memory  # noqa: E402
from edgekd.train.pair import teach  # noqa: E402
from edgekd.train.views import View  # noqa: E402

PAIRS = {
    "CNN to CNN": Pair("resnet50", "resnet18", 224, 8),
    "CNN to ViT": Pair("resnet50", "vit_tiny_patch16_224", 224, 8),
    "ViT to CNN": Pair("vit_small_patch16_224", "mobilenetv3_small_100", 224, 8),
}


def steps(pair: Pair, dataset: Dataset, work: Path, method: str) -> Iterator[float]:
    """Seconds of each step; raises UsageError where the method is not made for the pair."""
    student, guide = pair.models()
    job = Job("bench", student, pair.spec, dataset, Classification(), pair.cfg, 0, work)
    if method != ALONE:
        spec = replace(pair, student=pair.teacher).spec
        teacher = Teacher(guide, View(spec, channels_last=False), Speed())
        distiller = registry.load("distill", method)
        teach(job, distiller(distiller.Config()), teacher, guide, spec)
    return timed(ImageRun(job))


def measure(pair: Pair, folder: Path, methods: Sequence[str], blocks: int, count: int) -> dict[str, float | None]:
    """Times of a step relative to the student alone; None for a method that refuses the pair."""
    dataset = opened(folder / "on", images(folder, pair.size, 8 * pair.batch), pair.size, "on")
    running: dict[str, Iterator[float]] = {}
    refused = []
    for name in (ALONE, *methods):
        try:
            running[name] = steps(pair, dataset, folder, name)
        except UsageError:
            refused.append(name)
    taken: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(blocks):
        for name, iterator in running.items():
            taken[name].append(block(iterator, count))
    cost = {name: min(times) for name, times in taken.items()}
    return {name: round(cost[name] / cost[ALONE], 2) for name in cost} | dict.fromkeys(refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    every = [n for n in registry.names("distill") if n != "combined"]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(COSTS.read_text())["pairs"] if args.methods != every else {}
    found = {}
    for name, pair in PAIRS.items():
        with kept_memory(), tempfile.TemporaryDirectory() as folder:
            times = measure(pair, Path(folder), args.methods, args.blocks, args.steps)
            found[name] = {"models": f"{pair.teacher} to {pair.student}", "times": before.get(name, {}).get("times", {}) | times}
        print(name, json.dumps(found[name]), flush=True)
    how = f"a training step against the student alone, with the teacher running in it, 224 x 224, batch 8, {CLASSES} classes, fp32 on one CPU thread, torch {torch.__version__}"
    COSTS.write_text(json.dumps({"measured": how, "by": "tools/bench_costs.py", "pairs": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
