"""What has happened in each run of late: for people who look, and lost with the service."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecast.nowcaster_service.session_events import Event, FailureEvent, Prediction, SnapshotEvent

MAX_RECENT = 8


@dataclass(kw_only=True)
class RecentNowcast:
    """A nowcast that was published, or was not made.

    Attributes:
        base_step: That it starts from.
        told_s: When it was, on the clock of the activity.
        version: Its number in the run; 0 if there is none.
        horizon_intervals: How far ahead it reaches, in snapshot intervals.
        relative_norm: Of the predicted change.
        nowcast_s: Seconds that it took to make.
        outcome: What the run has last said of it; empty for nothing yet.
        failure: Why there is none; empty if it was published.
    """

    base_step: int
    told_s: float
    version: int = 0
    horizon_intervals: int = 0
    relative_norm: float = 0.0
    nowcast_s: float = 0.0
    outcome: str = ""
    failure: str = ""


@dataclass
class RunActivity:
    """Of one run.

    Attributes:
        snapshot_step: Of the newest committed snapshot; None if there was none since the service began.
        committed_s: When that was, on the clock of the activity.
        recent: The newest nowcasts, oldest first.
    """

    snapshot_step: int | None = None
    committed_s: float = 0.0
    recent: deque[RecentNowcast] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))


class Activity:
    """Of all runs, by run; on one event loop.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs: dict[str, RunActivity] = {}

    def of(self, run_id: str) -> RunActivity:
        """Of one run; empty if nothing is known of it."""
        return self._runs.get(run_id) or RunActivity()

    def note(self, run_id: str, event: Event) -> None:
        """Takes note of an event of a run's session."""
        run = self._runs.setdefault(run_id, RunActivity())
        now_s = self._clock()
        match event:
            case SnapshotEvent(reason=""):
                run.snapshot_step, run.committed_s = event.step, now_s
            case Prediction():
                run.recent.append(
                    RecentNowcast(
                        base_step=event.task.base_step,
                        told_s=now_s,
                        version=event.task.version,
                        horizon_intervals=event.task.horizon_intervals,
                        relative_norm=event.relative_norm,
                        nowcast_s=event.nowcast_s,
                    )
                )
            case FailureEvent():
                run.recent.append(RecentNowcast(base_step=event.base_step, told_s=now_s, failure=event.reason))
            case _:
                pass

    def settle(self, run_id: str, version: int, outcome: str) -> None:
        """Takes note of what a run has done with a prediction."""
        for item in self.of(run_id).recent:
            if item.version == version and not item.failure:
                item.outcome = outcome

    def forget(self, run_id: str) -> None:
        """Lets go of what is known of a run that is over."""
        self._runs.pop(run_id, None)
