"""What is recorded of a run's history, as plain data: which file holds what, and how to tell that it still does."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sidecast.nowcaster_service.keeping.sealed import DIGEST_BYTES, RecordError
from sidecast.nowcaster_service.probing.losses import ProbePoint
from sidecast.nowcaster_service.session_events import SessionCounts
from sidecast.nowcaster_service.snapshots import Motion


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose history it is.

    Attributes:
        run_id: The run.
        session_id: Its session.
        owner: Digest of the run's secret, in hexadecimal digits.
        opened: Digest of everything that the session was opened with, in hexadecimal digits.
        likeness: Digest of what its predictions depend on, in hexadecimal digits.
        schema_hash: Of the model.
        num_bytes: Of a vector of it.
        has_pushes: Whether the run has pushes instead of jumps.
        superseded: Earlier sessions of the run, which are refused.
    """

    run_id: str
    session_id: str
    owner: str
    opened: str
    likeness: str
    schema_hash: str
    num_bytes: int
    has_pushes: bool
    superseded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StateRecord:
    """A committed snapshot.

    Attributes:
        step: Its step.
        epoch: Its epoch.
        file: Name of its vector.
        rank_digests: What ranks 0, 1, ... have committed, 16 bytes each, one after another.
        checksums: Of the vector; see ``packed_checksums``.
        motion: What a run with pushes says with it.
    """

    step: int
    epoch: int
    file: str
    rank_digests: bytes
    checksums: bytes
    motion: Motion | None


@dataclass(frozen=True, kw_only=True)
class PredictionRecord:
    """A published prediction, with the fields of its event.

    Attributes:
        file: Name of its vector.
    """

    file: str
    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    digest: int
    relative_norm: float
    nowcast_s: float


@dataclass(frozen=True, kw_only=True)
class CarryRecord:
    """The average own motion of a run with pushes.

    Attributes:
        file: Name of its vector.
        digest: Of it.
    """

    file: str
    digest: int


@dataclass(frozen=True, kw_only=True)
class AverageRecord:
    """A read-out, with the fields of its ``Average``.

    Attributes:
        name: Of the read-out.
        file: Name of its vector.
    """

    name: str
    file: str
    digest: int
    begin_step: int
    step: int
    num_snapshots: int


@dataclass(frozen=True, kw_only=True)
class BestRecord:
    """A read-out that is kept for its loss; its file may also be the read-out's of now."""

    average: AverageRecord
    loss: float


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """A push that is being made of an average and the interval between two states.

    Attributes:
        nonce: Names this very attempt, in the note of the engine that has averaged.
        before: The state at the interval's beginning, over which the new average is written.
        file: Name of the vector that holds the average so far, over which the push is then written.
        digest: Of the average so far; of the new one once ``factor`` is known.
        begins: Whether there is no average so far.
        factor: What the new average is to be multiplied with; None while it is not known to be whole.
    """

    nonce: str
    before: StateRecord
    file: str
    digest: int
    begins: bool
    factor: float | None


@dataclass(frozen=True, kw_only=True)
class PendingRecord:
    """A nowcast that is being made.

    Attributes:
        step: Its base.
        num_tries: How many services have begun it.
        push: Of a run with pushes.
    """

    step: int
    num_tries: int
    push: PushRecord | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A history.

    Attributes:
        identity: Whose.
        epoch: Of the session.
        settled_version: The newest prediction that the run has reported on.
        last_ended_step: No snapshot up to it begins again.
        counts: Of the session.
        states: Committed snapshots, oldest first; of a run with pushes the newest alone.
        prediction: The published one.
        carry: The average own motion, while no engine works on it.
        pending: What is being made.
        averages: The run's read-outs.
        is_paused: Whether the run is to apply nothing.
        probe: Name of the probe that these are evaluated on; empty for none.
        probe_points: What it has said.
        best: Read-outs that are kept for their losses, best first.
    """

    identity: Identity
    epoch: int
    settled_version: int
    last_ended_step: int
    counts: SessionCounts
    states: tuple[StateRecord, ...]
    prediction: PredictionRecord | None
    carry: CarryRecord | None
    pending: PendingRecord | None
    averages: tuple[AverageRecord, ...] = ()
    is_paused: bool = False
    probe: str = ""
    probe_points: tuple[ProbePoint, ...] = ()
    best: tuple[BestRecord, ...] = ()

    def files(self) -> Iterator[str]:
        """Names of all vectors, each once."""
        averages = {average.file for average in self.averages}
        yield from (item.average.file for item in self.best if item.average.file not in averages)
        yield from (state.file for state in self.states)
        yield from (item.file for item in (self.prediction, self.carry) if item is not None)
        yield from (average.file for average in self.averages)
        if self.pending is not None and self.pending.push is not None:
            yield from (self.pending.push.before.file, self.pending.push.file)

    def content(self) -> dict[str, Any]:
        """As JSON says it."""
        content: dict[str, Any] = _plain(asdict(replace(self, probe_points=())))
        # Of some hundred numbers, which asdict would copy one by one at every step.
        content["probe_points"] = [{"step": point.step, "losses": dict(point.losses)} for point in self.probe_points]
        return content

    @staticmethod
    def of(content: dict[str, Any]) -> Record:
        """Reads what ``content`` has said.

        Raises:
            RecordError: It says something else.
        """
        try:
            return _record(content)
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(f"the record is not one of this version: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _record(content: dict[str, Any]) -> Record:
    # Of services that knew no pauses, and no probes.
    unknown: dict[str, Any] = {"is_paused": False, "probe": "", "probe_points": [], "best": []}
    content = unknown | content
    names = {item.name for item in fields(Record)}
    if content.keys() != names:
        raise ValueError(f"its fields are {', '.join(sorted(content))}")
    identity = content["identity"]
    record = Record(
        **{name: content[name] for name in ("epoch", "settled_version", "last_ended_step", "is_paused")},
        identity=Identity(**identity | {"superseded": tuple(identity["superseded"])}),
        counts=SessionCounts(**content["counts"]),
        states=tuple(_state(item) for item in content["states"]),
        prediction=None if content["prediction"] is None else PredictionRecord(**content["prediction"]),
        carry=None if content["carry"] is None else CarryRecord(**content["carry"]),
        pending=None if content["pending"] is None else _pending(content["pending"]),
        averages=tuple(AverageRecord(**item) for item in content["averages"]),
        probe=content["probe"],
        probe_points=tuple(ProbePoint(**item) for item in content["probe_points"]),
        best=tuple(BestRecord(average=AverageRecord(**item["average"]), loss=item["loss"]) for item in content["best"]),
    )
    files = list(record.files())
    if len(set(files)) != len(files) or not all(name.endswith(".f32") and "/" not in name for name in files):
        raise ValueError(f"its files are {files}")
    return record


def _pending(content: dict[str, Any]) -> PendingRecord:
    push = content["push"]
    return PendingRecord(
        step=content["step"],
        num_tries=content["num_tries"],
        push=None if push is None else PushRecord(**push | {"before": _state(push["before"])}),
    )


def _state(content: dict[str, Any]) -> StateRecord:
    decoded = {name: base64.b64decode(content[name], validate=True) for name in ("rank_digests", "checksums")}
    motion = None if content["motion"] is None else Motion(**content["motion"])
    state = StateRecord(**content | decoded | {"motion": motion})
    if len(state.rank_digests) % DIGEST_BYTES or len(state.checksums) % 8 or not state.checksums:
        raise ValueError(f"the digests of step {state.step} are cut")
    return state
