"""Telling others: the listeners on the training thread, the service, and the courier's metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sidecast.trainer.hook.events import EventKind, NowcastEvent
from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.probation import Probation
from sidecast.trainer.hook.totals import Totals


class Reporter:
    """Keeps the totals and passes on what happens.

    Args:
        courier: Takes reports to the service, and serves the metrics.

    Attributes:
        totals: Counted by whoever brings something about.
        listeners: Called back with every event.
        step: Optimizer step that events are of.
        epoch: Epoch that reports are of.
    """

    def __init__(self, courier: Messenger, step: int) -> None:
        self.totals = Totals()
        self.listeners: list[Callable[[NowcastEvent], None]] = []
        self.step = step
        self.epoch = 0
        self._courier = courier
        self._attached_s = time.perf_counter()

    def emit(self, kind: EventKind, **details: float | int | str) -> None:
        """Tells the listeners."""
        if self.listeners:
            event = NowcastEvent(kind, self.step, details)
            for callback in self.listeners:
                callback(event)

    def drop(self, reason: str) -> None:
        """Counts a lost snapshot and tells the listeners."""
        self.totals.num_dropped += 1
        self.emit("dropped", reason=reason)

    def report(self, outcome: str, version: int, *, weight: float = 0.0, reason: str = "") -> None:
        """Tells the service what became of a prediction."""
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

    def post_stats(self, probation: Probation) -> None:
        """Brings the metrics up to date."""
        totals = self.totals
        values: dict[str, float] = {
            "step": self.step,
            "blocked_s": totals.blocked_s,
            "staging_s": totals.staging_s,
            "train_s": time.perf_counter() - self._attached_s,
            "num_dropped": totals.num_dropped,
            "num_applied": totals.num_applied,
            "num_accepted": totals.num_accepted,
            "num_rolled_back": totals.num_rolled_back,
            "num_rejected": totals.num_rejected,
            "num_courier_deaths": self._courier.num_deaths,
            "suspended": int(probation.is_suspended),
        }
        if probation.last_loss is not None:
            values["loss"] = probation.last_loss
        self._courier.post({"type": "stats", "values": values}, may_be_lost=True)

    def summary(self, probation: Probation) -> dict[str, Any]:
        """Everything counted, as plain values."""
        return {
            **asdict(self.totals),
            "train_s": time.perf_counter() - self._attached_s,
            "num_courier_deaths": self._courier.num_deaths,
            "epoch": self.epoch,
            "suspended": probation.is_suspended,
        }
