"""A teacher of which only the outputs are known: an ONNX file, run by onnxruntime while the student trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgekd.errors import TrainingDiverged
from edgekd.train.distiller import Outputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.backends import Session


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
