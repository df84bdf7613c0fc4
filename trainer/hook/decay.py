"""What a decaying learning rate leaves of a jump.

A predictor extrapolates the way that the weights went during its window. With the optimizers in use a step's length
is proportional to the learning rate, so where the rate has since fallen, the steps that the prediction stands for
would have been shorter by the same factor. That factor, lr now / highest lr at the window's snapshots, is taken
rather than a ratio of areas under the schedule: the schedule ahead is not known here, the rates of the window are,
and the highest of them errs towards the smaller jump.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class LearningRateWindow:
    """The learning rates at the snapshots of one window.

    Args:
        num_snapshots: In a window.
    """

    def __init__(self, num_snapshots: int) -> None:
        self._rates: deque[tuple[float, ...]] = deque(maxlen=num_snapshots)

    def add(self, rates: Sequence[float]) -> None:
        """Takes note of a snapshot's learning rates, one per parameter group."""
        self._rates.append(tuple(rates))

    def remaining(self, rates: Sequence[float]) -> float:
        """The part of the window's highest learning rate that is left, by the group that has least left: 0 to 1.

        Args:
            rates: Now, one per parameter group.
        """
        highest = [max(each) for each in zip(*self._rates, rates, strict=False)]
        return min([now / most for now, most in zip(rates, highest, strict=False) if most > 0], default=1.0)

    def state(self) -> list[list[float]]:
        """Plain values for a checkpoint."""
        return [list(rates) for rates in self._rates]

    def load(self, state: Iterable[Sequence[float]]) -> None:
        """Goes on from what ``state`` gave."""
        self._rates.clear()
        self._rates.extend(tuple(rates) for rates in state)
