"""answer_nodes: what a trained teacher says of every node, calibrated on val -> answers, with its logits of val and test.

In the inductive setting a student learns from answers on the seen part of the graph, and the teacher is judged on val and test with all edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import registry
from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.distill_nodes import CODEBOOK, HIDDEN, LOGITS, NEARNESS, NOISY

if TYPE_CHECKING:
    from edgekd.context import Context


@register("stage")
class AnswerNodes:
    class Config(Base):
        calibrated: bool = Field(True, description="divided by the temperature that fits val; a teacher that stays flat is refused")
        noise: bool = Field(False, description="also its entropies with noise on the features, for methods that ask for them")
        hidden: bool = Field(False, description="also what its last hidden layer gives")
        tokens: bool = Field(False, description="also its codebook, and how near each node is to each code")

    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA}
    gives = Kind.ANSWERS
    version = 1
    libraries = ("torch", "torch-geometric", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.graph._run import features_of, whole_graph_logits
        from edgekd.graph._teacher import hidden_of, noisy_entropy
        from edgekd.models.build import load_model
        from edgekd.stages._common import open_nodes

        config, nodes = settings.typed(self.Config), open_nodes(inputs["data"])
        model, spec = load_model(inputs["model"])
        looks_at = registry.load("architecture", spec.arch).looks_at
        x = features_of(nodes, looks_at=looks_at)
        if looks_at == "graph":
            edges: Any = model.edges(*nodes.observed())  # type: ignore[operator]
            learned = whole_graph_logits(model, x, edges).numpy()
            every = model.edges(nodes.indptr, nodes.neighbours) if nodes.hidden.any() else None  # type: ignore[operator]
            judged = learned if every is None else whole_graph_logits(model, x, every).numpy()
        else:
            edges = None
            learned = judged = model(x).detach().numpy()
        found = write_answers(learned, judged, nodes, config.calibrated, out)
        if config.noise and edges is not None:
            np.save(out / NOISY, noisy_entropy(model, nodes, edges, found["temperature"], ctx.seed).numpy())
        if config.hidden:
            np.save(out / HIDDEN, hidden_of(model, x, edges).numpy())
        if config.tokens and edges is not None:
            nearness, codebook = model.tokens(x, edges)  # type: ignore[operator]
            np.save(out / NEARNESS, nearness.numpy())
            np.save(out / CODEBOOK, codebook.numpy())
        return {"arch": spec.arch} | found


def write_answers(learned: Any, judged: Any, nodes: Any, calibrated: bool, out: Path) -> dict[str, Any]:
    """Logits of all nodes as they are learned from, those of val and test as they are judged; returns temperature and entropy."""
    import numpy as np

    from edgekd.data.nodes import UNLABELLED
    from edgekd.graph._teacher import Calibration, calibrate

    val = np.full(len(nodes), UNLABELLED)
    val[nodes.split("val")] = nodes.labels[nodes.split("val")]
    found = Calibration(1.0, float("nan"))
    if calibrated:
        learned, found = calibrate(learned, val, "teacher")
    np.save(out / LOGITS, learned)
    for part in ("val", "test"):
        np.save(out / f"{part}.npy", judged[nodes.split(part)] / np.float32(found.temperature))
    return {"temperature": found.temperature} | ({"entropy": found.entropy} if calibrated else {})
