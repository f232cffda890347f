"""The command line: parse, one call, render. Loads neither torch nor timm until a command needs them."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.console import Console
from edgekd.errors import INTERNAL, INTERRUPTED, OK, DeviceError, EdgekdError, Refusal, ResourceError, UsageError

if TYPE_CHECKING:
    from edgekd.api import Options
    from edgekd.single import Own

app = typer.Typer(
    name="edgekd",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="From a trained model to a small, fast, verified engine for a named device.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="Shipped recipes.")
devices_app = typer.Typer(no_args_is_help=True, help="Device profiles.")
methods_app = typer.Typer(no_args_is_help=True, help="Distillers, criteria, quantizers, formats, backends and tasks.")
store_app = typer.Typer(no_args_is_help=True, help="The store of artifacts.")
for name, sub in (("recipes", recipes_app), ("devices", devices_app), ("methods", methods_app), ("store", store_app)):
    app.add_typer(sub, name=name)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Set = Annotated[list[str] | None, typer.Option("-o", metavar="NAME.FIELD=VALUE", help="Change a value of the recipe; may be repeated.")]
Device = Annotated[list[str] | None, typer.Option("--device", help="Target device instead of the recipe's; may be repeated.")]
Code = Annotated[Path | None, typer.Option("--code", help="Your own Python file with architectures or methods; it is run.")]
Replay = Annotated[Path | None, typer.Option(help="Run folder whose decisions are taken over.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Threads of the runtime.")]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Images per inference.")]


def _version(wanted: bool) -> None:
    if wanted:
        from edgekd import __version__

        Console().data(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")] = False,
) -> None:
    """Takes nothing itself: `main` reads --debug before the parser does."""


def main() -> None:
    """Entry point: turns every outcome into the documented exit code."""
    arguments, debug = [a for a in sys.argv[1:] if a != "--debug"], "--debug" in sys.argv
    gc.set_threshold(200_000, 30, 30)  # start-up makes objects that stay: collecting among them takes a tenth of the time and finds nothing
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing looks for a hub on its own
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # or the first model looks through every installed package for plug-ins
    sys.exit(_guarded(lambda: _run(arguments), Console(json_mode="--json" in arguments), debug))


def _run(arguments: list[str]) -> Any:
    """Parse and call. Typer builds the parameters of all commands before it looks for one, so a named one is run alone."""
    named = [c for c in app.registered_commands if c.callback and arguments[:1] == [c.name or c.callback.__name__]]
    if not named:
        return app(arguments, prog_name="edgekd", standalone_mode=False)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.registered_commands = named
    return alone(arguments[1:], prog_name=f"edgekd {arguments[0]}", standalone_mode=False)


def _guarded(call: Callable[[], Any], console: Console, debug: bool) -> int:
    try:
        code = call()
        return code if isinstance(code, int) else OK
    except Refusal as error:
        if debug:
            raise
        console.error(error)
        return error.exit_code
    except typer.Exit as done:
        return int(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return OK
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, or of the copy that newer typers carry
            return _misused(error.format_message(), console)
        if debug:
            raise
        return _unexpected(error, console)


def _misused(message: str, console: Console) -> int:
    """A command line that the parser refused; one without a command is answered with the help."""
    if message.startswith("Usage:") and not console.json_mode:
        console.data(message)
    else:
        console.error(UsageError(message.splitlines()[0], hint="edgekd --help"))
    return UsageError.exit_code


def _unexpected(error: Exception, console: Console) -> int:
    import errno

    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.EIO)
    if full or isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        hint = "free disk space: edgekd store gc" if full else "a smaller batch: -o STAGE.batch_size=32"
        refusal: EdgekdError = ResourceError(str(error), hint=hint)
    else:
        refusal = EdgekdError(f"{type(error).__name__}: {error}", hint="this is a fault of edgekd: run again with --debug and report it")
    console.error(refusal)
    return refusal.exit_code if full or isinstance(refusal, ResourceError) else INTERNAL


# ------------------------------------------------------------------------------------------------------------ the main job
@app.command()
def compress(
    recipe: RecipeName,
    o: Set = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<recipe>-<n>.")] = None,
    code: Code = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Keep every step, whatever it measures.")] = False,
    require_measured: Annotated[bool, typer.Option("--require-measured", help="Exit 5 if a device cannot be measured.")] = False,
    allow_download: Annotated[bool, typer.Option("--allow-download", help="Let published weights and graphs be downloaded.")] = False,
    replay: Replay = None,
    json: Json = False,
) -> int:
    """Run a recipe: distil, prune, quantize, export, measure and bundle."""
    from edgekd.api import Options, exit_code
    from edgekd.api import compress as run

    console = Console(json_mode=json)
    options = Options(o or (), device or (), out, code, not no_gate, require_measured, allow_download, replay)
    return _finish(run(recipe, options, console=console), console, exit_code)


def _finish(result: dict[str, Any], console: Console, code: Callable[[dict[str, Any]], int]) -> int:
    from edgekd.report.summary import summary

    if console.json_mode:
        console.json(result)
    else:
        console.show(summary(result))
        console.say(f"bundle: {result['targets'][0]['bundle']}   report: {result['report']}")
    return code(result)


@app.command()
def sweep(
    recipe: RecipeName,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="NAME.FIELD=V1,V2", help="Values to try, such as distill.method=kd,ofa; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds 0 to N-1 of each combination.")] = 1,
    until: Annotated[str | None, typer.Option(metavar="STEP", help="The model that is compared; default: the first that learns.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="What the others are compared with; default: the student alone, or the first.")
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Read test too. Choose on val, and read test once.")] = False,
    o: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the table; default runs/<recipe>-sweep-<n>.")] = None,
    code: Code = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Let a teacher at chance level pass.")] = False,
    allow_download: Annotated[bool, typer.Option("--allow-download", help="Let published weights and graphs be downloaded.")] = False,
    json: Json = False,
) -> int:
    """Train a recipe's models with several values and seeds, and compare them; what was trained before is not trained again."""
    from edgekd.api import Options
    from edgekd.api import sweep as run

    console = Console(json_mode=json)
    options = Options(o or (), (), out, code, not no_gate, allow_download=allow_download)
    found = run(recipe, vary or (), range(seeds), options, until=until, test=test, against=against, console=console)
    if json:
        console.json(found)
        return int(found["exit_code"])
    console.table([_compared(row) for row in found["comparison"]], _COMPARED)
    console.say(f"table: {found['table']}" + (f"; {found['failed']} combinations failed" if found["failed"] else ""))
    return int(found["exit_code"])


