"""Teachers that a runtime answers for while the student trains: an ONNX file of which nothing else is known, or a known model that torch runs too slowly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekd.errors import TrainingDiverged
from edgekd.train.distiller import Outputs
from edgekd.train.speed import Speed
from edgekd.train.views import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.backends import Session
    from edgekd.models.spec import ModelSpec


class BlackBox:
    """Called as a teacher is. `facts` are those of its graph (stages/export.py): names, normalisation, and a fixed batch if it has one."""

    def __init__(self, session: Session, facts: Mapping[str, Any]):
        self.session, self.input, self.fixed = session, str(facts["input"]), facts["fixed_batch"]
        self.mean, self.std = (torch.tensor(facts[n]).view(1, 3, 1, 1) for n in ("mean", "std"))

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Outputs:
        """Logits for images (batch, 3, h, w) in [0, 1]; `index` and `epoch` are for teachers whose answers are kept.

        Raises TrainingDiverged for an answer that is not finite.
        """
        seen = ((images.detach().float().cpu() - self.mean) / self.std).contiguous()
        logits = torch.from_numpy(self._run(seen.numpy()))
        if not bool(logits.isfinite().all()):
            row = int((~logits.isfinite().all(1)).nonzero()[0])
            raise TrainingDiverged(
                f"its outputs for image {int(index[row])} are not finite",
                where="teacher",
                expected="finite outputs",
                hint="another teacher",
            )
        return Outputs(logits.to(images.device))

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """A graph with a fixed batch gets one after the other, the last one filled up."""
        import numpy as np

        size, parts = self.fixed or len(images), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            parts.append(self.session.run({self.input: np.resize(part, (size, *part.shape[1:]))})[0][: len(part)])
        return np.concatenate(parts).astype(np.float32)


class RuntimeTeacher:
    """A teacher whose model is known and that a runtime answers for, in its graph's precision; of outputs it has the logits alone."""

    def __init__(self, session: Session, name: str, spec: ModelSpec, speed: Speed):
        self.session, self.input, self.view, self.speed = session, name, View(spec), speed

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Outputs:
        """Logits for images (batch, 3, h, w) in [0, 1]."""
        with torch.inference_mode():
            seen = self.view(images.detach().float().cpu()).contiguous().numpy()
        return Outputs(torch.from_numpy(self.session.run({self.input: seen})[0]).float())
