"""Contrastive representation distillation: of many images, the student's embedding of one is nearest to the teacher's embedding of the same one.

When: pairs of any shapes where kd alone is not enough; good beside kd: `method: [kd, crd]`. Cost: one forward pass of the teacher, and 1 kB of memory for each
training image, in the checkpoints too.
Source: Tian et al. 2020, "Contrastive Representation Distillation" (arXiv 1910.10699), equations 17 and 18; memory, momentum and the constants Z, which the first
batch sets, as in the authors' code (RepDistiller). Negatives are drawn evenly from all training images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from edgekd.errors import UsageError
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn

_EPS = 1e-7


def contrast(out: Tensor, images: int) -> Tensor:
    """Noise-contrastive loss of scores (batch, 1 + m), the positive first, of m negatives out of `images`."""
    noise = (out.shape[1] - 1) / images
    positive, negative = out[:, :1], out[:, 1:]
    found = (positive / (positive + noise + _EPS)).log().sum() + (noise / (negative + noise + _EPS)).log().sum()
    return -found / len(out)


@register("distill")
class CRD:
    """Two embeddings, two memories and a contrast each way."""

    class Config(DistillConfig):
        weight: float = Field(0.8, ge=0, description="weight of the two contrasts")
        width: int = Field(128, ge=2, le=4096, description="of both embeddings")
        negatives: int = Field(16_384, ge=1, description="images that each is told from; at most all others")
        temperature: float = Field(0.07, gt=0, le=10, description="of the scores")
        memory_momentum: float = Field(0.5, ge=0, lt=1, description="of what the memories hold")

    needs: ClassVar[frozenset[str]] = frozenset({"embedding"})
    relational: ClassVar[bool] = True
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.positions: Tensor | None = None
        self.parts: Any = None

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """Linear layers on the embeddings, and memories that are checkpointed with them."""
        import torch  # torch stays out of the CLI's start
        from torch import nn

        if student.positions is None:
            raise UsageError("crd remembers every training image, and their number is not known", where="crd")
        self.positions = student.positions
        images, width = len(student.positions), self.config.width
        parts = nn.Module()
        parts.student, parts.teacher = (nn.Linear(side.embedding, width) for side in (student, teacher))
        bound = (width / 3) ** -0.5
        for name in ("student_memory", "teacher_memory"):
            parts.register_buffer(name, torch.rand(images, width) * 2 * bound - bound)
            parts.register_buffer(f"{name}_scale", torch.tensor(0.0))  # Z; 0: not set yet
        self.parts = parts
        return parts

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        import torch
        from torch.nn import functional as F

        if self.positions is None:
            raise RuntimeError("setup comes first")
        cfg, parts, images = self.config, self.parts, len(self.positions)
        own = torch.searchsorted(self.positions, batch.index.cpu())
        # on the CPU, from the step's seed: the same on every device, and again after a resume
        drawn = torch.randint(images, (len(own), min(cfg.negatives, max(images - 1, 1))))
        places = torch.cat([own[:, None], drawn], dim=1).to(batch.target.device)
        rows = places[:, 0]
        mine, its = (
            F.normalize(layer(e).float(), dim=1) for layer, e in zip((parts.student, parts.teacher), batch.embeddings, strict=True)
        )
        loss = self._contrast(mine, "teacher_memory", places) + self._contrast(its, "student_memory", places)
        with torch.no_grad():
            for name, new in (("student_memory", mine), ("teacher_memory", its)):
                memory = getattr(parts, name)
                kept = F.normalize(cfg.memory_momentum * memory[rows] + (1 - cfg.memory_momentum) * new, dim=1)
                setattr(parts, name, memory.index_copy(0, rows, kept))  # not in place: the backward pass reads what the scores were made of
        return {"crd": cfg.weight * loss}

    def _contrast(self, embedding: Tensor, name: str, places: Tensor) -> Tensor:
        """Of one model's embeddings (batch, width) with what the memory holds of the other's at `places` (batch, 1 + m)."""
        memory, scale = getattr(self.parts, name), getattr(self.parts, f"{name}_scale")
        # all scores, then those of the places: a gather of the memory itself would take a hundred times the space
        out = (embedding @ memory.T / self.config.temperature).gather(1, places).exp()
        if not float(scale):
            scale.copy_(out.detach().mean() * len(memory))
        return contrast(out / scale, len(memory))