_COMPARED = ("variant", "seeds", "metric", "mean", "error", "difference", "95 %", "ece", "agreement", "time")


def _compared(row: dict[str, Any]) -> dict[str, str]:
    """A row of the comparison in words; metrics in percent."""
    from edgekd.report.text import seconds

    def percent(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.2%}"

    shown = {"variant": row["variant"], "seeds": str(row["seeds"]), "metric": row["metric"], "mean": percent(row["mean"])}
    shown |= {"error": percent(row["standard_error"]), "difference": percent(row.get("difference"), "+")}
    if row.get("ci95"):
        shown["95 %"] = " to ".join(percent(end, "+") for end in row["ci95"])
    return shown | {n: percent(row.get(n)) for n in ("ece", "agreement")} | {"time": seconds(row.get("seconds"))}


@app.command()
def plan(
    recipe: RecipeName,
    o: Set = None,
    device: Device = None,
    code: Code = None,
    no_gate: Annotated[bool, typer.Option("--no-gate")] = False,
    json: Json = False,
) -> None:
    """Show the steps of a recipe: which are cached, why the others run, and how long they took last time."""
    from edgekd.api import Options
    from edgekd.api import plan as steps

    rows = steps(recipe, Options(o or (), device or (), code=code, gate=not no_gate))
    if json:
        Console(json_mode=True).json(rows)
        return
    console = Console()
    console.table([row | _last_time(row) for row in rows], ("step", "stage", "method", "state", "why", "last took", "last wrote"))
    console.say(_estimate(rows))


def _last_time(row: dict[str, Any]) -> dict[str, str]:
    from edgekd.report.text import seconds, size

    known = row["seconds"] is not None
    return {"last took": seconds(row["seconds"]) if known else "", "last wrote": size(row["bytes"]) if known else ""}


