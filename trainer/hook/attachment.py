"""The hook on its training run: one face for every kind of loop, and what a checkpoint keeps of it."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sidecast.errors import ConfigError, SidecastError
from sidecast.trainer.hook.boundary import NowcastHook, rollback_path
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.replay import Replayer
from sidecast.trainer.hook.training_run import Trainee
from sidecast.trainer.partitions import RemappingPartition
from sidecast.trainer.pipe.messages import Session

log = logging.getLogger(__name__)


class Attachment(Protocol):
    """What a training loop does with the hook."""

    @property
    def hook(self) -> NowcastHook | Replayer:
        """The hook itself, for listeners and summaries."""

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch."""

    def after_step(self) -> None:
        """To be called on every rank after each optimizer step that was applied."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: plain values, the same on all ranks; None for nothing."""

    def save_rollback_copy(self, checkpoint: Path) -> None:
        """Adds this rank's rollback copy to a checkpoint's folder, if a jump is on probation."""

    def rollback_state(self) -> dict[str, Any] | None:
        """This rank's rollback copy, if a jump is on probation; for checkpoints that are no folders."""

    def resume(
        self, state: Mapping[str, Any] | None, checkpoint: Path | None, rollback: Mapping[str, Any] | None = None
    ) -> None:
        """Goes on from a checkpoint that was just loaded; collective.

        Args:
            state: What ``state_dict`` gave when it was saved; None if it was saved without the hook.
            checkpoint: Folder with what ``save_rollback_copy`` wrote; None if there is none.
            rollback: What ``rollback_state`` gave, if there is no folder.

        Raises:
            ConfigError: The checkpoint changed what this rank holds.
        """

    def close(self) -> None:
        """Ends nowcasting; the training run goes on without."""


class NowcastAttachment:
    """A hook that works with a service.

    Args:
        trainee: The run.
        hook: On that run.
        courier: The hook's.
        ranks: Of the run.
    """

    def __init__(self, trainee: Trainee, hook: NowcastHook, courier: CourierHandle, ranks: Ranks) -> None:
        self.hook = hook
        self._trainee = trainee
        self._courier = courier
        self._ranks = ranks
        self._shards = hook.shards

    def observe(self, loss: Tensor | float) -> None:
        self.hook.observe(loss)

    def after_step(self) -> None:
        self.hook.after_step(self._trainee.applied_steps())

    def state_dict(self) -> dict[str, Any]:
        return self.hook.state_dict()

    def save_rollback_copy(self, checkpoint: Path) -> None:
        path = rollback_path(checkpoint, self._ranks.rank)
        rollback = self.rollback_state()
        if rollback is None:
            # Where checkpoints overwrite one another, there may be the copy of an earlier jump.
            path.unlink(missing_ok=True)
            return
        partial = path.with_suffix(".partial")
        torch.save(rollback, partial)
        os.replace(partial, path)

    def rollback_state(self) -> dict[str, Any] | None:
        return self.hook.rollback_state()

    def resume(
        self, state: Mapping[str, Any] | None, checkpoint: Path | None, rollback: Mapping[str, Any] | None = None
    ) -> None:
        partition = RemappingPartition(self._trainee.map_partition)
        if (partition.upload_shards, partition.owned_shards) != self._shards:
            raise ConfigError("the loaded checkpoint changed this rank's partition; attach after loading it instead")
        step = self._trainee.applied_steps()
        if state is not None and state["step"] != step:
            # Only weights were loaded: this is another run, whose optimizer the other's rollback copy must not reach.
            state = None
        session = new_session(self._ranks, step, state)
        # The service goes on with the run, and keeps what is of use to it.
        self.hook.resume(state, partition, step, session.run_id, is_kept=True)
        load_rollback_copy(self.hook, checkpoint, rollback, self._ranks)
        self._courier.new_session(session)

    def close(self) -> None:
        self.hook.close()


class ReplayAttachment:
    """A replayer in the hook's place.

    Args:
        trainee: The run.
        replayer: On that run.
    """

    def __init__(self, trainee: Trainee, replayer: Replayer) -> None:
        self.hook = replayer
        self._trainee = trainee

    def observe(self, loss: Tensor | float) -> None:
        self.hook.observe(loss)

    def after_step(self) -> None:
        self.hook.after_step(self._trainee.applied_steps())

    def state_dict(self) -> None:
        return None

    def save_rollback_copy(self, checkpoint: Path) -> None:
        """A replay never asks whether a jump paid."""

    def rollback_state(self) -> None:
        return None

    def resume(
        self, state: Mapping[str, Any] | None, checkpoint: Path | None, rollback: Mapping[str, Any] | None = None
    ) -> None:
        self.hook.resume(RemappingPartition(self._trainee.map_partition), self._trainee.applied_steps())

    def close(self) -> None:
        self.hook.close()


def new_session(ranks: Ranks, step: int, state: Mapping[str, Any] | None = None) -> Session:
    """A session of a new run, or of the run that a loaded checkpoint belongs to; the same on all ranks."""
    session_id, run_id = ranks.from_first([uuid.uuid4().hex[:16], uuid.uuid4().hex[:16]])
    return Session(
        session_id=session_id,
        run_id=run_id if state is None else state["run_id"],
        resumed=state is not None,
        resume_step=step,
        resume_epoch=0 if state is None else state["epoch"],
    )


def load_rollback_copy(
    hook: NowcastHook, checkpoint: Path | None, rollback: Mapping[str, Any] | None, ranks: Ranks
) -> None:
    """A jump on probation can only stay so if every rank can still undo it."""
    if not hook.is_on_probation:
        return
    reason = ""
    try:
        if rollback is None and checkpoint is not None:
            rollback = torch.load(rollback_path(checkpoint, ranks.rank), weights_only=True)
        if rollback is None:
            reason = "the checkpoint has none"
        else:
            hook.load_rollback_copy(rollback)
    except (OSError, RuntimeError, SidecastError) as error:
        reason = str(error)
    for rank, its_reason in enumerate(ranks.gather(reason)):
        if its_reason:
            log.warning("rank %d has no rollback copy, the jump on probation cannot be undone: %s", rank, its_reason)
            hook.end_probation()
            return
