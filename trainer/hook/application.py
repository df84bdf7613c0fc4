"""Carrying out a jump and undoing it, on all ranks or on none.

A unanimous vote says that every rank held the prediction when the vote was cast. Steps later, when it is read, a rank
may still be unable to act: its optimizer's tensors moved, or the copy for undoing the jump has no room. So each rank
first prepares everything that can fail, and one blocking round confirms that all have; only then is a weight touched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.protos.shards import total_elements
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.jump import merge
from sidecast.trainer.hook.replicas import replica_values, shards_digest
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.hook.vote import NO_VALUES, Votes
from sidecast.trainer.partitions import Partition, RollbackCopy
from sidecast.trainer.partitions.rollback import RollbackError

log = logging.getLogger(__name__)

# So many pushes together look at all that ranks hold alike.
PUSHES_PER_LOOK = 8


class JumpApplier:
    """What is done to one rank's weights.

    Args:
        config: Settings.
        partition: What this rank holds.
        votes: Over all ranks.
        rollback_copy: Where jumps are undone from; None if they never are.

    Attributes:
        partition: As given.
    """

    def __init__(
        self, config: NowcasterConfig, partition: Partition, votes: Votes, rollback_copy: RollbackCopy | None
    ) -> None:
        self.partition = partition
        self.rollback_copy = rollback_copy
        self._config = config
        self._votes = votes
        self._base = torch.empty(total_elements(partition.owned_shards)) if config.merge == "replace" else None
        self._base_step: int | None = None

    def resume(self) -> None:
        """Goes on from a loaded checkpoint; a base from before is let go."""
        self._base_step = None

    def after_snapshot(self, step: int, *, is_base: bool) -> None:
        """Keeps what a later jump needs besides the prediction.

        Args:
            step: Of the snapshot.
            is_base: Whether a nowcast starts from it.
        """
        self._fit_rollback_copy()
        if self._base is None or not is_base:
            return
        self._base_step = None
        try:
            self.partition.read_owned(self._base)
        except SidecastError as error:
            log.warning("the prediction of step %d will not be applied: %s", step, error)
        else:
            self._base_step = step

    def _fit_rollback_copy(self) -> None:
        """Allocates once more if the optimizer turned out to keep more than the two moments that were assumed."""
        if self.rollback_copy is None or self.rollback_copy.num_bytes >= self.partition.rollback_bytes():
            return
        try:
            self.rollback_copy = reserve_rollback_copy(self._config, self.partition)
        except SidecastError as error:
            # Capturing into the one that is too small refuses every jump, which is counted.
            log.error("no jump can be undone, so none is applied: %s", error)

    def why_stale(self) -> str:
        """Why this rank could not apply anything now; empty if it could."""
        try:
            self.partition.require_current()
        except SidecastError as error:
            return str(error)
        return ""

    def apply(self, delta: Tensor, weight: float, *, base_step: int) -> str:
        """Jumps; every rank calls it at the same step.

        Args:
            delta: Prediction minus base, owned elements in order.
            weight: Factor on it.
            base_step: Step of the base.

        Returns:
            Why no rank has jumped; empty if all have.
        """
        reason, values = "", NO_VALUES
        try:
            self.partition.require_current()
            if self._config.moments == "reset":
                self.partition.require_resettable()
            elif self._config.moments == "scale":
                self.partition.require_scalable()
            if self._base is not None and self._base_step != base_step:
                reason = f"the base of step {base_step}, which it would replace, is not held"
            elif self.rollback_copy is not None:
                self.partition.capture(self.rollback_copy)
            values = self._replica_values(base_step)
        except SidecastError as error:
            reason = str(error)
        if other_reason := self._votes.confirm(not reason, values):
            return reason or other_reason
        merge(self.partition, delta, weight, base=self._base, moments=self._config.moments)
        return ""

    def _replica_values(self, base_step: int) -> tuple[int, int]:
        if self._config.policy != "push":
            return replica_values(self.partition)
        # Pushes come often and go a little way only: each looks at a share of the parameters, in turn, the same on all
        # ranks. To read all of them would cost half as much as the push.
        num_shares = max(1, min(PUSHES_PER_LOOK, len(self.partition.parameters)))
        return replica_values(self.partition, base_step // self._config.interval_steps % num_shares, num_shares)

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
        if other_reason := self._votes.confirm(not reason):
            return reason or other_reason
        assert self.rollback_copy is not None
        self.partition.restore(self.rollback_copy)
        return ""

    def rollback_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the copy, and whose it is.

        Raises:
            RollbackError: The copy cannot be read.
        """
        assert self.rollback_copy is not None
        return {**self.rollback_copy.state_dict(), "shards": shards_digest(self.partition)}

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Takes the rollback copy of a checkpoint that was saved during probation.

        Raises:
            RollbackError: It is of other shards than this rank's, or does not fit.
        """
        # Some checkpoints bring what one rank has said to all, and another number of ranks cuts other shards.
        shards = shards_digest(self.partition)
        if state.get("shards", shards) != shards:
            raise RollbackError("the copy is of other shards than this rank's")
        needed_bytes = state["buffer"].numel()
        if self.rollback_copy is None or self.rollback_copy.num_bytes < needed_bytes:
            # The run goes on with other settings, or keeps more than was assumed; the jump is judged all the same.
            self.rollback_copy = RollbackCopy.allocate(needed_bytes)
        self.rollback_copy.load_state_dict(state)