def _estimate(rows: list[dict[str, Any]]) -> str:
    """One line: how many steps would run, and what they cost when they last did."""
    from edgekd.report.text import seconds, size

    to_run = [r for r in rows if r["state"] in ("run", "depends on gate")]
    known = [r for r in to_run if r["seconds"] is not None]
    if not to_run:
        return "nothing to run: every step is cached"
    new = f"; {len(to_run) - len(known)} never ran here, so how long is not known" if len(known) < len(to_run) else ""
    took = f", {seconds(sum(r['seconds'] for r in known))} and {size(sum(r['bytes'] for r in known))} as they last were" if known else ""
    return f"{len(to_run)} steps to run{took}{new}"


@app.command()
def check(recipe: RecipeName, o: Set = None, device: Device = None, code: Code = None, json: Json = False) -> None:
    """Validate a recipe; every problem at once."""
    from edgekd.api import check as validate

    loaded = validate(recipe, o or (), devices=device or (), code=code)
    stages, targets = [s.name for _, s in loaded.stages], list(loaded.recipe.targets)
    console = Console(json_mode=json)
    if json:
        console.json({"recipe": loaded.name, "stages": stages, "targets": targets, "ok": True})
    else:
        console.data(f"{loaded.name}: ok; stages {', '.join(stages) or 'none'}; targets {', '.join(targets)}")


@app.command()
def show(recipe: RecipeName, o: Set = None, code: Code = None, json: Json = False) -> None:
    """Print every value of a recipe and where it came from."""
    from edgekd.api import show as values

    _table(values(recipe, o or (), code=code), ("path", "value", "source"), json)


