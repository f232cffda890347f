"""One-for-all distillation between architectures: every stage of the student answers in the teacher's logit space.

When: teacher and student of different families (ViT, CNN, MLP), where matching features fails. Cost: the teacher's forward pass and a small
classifier branch a stage, all dropped after training. Gamma above 1 enhances the target class: more for a weaker teacher; 1 to 1.4 is usual.
Source: Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures" (arXiv 2310.19444), equations 6 and 7;
branches as in the authors' code (OFAKD), with log-softmax instead of the log of a softmax, which gave NaN under autocast there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edgekd.distill._pairs import stage_of
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Side

if TYPE_CHECKING:
    from torch import Tensor, nn


def ofa_loss(student: Tensor, teacher: Tensor, mask: Tensor, gamma: float, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of -sum_c ((p_t + mask)^gamma - mask) log p_s; no T^2 factor, as in the source.

    Logits are (batch, classes), mask is one-hot (batch, classes). With gamma 1 it is the soft cross-entropy.
    """
    from torch.nn import functional as F  # torch stays out of the CLI's start

    log_student = F.log_softmax(student / temperature, dim=1)
    p_teacher = F.softmax(teacher / temperature, dim=1)
    weight = (p_teacher + mask) ** gamma - mask if gamma != 1 else p_teacher  # the same up to rounding, and no label has a say
    return -(weight * log_student).sum(dim=1).mean()


@register("distill")
class OFA:
    """Cross-architecture distillation in logit space."""

    class Config(DistillConfig):
        weight: float = Field(1.0, ge=0, description="weight of the sum over the stage branches")
        logit_weight: float = Field(1.0, ge=0, description="weight of the same loss on the student's own logits")
        gamma: float = Field(1.0, ge=1, le=4, description="target enhancement; 1 is plain soft cross-entropy")
        temperature: float = Field(1.0, gt=0, le=100, description="softmax temperature of both models")
        stages: tuple[int, ...] = Field((1, 2, 3, 4), min_length=1, max_length=4, description="student stages that get a branch, 1 to 4")

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "taps"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        if config.gamma != 1:  # else the target class is not enhanced
            self.needs = type(self).needs | {"labels"}  # type: ignore[misc]
        self.branches: nn.ModuleDict | None = None
        self.explicit = config

    def setup(self, student: Side, teacher: Side) -> nn.Module:
        """One branch a stage, by the kind of its features."""
        from edgekd.models.projectors import ofa_branches  # torch stays out of the CLI's start

        widths = student.num_features, teacher.num_features
        self.branches = ofa_branches(student.taps, widths, student.num_classes, self.config.stages)
        self.explicit = self.config.model_copy(update={"stages": tuple(stage_of(student.taps, int(tap)) for tap in self.branches)})
        return self.branches

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        from torch.nn import functional as F

        cfg, teacher = self.config, batch.teacher.logits
        mask = F.one_hot(batch.hard_target, teacher.shape[1]).to(teacher.dtype)
        own = ofa_loss(batch.student.logits, teacher, mask, cfg.gamma, cfg.temperature)
        terms = {"logits": cfg.logit_weight * own}
        for tap, branch in (self.branches or {}).items():
            answer = branch(batch.student.taps[int(tap)])
            terms[f"ofa{int(tap) + 1}"] = cfg.weight * ofa_loss(answer, teacher, mask, cfg.gamma, cfg.temperature)
        return terms
