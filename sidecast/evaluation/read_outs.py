"""Averages of a run's weights that are ahead of the weights themselves, at no cost to training.

Shape suffixes: M members, P elements of the parameter vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

RAW = "raw"
HALF_LIVES = {"ema2": 0.02, "ema5": 0.05, "ema10": 0.1, "ema20": 0.2}
"""Exponential averages by name; the half-life is a share of the steps so far, so that no horizon has to be known."""
INTERVAL_STEPS = 10


class ReadOuts:
    """The averages of a group of members.

    Args:
        params_MP: Where the members start.
    """

    def __init__(self, params_MP: Tensor) -> None:
        self._averages = {name: params_MP.clone() for name in HALF_LIVES}

    def after_step(self, step: int, params_MP: Tensor) -> None:
        """Averages the weights in, every few steps."""
        if step % INTERVAL_STEPS:
            return
        for name, share in HALF_LIVES.items():
            torch.lerp(
                self._averages[name],
                params_MP,
                1.0 - 0.5 ** (INTERVAL_STEPS / (share * step)),
                out=self._averages[name],
            )

    def weights(self) -> dict[str, Tensor]:
        """The averages (M, P) by name."""
        return self._averages

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self._averages

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from what ``state`` gave."""
        for name, average_MP in self._averages.items():
            average_MP.copy_(state[name])
