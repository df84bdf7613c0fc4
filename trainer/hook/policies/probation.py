"""The jump that may still be undone, and what follows from the verdicts on it.

A jump is judged on the loss after a recovery window, against the trend before it. Right after a jump the loss is
higher, and comes down within some hundred steps, often below where it would have been; a test at once would undo every
useful jump. So nothing is judged before ``probation_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.policies.verdicts import Judgement, LossPoint, LossTrend, Verdict


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

    def can_judge(self, step: int) -> bool:
        """Whether a jump at this step could be judged: whether there are losses that it would be compared with."""
        return self._trend.is_known(step)

    def verdict(self, step: int, mean_loss: float | None) -> Judgement | None:
        """Judges the jump.

        Args:
            step: Now.
            mean_loss: Of the vote that was just read, if anybody saw a loss.

        Returns:
            The verdict and its grounds; None while there is nothing to say.
        """
        if self.jump is None:
            return None
        undo_reason = self.jump.undo_reason
        if not undo_reason and mean_loss is not None and not math.isfinite(mean_loss):
            undo_reason = f"the loss is {mean_loss}"
        if not undo_reason and step < self.jump.step + self._length_steps:
            return None
        judgement = self._trend.judge(self.jump.step, self._sigmas)
        return judgement._replace(verdict=Verdict.ROLL_BACK, reason=undo_reason) if undo_reason else judgement

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
