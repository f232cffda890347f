"""GNN-to-MLP on real graphs: `python tools/bench_graph.py ROW ... --data FOLDER [--seeds 5]`; or `--list`; or `--large`.

A ROW is a graph with its split and a teacher, with the hyper-parameters of the papers' code (FF-G2M's and KRD's for the public split, GLNN's for the split by
class). The teacher is calibrated on val before it teaches; weights are those of the best epoch on val; test is read once. Seeds 0 to N-1, fixed beforehand.
Everything runs through the stages of a recipe and comes from the store the second time. FOLDER holds planetoid/ and npz/.

`--latency`: what one node costs on Amazon-Photo, Cora and Citeseer, hidden width 128, two and three layers, one thread: the GNN with its neighbours fetched and
propagated, the same with its first product cached for every node, and the engine that replaces it; and the whole graph at once. Writes tools/graphs/latency.md.

`--links`: link prediction on Cora: a SAGE teacher, an MLP alone, and one taught by llp. Writes tools/graphs/cora-links.csv and .md.

`--large`: a generated graph of 1,000,000 nodes, 10,000,000 edges, 128 features and 40 classes teaches a student from given soft labels, one epoch by ffg2m in
batches of 8192 nodes; prints seconds and the most memory that the process held. Its files are made by another process.

Writes tools/graphs/ROW.csv (every training) and ROW.md: mean and standard deviation, and differences paired by seed with their standard error.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgekd import recipe  # noqa: E402
from edgekd.console import Console  # noqa: E402
from edgekd.context import Context  # noqa: E402
from edgekd.errors import EdgekdError  # noqa: E402
from edgekd.plan import build_plan  # noqa: E402
from edgekd.run import execute  # noqa: E402
from edgekd.store import Store  # noqa: E402
from edgekd.sweep import measured_part, write_table  # noqa: E402

LARGE = (1_000_000, 10_000_000, 128, 40)
OUT = Path(__file__).parent / "graphs"
ALONE = "student alone"
LINK_METRICS = ("auc", "hits@20", "mrr")
LINK_WEIGHTS = {"label_weight": 0.1, "distribution": 1.0, "rank": 1.0}  # the authors' defaults; they search each from 0.001 to 1000 on val
PUBLIC = {"format": "planetoid"}
BY_CLASS = {"split": {"by": "class", "train": 20, "val": 30, "largest_component": True}, "features": "raw"}


@dataclass(frozen=True)
class Row:
    """A graph, a teacher, and what each method was tuned to for it."""

    words: str
    data: dict[str, Any]
    folder: str
    teacher: dict[str, Any]
    student: dict[str, Any]  # architecture arguments
    train: dict[str, Any] = field(default_factory=dict)  # of the student, whatever the method
    teacher_train: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings, and `student.` ones for its architecture
    bars: dict[str, float] = field(default_factory=dict)  # what a good implementation reaches, percent


ROWS = {
    "cora-gcn": Row(
        "Cora, public split, GCN",
        {**PUBLIC, "name": "cora"},
        "planetoid",
        {"arch": "gcn", "args": {"layers": 3, "hidden": 512, "dropout": 0.5}},
        {"layers": 3, "hidden": 512, "dropout": 0.6},
        methods={
            "glnn": {"label_weight": 0.4},
            "ffg2m": {"label_weight": 0.4, "temperature": 1.5},
            "krd": {"label_weight": 0.5, "temperature": 0.8, "student.dropout": 0.3},
        },
        bars={"teacher": 81.0, "glnn": 82.0, "ffg2m": 83.0, "krd": 83.3},
    ),
    "citeseer-gcn": Row(
        "Citeseer, public split, GCN",
        {**PUBLIC, "name": "citeseer"},
        "planetoid",
        {"arch": "gcn", "args": {"layers": 2, "hidden": 256, "dropout": 0.5}},
        {"layers": 2, "hidden": 256, "dropout": 0.5},
        methods={
            "glnn": {"label_weight": 0.1},
            "ffg2m": {"label_weight": 0.1, "temperature": 1.5},
            "krd": {"label_weight": 0.0, "temperature": 0.9, "student.dropout": 0.6},
        },
        bars={"teacher": 70.8, "glnn": 71.5, "ffg2m": 72.5, "krd": 73.0},
    ),
    "citeseer-sage": Row(
        "Citeseer, public split, SAGE",
        {**PUBLIC, "name": "citeseer"},
        "planetoid",
        {"arch": "sage", "args": {"layers": 2, "hidden": 1024, "dropout": 0.5}},
        {"layers": 2, "hidden": 1024, "dropout": 0.5},
        methods={
            "glnn": {"label_weight": 0.1},
            "ffg2m": {"label_weight": 0.1, "temperature": 1.2},
            "krd": {"label_weight": 0.0, "temperature": 0.8, "student.dropout": 0.4},
        },
        bars={"teacher": 70.0, "glnn": 72.0, "ffg2m": 72.8, "krd": 72.3},
    ),
    "cora-cpf-sage": Row(
        "Cora, largest component, 20 and 30 of each class by seed, raw features, SAGE",
        {**PUBLIC, **BY_CLASS, "name": "cora"},
        "planetoid",
        {"arch": "sage", "args": {"layers": 2, "hidden": 128, "dropout": 0.0}},
        {"layers": 2, "hidden": 128, "dropout": 0.6},
        train={"weight_decay": 5e-3},
        methods={"glnn": {}, "ffg2m": {"label_weight": 0.5, "temperature": 1.3}, "krd": {"label_weight": 0.3, "temperature": 1.1}},
        bars={"teacher": 79.0, "glnn": 79.0},
    ),
    "photo-cpf-sage": Row(
        "Amazon-Photo, largest component, 20 and 30 of each class by seed, raw features, SAGE",
        {"format": "csr_npz", "name": "amazon_photo", **BY_CLASS},
        "npz",
        {"arch": "sage", "args": {"layers": 2, "hidden": 128, "dropout": 0.0}},
        {"layers": 2, "hidden": 128, "dropout": 0.3},
        train={"weight_decay": 2e-3, "lr": 5e-3},
        methods={"glnn": {}, "ffg2m": {"label_weight": 0.2, "temperature": 1.5}, "krd": {"label_weight": 0.0, "temperature": 1.1}},
        bars={"teacher": 90.0, "glnn": 91.5, "ffg2m": 91.0, "krd": 91.0},
    ),
    "cora-cpf-positions": Row(
        "Cora as for cora-cpf-sage, with DeepWalk positions beside the features of all students",
        {**PUBLIC, **BY_CLASS, "name": "cora", "positions": {"size": 64, "walks": 5, "length": 50, "window": 5, "epochs": 1}},
        "planetoid",
        {"arch": "sage", "args": {"layers": 2, "hidden": 128, "dropout": 0.0}},
        {"layers": 2, "hidden": 128, "dropout": 0.6},
        train={"weight_decay": 5e-3},
        methods={"glnn": {}, "nosmog": {"bound": 0.04, "similarity": 0.1, "batch_size": 512, "epochs": 200}},
    ),
    "photo-cpf-positions": Row(
        "Amazon-Photo as for photo-cpf-sage, with DeepWalk positions beside the features of all students",
        {
            "format": "csr_npz",
            "name": "amazon_photo",
            **BY_CLASS,
            "positions": {"size": 64, "walks": 1, "length": 30, "window": 5, "epochs": 1},
        },
        "npz",
        {"arch": "sage", "args": {"layers": 2, "hidden": 128, "dropout": 0.0}},
        {"layers": 2, "hidden": 128, "dropout": 0.1},
        train={"weight_decay": 1e-3, "lr": 1e-3},
        methods={"glnn": {}, "nosmog": {"bound": 0.1, "similarity": 1e-9, "batch_size": 512, "epochs": 200}},
    ),
    "cora-cpf-vqgraph": Row(
        "Cora as for cora-cpf-sage, with the tokenizing teacher of VQGraph",
        {**PUBLIC, **BY_CLASS, "name": "cora"},
        "planetoid",
        {"arch": "vqgcn", "args": {"hidden": 64, "dropout": 0.8}},
        {"layers": 2, "hidden": 128, "dropout": 0.6},
        train={"weight_decay": 5e-3},
        teacher_train={"epochs": 200, "lr": 1e-4, "weight_decay": 1e-3},
        methods={"glnn": {}, "vqgraph": {"batch_size": 512, "epochs": 200}},
    ),
    "cora-gat": Row(
        "Cora, public split, GAT",
        {**PUBLIC, "name": "cora"},
        "planetoid",
        {"arch": "gat", "args": {"layers": 3, "hidden": 1024, "dropout": 0.6}},
        {"layers": 3, "hidden": 1024, "dropout": 0.3},
        methods={
            "glnn": {"label_weight": 0.5},
            "ffg2m": {"label_weight": 0.5, "temperature": 1.2},
            "krd": {"label_weight": 0.2, "temperature": 1.1, "student.dropout": 0.4},
        },
    ),
}


def written(row: Row, method: str | None, data: Path, seed: int) -> dict[str, Any]:
    """The recipe of one training, as values."""
    own = dict(row.methods[method]) if method else {}
    args = row.student | {n.removeprefix("student."): own.pop(n) for n in list(own) if n.startswith("student.")}
    stage = {"distill": {"method": method, **row.train, **own}} if method else {"train": row.train}
    return {
        "version": 1,
        "seed": seed,
        "task": "node_classification",
        "data": row.data | {"root": str(data / row.folder)},
        "teacher": row.teacher | {"train": row.teacher_train},
        "model": {"arch": "mlp", "args": args},
        "stages": [stage],
        "targets": {"host": {"backend": "onnxruntime"}},
    }


def trainings(row: Row, seeds: int, methods: list[str], data: Path, ctx: Context) -> Iterator[dict[str, Any]]:
    """A row of the table for each training: the teacher's first, then the MLP alone, then the methods."""
    for seed in range(seeds):
        for method in [None, *methods]:
            ctx.seed = seed
            loaded = recipe.from_values("bench_graph", written(row, method, data, seed))
            name = "distill" if method else "train"
            plan = measured_part(build_plan(loaded), ["teacher", name], test=True)
            try:
                done = execute(plan, ctx)
            except EdgekdError as error:
                yield {"variant": method or ALONE, "seed": seed, "error": error.what}
                continue
            for model, variant in (("teacher", "teacher"), (name, method or ALONE)):
                if model == "teacher" and method is not None:
                    continue
                body, trained = done.artifacts[f"{model}.test"].json("metrics.json"), done.artifacts[model]
                yield {
                    "variant": variant,
                    "seed": seed,
                    **{n: round(v, 6) for n, v in body["metrics"].items()},
                    "temperature": done.artifacts["teacher.answers"].meta["temperature"] if model == "teacher" else "",
                    "epochs": len(done.artifacts[model].json("curves.json")),
                    "seconds": trained.meta.get("seconds"),
                    "error": "",
                }


