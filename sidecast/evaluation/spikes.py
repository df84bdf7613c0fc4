"""How far the training loss of a run has risen, at worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

TIME_CONSTANT_STEPS = 10.0


class SpikeMeter:
    """Keeps the largest rise of a running mean of the loss above its lowest value so far.

    Args:
        warmup_steps: Losses of the warm-up are averaged, and not judged.

    Attributes:
        worst: That rise; infinite once a loss was not finite.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.worst = 0.0
        self._warmup_steps = warmup_steps
        self._mean = math.nan
        self._lowest = math.inf

    def observe(self, step: int, loss: float) -> None:
        """Takes note of the loss of a step."""
        if not math.isfinite(loss):
            self.worst = math.inf
            return
        share = 1.0 - math.exp(-1.0 / TIME_CONSTANT_STEPS)
        self._mean = loss if math.isnan(self._mean) else self._mean + share * (loss - self._mean)
        if step > self._warmup_steps:
            self._lowest = min(self._lowest, self._mean)
            self.worst = max(self.worst, self._mean - self._lowest)

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.worst, self._mean, self._lowest]

    def load(self, state: Sequence[float]) -> None:
        """Goes on from what ``state`` gave."""
        self.worst, self._mean, self._lowest = state
