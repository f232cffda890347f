"""A trained classifier whose outputs are other classes than the data's, or in another order: its rows are put in the data's order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgekd.errors import InputRefused
from edgekd.models.build import build
from edgekd.models.spec import ModelSpec
from edgekd.models.taps import classifier_of


def in_order_of(model: nn.Module, spec: ModelSpec, own: Sequence[str], wanted: Sequence[str]) -> tuple[nn.Module, ModelSpec]:
    """The model with an output for each class in `wanted`, out of those named in `own`; other classes are left out.

    Raises InputRefused for a class that it does not have, and for a model whose outputs are more than one layer's.
    """
    if missing := sorted(set(wanted) - set(own)):
        raise InputRefused(
            f"the weights know no class '{missing[0]}'" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            where="classes",
            expected="a name of every class of the data",
            hint=f"the data's classes are {', '.join(wanted[:12])}{', ...' if len(wanted) > 12 else ''}",
        )
    rows = torch.tensor([list(own).index(name) for name in wanted])
    head, _ = classifier_of(model, spec.image_size, spec.num_classes)
    fewer = spec.model_copy(update={"num_classes": len(wanted)})
    state = {name: t[rows] if name.rpartition(".")[0] == head else t for name, t in model.state_dict().items()}
    ordered = build(fewer)
    try:
        ordered.load_state_dict(state)
        noise = torch.randn(2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            same = torch.allclose(ordered.eval()(noise), model.eval()(noise)[:, rows], rtol=1e-4, atol=1e-5)
    except RuntimeError:  # a second classifier still has the old shape
        same = False
    if not same:
        raise InputRefused(
            f"the outputs of {spec.arch} are not those of its layer '{head}' alone, so they cannot be put in another order",
            where="classes",
            expected="one linear classifier",
            hint="fit the classifier to the data's classes: train: {epochs: N}",
        )
    return ordered, fewer
