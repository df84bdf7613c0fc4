"""Telling others: the listeners on the training thread, the service, and the courier's metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.policies.policy import Policy
from sidecast.trainer.hook.trajectory import Trajectory
from sidecast.trainer.pipe.messages import Outcome, Prediction, Report, Stats, Totals

log = logging.getLogger(__name__)

# More than a loss scale needs to come down.
MANY_SKIPPED = 50

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
    "paused",
    "resumed",
]
PolicyName = Literal["jump", "push"]


@dataclass(frozen=True)
class NowcastEvent:
    """One thing that happened.

    Attributes:
        kind: What. A nowcast that was made and not applied is ``rejected``, one that was never made ``failed``; a
            rollback that had to be put off until every rank can carry it out is ``rollback_delayed``.
        step: The optimizer step at which this rank learned of it.
        policy: Whether the run has jumps or pushes.
        details: Numbers and reasons; for ``applied``: version, base_step, staleness_steps, horizon_intervals,
            weight, digest, relative_norm, nowcast_s; for ``accepted`` and ``rolled_back`` also num_losses_before and
            num_losses_after, which the verdict saw.
    """

    kind: EventKind
    step: int
    policy: PolicyName
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(kw_only=True)
class HookTotals(Totals):
    """Since the hook was attached; what has a value for each nowcast stays with the hook, as it grows with the run."""

    nowcast_s: list[float] = field(default_factory=list)
    verdict_losses: list[tuple[int, int]] = field(default_factory=list)
    """For each verdict on a jump, how many losses it saw: of the trend before, and after the recovery."""

    def count_verdict(self, num_before: int, num_after: int) -> None:
        """Takes note of a verdict and of how many losses it saw."""
        self.verdict_losses.append((num_before, num_after))
        self.num_verdict_losses += num_before + num_after

    def numbers(self) -> Totals:
        """A copy of what travels to the courier."""
        return Totals(**{item.name: getattr(self, item.name) for item in fields(Totals)})


class Reporter:
    """Keeps the totals and passes on what happens.

    Args:
        messenger: Takes reports to the service, and serves the metrics.
        trajectory: Of the run; its step is that of events, its epoch that of reports.
        policy: Of the run.

    Attributes:
        totals: Counted by whoever brings something about.
        listeners: Called back with every event.
        num_skipped_in_a_row: Steps that moved nothing, since the last one that did.
        is_paused: Whether the ranks have agreed in their last vote to apply nothing.
    """

    def __init__(self, messenger: Messenger, trajectory: Trajectory, policy: PolicyName) -> None:
        self.totals = HookTotals()
        self.listeners: list[Callable[[NowcastEvent], None]] = []
        self.num_skipped_in_a_row = 0
        self.is_paused = False
        self._messenger = messenger
        self._trajectory = trajectory
        self._policy = policy
        self._attached_s = time.perf_counter()

    def emit(self, kind: EventKind, **details: float | int | str) -> None:
        """Tells the listeners."""
        if self.listeners:
            event = NowcastEvent(kind, self._trajectory.step, self._policy, details)
            for callback in self.listeners:
                callback(event)

    def drop(self, snapshot_step: int, reason: str) -> None:
        """Counts a lost snapshot and tells the listeners."""
        self.totals.num_dropped += 1
        self.emit("dropped", snapshot_step=snapshot_step, reason=reason)

    def count_skipped(self, policy: Policy) -> None:
        """Counts a step that moved nothing, and says so if that goes on."""
        self.totals.num_skipped += 1
        self.num_skipped_in_a_row += 1
        if self.num_skipped_in_a_row == MANY_SKIPPED:
            log.warning(
                "%d optimizer steps in a row were skipped, for gradients that are not finite: nothing is trained, and "
                "there is nothing to nowcast",
                MANY_SKIPPED,
            )
        if self.num_skipped_in_a_row % MANY_SKIPPED == 0:
            self.post_stats(policy)

    def agree_on_pause(self, is_paused: bool) -> None:
        """Takes note of what a vote says of the run's pause, and says what is new."""
        if is_paused != self.is_paused:
            self.is_paused = is_paused
            self.emit("paused" if is_paused else "resumed")

    def report(self, outcome: Outcome, version: int) -> None:
        """Tells the service what became of a prediction."""
        step, epoch = self._trajectory.step, self._trajectory.epoch
        self._messenger.post(Report(outcome=outcome, version=version, step=step, epoch=epoch))

    def post_stats(self, policy: Policy) -> None:
        """Brings the metrics up to date."""
        stats = Stats(
            totals=self.totals.numbers(),
            step=self._trajectory.step,
            loss=policy.last_loss,
            suspended=policy.is_suspended,
            train_s=time.perf_counter() - self._attached_s,
            num_courier_deaths=self._messenger.num_deaths,
            paused=self.is_paused,
        )
        self._messenger.post(stats, may_be_lost=True)

    def summary(self, policy: Policy) -> dict[str, Any]:
        """Everything counted, as plain values."""
        return {
            "policy": self._policy,
            **asdict(self.totals),
            "train_s": time.perf_counter() - self._attached_s,
            "num_courier_deaths": self._messenger.num_deaths,
            "epoch": self._trajectory.epoch,
            "suspended": policy.is_suspended,
            "paused": self.is_paused,
        }


def log_event(event: NowcastEvent) -> None:
    """Writes one line for whoever follows the log of a run at INFO; of a pause for everybody: somebody wanted it."""
    level = logging.WARNING if event.kind in ("paused", "resumed") else logging.INFO
    if log.isEnabledFor(level):
        details = ", ".join(f"{name} {_brief(value)}" for name, value in event.details.items())
        log.log(level, "step %d: %s %s%s", event.step, event.policy, event.kind, f" ({details})" if details else "")


def _brief(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def applied_details(held: Prediction, policy: Policy, weight: float, staleness_steps: int) -> dict[str, Any]:
    """What the event of an applied prediction tells, and what its record needs for a replay.

    Args:
        held: That was applied.
        policy: Under which.
        weight: With which factor.
        staleness_steps: Steps since its base.
    """
    return {
        "version": held.version,
        "base_step": held.base_step,
        "staleness_steps": staleness_steps,
        "horizon_intervals": held.horizon_intervals,
        "weight": weight,
        "merge": policy.merge,
        "moments": policy.moments,
        "digest": f"{held.digest:016x}",
        "relative_norm": held.relative_norm,
        "nowcast_s": held.nowcast_s,
    }
