"""verify: a bundle's bytes against its manifest and its sample outputs on this machine; or one form of a model against another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.bundle import FACTS, SAMPLES, SIGNATURE, read_facts, verify_files
from edgekd.errors import BackendError, OnnxRefused, ParityBroken

if TYPE_CHECKING:
    from edgekd.console import Console

_RANDOM_SAMPLES = 8
_KEEP = 5  # nodes that are proposed for a higher precision


def verify_bundle(folder: Path, *, signed_by: Path | None = None, run_engine: bool = False) -> dict[str, Any]:
    """What was checked; raises BundleRefused for changed bytes or another signature than asked for, ParityBroken where answers differ here.

    An engine is code, and a manifest only says that it was not changed by accident: it is run where a signature was checked, or with `run_engine`.
    """
    from edgekd.safeio.onnxfile import check_onnx  # onnx

    manifest = verify_files(folder)
    signature = _signature(folder, manifest, signed_by)  # before anything reads what the files say
    facts = read_facts(folder, manifest)
    check_onnx(folder / facts["model_file"])
    return {
        "bundle": str(folder),
        "files": len(manifest["files"]),
        "signature": signature,
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "samples": _check_samples(folder, facts),
        "engine": _check_engine(folder, manifest, facts, trusted=run_engine or signed_by is not None),
        "differs": _differences(manifest),
    }


def _signature(folder: Path, manifest: dict[str, Any], signed_by: Path | None) -> str | None:
    """What is known of the bundle's signature; None where it has none."""
    if signed_by is not None:
        from edgekd.signature import check_signature

        check_signature(folder, manifest, signed_by)
        return f"signed by the private half of {signed_by}"
    return "signed, not checked: give --signed-by PUBLIC.pem" if (folder / SIGNATURE).is_file() else None


def _differences(manifest: dict[str, Any]) -> list[str]:
    """What of this machine is not as where the bundle was made: its figures may not hold here, and an engine may not load."""
    from edgekd import registry
    from edgekd.profile.host import identity

    made, engine = manifest.get("made_on", {}), manifest.get("engine", {})
    found = [f"{n}: made on {made[n]}, here {v}" for n, v in identity().items() if n in made and made[n] != v]
    if engine.get("runtime") in registry.names("backend"):
        version = registry.load("backend", engine["runtime"])().version()
        if version != engine["version"]:
            found.append(f"{engine['runtime']}: made with {engine['version']}, here {version}")
    return found


def rebuild(folder: Path, console: Console) -> dict[str, Any]:
    """Builds the engine of a bundle again with this machine's runtime and completes its manifest; returns the engine's facts.

    Everything but the engine must be intact. The manifest is then another one, so a signature is removed: `unsigned` says whether there was one.
    Raises BackendError where the engine cannot be built here; the bundle is then as it was.
    """
    import shutil
    import tempfile

    from edgekd import registry
    from edgekd.backends import watched
    from edgekd.bundle import engine_facts, replace_built
    from edgekd.profile.device import load_device
    from edgekd.safeio.files import resource_errors
    from edgekd.safeio.onnxfile import check_onnx

    manifest = verify_files(folder, rebuilding=True)
    facts, device = read_facts(folder, manifest), load_device(str(manifest["target"]))
    backend = registry.load("backend", str(manifest["backend"]))()
    if not backend.builds:
        raise BackendError(
            f"there is nothing to build: {backend.name} takes the ONNX file as it is", where=str(folder), expected="a bundle with an engine"
        )
    if (missing := backend.builds_for(device)) is not None:
        raise BackendError(missing, where=str(folder), hint="edgekd doctor")
    check_onnx(folder / facts["model_file"])  # before a builder reads it
    build = facts["build"]
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch, resource_errors(folder):
        new = Path(scratch) / "new"
        new.mkdir()
        shutil.copyfile(folder / facts["model_file"], new / facts["model_file"])
        with watched(backend, console, backend.name):
            meta: dict[str, Any] = backend.convert(new / facts["model_file"], device, new, build["options"], batch=build["batch"])
        kept = {n: v for n, v in manifest.items() if n != "built"}  # what build.py measured was another engine
        unsigned = replace_built(folder, new, kept | {"engine": engine_facts(meta)})
    return meta | {"unsigned": unsigned}


