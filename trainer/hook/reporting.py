"""Telling others: the listeners on the training thread, the service, and the courier's metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.probation import Probation

EventKind = Literal[
    "staged",
    "dropped",
    "committed",
    "applied",
    "accepted",
    "rolled_back",
    "rollback_delayed",
    "rejected",
    "failed",
    "suspended",
    "connected",
    "disconnected",
]


@dataclass(frozen=True)
class NowcastEvent:
    """One thing that happened.

    Attributes:
        kind: What. A nowcast that was made and not applied is ``rejected``, one that was never made ``failed``; a
            rollback that had to be put off until every rank can carry it out is ``rollback_delayed``.
        step: The optimizer step at which this rank learned of it.
        details: Numbers and reasons; for ``applied``: version, base_step, staleness_steps, horizon_intervals,
            weight, digest, relative_norm, nowcast_s.
    """

    kind: EventKind
    step: int
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass
class Totals:
    """Since the hook was attached; seconds, bytes and counts, and the seconds of each nowcast."""

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
    nowcast_s: list[float] = field(default_factory=list)


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

    def drop(self, snapshot_step: int, reason: str) -> None:
        """Counts a lost snapshot and tells the listeners."""
        self.totals.num_dropped += 1
        self.emit("dropped", snapshot_step=snapshot_step, reason=reason)

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
