"""The jump that may still be undone, the losses that it is judged by, and what follows from the verdicts.

A jump is judged on the loss after a recovery window, against the trend before it. Right after a jump the loss is
higher, and comes down within some hundred steps, often below where it would have been; a test at once would undo every
useful jump. So nothing is judged before ``probation_steps``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sidecast.trainer.hook.config import NowcasterConfig

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
        The verdict and its reason, with the numbers.
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


@dataclass(frozen=True)
class Jump:
    """A jump on probation.

    Attributes:
        version: Of the prediction.
        step: At which it was applied.
        undo_reason: Why it must be undone, once that is decided; empty until then.
    """

    version: int
    step: int
    undo_reason: str = ""


class Probation:
    """Judges one jump at a time from the votes' mean losses alone, so that all ranks reach the same verdict.

    Args:
        config: Settings.

    Attributes:
        jump: What is on probation; None if nothing is.
        is_suspended: Whether too many rollbacks in a row have ended jumping.
        last_loss: The newest mean loss of all ranks.
    """

    def __init__(self, config: NowcasterConfig) -> None:
        self.jump: Jump | None = None
        self.is_suspended = False
        self.last_loss: float | None = None
        self._length_steps = config.resolved_probation_steps
        self._sigmas = config.acceptance_sigmas
        self._max_rollbacks = config.max_rollbacks
        self._num_rollbacks_in_a_row = 0
        self._trend = LossTrend(max(1, self._length_steps))

    @property
    def allows_jumps(self) -> bool:
        """Whether another jump may be applied now."""
        return self.jump is None and not self.is_suspended

    def add(self, step: int, mean_loss: float) -> None:
        """Takes note of a vote's mean loss."""
        self.last_loss = mean_loss
        self._trend.add(LossPoint(step, mean_loss))

    def begin(self, version: int, step: int) -> None:
        """Puts a jump on probation."""
        self.jump = Jump(version, step)

    def verdict(self, step: int, mean_loss: float | None) -> tuple[Verdict, str] | None:
        """Judges the jump.

        Args:
            step: Now.
            mean_loss: Of the vote that was just read, if anybody saw a loss.

        Returns:
            The verdict and its reason; None while there is nothing to say.
        """
        if self.jump is None:
            return None
        if self.jump.undo_reason:
            return Verdict.ROLL_BACK, self.jump.undo_reason
        if mean_loss is not None and not math.isfinite(mean_loss):
            return Verdict.ROLL_BACK, f"the loss is {mean_loss}"
        if step < self.jump.step + self._length_steps:
            return None
        return self._trend.judge(self.jump.step, self._sigmas)

    def postpone(self, reason: str) -> bool:
        """Keeps a verdict of ROLL_BACK until it can be carried out; True the first time."""
        assert self.jump is not None
        is_first = not self.jump.undo_reason
        self.jump = Jump(self.jump.version, self.jump.step, reason)
        return is_first

    def accepted(self) -> None:
        """The jump stays."""
        self.jump = None
        self._num_rollbacks_in_a_row = 0

    def rolled_back(self) -> str:
        """The jump has been undone.

        Returns:
            Why there will be no more jumps; empty if there may be.
        """
        self.jump = None
        self._num_rollbacks_in_a_row += 1
        if self._num_rollbacks_in_a_row < self._max_rollbacks:
            return ""
        self.is_suspended = True
        return f"{self._num_rollbacks_in_a_row} rollbacks in a row"

    def end(self) -> None:
        """Keeps a jump for good that can no longer be undone."""
        self.jump = None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "trend": self._trend.state(),
            "probation": None if self.jump is None else [self.jump.version, self.jump.step, self.jump.undo_reason],
            "num_rollbacks_in_a_row": self._num_rollbacks_in_a_row,
            "is_suspended": self.is_suspended,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from what ``state`` gave; None: from nothing."""
        self.last_loss = None
        self._trend.load([] if state is None else state["trend"])
        self._num_rollbacks_in_a_row = 0 if state is None else state["num_rollbacks_in_a_row"]
        self.is_suspended = False if state is None else state["is_suspended"]
        self.jump = None if state is None or state["probation"] is None else Jump(*state["probation"])
