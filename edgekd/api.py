"""The typed functions behind every command. They return data and raise EdgekdError; they print only through the given console."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, GoalMissed, UsageError
from edgekd.listing import list_devices, list_methods, list_recipes, show_device, show_method, store_gc, store_rows, store_verify, store_why

__all__ = [
    "Options",
    "check",
    "compress",
    "examine",
    "exit_code",
    "import_checkpoint",
    "list_devices",
    "list_methods",
    "list_recipes",
    "plan",
    "predict",
    "profile",
    "read_run",
    "render_again",
    "run_chain",
    "run_code",
    "run_single",
    "show",
    "show_device",
    "show_method",
    "sign",
    "store_gc",
    "store_rows",
    "store_verify",
    "store_why",
    "sweep",
    "verdicts",
    "verify",
    "wire",
]
if TYPE_CHECKING:
    from edgekd.console import Console
    from edgekd.context import Context
    from edgekd.plan import Plan
    from edgekd.recipe import Loaded
    from edgekd.single import Own
    from edgekd.store import Store
    from edgekd.train.ranks import Ranks


@dataclass(frozen=True)
class Options:
    """How `compress` behaves beside the recipe."""

    overrides: Sequence[str] = ()
    devices: Sequence[str] = ()
    out: Path | None = None  # default: runs/<recipe>-<n>
    code: Path | None = None  # a user's own architectures and methods
    gate: bool = True
    require_measured: bool = False
    allow_download: bool = False
    replay: Path | None = None  # a run folder or decisions.json
    require_built: bool = False  # a target whose engine cannot be built here is an error
    command: Sequence[str] = field(default_factory=lambda: ("edgekd", *sys.argv[1:]))


def compress(recipe: str, options: Options | None = None, *, console: Console | None = None, store: Store | None = None) -> dict[str, Any]:
    """Runs a recipe's whole chain; returns the object of run.json. Raises EdgekdError; a missed goal is in the result, not raised."""
    from edgekd.recipe import load

    options = options or Options()
    run_code(options.code)
    return run_chain(load(recipe, options.overrides, devices=options.devices), options, console=console, store=store)


def run_chain(loaded: Loaded, options: Options, *, console: Console | None = None, store: Store | None = None) -> dict[str, Any]:
    """The one code path of `compress` and of the single-stage commands."""
    from edgekd.console import Console as RealConsole
    from edgekd.context import Context
    from edgekd.lessons import lessons
    from edgekd.plan import build_plan
    from edgekd.run import decisions_of, execute, help_with
    from edgekd.store import Store as RealStore
    from edgekd.summary import summarise
    from edgekd.wiring import chosen

    started = time.perf_counter()
    ranks = _ranks()
    console = console if console and (ranks is None or ranks.first) else RealConsole(quiet=True)
    store = store or RealStore(warn=console.warn)
    loaded, told = chosen(_fetched(loaded, options, store))
    for line in told:
        console.say(line)
    plan = build_plan(loaded, gate=options.gate, cache_dir=store.root)
    if options.require_built:
        _check_builders(plan)
    _check_reachable(plan, options, console)
    for note in plan.notes:
        console.warn(note)
    ctx = Context(store, console, loaded.recipe.seed, replay=read_decisions(options.replay))
    ctx.allow_download = options.allow_download
    if (data := loaded.recipe.data) is not None:
        ctx.data_root, ctx.data_workers = data.root, getattr(data, "workers", 0)
    _check_space(plan, ctx)
    if ranks and not ranks.first:
        with ctx.stop.installed() if _main_thread() else _nothing():
            help_with(plan, ctx, ranks)
        raise SystemExit(0)  # the first process has the result
    with (
        _run_folder(options.out, loaded.name, [t.name for t in plan.targets]) as folder,
        ctx.stop.installed() if _main_thread() else _nothing(),
    ):
        done = execute(plan, ctx, ranks)
    _copy_bundles(plan, done, folder)
    for line in done.artifacts["data"].meta.get("skipped", {}):
        console.warn(f"left out of the data: {line}")
    for line in lessons(plan, done):
        console.warn(line)
    run = summarise(
        plan,
        done,
        folder,
        command=list(options.command),
        seconds=time.perf_counter() - started,
        warnings=console.warnings,
        environment=environment(),
    )
    _write_run(folder, run, decisions_of(plan, done))
    return run


