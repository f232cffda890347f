"""answer_links: what a trained teacher says of pairs of nodes -> answers: its embeddings, the layers that score them, and its logits of val and test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.distill_links import EMBEDDINGS, SCORER

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class AnswerLinks:
    class Config(Base):
        """Nothing to set."""

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA}
    gives = Kind.ANSWERS
    version = 1
    libraries = ("torch", "torch-geometric", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.graph._links import embeddings_of, pair_logits
        from edgekd.models.build import load_model
        from edgekd.stages._common import open_links

        model, spec = load_model(inputs["model"])
        links, module = open_links(inputs["data"]), getattr(model, "encoder")  # noqa: B009
        looks_at = registry.load("architecture", spec.arch).looks_at
        edges = module.edges(links.nodes.indptr, links.nodes.neighbours) if looks_at == "graph" else None
        np.save(out / EMBEDDINGS, embeddings_of(model, links, edges).numpy())
        for name, layer in zip(SCORER, ("hidden.weight", "hidden.bias", "classifier.weight", "classifier.bias"), strict=True):
            np.save(out / name, model.get_parameter(layer).detach().numpy())
        for part in ("val", "test"):
            np.save(out / f"{part}.npy", pair_logits(model, links, links.pairs[links.split(part)], edges).numpy())
        return {"arch": spec.arch}