def table(row: Row, found: list[dict[str, Any]], command: str) -> str:
    good = {(r["variant"], r["seed"]): 100 * r["accuracy"] for r in found if not r["error"]}
    variants = list(dict.fromkeys(v for v, _ in good))

    def paired(one: str, other: str) -> str:
        gains = [good[one, s] - good[other, s] for v, s in good if v == one and (other, s) in good]
        if one == other or len(gains) < 2:
            return ""
        return f"{mean(gains):+.2f} ± {stdev(gains) / len(gains) ** 0.5:.2f}"

    lines = [
        f"# {row.words}\n",
        f"Test accuracy in percent at the best epoch on val, mean and standard deviation; differences paired by seed, mean and standard error. Made by `{command}`.\n",
        "| model | accuracy | seeds | bar | against the MLP alone | against glnn | against the teacher | macro-F1 | calibration error | agreement with the teacher | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in variants:
        mine = [r for r in found if r["variant"] == v and not r["error"]]
        values = [good[v, r["seed"]] for r in mine]
        spread = stdev(values) if len(values) > 1 else 0.0
        bar = row.bars.get(v)
        reached = "" if bar is None else f"{bar:.1f}: {'reached' if mean(values) + spread / len(values) ** 0.5 >= bar else '**missed**'}"
        extra = [f"{100 * mean(r[n] for r in mine):.1f}" if all(n in r for r in mine) else "" for n in ("macro_f1", "ece", "agreement")]
        seconds = f"{mean(r['seconds'] for r in mine):.0f}"
        cells = [
            v,
            f"{mean(values):.2f} ± {spread:.2f}",
            str(len(values)),
            reached,
            paired(v, ALONE),
            paired(v, "glnn"),
            paired(v, "teacher"),
        ]
        lines.append("| " + " | ".join([*cells, *extra, seconds]) + " |")
    failed = [f"{r['variant']}, seed {r['seed']}: {r['error']}" for r in found if r["error"]]
    return "\n".join(lines + (["", "Failed: " + "; ".join(failed)] if failed else [])) + "\n"


def links(data: Path, seeds: int, work: Path) -> tuple[str, list[dict[str, Any]]]:
    """Teacher, MLP alone and llp on Cora's links: 5 % for val, 10 % for test, by seed."""
    size = {"layers": 2, "hidden": 256, "dropout": 0.5}
    ways = {ALONE: {"train": {}}, "llp": {"distill": {"method": "llp", **LINK_WEIGHTS}}}
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for variant, stage in ways.items():
            values = {
                "version": 1,
                "seed": seed,
                "task": "link_prediction",
                "data": {"format": "planetoid", "name": "cora", "features": "raw", "root": str(data / "planetoid")},
                "teacher": {"arch": "sage", "args": {"kind": "mean", **size}, "train": {}},
                "model": {"arch": "mlp", "args": size},
                "stages": [stage],
                "targets": {"host": {"backend": "onnxruntime"}},
            }
            [name] = stage
            ctx = Context(Store(), Console(quiet=True), work=work)
            ctx.seed = seed
            done = execute(measured_part(build_plan(recipe.from_values("links", values)), ["teacher", name], test=True), ctx)
            for model, who in (("teacher", "teacher"), (name, variant)):
                if model != "teacher" or variant == ALONE:
                    body = done.artifacts[f"{model}.test"].json("metrics.json")["metrics"]
                    found.append({"variant": who, "seed": seed, **{n: round(v, 6) for n, v in body.items()}, "error": ""})
                    print("links", {n: found[-1].get(n) for n in ("variant", "seed", *LINK_METRICS)}, file=sys.stderr, flush=True)
    lines = [
        "# Links of Cora\n",
        "SAGE (mean), 5 % of the links for val and 10 % for test by seed, as many pairs without a link beside them; on test, percent, weights chosen "
        "by AUC on val; mean and standard deviation, and llp against the MLP alone paired by seed, with its standard error. "
        f"Made by `python tools/bench_graph.py --links --data FOLDER --seeds {seeds}`.\n",
        "| model | " + " | ".join(LINK_METRICS) + " |",
        "|---" * (1 + len(LINK_METRICS)) + "|",
    ]

    def values_of(who: str, metric: str) -> list[float]:
        return [100 * r[metric] for r in found if r["variant"] == who]

    for who in ("teacher", ALONE, "llp"):
        cells = [f"{mean(v):.2f} ± {stdev(v) if len(v) > 1 else 0:.2f}" for v in (values_of(who, m) for m in LINK_METRICS)]
        lines.append("| " + " | ".join([who, *cells]) + " |")
    gains = [[a - b for a, b in zip(values_of("llp", m), values_of(ALONE, m), strict=True)] for m in LINK_METRICS]
    if seeds > 1:
        lines.append(
            "| llp against the MLP alone | " + " | ".join(f"{mean(g):+.2f} ± {stdev(g) / len(g) ** 0.5:.2f}" for g in gains) + " |"
        )
    return "\n".join(lines) + "\n", found


def latency(data: Path) -> str:
    """A table of milliseconds and ratios; weights are hardly trained, which changes nothing about them."""
    lines = [
        "# What one node costs\n",
        "SAGE against an MLP, hidden width 128, one thread, one random node at a time, median milliseconds of interleaved runs; the student's engine as `backend: auto` and "
        "`ptq` ship it, its row fetched from memory. Made by `python tools/bench_graph.py --latency --data FOLDER`.\n",
        "| graph, layers | engine | student | GNN, neighbours fetched | | GNN, first product cached | | whole graph, µs a node: GNN | student | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    graphs = {"amazon_photo": ({"format": "csr_npz", **BY_CLASS}, "npz"), "cora": (PUBLIC, "planetoid"), "citeseer": (PUBLIC, "planetoid")}
    for name, (settings, folder) in graphs.items():
        for layers in (2, 3):
            size = {"layers": layers, "hidden": 128}
            few = {"epochs": 20, "patience": 0}
            values = {
                "version": 1,
                "task": "node_classification",
                "data": settings | {"name": name, "root": str(data / folder)},
                "teacher": {"arch": "sage", "args": size, "train": few, "calibrated": False},
                "model": {"arch": "mlp", "args": size},
                "stages": [{"distill": {"method": "glnn", **few}}, {"quantize": {"method": "ptq"}}],
                "targets": {"host": {}},
                "accept": {"accuracy_drop_max": 1},
            }
            with tempfile.TemporaryDirectory() as work:
                plan = build_plan(recipe.from_values("latency", values))
                done = execute(plan, Context(Store(Path(work) / "home"), Console(quiet=True), work=Path(work)))
                body = done.artifacts["teacher.served"].json("trace.json")
                engine = done.artifacts["host.bundle"].json("bundle/bundle.json")
            shown = [f"{body['latency'][n]['p50']:.3f}" for n in ("student", "fetched", "cached")]
            times = [f"{body['ratios'][n]['ratio']:.1f}x" for n in ("fetched", "cached")]
            whole = body["whole_us_per_node"]
            cells = [f"{name}, {layers}", engine["precision"], shown[0], shown[1], times[0], shown[2], times[1]]
            cells += [f"{whole['teacher']:.2f}", f"{whole['student']:.2f}", f"{whole['teacher'] / whole['student']:.1f}x"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def make_large(folder: Path) -> None:
    """A graph whose communities are its classes, and soft labels of every node."""
    nodes, edges, width, classes = LARGE
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, nodes)
    order = np.argsort(y, kind="stable")
    start = rng.integers(0, nodes, edges)
    place = np.empty(nodes, np.int64)
    place[order] = np.arange(nodes)
    near = np.clip(place[start] + rng.integers(-5000, 5000, edges), 0, nodes - 1)  # mostly of the same class
    end = np.where(rng.random(edges) < 0.8, order[near], rng.integers(0, nodes, edges))
    means = rng.standard_normal((classes, width)).astype(np.float32)
    x = means[y] * 0.3 + rng.standard_normal((nodes, width), dtype=np.float32)
    part = rng.permutation(nodes)
    masks = {
        f"{n}_mask": np.isin(np.arange(nodes), p)
        for n, p in zip(("train", "val", "test"), np.split(part[:60_000], [20_000, 40_000]), strict=True)
    }
    np.savez(folder / "graph.npz", x=x, edge_index=np.stack([start, end]), y=y, **masks)
    said = 3 * np.eye(classes, dtype=np.float32)[y] + rng.standard_normal((nodes, classes), dtype=np.float32)
    np.savez(folder / "said.npz", ids=np.arange(nodes).astype("U7"), logits=said)


def learn_large(folder: Path) -> None:
    """Prints seconds a step and the peak of this process's memory."""
    stage = {"distill": {"method": "ffg2m", "epochs": 1, "batch_size": 8192, "neighbours": 10}}
    values = {
        "version": 1,
        "task": "node_classification",
        "data": {"format": "arrays", "root": str(folder / "graph.npz")},
        "teacher": {"predictions": str(folder / "said.npz")},
        "model": {"arch": "mlp", "args": {"layers": 2, "hidden": 128}},
        "stages": [stage],
        "targets": {"host": {"backend": "onnxruntime"}},
    }
    plan = measured_part(build_plan(recipe.from_values("large", values)), ["distill"], test=True)
    done = execute(plan, Context(Store(folder / "home"), Console(quiet=True), work=folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in done.seconds.items() if seconds >= 1)
    said = {n: round(v, 4) for n, v in done.artifacts["distill.test"].json("metrics.json")["metrics"].items()}
    print(f"peak memory {peak / 1e9:.2f} GB; {took}; {said}")


def large() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in ("make", "learn"):
            subprocess.run([sys.executable, __file__, "--large", part, folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--large", nargs="*")
    args = parser.parse_args()
    if args.large is not None:
        large() if not args.large else {"make": make_large, "learn": learn_large}[args.large[0]](Path(args.large[1]))
        return
    if args.list or args.data is None or not (args.rows or args.latency or args.links):
        print("\n".join(f"{name}: {row.words}" for name, row in ROWS.items()))
        return
    OUT.mkdir(exist_ok=True)
    if args.latency:
        text = latency(args.data)
        (OUT / "latency.md").write_text(text, encoding="utf-8")
        print(text)
    if args.links:
        with tempfile.TemporaryDirectory() as folder:
            text, rows = links(args.data, args.seeds, Path(folder))
            write_table(rows, Path(folder)).replace(OUT / "cora-links.csv")
        (OUT / "cora-links.md").write_text(text, encoding="utf-8")
        print(text)
    for name in args.rows:
        row = ROWS[name]
        methods = args.methods or list(row.methods)
        with tempfile.TemporaryDirectory() as folder:
            console = Console(quiet=True)
            ctx = Context(Store(), console, work=Path(folder))
            found: list[dict[str, Any]] = []
            for one in trainings(row, args.seeds, methods, args.data, ctx):
                found.append(one)
                print(
                    name,
                    {n: one.get(n) for n in ("variant", "seed", "accuracy", "epochs", "seconds", "error")},
                    file=sys.stderr,
                    flush=True,
                )
            write_table(found, Path(folder)).replace(OUT / f"{name}.csv")
        command = f"python tools/bench_graph.py {name} --data FOLDER --seeds {args.seeds}"
        text = table(row, found, command)
        (OUT / f"{name}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
