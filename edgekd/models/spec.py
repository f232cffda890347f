"""ModelSpec: what a model is without its weights. Architecture name, arguments and structural diff; never code, never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from edgekd.config import Config, no_key

Scalar = str | int | float | bool | None
Argument = Scalar | list[Scalar]
_TIMM_OWN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"} | {
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
}
Triple = tuple[float, float, float]


class ModelConfig(Config):
    """A model as a recipe names it."""

    arch: str | None = Field(None, description="timm architecture, or one registered by --code")
    args: dict[str, Argument] = Field(default_factory=dict, description="arguments of the architecture")
    # Content hashes of both files are in the keys instead, so a file may move without a rebuild.
    weights: Path | None = no_key(None, "safetensors file or checkpoint with the weights to start from")
    pretrained: bool = Field(False, description="start from timm's published weights (needs --allow-download)")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="hash that the weights file must have")
    mean: Triple | None = Field(None, description="channel means of the normalisation; default: the architecture's own")
    std: Triple | None = Field(None, description="channel deviations of the normalisation; default: the architecture's own")
    image_size: int | None = Field(
        None, ge=1, le=4096, description="of a teacher: height and width that it takes; default: its file's, or the data's"
    )
    classes: tuple[str, ...] = Field((), description="names of the outputs of what is given, in its order; none: the data's classes")
    onnx: Path | None = no_key(None, "an existing ONNX file instead of an architecture (graph stages only)")

    @field_validator("args")
    @classmethod
    def _no_loading(cls, args: dict[str, Argument]) -> dict[str, Argument]:
        """Arguments that timm's `create_model` keeps for itself: some of them read files, past every check of ours."""
        if taken := sorted(_TIMM_OWN & set(args)):
            raise ValueError(f"'{taken[0]}' is not an argument of an architecture; weights are given by `weights` or `pretrained`")
        return args


class NodeModelConfig(ModelConfig):
    """A model of a graph's nodes as a recipe names it."""

    @model_validator(mode="after")
    def _sees_no_images(self) -> Self:
        for name in ("pretrained", "mean", "std", "image_size", "classes", "onnx"):
            if name in self.model_fields_set:
                raise ValueError(f"{name} is for models of images; a model of nodes takes arch, args and weights")
        return self


class ModelSpec(Config):
    """Everything needed to rebuild the module that a weights file fits."""

    arch: str = Field(description="timm architecture name, or one of models/architectures")
    args: dict[str, Argument] = Field(default_factory=dict)
    num_classes: int = Field(ge=1)
    image_size: int = Field(0, ge=0, description="height and width of the input in pixels; 0: it takes rows of features")
    features: int = Field(0, ge=0, description="of a row")
    pairs: bool = Field(False, description="it takes two rows side by side, and says whether they are linked")
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    structure: dict[str, Any] = Field(default_factory=dict, description="structural diff against the base architecture")
    timm: str = Field("", description="timm version that the diff was made with")
    code: str | None = Field(None, description="SHA-256 of the user's file that defines the architecture")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: an image, or a row."""
        return (3, self.image_size, self.image_size) if self.image_size else (self.features * (2 if self.pairs else 1),)
