"""Students trained by every method under one protocol:
`python tools/bench_methods.py NAME ... [--seeds N] [--methods ...] [--epochs N] [--teacher-epochs N] [--per-class N] [-o KEY=VALUE ...]`,
and for CIFAR `--data FOLDER --weights FILE`.

NAME of a protocol: `digits-vit-to-cnn` and `digits-cnn-to-vit` (ten labels of each class, a teacher that was trained on all of them; built-in data),
`cifar-resnet20` and `cifar-vit` (a CIFAR-10 JPEG folder and the published ResNet-56, tuned on the folder first), or `cifar-mobilenet` (the folder alone: its ViT
is trained on it). Same images, epochs, augmentation and seeds for every method, each with its own defaults; the student alone and plain kd are among them.
Methods that refuse the pair are named and left out. Val chooses among the weights of ten moments of a training, for all alike; test is read at the end.

Writes tools/methods/NAME.csv (every training), NAME.md (mean, standard error, difference to the student alone and to kd, paired by seed, with 95 % intervals;
calibration error and agreement with the teacher) and NAME.svg. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgekd import registry  # noqa: E402
from edgekd.api import Options, check, sweep  # noqa: E402
from edgekd.console import Console  # noqa: E402
from edgekd.store import Store  # noqa: E402
from edgekd.sweep import ALONE, compare  # noqa: E402

OUT = ROOT / "tools" / "methods"
CODE = ROOT / "recipes" / "cifar10" / "resnet_cifar.py"
COMBINED = ("[kd, rkd]", "[kd, nd]", "[kd, crd]", "[kd, rsd]")  # as their papers add them to kd


@dataclass(frozen=True)
class Protocol:
    recipe: str
    families: tuple[str, str]  # of teacher and student
    words: str
    changes: tuple[str, ...] = ()
    code: Path | None = None  # of the published ResNets: takes --weights
    folder: bool = False  # takes --data


FEW = ("data.split.train_per_class=10",)
CIFAR = ("data.split.seed=0", "baselines=[student]", "targets={host: {backend: onnxruntime}}")
_SETTINGS = "augment: {policy: crop_flip}, batch_size: 128"
PROTOCOLS = {
    "digits-vit-to-cnn": Protocol("distill/digits-vit-to-cnn", ("vit", "cnn"), "ViT teacher, CNN student, ten labels of each digit", FEW),
    "digits-cnn-to-vit": Protocol("distill/digits-cnn-to-vit", ("cnn", "vit"), "CNN teacher, ViT student, ten labels of each digit", FEW),
    "cifar-resnet20": Protocol(
        "cifar10/resnet56-to-resnet20",
        ("cnn", "cnn"),
        "ResNet-56 teacher, ResNet-20 student, CIFAR-10 as JPEG",
        (*CIFAR, f"stages=[{{distill: {{method: kd, epochs: 30, optimizer: sgd, lr: 0.1, weight_decay: 5e-4, {_SETTINGS}}}}}]"),
        code=CODE,
        folder=True,
    ),
    "cifar-vit": Protocol(
        "cifar10/resnet56-to-vit",
        ("cnn", "vit"),
        "ResNet-56 teacher, small ViT student, CIFAR-10 as JPEG",
        (*CIFAR, f"stages=[{{distill: {{method: kd, epochs: 30, lr: 1e-3, warmup_epochs: 3, clip_grad: 5, {_SETTINGS}}}}}]"),
        code=CODE,
        folder=True,
    ),
    "cifar-mobilenet": Protocol(
        "cifar10/vit-to-mobilenetv2",
        ("vit", "cnn"),
        "ViT teacher, MobileNetV2 student, CIFAR-10 as JPEG",
        (*CIFAR, f"stages=[{{distill: {{method: kd, epochs: 30, lr: 2e-3, warmup_epochs: 2, {_SETTINGS}}}}}]"),
        folder=True,
    ),
}


def methods_for(families: tuple[str, str]) -> tuple[list[str], list[str]]:
    """Those made for a pair, plain kd first, with combinations; and those that refuse it."""
    every = [n for n in registry.names("distill") if n != "combined"]
    refused = [n for n in every if families not in getattr(registry.load("distill", n), "pairs", {families})]
    return sorted(set(every) - set(refused), key=lambda n: (n != "kd", n)) + list(COMBINED), refused


def trained_teacher(protocol: Protocol, overrides: Sequence[str], home: Store, console: Console) -> tuple[Path, float]:
    """(weights of the protocol's teacher, its accuracy on test), trained once (seed 0) on all labels; its own training in the recipe says how."""
    recipe = check(protocol.recipe, overrides, code=protocol.code).recipe
    teacher = recipe.teacher
    if teacher is None or teacher.train is None:
        raise SystemExit(f"{protocol.recipe} trains no teacher")
    model = teacher.model_dump(mode="json", exclude={"train"}, exclude_defaults=True)
    training = teacher.train.model_dump(mode="json")
    changes = (
        *overrides,
        "teacher=null",
        f"model={model}",
        f"stages=[{{train: {training}}}]",
        "baselines=[]",
        "data.split.train_per_class=null",
    )
    found = sweep(
        protocol.recipe, [], [0], Options(changes, out=OUT / ".teacher", code=protocol.code), test=True, console=console, store=home
    )
    [row] = found["rows"]
    artifact = home.get(row["key"])
    if artifact is None:
        raise SystemExit("the teacher's weights are gone from the store")
    return artifact.path / "model.safetensors", row["test_" + row["metric_name"]]


def run(name: str, protocol: Protocol, args: argparse.Namespace) -> None:
    console, home = Console(), Store()
    given = [f"data.root={args.data.resolve()}"] if protocol.folder else []
    given += [f"teacher.weights={args.weights.resolve()}"] if protocol.code else []
    given += [f"teacher.train.epochs={args.teacher_epochs}"] if args.teacher_epochs else []
    base = (*given, *protocol.changes)
    weights, accuracy = trained_teacher(protocol, base, home, console)
    print(f"teacher: {accuracy:.2%} on test", flush=True)
    changes = [*base, "teacher.train=null", f"teacher.weights={weights}", "distill.keep=best"]
    changes += [f"distill.epochs={args.epochs}"] if args.epochs else []
    changes += [f"data.split.train_per_class={args.per_class}"] if args.per_class else []
    changes += args.override
    methods, refused = methods_for(protocol.families)
    methods = args.methods or methods
    out = OUT / f".{name}"
    options = Options(tuple(changes), out=out, code=protocol.code)
    found = sweep(
        protocol.recipe, [f"distill.method={','.join(methods)}"], range(args.seeds), options, test=True, console=console, store=home
    )
    (out / "sweep.csv").replace(OUT / f"{name}.csv")
    against_kd = {r["variant"]: r for r in compare(found["rows"], "kd")} if "kd" in methods else {}
    text = table(protocol, accuracy, found, against_kd, refused, " ".join(["python tools/bench_methods.py", *shown(sys.argv[1:])]))
    (OUT / f"{name}.md").write_text(text, encoding="utf-8")
    (OUT / f"{name}.svg").write_text(plot(protocol.words, found["comparison"]), encoding="utf-8")
    print(text)


def shown(arguments: list[str]) -> list[str]:
    """The command line without the places of this machine."""
    places = {"--data": "FOLDER", "--weights": "FILE"}
    return [places.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]


def table(
    protocol: Protocol, teacher: float, found: dict[str, Any], against_kd: dict[str, Any], refused: Sequence[str], command: str
) -> str:
    def points(row: dict[str, Any]) -> str:
        if row.get("difference") is None:
            return ""
        ends = row["ci95"]
        return f"{100 * row['difference']:+.2f}" + (f" [{100 * ends[0]:+.2f}, {100 * ends[1]:+.2f}]" if ends else "")

    seeds = max(r["seeds"] for r in found["comparison"])
    lines = [
        f"# {protocol.words}\n",
        f"Top-1 on test in percent, {seeds} seeds, mean and standard error; differences paired by seed, with 95 % intervals. "
        f"The teacher: {100 * teacher:.2f} %. "
        f"Made by `{command}`.\n",
        "| method | top-1 | against the student alone | against kd | calibration error | agreement with the teacher | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["comparison"], key=lambda r: -r["mean"]):
        error = f" ± {100 * row['standard_error']:.2f}" if row["standard_error"] is not None else ""
        share = " | ".join(f"{100 * row[n]:.1f}" if row.get(n) is not None else "" for n in ("ece", "agreement"))
        kd = points(against_kd.get(row["variant"], {}))
        lines.append(
            f"| {row['variant']} | {100 * row['mean']:.2f}{error} | {points(row)} | {kd} | {share} | {row.get('seconds', 0):.0f} |"
        )
    if refused:
        lines.append(f"\nNot made for this pair, and refused: {', '.join(refused)}.")
    failed = [r for r in found["rows"] if r["error"]]
    lines += [f"\nFailed: {r['variant']}, seed {r['seed']}: {r['error']}" for r in failed]
    return "\n".join(lines) + "\n"


def plot(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Dots with two standard errors, best first, as an SVG that is readable on white and on black."""
    rows = sorted(rows, key=lambda r: -r["mean"])
    spread = [2 * (r["standard_error"] or 0) for r in rows]
    low = min(r["mean"] - s for r, s in zip(rows, spread, strict=True)) - 0.002
    high = max(r["mean"] + s for r, s in zip(rows, spread, strict=True)) + 0.002
    left, width, step = 130, 560, 22

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * width

    height = 60 + step * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 80} {height}" font-family="sans-serif" font-size="12" fill="#777">'
    ]
    parts.append(f'<text x="8" y="18" font-size="14">{title}: top-1 on test, bars are two standard errors</text>')
    alone = next((r["mean"] for r in rows if r["variant"] == ALONE), None)
    if alone is not None:
        parts.append(f'<line x1="{x(alone):.1f}" x2="{x(alone):.1f}" y1="30" y2="{height - 20}" stroke="#777" stroke-dasharray="4 3"/>')
    for i, (row, error) in enumerate(zip(rows, spread, strict=True)):
        y = 45 + i * step
        colour = {"kd": "#d97706", ALONE: "#8a8f98"}.get(row["variant"], "#3b82c4")
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{row["variant"]}</text>')
        parts.append(
            f'<line x1="{x(row["mean"] - error):.1f}" x2="{x(row["mean"] + error):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(row["mean"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 10}" y="{y + 4}">{row["mean"]:.2%}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PROTOCOLS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, help="ResNet-56 as `edgekd import` writes it")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--teacher-epochs", type=int)
    parser.add_argument("-o", dest="override", action="append", default=[], metavar="KEY=VALUE", help="of the students' recipe")
    parser.add_argument("--per-class", type=int, help="training images of each class")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    for name in args.names:
        protocol = PROTOCOLS[name]
        if (protocol.folder and not args.data) or (protocol.code and not args.weights):
            parser.error(f"{name} takes --data{' and --weights' if protocol.code else ''}")
        run(name, protocol, args)


if __name__ == "__main__":
    main()
