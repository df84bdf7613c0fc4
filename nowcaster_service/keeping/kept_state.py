"""What of a session outlives its service, as the session has it; and the record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sidecast.nowcaster_service.carried_motion import Carry
from sidecast.nowcaster_service.keeping.record import (
    AverageRecord,
    BestRecord,
    CarryRecord,
    Identity,
    PendingRecord,
    PredictionRecord,
    PushRecord,
    Record,
    StateRecord,
)
from sidecast.nowcaster_service.probing.best import Best
from sidecast.nowcaster_service.probing.losses import ProbePoint
from sidecast.nowcaster_service.read_outs.average import Average
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask, SessionCounts
from sidecast.nowcaster_service.snapshots import Snapshot


@dataclass(frozen=True, kw_only=True)
class KeptState:
    """What a session goes on with.

    Attributes:
        epoch: Of the session.
        counts: Of the session.
        settled_version: The newest prediction that the run has reported on.
        last_ended_step: No snapshot up to it begins again.
        snapshots: Committed; of a run with pushes the newest, and one before it where ``again_step`` is its step.
        prediction: The published one.
        carry: The average own motion, while no engine works on it.
        task: What is being made.
        num_tries: How many services have begun it.
        again_step: Of the snapshot from which a nowcast was being made that is to be made again from the beginning.
        averages: Read-outs by name.
        is_paused: Whether the run is to apply nothing.
        probe: Name of the probe that they are evaluated on; empty for none.
        probe_points: What it has said.
        best: Read-outs that are kept for it, each pinned.
    """

    epoch: int
    counts: SessionCounts
    settled_version: int
    last_ended_step: int
    snapshots: tuple[Snapshot, ...]
    prediction: Prediction | None
    carry: Carry | None
    task: NowcastTask | None
    num_tries: int
    again_step: int | None = None
    averages: Mapping[str, Average] = field(default_factory=dict)
    is_paused: bool = False
    probe: str = ""
    probe_points: tuple[ProbePoint, ...] = ()
    best: tuple[Best, ...] = ()

    def with_carry(self, carry: Carry) -> KeptState:
        """The same with an average own motion."""
        return replace(self, carry=carry)

    def to_go_on(self, task: NowcastTask, num_tries: int) -> KeptState:
        """The same with a nowcast of which something is left to do."""
        return replace(self, task=task, num_tries=num_tries)

    def to_begin_again(self, step: int, num_tries: int, *before: Snapshot) -> KeptState:
        """The same with a nowcast that is to be made from the beginning, of a snapshot and of one before it."""
        return replace(self, again_step=step, num_tries=num_tries, snapshots=(*before, *self.snapshots))


def record_of(kept: KeptState, identity: Identity) -> Record | None:
    """The record of what a session has; None if a later service could not tell what its files hold."""
    if not all(snapshot.checksums for snapshot in kept.snapshots):
        return None
    task = kept.task
    is_whole = task is not None and any(task.base_step == snapshot.step for snapshot in kept.snapshots)
    return Record(
        identity=identity,
        epoch=kept.epoch,
        settled_version=kept.settled_version,
        last_ended_step=kept.last_ended_step,
        counts=replace(kept.counts),
        states=tuple(_state_record(snapshot) for snapshot in kept.snapshots),
        prediction=None if kept.prediction is None else _prediction_record(kept.prediction),
        carry=None if kept.carry is None else CarryRecord(file=kept.carry.vector.path.name, digest=kept.carry.digest),
        # A nowcast of an epoch that is over cannot be made again: its states are gone.
        pending=None if task is None or not is_whole else _pending_record(task, kept.num_tries),
        averages=tuple(_average_record(name, average) for name, average in kept.averages.items()),
        is_paused=kept.is_paused,
        probe=kept.probe,
        probe_points=kept.probe_points,
        best=tuple(BestRecord(average=_average_record(item.name, item.average), loss=item.loss) for item in kept.best),
    )


def _state_record(snapshot: Snapshot) -> StateRecord:
    return StateRecord(
        step=snapshot.step,
        epoch=snapshot.epoch,
        file=snapshot.vector.path.name,
        rank_digests=b"".join(snapshot.rank_digests[rank] for rank in range(len(snapshot.rank_digests))),
        checksums=snapshot.checksums,
        motion=snapshot.motion,
    )


def _average_record(name: str, average: Average) -> AverageRecord:
    return AverageRecord(
        name=name,
        file=average.vector.path.name,
        digest=average.digest,
        begin_step=average.begin_step,
        step=average.step,
        num_snapshots=average.num_snapshots,
    )


def _prediction_record(prediction: Prediction) -> PredictionRecord:
    task = prediction.task
    return PredictionRecord(
        file=task.delta.path.name,
        version=task.version,
        base_step=task.base_step,
        epoch=task.epoch,
        horizon_intervals=task.horizon_intervals,
        digest=prediction.digest,
        relative_norm=prediction.relative_norm,
        nowcast_s=prediction.nowcast_s,
    )


def _pending_record(task: NowcastTask, num_tries: int) -> PendingRecord:
    push = None
    if isinstance(task, PushTask):
        push = PushRecord(
            nonce=task.nonce,
            before=_state_record(task.before),
            file=task.delta.path.name,
            digest=task.carry_digest,
            begins=task.begins,
            factor=task.factor,
        )
    return PendingRecord(step=task.base_step, num_tries=num_tries, push=push)