@app.command()
def wire(
    recipe: RecipeName,
    o: Set = None,
    step: Annotated[str | None, typer.Option(help="One distill stage instead of all.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="How many classes there are, where the data are not at hand.")] = None,
    code: Code = None,
    json: Json = False,
) -> None:
    """Show which stages of teacher and student are compared, by which loss, and the same as explicit YAML."""
    from edgekd.api import wire as wiring

    console = Console(json_mode=json)
    found = wiring(recipe, o or (), code=code, classes=classes, step=step)
    for text in found["warnings"]:
        console.warn(text)
    if json:
        console.json(found)
        return
    for rows in ("models", "stages", "terms"):
        columns = [c for c in found[rows][0] if c not in ("mean", "std")]
        console.table(found[rows], columns)
        console.data("")
    console.data("# the same in full, to take the place of these sections in the recipe\n" + found["yaml"])


# ------------------------------------------------------------------------------------------------------------ single stages
Arch = Annotated[str | None, typer.Option(help="timm architecture, or one registered by --code.")]
Data = Annotated[Path, typer.Option(help="Folder of images by class, or a manifest file.")]
MaybeData = Annotated[
    Path | None,
    typer.Option(help="Folder of images by class, or a manifest file; without, samples are generated and accuracy is not measured."),
]
Args = Annotated[list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Argument of the architecture; may be repeated.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>-<n>.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Weights (safetensors or checkpoint) with --arch, or an ONNX file.")]
Size = Annotated[int, typer.Option(help="Height and width in pixels.")]
OwnSize = Annotated[int | None, typer.Option(help="Height and width in pixels; default: what the model's file says.")]


def _single(kind: str, body: dict[str, Any], own: "Own", options: "Options", json: bool) -> int:
    """A one-stage recipe around a user's own model: the same code path as `compress`."""
    from edgekd.api import exit_code, run_single

    console = Console(json_mode=json)
    return _finish(run_single(kind, body, own, options, console=console), console, exit_code)


def _own(
    model: Path,
    data: Path | None,
    arch: str | None,
    arg: list[str] | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    drop: float = 0.01,
) -> "Own":
    from edgekd.single import Own

    return Own(model, data, arch, tuple(arg or ()), image_size, _numbers(mean, "--mean"), _numbers(std, "--std"), drop)


def _options(
    o: list[str] | None, device: list[str] | None, out: Path | None, code: Path | None, replay: Path | None, no_gate: bool = False
) -> "Options":
    from edgekd.api import Options

    return Options(o or (), device or (), out, code, not no_gate, replay=replay)


Mean = Annotated[str | None, typer.Option(help="Channel means that the model was trained with, R,G,B; default: its own.")]
Std = Annotated[str | None, typer.Option(help="Channel deviations that the model was trained with, R,G,B; default: its own.")]
Drop = Annotated[float, typer.Option(help="Largest drop of accuracy on val, as a fraction.")]
NoGate = Annotated[bool, typer.Option("--no-gate", help="Keep the step, whatever it measures.")]


@app.command()
def prune(
    model: Model,
    data: Data,
    arch: Arch = None,
    arg: Args = None,
    image_size: Size = 224,
    mean: Mean = None,
    std: Std = None,
    criterion: str = "l1",
    speedup: Annotated[float | None, typer.Option(help="Measured speed-up to reach.")] = None,
    macs: Annotated[float | None, typer.Option(help="Fraction of operations kept.")] = None,
    params: Annotated[float | None, typer.Option(help="Fraction of parameters kept.")] = None,
    recover: Annotated[int, typer.Option(help="Epochs of training after the cut; 0 for none.")] = 1,
    drop: Drop = 0.01,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    replay: Replay = None,
    no_gate: NoGate = False,
    json: Json = False,
) -> int:
    """Prune your own trained model; no teacher and no recipe needed."""
    goals = {k: v for k, v in (("speedup", speedup), ("macs", macs), ("params", params)) if v is not None} or {"speedup": 1.5}
    stages = {"criterion": criterion, "target": goals, "recover": recover}
    own, options = _own(model, data, arch, arg, image_size, mean, std, drop), _options(o, device, out, code, replay, no_gate)
    return _single("prune", stages, own, options, json)


@app.command()
def quantize(
    model: Model,
    data: Data,
    arch: Arch = None,
    arg: Args = None,
    image_size: Size = 224,
    mean: Mean = None,
    std: Std = None,
    method: str = "ptq",
    search: Annotated[
        int, typer.Option(min=0, max=200, help="Graphs to measure to find the operators worth quantizing; 0 quantizes all.")
    ] = 24,
    drop: Drop = 0.01,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    replay: Replay = None,
    no_gate: NoGate = False,
    json: Json = False,
) -> int:
    """Quantize your own trained model or ONNX file."""
    own, options = _own(model, data, arch, arg, image_size, mean, std, drop), _options(o, device, out, code, replay, no_gate)
    searched = {"search": search} if method == "ptq" else {}
    return _single("quantize", {"method": method} | searched, own, options, json)


@app.command()
def export(
    model: Model,
    data: MaybeData = None,
    arch: Arch = None,
    arg: Args = None,
    image_size: OwnSize = None,
    mean: Mean = None,
    std: Std = None,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    replay: Replay = None,
    json: Json = False,
) -> int:
    """Export your own trained model to ONNX, check it against torch, measure it and bundle it."""
    return _single("export", {}, _own(model, data, arch, arg, image_size, mean, std), _options(o, device, out, code, replay), json)


@app.command("compile")
def compile_(
    model: Model,
    data: MaybeData = None,
    arch: Arch = None,
    arg: Args = None,
    image_size: OwnSize = None,
    mean: Mean = None,
    std: Std = None,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    replay: Replay = None,
    json: Json = False,
) -> int:
    """Build the engines of your own model or ONNX file for devices, check them and bundle them; exit 5 where one cannot be built here."""
    return _single("compile", {}, _own(model, data, arch, arg, image_size, mean, std), _options(o, device, out, code, replay), json)


@app.command()
def train(
    model: Annotated[Path, typer.Argument(metavar="ARCH|MODEL", help="An architecture to train from scratch, or weights with --arch.")],
    data: Data,
    arch: Arch = None,
    arg: Args = None,
    image_size: Size = 224,
    mean: Mean = None,
    std: Std = None,
    epochs: int = 10,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    replay: Replay = None,
    json: Json = False,
) -> int:
    """Train a model on a folder of images, export and bundle it."""
    own, options = _own(model, data, arch, arg, image_size, mean, std), _options(o, device, out, code, replay)
    return _single("train", {"epochs": epochs}, own, options, json)


@app.command()
def distill(
    model: Annotated[Path, typer.Argument(metavar="ARCH|MODEL", help="An architecture to train from scratch, or weights with --arch.")],
    data: Data,
    teacher: Annotated[Path, typer.Option(metavar="FILE", help="Weights with --teacher-arch, an ONNX file, or predictions (.npz, .csv).")],
    teacher_arch: Annotated[str | None, typer.Option(help="Architecture of the teacher's weights.")] = None,
    teacher_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of that architecture; may be repeated.")
    ] = None,
    teacher_mean: Annotated[
        str | None, typer.Option(help="Channel means of the teacher's input, R,G,B; an ONNX file does not say.")
    ] = None,
    teacher_std: Annotated[str | None, typer.Option(help="Its channel deviations, R,G,B.")] = None,
    method: Annotated[str, typer.Option(help="How it is imitated: edgekd methods list distill.")] = "kd",
    arch: Arch = None,
    arg: Args = None,
    image_size: Size = 224,
    mean: Mean = None,
    std: Std = None,
    epochs: int = 10,
    o: Set = None,
    device: Device = None,
    out: Out = None,
    code: Code = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Let a teacher at chance level pass.")] = False,
    replay: Replay = None,
    json: Json = False,
) -> int:
    """Train a model to imitate another one on a folder of images, export and bundle it."""
    own, options = _own(model, data, arch, arg, image_size, mean, std), _options(o, device, out, code, replay, no_gate)
    own = replace(
        own,
        teacher=teacher,
        teacher_arch=teacher_arch,
        teacher_args=tuple(teacher_arg or ()),
        teacher_mean=_numbers(teacher_mean, "--teacher-mean"),
        teacher_std=_numbers(teacher_std, "--teacher-std"),
    )
    return _single("distill", {"method": method, "epochs": epochs}, own, options, json)


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt, .pth, .th or .safetensors file.")],
    arch: Annotated[str, typer.Option(help="Architecture that the weights are for.")],
    arg: Args = None,
    num_classes: Annotated[int | None, typer.Option(help="Outputs; default: read from the last layer.")] = None,
    image_size: Annotated[int | None, typer.Option()] = None,
    mean: Annotated[str | None, typer.Option(help="Channel means, R,G,B.")] = None,
    std: Annotated[str | None, typer.Option(help="Channel deviations, R,G,B.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: beside the checkpoint, .safetensors.")] = None,
    code: Code = None,
    json: Json = False,
) -> None:
    """Turn a checkpoint into safetensors: tensors only, no code of the file is run."""
    from edgekd.api import import_checkpoint
    from edgekd.single import parse_args

    found = import_checkpoint(
        checkpoint,
        arch,
        args=parse_args(arg or ()),
        num_classes=num_classes,
        image_size=image_size,
        mean=_numbers(mean, "--mean"),
        std=_numbers(std, "--std"),
        out=out,
        code=code,
    )
    console = Console(json_mode=json)
    console.json(found) if json else console.data(
        f"{found['out']}: {found['tensors']} tensors, {found['parameters']:,} parameters of {arch}"
    )


# ------------------------------------------------------------------------------------------------------------ measuring
@app.command()
def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|BUNDLE")],
    device: Annotated[str, typer.Option()] = "host",
    backend: Annotated[str, typer.Option()] = "auto",
    threads: Threads = 1,
    batch: Batch = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Time per operator.")] = False,
    via: Annotated[str | None, typer.Option(help="Transport to the device.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Time to measure.")] = 5.0,
    json: Json = False,
) -> None:
    """Measure latency, memory, load time and size of an ONNX file or a bundle."""
    from edgekd.api import profile as measure

    found = measure(model, device=device, backend=backend, threads=threads, batch=batch, layers=layers, via=via, seconds=seconds)
    console = Console(json_mode=json)
    if json:
        console.json(found)
        return
    lat = found["latency_ms"]
    if lat["p50"] is None:
        raise DeviceError(f"too slow to be measured in {seconds:g} s", where=model.name, hint=f"--seconds {seconds * 10:g}")
    console.data(f"{model.name} on {device} ({found['backend']}, {threads} thread{'s' if threads > 1 else ''}, batch {batch})")
    console.data(
        f"p50 {lat['p50']:.3f} ms (95 % {lat['ci95'][0]:.3f} to {lat['ci95'][1]:.3f})   p95 {lat['p95']:.3f}   p99 {lat['p99']:.3f}   n {lat['n']}   series {lat['series']}"
    )
    console.data(
        f"file {found['size_bytes']:,} bytes   load {found['load_ms']:.0f} ms   peak memory {found['peak_mib']:.1f} MiB above an idle process"
    )
    if layers:
        _table(
            [
                {"operator": r["op_type"], "us": f"{r['total_us']:.1f}", "share": f"{r['share']:.1%}"}
                | {n: r[n] for n in ("name", "precision", "format")}
                for r in found["operators"]
            ],
            ("operator", "name", "us", "share", *(n for n in ("precision", "format") if any(r[n] for r in found["operators"]))),
            False,
        )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx|BUNDLE")],
    device: Annotated[str, typer.Option()],
    threads: Threads = 1,
    batch: Batch = 1,
    json: Json = False,
) -> None:
    """Predict the latency on a device that is not here, from its profile. Never a measurement."""
    from edgekd.api import predict as roofline

    found = roofline(model, device, threads=threads, batch=batch)
    console = Console(json_mode=json)
    if json:
        console.json(found)
        return
    console.data(
        f"predicted, not measured: {found['p50_ms']:.3f} ms on {device} (between {found['low_ms']:.3f} and {found['high_ms']:.3f})"
    )
    console.data(f"basis: {found['basis']}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx")],
    against: Annotated[Path | None, typer.Option(metavar="BUNDLE|MODEL.onnx", help="Another form of the same model.")] = None,
    build: Annotated[bool, typer.Option("--build", help="Build the bundle's engine again with this machine's runtime.")] = False,
    signed_by: Annotated[
        Path | None, typer.Option(metavar="PUBLIC.pem", help="The bundle must be signed by this key's private half.")
    ] = None,
    run_engine: Annotated[
        bool, typer.Option("--run-engine", help="Run its engine, which is code, though no signature was checked.")
    ] = False,
    json: Json = False,
) -> None:
    """Check a bundle: every byte, its signature and its sample outputs; or one form of a model against another, down to the node."""
    from edgekd.api import verify as check_bundle

    if build and against is not None:
        raise UsageError("--build and --against do not go together", hint="edgekd verify BUNDLE --build")
    if signed_by is not None and (build or against is not None):
        raise UsageError(
            f"--signed-by and {'--build' if build else '--against'} do not go together", hint="check the signature first, alone"
        )
    console = Console(json_mode=json)
    found = check_bundle(bundle, against=against, build=build, signed_by=signed_by, run_engine=run_engine, console=console)
    if json:
        console.json(found)
    elif against is None:
        console.data(f"{bundle}: {found['files']} files as in the manifest; {found['samples']}")
        if found["engine"]:
            console.data(f"engine: {found['engine']}")
        if found["signature"]:
            console.say(f"signature: {found['signature']}")
        for line in found["differs"]:
            console.say(f"differs here: {line}")
    else:
        shown = ("rung", "max_abs", "mean_abs", "cosine", "agreement", "clear_agreement", "threshold")
        console.table([{n: f"{v:.4g}" if isinstance(v := row[n], float) else v for n in shown} for row in found["rungs"]], shown)
        console.say(f"{found['samples']} inputs: {found['source']}")


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    key: Annotated[Path, typer.Option(metavar="KEY.pem", help="Your own Ed25519 key: openssl genpkey -algorithm ed25519 -out KEY.pem")],
    json: Json = False,
) -> None:
    """Sign a bundle with your own key, for edgekd verify BUNDLE --signed-by PUBLIC.pem."""
    from edgekd.api import sign as sign_bundle

    found = sign_bundle(bundle, key, password=_password)
    Console(json_mode=json).json(found) if json else Console().data(f"{found['signature']}: signs every byte of {bundle}")


