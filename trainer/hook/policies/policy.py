"""What becomes of predictions: the seam between the step boundary and how they are applied, as jumps or as pushes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sidecast.trainer.pipe.messages import Applied, Prediction


class Policy(Protocol):
    """Decides how much of a prediction is applied, and what follows from the losses; the same on all ranks."""

    @property
    def merge(self) -> str:
        """How predictions meet what training has done since, for the apply log."""

    @property
    def moments(self) -> str:
        """What applying one does to the optimizer's moments, for the apply log."""

    @property
    def last_loss(self) -> float | None:
        """The newest mean loss of all ranks."""

    @property
    def is_suspended(self) -> bool:
        """Whether nothing will be applied for the rest of the run."""

    @property
    def allows(self) -> bool:
        """Whether a prediction may be applied now."""

    @property
    def wants_snapshots(self) -> bool:
        """Whether snapshots are still of use."""

    @property
    def is_on_probation(self) -> bool:
        """Whether something may still be undone, so that a checkpoint must hold the rollback copy."""

    def end_probation(self) -> None:
        """Keeps for good what can no longer be undone."""

    def after_step(self) -> None:
        """Takes note of an optimizer step."""

    def at_snapshot(self, step: int) -> None:
        """Takes note of a snapshot step, before the snapshot is taken."""

    @property
    def learning_rate_sum(self) -> float:
        """Of all steps so far; 0 where nobody needs it."""

    @property
    def applied(self) -> Applied | None:
        """The prediction that began this epoch; None if none did, or nobody needs it."""

    def is_due(self, step: int) -> bool:
        """Whether a prediction from the snapshot of this step would be applied at once."""

    def weight_scale(self) -> float:
        """What the learning rate leaves of a prediction, 0 to 1."""

    def weight(self, held: Prediction, step: int, weight_scale: float) -> float:
        """The factor that a prediction is applied with; 0: not at all."""

    def on_applied(self, held: Prediction, weight: float, step: int) -> None:
        """Takes note that a prediction was applied."""

    def on_loss(self, loss_step: int, mean_loss: float | None) -> None:
        """Takes note of a vote's mean loss, and does what follows from it.

        Args:
            loss_step: Of the vote.
            mean_loss: Over all ranks; None if nobody saw any.
        """

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from what ``state`` gave; None: from nothing."""
