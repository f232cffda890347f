"""What a model sees of a batch: each model has its own normalisation and input size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.models.spec import ModelSpec


class View:
    """Images (batch, 3, h, w) in [0, 1] -> the input one model was made for. A teacher fed with the student's normalisation is a silent bug."""

    def __init__(self, spec: ModelSpec, *, channels_last: bool = False, device: str = "cpu"):
        self.size, self.format = spec.image_size, torch.channels_last if channels_last else torch.contiguous_format
        std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)
        self.scale, self.shift = 1 / std, -torch.tensor(spec.mean, device=device).view(1, 3, 1, 1) / std

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return torch.addcmul(self.shift, images, self.scale).contiguous(memory_format=self.format)
