"""Steps per second of edgekd's training loop: `python tools/bench_distill.py [PAIR ...] [--blocks N] [--steps N] [--files]`, or `--memory`.

Pairs: resnet56-resnet20 (32 x 32, batch 128), vit_small-mobilenetv3 and resnet50-resnet18 (224 x 224, batch 32); kd, SGD, two threads. Each variant is a process
of its own, since how malloc gives memory back is a property of a process; they take turns, block by block, and the figures are ratios of medians over the blocks.

    student, bare   torch loop in fp32: the student alone
    bare            torch loop in fp32, default layout: teacher in eval and no_grad, augmented batches from the same functions
    alone           our loop without a teacher, as `tune` measured to be fastest
    fp32            our loop with autocast, channels_last and compile off
    eager           our loop as `chosen`, nothing compiled and no runtime
    chosen          our loop, as `tune` measured to be fastest for a long training
    kept            the same with the teacher's answers kept (`views`); computing them once is not counted
    files           `--files`: as fp32, decoding JPEG files each epoch instead of reading the decoded cache

`--memory`: anonymous memory of a process that trains ResNet-20 with kept answers of ResNet-56 on 10,000 and on 50,000 images.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "cifar10")]

import resnet_cifar  # noqa: E402, F401  # registers its architectures

from edgekd.data.augment import augment  # noqa: E402
from edgekd.data.config import DataConfig  # noqa: E402
from edgekd.data.dataset import Dataset, build  # noqa: E402
from edgekd.data.loader import batches, epoch_order  # noqa: E402
from edgekd.distill.kd import KD  # noqa: E402
from edgekd.models.spec import ModelSpec  # noqa: E402
from edgekd.stages._runtimes import by_runtime, ways  # noqa: E402
from edgekd.tasks.classification import Classification  # noqa: E402
from edgekd.train.answers import About, Answers, Writer  # noqa: E402
from edgekd.train.config import TrainConfig  # noqa: E402
from edgekd.train.images import ImageRun, Job, Teacher  # noqa: E402
from edgekd.train.loop import reproducible  # noqa: E402
from edgekd.train.memory import kept_memory  # noqa: E402
from edgekd.train.speed import Speed, SpeedConfig  # noqa: E402
from edgekd.train.tune import tune_student, tune_teacher  # noqa: E402
from edgekd.train.views import View  # noqa: E402

MEAN, STD, CLASSES, VIEWS, LONG = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10, 4, 10**6
BARE, OURS = ("student, bare", "bare"), ("alone", "fp32", "eager", "chosen", "kept")


@dataclass(frozen=True)
class Pair:
    teacher: str
    student: str
    size: int
    batch: int

    @property
    def cfg(self) -> TrainConfig:
        return TrainConfig(
            epochs=1000, batch_size=self.batch, optimizer="sgd", lr=0.01, weight_decay=5e-4, augment={"policy": "crop_flip"}, views=VIEWS
        )

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(arch=self.student, num_classes=CLASSES, image_size=self.size, mean=MEAN, std=STD, timm="bench")

    def models(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        student, teacher = (timm.create_model(arch, num_classes=CLASSES) for arch in (self.student, self.teacher))
        return student, teacher.eval().requires_grad_(False)


PAIRS = {
    "resnet56-resnet20": Pair("resnet56_cifar", "resnet20_cifar", 32, 128),
    "vit_small-mobilenetv3": Pair("vit_small_patch16_224", "mobilenetv3_small_100", 224, 32),
    "resnet50-resnet18": Pair("resnet50", "resnet18", 224, 32),
}


def images(folder: Path, size: int, count: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "data" / ("train" if i % 10 else "test") / f"class{i % 7}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
    return folder / "data"


def opened(folder: Path, root: Path, size: int, cache: str) -> Dataset:
    folder.mkdir()
    build(DataConfig(format="image_folder", root=root, image_size=size, cache=cache), 0, folder)
    return Dataset.open(folder, root, workers=2)


def answers(folder: Path, dataset: Dataset) -> Answers:
    """Kept answers; what they say does not matter to the time that reading them takes."""
    work = folder / "work"
    work.mkdir(parents=True)
    writer, rng = Writer(work, About(CLASSES, VIEWS), dataset.split("train"), 0), np.random.default_rng(0)
    while writer.done < writer.total:
        writer.add(rng.standard_normal((len(writer.rest()[1]), CLASSES)).astype(np.float32))
    writer.publish(folder)
    return Answers(folder, dataset.split("train"))


# ------------------------------------------------------------------------------------------------------------ loops
def ours(pair: Pair, dataset: Dataset, work: Path, speeds: tuple[Speed, Speed], teacher: str | Answers) -> Iterator[float]:
    """Seconds of each step of our loop; teacher: `none`, `live`, or its answers."""
    student, guide = pair.models()
    job = Job("bench", student, pair.spec, dataset, Classification(), pair.cfg, 0, work, speeds[0])
    if teacher != "none":
        job.distiller, job.label_weight = KD(KD.Config()), 0.1
        layout = torch.channels_last if speeds[1].channels_last else torch.contiguous_format
        view = View(pair.spec, channels_last=speeds[1].channels_last)
        if isinstance(teacher, Answers):
            job.teacher = teacher
        elif speeds[1].runtime:  # from the files that the tuning made
            job.teacher = by_runtime(guide, pair.spec, speeds[1].runtime, torch.zeros(0), work / "teacher", threads=2, batch=pair.batch)
        else:
            job.teacher = Teacher(guide.to(memory_format=layout), view, speeds[1], batch=pair.batch)
    return timed(ImageRun(job))


def by(way: str, pair: Pair, guide: nn.Module, seen: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    """The teacher by a runtime, as a function of images."""
    teacher = by_runtime(guide, pair.spec, way, seen, folder, threads=2, batch=pair.batch)
    return lambda images: teacher(images, images, 0).logits


def timed(run: ImageRun) -> Iterator[float]:
    """Seconds of each step of a training that goes on."""
    start = time.perf_counter()
    for batch in run.remaining():
        with reproducible("cpu"):
            run.train_step(batch)
        yield time.perf_counter() - start
        start = time.perf_counter()


def bare(pair: Pair, dataset: Dataset, *, alone: bool) -> Iterator[float]:
    """Seconds of each step of a plain loop."""
    student, teacher = pair.models()
    cfg, student = pair.cfg, student.train()
    optimizer = torch.optim.SGD(student.parameters(), cfg.lr, momentum=cfg.momentum, nesterov=True, weight_decay=cfg.weight_decay)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    positions, epoch = dataset.split("train"), 0
    start = time.perf_counter()
    while True:
        for batch in batches(dataset, epoch_order(0, epoch, positions), cfg.batch_size, drop_last=True):
            x = augment(batch.images, torch.from_numpy(batch.positions), cfg.augment, seed=0, epoch=epoch).contiguous()
            x, y = (x - mean) / std, torch.from_numpy(dataset.labels[batch.positions])
            s = student(x)
            loss = F.cross_entropy(s, y)
            if not alone:
                with torch.no_grad():
                    t = teacher(x)
                kd = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 16
                loss = 0.1 * loss + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            float(loss.detach())
            yield time.perf_counter() - start
            start = time.perf_counter()
        epoch += 1


def block(steps: Iterator[float], count: int) -> float:
    next(steps)  # the first step after a switch finds cold caches
    return statistics.median(next(steps) for _ in range(count))


# ------------------------------------------------------------------------------------------------------------ one process each
def variant(name: str, pair: Pair, folder: Path, chosen: tuple[Speed, Speed]) -> Iterator[float]:
    """Seconds of each step of the loop of that name."""
    dataset = Dataset.open(folder / ("off" if name == "files" else "on"), folder / "data", workers=2)
    if name in BARE:
        return bare(pair, dataset, alone=name == "student, bare")
    plain, eager = (Speed(), Speed()), (replace(chosen[0], compiled=False), replace(chosen[1], compiled=False, runtime=""))
    teacher: str | Answers = "none" if name == "alone" else "live"
    if name == "kept":
        teacher = answers(folder / "kept", dataset)
    return ours(pair, dataset, folder, {"fp32": plain, "files": plain, "eager": eager}.get(name, chosen), teacher)


def serve(name: str, pair: Pair, folder: Path, chosen: tuple[Speed, Speed]) -> None:
    """Takes as many steps as each line of standard input says, and answers with their median."""
    with nullcontext() if name in BARE else kept_memory():
        steps = variant(name, pair, folder, chosen)
        for line in sys.stdin:
            print(block(steps, int(line)), flush=True)


class Loop:
    """A process that trains while it is asked to."""

    def __init__(self, name: str, pair: str, folder: Path, chosen: tuple[Speed, Speed]):
        settings = json.dumps([asdict(speed) for speed in chosen])
        command = [sys.executable, __file__, pair, "--serve", name, str(folder), settings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def block(self, count: int) -> float:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a process without pipes")
        print(count, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def measure(name: str, pair: Pair, folder: Path, args: argparse.Namespace) -> None:
    root = images(folder, pair.size, 20 * pair.batch)
    sample = torch.rand(pair.batch, 3, pair.size, pair.size)
    for cache in ("on", "off"):
        opened(folder / cache, root, pair.size, cache)
    student, teacher = pair.models()
    with kept_memory():
        seen = sample[:32]
        make = {way: partial(by, way, pair, teacher, seen, folder / "teacher") for way in ways()}
        tuned = {
            "student": tune_student(student, pair.spec, sample, SpeedConfig(), LONG),
            "teacher": tune_teacher(teacher, pair.spec, sample, SpeedConfig(), LONG, make),
        }
    print(f"\n{name}, {pair.size} x {pair.size}, batch {pair.batch}")
    for side, found in tuned.items():
        print(f"tune: {side}: {found['seconds']} -> {Speed.of(found)} {found['out'] or ''}", flush=True)
    chosen = Speed.of(tuned["student"]), Speed.of(tuned["teacher"])
    loops = {variant: Loop(variant, name, folder, chosen) for variant in (*BARE, *OURS, *(("files",) if args.files else ()))}
    taken: dict[str, list[float]] = {variant: [] for variant in loops}
    for number in range(args.blocks + 1):
        for variant, loop in loops.items():
            seconds = loop.block(args.steps)
            if number:
                taken[variant].append(seconds)
    for loop in loops.values():
        loop.process.communicate()  # the end of its input ends it
    cost = {variant: statistics.median(times) for variant, times in taken.items()}
    print("\n| loop | steps/s | against `bare` | against `alone` | against `student, bare` |\n|---|---|---|---|---|")
    for variant, seconds in cost.items():
        ratios = " | ".join(f"{cost[other] / seconds:.2f}x" for other in ("bare", "alone", "student, bare"))
        print(f"| {variant} | {1 / seconds:.2f} | {ratios} |", flush=True)


# ------------------------------------------------------------------------------------------------------------ memory
def memory(count: int) -> None:
    """Prints the anonymous memory of this process, in bytes, after 40 steps on `count` images."""
    pair = PAIRS["resnet56-resnet20"]
    with tempfile.TemporaryDirectory() as name, kept_memory():
        folder = Path(name)
        dataset = opened(folder / "on", images(folder, pair.size, count), pair.size, "on")
        steps = ours(pair, dataset, folder, (Speed(), Speed()), answers(folder / "kept", dataset))
        for _ in range(40):
            next(steps)
        [kilobytes] = re.findall(r"^Anonymous:\s+(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)
        print(int(kilobytes) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of {', '.join(PAIRS)}; default: all")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs="?", type=int, const=0, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory:
        memory(args.memory)
        return
    if args.memory == 0:
        found = [int(subprocess.check_output([sys.executable, __file__, "--memory", str(n)])) for n in (10_000, 50_000)]
        print(
            f"anonymous memory: {found[0] / 1e6:.0f} MB with 10,000 images, {found[1] / 1e6:.0f} MB with 50,000: {found[1] / found[0] - 1:+.1%}"
        )
        return
    if args.serve:
        name, folder, settings = args.serve
        serve(name, PAIRS[args.pairs[0]], Path(folder), (*map(Speed.of, json.loads(settings)),))
        return
    for name in args.pairs or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, PAIRS[name], Path(folder), args)


if __name__ == "__main__":
    main()
