"""The hook on its training run: one face for every kind of loop, and what a checkpoint keeps of it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.hook.run_file import RunFile
from sidecast.trainer.hook.training_run import TrainingRun
from sidecast.trainer.partitions import Partition, StalePartitionError
from sidecast.trainer.pipe.messages import Session

log = logging.getLogger(__name__)


class Hook(Protocol):
    """One rank's hook: what is done at its step boundaries, whoever decides it.

    Attributes:
        step: Optimizer steps applied so far.
        is_on_probation: Whether a jump may still be undone, so that a checkpoint must hold the rollback copy.
        is_closed: Whether nowcasting has ended.
    """

    @property
    def step(self) -> int: ...

    @property
    def is_on_probation(self) -> bool: ...

    @property
    def is_closed(self) -> bool: ...

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch."""

    def add_listener(self, callback: Callable[[NowcastEvent], None]) -> None:
        """Calls back with every event, on the training thread."""

    def after_step(self, step: int) -> None:
        """Does what is due once an optimizer step has been applied; nothing if it knows of that step.

        Args:
            step: Optimizer steps applied since the run began.
        """

    def after_skipped_step(self) -> None:
        """Takes note of an optimizer step that moved nothing, for its gradients were not finite."""

    def summary(self) -> dict[str, Any]:
        """What was done since the hook was attached."""

    def close(self) -> None:
        """Ends nowcasting; the training run goes on without."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: plain values, the same on all ranks; None for nothing."""

    def resume(self, state: Mapping[str, Any] | None, step: int, run_id: str, *, is_kept: bool = False) -> None:
        """Goes on from a checkpoint that was just loaded.

        Args:
            state: What ``state_dict`` gave; None if the checkpoint was saved without a hook.
            step: Optimizer steps applied in the checkpoint.
            run_id: The run's identity if the checkpoint has none.
            is_kept: Whether a prediction whose base is not after the checkpoint will be brought anew.
        """

    def rollback_state(self) -> dict[str, Any] | None:
        """This rank's rollback copy, for a checkpoint; None if no jump is on probation, or none can be undone."""

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Takes the rollback copy of a checkpoint that was saved during probation.

        Raises:
            SidecastError: It does not fit, or there is no memory for it.
        """

    def end_probation(self) -> None:
        """Keeps a jump for good whose rollback copy is lost."""


class Attachment:
    """A hook on its training run.

    Args:
        run: The run.
        hook: On that run.
        partition: What the hook works on.
        ranks: Of the run.
        courier: Whose service keeps a run's history over resumes; None without a service.
        run_file: Where others learn the run's secret; None for nowhere, and for all ranks but the first.
    """

    def __init__(
        self,
        run: TrainingRun,
        hook: Hook,
        partition: Partition,
        ranks: Ranks,
        courier: CourierHandle | None = None,
        run_file: RunFile | None = None,
    ) -> None:
        self.hook = hook
        self._run = run
        self._partition = partition
        self._ranks = ranks
        self._courier = courier
        self._run_file = run_file

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch."""
        self.hook.observe(loss)

    def after_step(self) -> None:
        """To be called on every rank after each optimizer step that was applied."""
        self.hook.after_step(self._run.applied_steps())

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: plain values, the same on all ranks; None for nothing."""
        state = self.hook.state_dict()
        if state is None or self._courier is None:
            return state
        # Without it no resume would be let into the run.
        return {**state, "run_secret": self._courier.session.run_secret}

    def rollback_state(self) -> dict[str, Any] | None:
        """This rank's rollback copy, if a jump is on probation; for checkpoints that are no folders."""
        return self.hook.rollback_state()

    def save_rollback_copy(self, checkpoint: Path) -> None:
        """Adds this rank's rollback copy to a checkpoint's folder, if a jump is on probation.

        A disk that does not take it costs the copy, with a warning, and neither the checkpoint nor the run.
        """
        path = rollback_path(checkpoint, self._ranks.rank)
        rollback = self.rollback_state()
        if rollback is None:
            # Where checkpoints overwrite one another, there may be the copy of an earlier jump.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return
        try:
            # Should this one find no room, the resumed run must not take an earlier jump's for it.
            path.unlink(missing_ok=True)
            with replacing(path) as partial:
                torch.save(rollback, partial)
        # PyTorch's writer makes a RuntimeError of a disk without room.
        except (OSError, RuntimeError) as error:
            log.warning("a run that resumes from %s cannot undo the jump on probation: %s", checkpoint, error)

    def from_first(self, value: Any) -> Any:
        """What rank 0 says; collective. For what only some ranks can read of a checkpoint."""
        return self._ranks.from_first(value)

    def resume(
        self, state: Mapping[str, Any] | None, checkpoint: Path | None, rollback: Mapping[str, Any] | None = None
    ) -> None:
        """Goes on from a checkpoint that was just loaded, if nowcasting has not ended; collective.

        Args:
            state: What ``state_dict`` gave when it was saved; None if it was saved without the hook.
            checkpoint: Folder with what ``save_rollback_copy`` wrote; None if there is none.
            rollback: What ``rollback_state`` gave, if there is no folder.

        Raises:
            ConfigError: The checkpoint changed what a rank holds. All ranks raise together.
        """
        if self.hook.is_closed:
            return
        with self._ranks.refused_together():
            try:
                self._partition.map_anew()
            except StalePartitionError as error:
                raise ConfigError(
                    f"the loaded checkpoint changed this rank's partition ({error}); attach after loading it instead"
                ) from error
        step = self._run.applied_steps()
        state = _agreed(state, step, self._ranks)
        session = new_session(self._ranks, step, state)
        # A service goes on with the run, and keeps what is of use to it.
        self.hook.resume(state, step, session.run_id, is_kept=self._courier is not None)
        load_rollback_copy(self.hook, checkpoint, rollback, self._ranks)
        if self._courier is not None:
            self._courier.new_session(session)
        if self._run_file is not None:
            self._run_file.renew(session)

    def close(self) -> None:
        """Ends nowcasting; the training run goes on without."""
        self.hook.close()


