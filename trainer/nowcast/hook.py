"""What happens at a step boundary: poll, vote, jump, stage. Runs on the training thread and never waits for a network.

Every decision that touches weights is read from a vote, so that all ranks take it at the same step.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.nowcast.acceptance import LossPoint, LossTrend, Verdict
from sidecast.trainer.nowcast.buffers import SharedBuffer
from sidecast.trainer.nowcast.channel import Message
from sidecast.trainer.nowcast.config import NowcasterConfig
from sidecast.trainer.nowcast.courier_handle import CourierHandle
from sidecast.trainer.nowcast.events import EventKind, NowcastEvent
from sidecast.trainer.nowcast.losses import LossMeter
from sidecast.trainer.nowcast.partitions import Partition, RollbackCopy, StalePartitionError
from sidecast.trainer.nowcast.schedule import Schedule, jump_weight
from sidecast.trainer.nowcast.vote import Ballot, Decision, Votes

log = logging.getLogger(__name__)

VOTE_END_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class HeldPrediction:
    """A prediction that lies whole in the shared buffer."""

    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    digest: int
    relative_norm: float
    nowcast_s: float


@dataclass(frozen=True)
class Probation:
    """A jump that may still be undone."""

    version: int
    step: int


@dataclass
class Totals:
    """What the hook has done and what it has cost since it was attached; seconds, bytes and counts."""

    blocked_s: float = 0.0
    staging_s: float = 0.0
    bytes_uploaded: int = 0
    bytes_fetched: int = 0
    num_staged: int = 0
    num_committed: int = 0
    num_dropped: int = 0
    num_applied: int = 0
    num_accepted: int = 0
    num_rolled_back: int = 0
    num_rejected: int = 0
    num_failed: int = 0


class Nowcaster:
    """One rank's hook.

    Args:
        config: Settings.
        partition: What this rank holds.
        courier: Started, and joined or trying to.
        votes: Over all ranks.
        step: Optimizer steps applied so far.
        run_id: Of the run; kept over resumes.
    """

    def __init__(
        self,
        config: NowcasterConfig,
        partition: Partition,
        courier: CourierHandle,
        votes: Votes,
        *,
        step: int,
        run_id: str,
    ) -> None:
        self.config = config
        self.run_id = run_id
        self.epoch = 0
        self.step = step
        self.totals = Totals()
        self.nowcast_s: list[float] = []
        self.is_suspended = False
        self.rollback_copy: RollbackCopy | None = None
        self._partition = partition
        self._courier = courier
        self._votes = votes
        self._schedule = Schedule.of(config)
        self._trend = LossTrend(max(1, config.resolved_probation_steps))
        self._meter = LossMeter()
        self._held: HeldPrediction | None = None
        self._probation: Probation | None = None
        self._num_rollbacks_in_a_row = 0
        self._vote_step = 0
        self._last_loss: float | None = None
        self._is_linked = True
        self._listeners: list[Callable[[NowcastEvent], None]] = []
        self._attached_s = time.perf_counter()
        self._is_closed = False
        self._map_buffers()

    def _map_buffers(self) -> None:
        self._slots = [_as_tensor(slot) for slot in self._courier.slots]
        self._delta = _as_tensor(self._courier.prediction)

    # --- for users

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch; only needed where ``engine.backward(loss)`` is not called."""
        self._meter.observe(loss)

    def add_listener(self, callback: Callable[[NowcastEvent], None]) -> None:
        """Calls back with every event, on the training thread."""
        self._listeners.append(callback)

    def summary(self) -> dict[str, Any]:
        """Totals since the hook was attached."""
        return {
            **asdict(self.totals),
            "nowcast_s": list(self.nowcast_s),
            "train_s": time.perf_counter() - self._attached_s,
            "num_courier_deaths": self._courier.num_deaths,
            "epoch": self.epoch,
            "suspended": self.is_suspended,
        }

    def close(self) -> None:
        """Ends the courier and frees the shared memory; the training engine goes on without us."""
        if self._is_closed:
            return
        self._is_closed = True
        self._votes.abandon(VOTE_END_TIMEOUT_S)
        self._post_stats()
        self._slots, self._delta = [], torch.empty(0)
        self._courier.close()

    # --- the step boundary

    def after_step(self, step: int) -> None:
        """Does what is due once an optimizer step has been applied.

        Args:
            step: Optimizer steps applied since the run began.
        """
        if step == self.step or self._is_closed:
            return
        self.step = step
        started_s = time.perf_counter()
        self._poll()
        if self._votes.is_open and step >= self._vote_step + self._schedule.vote_lag_steps:
            self._on_decision(self._votes.read())
        is_staged = self._schedule.is_snapshot(step) and self._stage()
        if self.config.mode == "sync" and self._schedule.is_base(step):
            staged_epoch = self.epoch
            if self._votes.is_open:
                self._on_decision(self._votes.read())
            # Not for one that could not be applied: it would cost the deadline at every base step.
            if is_staged and self.epoch == staged_epoch and self._probation is None and not self.is_suspended:
                self._await_prediction()
            self._launch_vote()
            self._on_decision(self._votes.read())
        if self._schedule.is_vote(step) and not self._votes.is_open:
            self._launch_vote()
            if self._schedule.vote_lag_steps == 0:
                self._on_decision(self._votes.read())
        if self._schedule.is_snapshot(step):
            self._post_stats()
        self.totals.blocked_s += time.perf_counter() - started_s

    def _stage(self) -> bool:
        """Hands the courier a snapshot; False if it could not."""
        if self.rollback_copy is None and self.config.rollback == "host" and self.config.resolved_probation_steps:
            # Only now has the optimizer the state that a jump would have to be undone with.
            self.rollback_copy = RollbackCopy.allocate(self._partition.rollback_bytes())
        slot = self._courier.take_slot()
        if slot is None:
            self._drop("the courier has not sent the snapshots before")
            return False
        started_s = time.perf_counter()
        try:
            self._partition.read(self._slots[slot])
        except StalePartitionError as error:
            # Somebody moved the optimizer's tensors; training is none the worse for a missing snapshot.
            self._courier.return_slot(slot)
            self._drop(str(error))
            return False
        self.totals.staging_s += time.perf_counter() - started_s
        self.totals.num_staged += 1
        if self._courier.post({"type": "snapshot", "slot": slot, "step": self.step, "epoch": self.epoch}):
            self._emit("staged")
            return True
        self._drop("the courier cannot be reached")
        return False

    def _drop(self, reason: str) -> None:
        self.totals.num_dropped += 1
        self._emit("dropped", reason=reason)

    # --- messages from the courier

    def _poll(self, timeout_s: float = 0.0) -> None:
        for message in self._courier.receive(timeout_s):
            self._on_message(message)
        held = self._held
        if held is not None:
            if held.epoch != self.epoch:
                self._reject(f"its base is of epoch {held.epoch}, this is epoch {self.epoch}")
            elif self.step - held.base_step > self.config.resolved_max_staleness_steps:
                self._reject(f"its base is {self.step - held.base_step} steps old")

    def _on_message(self, message: Message) -> None:
        match message["type"]:
            case "sent" if message["reason"]:
                self._drop(message["reason"])
            case "sent":
                self.totals.bytes_uploaded += message["bytes"]
            case "committed":
                self.totals.num_committed += 1
                self._emit("committed", snapshot_step=message["step"])
            case "dropped":
                self._drop(message["reason"])
            case "prediction" if message["session_id"] != self._courier.session_id:
                # It was on its way when a checkpoint was loaded: its base is of a future that was given up.
                self._courier.release_prediction(None)
            case "prediction":
                self.totals.bytes_fetched += message["bytes"]
                self.nowcast_s.append(message["nowcast_s"])
                fields = HeldPrediction.__dataclass_fields__
                self._held = HeldPrediction(**{name: message[name] for name in fields})
            case "failed":
                self.totals.num_failed += 1
                self._emit("rejected", reason=message["reason"], base_step=message["step"])
            case "connected":
                self._emit("connected")
            case "disconnected" | "died":
                self._is_linked = False
                self._emit("disconnected", reason=message["reason"])
                log.warning("nowcasting pauses: %s", message["reason"])
            case "refused":
                self._is_linked = False
                self._emit("disconnected", reason=message["reason"])
                log.error("the nowcaster service refuses this run: %s", message["reason"])

    def _await_prediction(self) -> None:
        deadline_s = time.monotonic() + self.config.sync_deadline_s
        self._is_linked = True
        while self._held is None and (left_s := deadline_s - time.monotonic()) > 0:
            num_failed = self.totals.num_failed + self.totals.num_dropped
            self._poll(left_s)
            if self.totals.num_failed + self.totals.num_dropped > num_failed or not self._is_linked:
                return

    # --- votes

    def _launch_vote(self) -> None:
        loss_sum, num_losses = self._meter.drain()
        held = self._held
        if held is None or self._probation is not None or self.is_suspended:
            ballot = Ballot(loss_sum=loss_sum, num_losses=num_losses)
        else:
            ballot = Ballot(held.version, held.digest, held.epoch, loss_sum, num_losses)
        self._vote_step = self.step
        self._votes.launch(ballot)

    def _on_decision(self, decision: Decision) -> None:
        if decision.mean_loss is not None:
            self._last_loss = decision.mean_loss
            self._trend.add(LossPoint(self._vote_step, decision.mean_loss))
        if self._probation is not None:
            self._judge(self._probation, decision.mean_loss)
        held = self._held
        is_agreed = held is not None and (decision.version, decision.digest, decision.epoch) == (
            held.version,
            held.digest,
            self.epoch,
        )
        if held is not None and is_agreed:
            self._jump(held)

    # --- jumps

    def _jump(self, held: HeldPrediction) -> None:
        staleness_steps = self.step - held.base_step
        horizon_steps = held.horizon_intervals * self._schedule.interval_steps
        weight = jump_weight(staleness_steps, horizon_steps, self.config.max_weight)
        if weight == 0.0:
            self._reject(f"its base is {staleness_steps} steps old, its horizon {horizon_steps} steps")
            return
        if self.rollback_copy is not None:
            self._partition.capture(self.rollback_copy)
            self._probation = Probation(held.version, self.step)
        self._partition.apply(self._delta, weight)
        self.epoch += 1
        self.totals.num_applied += 1
        details: dict[str, float | int | str] = {
            "version": held.version,
            "base_step": held.base_step,
            "staleness_steps": staleness_steps,
            "horizon_intervals": held.horizon_intervals,
            "weight": weight,
            "digest": f"{held.digest:016x}",
            "relative_norm": held.relative_norm,
            "nowcast_s": held.nowcast_s,
        }
        self._held = None
        self._courier.release_prediction({"action": "applied", "step": self.step, **details})
        self._report("applied", held.version, weight=weight)
        self._emit("applied", **details)

    def _judge(self, probation: Probation, mean_loss: float | None) -> None:
        is_over = self.step >= probation.step + self.config.resolved_probation_steps
        is_broken = mean_loss is not None and not math.isfinite(mean_loss)
        if not (is_over or is_broken):
            return
        verdict, reason = self._trend.judge(probation.step, self.config.acceptance_sigmas)
        if is_broken:
            verdict, reason = Verdict.ROLL_BACK, f"the loss is {mean_loss}"
        self._probation = None
        if verdict is Verdict.ACCEPT:
            self.totals.num_accepted += 1
            self._num_rollbacks_in_a_row = 0
            self._report("accepted", probation.version, reason=reason)
            self._emit("accepted", version=probation.version, reason=reason)
            return
        assert self.rollback_copy is not None
        self._partition.restore(self.rollback_copy)
        self.epoch += 1
        self.totals.num_rolled_back += 1
        self._num_rollbacks_in_a_row += 1
        self._courier.log({"action": "rolled_back", "step": self.step})
        self._report("rolled_back", probation.version, reason=reason)
        self._emit("rolled_back", version=probation.version, reason=reason)
        if self._num_rollbacks_in_a_row >= self.config.max_rollbacks:
            self.is_suspended = True
            self._emit("suspended", reason=f"{self._num_rollbacks_in_a_row} rollbacks in a row")

    def _reject(self, reason: str) -> None:
        """Lets go of the held prediction; a local matter, since it is only ever applied by unanimous vote."""
        held = self._held
        assert held is not None
        self._held = None
        self.totals.num_rejected += 1
        self._courier.release_prediction(None)
        self._report("rejected", held.version, reason=reason)
        self._emit("rejected", version=held.version, base_step=held.base_step, reason=reason)

    # --- resuming

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; the rollback copy is saved beside them."""
        return {
            "run_id": self.run_id,
            "epoch": self.epoch,
            "step": self.step,
            "trend": self._trend.state(),
            "probation": None if self._probation is None else [self._probation.version, self._probation.step],
            "num_rollbacks_in_a_row": self._num_rollbacks_in_a_row,
            "is_suspended": self.is_suspended,
        }

    def resume(self, state: Mapping[str, Any] | None, partition: Partition, step: int, run_id: str) -> None:
        """Goes on from a loaded checkpoint.

        Args:
            state: What ``state_dict`` gave; None if the checkpoint was saved without the hook.
            partition: Mapped anew.
            step: Optimizer steps applied in the checkpoint.
            run_id: The run's identity if the checkpoint has none.
        """
        if self._votes.is_open:
            self._votes.read()
        self._partition = partition
        self.step = step
        self._meter = LossMeter()
        self._probation = None
        if self._held is not None:
            self._reject("a checkpoint was loaded")
        self.run_id = run_id if state is None else state["run_id"]
        self.epoch = 0 if state is None else state["epoch"]
        self._trend.load([] if state is None else state["trend"])
        self._last_loss = None
        self._num_rollbacks_in_a_row = 0 if state is None else state["num_rollbacks_in_a_row"]
        self.is_suspended = False if state is None else state["is_suspended"]
        if state is not None and state["probation"] is not None:
            self._probation = Probation(*state["probation"])

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """What is nowcasted, in the order of the parameter vector."""
        return self._partition.parameters

    @property
    def session_id(self) -> str:
        """Under which the service knows this attach."""
        return self._courier.session_id

    @property
    def shards(self) -> tuple[tuple[ShardSpec, ...], tuple[ShardSpec, ...]]:
        """What this rank uploads and what it applies."""
        return self._partition.upload_shards, self._partition.owned_shards

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Takes the rollback copy of a checkpoint that was saved during probation."""
        if self.rollback_copy is None:
            self.rollback_copy = RollbackCopy.allocate(self._partition.rollback_bytes())
        self.rollback_copy.load_state_dict(state)

    def end_probation(self) -> None:
        """Keeps a jump for good whose rollback copy is lost."""
        self._probation = None

    @property
    def is_on_probation(self) -> bool:
        """Whether a jump may still be undone, so that a checkpoint must hold the rollback copy."""
        return self._probation is not None

    # --- telling others

    def _report(self, outcome: str, version: int, *, weight: float = 0.0, reason: str = "") -> None:
        self._courier.post(
            {
                "type": "report",
                "outcome": outcome,
                "version": version,
                "step": self.step,
                "epoch": self.epoch,
                "weight": weight,
                "reason": reason,
            }
        )

    def _post_stats(self) -> None:
        values: dict[str, float] = {
            "step": self.step,
            "blocked_s": self.totals.blocked_s,
            "staging_s": self.totals.staging_s,
            "train_s": time.perf_counter() - self._attached_s,
            "num_dropped": self.totals.num_dropped,
            "num_applied": self.totals.num_applied,
            "num_accepted": self.totals.num_accepted,
            "num_rolled_back": self.totals.num_rolled_back,
            "num_rejected": self.totals.num_rejected,
            "num_courier_deaths": self._courier.num_deaths,
            "suspended": int(self.is_suspended),
        }
        if self._last_loss is not None:
            values["loss"] = self._last_loss
        self._courier.post({"type": "stats", "values": values}, may_be_lost=True)

    def _emit(self, kind: EventKind, **details: float | int | str) -> None:
        if self._listeners:
            event = NowcastEvent(kind, self.step, details)
            for callback in self._listeners:
                callback(event)


def _as_tensor(buffer: SharedBuffer) -> Tensor:
    """A flat fp32 tensor over shared memory."""
    # Over the mapping itself, which then lives as long as the tensor; a released view would not keep it.
    count = buffer.num_bytes // 4
    return torch.frombuffer(buffer.map, dtype=torch.float32, count=count) if count else torch.empty(0)


def rollback_path(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint saved during probation keeps a rank's rollback copy."""
    return checkpoint / f"sidecast_rollback_rank{rank}.pt"


def dump_config(config: NowcasterConfig) -> str:
    """Canonical text of the settings, to compare between ranks."""
    return json.dumps(asdict(config), sort_keys=True)
