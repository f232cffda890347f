"""Learning from a graph: all nodes at once, or batches of nodes with the neighbours that their model or method looks at.

A model of a graph learns from the labels of its training nodes. A model of rows learns from them too, and from a teacher's answers to every node that is
seen, labelled or not: those of val and test as well in the transductive setting, none of them hidden in the inductive one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.data.loader import epoch_order
from edgekd.data.nodes import Nodes
from edgekd.data.rng import seed_of
from edgekd.graph._distiller import NodeBatch
from edgekd.graph._sampler import neighbours_of, surroundings
from edgekd.models.architectures._architecture import hops_of
from edgekd.models.architectures._edges import sparse
from edgekd.safeio.arrays import Csr
from edgekd.train.config import NodeTrainConfig
from edgekd.train.loop import Run, Trained
from edgekd.train.speed import Speed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekd.graph._distiller import GraphDistiller
    from edgekd.models.spec import ModelSpec
    from edgekd.tasks._task import Task
    from edgekd.train.ranks import Ranks

    Ints = NDArray[np.int64]

_ROWS = 65_536  # of a pass without gradients


@dataclass
class NodeJob:
    """One training on a graph."""

    name: str
    model: nn.Module
    spec: ModelSpec
    looks_at: str  # rows or graph
    nodes: Nodes
    task: Task
    cfg: NodeTrainConfig
    seed: int
    work: Path
    distiller: GraphDistiller | None = None
    label_weight: float = 1.0
    teacher: Tensor | None = None  # (seen nodes, classes) logits, calibrated
    projectors: nn.Module | None = None
    speed: Speed = field(default_factory=Speed)
    device: str = "cpu"

    def start(self, ranks: Ranks | None) -> NodeRun:
        return NodeRun(self, ranks)


def features_of(nodes: Nodes, positions: Ints | None = None, *, looks_at: str = "graph", device: str = "cpu") -> Tensor:
    """(rows, features) of these nodes, or of all, as a model that looks at `rows` or at a `graph` takes them; sparse by rows where the graph keeps them so."""
    if looks_at == "rows" and nodes.places is not None:
        return torch.from_numpy(nodes.samples(np.arange(len(nodes)) if positions is None else positions)).to(device)
    if isinstance(nodes.features, Csr):
        x = nodes.features if positions is None else nodes.features.take(positions)
        return sparse(x.indptr, x.indices, x.values, x.shape).to(device)
    return torch.from_numpy(nodes.rows(np.arange(len(nodes)) if positions is None else positions)).to(device)


def class_weights(labels: Ints, classes: int) -> Tensor:
    """(classes,): each class counts as much as any other; 1 on average over these labels."""
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(np.where(counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0).astype(np.float32))


class NodeRun(Run):
    """The state of a training on a graph."""

    job: NodeJob

    def __init__(self, job: NodeJob, ranks: Ranks | None = None):
        nodes, size = job.nodes, job.cfg.batch_size
        self.labelled = nodes.split("train")
        self.learned = nodes.seen if job.distiller is not None else self.labelled  # whose batches an epoch goes through
        self.whole = not size or size >= len(self.learned)
        batches = 1 if self.whole else -(-len(self.learned) // size)
        super().__init__(job, batches, size or len(self.learned), ranks)
        self.indptr, self.neighbours = nodes.observed()
        self.seen = nodes.seen
        self.place = np.full(len(nodes), -1, np.int64)  # of a node among the seen ones
        self.place[self.seen] = np.arange(len(self.seen))
        needs = job.distiller.needs if job.distiller is not None else frozenset()
        self.needs_edges, self.needs_ends, self.needs_decisions = "edges" in needs, "ends" in needs, "decisions" in needs
        self.needs_features = "features" in needs
        self.inside: dict[str, Tensor] = {}
        if "inside" in needs:
            self._listen()
        self.taught = job.teacher.to(job.device) if job.teacher is not None else None
        labels = nodes.labels[self.labelled]
        self.weights = class_weights(labels, len(nodes.classes)).to(job.device) if job.cfg.class_weights == "balanced" else None
        self.val = nodes.split("val")
        self.kept: dict[int, Tensor] = {}  # features of the positions that are asked for again and again, by the identity of their array
        if job.looks_at == "graph":
            self.edges = self._edges_of(self.indptr, self.neighbours)
            self.everyone = np.arange(len(nodes))

    def _edges_of(self, indptr: Ints, neighbours: NDArray[Any]) -> Tensor:
        made: Tensor = self.model.edges(indptr, neighbours)
        return made.to(self.job.device)

    def _listen(self) -> None:
        """Keeps what the student's last hidden layer gives and what its classifier reads, of its latest pass."""
        *_, last = self.model.body

        def hidden(_module: nn.Module, _args: Any, out: Tensor) -> None:
            self.inside["hidden"] = out

        def embedding(_module: nn.Module, args: Any) -> None:
            self.inside["embedding"] = args[0]

        self.hooks = [last.register_forward_hook(hidden), self.model.classifier.register_forward_pre_hook(embedding)]

    # ------------------------------------------------------------------------------------------------ batches
    def remaining(self) -> Iterator[Ints]:
        while self.step < self.total:
            epoch, done = divmod(self.step, self.per_epoch)
            if self.whole:
                yield self.learned
                continue
            order, size = epoch_order(self.job.seed, epoch, self.learned), self.job.cfg.batch_size
            for start in range(done * size, len(order), size):
                if self.step >= self.total:
                    return
                yield order[start : start + size]

    def terms(self, batch: Ints, epoch: int) -> dict[str, Tensor]:
        torch.manual_seed(seed_of(self.job.seed, "step", self.step))
        if self.job.looks_at == "graph":
            said = self._graph_logits(batch, epoch)
            own = self.model.own_terms() if hasattr(self.model, "own_terms") else {}
            return {"label": self._label_loss(said, batch)} | own
        if self.job.distiller is None:
            return {"label": self._label_loss(self._row_logits(batch), batch)}
        return self._distilled(batch, epoch)

    def _distilled(self, batch: Ints, epoch: int) -> dict[str, Tensor]:
        job = self.job
        if job.distiller is None or self.taught is None:
            raise ValueError("a distiller needs a teacher")
        most = None if self.whole else job.cfg.neighbours
        rows, others = (
            neighbours_of(self.indptr, self.neighbours, batch, most, seed=job.seed, epoch=epoch)
            if self.needs_edges
            else (np.empty(0, np.int64),) * 2
        )
        asked = batch
        if self.needs_ends and not self.whole:
            asked = np.concatenate([batch, np.setdiff1d(others, batch)])
        decisions = self._decisions() if self.needs_decisions and epoch and self.step % self.per_epoch == 0 else None
        torch.manual_seed(seed_of(job.seed, "step", self.step))
        logits = self._row_logits(asked)
        inside = self.inside  # before other passes of the student
        self.inside = {}
        terms = {"label": job.label_weight * self._labelled_loss(logits, asked)}
        at = torch.from_numpy(np.stack([rows, self.place[others]])).to(job.device)
        ends = torch.from_numpy(_places(asked, others)).to(job.device) if self.needs_ends else None
        nodes = torch.from_numpy(self.place[asked]).to(job.device)
        progress = self.step / max(self.total - 1, 1)
        given = NodeBatch(logits, nodes, len(batch), self.taught, at if self.needs_edges else None, ends, decisions, epoch, progress)
        given.hidden, given.embedding = inside.get("hidden"), inside.get("embedding")
        if self.needs_features:
            own = self._features(batch)
            given.features, given.ask = own if own.layout == torch.strided else own.to_dense(), self._ask
        return terms | job.distiller.terms(given)

    def _ask(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found.float()

    # ------------------------------------------------------------------------------------------------ logits and labels
    def _row_logits(self, positions: Ints) -> Tensor:
        """Of the model of rows."""
        found: Tensor = self.model(self._features(positions))
        return found.float()

    def _features(self, positions: Ints) -> Tensor:
        """Features of these nodes; where all are learned from at once, kept."""
        if not self.whole:
            return features_of(self.job.nodes, positions, looks_at=self.job.looks_at, device=self.job.device)
        if id(positions) not in self.kept:
            self.kept[id(positions)] = features_of(self.job.nodes, positions, looks_at=self.job.looks_at, device=self.job.device)
        return self.kept[id(positions)]

    def _graph_logits(self, batch: Ints, epoch: int) -> Tensor:
        """Of the model of a graph, for the nodes of a batch."""
        job = self.job
        if self.whole:
            return self._whole_graph()[torch.from_numpy(batch).to(job.device)]
        part = surroundings(self.indptr, self.neighbours, batch, hops_of(self.model), job.cfg.neighbours, seed=job.seed, epoch=epoch)
        x = features_of(job.nodes, part.nodes, device=job.device)
        found: Tensor = self.model(x, self._edges_of(part.indptr, part.neighbours))
        return found[: len(batch)].float()

    def _whole_graph(self) -> Tensor:
        """(nodes, classes) for every node, on the edges that are seen."""
        found: Tensor = self.model(self._features(self.everyone), self.edges)
        return found.float()

    def _label_loss(self, logits: Tensor, positions: Ints) -> Tensor:
        target = torch.from_numpy(self.job.nodes.labels[positions]).to(self.job.device)
        if self.weights is None:
            return self.job.task.label_loss(logits, target, self.job.cfg.label_smoothing)
        return nn.functional.cross_entropy(logits, target, self.weights, label_smoothing=self.job.cfg.label_smoothing)

    def _labelled_loss(self, logits: Tensor, asked: Ints) -> Tensor:
        """The label loss of a batch that was drawn from all nodes: its share of the labelled ones, so that an epoch sees each of them once."""
        if not self.job.label_weight:
            return logits.new_zeros(())
        if self.whole:
            return self._label_loss(logits[torch.from_numpy(self.place[self.labelled]).to(logits.device)], self.labelled)
        epoch, number = divmod(self.step, self.per_epoch)
        order = epoch_order(seed_of(self.job.seed, "labelled") % 2**31, epoch, self.labelled)
        few = -(-len(order) // self.per_epoch)
        part = np.resize(np.roll(order, -number * few), few)
        return self._label_loss(self._row_logits(part), part)

    # ------------------------------------------------------------------------------------------------ without gradients
    def _decisions(self) -> Tensor:
        """(seen nodes, classes) what the student says in eval mode."""
        return self._said(self.model, self.seen)

    def _said(self, model: nn.Module, positions: Ints) -> Tensor:
        was = model.training
        model.eval()
        with torch.no_grad():
            if self.whole:
                found: Tensor = model(self._features(positions)).float()
            else:
                parts = [positions[i : i + _ROWS] for i in range(0, len(positions), _ROWS)]
                found = torch.cat([model(self._features(p)).float() for p in parts])
        model.train(was)
        return found

    def val_metric(self, model: nn.Module) -> float | None:
        job = self.job
        if job.looks_at == "graph":
            x = self._features(self.everyone)
            outputs = whole_graph_logits(model, x, self.edges)[torch.from_numpy(self.val)]
        else:
            outputs = self._said(model, self.val)
        return float(job.task.scores(outputs.cpu().numpy(), job.nodes.labels[self.val]).mean())

    def finish(self) -> Trained:
        for hook in getattr(self, "hooks", []):
            hook.remove()
        return super().finish()


def whole_graph_logits(model: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
    """(nodes, classes) in eval mode; the model's mode is restored."""
    was = model.training
    model.eval()
    with torch.no_grad():
        said: Tensor = model(x, edges).float()
    model.train(was)
    return said


def _places(asked: Ints, others: Ints) -> Ints:
    """Where each of `others` is in `asked`."""
    order = np.argsort(asked, kind="stable")
    return order[np.searchsorted(asked[order], others)]
