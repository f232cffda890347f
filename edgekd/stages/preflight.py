"""preflight: before any training, the whole chain once with untrained weights. What cannot be built fails now, naming the stage.

One batch through teacher and student with finite loss terms and gradients, and warnings of what is known to go wrong with such a pair; the untrained
student pruned, exported, quantized with random calibration, built and run on every target that this machine can run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.errors import EdgekdError, InputRefused, TrainingDiverged
from edgekd.registry import register
from edgekd.stages._stage import Settings, write_decision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgekd.console import Console
    from edgekd.context import Context
    from edgekd.data.dataset import Dataset
    from edgekd.data.links import Links
    from edgekd.data.nodes import Nodes
    from edgekd.models.spec import ModelSpec
    from edgekd.models.taps import TappedModel
    from edgekd.quantize._quantizer import ModelQuantizer
    from edgekd.tasks._task import Task
    from edgekd.train.distiller import Distiller, Outputs

_BATCH = 4
_NODES = 64
_MADE_UP = 4  # units and codes of a made-up teacher of nodes


class Probe(Base):
    """One listed stage, as far as preflight must know it."""

    stage: str = Field(description="its kind")
    name: str = Field(description="its name in the recipe")
    method: str | None = Field(None, description="its method")
    config: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the stage itself, where they decide what is built")


class Place(Base):
    """One target that this machine can run, or build for."""

    device: str = Field(description="device profile")
    backend: str = Field(description="runtime")
    threads: int = Field(1, ge=1, description="threads of the runtime")
    runs: bool = Field(True, description="False: the engine is built but cannot be run here")
    leaves_out: tuple[str, ...] = Field((), description="quantizing stages whose precision its runtime does not have")
    batch: int = Field(1, ge=1, description="images per inference")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the backend's builder")


@register("stage")
class Preflight:
    class Config(Base):
        probes: tuple[Probe, ...] = Field((), description="the recipe's stages")
        places: tuple[Place, ...] = Field((), description="targets that this machine can run")
        teacher_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the teacher's training")

    takes: Mapping[str, Kind] = {
        "student": Kind.MODEL,
        "teacher?": Kind.MODEL,
        "black_box?": Kind.GRAPH,
        "answers?": Kind.ANSWERS,
        "assistant?": Kind.MODEL,
        "data": Kind.DATA,
    }
    gives = Kind.DECISION
    version = 1
    libraries = ("torch", "timm", "torch-pruning", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.models.build import load_model
        from edgekd.stages._common import open_samples, task_of

        config = settings.typed(self.Config)
        student, spec = load_model(inputs["student"])
        dataset: Any = open_samples(inputs["data"], ctx)
        warnings: list[str] = []
        for probe in config.probes:
            if probe.stage == "distill_nodes":
                with _named(probe.name):
                    _teach_once(probe, (student, spec), dataset, task_of(settings), ctx)
            if probe.stage == "distill_links":
                with _named(probe.name):
                    _link_once(probe, (student, spec), dataset, task_of(settings), ctx)
            if probe.stage == "distill":
                with _named(probe.name):
                    distiller = _distil_once(probe, (student, spec), inputs, dataset, task_of(settings), ctx)
                    found = _cautions(probe, distiller, (student, spec), inputs, config.teacher_smoothing)
                warnings += [text for text in found if text not in warnings]
        if "assistant" in inputs:
            with _named("assistant"):
                taught = Probe(stage="distill", name="assistant", method="kd")
                _distil_once(taught, load_model(inputs["assistant"]), inputs, dataset, task_of(settings), ctx)
        built = _build_all(config, _pruned(config, student, spec, dataset, settings), spec, ctx.console)
        write_decision(out, {"built": built, "warnings": warnings})
        return {"built": built}


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Any failure inside says which stage would have failed."""
    try:
        yield
    except EdgekdError as error:
        error.where = f"preflight of stage '{stage}'" + (f", {error.where}" if error.where else "")
        raise
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        AssertionError,
    ) as error:  # torch's and timm's words for shapes that do not fit
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise
        what = f"this pair of models does not work with it: {(str(error) or type(error).__name__).splitlines()[0][:300]}"
        raise InputRefused(
            what,
            where=f"preflight of stage '{stage}'",
            hint="arguments that fit the images, such as -o model.args={img_size: 32} (or teacher.args, assistant.args); or another method or student",
        ) from error


