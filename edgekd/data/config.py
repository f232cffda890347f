"""DataConfig: which samples, how they are split and brought to one size. SamplesConfig: what stands for them. AugmentConfig: what training does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgekd.config import Config, no_key

Fraction = Annotated[float, Field(ge=0.05, le=0.5)]


class SplitConfig(Config):
    """Which samples are set aside where the dataset does not have that part already, and how many are trained on."""

    val: Annotated[Fraction, Field(description="fraction of each class for decisions: gates, calibration, early stopping")] = 0.15
    test: Annotated[Fraction, Field(description="fraction of each class that is read once, by the engine that ships")] = 0.15
    seed: Annotated[
        int | None,
        Field(
            ge=0, lt=2**31, description="of val and test; default: the recipe's seed. One value: every seed is judged on the same images"
        ),
    ] = None
    train_per_class: Annotated[
        int | None,
        Field(ge=1, description="at most this many training samples of each class, val and test whole: learning from few labels"),
    ] = None

    @model_validator(mode="after")
    def _leaves_training_samples(self) -> SplitConfig:
        if self.val + self.test > 0.9:
            raise ValueError("val and test together take more than 0.9 of the samples; at least 0.1 must be left to train on")
        return self


class DataConfig(Config):
    """The dataset of a recipe."""

    format: Annotated[str, Field(description="how the dataset lies on disk; a file name in data/formats")]
    # The content's fingerprint is in every key instead, so a dataset may move without a rebuild.
    root: Path | None = no_key(None, "folder of the dataset, or the manifest file")
    image_size: Annotated[int, Field(ge=8, le=1024, description="height and width in pixels of every image that a model sees")]
    resize: Annotated[
        Literal["squash", "crop"], Field(description="squash: ignore the aspect ratio; crop: keep it and take the centre square")
    ] = "squash"
    interpolation: Annotated[Literal["bilinear", "bicubic"], Field(description="filter of the resize, with antialiasing")] = "bilinear"
    split: Annotated[SplitConfig, Field(description="fractions for parts that the dataset does not have")] = SplitConfig()
    labels: Annotated[
        Literal["given", "none"],
        Field(description="none: images without labels; a teacher's decisions stand for them, and metrics are agreement with it"),
    ] = "given"
    classes: Annotated[
        tuple[str, ...] | int | None, Field(description="labels: none: names of the classes, or how many; by default those of the teacher")
    ] = None
    max_per_class: Annotated[int | None, Field(ge=1, description="at most this many samples of each class in each part, for trials")] = None
    on_bad_image: Annotated[Literal["fail", "skip"], Field(description="skip leaves out images that do not decode, and names them")] = (
        "fail"
    )
    max_bad: Annotated[float, Field(ge=0, le=0.5, description="largest fraction of images that skip may leave out")] = 0.001
    cache: Literal["auto", "on", "off"] = no_key("auto", "keep decoded pixels on disk; auto does where they fit in 4 GiB")
    workers: int = no_key(2, "threads that read and decode", ge=0, le=64)

    @model_validator(mode="after")
    def _labels_are_there_or_not(self) -> DataConfig:
        if self.labels == "given" and self.classes is not None:
            raise ValueError("classes are those of the labels; leave them out, or set labels: none")
        if self.labels == "none" and (self.max_per_class or self.split.train_per_class):
            raise ValueError("max_per_class and train_per_class count by label, and there are none")
        if len(set(self.class_names)) < len(self.class_names) or (self.classes is not None and len(self.class_names) < 2):
            raise ValueError("classes: expected two or more, each once")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of data without labels; a class without a name has its number."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes or ()


class SamplesConfig(Config):
    """Generated images, where there are no data: engines are built, compared and timed with them; nothing is said about accuracy."""

    image_size: Annotated[int, Field(ge=8, le=1024, description="height and width in pixels of the images that the model takes")]
    classes: Annotated[int, Field(ge=1, le=1_000_000, description="outputs of the model; their names are their numbers")]
    count: Annotated[int, Field(ge=8, le=4096, description="how many images are generated")] = 64
    resize: Annotated[Literal["squash", "crop"], Field(description="how predict.py of the bundle resizes images")] = "squash"
    interpolation: Annotated[Literal["bilinear", "bicubic"], Field(description="filter of that resize")] = "bilinear"


class AugmentConfig(Config):
    """What training does to a batch; nothing by default."""

    policy: Annotated[
        Literal["none", "shift", "crop_flip", "rrc"], Field(description="shift; shift and flip; or random resized crop and flip")
    ] = "none"
    pad: Annotated[int, Field(ge=0, le=64, description="shift, crop_flip: largest shift in pixels; the border is black")] = 4
    flip: Annotated[float, Field(ge=0, le=1, description="crop_flip, rrc: probability of a horizontal flip")] = 0.5
    scale: Annotated[float, Field(gt=0, le=1, description="rrc: smallest area of a crop, as a fraction of the image")] = 0.35
    erase: Annotated[float, Field(ge=0, le=1, description="probability that a rectangle is filled with the image's mean colour")] = 0.0
    mixup: Annotated[float, Field(ge=0, le=10, description="alpha of mixup; 0 is off")] = 0.0
    cutmix: Annotated[float, Field(ge=0, le=10, description="alpha of cutmix; 0 is off; with mixup each batch takes one of the two")] = 0.0
