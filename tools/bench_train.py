"""Steps per second of edgekd's loop against a bare PyTorch loop with the same maths, batches and augmentation.

ResNet-56 teaches ResNet-20 at 32 x 32, batch 128, kd, SGD. Blocks of steps of each variant are interleaved in one process; the figures are ratios of
medians over the blocks. Memory is kept between steps for all of them, since one process has one malloc; `--give-back` measures without.
`python tools/bench_train.py [--blocks N] [--steps N] [--give-back]`

    bare            torch loop: fp32, teacher in eval and no_grad, augmented batches from the same functions
    edgekd fp32     our loop with autocast and channels_last off
    edgekd chosen   our loop with what `tune` measured as fastest
    edgekd files    our loop decoding JPEG files each epoch instead of reading the decoded cache
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "cifar10")]

from resnet_cifar import CifarResNet  # noqa: E402

from edgekd.data.augment import augment  # noqa: E402
from edgekd.data.config import DataConfig  # noqa: E402
from edgekd.data.dataset import Dataset, build  # noqa: E402
from edgekd.data.loader import batches, epoch_order  # noqa: E402
from edgekd.distill.kd import KD  # noqa: E402
from edgekd.models.spec import ModelSpec  # noqa: E402
from edgekd.tasks.classification import Classification  # noqa: E402
from edgekd.train.config import TrainConfig  # noqa: E402
from edgekd.train.loop import Job, Speed, Teacher, _reproducible, _Run  # noqa: E402
from edgekd.train.memory import kept_memory  # noqa: E402
from edgekd.train.tune import options, tune_student, tune_teacher  # noqa: E402
from edgekd.train.views import View  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = ModelSpec(arch="resnet20_cifar", num_classes=10, image_size=32, mean=MEAN, std=STD, timm="bench")
CFG = TrainConfig(epochs=1000, batch_size=128, optimizer="sgd", lr=0.05, weight_decay=5e-4, augment={"policy": "crop_flip"})


def images(folder: Path, count: int = 2560) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "data" / ("train" if i % 10 else "test") / f"class{i % 7}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder / "data"


def ours(dataset: Dataset, speed: Speed, teacher_speed: Speed, work: Path) -> Iterator[float]:
    """Seconds of each step of our loop."""
    torch.manual_seed(0)
    student, teacher = CifarResNet(3), CifarResNet(9).eval().requires_grad_(False)
    layout = torch.channels_last if teacher_speed.channels_last else torch.contiguous_format
    guide = Teacher(teacher.to(memory_format=layout), View(SPEC, channels_last=teacher_speed.channels_last), teacher_speed)
    run = _Run(
        Job(
            "bench",
            student,
            SPEC,
            dataset,
            Classification(),
            CFG,
            0,
            work,
            speed,
            distiller=KD(KD.Config()),
            label_weight=0.1,
            teacher=guide,
        )
    )
    start = time.perf_counter()
    for batch in run.remaining():
        with _reproducible("cpu"):
            run.train_step(batch.positions, batch.images)
        yield time.perf_counter() - start
        start = time.perf_counter()


def bare(dataset: Dataset) -> Iterator[float]:
    """Seconds of each step of a plain loop."""
    torch.manual_seed(0)
    student, teacher = CifarResNet(3).train(), CifarResNet(9).eval()
    optimizer = torch.optim.SGD(student.parameters(), CFG.lr, momentum=CFG.momentum, nesterov=True, weight_decay=CFG.weight_decay)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    positions, epoch = dataset.split("train"), 0
    start = time.perf_counter()
    while True:
        for batch in batches(dataset, epoch_order(0, epoch, positions), CFG.batch_size, drop_last=True):
            x = augment(batch.images, torch.from_numpy(batch.positions), CFG.augment, seed=0, epoch=epoch).contiguous()
            x, y = (x - mean) / std, torch.from_numpy(dataset.labels[batch.positions])
            with torch.no_grad():
                t = teacher(x)
            s = student(x)
            kd = F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 16
            loss = 0.1 * F.cross_entropy(s, y) + 0.9 * kd
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--give-back", action="store_true", help="leave malloc as it is: freed memory goes back to the kernel")
    args = parser.parse_args()
    with nullcontext() if args.give_back else kept_memory(), tempfile.TemporaryDirectory() as folder:
        root = images(Path(folder))
        sets = {}
        for cache in ("on", "off"):
            (Path(folder) / cache).mkdir()
            build(DataConfig(format="image_folder", root=root, image_size=32, cache=cache), 0, Path(folder) / cache)
            sets[cache] = Dataset.open(Path(folder) / cache, root, workers=2)
        sample = torch.rand(128, 3, 32, 32)
        student, teacher = (
            f(m, SPEC, sample, options("auto", "auto")) for f, m in ((tune_student, CifarResNet(3)), (tune_teacher, CifarResNet(9).eval()))
        )
        chosen = [Speed(d["autocast"], d["channels_last"]) for d in (student, teacher)]
        print(f"tune: student {student['seconds']} -> {chosen[0]}; teacher {teacher['seconds']} -> {chosen[1]}")
        variants: dict[str, Callable[[], Iterator[float]]] = {
            "bare": lambda: bare(sets["on"]),
            "edgekd fp32": lambda: ours(sets["on"], Speed(), Speed(), Path(folder)),
            "edgekd chosen": lambda: ours(sets["on"], *chosen, Path(folder)),
            "edgekd files": lambda: ours(sets["off"], Speed(), Speed(), Path(folder)),
        }
        running = {name: make() for name, make in variants.items()}
        taken: dict[str, list[float]] = {name: [] for name in running}
        for number in range(args.blocks + 1):
            for name, steps in running.items():
                seconds = block(steps, args.steps)
                if number:
                    taken[name].append(seconds)
        base = statistics.median(taken["bare"])
        for name, times in taken.items():
            median = statistics.median(times)
            print(f"{name:14s} {1 / median:6.2f} steps/s   {base / median:5.3f}x bare   ({len(times)} blocks of {args.steps})")


if __name__ == "__main__":
    main()
