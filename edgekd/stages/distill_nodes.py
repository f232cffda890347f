"""distill_nodes: a model of rows learns what a teacher says of a graph's nodes, by one of the methods of edgekd/graph -> model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.errors import InputRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.train_nodes import prepare
from edgekd.train.config import NodeTrainConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.data.nodes import Nodes
    from edgekd.graph._distiller import Teaching

LOGITS, NOISY, HIDDEN, NEARNESS, CODEBOOK = "logits.npy", "noisy_entropy.npy", "hidden.npy", "nearness.npy", "codebook.npy"
_ONE_CLASS = 0.95  # share of val that gets one answer, above which a student has collapsed, unless its teacher says so as well


@register("stage")
class DistillNodes:
    Config = NodeTrainConfig
    takes: Mapping[str, Kind] = {"model": Kind.MODEL, "data": Kind.DATA, "answers?": Kind.ANSWERS}
    gives = Kind.MODEL
    version = 1
    libraries = ("torch", "torch-geometric", "scipy")
    method_kind = "graph_distill"
    method_field = "method"
    default_method = "glnn"
    compresses = False

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import torch

        from edgekd.stages._common import method_of
        from edgekd.stages.train import learn

        job, distiller = prepare(settings, inputs, ctx), method_of(settings, "graph_distill")
        if job.looks_at != "rows":
            raise InputRefused(
                f"the student {job.spec.arch} looks at neighbours", where="model.arch", expected="a model of rows", hint="-o model.arch=mlp"
            )
        said = teaching(inputs["answers"], job.nodes, job.model)
        job.distiller, job.label_weight, job.teacher = distiller, distiller.config.label_weight, said.logits
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            job.projectors = distiller.setup(said)
        meta = learn(job, out, ctx)
        assert_not_collapsed(job.model, job.nodes, said.logits.numpy(), settings.name)
        return meta


def teaching(answers: Artifact, nodes: Nodes, student: Any) -> Teaching:
    """What a teacher says of all seen nodes, and what a method may want to know of the student."""
    import numpy as np
    import torch

    from edgekd.graph._distiller import Teaching

    def read(name: str) -> Any:  # a tensor, where there is one
        return torch.from_numpy(np.load(answers.path / name)) if (answers.path / name).is_file() else None

    noisy, hidden, near = (None if (found := read(n)) is None else found[nodes.seen] for n in (NOISY, HIDDEN, NEARNESS))
    return Teaching(read(LOGITS)[nodes.seen], noisy, hidden, near, read(CODEBOOK), *inside_of(student))


def inside_of(student: Any) -> tuple[int, float]:
    """Width of a student's last hidden layer, and its dropout."""
    return int(student.classifier.in_features), float(getattr(student, "dropout", 0.0))


def assert_not_collapsed(model: Any, nodes: Nodes, teacher: NDArray[np.float32], name: str) -> None:
    """A student that gives nearly every node of val one answer, where its teacher does not, has learned nothing: it never ships."""
    import numpy as np
    import torch

    from edgekd.graph._run import features_of

    with torch.no_grad():
        said = model.eval()(features_of(nodes, nodes.split("val"), looks_at="rows")).argmax(1).numpy()
    shares = [np.bincount(s, minlength=len(nodes.classes)).max() / len(s) for s in (said, teacher.argmax(1))]
    if shares[0] > _ONE_CLASS and shares[1] <= _ONE_CLASS:
        raise InputRefused(
            f"the student gives {shares[0]:.0%} of val one and the same class, '{nodes.classes[int(np.bincount(said).argmax())]}': it has collapsed",
            where=name,
            expected="answers as varied as the teacher's",
            hint=f"another seed, or a smaller rate: -o seed=1, -o {name}.lr=0.001, -o {name}.label_weight=0.5",
        )
