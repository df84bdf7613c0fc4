"""Pushes of one process that trains alone: keeps the average of its own motion, and makes the pushes.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from sidecast.errors import ConfigError, SidecastError
from sidecast.policies.push import CarriedMotion
from sidecast.predictors.jump_norm import jump_norm
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.messenger import ForHook, FromHook
from sidecast.trainer.hook.slots import FP32_BYTES, Slot, SlotState, as_tensor, has_free, take_free
from sidecast.trainer.integrations.in_process import why_refused
from sidecast.trainer.partitions import Partition
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Committed, Failed, Prediction, Report, Snapshot, Stats


@dataclass(frozen=True, kw_only=True)
class Base:
    """Where an interval begins.

    Attributes:
        step: Optimizer steps before it.
        learning_rate_sum: Of those steps.
    """

    step: int
    learning_rate_sum: float


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A push that has been made, and neither applied nor rejected.

    Attributes:
        prediction: That tells of it.
        factor: Of the average; they make the push anew.
    """

    prediction: Prediction
    factor: float


class InProcessPusher:
    """Implements ``Messenger`` with the average own motion of the run.

    It holds four vectors, 16 bytes a parameter: the staged state; the last one, with what has been applied since; the
    average; and the push.

    Args:
        config: Settings; ``mode`` ``sync`` makes a push on the calling thread as soon as its snapshot is there,
            ``async`` on another thread.
        num_elements: P.

    Raises:
        ConfigError: There is no memory for the vectors.
    """

    num_deaths = 0
    state_key = "motion"
    """Under which a checkpoint keeps what ``state_dict`` gives."""

    def __init__(self, config: NowcasterConfig, num_elements: int) -> None:
        self._config = config
        num_bytes = FP32_BYTES * num_elements
        self.slots = [Slot(0, SharedBuffer("snapshot", num_bytes))]
        self.prediction = SharedBuffer("push", num_bytes)
        self.session_id = uuid.uuid4().hex[:16]
        self.held: Prediction | None = None
        self._carried = [SharedBuffer(name, num_bytes) for name in ("anchor", "average")]
        self._motion = CarriedMotion(config.push, *map(as_tensor, self._carried))
        self._push_P = as_tensor(self.prediction)
        self._base: Base | None = None
        self._pending: Pending | None = None
        self._messages: deque[Committed | Failed | Prediction] = deque()
        self._thread = ThreadPoolExecutor(1, "sidecast-push") if config.mode == "async" else None
        self._running: Future[Pending | Failed | None] | None = None

    @property
    def has_free_slot(self) -> bool:
        return has_free(self.slots)

    def take_slot(self) -> Slot | None:
        return take_free(self.slots)

    def before_step(self, step: int, learning_rate_sum: float, partition: Partition) -> None:
        """Begins the first interval where nothing is known of the run yet: just before a step is made, and no earlier,
        since the script may load weights until then.

        Args:
            step: Optimizer steps applied so far.
            learning_rate_sum: Of those steps.
            partition: Of the run.
        """
        if self._running is not None or self._base is not None or not self.slots:
            return
        # If it cannot be read now, it is tried again; at the latest a snapshot begins the first interval.
        with contextlib.suppress(SidecastError):
            partition.read(self._motion.anchor_P)
            self._base = Base(step=step, learning_rate_sum=learning_rate_sum)

    def post(self, message: FromHook, *, may_be_lost: bool = False) -> bool:
        match message:
            case Snapshot(slot=index, step=step):
                assert self._pending is None, "a push is rejected before the next snapshot is taken"
                self.slots[index].state = SlotState.POSTED
                self._messages.append(Committed(step=step))
                if self._thread is not None:
                    self._running = self._thread.submit(self._advance, message)
                else:
                    self._end(self._advance(message))
            case Report() | Stats():
                # For a service and for metrics; there are none.
                pass
            case _:
                assert_never(message)
        return True

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        if self._running is not None and self._running.done():
            self._await()
        while self._messages:
            message = self._messages.popleft()
            if isinstance(message, Prediction):
                self.held = message
            yield message

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        if record is not None:
            self._motion.applied(self._push_P, record["weight"])
        self.held = self._pending = None

    def log(self, record: Mapping[str, Any]) -> None:
        """There is no apply log: such a run repeats itself from its seed."""

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._running = self._base = None
        self._push_P = torch.empty(0)
        self._motion = CarriedMotion(self._config.push, torch.empty(0), torch.empty(0))
        for slot in self.slots:
            slot.close()
        for buffer in (self.prediction, *self._carried):
            buffer.close()
        self.slots = []

    def state_dict(self) -> dict[str, Any] | None:
        """What is known of the run's motion, for a checkpoint; its vectors are the memory itself. None for nothing."""
        self._await()
        if self._base is None:
            return None
        pending = None
        if self._pending is not None:
            made = self._pending.prediction
            pending = {
                "base_step": made.base_step,
                "epoch": made.epoch,
                "factor": self._pending.factor,
                "relative_norm": made.relative_norm,
                "nowcast_s": made.nowcast_s,
            }
        return {
            "step": self._base.step,
            "learning_rate_sum": self._base.learning_rate_sum,
            "anchor": self._motion.anchor_P,
            "average": self._motion.carry_P,
            "pending": pending,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what ``state_dict`` gave; None: begins anew, with the run as it is before its next step.

        Raises:
            ConfigError: It is of another model.
        """
        self._await()
        self._messages.clear()
        self.held = self._pending = self._base = None
        if not self.slots:
            return
        motion = self._motion
        motion.carry_P.zero_()
        if state is None:
            return
        for saved_P, own_P in ((state["anchor"], motion.anchor_P), (state["average"], motion.carry_P)):
            if saved_P.shape != own_P.shape:
                raise ConfigError(
                    f"the checkpoint's pushes are of {saved_P.numel()} parameters; allowed: {own_P.numel()}, as this "
                    "model has"
                )
        motion.anchor_P.copy_(state["anchor"])
        motion.carry_P.copy_(state["average"])
        self._base = Base(step=state["step"], learning_rate_sum=state["learning_rate_sum"])
        if (pending := state["pending"]) is not None:
            torch.mul(motion.carry_P, pending["factor"], out=self._push_P)
            values = {key: value for key, value in pending.items() if key != "factor"}
            self._end(Pending(prediction=self._prediction(**values), factor=pending["factor"]))

    def _await(self) -> None:
        """Waits for the thread, if it has anything to do."""
        if self._running is not None:
            running, self._running = self._running, None
            self._end(running.result())

    def _end(self, made: Pending | Failed | None) -> None:
        for slot in self.slots:
            slot.free()
        if isinstance(made, Failed):
            self._messages.append(made)
        elif made is not None:
            self._pending = made
            self._messages.append(made.prediction)

    @torch.no_grad()
    def _advance(self, snapshot: Snapshot) -> Pending | Failed | None:
        """Averages the interval that a snapshot ends; where the run may wait for a push, makes it or says why not."""
        started_s = time.perf_counter()
        step, state_P = snapshot.step, self.slots[snapshot.slot].values
        base, self._base = self._base, Base(step=step, learning_rate_sum=snapshot.learning_rate_sum)
        factor: float | None = 0.0
        reason = "there is nothing to apply"
        if base is None:
            self._motion.anchor_P.copy_(state_P)
            reason = "the run's motion is known from the next snapshot on"
        else:
            lr_sum = snapshot.learning_rate_sum - base.learning_rate_sum
            factor = self._motion.advance(state_P, step=step, num_steps=step - base.step, lr_sum=lr_sum)
        if factor is None:
            self._motion.carry_P.zero_()
            reason = f"the state of step {step}, or what is known of the run's motion, is not finite"
        if factor:
            torch.mul(self._motion.carry_P, factor, out=self._push_P)
            relative_norm = jump_norm(self._push_P, state_P)
            reason = why_refused(relative_norm, self._config)
            if not reason:
                made = self._prediction(step, snapshot.epoch, relative_norm, time.perf_counter() - started_s)
                return Pending(prediction=made, factor=factor)
        return Failed(step=step, reason=reason) if self._config.push.is_active(step) else None

    def _prediction(self, base_step: int, epoch: int, relative_norm: float, nowcast_s: float) -> Prediction:
        return Prediction(
            session_id=self.session_id,
            version=base_step // self._config.interval_steps,
            base_step=base_step,
            epoch=epoch,
            horizon_intervals=1,
            # Names a prediction among ranks; there are none.
            digest=0,
            relative_norm=relative_norm,
            nowcast_s=nowcast_s,
            num_bytes=0,
        )
