"""What a service remembers of a run for those who look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sidecast.nowcaster_service.overview.activity import MAX_RECENT, Activity
from sidecast.nowcaster_service.session_events import FailureEvent, FoldEvent, Prediction, SnapshotEvent


def prediction(version: int) -> Prediction:
    task: Any = SimpleNamespace(version=version, base_step=20 * version, horizon_intervals=5)
    return Prediction(task, digest=1, relative_norm=0.25, nowcast_s=0.5)


def test_a_run_is_remembered_by_its_newest_snapshot_and_its_last_nowcasts() -> None:
    activity = Activity(lambda: 7.0)
    activity.note("run", SnapshotEvent(10, 0))
    activity.note("run", SnapshotEvent(30, 0, "a rank is missing"))
    activity.note("run", FoldEvent("ema5", 10))
    activity.note("run", prediction(1))
    activity.note("run", FailureEvent(40, "the window lacks a snapshot"))
    known = activity.of("run")
    assert (known.snapshot_step, known.committed_s) == (10, 7.0)
    made, missed = known.recent
    assert (made.version, made.base_step, made.horizon_intervals, made.relative_norm) == (1, 20, 5, 0.25)
    assert (missed.base_step, missed.failure) == (40, "the window lacks a snapshot")


def test_a_verdict_is_of_the_version_that_it_names() -> None:
    activity = Activity(lambda: 0.0)
    for version in (1, 2):
        activity.note("run", prediction(version))
    activity.settle("run", 1, "applied")
    activity.settle("run", 1, "rolled_back")
    activity.settle("run", 9, "applied")
    activity.settle("another", 2, "applied")
    assert [item.outcome for item in activity.of("run").recent] == ["rolled_back", ""]


def test_a_long_run_is_remembered_by_as_much_as_a_short_one() -> None:
    activity = Activity(lambda: 0.0)
    for version in range(100):
        activity.note("run", prediction(version))
    assert [item.version for item in activity.of("run").recent] == list(range(100 - MAX_RECENT, 100))
    activity.forget("run")
    assert activity.of("run").snapshot_step is None
    assert not activity.of("run").recent
