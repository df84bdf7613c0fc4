"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sidecast.errors import ConfigError

KINDS = ("constant", "cosine", "wsd", "wsd-sqrt")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves over a run."""

    kind: str = "cosine"
    """``constant``, ``cosine`` (falls from the warm-up to the end), ``wsd`` (stable, then a straight fall) or
    ``wsd-sqrt`` (stable, then a fall by 1 - sqrt)."""
    warmup_steps: int = 100
    """Steps over which the rate rises from near zero to its peak."""
    decay_fraction: float = 0.2
    """``wsd`` and ``wsd-sqrt``: the part of the run, at its end, over which the rate falls."""
    min_ratio: float = 0.05
    """The last rate as a share of the peak, for all but ``constant``."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"schedule is {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be at least 0")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"decay_fraction is {self.decay_fraction}; it must be above 0 and at most 1")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio is {self.min_ratio}; it must be at least 0 and at most 1")

    def ratio(self, step: int, num_steps: int) -> float:
        """The share of the peak rate that a step uses.

        Args:
            step: Steps already taken.
            num_steps: Length of the run.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        is_wsd = self.kind in ("wsd", "wsd-sqrt")
        start = num_steps - max(1, round(self.decay_fraction * num_steps)) if is_wsd else self.warmup_steps
        if step < start:
            return 1.0
        progress = min(1.0, (step - start) / max(1, num_steps - start))
        if self.kind == "wsd-sqrt":
            fall = 1.0 - math.sqrt(progress)
        else:
            fall = 1.0 - progress if is_wsd else (1.0 + math.cos(math.pi * progress)) / 2
        return self.min_ratio + (1.0 - self.min_ratio) * fall
