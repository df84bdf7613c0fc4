"""What the messenger tells, and the prediction that it has brought."""

from __future__ import annotations

import logging
import time
from typing import assert_never

from sidecast.trainer.hook.messenger import Died, ForHook, Messenger
from sidecast.trainer.hook.reporting import Reporter
from sidecast.trainer.hook.slots import as_tensor
from sidecast.trainer.hook.trajectory import Trajectory
from sidecast.trainer.hook.windows import WindowLosses
from sidecast.trainer.pipe.messages import (
    Committed,
    Connected,
    Disconnected,
    Dropped,
    Failed,
    PauseChanged,
    Prediction,
    Refused,
    Sent,
)

log = logging.getLogger(__name__)


class Inbox:
    """Reads messages without waiting, and decides how long a prediction is kept.

    Args:
        messenger: Whose messages to read.
        trajectory: Of the run.
        reporter: Is told of them.
        windows: Is told of lost snapshots.
        max_staleness_steps: A prediction whose base is older is let go.
        is_linked: Whether the service is there, as far as is known.

    Attributes:
        delta: Flat fp32, this rank's owned elements; only valid while a prediction is held.
        is_linked: Whether the service is there, as far as is known.
        is_paused: Whether it wants the run to apply nothing, as far as this rank has heard: for its ballot, and for
            no decision of its own.
    """

    def __init__(
        self,
        messenger: Messenger,
        trajectory: Trajectory,
        reporter: Reporter,
        windows: WindowLosses,
        max_staleness_steps: int,
        *,
        is_linked: bool = True,
    ) -> None:
        self.delta = as_tensor(messenger.prediction)
        self.is_linked = is_linked
        self.is_paused = False
        self._messenger = messenger
        self._trajectory = trajectory
        self._reporter = reporter
        self._windows = windows
        self._max_staleness_steps = max_staleness_steps

    @property
    def held(self) -> Prediction | None:
        """The prediction that lies whole in ``delta``; None if there is none."""
        return self._messenger.held

    def poll(self, timeout_s: float = 0.0) -> None:
        """Reads what is there, and lets go of a prediction that can no longer be applied.

        Args:
            timeout_s: How long to wait for the first message.
        """
        for message in self._messenger.receive(timeout_s):
            self._on_message(message)
        if self.held is not None and (reason := self._trajectory.why_unusable(self.held, self._max_staleness_steps)):
            self.reject(reason)

    def await_prediction(self, deadline_s: float) -> bool:
        """Waits for a prediction, for the message that there will be none, or for a deadline on the monotonic clock.

        Returns:
            Whether the deadline passed with the service there.
        """
        totals = self._reporter.totals
        while self.held is None and self.is_linked and (left_s := deadline_s - time.monotonic()) > 0:
            num_lost = totals.num_failed + totals.num_dropped
            self.poll(left_s)
            if totals.num_failed + totals.num_dropped > num_lost:
                return False
        return self.held is None and self.is_linked

    def release(self, details: dict[str, float | int | str]) -> None:
        """Gives the buffer back after the prediction was applied.

        Args:
            details: For the apply log.
        """
        self._messenger.release_prediction({"action": "applied", "step": self._trajectory.step, **details})

    def let_go(self) -> None:
        """Gives the buffer back, for the same prediction to be brought anew; it is neither applied nor rejected."""
        self._messenger.release_prediction(None)

    def reject(self, reason: str) -> None:
        """Lets go of the held prediction; a local matter, since it is only ever applied by unanimous vote."""
        held = self.held
        assert held is not None
        self._reporter.totals.num_rejected += 1
        self._messenger.release_prediction(None)
        self._reporter.report("rejected", held.version)
        self._reporter.emit("rejected", version=held.version, base_step=held.base_step, reason=reason)

    def close(self) -> None:
        """Lets go of the shared memory."""
        self.delta = self.delta.new_empty(0)

    def _drop(self, step: int, reason: str) -> None:
        self._windows.lose(step)
        self._reporter.drop(step, reason)

    def _unlink(self, reason: str) -> None:
        self.is_linked = False
        self._reporter.emit("disconnected", reason=reason)

    def _on_message(self, message: ForHook) -> None:
        reporter, totals = self._reporter, self._reporter.totals
        match message:
            case Sent(step=step, reason=reason) if reason:
                self._drop(step, reason)
            case Sent():
                totals.bytes_uploaded += message.num_bytes
                self._windows.sent(message.seconds)
            case Committed(step=step):
                totals.num_committed += 1
                reporter.emit("committed", snapshot_step=step)
            case Dropped(step=step, reason=reason):
                self._drop(step, reason)
            case Prediction(session_id=session_id) if session_id != self._messenger.session_id:
                # It was on its way when a checkpoint was loaded: if it is still of use, it comes again.
                self.let_go()
            case Prediction():
                totals.bytes_fetched += message.num_bytes
                totals.nowcast_s.append(message.nowcast_s)
            case Failed(step=step, reason=reason):
                totals.num_failed += 1
                reporter.emit("failed", reason=reason, base_step=step)
            case Connected(is_paused=is_paused):
                self.is_linked, self.is_paused = True, is_paused
                reporter.emit("connected")
            case PauseChanged(is_paused=is_paused):
                self.is_paused = is_paused
            case Disconnected(reason=reason) | Died(reason=reason):
                self._unlink(reason)
                log.warning("nowcasting pauses: %s", reason)
            case Refused(reason=reason):
                self._unlink(reason)
                log.error("the nowcaster service refuses this run: %s", reason)
            case _:
                assert_never(message)
