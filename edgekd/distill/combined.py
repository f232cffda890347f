"""Several methods at once: the student gets the terms of all of them.

When: methods that look at different things, such as logits and features; in a recipe: `method: [kd, {nd: {weight: 2}}]`. Cost: that of all methods, and one
forward pass of the teacher. The weight of the label loss is the first method's, unless `label_weight` says it; weights of terms are each method's own.
Source: a plain sum of terms, as the authors of KD++ (Wang et al. 2023, arXiv 2305.17007) add theirs to those of other methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from edgekd import registry
from edgekd.errors import UnknownName
from edgekd.registry import register
from edgekd.train.distiller import Batch, DistillConfig, Distiller, Side

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("distill")
class Combined:
    """The sum of several distillers."""

    class Config(DistillConfig):
        methods: tuple[dict[str, dict[str, Any]], ...] = Field(
            ({"kd": {}},), min_length=1, description="each a method's name and its settings"
        )

        @field_validator("methods", mode="before")
        @classmethod
        def _as_settings(cls, value: Any) -> Any:
            """`kd` stands for `{kd: {}}`."""
            return tuple({m: {}} if isinstance(m, str) else m for m in value) if isinstance(value, list | tuple) else value

        @model_validator(mode="after")
        def _known(self) -> Combined.Config:
            for method in self.methods:
                if len(method) != 1:
                    raise ValueError(f"expected one method with its settings, got {sorted(method)}")
            twice = [n for n in self.names if self.names.count(n) > 1]
            if twice or "combined" in self.names:
                raise ValueError(f"'{(twice or ['combined'])[0]}' cannot be there {'twice' if twice else 'itself'}")
            self.parts()
            return self

        @property
        def names(self) -> list[str]:
            return [next(iter(m)) for m in self.methods]

        def parts(self) -> list[Distiller]:
            """The distillers; raises ValueError for a name or a setting that is none."""
            found: list[Distiller] = []
            for method in self.methods:
                [(name, values)] = method.items()
                try:
                    cls = registry.load("distill", name)
                    found.append(cls(cls.Config(**values)))
                except UnknownName as error:
                    raise ValueError(error.what) from error
                except ValidationError as error:
                    first = error.errors()[0]
                    raise ValueError(f"{name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
            return found

        def uses(self) -> list[tuple[str, str]]:
            """Members of the registry whose code is part of this one."""
            return [("distill", name) for name in self.names]

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    co_trains: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config, self.parts = config, dict(zip(config.names, config.parts(), strict=True))
        self.needs = frozenset[str]().union(*(p.needs for p in self.parts.values()))  # type: ignore[misc]
        self.co_trains = any(p.co_trains for p in self.parts.values())  # type: ignore[misc]
        asked = [pairs for p in self.parts.values() if (pairs := getattr(p, "pairs", None))]
        if asked:
            self.pairs = frozenset.intersection(*asked)
        if "label_weight" not in config.model_fields_set:
            first = next(iter(self.parts.values()))
            self.config = config.model_copy(update={"label_weight": first.config.label_weight})

    def setup(self, student: Side, teacher: Side) -> nn.Module | None:
        """The projectors of all, by method."""
        from torch import nn  # torch stays out of the CLI's start

        found = {name: module for name, part in self.parts.items() if (module := part.setup(student, teacher)) is not None}
        return nn.ModuleDict(found) if found else None

    @property
    def explicit(self) -> Config:
        """The settings with what each method's setup chose."""
        chosen = {name: getattr(part, "explicit", part.config) for name, part in self.parts.items()}
        methods = tuple({name: config.model_dump(mode="json", exclude={"label_weight"})} for name, config in chosen.items())
        return self.config.model_copy(update={"methods": methods})

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {
            term if term.startswith(name) else f"{name}.{term}": v for name, p in self.parts.items() for term, v in p.terms(batch).items()
        }
