"""bundle: what ships to one target -> a folder with model, pre- and post-processing, labels, sample inputs and outputs, and a manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.compile import ENGINE
from edgekd.stages.evaluate import METRICS
from edgekd.stages.export import FACTS, GRAPH
from edgekd.stages.parity import PARITY

if TYPE_CHECKING:
    from edgekd.context import Context

FOLDER = "bundle"  # inside the artifact, whose own manifest lies beside it
_SAMPLES = 8
_TOLERANCE = {
    "fp32": 1e-3,
    "codebook": 1e-3,
    "int8_weights": 1e-3,
    "fp16": 2e-2,
    "int8": 0.1,
}  # of the largest output; int8 kernels round differently between runtimes and machines


@register("stage")
class Bundle:
    class Config(Base):
        target: str = Field(description="name of the target")
        backend: str = Field(description="runtime of the target; auto: the engine's")
        recipe: str = Field(description="name of the recipe")
        threads: int = Field(1, ge=1, description="threads of the runtime")
        provenance: dict[str, Any] = Field(default_factory=dict, description="architectures and library versions")
        build: dict[str, dict[str, Any]] = Field(
            default_factory=dict, description="runtime -> how the device builds its engine; empty for those that need none"
        )

    takes: Mapping[str, Kind] = {
        "graph": Kind.GRAPH,
        "engine": Kind.ENGINE,
        "data": Kind.DATA,
        "test?": Kind.METRICS,
        "parity": Kind.METRICS,
    }
    gives = Kind.BUNDLE
    version = 6
    libraries = ("onnxruntime-gpu", "onnxruntime", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.bundle import engine_facts, write_facts, write_manifest
        from edgekd.report.card import model_card
        from edgekd.report.sbom import sbom
        from edgekd.safeio.files import sha256_file
        from edgekd.stages._common import open_samples, samples_of, task_of, template_of

        config, folder, task = settings.typed(self.Config), out / FOLDER, task_of(settings)
        folder.mkdir()
        graph, engine, dataset = inputs["graph"], inputs["engine"], open_samples(inputs["data"], ctx)
        facts = graph.json(FACTS)
        shutil.copyfile(graph.path / GRAPH, folder / "model.onnx")
        model_file = str(engine.json(ENGINE)["model_file"])
        backend = str(engine.json(ENGINE)["backend"]) if config.backend == "auto" else config.backend
        build = config.build.get(backend, {})
        for name in (*([] if model_file.endswith(".onnx") else [model_file]), *engine.meta.get("beside", ())):
            shutil.copyfile(engine.path / name, folder / name)
        body = {
            "schema": "edgekd.bundle/1",
            "model_file": "model.onnx",
            "input": facts["input"],
            "output": facts["output"],
            "fixed_batch": facts["fixed_batch"],
            "precision": facts["precision"],
            "threads": config.threads,
            "task": settings.facts["task"],
            "preprocess": _preprocess(facts, inputs["data"]),
            "postprocess": task.postprocess(),
            "labels": list(dataset.classes),
            "samples": f"{samples_of(task)} of val" if dataset.labelled else "generated: no data were given, accuracy was not measured",
            "build": build,
            "tolerance": _TOLERANCE[facts["precision"]] * _write_samples(folder / "samples.npz", graph, dataset, ctx),
        }
        write_facts(folder, body)
        (folder / "labels.txt").write_text("\n".join(dataset.classes) + "\n", encoding="utf-8")
        _write_positions(folder / "positions.npz", dataset)
        for script in ("predict.py", *(["build.py"] if build else [])):
            template = template_of(task) if script == "predict.py" else script
            (folder / script).write_bytes(resources.files("edgekd.templates").joinpath(template).read_bytes())
        section = _engine_section(build, facts) if build else _usage_section(engine.meta)
        (folder / "PROVENANCE.md").write_text(_provenance(config, facts, inputs, backend, section, samples_of(task)), encoding="utf-8")
        card = model_card(
            body,
            recipe=config.recipe,
            target=config.target,
            origin=config.provenance,
            test=inputs["test"].json(METRICS) if "test" in inputs else None,
            parity=inputs["parity"].json(PARITY),
        )
        (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        files = {p.name: sha256_file(p) for p in sorted(folder.iterdir())}
        made = {n: v for n, v in config.provenance.items() if n not in ("student", "teacher")}
        (folder / "sbom.cdx.json").write_text(
            sbom(config.recipe, files["model.onnx"], files, made, str(inputs["data"].meta.get("fingerprint"))), encoding="utf-8"
        )
        write_manifest(
            folder,
            {
                "recipe": config.recipe,
                "target": config.target,
                "backend": backend,
                "precision": facts["precision"],
                "metrics": inputs["test"].json(METRICS)["metrics"] if "test" in inputs else {},
                "data": inputs["data"].meta.get("fingerprint"),
                "provenance": config.provenance,
                "engine": engine_facts(engine.meta),
                "made_on": settings.facts["machine"],
            },
            files,
        )
        return {"model_file": model_file, "size_bytes": (folder / model_file).stat().st_size}


def _preprocess(facts: Mapping[str, Any], data: Artifact) -> dict[str, Any]:
    """What predict.py does to a sample before the model sees it."""
    if "features" in facts:
        given = {"features": facts["features"], "divide_by_sum": bool(data.json("nodes.json")["normalise"])}
        return given | ({"positions": size} if (size := data.meta.get("positions", 0)) else {})
    index = data.json("index.json")
    return {n: facts[n] for n in ("image_size", "mean", "std")} | {n: index[n] for n in ("resize", "interpolation")}


def _write_positions(path: Path, dataset: Any) -> None:
    """Where the nodes lie that training saw, by name: what predict.py averages for a new one. Nothing where the model was trained without."""
    import numpy as np

    from edgekd.safeio.arrays import write_arrays

    if getattr(dataset, "places", None) is not None:
        seen = dataset.seen
        write_arrays(path, {"ids": np.array([dataset.ids[i] for i in seen]), "positions": dataset.places[seen]})


def _write_samples(path: Path, graph: Artifact, dataset: Any, ctx: Context) -> float:
    """Pixels of a few val (or generated) images and the outputs they give, so that any device can check itself; returns the largest output."""
    import numpy as np

    from edgekd.data.normalise import raw_name
    from edgekd.safeio.arrays import write_arrays
    from edgekd.stages._common import drawn
    from edgekd.stages.parity import graph_outputs

    positions = drawn(dataset, "val", _SAMPLES)
    outputs = graph_outputs(graph, dataset, positions, ctx)
    write_arrays(path, {raw_name(graph.json(FACTS)): dataset.samples(positions), "outputs": outputs, "labels": dataset.labels[positions]})
    return float(np.abs(outputs).max())


def _provenance(config: Any, facts: Mapping[str, Any], inputs: Mapping[str, Artifact], backend: str, section: str, samples: str) -> str:
    tested = "accuracy was not measured: no data were given, the samples are generated"
    if "test" in inputs:
        metrics = inputs["test"].json(METRICS)
        shown = ", ".join(f"{k} {v:.4f}" for k, v in sorted(metrics["metrics"].items()))
        against = ", against its teacher's decisions, for there are no labels" if metrics["metric_name"] == "agreement" else ""
        tested = f"test metrics of this file, {metrics['samples']} {samples}{against}: {shown}"
    origin = "\n".join(f"- {k}: {v}" for k, v in sorted(config.provenance.items()))
    return f"""# What this is

