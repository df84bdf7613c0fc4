"""How many steps a baseline needs for a loss, read from runs of several lengths, each with its own decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

_TIE = 1e-9


@dataclass(frozen=True)
class Reading:
    """Steps for a loss.

    Attributes:
        steps: How many.
        is_bounded: Whether the loss lies beyond all lengths that were run, and this is the nearest of them.
    """

    steps: float
    is_bounded: bool


class StepsOfLoss:
    """Loss as a falling function of the logarithm of a run's length, through what was measured, and its inverse.

    Losses that noise has put out of order are averaged with their neighbours until they fall (least squares). Between
    two lengths a monotone cubic is used; beyond them nothing is guessed.

    Args:
        losses: The baseline's tuned loss by length in steps; at least two lengths.
    """

    def __init__(self, losses: Mapping[int, float]) -> None:
        lengths = sorted(losses)
        assert len(lengths) > 1
        self._logs = np.log(lengths)
        falling = _falling([losses[length] for length in lengths])
        # Strictly, so that there is an inverse: ties differ by far less than any loss is known.
        self._losses = np.array([loss - _TIE * index for index, loss in enumerate(falling)])
        self._loss_of_log = PchipInterpolator(self._logs, self._losses)
        self._log_of_loss = PchipInterpolator(self._losses[::-1], self._logs[::-1])

    def loss_at(self, num_steps: int) -> float:
        """The baseline's loss after a run of this length, which must lie within those that were run."""
        return float(self._loss_of_log(math.log(num_steps)))

    def steps_for(self, loss: float) -> Reading:
        """The length of the baseline's run that ends at this loss."""
        inside = min(max(loss, self._losses[-1]), self._losses[0])
        return Reading(math.exp(float(self._log_of_loss(inside))), bool(inside != loss))


def _falling(losses: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises, by pooling adjacent violators."""
    pools: list[list[float]] = []
    for loss in losses:
        pools.append([loss])
        while len(pools) > 1 and _mean(pools[-1]) > _mean(pools[-2]):
            last = pools.pop()
            pools[-1] += last
    return [_mean(pool) for pool in pools for _ in pool]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
