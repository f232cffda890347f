"""evaluate: an engine over one split, through its own runtime -> predictions and metrics. Test is read once, by what ships."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.errors import DataRefused, InputRefused
from edgekd.gate import paired_drop
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.compile import open_engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.backends import Session
    from edgekd.context import Context
    from edgekd.stages._common import Samples
    from edgekd.tasks._task import Task

OUTPUTS, LABELS, METRICS = "outputs.npy", "labels.npy", "metrics.json"
_BATCH = 64


@register("stage")
class Evaluate:
    class Config(Base):
        split: Literal["train", "val", "test"] = Field("val", description="which part of the dataset")
        above_chance: bool = Field(False, description="refuse a model that knows nothing: nothing can be learned from such a teacher")

    takes: Mapping[str, Kind] = {"engine": Kind.ENGINE, "data": Kind.DATA, "teacher?": Kind.METRICS}
    gives = Kind.METRICS
    version = 1
    libraries = ("onnxruntime-gpu", "onnxruntime", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.stages._common import open_samples

        config = settings.typed(self.Config)
        split = config.split
        dataset = open_samples(inputs["data"], ctx)
        positions = dataset.split(split)
        if not len(positions):
            raise DataRefused(f"the dataset has no {split} part", hint=f"-o data.split.{split}=0.15")
        session, facts = open_engine(inputs["engine"], threads=ctx.threads)
        outputs = run_engine(session, facts, dataset, positions, ctx, settings.name)
        if bad := int((~np.isfinite(outputs).reshape(len(outputs), -1).all(1)).sum()):
            if config.above_chance:
                raise InputRefused(
                    f"its outputs for {bad} of {len(outputs)} images are not finite: a student cannot learn from them",
                    where=settings.name.removesuffix(".val"),
                    expected="finite outputs",
                    hint="check its weights, teacher.mean and teacher.std",
                )
            ctx.console.warn(
                f"{settings.name}: the outputs of {bad} of {len(outputs)} images are not finite; they count as wrong answers at best"
            )
        return judge(outputs, settings, config, dataset, inputs.get("teacher"), out)


def judge(
    outputs: NDArray[np.float32], settings: Settings, config: Any, dataset: Samples, teacher: Artifact | None, out: Path
) -> dict[str, Any]:
    """Writes outputs (samples, ...) of a split with their metrics into the folder `out`; raises InputRefused for a teacher that knows nothing."""
    import numpy as np

    from edgekd.stages._common import task_of

    task, labels = task_of(settings), dataset.labels[dataset.split(config.split)]
    if hasattr(task, "misfit") and (wrong := task.misfit(outputs, len(dataset.classes))):
        raise InputRefused(wrong, where=settings.name, expected="one output a class", hint="another model, or the folder it was trained on")
    metrics = task.metrics(outputs, labels, np.load(teacher.path / OUTPUTS) if teacher else None)
    if config.above_chance and hasattr(task, "order") and (order := task.order(outputs, labels)):
        raise _other_order([dataset.classes[i] for i in order], settings.name)
    if config.above_chance and hasattr(task, "chance"):
        _assert_above_chance(metrics[task.metric_name], task.chance(labels), len(labels), settings.name)
    np.save(out / OUTPUTS, outputs)
    np.save(out / LABELS, labels)
    body = {
        "split": config.split,
        "metric_name": task.metric_name,
        "metrics": metrics,
        "samples": len(labels),
        "confusion": task.confusion(outputs, labels, len(dataset.classes)),
    }
    (out / METRICS).write_text(json.dumps(body, sort_keys=True), encoding="utf-8")
    return {task.metric_name: metrics[task.metric_name]}


def _other_order(classes: list[str], name: str) -> InputRefused:
    """The refusal of a model that knows the classes by other numbers, with the mapping that the answers show."""
    teacher = name.removesuffix(".val")
    return InputRefused(
        "on val its answers are right in another order of the classes than the data's",
        where=teacher,
        expected="outputs in the order of the data's classes",
        hint=f"say what they are: -o {teacher}.classes={json.dumps(classes, ensure_ascii=False)}; --no-gate goes on",
    )


def _assert_above_chance(metric: float, chance: float, samples: int, name: str) -> None:
    """One-sided, 95 %: the metric must be more than luck with so few samples."""
    if metric <= chance + 1.645 * (chance * (1 - chance) / samples) ** 0.5:
        raise InputRefused(
            f"on val it is right for {metric:.1%}, and guessing the most frequent class is for {chance:.1%}: a student learns nothing from it",
            where=name.removesuffix(".val"),
            expected="a teacher that is better than chance",
            hint="train it longer: -o teacher.train.epochs=N; or check teacher.mean, teacher.std and the order of classes; --no-gate goes on",
        )


def run_engine(
    session: Session, facts: Mapping[str, Any], dataset: Samples, positions: NDArray[np.int64], ctx: Context, name: str
) -> NDArray[np.float32]:
    """Outputs (samples, ...) of all positions, in order; a graph with a fixed batch has its last one filled up."""
    import numpy as np

    from edgekd.data.normalise import normalised

    fixed, parts = facts["fixed_batch"], []
    size = fixed or min(_BATCH, facts.get("max_batch") or _BATCH)  # an engine may be built for fewer images at once
    with ctx.console.bar(name, len(positions)) as bar:
        for start in range(0, len(positions), size):
            chosen = positions[start : start + size]
            asked = np.resize(chosen, size) if fixed else chosen
            parts.append(session.run({facts["input"]: normalised(dataset.samples(asked), facts)})[0][: len(chosen)])
            bar.update(start + len(chosen))
    return np.concatenate(parts).astype(np.float32)


def drop_of(task: Task, before: Artifact, after: Artifact) -> tuple[float, tuple[float, float]]:
    """How much of the metric is lost between two METRICS of the same samples, and its 95 % interval, paired."""
    import numpy as np

    labels = np.load(before.path / LABELS)
    first, second = (task.scores(np.load(side.path / OUTPUTS), labels).tolist() for side in (before, after))
    return paired_drop(first, second)


def metric_of(metrics: Artifact) -> tuple[str, float]:
    """(name, value) of a METRICS artifact."""
    body = metrics.json(METRICS)
    return str(body["metric_name"]), float(body["metrics"][body["metric_name"]])