Made by edgekd from the recipe `{config.recipe}` for the target `{config.target}` ({backend}, {facts["precision"]}).

- {tested}
- data fingerprint: {inputs["data"].meta.get("fingerprint")}
{origin}

Licences: the weights follow the licences of the training data and of the model they were distilled from, which edgekd cannot know; `predict.py` is
MIT-licensed with edgekd. Check a copy with `edgekd verify FOLDER`; use it with `python predict.py`, which says what it takes.
{section}"""


def _engine_section(build: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """How the device makes its engine: by build.py, or by hand."""
    return f"""
## The engine

On the device: `python3 build.py` builds `model.engine` with its own TensorRT, checks it on the sample images, measures it and completes the manifest.
By hand, the build alone:

    {trtexec(build, facts)}
"""


def _usage_section(engine: Mapping[str, Any]) -> str:
    """What the backend says of running its engine without edgekd."""
    return f"\n## The engine\n\n{engine['usage']}" if "usage" in engine else ""


def trtexec(build: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The command of TensorRT's own tool that builds the same engine; precision comes from the graph, so there is no --int8 and no --fp16."""
    tool = "tensorrt_rtx" if build["backend"] == "tensorrt_rtx" else "trtexec"
    options, side = build["options"], facts.get("image_size")
    shape = f"3x{side}x{side}" if side else facts["features"]
    words = [tool, "--onnx=model.onnx", "--saveEngine=model.engine", *(["--stronglyTyped"] if tool == "trtexec" else [])]
    if facts["fixed_batch"] is None:
        most = max(build["batch"], options["max_batch"])
        words += [f"--{n}Shapes={facts['input']}:{batch}x{shape}" for n, batch in (("min", 1), ("opt", build["batch"]), ("max", most))]
    if options["workspace_mib"] is not None:
        words.append(f"--memPoolSize=workspace:{options['workspace_mib']}")
    if options["dla"] is not None:
        words += [f"--useDLACore={options['dla']}", "--allowGPUFallback"]
    words += ["--versionCompatible"] * options["version_compatible"]
    words += ["--hardwareCompatibilityLevel=ampere+"] * options["hardware_compatible"]
    return " ".join([*words, f"--builderOptimizationLevel={options['optimization']}"])