def _agreed(state: Mapping[str, Any] | None, step: int, ranks: Ranks) -> Mapping[str, Any] | None:
    """Rank 0's state where all ranks have one of this step; None, and a new beginning, where any has none."""
    # Where only weights were loaded, this is another run, whose optimizer the other's rollback copy must not reach.
    are_ours = ranks.gather(isinstance(state, Mapping) and state.get("step") == step)
    if all(are_ours):
        return dict(ranks.from_first(state))
    if any(are_ours) and ranks.rank == 0:
        missing = are_ours.index(False)
        log.warning("nowcasting begins anew on all ranks: rank %d has no state of the loaded checkpoint", missing)
    return None


def rollback_path(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint saved during probation keeps a rank's rollback copy."""
    return checkpoint / f"sidecast_rollback_rank{rank}.pt"


def new_session(ranks: Ranks, step: int, state: Mapping[str, Any] | None = None) -> Session:
    """A session of a new run, or of the run that a loaded checkpoint belongs to; the same on all ranks."""
    session_id, run_id, run_secret = ranks.from_first(
        [uuid.uuid4().hex[:16], uuid.uuid4().hex[:16], secrets.token_hex(16)]
    )
    return Session(
        session_id=session_id,
        run_id=run_id if state is None else state["run_id"],
        resumed=state is not None,
        resume_step=step,
        resume_epoch=0 if state is None else state["epoch"],
        # Checkpoints from before there were secrets have none.
        run_secret=run_secret if state is None else state.get("run_secret", run_secret),
    )


def load_rollback_copy(hook: Hook, checkpoint: Path | None, rollback: Mapping[str, Any] | None, ranks: Ranks) -> None:
    """A jump on probation can only stay so if every rank can still undo it; collective."""
    is_on_probation = hook.is_on_probation
    reason = _take_rollback_copy(hook, checkpoint, rollback, ranks.rank) if is_on_probation else "it knows of no jump"
    answers = ranks.gather((is_on_probation, reason))
    if not any(is_on for is_on, _ in answers):
        return
    for rank, (_, its_reason) in enumerate(answers):
        if its_reason:
            log.warning("rank %d has no rollback copy, the jump on probation cannot be undone: %s", rank, its_reason)
            hook.end_probation()
            return


def _take_rollback_copy(hook: Hook, checkpoint: Path | None, rollback: Mapping[str, Any] | None, rank: int) -> str:
    """Why a rank has none; empty if it has."""
    try:
        if rollback is None and checkpoint is not None:
            rollback = torch.load(rollback_path(checkpoint, rank), weights_only=True)
        if rollback is None:
            return "the checkpoint has none"
        hook.load_rollback_copy(rollback)
    except Exception as error:
        # Whatever lies there, cut, empty or somebody else's: other ranks wait for this one, and the run goes on.
        return str(error) or type(error).__name__
    return ""
