"""Training-only modules between two models: stage branches for OFA. Dropped before export."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.models.taps import STAGES, Tap

_FINAL_GRID = 7  # token maps are merged down to 7 x 7 (OFAKD)


def ofa_branches(taps: tuple[Tap, ...], widths: tuple[int, int], classes: int, stages: tuple[int, ...]) -> nn.ModuleDict:
    """A classifier branch for each asked stage, keyed by the index of its tap; raises UsageError where no stage is there.

    taps: of the student, maps and tokens may be mixed; widths: of the last features of student and teacher.
    """
    missing = STAGES - len(taps)  # a model with fewer stages has the last ones
    branches = nn.ModuleDict()
    for stage in (s for s in stages if s > missing):
        tap = taps[stage - 1 - missing]
        maps = tap.layout == "NCHW"
        branch = _cnn_branch(tap, stage, max(widths), classes) if maps else _token_branch(tap, stage, widths[0], classes)
        branches[str(stage - 1 - missing)] = branch
    if not branches:
        raise UsageError(f"none of the stages {list(stages)} exists in the student", expected=f"stages among {missing + 1} to {STAGES}")
    branches.apply(_initialise)
    return branches


class SepConv(nn.Sequential):
    """Depthwise-separable pair that halves the resolution: (batch, c_in, h, w) -> (batch, c_out, h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int):
        def half(out: int, stride: int) -> list[nn.Module]:
            depthwise = nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False)
            return [depthwise, nn.Conv2d(c_in, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        super().__init__(*half(c_in, 2), *half(c_out, 1))


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens: (batch, h*w, c) -> (batch, h*w/4, c_out)."""

    def __init__(self, grid: tuple[int, int], c_in: int, c_out: int, act: nn.Module):
        super().__init__()
        self.grid, self.norm, self.reduction, self.act = grid, nn.LayerNorm(4 * c_in), nn.Linear(4 * c_in, c_out, bias=False), act

    def forward(self, tokens: Tensor) -> Tensor:
        (h, w), (batch, _, c) = self.grid, tokens.shape
        even = tokens.view(batch, h, w, c)[:, : h // 2 * 2, : w // 2 * 2]  # an odd last row or column is left out
        x = even.reshape(batch, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(batch, (h // 2) * (w // 2), 4 * c)
        out: Tensor = self.act(self.reduction(self.norm(x)))
        return out


class TokenBranch(nn.Module):
    """Merged patch tokens -> transformer blocks -> class token, or the mean where there is none -> logits."""

    def __init__(self, tap: Tap, width: int, mergers: nn.Module, blocks: nn.Module, head: nn.Module):
        super().__init__()
        self.prefix, self.mergers, self.blocks, self.head = tap.prefix, mergers, blocks, head
        # The class token passes by the merging, so it must have the width already: in a hierarchy it has not, and is left out.
        self.joined = bool(tap.prefix) and tap.channels == width

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(1, 2) if features.ndim == 4 else features  # Swin gives (batch, h, w, c)
        merged = self.mergers(tokens[:, self.prefix :])
        x = self.blocks(torch.cat([tokens[:, : self.prefix], merged], dim=1) if self.joined else merged)
        out: Tensor = self.head(x[:, 0] if self.joined else x.mean(1))
        return out


def _cnn_branch(tap: Tap, stage: int, width: int, classes: int) -> nn.Module:
    steps = STAGES - stage
    widths = [tap.channels * 2**i for i in range(steps)] + [width]
    down: list[nn.Module] = [SepConv(widths[i], widths[i + 1]) for i in range(steps)] or [nn.Conv2d(tap.channels, width, 1)]
    return nn.Sequential(*down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _token_branch(tap: Tap, stage: int, width: int, classes: int) -> nn.Module:
    from timm.models.vision_transformer import Block

    grid = tap.grid
    merges = max(int(math.log2(min(grid) / _FINAL_GRID)), 0) if min(grid) > _FINAL_GRID else 0
    mergers = nn.Sequential()
    for i in range(merges):
        act = nn.GELU() if i == 0 or i < merges - 1 else nn.Identity()  # the source's rule, odd as it is
        mergers.append(PatchMerging((grid[0] >> i, grid[1] >> i), tap.channels if i == 0 else width, width, act))
    if not merges and tap.channels != width:  # a hierarchical student on small images: nothing merged, so only the width is met
        mergers.append(nn.Linear(tap.channels, width, bias=False))
    heads = next(n for n in (4, 2, 1) if width % n == 0)
    blocks = nn.Sequential(*[Block(width, num_heads=heads) for _ in range(max(STAGES - stage, 1))])
    return TokenBranch(tap, width, mergers, blocks, nn.Linear(width, classes))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(bias, Tensor):
        nn.init.zeros_(bias)
