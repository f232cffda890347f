"""What quantizers that train have in common: settings of the training, what they see before it, and the file with what it chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, model_validator

from edgekd import registry
from edgekd.errors import EdgekdError
from edgekd.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

GRID = "grid.npz"


class LearnedConfig(TrainConfig):
    """The training loop's settings, and the distiller whose loss it gets where the recipe has a teacher."""

    distiller: str = Field("kd", description="method that the teacher is imitated by; without a teacher the labels are learned alone")
    distiller_options: dict[str, Any] = Field(default_factory=dict, description="its settings: edgekd methods show DISTILLER")
    samples: int = Field(256, ge=1, le=100_000, description="training images that ranges are first taken from")

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            registry.load("distill", self.distiller).Config(**self.distiller_options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"distiller_options.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except EdgekdError as error:
            raise ValueError(error.what) from error
        return self


@dataclass(frozen=True)
class Seen:
    """What a quantizer may look at before training: normalised training batches (batch, 3, h, w), and the label loss of a batch's logits."""

    batches: Sequence[Tensor]
    loss: Callable[[Tensor, int], Tensor]  # (logits, number of the batch)


def save_grid(out: Path, arrays: Mapping[str, Any]) -> None:
    from edgekd.safeio.arrays import write_arrays

    write_arrays(out / GRID, arrays)


def load_grid(path: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
