"""What happens in a session, as values and as messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sidecast.nowcaster_service.snapshots import Snapshot
from sidecast.nowcaster_service.vector_store import VectorFile
from sidecast.protos import nowcast_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class NowcastTask:
    """One nowcast to be made; its files are pinned until ``Session.finish``."""

    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    states: tuple[VectorFile, ...]
    delta: VectorFile

    @property
    def held_files(self) -> tuple[VectorFile, ...]:
        """What an engine reads."""
        return self.states

    @property
    def written_files(self) -> tuple[VectorFile, ...]:
        """What an engine writes to."""
        return (self.delta,)


@dataclass(frozen=True, kw_only=True)
class PushTask(NowcastTask):
    """One push to be made; ``states`` is the newest state alone, ``delta`` holds the average until it is made.

    ``before`` and ``delta`` are the task's own, and nobody else's, until ``Session.finish``.

    Attributes:
        before: The snapshot before, over which the average with the own motion since is written.
        carry_digest: Of the average so far, in ``delta``; of the new one, in ``before``, once ``factor`` is known.
        begins: Whether the average begins now, and ``delta`` holds nothing yet.
        applied: What was added to the weights in between; None for nothing.
        applied_weight: With which factor.
        num_steps: Optimizer steps in between.
        learning_rate_sum: Of those steps.
        nonce: Names this very attempt.
        factor: What the new average is to be multiplied with, where an engine of a service that died has made it.
    """

    before: Snapshot
    carry_digest: int
    begins: bool
    applied: VectorFile | None
    applied_weight: float
    num_steps: int
    learning_rate_sum: float
    nonce: str
    factor: float | None = None

    @property
    def held_files(self) -> tuple[VectorFile, ...]:
        return self.states if self.applied is None else (*self.states, self.applied)

    @property
    def written_files(self) -> tuple[VectorFile, ...]:
        return (self.delta, self.before.vector)


@dataclass(frozen=True)
class Prediction:
    """A published prediction: one version, whole, checked."""

    task: NowcastTask
    digest: int
    relative_norm: float
    nowcast_s: float


@dataclass(frozen=True)
class SnapshotEvent:
    """A snapshot was committed (reason empty) or aborted."""

    step: int
    epoch: int
    reason: str = ""


@dataclass(frozen=True)
class FailureEvent:
    """A nowcast was not made, or its result not published."""

    base_step: int
    reason: str


@dataclass(frozen=True)
class FoldEvent:
    """A state went into a read-out (reason empty), or was left out of it. Couriers do not hear of it."""

    name: str
    step: int
    reason: str = ""


@dataclass(frozen=True)
class ProbeEvent:
    """What a snapshot and the read-outs with it were evaluated at, by name, and what went wrong (fault). As above."""

    step: int
    losses: Mapping[str, float]
    fault: str = ""


@dataclass
class SessionCounts:
    """Totals since the session began."""

    committed: int = 0
    aborted: int = 0
    published: int = 0
    failed: int = 0
    applied: int = 0
    accepted: int = 0
    rolled_back: int = 0
    rejected: int = 0


def pause_message(is_paused: bool) -> pb.SessionEvent:
    """How it is with the run's pause, as couriers hear of it."""
    return pb.SessionEvent(pause=pb.PauseChanged(is_paused=is_paused))


ToldEvent = SnapshotEvent | Prediction | FailureEvent
Event = ToldEvent | FoldEvent | ProbeEvent


def event_message(event: ToldEvent) -> pb.SessionEvent:
    """The event as couriers hear of it."""
    match event:
        case SnapshotEvent(reason=""):
            return pb.SessionEvent(committed=pb.SnapshotCommitted(step=event.step, epoch=event.epoch))
        case SnapshotEvent():
            return pb.SessionEvent(aborted=pb.SnapshotAborted(step=event.step, epoch=event.epoch, reason=event.reason))
        case Prediction():
            return pb.SessionEvent(
                published=pb.PredictionPublished(
                    version=event.task.version,
                    base_step=event.task.base_step,
                    epoch=event.task.epoch,
                    horizon_intervals=event.task.horizon_intervals,
                    digest=event.digest,
                    relative_norm=event.relative_norm,
                    nowcast_seconds=event.nowcast_s,
                )
            )
        case FailureEvent():
            return pb.SessionEvent(failed=pb.PredictionFailed(base_step=event.base_step, reason=event.reason))