def _distil_once(
    probe: Probe, student: tuple[nn.Module, ModelSpec], inputs: Mapping[str, Artifact], dataset: Dataset, task: Task, ctx: Context
) -> Distiller:
    """One batch: every answer, term and gradient must be finite."""
    import copy

    import torch

    from edgekd.data.augment import to_float
    from edgekd.train.distiller import Batch, Outputs
    from edgekd.train.views import View

    cls = registry.load("distill", str(probe.method))
    distiller: Distiller = cls(cls.Config(**probe.config))
    net, spec = copy.deepcopy(student[0]).train(), student[1]
    positions = dataset.split("train")[:_BATCH]
    images, index = to_float(torch.from_numpy(dataset.images(positions))), torch.from_numpy(positions)
    seen, answer = _answered(distiller, (net, spec), inputs, dataset, (images, index), ctx)
    if not bool(answer.logits.isfinite().all()):
        raise TrainingDiverged(
            "the teacher's outputs are not finite on the first batch",
            expected="finite outputs",
            hint="check its weights, teacher.mean and teacher.std",
        )
    given = Outputs.of(*seen(View(spec)(images)))
    target = task.collate(dataset.labels[positions], len(dataset.classes))
    terms = distiller.terms(Batch(given, answer, target, index, 0.0))
    for name, term in terms.items():
        if not bool(term.isfinite()):
            raise TrainingDiverged(f"loss term '{name}' is {float(term)} on the first batch", expected="a finite term")
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            raise TrainingDiverged(f"the gradient of '{name}' is not finite on the first batch", expected="finite gradients")
    return distiller


def _teach_once(probe: Probe, student: tuple[nn.Module, ModelSpec], nodes: Nodes, task: Task, ctx: Context) -> None:
    """One batch of nodes with a random teacher: every term and gradient must be finite."""
    import copy

    import torch

    from edgekd.graph._distiller import Teaching
    from edgekd.graph._run import NodeJob
    from edgekd.stages.distill_nodes import inside_of
    from edgekd.train.config import NodeTrainConfig

    cls = registry.load("graph_distill", str(probe.method))
    distiller = cls(cls.Config(**probe.config))
    said = torch.randn(len(nodes.seen), len(nodes.classes), generator=torch.Generator().manual_seed(0))
    net, spec = copy.deepcopy(student[0]), student[1]
    job = NodeJob(probe.name, net, spec, "rows", nodes, task, NodeTrainConfig(batch_size=_NODES, neighbours=_BATCH), ctx.seed, ctx.work)
    job.distiller, job.label_weight, job.teacher = distiller, distiller.config.label_weight, said
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, codebook = torch.randn(len(said), _MADE_UP), torch.randn(_MADE_UP, _MADE_UP)
        job.projectors = distiller.setup(Teaching(said, said.abs().sum(1), hidden, hidden, codebook, *inside_of(net)))
        run = job.start(None)
        run.train_step(next(run.remaining()))


def _link_once(probe: Probe, student: tuple[nn.Module, ModelSpec], links: Links, task: Task, ctx: Context) -> None:
    """One batch of links with a random teacher: every term and gradient must be finite."""
    import copy

    import torch

    from edgekd.graph._links import LinkJob, LinkTeacher
    from edgekd.train.config import LinkTrainConfig

    cls = registry.load("graph_distill", str(probe.method))
    net, draw = copy.deepcopy(student[0]), torch.Generator().manual_seed(0)
    job = LinkJob(probe.name, net, student[1], "rows", links, task, LinkTrainConfig(batch_size=_NODES), ctx.seed, ctx.work)
    job.distiller = cls(cls.Config(**probe.config))
    layers = [torch.randn(shape, generator=draw) for shape in ((_MADE_UP, _MADE_UP), (_MADE_UP,), (2, _MADE_UP), (2,))]
    embeddings = torch.randn(len(links.nodes), _MADE_UP, generator=draw)
    job.teacher = LinkTeacher(embeddings, (layers[0], layers[1], layers[2], layers[3]))
    job.projectors = job.distiller.setup(job.teacher)
    run = job.start(None)
    run.train_step(next(run.remaining()))


def _cautions(
    probe: Probe, distiller: Distiller, student: tuple[nn.Module, ModelSpec], inputs: Mapping[str, Artifact], smoothing: float
) -> list[str]:
    """What is known to go wrong with such a pair, for the stage; of a teacher that is known by its outputs only, nothing is."""
    from edgekd.distill._advice import cautions, facts_of
    from edgekd.models.build import load_model
    from edgekd.train.pair import side

    if "teacher" not in inputs:
        return []
    facts = facts_of(side(*student), side(*load_model(inputs["teacher"])), smoothing, assisted="assistant" in inputs)
    return [f"{probe.name}: {text}" for text in cautions(str(probe.method), distiller, facts)]


