"""Logits of a torch model over a split, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from edgekd.data.augment import to_float
from edgekd.data.loader import batches
from edgekd.train.views import View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.data.dataset import Dataset

_BATCH = 128


def logits_of(model: nn.Module, view: View, dataset: Dataset, positions: NDArray[np.int64], *, device: str = "cpu") -> NDArray[np.float32]:
    """Outputs (samples, classes) in eval mode and fp32; the model's mode is restored."""
    import numpy as np

    was = model.training
    model.eval()
    with torch.inference_mode():
        parts = [model(view(to_float(b.images.to(device)))).float().cpu().numpy() for b in batches(dataset, positions, _BATCH)]
    model.train(was)
    return np.concatenate(parts)