def _password() -> str:
    if not sys.stdin.isatty():
        raise UsageError("the key is encrypted, and there is no terminal to ask for its password", where="--key")
    return str(typer.prompt("Password of the key", hide_input=True, err=True))


# ------------------------------------------------------------------------------------------------------------ lists
@recipes_app.command("list")
def recipes_list(json: Json = False) -> None:
    """Names of the shipped recipes."""
    from edgekd.api import list_recipes

    _table(list_recipes(), ("name", "about"), json)


@recipes_app.command("show")
def recipes_show(name: str, json: Json = False) -> None:
    """Print a shipped recipe's file."""
    from edgekd.recipe import find

    text = find(name).read_text(encoding="utf-8").rstrip()
    Console().json({"name": name, "text": text}) if json else Console().data(text)


@devices_app.command("list")
def devices_list(json: Json = False) -> None:
    """Devices that edgekd has a profile of."""
    from edgekd.api import list_devices

    _table(list_devices(), ("id", "name", "kind", "runtimes", "confidence"), json)


@devices_app.command("show")
def devices_show(device: str, json: Json = False) -> None:
    """Every number of a device profile, with where it comes from."""
    from edgekd.api import show_device

    found = show_device(device)
    Console().json(found["profile"]) if json else _table(found["rows"], ("field", "value", "origin", "source"), False)


