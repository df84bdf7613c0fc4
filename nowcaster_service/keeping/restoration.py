"""From what was found of a run to the state that its session goes on with."""

from __future__ import annotations

from pathlib import Path

from sidecast.nowcaster_service.carried_motion import Carry
from sidecast.nowcaster_service.keeping.examination import AveragedPush, Found
from sidecast.nowcaster_service.keeping.kept_state import KeptState
from sidecast.nowcaster_service.keeping.record import AverageRecord, PendingRecord, PushRecord, StateRecord
from sidecast.nowcaster_service.keeping.sealed import DIGEST_BYTES
from sidecast.nowcaster_service.probing.best import Best
from sidecast.nowcaster_service.probing.losses import ProbePoint
from sidecast.nowcaster_service.read_outs.average import Average
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Snapshot, SnapshotState
from sidecast.nowcaster_service.vector_store import HistoryStore, VectorFile


class Restoration:
    """Makes a session's state of a history, and gives back the files that it has no use for.

    Args:
        found: The history.
        folder: Where its files are.
        store: Whose folder that is.
        settings: Of the session that is to go on with it.
    """

    def __init__(self, found: Found, folder: Path, store: HistoryStore, settings: SessionSettings) -> None:
        self._found = found
        self._settings = settings
        self._averaged: dict[str, VectorFile] = {}
        self._unused = {name: store.take_over(folder / name, mapped) for name, mapped in found.maps.items()}

    def state(self, *, is_alike: bool) -> KeptState:
        """The state; to be called once.

        Args:
            is_alike: Whether the session's predictions are those of the one before; otherwise it gets the snapshots
                alone.
        """
        record = self._found.record
        kept = KeptState(
            epoch=record.epoch,
            counts=record.counts,
            settled_version=record.settled_version,
            last_ended_step=record.last_ended_step,
            snapshots=tuple(self._snapshot(state) for state in record.states),
            prediction=self._prediction() if is_alike else None,
            carry=None,
            task=None,
            num_tries=0,
            averages=self.averages(),
            probe_points=self.probe_points(),
            best=self.best(),
        )
        if is_alike:
            if record.carry is not None:
                kept = kept.with_carry(Carry(self._use(record.carry.file), record.carry.digest))
            if record.pending is not None:
                kept = self._with_pending(kept, record.pending)
        self.discard()
        return kept

    def discard(self) -> None:
        """Gives back what is not used."""
        for vector in self._unused.values():
            vector.delete()
        self._unused.clear()

    def _with_pending(self, kept: KeptState, pending: PendingRecord) -> KeptState:
        push, averaged, is_over = pending.push, self._found.push, bool(self._found.lost)
        if push is None or averaged is None:
            return kept if is_over else kept.to_begin_again(pending.step, pending.num_tries)
        newest = next(snapshot for snapshot in kept.snapshots if snapshot.step == pending.step)
        if averaged.factor is not None and not is_over:
            return kept.to_go_on(self._task(newest, push, averaged), pending.num_tries)
        if averaged.carry_file is not None:
            kept = kept.with_carry(Carry(self._use(averaged.carry_file), averaged.carry_digest))
        if is_over:
            return kept
        return kept.to_begin_again(pending.step, pending.num_tries, self._snapshot(push.before))

    def _task(self, newest: Snapshot, push: PushRecord, averaged: AveragedPush) -> PushTask:
        """What is left to do of a push whose average is whole."""
        return PushTask(
            version=newest.step // self._settings.period_steps,
            base_step=newest.step,
            epoch=newest.epoch,
            horizon_intervals=1,
            states=(newest.vector,),
            delta=self._use(push.file),
            before=self._snapshot(push.before),
            carry_digest=averaged.carry_digest,
            begins=False,
            applied=None,
            applied_weight=0.0,
            num_steps=0,
            learning_rate_sum=0.0,
            nonce=push.nonce,
            factor=averaged.factor,
        )

    def _use(self, file: str) -> VectorFile:
        return self._unused.pop(file)

    def _snapshot(self, state: StateRecord) -> Snapshot:
        digests = state.rank_digests
        starts = range(0, len(digests), DIGEST_BYTES)
        return Snapshot(
            state.step,
            state.epoch,
            self._use(state.file),
            SnapshotState.COMMITTED,
            rank_digests={rank: digests[start : start + DIGEST_BYTES] for rank, start in enumerate(starts)},
            motion=state.motion,
            checksums=state.checksums,
        )

    def averages(self) -> dict[str, Average]:
        """The read-outs that the session wants, by name; to be called once, where there is to be no state."""
        wanted = {read_out.name for read_out in self._settings.read_outs}
        averages = {
            item.name: _average(item, self._use(item.file))
            for item in self._found.record.averages
            if item.name in wanted
        }
        self._averaged = {average.vector.path.name: average.vector for average in averages.values()}
        return averages

    def best(self) -> tuple[Best, ...]:
        """What the session's own probe was best for, each pinned; to be called once, after ``averages``."""
        record, kept = self._found.record, []
        for item in record.best if record.probe == self._settings.probe else ():
            vector = self._averaged.get(item.average.file)
            if vector is None:
                vector = self._use(item.average.file)
                vector.pin()
                # It goes with its pin.
                vector.delete()
            else:
                vector.pin()
            kept.append(Best(name=item.average.name, average=_average(item.average, vector), loss=item.loss))
        return tuple(kept)

    def probe_points(self) -> tuple[ProbePoint, ...]:
        """What the session's own probe has said of the run; another probe's losses are not compared with its."""
        record = self._found.record
        return record.probe_points if record.probe == self._settings.probe else ()

    def _prediction(self) -> Prediction | None:
        item = self._found.record.prediction
        if item is None:
            return None
        task = NowcastTask(
            version=item.version,
            base_step=item.base_step,
            epoch=item.epoch,
            horizon_intervals=item.horizon_intervals,
            states=(),
            delta=self._use(item.file),
        )
        return Prediction(task, item.digest, item.relative_norm, item.nowcast_s)


def _average(item: AverageRecord, vector: VectorFile) -> Average:
    return Average(
        vector=vector,
        digest=item.digest,
        begin_step=item.begin_step,
        step=item.step,
        num_snapshots=item.num_snapshots,
    )
