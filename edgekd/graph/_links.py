"""Learning which nodes are linked: training links against pairs drawn anew at each step, and a teacher's view of every node's surroundings.

A model of a graph sees the training links only, and answers for all nodes at once; a model of rows answers for the nodes that a step needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.data.links import Links
from edgekd.data.loader import epoch_order
from edgekd.data.positions import walks
from edgekd.data.rng import seed_of, uniform
from edgekd.graph._distiller import LinkBatch
from edgekd.graph._run import features_of
from edgekd.train.config import NodeTrainConfig
from edgekd.train.loop import Run
from edgekd.train.speed import Speed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekd.models.spec import ModelSpec
    from edgekd.tasks._task import Task
    from edgekd.train.ranks import Ranks

    Ints = NDArray[np.int64]


@dataclass(frozen=True)
class LinkTeacher:
    """What scores any pair as a trained teacher does: its embeddings (nodes, width) and the two layers over a product of them."""

    embeddings: Tensor
    layers: tuple[Tensor, Tensor, Tensor, Tensor]  # weights and bias of the first and of the last

    def probability(self, a: Tensor, b: Tensor) -> Tensor:
        """Of a link between nodes a and b, of any shape."""
        one, shift, two, last = self.layers
        inside = ((self.embeddings[a] * self.embeddings[b]) @ one.T + shift).relu()
        found: Tensor = (inside @ two.T + last).softmax(-1)[..., 1]
        return found


@dataclass
class LinkJob:
    """One training on links."""

    name: str
    model: nn.Module
    spec: ModelSpec
    looks_at: str  # rows or graph
    links: Links
    task: Task
    cfg: NodeTrainConfig
    seed: int
    work: Path
    distiller: Any = None
    label_weight: float = 1.0
    teacher: LinkTeacher | None = None
    projectors: nn.Module | None = None
    speed: Speed = field(default_factory=Speed)
    device: str = "cpu"

    def start(self, ranks: Ranks | None) -> LinkRun:
        return LinkRun(self, ranks)


class LinkRun(Run):
    """The state of a training on links."""

    job: LinkJob

    def __init__(self, job: LinkJob, ranks: Ranks | None = None):
        links, size = job.links, job.cfg.batch_size
        train = links.split("train")
        self.linked = links.pairs[train[links.labels[train] == 1]].astype(np.int64)
        size = size or len(self.linked)
        super().__init__(job, -(-len(self.linked) // size), 2 * min(size, len(self.linked)), ranks)
        self.size, self.nodes = size, links.nodes
        self.known = np.sort(self.linked.min(1) * len(self.nodes) + self.linked.max(1))
        self.val = links.split("val")
        self.everyone = np.arange(len(self.nodes))
        self.edges: Tensor | None = None
        if job.looks_at == "graph":
            made: Any = self.model.encoder.edges(self.nodes.indptr, self.nodes.neighbours)
            self.edges = made.to(job.device)
            self.features = features_of(self.nodes, device=job.device)

    # ------------------------------------------------------------------------------------------------ batches
    def remaining(self) -> Iterator[Ints]:
        while self.step < self.total:
            epoch, done = divmod(self.step, self.per_epoch)
            order = epoch_order(self.job.seed, epoch, np.arange(len(self.linked)))
            for start in range(done * self.size, len(order), self.size):
                if self.step >= self.total:
                    return
                yield order[start : start + self.size]

    def terms(self, batch: Ints, epoch: int) -> dict[str, Tensor]:
        job = self.job
        pairs = np.concatenate([self.linked[batch], self._drawn(len(batch))])
        target = torch.from_numpy(np.repeat([1, 0], len(batch))).to(job.device)
        anchors, context = self._contexts(epoch) if job.distiller is not None else (np.empty(0, np.int64), np.empty((0, 0), np.int64))
        torch.manual_seed(seed_of(job.seed, "step", self.step))
        place, embedded = self._embedded(np.concatenate([pairs.ravel(), anchors, context.ravel()]))
        one, two = (embedded[place(pairs[:, side])] for side in (0, 1))
        terms = {"label": job.label_weight * job.task.label_loss(self._scored(one, two), target, job.cfg.label_smoothing)}
        if job.distiller is None or job.teacher is None:
            return terms
        said = self._scored(embedded[place(anchors)].unsqueeze(1), embedded[place(context)]).softmax(-1)[..., 1]
        at = torch.from_numpy(anchors).to(job.device).unsqueeze(1)
        with torch.no_grad():
            theirs = job.teacher.probability(at, torch.from_numpy(context).to(job.device))
        found: dict[str, Tensor] = job.distiller.terms(LinkBatch(said, theirs))
        return terms | found

    def _drawn(self, count: int) -> Ints:
        """(count, 2) pairs of nodes that are no training links; a few of them may be links that are held back, as anywhere else."""
        nodes, found = len(self.nodes), np.empty((0, 2), np.int64)
        for number in range(100):
            pairs = (uniform(self.job.seed, "pairs", self.step * 100 + number, np.arange(2 * count), 2) * nodes).astype(np.int64)
            code = pairs.min(1) * nodes + pairs.max(1)
            at = np.minimum(np.searchsorted(self.known, code), len(self.known) - 1)
            found = np.concatenate([found, pairs[(self.known[at] != code) & (pairs[:, 0] != pairs[:, 1])]])[:count]
            if len(found) == count:
                break
        return found

    def _contexts(self, epoch: int) -> tuple[Ints, Ints]:
        """(anchors,) this step's share of all nodes, and (anchors, members) of their contexts."""
        cfg, job, number = self.job.distiller.config, self.job, self.step % self.per_epoch
        anchors = np.array_split(epoch_order(seed_of(job.seed, "anchors") % 2**31, epoch, self.everyone), self.per_epoch)[number]
        near = []
        for walk in range(cfg.walks):
            found = walks(
                self.nodes.indptr, self.nodes.neighbours, anchors, cfg.hops + 1, seed_of(job.seed, "context", walk) % 2**31, self.step
            )
            near.append(np.where(found < 0, anchors[:, None], found)[:, 1:])  # a node without links stays where it is
        count = cfg.walks * cfg.hops * cfg.random
        others = uniform(job.seed, "others", self.step, anchors, count) * len(self.nodes)
        return anchors, np.concatenate([*near, others.astype(np.int64)], axis=1)

    # ------------------------------------------------------------------------------------------------ embeddings and scores
    def _embedded(self, needed: Ints) -> tuple[Any, Tensor]:
        """(where a node is, embeddings) of at least these nodes."""
        device = self.job.device
        if self.edges is not None:
            return (lambda nodes: torch.from_numpy(nodes).to(device)), self.model.encoder(self.features, self.edges).float()
        nodes = np.unique(needed)
        found = self.model.encoder(features_of(self.nodes, nodes, looks_at="rows", device=device)).float()
        return (lambda asked: torch.from_numpy(np.searchsorted(nodes, asked)).to(device)), found

    def _scored(self, one: Tensor, two: Tensor) -> Tensor:
        found: Tensor = self.model.scored(one, two).float()
        return found

    def val_metric(self, model: nn.Module) -> float | None:
        outputs = pair_logits(model, self.job.links, self.job.links.pairs[self.val], self.edges, device=self.job.device)
        return float(self.job.task.scores(outputs.cpu().numpy(), self.job.links.labels[self.val]).mean())


def embeddings_of(model: nn.Module, links: Links, edges: Tensor | None, *, device: str = "cpu") -> Tensor:
    """(nodes, width) of every node, in eval mode; the model's mode is restored."""
    was, encoder = model.training, model.get_submodule("encoder")
    model.eval()
    with torch.no_grad():
        if edges is None:
            found: Tensor = encoder(features_of(links.nodes, looks_at="rows", device=device))
        else:
            found = encoder(features_of(links.nodes, device=device), edges)
    model.train(was)
    return found.float()


def pair_logits(model: nn.Module, links: Links, pairs: Ints, edges: Tensor | None, *, device: str = "cpu") -> Tensor:
    """(pairs, 2) in eval mode."""
    embedded, at = embeddings_of(model, links, edges, device=device), torch.from_numpy(pairs.astype(np.int64)).to(device)
    was = model.training
    model.eval()
    with torch.no_grad():
        scored: Any = model.scored
        found: Tensor = scored(embedded[at[:, 0]], embedded[at[:, 1]])
    model.train(was)
    return found.float()