@methods_app.command("list")
def methods_list(
    kind: Annotated[str | None, typer.Argument(help="distill, criterion, quantize, format, backend, task or architectures")] = None,
    json: Json = False,
) -> None:
    """Methods by kind, with one line each."""
    from edgekd.api import list_methods

    _table(list_methods(kind), ("kind", "name", "about"), json)


@methods_app.command("show")
def methods_show(name: str, json: Json = False) -> None:
    """When to use a method, what it costs, its knobs and its source."""
    from edgekd.api import show_method

    found = show_method(name)
    if json:
        Console().json(found)
        return
    Console().data(found["about"])
    if found.get("costs", {}).get("rows"):
        Console().data(f"Measured: {found['costs']['measured']}")
        _table(found["costs"]["rows"], ("pair", "models", "step", "kd"), False)
    _table(found["fields"], ("field", "type", "default", "description"), False)


@app.command()
def doctor(json: Json = False) -> int:
    """Versions, floors, runtimes, GPU, disk and threads of this machine."""
    from edgekd.api import examine

    rows = examine()
    _table(rows, ("status", "name", "seen", "wanted", "hint"), json)
    return 5 if any(r["status"] == "fail" for r in rows) else 0


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN")], json: Json = False) -> None:
    """Write report.html of a run folder again, and print its summary."""
    from edgekd.api import render_again
    from edgekd.report.summary import summary

    result, console = render_again(run), Console(json_mode=json)
    console.json(result) if json else console.show(summary(result))


