"""What happens at a step boundary: poll, vote, jump, stage. Runs on the training thread and never waits for a network.

Every decision that touches weights is read from a vote, so that all ranks take it at the same step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.application import JumpApplier
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.inbox import Inbox
from sidecast.trainer.hook.losses import LossMeter
from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.policies.jump_policy import JumpPolicy
from sidecast.trainer.hook.policies.policy import Policy
from sidecast.trainer.hook.policies.push_policy import PushPolicy
from sidecast.trainer.hook.reporting import HookTotals, NowcastEvent, Reporter, applied_details
from sidecast.trainer.hook.schedule import Schedule
from sidecast.trainer.hook.staging import Stager, side_stream
from sidecast.trainer.hook.trajectory import Trajectory
from sidecast.trainer.hook.vote import NO_VERSION, Ballot, Decision, Votes
from sidecast.trainer.hook.windows import WindowLosses
from sidecast.trainer.partitions import Partition, RollbackCopy
from sidecast.trainer.partitions.rollback import RollbackError
from sidecast.trainer.pipe.messages import Prediction

log = logging.getLogger(__name__)

VOTE_END_TIMEOUT_S = 2.0


class NowcastHook:
    """One rank's hook; implements ``Hook`` with a service, or with what takes its place.

    Args:
        config: Settings.
        partition: What this rank holds.
        courier: Started, and joined or trying to.
        votes: Over all ranks.
        step: Optimizer steps applied so far.
        run_id: Of the run; kept over resumes.
        rollback_copy: Where jumps are undone from; None: they are neither judged nor undone.
        is_linked: Whether the courier has joined the service, as far as is known.
    """

    def __init__(
        self,
        config: NowcasterConfig,
        partition: Partition,
        courier: Messenger,
        votes: Votes,
        *,
        step: int,
        run_id: str,
        rollback_copy: RollbackCopy | None = None,
        is_linked: bool = True,
    ) -> None:
        self.config = config
        self._trajectory = Trajectory(run_id, step)
        self._courier = courier
        self._votes = votes
        self._schedule = Schedule.of(config)
        self._reporter = Reporter(courier, self._trajectory, config.policy)
        self._windows = WindowLosses(config.nowcast_interval_steps, config.nowcast_interval_setting)
        self._inbox = Inbox(
            courier,
            self._trajectory,
            self._reporter,
            self._windows,
            config.resolved_max_staleness_steps,
            is_linked=is_linked,
        )
        self._stager = Stager(courier, self._inbox, side_stream(partition.device))
        self._applier = JumpApplier(config, partition, votes, rollback_copy)
        self._policy: Policy = (
            JumpPolicy(config, self._applier, self._trajectory, self._reporter, courier)
            if config.policy == "jump"
            else PushPolicy(config.push, partition, self._reporter, has_read_outs=bool(config.read_outs))
        )
        self._meter = LossMeter()
        self._vote_step = 0
        self._saved_vote: tuple[int, float | None] | None = None
        self._is_closed = False

    # --- for users

    @property
    def step(self) -> int:
        """Optimizer steps applied so far."""
        return self._trajectory.step

    @property
    def epoch(self) -> int:
        """How many jumps and rollbacks there have been; states of different epochs never mix in a nowcast."""
        return self._trajectory.epoch

    @property
    def run_id(self) -> str:
        """Under which the service knows the run, over all its sessions."""
        return self._trajectory.run_id

    @property
    def learning_rate_sum(self) -> float:
        """Of all steps so far; 0 with jumps, which have no use for it."""
        return self._policy.learning_rate_sum

    @property
    def totals(self) -> HookTotals:
        """What was done and what it has cost."""
        return self._reporter.totals

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch, where it is not found by itself."""
        if not self._is_closed:
            self._meter.observe(loss)

    def add_listener(self, callback: Callable[[NowcastEvent], None]) -> None:
        """Calls back with every event, on the training thread."""
        self._reporter.listeners.append(callback)

    def summary(self) -> dict[str, Any]:
        """Totals since the hook was attached."""
        return self._reporter.summary(self._policy)

    def close(self) -> None:
        """Ends nowcasting and frees its memory; training goes on. Ranks that are not closed end at their next vote."""
        if self._is_closed:
            return
        self._is_closed = True
        last_vote = self._votes.leave(VOTE_END_TIMEOUT_S)
        if last_vote is not None:
            self._saved_vote = self._vote_step, last_vote.mean_loss
        self._reporter.post_stats(self._policy)
        self._stager.close()
        self._inbox.close()
        self._courier.close()
        if not self.is_on_probation:
            # Otherwise a checkpoint may still want it.
            self._applier.rollback_copy = None

    @property
    def is_closed(self) -> bool:
        """Whether nowcasting has ended."""
        return self._is_closed

    # --- the step boundary

    def after_skipped_step(self) -> None:
        """Takes note of an optimizer step that moved nothing, for its gradients were not finite."""
        self._reporter.count_skipped(self._policy)

    def after_step(self, step: int) -> None:
        """Does what is due once an optimizer step has been applied.

        Args:
            step: Optimizer steps applied since the run began.
        """
        if step == self.step or self._is_closed:
            return
        self._trajectory.step = step
        self._reporter.num_skipped_in_a_row = 0
        self._policy.after_step()
        started_s = time.perf_counter()
        # One for everything that is waited for at this boundary.
        deadline_s = time.monotonic() + self.config.sync_deadline_s
        self._collect()
        self._inbox.poll()
        vote_step = self._vote_step if self._saved_vote is None else self._saved_vote[0]
        if step >= vote_step + self._schedule.vote_lag_steps:
            self._read_vote()
        is_staged = self._schedule.is_snapshot(step) and self._policy.wants_snapshots and self._stage(deadline_s)
        if self.config.mode == "sync" and self._schedule.is_base(step):
            staged_epoch = self.epoch
            self._read_vote()
            is_wanted = self._policy.is_due(step) and not self._reporter.is_paused
            if is_staged and self.epoch == staged_epoch and is_wanted:
                self._collect()
                if self._inbox.await_prediction(deadline_s):
                    self._stager.after_late_prediction()
            self._launch_vote()
            self._read_vote()
        if self._schedule.is_vote(step) and not self._votes.is_open:
            self._launch_vote()
            if self._schedule.vote_lag_steps == 0:
                self._read_vote()
        if self._schedule.is_snapshot(step):
            self._reporter.post_stats(self._policy)
        if self._votes.left_rank is not None:
            reason = f"rank {self._votes.left_rank} has closed its hook"
            log.warning("nowcasting ends on all ranks: %s", reason)
            self._reporter.emit("suspended", reason=reason)
            self.close()
        self.totals.blocked_s += time.perf_counter() - started_s

    def _stage(self, deadline_s: float) -> bool:
        """Hands the courier a snapshot; False if it could not."""
        self._policy.at_snapshot(self.step)
        self._applier.after_snapshot(self.step, is_base=self._schedule.is_base(self.step))
        # Not for snapshots of which nothing can come any more.
        is_patient = self.config.mode == "sync" and not self._policy.is_suspended
        self._windows.pass_snapshot(time.monotonic())
        reason = self._windows.admit(self.step, is_patient=is_patient)
        if not reason:
            slot = self._stager.take_slot(deadline_s if is_patient else None)
            if slot is None:
                self._windows.outrun()
            reason = self._stager.stage(
                self._applier.partition,
                self.step,
                self.epoch,
                slot,
                learning_rate_sum=self._policy.learning_rate_sum,
                applied=self._policy.applied,
            )
            self.totals.staging_s = self._stager.seconds
        if self._schedule.is_base(self.step) and (warning := self._windows.end_window()):
            log.warning("%s", warning)
        if reason:
            self._drop(self.step, reason)
            return False
        self.totals.num_staged += 1
        self._reporter.emit("staged")
        return True

    def _collect(self) -> None:
        if reason := self._stager.collect():
            self._drop(self._stager.step, reason)

    def _drop(self, snapshot_step: int, reason: str) -> None:
        self._windows.lose(snapshot_step)
        self._reporter.drop(snapshot_step, reason)

    # --- votes

    def _launch_vote(self) -> None:
        loss_sum, num_losses = self._meter.drain()
        weight_scale = self._policy.weight_scale()
        if self._inbox.held is not None and weight_scale == 0.0:
            self._inbox.reject("the learning rate decays")
        held = self._inbox.held if self._policy.allows and not self._inbox.is_paused else None
        can_jump = held is not None and not self._applier.why_stale()
        version, digest, epoch = (held.version, held.digest, held.epoch) if held and can_jump else (NO_VERSION, 0, 0)
        self._vote_step = self.step
        self._windows.has_room = self._courier.has_free_slot
        self._votes.launch(
            Ballot(
                version,
                digest,
                epoch,
                loss_sum,
                num_losses,
                weight_scale if can_jump else 1.0,
                has_room=self._windows.has_room,
                lost_step=self._windows.newest_step,
                is_paused=self._inbox.is_paused,
            )
        )

    def _read_vote(self) -> None:
        if self._saved_vote is not None:
            # What was held then is brought anew: only the losses of that vote are left.
            (self._vote_step, mean_loss), self._saved_vote = self._saved_vote, None
            self._policy.on_loss(self._vote_step, mean_loss)
        if not self._votes.is_open:
            return
        decision = self._votes.read()
        if self._votes.left_rank is None:
            self._on_decision(decision)

    def _on_decision(self, decision: Decision) -> None:
        self._windows.agree(decision)
        self.totals.num_losses += decision.num_losses
        self._policy.on_loss(self._vote_step, decision.mean_loss)
        self._reporter.agree_on_pause(decision.is_paused)
        held = self._inbox.held
        if held is not None and (decision.version, decision.digest, decision.epoch) == (
            held.version,
            held.digest,
            self.epoch,
        ):
            self._apply(held, decision.weight_scale)

    def _apply(self, held: Prediction, weight_scale: float) -> None:
        staleness_steps = self.step - held.base_step
        weight = self._policy.weight(held, self.step, weight_scale)
        if weight == 0.0:
            horizon_steps = held.horizon_intervals * self._schedule.interval_steps
            self._inbox.reject(
                f"its base is {staleness_steps} steps old, its horizon {horizon_steps} steps, "
                f"and the learning rate leaves {weight_scale:.3g} of it"
            )
            return
        if reason := self._applier.apply(self._inbox.delta, weight, base_step=held.base_step):
            log.warning("the prediction of step %d is not applied: %s", held.base_step, reason)
            self._inbox.reject(reason)
            return
        self._policy.on_applied(held, weight, self.step)
        self._trajectory.begin_epoch()
        self.totals.num_applied += 1
        details = applied_details(held, self._policy, weight, staleness_steps)
        self._inbox.release({"policy": self.config.policy, **details})
        self._reporter.report("applied", held.version)
        self._reporter.emit("applied", **details)

    # --- resuming

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the rollback copy is saved beside them."""
        # A resumed run needs first what was staged last.
        self._collect()
        # Nor may it lack the losses of a vote that is not read yet: a verdict counts them.
        vote = [self._vote_step, self._votes.peek().mean_loss] if self._votes.is_open else self._saved_vote
        return {**self._trajectory.state(), **self._policy.state(), "open_vote": vote}

    def resume(self, state: Mapping[str, Any] | None, step: int, run_id: str, *, is_kept: bool = False) -> None:
        """Goes on from a loaded checkpoint.

        Args:
            state: What ``state_dict`` gave; None if the checkpoint was saved without the hook.
            step: Optimizer steps applied in the checkpoint.
            run_id: The run's identity if the checkpoint has none.
            is_kept: Whether a prediction whose base is not after the checkpoint will be brought anew.
        """
        # What is still being copied is of before; whoever takes it lets it go now.
        self._collect()
        if self._votes.is_open:
            self._votes.read()
        self._applier.resume()
        self._windows.forget()
        self._meter = LossMeter()
        # What is rejected is so at the checkpoint's step, and in the epoch that ends.
        self._trajectory.step = step
        held = self._inbox.held
        if held is not None:
            if is_kept and self._trajectory.stays_usable(held, state, step):
                self._inbox.let_go()
            else:
                self._inbox.reject("a checkpoint was loaded")
        self._saved_vote = None if state is None else state.get("open_vote")
        self._trajectory.resume(state, run_id, step)
        self._policy.load(state)

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """What is nowcasted, in the order of the parameter vector."""
        return self._applier.partition.parameters

    @property
    def session_id(self) -> str:
        """Under which the service knows this attach."""
        return self._courier.session_id

    @property
    def shards(self) -> tuple[tuple[ShardSpec, ...], tuple[ShardSpec, ...]]:
        """What this rank uploads and what it applies."""
        return self._applier.partition.upload_shards, self._applier.partition.owned_shards

    def rollback_state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps for undoing the jump on probation; None if there is no such jump, or no such copy."""
        if self._applier.rollback_copy is None or not self.is_on_probation:
            return None
        try:
            return {**self._applier.rollback_state(), "of": [self.run_id, self.epoch]}
        except SidecastError as error:
            # The checkpoint is worth more than the copy.
            log.error("a run that resumes from this checkpoint cannot undo the jump on probation: %s", error)
            return None

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Takes the rollback copy of a checkpoint that was saved during probation.

        Raises:
            RollbackError: It is of another jump, or does not fit.
        """
        # A checkpoint's folder may hold what an earlier one, or another run, has left there.
        if state.get("of") != [self.run_id, self.epoch]:
            raise RollbackError("the copy is of another jump")
        self._applier.load_rollback_copy(state)

    def end_probation(self) -> None:
        """Keeps a jump for good whose rollback copy is lost."""
        self._policy.end_probation()

    @property
    def is_on_probation(self) -> bool:
        """Whether a jump may still be undone, so that a checkpoint must hold the rollback copy."""
        return self._policy.is_on_probation
