"""Verdicts on jumps: from which losses they are found, and how many of them a run's settings leave for one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

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


class Judgement(NamedTuple):
    """A verdict with its grounds.

    Attributes:
        verdict: Whether the jump stays.
        reason: Why, with the numbers.
        num_before: Losses of the trend before the jump that it saw.
        num_after: Losses after the jump's recovery that it saw.
        is_blind: Whether these were too few to say whether the jump paid.
    """

    verdict: Verdict
    reason: str
    num_before: int
    num_after: int
    is_blind: bool = False


def judge(before: Sequence[LossPoint], after: Sequence[LossPoint], sigmas: float) -> Judgement:
    """Compares the losses after recovery with the extrapolated trend before the jump.

    The trend is the least-squares line of loss over log(step), which flattens as losses do; a straight line in
    steps would promise too much. The verdict is ROLL_BACK if the mean loss after is above the trend at those
    steps by more than ``sigmas`` standard errors of that difference (residual noise of both sides, and the
    uncertainty of the line), if it is not finite, or if there are too few losses: nothing is kept unjudged.

    Args:
        before: Points of the window before the jump.
        after: Points of the judged window.
        sigmas: How sure to be before undoing a jump.
    """
    before = [point for point in before if math.isfinite(point.loss)]
    num_before, num_after = len(before), len(after)

    def judgement(verdict: Verdict, reason: str) -> Judgement:
        return Judgement(verdict, reason, num_before, num_after)

    if not all(math.isfinite(point.loss) for point in after):
        return judgement(Verdict.ROLL_BACK, "the loss is not finite")
    if num_before < MIN_POINTS or num_after < MIN_POINTS:
        reason = f"too few losses to judge by ({num_before} before, {num_after} after; {MIN_POINTS} are needed each)"
        return judgement(Verdict.ROLL_BACK, reason)._replace(is_blind=True)
    x = [math.log(point.step) for point in before]
    y = [point.loss for point in before]
    mean_x, mean_y = sum(x) / num_before, sum(y) / num_before
    spread = sum((item - mean_x) ** 2 for item in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    # A loss that rose before the jump is no licence for it to rise further.
    slope = min(slope, 0.0)
    residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    variance = sum(item * item for item in residuals) / (num_before - 2)
    mean_x_after = sum(math.log(point.step) for point in after) / num_after
    mean_after = sum(point.loss for point in after) / num_after
    expected = mean_y + slope * (mean_x_after - mean_x)
    error = math.sqrt(variance * (1 / num_before + 1 / num_after + (mean_x_after - mean_x) ** 2 / spread))
    excess = mean_after - expected
    text = f"loss {mean_after:.4f} against {expected:.4f} expected, standard error {error:.4f}"
    # Losses without any noise differ by rounding alone.
    rounding = ROUNDING * abs(expected)
    return judgement(Verdict.ROLL_BACK if excess > sigmas * error + rounding else Verdict.ACCEPT, text)


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

    def is_known(self, step: int) -> bool:
        """Whether a jump at this step would have a trend before it."""
        before = [point for point in self._before(step) if math.isfinite(point.loss)]
        return len(before) >= MIN_POINTS

    def judge(self, jump_step: int, sigmas: float) -> Judgement:
        """Judges a jump by the second half of the probation window."""
        recovered = jump_step + self._probation_steps // 2
        after = [point for point in self._points if point.step > recovered]
        return judge(self._before(jump_step), after, sigmas)

    def _before(self, jump_step: int) -> list[LossPoint]:
        return [point for point in self._points if jump_step - self._probation_steps <= point.step <= jump_step]

    def state(self) -> list[tuple[int, float]]:
        """The points as plain values, for checkpoints."""
        return [(point.step, point.loss) for point in self._points]

    def load(self, state: Sequence[tuple[int, float]]) -> None:
        self._points = deque(LossPoint(int(step), float(loss)) for step, loss in state)


def is_judgeable(probation_steps: int, vote_interval_steps: int, vote_lag_steps: int, *, at_any_step: bool) -> bool:
    """Whether every jump is sure of enough votes for a verdict, each of which brings one loss.

    Votes are launched at multiples of their interval, and read a lag later; a jump is judged once the first vote is
    read whose reading is not before the end of probation.

    Args:
        probation_steps: From a jump to its judgement.
        vote_interval_steps: Between votes.
        vote_lag_steps: From launching a vote to reading it.
        at_any_step: Whether jumps may come at any step; False: only when a vote is read.
    """
    interval, lag, half = vote_interval_steps, vote_lag_steps, probation_steps // 2
    if at_any_step:
        num_before = probation_steps // interval
        num_after = max(0, probation_steps - half - lag) // interval
    else:
        # Of a jump that follows the vote of step 0, at the step of the lag.
        num_before = (probation_steps - lag) // interval + 1
        num_after = -(-probation_steps // interval) - (lag + half) // interval
    return min(num_before, num_after) >= MIN_POINTS