def _check_samples(folder: Path, facts: dict[str, Any]) -> str:
    """Runs the sample images; raises ParityBroken where outputs lie beyond the bundle's tolerance, and says how many labels agree."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        return "sample outputs were not checked: onnxruntime is not installed"
    import numpy as np

    from edgekd.data.normalise import stored_inputs

    with np.load(folder / SAMPLES) as stored:
        samples, wanted = stored_inputs(stored, facts["preprocess"]), stored["outputs"]
    found = _run(_opened(folder / facts["model_file"]), facts, samples, len(samples))
    return _agreed(found, wanted, facts, "on this machine", folder)


def _check_engine(folder: Path, manifest: dict[str, Any], facts: dict[str, Any], *, trusted: bool) -> str | None:
    """Runs the sample images through the engine, or the graph by its own runtime, where its device is this machine; None for one of onnxruntime,
    and where the runtime takes engines and there is none: a graph is never handed to it as one.

    Raises BackendError for an engine that does not fit or open, ParityBroken where its answers differ.
    """
    from edgekd import registry
    from edgekd.bundle import engine_of
    from edgekd.profile.device import load_device

    made, graph = manifest.get("engine", {}).get("runtime"), facts["engine_file"] == facts["model_file"]
    if made not in registry.names("backend") or (graph and made == "onnxruntime"):  # whose answers were compared already
        return None
    backend, device = registry.load("backend", made)(), load_device(str(manifest["target"]))
    if graph and backend.builds:
        return None
    if (reason := backend.available()) is not None or not backend.runs_on(device):
        return f"the engine was not opened: {reason or f'{device.id} is not this machine'}"
    if not graph and not trusted:
        return "the engine was not run: it is code, and nothing here says whose; --signed-by PUBLIC.pem, or --run-engine if you know where it was built"
    import numpy as np

    from edgekd.data.normalise import stored_inputs
    from edgekd.profile.footprint import load_facts
    from edgekd.stages.compile import judged_batch

    with np.load(folder / SAMPLES) as stored:
        images, wanted = stored_inputs(stored, facts["preprocess"]), stored["outputs"]
    file = folder / facts["model_file"] if graph else engine_of(folder, manifest, facts, backend, device)
    size, options = judged_batch(manifest["engine"]) or 1, manifest["engine"].get("options")
    feeds = {facts["input"]: np.resize(images, (facts["fixed_batch"] or min(size, len(images)), *images.shape[1:]))}
    load_facts(
        file, made, device=device, feeds=feeds, options=options
    )  # first in a process of its own: a bad engine may end the one that opens it
    found = _run(backend.open(file, threads=facts["threads"], device=device, options=options), facts, images, size)
    return _agreed(found, wanted, facts, "the engine's", folder)


def _agreed(found: Any, wanted: Any, facts: dict[str, Any], whose: str, folder: Path) -> str:
    """In words; raises ParityBroken beyond the bundle's tolerance."""
    import numpy as np

    alike, gap = float((found.argmax(1) == wanted.argmax(1)).mean()), float(np.abs(found - wanted).max())
    if not gap <= facts["tolerance"]:  # NaN is never inside
        raise ParityBroken(
            f"{whose} outputs differ by up to {gap:.3g}, {1 - alike:.0%} of the samples get another label",
            where=str(folder),
            expected=f"at most {facts['tolerance']:.3g}",
        )
    return f"{round(alike * len(found))} of {len(found)} sample images give the stored label, outputs within {gap:.2g}"


def _run(session: Any, facts: dict[str, Any], images: Any, most: int) -> Any:
    """Outputs of all images, at most `most` at a time."""
    import numpy as np

    size = facts["fixed_batch"] or min(most, len(images))
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    # A graph with a fixed batch has its last part filled up by repetition.
    return np.concatenate([session.run({facts["input"]: np.resize(p, (size, *p.shape[1:]))})[0][: len(p)] for p in parts])