def _answered(
    distiller: Any,
    student: tuple[nn.Module, ModelSpec],
    inputs: Mapping[str, Artifact],
    dataset: Dataset,
    batch: tuple[Tensor, Tensor],
    ctx: Context,
) -> tuple[TappedModel, Outputs]:
    """The student with its hooks, and what the teacher says to the batch (images, index)."""
    import torch

    from edgekd.models.build import load_model
    from edgekd.stages.distill import black_box_of
    from edgekd.train.answers import Answers
    from edgekd.train.distiller import Outputs
    from edgekd.train.pair import wire, wire_student
    from edgekd.train.views import View

    train = dataset.split("train")
    if "teacher" not in inputs:
        ask = black_box_of(inputs["black_box"], ctx) if "black_box" in inputs else Answers(inputs["answers"].path, train)
        tapped, _ = wire_student(distiller, *student, train, seed=0)
        return tapped, ask(*batch, 0)
    guide, guide_spec = load_model(inputs["teacher"])
    view = View(guide_spec)
    wired = wire(distiller, student, (guide, guide_spec), view, dataset, train[:_BATCH], seed=0)
    with torch.no_grad():
        return wired.student, Outputs.of(*wired.teacher(view(batch[0])))


def _build_all(config: Any, model: nn.Module, spec: ModelSpec, console: Console) -> list[str]:
    """Exported, quantized, built and run; returns what was built, in words."""
    import numpy as np

    from edgekd.backends import watched
    from edgekd.export.onnx import export_onnx, input_of
    from edgekd.profile.device import load_device

    built = []
    images = np.random.default_rng(0).standard_normal((_BATCH, *spec.shape), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        with _named("export"):
            fixed = None if export_onnx(model, spec.shape, graph)["dynamic_batch"] else 1
        built.append("ONNX fp32")
        for place in config.places:
            with _named(f"compile for {place.device}"):
                backend, device = registry.load("backend", place.backend)(), load_device(place.device)
                probes = [p for p in config.probes if p.stage == "quantize" and p.name not in place.leaves_out]
                quantized = _quantized(probes, model, spec, graph, images[: fixed or _BATCH], device.flavour_for(place.backend))
                for name, file in [("fp32", graph), *quantized]:
                    target = Path(tempfile.mkdtemp(dir=folder))
                    with watched(backend, console, f"{place.backend} {name}"):
                        meta = backend.convert(file, device, target, place.options, batch=place.batch)
                    if place.runs:
                        few = {input_of(spec.shape): images[: fixed or min(_BATCH, meta.get("max_batch") or _BATCH)]}
                        engine = target / meta["model_file"]
                        backend.open(engine, threads=place.threads, device=device, options=meta.get("options")).run(few)
                    built.append(f"{place.backend} {name} for {place.device}")
    return built


def _pruned(config: Any, student: nn.Module, spec: ModelSpec, dataset: Dataset, settings: Settings) -> nn.Module:
    """A copy cut to half its widths as each prune stage would: its criterion on a few images, its scope."""
    import copy

    from edgekd.prune._cut import prune_model
    from edgekd.stages.prune import Prune, example_of, score

    model = copy.deepcopy(student)
    for probe in config.probes:
        if probe.stage == "prune":
            with _named(probe.name):
                cls, asked = registry.load("criterion", str(probe.method)), Prune.Config(**probe.settings)
                asked = asked.model_copy(update={"samples": _BATCH})
                scores = score(
                    model, spec, dataset, Settings(probe.name, asked, probe.method, cls.Config(**probe.config), settings.facts), asked
                )
                prune_model(model, example_of(spec), scores, keep=0.5, scope=asked.scope)
    return model


def _quantized(
    probes: list[Probe], model: nn.Module, spec: ModelSpec, graph: Path, images: NDArray[np.float32], flavour: str
) -> Iterator[tuple[str, Path]]:
    """What each quantizing stage makes of the graph beside it, or of the model, with random calibration."""
    for probe in probes:
        with _named(probe.name):
            cls = registry.load("quantize", str(probe.method))
            quantizer, file = cls(cls.Config(**probe.config)), graph.with_name(f"{probe.name}-{flavour}.onnx")
            if cls.level == "model":
                trained, grid = _learned_once(quantizer, model, spec, images, flavour, file.with_suffix(""))
                quantizer.quantize(trained, file, iter([images]), flavour, grid=grid)
            else:
                quantizer.quantize(graph, file, iter([images]), flavour)
            yield cls.precision, file


def _learned_once(
    quantizer: ModelQuantizer, model: nn.Module, spec: ModelSpec, images: NDArray[np.float32], flavour: str, folder: Path
) -> tuple[Path, Path]:
    """One batch through a quantized copy with finite gradients, baked and exported: (graph, grid)."""
    import copy

    import torch

    from edgekd.export.onnx import export_onnx
    from edgekd.quantize._learned import GRID, Seen, save_grid

    folder.mkdir(exist_ok=True)
    net, batch = copy.deepcopy(model), torch.from_numpy(images)
    quantizer.attach(net, Seen([batch], lambda logits, _: logits.square().mean()), flavour)
    net.train()(batch).square().mean().backward()
    bad = next((n for n, p in net.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())), None)
    if bad is not None:
        raise TrainingDiverged(f"the gradient of '{bad}' is not finite on the first batch", expected="finite gradients")
    save_grid(folder, quantizer.bake(net))
    export_onnx(net, spec.shape, folder / "model.onnx")
    return folder / "model.onnx", folder / GRID
