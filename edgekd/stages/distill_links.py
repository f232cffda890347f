"""distill_links: a model of rows learns a teacher's view of which nodes are linked -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.errors import InputRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.train_links import prepare
from edgekd.train.config import LinkTrainConfig

if TYPE_CHECKING:
    from edgekd.context import Context
    from edgekd.graph._links import LinkJob, LinkTeacher

EMBEDDINGS, SCORER = "embeddings.npy", ("hidden_weight.npy", "hidden_bias.npy", "last_weight.npy", "last_bias.npy")


@register("stage")
class DistillLinks:
    Config = LinkTrainConfig
    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "answers?": Kind.ANSWERS}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "torch-geometric")
    method_kind = "graph_distill"
    method_field = "method"
    default_method = "llp"
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.stages._common import method_of
        from edgekd.stages.train import learn

        job, distiller = prepare(settings, inputs, ctx), method_of(settings, "graph_distill")
        job.distiller, job.label_weight, job.teacher = distiller, distiller.config.label_weight, taught_by(inputs["answers"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            job.projectors = distiller.setup(job.teacher)
        meta = learn(job, out, ctx)
        assert_tells_links(job, inputs["answers"])
        return meta


def assert_tells_links(job: LinkJob, answers: Artifact) -> None:
    """A student that ranks the links of val no better than luck, where its teacher does, has learned nothing: it never ships."""
    import numpy as np

    from edgekd.graph._links import pair_logits

    val = job.links.split("val")
    labels = job.links.labels[val]
    said = pair_logits(job.model.to("cpu"), job.links, job.links.pairs[val], None).numpy()
    mine, theirs = (float(job.task.scores(o, labels).mean()) for o in (said, np.load(answers.path / "val.npy")))
    luck = 0.5 + 1.645 * (0.25 / int((labels == 1).sum())) ** 0.5  # one-sided, 95 %
    if mine <= luck < theirs:
        raise InputRefused(
            f"the student ranks links of val no better than luck (area under the curve {mine:.1%}; the teacher's {theirs:.1%}): it has collapsed",
            where=job.name,
            expected=f"more than {luck:.1%}",
            hint=f"another seed, or more of the labels: -o seed=1, -o {job.name}.label_weight=1, -o {job.name}.lr=0.001",
        )


def taught_by(answers: Artifact) -> LinkTeacher:
    """The teacher of an ANSWERS artifact."""
    import numpy as np
    import torch

    from edgekd.graph._links import LinkTeacher

    embeddings, *layers = (torch.from_numpy(np.load(answers.path / n)) for n in (EMBEDDINGS, *SCORER))
    return LinkTeacher(embeddings, (layers[0], layers[1], layers[2], layers[3]))