def _fetched(loaded: Loaded, options: Options, store: Store) -> Loaded:
    """The recipe with the folder of a published graph that it names, downloaded where that is allowed."""
    from edgekd.data.graphs._published import fetch, wanted
    from edgekd.data.nodes_config import NodesConfig

    data = loaded.recipe.data
    if not options.allow_download or not isinstance(data, NodesConfig) or not wanted(data):
        return loaded
    found = data.model_copy(update={"root": fetch(data, store.root / "downloads")})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"data": found}))


def _ranks() -> Ranks | None:
    """The processes that torchrun started with this one; None where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from edgekd.train.ranks import joined  # torch

    return joined()


def run_single(
    kind: str, body: Mapping[str, Any], own: Own, options: Options | None = None, *, console: Console | None = None
) -> dict[str, Any]:
    """One stage (`prune`, `quantize`, `train`, `distill`, `export`, `compile`) on a user's own model; returns the object of run.json."""
    from edgekd.single import single_recipe

    options = options or Options()
    if kind == "compile":  # an engine is what was asked for
        options = replace(options, require_built=True)
    run_code(options.code)
    return run_chain(single_recipe(kind, body, own, overrides=options.overrides, devices=options.devices), options, console=console)


def sweep(
    recipe: str,
    vary: Sequence[str],
    seeds: Sequence[int],
    options: Options | None = None,
    *,
    until: str | None = None,
    test: bool = False,
    against: str | None = None,
    console: Console | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Trains a recipe's first learning model (or `until`) with every combination; returns rows, their comparison and the table's path.

    A combination that fails is a row with its error, and `exit_code` is that of the first; raises it where all failed.
    """
    from edgekd.console import Console as RealConsole
    from edgekd.context import Context
    from edgekd.recipe import load
    from edgekd.store import Store as RealStore
    from edgekd.sweep import cells, compare, distinct, failed_row, run_cell, write_table
    from edgekd.wiring import chosen

    options = options or Options()
    run_code(options.code)
    console = console or RealConsole(quiet=True)
    store = store or RealStore(warn=console.warn)
    todo = cells(vary, seeds)
    loads = [
        chosen(_fetched(load(recipe, (*options.overrides, *cell.overrides), devices=options.devices), options, store))[0] for cell in todo
    ]  # all problems before any training
    rows: list[dict[str, Any]] = []
    failures: list[EdgekdError] = []
    with _run_folder(options.out, f"{loads[0].name}-sweep", ()) as folder:
        for number, (cell, loaded) in enumerate(zip(todo, loads, strict=True), 1):
            console.say(f"({number}/{len(todo)}) {cell.variant}, seed {cell.seed}")
            ctx = Context(store, console, loaded.recipe.seed)
            ctx.allow_download = options.allow_download
            if (data := loaded.recipe.data) is not None:
                ctx.data_root, ctx.data_workers = data.root, getattr(data, "workers", 0)
            try:
                with ctx.stop.installed() if _main_thread() else _nothing():
                    rows += run_cell(cell, loaded, ctx, until, test=test, gate=options.gate)
            except EdgekdError as error:
                failures.append(error)
                rows.append(failed_row(cell, error))
                console.warn(f"{cell.variant}, seed {cell.seed}: {rows[-1]['error']}")
            table = write_table(distinct(rows), folder)
    if len(failures) == len(todo):
        raise failures[0]
    found = {"recipe": loads[0].name, "table": str(table), "rows": distinct(rows), "comparison": compare(distinct(rows), against)}
    return found | {"failed": len(failures), "exit_code": failures[0].exit_code if failures else 0}


def plan(recipe: str, options: Options | None = None) -> list[dict[str, Any]]:
    """Rows of step, stage, gives, state (cached, run, depends on gate, skipped), why, and seconds and bytes of the last similar run."""
    from edgekd.forecast import forecast
    from edgekd.plan import build_plan, state_of
    from edgekd.recipe import load
    from edgekd.store import Store
    from edgekd.wiring import chosen

    options = options or Options()
    run_code(options.code)
    (loaded, _), store = chosen(load(recipe, options.overrides, devices=options.devices)), Store()
    built = build_plan(loaded, gate=options.gate, cache_dir=store.root)
    outlooks = list(state_of(built, store.peek, read_decisions(options.replay), store.get))
    past = [(manifest, size) for manifest, _, size, _ in store.entries()] if any(o.state != "cached" for o in outlooks) else []
    return [
        {"step": o.step.name, "stage": o.step.stage, "method": o.step.settings.method, "gives": str(o.step.gives), "state": o.state}
        | told
        | {"listed": o.step.user}
        for o, told in zip(outlooks, forecast(outlooks, past), strict=True)
    ]


def check(recipe: str, overrides: Sequence[str] = (), *, devices: Sequence[str] = (), code: Path | None = None) -> Loaded:
    """The validated recipe; raises RecipeError with every problem at once."""
    from edgekd.recipe import load

    run_code(code)
    return load(recipe, overrides, devices=devices)


def show(recipe: str, overrides: Sequence[str] = (), *, code: Path | None = None) -> list[dict[str, Any]]:
    """Every value of a recipe with its source: rows of path, value, source."""
    from edgekd.recipe import resolved

    return resolved(check(recipe, overrides, code=code))


def wire(
    recipe: str, overrides: Sequence[str] = (), *, code: Path | None = None, classes: int | None = None, step: str | None = None
) -> dict[str, Any]:
    """How teacher and student are wired: models, stages, loss terms, warnings, and `yaml`, the recipe's stages written out. Trains nothing."""
    from edgekd.wiring import wire as wiring

    return wiring(check(recipe, overrides, code=code), classes=classes, step=step)


def import_checkpoint(
    path: Path,
    arch: str,
    *,
    args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Path | None = None,
    code: Path | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint in a limited child, fits it to the architecture and writes safetensors; runs no code of the file."""
    run_code(code)
    from edgekd.models.importing import import_weights

    return import_weights(path, arch, dict(args or {}), num_classes=num_classes, image_size=image_size, mean=mean, std=std, out=out)


def profile(
    model: Path,
    *,
    device: str = "host",
    backend: str = "auto",
    threads: int = 1,
    batch: int = 1,
    layers: bool = False,
    via: str | None = None,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Measures an ONNX file or bundle: latency with intervals, memory, load time, size, and per-operator times."""
    from edgekd.export.own import own_file
    from edgekd.profile.report import profile_model

    with own_file(model):
        return profile_model(model, device=device, backend=backend, threads=threads, batch=batch, layers=layers, via=via, seconds=seconds)


def predict(model: Path, device: str, *, threads: int = 1, batch: int = 1) -> dict[str, Any]:
    """Roofline latency of an ONNX file on a device that is not here; always labelled predicted."""
    from edgekd.profile.device import load_device
    from edgekd.profile.predict import predict as predict_graph
    from edgekd.profile.report import model_file_of

    return predict_graph(model_file_of(model), load_device(device), threads=threads, batch=batch).as_dict()


def sign(bundle: Path, key: Path, *, password: Callable[[], str] | None = None) -> dict[str, Any]:
    """Signs an intact bundle with the user's own Ed25519 key (PEM): manifest.sig. `password` is asked where the key is encrypted."""
    from edgekd.signature import sign as sign_bundle

    return {"bundle": str(bundle), "signature": str(sign_bundle(bundle, key, password))}


def verify(
    bundle: Path,
    *,
    against: Path | None = None,
    build: bool = False,
    signed_by: Path | None = None,
    run_engine: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Checks a bundle: every file's hash, its sample outputs on this machine's onnxruntime and by its own runtime, and what differs.

    An engine, which is code, is run only where it was signed by whom you name, built here just now, or with `run_engine`.

    With `signed_by`, a public key in PEM, it must carry a signature by that key. With `build`, its engine is first built again by this
    machine's runtime, and a signature removed.

    With `against`, compares two ONNX files or bundles of one model instead; raises ParityBroken that names the first node that breaks.
    """
    from edgekd.console import Console as RealConsole
    from edgekd.verify import rebuild, verify_against, verify_bundle

    if against is not None:
        return verify_against(bundle, against)
    unsigned = build and rebuild(bundle, console or RealConsole(quiet=True))["unsigned"]
    found = verify_bundle(bundle, signed_by=signed_by, run_engine=run_engine or build)
    return found | {"signature": "removed: the manifest changed with the engine; sign it again"} if unsigned else found


def examine() -> list[dict[str, Any]]:
    """The doctor's checks: status, name, seen, wanted, hint."""
    from dataclasses import asdict

    from edgekd.doctor import examine as checks

    return [asdict(c) for c in checks()]


def render_again(run: Path) -> dict[str, Any]:
    """Writes report.html of a run folder from its run.json; returns the run."""
    from edgekd.report.html import render
    from edgekd.safeio.files import write_atomic

    body = read_run(run)
    write_atomic(run / "report.html", render(body).encode())
    return body


def verdicts(run: Path) -> list[dict[str, Any]]:
    """Rows of stage, verdict and reason for every stage that was judged."""
    return [{"stage": s["name"], "verdict": s["verdict"], "reason": s["reason"]} for s in read_run(run)["stages"] if s.get("reason")]


def read_run(run: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    try:
        body = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"no run can be read: {error}", where=str(run), expected="a folder that `edgekd compress` made") from error
    if not isinstance(body, dict) or not isinstance(body.get("stages"), list) or not isinstance(body.get("targets"), list):
        raise UsageError("its run.json is no run", where=str(run), expected="a folder that `edgekd compress` made")
    return body


# ------------------------------------------------------------------------------------------------------------ user code
def run_code(path: Path | None) -> None:
    """Runs a user's own file, named on the command line: the only way in for code."""
    if path is None:
        return
    import importlib.util

    name = f"edgekd_code_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'", where="--code", expected="a Python file with architectures or methods")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' is not a Python file", where="--code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"the file raises {type(error).__name__}: {error}", where=str(path), hint="run it alone: python FILE") from error


# ------------------------------------------------------------------------------------------------------------ the run folder
def read_decisions(path: Path | None) -> dict[str, Any]:
    """Decisions of an earlier run, by step name."""
    if path is None:
        return {}
    file = path / "decisions.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"no decisions can be read: {error}", where=str(file), expected="a run folder or its decisions.json") from error
    if not isinstance(found, dict):
        raise UsageError("this is no decisions.json", where=str(file), expected="an object of decisions by step")
    return found


def environment() -> dict[str, Any]:
    """Versions and machine, for the report; nothing that names the user."""
    import platform

    from edgekd import registry
    from edgekd.plan import library_version
    from edgekd.profile.host import identity

    names = ("edgekd", "torch", "timm", "onnx", "numpy")
    return {
        "python": platform.python_version(),
        "machine": identity(),
        "libraries": {n: v for n in names if (v := library_version(n)) != "absent"},
        "runtimes": {n: v for n in registry.names("backend") if (v := registry.load("backend", n)().version()) != "none"},
    }


def exit_code(run: Mapping[str, Any]) -> int:
    """0, or 4 where budget, acceptance or parity was missed; the artifacts are kept either way."""
    return 0 if run["accepted"] else GoalMissed.exit_code


@contextmanager
def _run_folder(out: Path | None, name: str, targets: Sequence[str]) -> Iterator[Path]:
    """Where results go: made before anything runs, so that a bad place is refused at once; gone again if nothing was written."""
    try:
        folder = _named_folder(out, targets) if out is not None else _new_folder(Path("runs"), name.replace("/", "-"))
    except OSError as error:
        raise UsageError(
            f"the run folder cannot be made: {os.strerror(error.errno or 0).lower()}",
            where=str(out or "runs"),
            expected="a place that you may write to",
            hint="--out FOLDER",
        ) from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _named_folder(out: Path, targets: Sequence[str]) -> Path:
    """The user's folder, if what would be replaced there is a bundle of an earlier run."""
    from edgekd.bundle import MANIFEST

    for there in (out / t for t in targets):
        if there.exists() and not (there / MANIFEST).is_file():
            raise UsageError(
                f"'{there.name}' is there already, and is no bundle of an earlier run",
                where=str(out),
                expected="an empty folder, or that of an earlier run",
                hint="--out ANOTHER",
            )
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(errno.EACCES, "", str(out))
    return out


def _new_folder(root: Path, name: str) -> Path:
    """The first free `root/name-N`, taken at once: two runs never share one."""
    root.mkdir(parents=True, exist_ok=True)
    for n in range(1, 1_000_000):
        with suppress(FileExistsError):
            (root / f"{name}-{n}").mkdir()
            return root / f"{name}-{n}"
    raise UsageError(f"{root} holds a million runs of {name}", hint="--out FOLDER")


def _copy_bundles(plan: Plan, done: Any, folder: Path) -> None:
    """Each bundle under its final name only when it is whole."""
    import shutil

    for target in plan.targets:
        there, partial = folder / target.name, folder / f".{target.name}.partial"
        for old in (partial, there):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(done.artifacts[f"{target.name}.bundle"].path / "bundle", partial)
        partial.rename(there)


def _write_run(folder: Path, run: dict[str, Any], decisions: dict[str, Any]) -> None:
    from edgekd.report.html import render
    from edgekd.safeio.files import write_atomic

    write_atomic(folder / "decisions.json", json.dumps(decisions, sort_keys=True, indent=1).encode())
    write_atomic(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False).encode())
    write_atomic(folder / "report.html", render(run).encode())


def _check_reachable(plan: Plan, options: Options, console: Console) -> None:
    from edgekd.errors import DeviceError

    away = [t.name for t in plan.targets if not t.runs_here]
    if away and options.require_measured:
        raise DeviceError(
            f"{', '.join(away)} is not this machine, and --require-measured asks for a measurement",
            expected="a reachable device",
            hint="leave --require-measured out to get a bundle with a predicted latency",
        )
    for name in away:
        console.warn(f"{name} is not this machine: its latency will be predicted, not measured")


def _check_builders(plan: Plan) -> None:
    from edgekd import registry
    from edgekd.errors import BackendError

    for target in plan.targets:
        device, wanted = target.device, target.config.backend
        names = [r.name for r in device.runtimes if r.name in registry.names("backend")] if wanted == "auto" else [target.backend]
        builders = [b for b in (registry.load("backend", n)() for n in names) if b.builds] or [registry.load("backend", target.backend)()]
        why = [reason for b in builders if (reason := b.builds_for(device)) is not None]
        if len(why) == len(builders):
            raise BackendError(
                f"no engine can be built here: {'; '.join(why)}",
                where=device.id,
                hint=f"a bundle that builds its engine on the device, with build.py: edgekd export MODEL --device {device.id}",
            )


def _check_space(plan: Plan, ctx: Context) -> None:
    """Room for the data and a few models must be there before anything starts."""
    from edgekd.errors import ResourceError
    from edgekd.safeio.files import free_bytes

    needed, free = 200 * 2**20, free_bytes(ctx.store.root)
    if free < needed:
        raise ResourceError(
            f"the disk of the store has {free} bytes free, a run needs about {needed}",
            where=str(ctx.store.root),
            hint="edgekd store gc --older-than 30",
        )


def _main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
