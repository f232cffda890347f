"""The base of every configuration: frozen, closed, described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Frozen settings of a stage, a method or a recipe section; the object that runs is separate."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def no_key(default: Any, description: str, **bounds: Any) -> Any:
    """A field that cannot change the result (workers, log interval) and therefore stays out of cache keys."""
    return Field(default, description=description, json_schema_extra={"key": False}, **bounds)


def key_fields(config: BaseModel) -> dict[str, Any]:
    """The JSON form of a config without its `no_key` fields."""
    skip = {
        name
        for name, f in type(config).model_fields.items()
        if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("key") is False
    }
    return config.model_dump(mode="json", exclude=skip)