@app.command()
def explain(run: Annotated[Path, typer.Argument(metavar="RUN")], json: Json = False) -> None:
    """Every verdict of a run with its reason."""
    from edgekd.api import verdicts

    _table(verdicts(run), ("stage", "verdict", "reason"), json)


# ------------------------------------------------------------------------------------------------------------ store
@store_app.command("list")
def store_list(json: Json = False) -> None:
    """Artifacts with their kind, step, size and age."""
    from edgekd.api import store_rows

    _table(store_rows(), ("key", "kind", "step", "bytes", "used"), json)


@store_app.command("why")
def store_why(
    key: str, other: Annotated[str | None, typer.Argument(help="A second key: what differs between them.")] = None, json: Json = False
) -> None:
    """What went into a key; or which ingredients differ between two."""
    from edgekd.api import store_why as why

    _table(why(key, other), ("ingredient", "value") if other is None else ("ingredient", "first", "second"), json)


@store_app.command("verify")
def store_verify(json: Json = False) -> int:
    """Read every byte of every artifact; what is damaged goes to quarantine (exit 3) and is rebuilt when next needed."""
    from edgekd.api import store_verify as problems

    found = problems()
    console = Console(json_mode=json)
    console.json(found) if json else console.data("\n".join(found["problems"]) or f"{found['entries']} artifacts, all whole")
    return 3 if found["problems"] else 0


@store_app.command("gc")
def store_gc(
    older_than: Annotated[float | None, typer.Option(help="Days since last use.")] = None,
    max_gb: Annotated[float | None, typer.Option(help="Size to shrink to, in 10^9 bytes.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: Json = False,
) -> None:
    """Remove scratch of dead processes, and artifacts by age or size."""
    from edgekd.api import store_gc as collect

    found = collect(older_than, max_gb, dry_run)
    console = Console(json_mode=json)
    if json:
        console.json(found)
        return
    console.data(
        f"{'would remove' if dry_run else 'removed'} {len(found['removed'])}, {found['freed_bytes']:,} bytes; {found['kept']} artifacts stay"
    )
    if found["busy"]:
        console.say("another run uses the store, so its artifacts were left alone")


# ------------------------------------------------------------------------------------------------------------ rendering
def _table(rows: list[dict[str, Any]], columns: tuple[str, ...], json: bool) -> None:
    Console(json_mode=json).table(rows, columns)


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != 3:
        raise UsageError(f"'{text}' is not three numbers", where=option, expected="R,G,B, such as 0.485,0.456,0.406")
    return found


if __name__ == "__main__":
    main()
