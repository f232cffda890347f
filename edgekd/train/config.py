"""Settings of the one training loop, shared by train, distill and every later stage that learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgekd.config import no_key
from edgekd.data.config import AugmentConfig
from edgekd.train.speed import SpeedConfig

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(SpeedConfig):
    """How weights are learned; the defaults suit a small CNN on a small dataset."""

    epochs: int = Field(10, ge=1, le=10_000, description="passes over the training split")
    batch_size: int = Field(64, ge=1, le=65_536, description="images per optimizer step and accumulation part")
    optimizer: Literal["adamw", "sgd", "dot"] = Field(
        "adamw", description="AdamW, SGD with Nesterov momentum, or SGD with a momentum for each loss (DOT)"
    )
    lr: Positive = Field(1e-3, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    weight_decay: float = Field(0.05, ge=0, description="decay of matrices and kernels; norms and biases have none")
    momentum: Fraction = Field(0.9, description="SGD momentum")
    dot_delta: Fraction = Field(0.075, description="dot: what the distillation loss has of momentum beyond it, and the label loss below")
    warmup_epochs: float = Field(1.0, ge=0, description="linear warm-up, at most a tenth of the epochs")
    ema: Fraction = Field(0.0, description="decay of the averaged weights that are kept; 0 keeps the last weights")
    label_smoothing: Fraction = Field(0.0, description="share of the target spread over all classes")
    clip_grad: float = Field(0.0, ge=0, description="largest gradient norm; 0 does not clip")
    accumulate: int = Field(1, ge=1, le=1024, description="batches per optimizer step")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="augmentation of training batches")
    views: int = Field(
        0,
        ge=0,
        le=1000,
        description="augmented views of each image, in turn: a teacher of logits answers each of them once; 0: always new ones",
    )
    sampled_classes: int = Field(
        0,
        ge=0,
        le=4096,
        description="with views and many classes: of a teacher's answer, so many classes are kept, drawn without bias; 0: all",
    )
    keep: Literal["last", "best"] = Field("last", description="which weights are kept: the last, or the best on val")
    evaluations: int = Field(10, ge=1, le=1000, description="how often val is evaluated, evenly spread over the epochs")
    log_seconds: float = no_key(0.5, "how often the progress line is refreshed", gt=0)

    @model_validator(mode="after")
    def _mixed_images_are_new(self) -> TrainConfig:
        if self.views and (self.augment.mixup or self.augment.cutmix):
            raise ValueError("views repeat, and mixup and cutmix make new images at every step: leave one of them out")
        return self

    @model_validator(mode="after")
    def _momenta_are_fractions(self) -> TrainConfig:
        if self.optimizer == "dot" and not self.dot_delta <= self.momentum < 1 - self.dot_delta:
            raise ValueError(f"momentum {self.momentum:g} with dot_delta {self.dot_delta:g} leaves the range from 0 to 1")
        return self

    @property
    def fixed_views(self) -> int:
        """How many views of an image there are; 0: always new ones."""
        augment = self.augment
        if augment.mixup or augment.cutmix:
            return 0
        return self.views or (1 if augment.policy == "none" and not augment.erase else 0)
