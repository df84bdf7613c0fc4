"""What the courier says, and the prediction that it has brought."""

from __future__ import annotations

import logging
import time

from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.reporting import Reporter
from sidecast.trainer.hook.staging import as_tensor
from sidecast.trainer.hook.windows import WindowLosses
from sidecast.trainer.pipe.messages import HeldPrediction, Message

log = logging.getLogger(__name__)


class Inbox:
    """Reads the courier's messages without waiting, and holds one prediction at most.

    Args:
        courier: Who speaks.
        reporter: Is told what it said.
        windows: Is told of lost snapshots.
        max_staleness_steps: A prediction whose base is older is let go.
        is_linked: Whether the service is there, as far as is known.

    Attributes:
        held: The prediction that lies whole in ``delta``; None if there is none.
        delta: Flat fp32, this rank's owned elements; only valid while a prediction is held.
    """

    def __init__(
        self,
        courier: Messenger,
        reporter: Reporter,
        windows: WindowLosses,
        max_staleness_steps: int,
        *,
        is_linked: bool = True,
    ) -> None:
        self.held: HeldPrediction | None = None
        self.delta = as_tensor(courier.prediction)
        self._courier = courier
        self._reporter = reporter
        self._windows = windows
        self._max_staleness_steps = max_staleness_steps
        self._is_linked = is_linked
        self._is_overdue = False

    def poll(self, timeout_s: float = 0.0) -> None:
        """Takes in what has been said, and lets go of a prediction that can no longer be applied.

        Args:
            timeout_s: How long to wait for the first message.
        """
        for message in self._courier.receive(timeout_s):
            self._on_message(message)
        if self.held is not None:
            reason = self.held.why_unusable(self._reporter.step, self._reporter.epoch, self._max_staleness_steps)
            if reason:
                self.reject(reason)

    def take_slot(self, deadline_s: float | None) -> int | None:
        """A staging slot to fill; waits for one only while the service is there.

        Args:
            deadline_s: On the monotonic clock; None: not at all.
        """
        slot = self._courier.take_slot()
        if slot is not None:
            self._is_overdue = False
        if slot is not None or deadline_s is None or self._is_overdue:
            # A courier that stands still costs the time once, and not at every snapshot.
            return slot
        while slot is None and self._is_linked and (left_s := deadline_s - time.monotonic()) > 0:
            self.poll(left_s)
            slot = self._courier.take_slot()
        self._is_overdue = slot is None and self._is_linked
        return slot

    def await_prediction(self, deadline_s: float) -> None:
        """Waits for a prediction, for word that there will be none, or for the deadline on the monotonic clock."""
        totals = self._reporter.totals
        while self.held is None and self._is_linked and (left_s := deadline_s - time.monotonic()) > 0:
            num_lost = totals.num_failed + totals.num_dropped
            self.poll(left_s)
            if totals.num_failed + totals.num_dropped > num_lost:
                return
        if self.held is None and self._is_linked:
            # Late, but is it the service, or a courier that stands still and has not even sent the snapshot?
            slot = self._courier.take_slot()
            self._is_overdue = slot is None
            if slot is not None:
                self._courier.return_slot(slot)

    def release(self, held: HeldPrediction, details: dict[str, float | int | str]) -> None:
        """Gives the buffer back after the prediction was applied.

        Args:
            held: The prediction.
            details: For the apply log.
        """
        self.held = None
        self._courier.release_prediction({"action": "applied", "step": self._reporter.step, **details})

    def let_go(self) -> None:
        """Gives the buffer back, for the same prediction to be brought anew; it is neither applied nor rejected."""
        self.held = None
        self._courier.release_prediction(None)

    def reject(self, reason: str) -> None:
        """Lets go of the held prediction; a local matter, since it is only ever applied by unanimous vote."""
        held, self.held = self.held, None
        assert held is not None
        self._reporter.totals.num_rejected += 1
        self._courier.release_prediction(None)
        self._reporter.report("rejected", held.version, reason=reason)
        self._reporter.emit("rejected", version=held.version, base_step=held.base_step, reason=reason)

    def close(self) -> None:
        """Lets go of the shared memory."""
        self.held = None
        self.delta = self.delta.new_empty(0)

    def _drop(self, message: Message) -> None:
        self._windows.lose(message["step"])
        self._reporter.drop(message["step"], message["reason"])

    def _on_message(self, message: Message) -> None:
        reporter, totals = self._reporter, self._reporter.totals
        match message["type"]:
            case "sent" if message["reason"]:
                self._drop(message)
            case "sent":
                totals.bytes_uploaded += message["bytes"]
                self._windows.sent(message["seconds"])
            case "committed":
                totals.num_committed += 1
                reporter.emit("committed", snapshot_step=message["step"])
            case "dropped":
                self._drop(message)
            case "prediction" if message["session_id"] != self._courier.session_id:
                # It was on its way when a checkpoint was loaded: if it is still of use, it comes again.
                self._courier.release_prediction(None)
            case "prediction":
                totals.bytes_fetched += message["bytes"]
                totals.nowcast_s.append(message["nowcast_s"])
                self.held = HeldPrediction.of(message)
            case "failed":
                totals.num_failed += 1
                reporter.emit("failed", reason=message["reason"], base_step=message["step"])
            case "connected":
                self._is_linked = True
                reporter.emit("connected")
            case "disconnected" | "died":
                self._is_linked = False
                reporter.emit("disconnected", reason=message["reason"])
                log.warning("nowcasting pauses: %s", message["reason"])
            case "refused":
                self._is_linked = False
                reporter.emit("disconnected", reason=message["reason"])
                log.error("the nowcaster service refuses this run: %s", message["reason"])
