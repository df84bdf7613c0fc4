"""What a rank and its courier say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HeldPrediction:
    """A prediction that lies whole in the shared buffer."""

    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    digest: int
    relative_norm: float
    nowcast_s: float

    @classmethod
    def of(cls, message: Message) -> HeldPrediction:
        """Reads the courier's announcement."""
        return cls(**{field.name: message[field.name] for field in fields(cls)})

    def why_unusable(self, step: int, epoch: int, max_staleness_steps: int) -> str:
        """Why it can never be applied any more, from this step on; empty if it still can."""
        if self.epoch != epoch:
            return f"its base is of epoch {self.epoch}, this is epoch {epoch}"
        staleness_steps = step - self.base_step
        return f"its base is {staleness_steps} steps old" if staleness_steps > max_staleness_steps else ""
