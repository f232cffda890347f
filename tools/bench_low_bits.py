"""Few bits on CIFAR-10: `python tools/bench_low_bits.py --weights FOLDER [--lossless FILE.npz] [--data FOLDER] [--bits 2 4] [--epochs 10]
[--seed 0]`.

FOLDER of weights holds resnet20-*.th and resnet56-*.th. With --lossless: accuracy after rounding without training, for both models, every width and
bucket size, on 1,000 lossless test images. With --data (train/<class>/*.jpg, test/<class>/*.jpg): ResNet-20 from real weights, trained in a few bits
with ResNet-56 as teacher, beside the fp32 student given the same training and its weights rounded without training; all accuracies on test.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_cifar10 import CODE, edgekd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imported(weights: Path, arch: str, home: Path) -> Path:
    [source] = weights.glob(f"{arch.removesuffix('_cifar')}-*.th")
    out = home / f"{arch}.safetensors"
    edgekd("import", str(source.resolve()), "--arch", arch, *CODE, "--out", str(out), home=home)
    return out


def load(arch: str, path: Path) -> Any:
    import timm
    from safetensors.torch import load_file

    from edgekd.api import run_code

    run_code(ROOT / CODE[1])
    model = timm.create_model(arch, num_classes=10)
    model.load_state_dict(load_file(path))
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ without training
def table(weights: Path, lossless: Path, home: Path) -> None:
    """Rows of model and scope; columns of bits, each with no bucket, 256 and 64."""
    import numpy as np
    import torch

    with np.load(lossless) as file:
        names = {n.lower(): n for n in file.files}
        images = file[next(names[n] for n in names if "test" in n and ("x" in n or "image" in n))]
        labels = torch.from_numpy(file[next(names[n] for n in names if "test" in n and ("y" in n or "label" in n))].astype(np.int64))
    pixels = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    inputs = ((pixels - mean) / std).contiguous()
    print(f"Rounded without training, top-1 on {len(labels)} lossless test images; buckets none / 256 / 64\n")
    print("| | fp32 | " + " | ".join(f"{b} bit" for b in (2, 3, 4, 6, 8)) + " |\n|---|---|" + "---|" * 5)
    for arch in ("resnet20_cifar", "resnet56_cifar"):
        path = imported(weights, arch, home)
        for everything in (True, False):
            cells = [
                "/".join(f"{rounded(load(arch, path), inputs, labels, b, bucket, everything):.1f}" for bucket in (None, 256, 64))
                for b in (2, 3, 4, 6, 8)
            ]
            plain = accuracy(load(arch, path), inputs, labels)
            print(
                f"| {arch} {'all parameters' if everything else 'conv and fc weights'} | {plain:.1f} | " + " | ".join(cells) + " |",
                flush=True,
            )


def rounded(model: Any, inputs: Any, labels: Any, bits: int, bucket: int | None, everything: bool) -> float:
    import torch

    from edgekd.quantize._buckets import uniform_quant

    with torch.no_grad():
        for parameter in model.parameters():
            if everything or parameter.ndim > 1:
                parameter.copy_(uniform_quant(parameter, bits, bucket))
    return accuracy(model, inputs, labels)


def accuracy(model: Any, inputs: Any, labels: Any) -> float:
    import torch

    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in inputs.split(250)])
    return 100 * float((found == labels).float().mean())


# ------------------------------------------------------------------------------------------------------------ trained
def trained(args: Any, home: Path) -> None:
    """One Markdown row a run: the fp32 student with the same training, then each width."""
    files = {arch: imported(args.weights, arch, home) for arch in ("resnet20_cifar", "resnet56_cifar")}
    settings = f"epochs: {args.epochs}, batch_size: 128, augment: {{policy: crop_flip}}"
    student = f"[{{distill: {{method: kd, optimizer: sgd, lr: 0.02, weight_decay: 5e-4, {settings}}}}}]"
    runs = [("fp32, same training", f"stages={student}")]
    for method in args.methods:
        for bits in args.bits:
            width = {"qat": f"weight_bits: {bits}"}.get(method, f"bits: {bits}")
            rate = {"dq": "lr: 1e-3"}.get(method, "lr: 0.02, weight_decay: 2.5e-5")
            runs.append((f"{method} {bits} bit", f"stages=[{{quantize: {{method: {method}, {width}, {rate}, {settings}}}}}]"))
    few = ["-o", f"data.max_per_class={args.per_class}"] if args.per_class else []
    print(f"ResNet-20 from real weights, {args.epochs} epochs on the JPEG folder, teacher ResNet-56 tuned for {args.teacher_epochs}\n")
    print("| run | test top-1 | against fp32 | file | latency | CPU minutes | minutes |\n|---|---|---|---|---|---|---|")
    plain: float | None = None
    for name, stages in runs:
        values = {"data.root": args.data.resolve(), "teacher.weights": files["resnet56_cifar"], "model.weights": files["resnet20_cifar"]}
        values |= {"teacher.train.epochs": args.teacher_epochs, "seed": args.seed}
        overrides = [x for n, v in values.items() for x in ("-o", f"{n}={v}")]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        out = str(home / name.replace(" ", "-").replace(",", ""))
        run = edgekd("compress", "cifar10/resnet20-low-bits", *CODE, *overrides, "-o", stages, *few, "--no-gate", "--out", out, home=home)
        after, target = resource.getrusage(resource.RUSAGE_CHILDREN), run["targets"][0]
        cpu = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
        plain = target["metric"] if plain is None else plain
        print(
            f"| {name} | {target['metric']:.2%} | {100 * (target['metric'] - plain):+.2f} | {target['size_bytes'] / 1e3:.0f} kB | "
            f"{target['latency_ms']['p50']:.2f} ms | {cpu:.0f} | {(time.perf_counter() - start) / 60:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--lossless", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=["qat"], choices=["qat", "qd", "dq"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-class", type=int, help="images of each class; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.lossless:
            table(args.weights, args.lossless, Path(folder))
        if args.data:
            trained(args, Path(folder))


if __name__ == "__main__":
    main()
