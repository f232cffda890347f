"""prune: removes whole channels and hidden units, by the widths that were decided -> smaller model. Accuracy is judged after recovery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings, read_decision

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.context import Context
    from edgekd.models.spec import ModelSpec
    from edgekd.stages._common import Samples

_BATCH = 64
_RECALIBRATION_BATCHES = 8


class PruneTarget(Base):
    """How far to prune; exactly one goal."""

    speedup: float | None = Field(None, gt=1, le=100, description="measured: latency before over latency after, on the gate's target")
    latency_ms: float | None = Field(None, gt=0, description="measured median latency on the gate's target")
    macs: float | None = Field(None, gt=0, lt=1, description="fraction of multiply-accumulates kept")
    params: float | None = Field(None, gt=0, lt=1, description="fraction of parameters kept")
    size_mb: float | None = Field(None, gt=0, description="size of the exported file in 10^6 bytes")

    @model_validator(mode="after")
    def _one_goal(self) -> PruneTarget:
        if len(self.model_fields_set) != 1 or (None in self.model_dump().values() and self.goal[1] is None):
            raise ValueError(f"expected exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def goal(self) -> tuple[str, Any]:
        """(name, value) of the one goal."""
        return next(((n, v) for n, v in self.model_dump().items() if n in self.model_fields_set), ("", None))


@register("stage")
class Prune:
    class Config(Base):
        target: PruneTarget = Field(description="how far to prune")
        quantum: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            "auto", description="kept widths are multiples of it; auto: what the device prefers"
        )
        scope: Literal["auto", "all", "internal"] = Field("auto", description="all widths, or only those inside blocks; auto: all for CNNs")
        samples: int = Field(256, ge=1, le=100_000, description="val images that criteria with gradients read")
        evaluations: int = Field(5, ge=1, le=50, description="most candidates that the search cuts and measures")

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "widths": Kind.DECISION}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "timm", "torch-pruning")
    user = True
    method_kind = "criterion"
    method_field = "criterion"
    default_method = "l1"
    compresses = True

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        from edgekd.models.build import build, load_model, save_model
        from edgekd.models.structure import structure_diff
        from edgekd.prune._calibrate import recalibrate_bn
        from edgekd.prune._cut import prune_model
        from edgekd.stages._common import open_samples

        config, decided = settings.typed(self.Config), read_decision(inputs["widths"])
        model, spec = load_model(inputs["model"])
        dataset = open_samples(inputs["data"], ctx)
        scores = score(model, spec, dataset, settings, config)
        example = example_of(spec)
        report = prune_model(
            model, example, scores, keep={n: w for n, w in decided["widths"].items() if n in scores}, scope=decided["scope"]
        )
        recalibrate_bn(model, (x for x, _ in scoring_batches(dataset, spec, "train", _BATCH * _RECALIBRATION_BATCHES)))
        base = build(spec.model_copy(update={"structure": {}}))
        save_model(model, spec.model_copy(update={"structure": structure_diff(base, model)}), out)
        return asdict(report)


def example_of(spec: ModelSpec) -> Tensor:
    """A zero sample; cutting needs shapes only."""
    import torch

    return torch.zeros(1, *spec.shape)


def score(model: nn.Module, spec: ModelSpec, dataset: Samples, settings: Settings, config: Any) -> dict[str, Tensor]:
    """Importance of every unit by group; gradients come from val, since a memorised training set has none."""
    from edgekd.prune._calibrate import collect_gradients
    from edgekd.prune._cut import score_model
    from edgekd.stages._common import method_of, task_of

    criterion, task = method_of(settings, "criterion"), task_of(settings)
    if "grads" in criterion.needs:
        classes = len(dataset.classes)
        batches = ((x, task.collate(y, classes)) for x, y in scoring_batches(dataset, spec, "val", config.samples))
        collect_gradients(model, batches, lambda outputs, target: task.label_loss(outputs, target, 0.0))
    scores = score_model(model, example_of(spec), criterion, scope=config.scope)
    model.zero_grad(set_to_none=True)
    return scores


def scoring_batches(dataset: Samples, spec: ModelSpec, split: str, count: int) -> Iterator[tuple[Tensor, Any]]:
    """(inputs, stored labels) of the first `count` samples in a fixed order."""
    import torch

    from edgekd.data.augment import to_float
    from edgekd.data.dataset import Dataset as Images
    from edgekd.data.loader import batches, epoch_order
    from edgekd.train.views import View

    if not isinstance(dataset, Images):
        chosen = epoch_order(0, 0, dataset.split(split))[:count]
        for start in range(0, len(chosen) - 1, _BATCH):
            part = chosen[start : start + _BATCH]
            yield torch.from_numpy(dataset.samples(part)), dataset.labels[part]
        return
    view = View(spec)
    for batch in batches(dataset, epoch_order(0, 0, dataset.split(split))[:count], _BATCH):
        if len(batch.positions) > 1:  # one sample has no batch statistics
            yield view(to_float(batch.images)), dataset.labels[batch.positions]
