"""Carrying out a jump and undoing it, on all ranks or on none.

A unanimous vote says that every rank held the prediction when the vote was cast. Steps later, when it is read, a rank
may still be unable to act: its optimizer's tensors moved, or the copy for undoing the jump has no room. So each rank
first prepares everything that can fail, and one blocking round confirms that all have; only then is a weight touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.trainer.nowcast.config import NowcasterConfig
from sidecast.trainer.nowcast.partitions import Partition, RollbackCopy
from sidecast.trainer.nowcast.vote import VoteBox

ANOTHER_RANK = "another rank could not prepare for it"


class Application:
    """What is done to one rank's weights.

    Args:
        config: Settings.
        partition: What this rank holds.
        votes: Over all ranks.

    Attributes:
        partition: Replaced when a checkpoint is loaded.
        rollback_copy: Where a jump is undone from; None before there is optimizer state, or if none can be undone.
    """

    def __init__(self, config: NowcasterConfig, partition: Partition, votes: VoteBox) -> None:
        self.partition = partition
        self.rollback_copy: RollbackCopy | None = None
        self._keeps_copy = config.rollback == "host" and config.resolved_probation_steps > 0
        self._votes = votes

    def allocate(self) -> None:
        """Makes the rollback copy, if jumps are to be undone and there is none."""
        if self._keeps_copy and self.rollback_copy is None:
            self.rollback_copy = RollbackCopy.allocate(self.partition.rollback_bytes())

    def why_stale(self) -> str:
        """Why this rank could not apply anything now; empty if it could."""
        try:
            self.partition.require_current()
        except SidecastError as error:
            return str(error)
        return ""

    def apply(self, delta: Tensor, weight: float) -> str:
        """Jumps; every rank calls it at the same step.

        Returns:
            Why no rank has jumped; empty if all have.
        """
        reason = ""
        try:
            self.partition.require_current()
            if self.rollback_copy is not None:
                self.partition.capture(self.rollback_copy)
        except SidecastError as error:
            reason = str(error)
        if not self._votes.confirm(not reason):
            return reason or ANOTHER_RANK
        self.partition.apply(delta, weight)
        return ""

    def undo(self) -> str:
        """Goes back to where ``apply`` jumped from; every rank calls it at the same step.

        Returns:
            Why no rank has gone back; empty if all have.
        """
        reason = ""
        try:
            assert self.rollback_copy is not None
            self.partition.require_restorable(self.rollback_copy)
        except SidecastError as error:
            reason = str(error)
        if not self._votes.confirm(not reason):
            return reason or ANOTHER_RANK
        assert self.rollback_copy is not None
        self.partition.restore(self.rollback_copy)
        return ""

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Takes the rollback copy of a checkpoint that was saved during probation."""
        if self.rollback_copy is None:
            self.rollback_copy = RollbackCopy.allocate(self.partition.rollback_bytes())
        self.rollback_copy.load_state_dict(state)
