"""Budget: what a target must stay below."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from edgekd.config import Config


class Budget(Config):
    """Limits of a target; none by default."""

    p50_ms: float | None = Field(None, gt=0, description="median latency in ms")
    p95_ms: float | None = Field(None, gt=0, description="95th percentile of the latency in ms")
    size_mb: float | None = Field(None, gt=0, description="file size in 10^6 bytes")

    def missed(self, latency_ms: dict[str, Any] | None, size_bytes: int) -> tuple[bool | None, str]:
        """(True missed | False met | None unknown, in words). A latency that was not measured, or not steadily, is unknown."""
        notes, unknown = [], False
        if self.size_mb is not None and size_bytes > self.size_mb * 1e6:
            notes.append(f"{size_bytes / 1e6:.2f} MB is {size_bytes / 1e6 / self.size_mb:.2f}x the budget of {self.size_mb:g} MB")
        for name in ("p50", "p95"):
            limit = getattr(self, f"{name}_ms")
            if limit is None:
                continue
            seen = (latency_ms or {}).get(name)
            unknown = unknown or seen is None
            if seen is not None and seen > limit:
                notes.append(f"{name} {seen:.3f} ms is {seen / limit:.2f}x the budget of {limit:g} ms")
        if notes:
            return True, "; ".join(notes)
        if unknown:
            return None, "latency was not measured"
        return False, "within budget" if any(self.model_dump().values()) else "no budget was set"
