"""Did a jump pay? Judged on the loss after a recovery window, against the trend before the jump.

Right after a jump the loss is higher, and comes down within some hundred steps, often below where it would have
been; a test at once would undo every useful jump. So nothing is judged before ``probation_steps``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

MIN_POINTS = 4
ROUNDING = 1e-9


class Verdict(Enum):
    ACCEPT = "accept"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True, slots=True)
class LossPoint:
    """The mean loss of all ranks between two votes."""

    step: int
    loss: float


def judge(before: Sequence[LossPoint], after: Sequence[LossPoint], sigmas: float) -> tuple[Verdict, str]:
    """Compares the losses after recovery with the extrapolated trend before the jump.

    The trend is the least-squares line of loss over log(step), which flattens as losses do; a straight line in
    steps would promise too much. The verdict is ROLL_BACK only if the mean loss after is above the trend at those
    steps by more than ``sigmas`` standard errors of that difference (residual noise of both sides, and the
    uncertainty of the line), or is not finite.

    Args:
        before: Points of the window before the jump.
        after: Points of the judged window.
        sigmas: How sure to be before undoing a jump.

    Returns:
        The verdict and one sentence with the numbers.
    """
    if not all(math.isfinite(point.loss) for point in after):
        return Verdict.ROLL_BACK, "the loss is not finite"
    before = [point for point in before if math.isfinite(point.loss)]
    if len(before) < MIN_POINTS or len(after) < MIN_POINTS:
        return Verdict.ACCEPT, f"too few losses to judge by ({len(before)} before, {len(after)} after)"
    x = [math.log(point.step) for point in before]
    y = [point.loss for point in before]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((item - mean_x) ** 2 for item in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    # A loss that rose before the jump is no licence for it to rise further.
    slope = min(slope, 0.0)
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    variance = sum(item * item for item in residuals) / (len(residuals) - 2)
    mean_x_after = sum(math.log(point.step) for point in after) / len(after)
    mean_after = sum(point.loss for point in after) / len(after)
    expected = mean_y + slope * (mean_x_after - mean_x)
    error = math.sqrt(variance * (1 / len(before) + 1 / len(after) + (mean_x_after - mean_x) ** 2 / spread))
    excess = mean_after - expected
    text = f"loss {mean_after:.4f} against {expected:.4f} expected, standard error {error:.4f}"
    # Losses without any noise differ by rounding alone.
    rounding = ROUNDING * abs(expected)
    return (Verdict.ROLL_BACK if excess > sigmas * error + rounding else Verdict.ACCEPT), text


class LossTrend:
    """The losses of the last steps, enough for one judgement.

    Args:
        probation_steps: Length of the window before a jump, and from the jump to its judgement.
    """

    def __init__(self, probation_steps: int) -> None:
        self._probation_steps = probation_steps
        self._points: deque[LossPoint] = deque()

    def add(self, point: LossPoint) -> None:
        self._points.append(point)
        while self._points[0].step < point.step - 2 * self._probation_steps:
            self._points.popleft()

    def judge(self, jump_step: int, sigmas: float) -> tuple[Verdict, str]:
        """Judges a jump by the second half of the probation window."""
        start, recovered = jump_step - self._probation_steps, jump_step + self._probation_steps // 2
        before = [point for point in self._points if start <= point.step <= jump_step]
        after = [point for point in self._points if point.step > recovered]
        return judge(before, after, sigmas)

    def state(self) -> list[tuple[int, float]]:
        """The points as plain values, for checkpoints."""
        return [(point.step, point.loss) for point in self._points]

    def load(self, state: Sequence[tuple[int, float]]) -> None:
        self._points = deque(LossPoint(int(step), float(loss)) for step, loss in state)