# ------------------------------------------------------------------------------------------------------------ one form against another
def verify_against(model: Path, reference: Path) -> dict[str, Any]:
    """One rung between two ONNX files (or bundles) of one model: errors, agreement and limits; raises ParityBroken with the first node that breaks.

    Inputs are the sample images of a bundle that one of them lies in, else seeded noise, which the answer says.
    """
    from edgekd.export.bisect import compare_tensors, first_break, steepest, tensor_limits
    from edgekd.export.own import own_file
    from edgekd.export.parity import LIMITS, coarser, compare
    from edgekd.profile.precision import precision_of
    from edgekd.profile.report import model_file_of
    from edgekd.safeio.onnxfile import check_onnx, fed_inputs
    from edgekd.tasks.classification import Classification

    files = [model_file_of(reference), model_file_of(model)]
    protos = [check_onnx(f) for f in files]
    inputs = [fed_inputs(p) for p in protos]
    if [len(i) for i in inputs] != [1, 1] or _shape(inputs[0][0]) != _shape(inputs[1][0]):
        told = " and ".join(f"{f.name} takes {[_shape(v) for v in i]}" for f, i in zip(files, inputs, strict=True))
        raise OnnxRefused(told, where=str(model), expected="two forms of one model: one input of one shape")
    images, source = _samples(files, _shape(inputs[0][0]))
    feeds = [{i[0].name: images} for i in inputs]
    precisions = [precision_of(p) for p in protos]
    twins = [n.op_type for n in protos[0].graph.node] == [n.op_type for n in protos[1].graph.node]
    coarsest = "fp32" if twins else coarser(*precisions)  # the same operations round alike
    outputs = []
    for given, file, feed in zip((reference, model), files, feeds, strict=True):
        with own_file(given):
            outputs.append(_opened(file).run(feed)[0])
    if outputs[0].shape != outputs[1].shape:
        raise OnnxRefused(f"outputs {outputs[1].shape} and {outputs[0].shape}", where=str(model), expected="two forms of one model")
    rung = f"{files[0].name} {precisions[0]} -> {files[1].name} {precisions[1]}"
    before, after = (o.reshape(*(o.shape[:1] or (1,)), -1) for o in outputs)  # a number alone is one answer
    row = compare(rung, coarsest, before, after, None, Classification())
    found: dict[str, Any] = {"rungs": [row], "samples": len(images), "source": source, "first_break": None, "keep": []}
    if row["ok"]:
        return found
    tensors = compare_tensors(protos[0], protos[1], feeds[0], feeds[1])
    broken = first_break(tensors, **tensor_limits(coarsest))
    found["first_break"] = broken.said() if broken else None
    found["keep"] = [t.node for t in steepest(tensors, _KEEP)]
    limits = ", ".join(f"{name} {LIMITS[coarsest].get(name, 1):g}" for name in row["failed"])
    where = found["first_break"] or f"the two share {len(tensors)} intermediate tensors and none of them breaks: the last nodes do"
    raise ParityBroken(
        f"{rung}: {', '.join(f'{n} {row[n]:.3g}' for n in row['failed'])} (limit {limits}); it breaks first at {where}",
        where=str(model),
        expected=f"the outputs of {reference}",
        hint=_way_out(coarsest, found["keep"]),
    )


def _way_out(precision: str, keep: list[str]) -> str:
    """Where nothing is rounded, there is no precision to keep."""
    if precision == "fp32" or not keep:
        return "one of the two was changed, or exported otherwise: export it again and compare"
    return f"keep in higher precision: {', '.join(keep)}"


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim)


def _samples(files: list[Path], shape: tuple[int | None, ...]) -> tuple[Any, str]:
    import json

    import numpy as np

    from edgekd.data.normalise import stored_inputs

    for file in files:
        facts = file.parent / FACTS
        if facts.is_file() and (file.parent / SAMPLES).is_file():
            preprocess = json.loads(facts.read_text(encoding="utf-8"))["preprocess"]
            with np.load(file.parent / SAMPLES) as stored:
                images = stored_inputs(stored, preprocess)
            if all(want in (None, have) for want, have in zip(shape[1:], images.shape[1:], strict=True)):
                return (images if shape[0] is None else np.resize(images, (shape[0], *images.shape[1:]))), "sample images of the bundle"
    if None in shape[1:]:
        raise OnnxRefused(f"its input is {shape}", where=str(files[0]), expected="fixed sizes but the batch")
    sizes = (shape[0] or _RANDOM_SAMPLES, *(d or 1 for d in shape[1:]))
    return np.random.default_rng(0).standard_normal(sizes, dtype=np.float32), "seeded noise: no sample images lie beside the files"


def _opened(file: Path) -> Any:
    """A session of this machine's onnxruntime."""
    from edgekd import registry
    from edgekd.profile.device import load_device

    return registry.load("backend", "onnxruntime")().open(file, threads=1, device=load_device("host"))
