"""Settings of the one training loop, shared by train, distill and every later stage that learns."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from edgekd.config import Config, no_key
from edgekd.data.config import AugmentConfig
from edgekd.train.speed import SpeedConfig

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class LearnConfig(Config):
    """What every training has, whatever its samples are."""

    epochs: int = Field(10, ge=1, le=10_000, description="passes over the training split")
    optimizer: Literal["adamw", "adam", "sgd", "dot"] = Field(
        "adamw",
        description="AdamW, Adam with decay in the gradient, SGD with Nesterov momentum, or SGD with a momentum for each loss (DOT)",
    )
    lr: Positive = Field(1e-3, description="peak learning rate")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="how the learning rate goes after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    weight_decay: float = Field(0.05, ge=0, description="decay of matrices and kernels; norms and biases have none")
    momentum: Fraction = Field(0.9, description="SGD momentum")
    dot_delta: Fraction = Field(0.075, description="dot: what the distillation loss has of momentum beyond it, and the label loss below")
    warmup_epochs: float = Field(1.0, ge=0, description="linear warm-up, at most a tenth of the epochs")
    ema: Fraction = Field(0.0, description="decay of the averaged weights that are kept; 0 keeps the last weights")
    label_smoothing: Fraction = Field(0.0, description="share of the target spread over all classes")
    clip_grad: float = Field(0.0, ge=0, description="largest gradient norm; 0 does not clip")
    accumulate: int = Field(1, ge=1, le=1024, description="batches per optimizer step")
    keep: Literal["last", "best"] = Field("last", description="which weights are kept: the last, or the best on val")
    evaluations: int = Field(10, ge=1, le=10_000, description="how often val is evaluated, evenly spread over the epochs")
    patience: int = Field(0, ge=0, description="epochs without a better metric on val after which training ends; 0: never")
    log_seconds: float = no_key(0.5, "how often the progress line is refreshed", gt=0)

    @model_validator(mode="after")
    def _momenta_are_fractions(self) -> Self:
        if self.optimizer == "dot" and not self.dot_delta <= self.momentum < 1 - self.dot_delta:
            raise ValueError(f"momentum {self.momentum:g} with dot_delta {self.dot_delta:g} leaves the range from 0 to 1")
        return self


class TrainConfig(SpeedConfig, LearnConfig):
    """How weights are learned from images; the defaults suit a small CNN on a small dataset."""

    batch_size: int = Field(64, ge=1, le=65_536, description="images per optimizer step and accumulation part")
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

    @model_validator(mode="after")
    def _mixed_images_are_new(self) -> TrainConfig:
        if self.views and (self.augment.mixup or self.augment.cutmix):
            raise ValueError("views repeat, and mixup and cutmix make new images at every step: leave one of them out")
        return self

    @property
    def fixed_views(self) -> int:
        """How many views of an image there are; 0: always new ones."""
        augment = self.augment
        if augment.mixup or augment.cutmix:
            return 0
        return self.views or (1 if augment.policy == "none" and not augment.erase else 0)


class NodeTrainConfig(LearnConfig):
    """How weights are learned from a graph; the defaults are those of the papers' code for small ones (methods of GLNN, FF-G2M and KRD)."""

    epochs: int = Field(500, ge=1, le=100_000, description="passes over the nodes")
    batch_size: int = Field(0, ge=0, le=10_000_000, description="nodes per optimizer step; 0: all at once")
    neighbours: int = Field(
        10, ge=1, le=10_000, description="with batch_size: neighbours of a node that are looked at, drawn anew each time"
    )
    optimizer: Literal["adamw", "adam", "sgd", "dot"] = Field("adam", description="Adam with decay in the gradient, AdamW, SGD, or DOT")
    lr: Positive = Field(0.01, description="learning rate")
    schedule: Literal["cosine", "constant"] = Field("constant", description="how the learning rate goes after the warm-up")
    weight_decay: float = Field(5e-4, ge=0, description="decay of matrices; norms and biases have none")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, at most a tenth of the epochs")
    keep: Literal["last", "best"] = Field("best", description="which weights are kept: the last, or the best on val")
    evaluations: int = Field(10_000, ge=1, le=100_000, description="how often val is evaluated, evenly spread over the epochs")
    patience: int = Field(50, ge=0, description="epochs without a better metric on val after which training ends; 0: never")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes count as much as frequent ones in the label loss"
    )


class LinkTrainConfig(NodeTrainConfig):
    """How weights are learned from the links of a graph; the defaults are those of LLP's authors, but for fewer epochs."""

    epochs: int = Field(1000, ge=1, le=100_000, description="passes over the training links")
    batch_size: int = Field(
        0, ge=0, le=10_000_000, description="links per optimizer step, beside as many pairs that are none; 0: all at once"
    )
    lr: Positive = Field(0.005, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decay of matrices; norms and biases have none")
    patience: int = Field(100, ge=0, description="epochs without a better metric on val after which training ends; 0: never")
    clip_grad: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: not clipped")
