"""What the service knows of one training run: a state machine without sockets, threads or clocks.

A snapshot goes RECEIVING -> COMMITTED when every rank has committed its part of it, or RECEIVING -> ABORTED with
a reason. A history is the equally spaced committed snapshots of one epoch; see docs/adr/0003-commit-rule.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from zlib import crc32

from sidecast.nowcaster_service.assembly import RankPlan
from sidecast.nowcaster_service.carried_motion import CarriedMotion
from sidecast.nowcaster_service.errors import (
    CorruptChunkError,
    MalformedError,
    MissingReferenceError,
    SaturatedError,
    WrongStateError,
)
from sidecast.nowcaster_service.joined_ranks import JoinedRanks
from sidecast.nowcaster_service.session_events import (
    Event,
    FailureEvent,
    NowcastTask,
    Prediction,
    SessionCounts,
    SnapshotEvent,
)
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Motion, RankPart, Snapshot, SnapshotState
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame
from sidecast.protos.shards import ShardSpec


class Session:
    """One attach of one training run.

    Args:
        settings: What rank 0 announced.
        store: Where vectors live.
        notify: Called with every SnapshotEvent, Prediction and FailureEvent.
    """

    def __init__(
        self,
        settings: SessionSettings,
        store: HistoryStore,
        notify: Callable[[Event], None],
    ) -> None:
        self.settings = settings
        self.epoch = 0
        self.counts = SessionCounts()
        self.prediction: Prediction | None = None
        self._store = store
        self._notify = notify
        self._ranks = JoinedRanks(settings.session_id, settings.manifest, settings.world_size)
        self._snapshots: dict[int, Snapshot] = {}
        self._motion = None if settings.push is None else CarriedMotion(settings, store)
        # Snapshots up to this step have been committed, aborted or overtaken: none of them begins again.
        self._last_ended_step = -1
        self._nowcast: NowcastTask | None = None
        # The newest prediction that the run has reported on.
        self._settled_version = -1
        # The session of a resumed run that goes on with the nowcast that is being made here.
        self._successor: Session | None = None
        self._is_closed = False

    # --- joining

    @property
    def num_joined(self) -> int:
        return len(self._ranks)

    @property
    def history_steps(self) -> list[int]:
        """Steps of the committed snapshots of this epoch, oldest first."""
        return sorted(step for step, item in self._snapshots.items() if item.state is SnapshotState.COMMITTED)

    def join(self, rank: int, upload_shards: Sequence[ShardSpec], fetch_shards: Sequence[ShardSpec]) -> None:
        """Takes in one rank's ranges; see ``JoinedRanks.join``."""
        self._require_open()
        self._ranks.join(rank, upload_shards, fetch_shards)

    def share(self, rank: int, buffers: Sequence[memoryview]) -> None:
        """Takes a rank's mapped buffers; see ``JoinedRanks.share``."""
        self._require_open()
        self._ranks.share(rank, buffers)

    def shared(self, rank: int, index: int, offset_bytes: int, num_bytes: int) -> memoryview:
        """A piece of one of a rank's buffers; see ``JoinedRanks.shared``."""
        return self._ranks.shared(rank, index, offset_bytes, num_bytes)

    def _require_open(self) -> None:
        if self._is_closed:
            raise WrongStateError(f"session {self.settings.session_id} was superseded by a later one of its run")

    def _check_rank(self, rank: int) -> None:
        self._require_open()
        self._ranks.require(rank)

    # --- receiving

    def receive(self, frame: ChunkFrame) -> None:
        """Stores one chunk of a snapshot; the same chunk again is harmless."""
        key, data = frame.key, frame.data
        self._check_rank(key.rank)
        if frame.shared_bytes:
            data = self.shared(key.rank, frame.shared_buffer, frame.offset_bytes, frame.shared_bytes)
        known = self._snapshots.get(key.id)
        if known is not None and known.epoch == key.epoch and key.rank in known.rank_digests:
            return
        snapshot = self._receiving(key.id, key.epoch, key.rank)
        if crc32(data) != frame.crc32:
            raise CorruptChunkError(
                f"chunk at byte {frame.offset_bytes} of rank {key.rank}'s part of step {key.id} fails its checksum"
            )
        part = snapshot.parts.get(key.rank)
        if part is None or (part.dtype, part.base_step) != (key.dtype, key.base_step):
            # A rank that turns from changes to states, because the base is gone, begins anew.
            part = snapshot.parts[key.rank] = RankPart(key.dtype, key.base_step)
        plan, vector = self._ranks.upload_plan(key.rank), snapshot.vector.view
        if key.dtype == pb.BF16:
            plan.scatter_changes(vector, self._base(snapshot, key).vector.view, frame.offset_bytes, data)
        elif key.dtype == pb.FP32:
            plan.scatter(vector, frame.offset_bytes, data)
        else:
            raise MalformedError(f"a chunk's dtype is {key.dtype}; allowed: {', '.join(pb.WireDtype.keys())}")
        part.chunks[frame.offset_bytes] = (len(data), frame.crc32)

    def _base(self, snapshot: Snapshot, key: pb.ChunkKey | pb.CommitRequest) -> Snapshot:
        """The committed snapshot that a rank's changes are since."""
        base = self._snapshots.get(key.base_step)
        is_whole = base is not None and base.state is SnapshotState.COMMITTED and base.epoch == snapshot.epoch
        if base is None or not is_whole or key.rank not in base.rank_digests:
            raise MissingReferenceError(
                f"rank {key.rank}'s part of step {snapshot.step} is a change since step {key.base_step}, "
                "which is not held here: send the state"
            )
        return base

    def progress(self, key: pb.ChunkKey) -> list[tuple[int, int]]:
        """Which bytes of a rank's part have arrived: ``(start, stop)``, disjoint and rising."""
        self._check_rank(key.rank)
        snapshot = self._snapshots.get(key.id)
        if snapshot is None or snapshot.epoch != key.epoch:
            return []
        if key.rank in snapshot.rank_digests:
            return [(0, self._ranks.upload_plan(key.rank).travelling_bytes(key.dtype))]
        part = snapshot.parts.get(key.rank)
        return [] if part is None or (part.dtype, part.base_step) != (key.dtype, key.base_step) else part.ranges

    def commit(self, request: pb.CommitRequest) -> NowcastTask | None:
        """Seals one rank's part.

        Returns:
            The nowcast that is now due, if any.

        Raises:
            WrongStateError: Bytes are missing or other bytes arrived than the rank sent.
        """
        rank, step, epoch = request.rank, request.step, request.epoch
        self._check_rank(rank)
        known = self._snapshots.get(step)
        if known is not None and known.epoch == epoch and known.rank_digests.get(rank) == request.digest:
            return None
        num_bytes = self._ranks.upload_plan(rank).travelling_bytes(request.dtype)
        if request.num_bytes != num_bytes:
            raise MalformedError(f"rank {rank} commits {request.num_bytes} bytes; its ranges hold {num_bytes}")
        snapshot = self._receiving(step, epoch, rank)
        motion = Motion(request.learning_rate_sum, request.applied_version, request.applied_weight)
        if snapshot.motion not in (None, motion):
            raise WrongStateError(f"rank {rank} says of step {step} {motion}; another rank {snapshot.motion}")
        part = snapshot.parts.get(rank)
        if part is None or (part.dtype, part.base_step) != (request.dtype, request.base_step):
            part = RankPart(request.dtype, request.base_step)
        base_digest = b"" if part.dtype == pb.FP32 else self._base(snapshot, request).rank_digests[rank]
        if fault := part.fault(num_bytes, request.digest, base_digest):
            raise WrongStateError(f"rank {rank}'s part of step {step} {fault}")
        snapshot.rank_digests[rank] = request.digest
        snapshot.motion = motion
        if len(snapshot.rank_digests) < self.settings.world_size:
            return None
        snapshot.state = SnapshotState.COMMITTED
        snapshot.parts.clear()
        self._last_ended_step = max(self._last_ended_step, step)
        self.counts.committed += 1
        self._notify(SnapshotEvent(step, epoch))
        if self._motion is not None:
            return self._due_push(snapshot, self._motion)
        self._discard_before(step)
        return self._due_nowcast(step)

    def _receiving(self, step: int, epoch: int, rank: int) -> Snapshot:
        interval_steps = self.settings.snapshot_interval_steps
        if step == 0 or step % interval_steps != 0:
            raise MalformedError(f"a snapshot of step {step} was sent; allowed: multiples of {interval_steps}")
        # Pushes are taken out of the run's motion: no state is of no use because of one.
        if epoch < self.epoch and self._motion is None:
            raise WrongStateError(f"step {step} belongs to epoch {epoch}; the session is in epoch {self.epoch}")
        if epoch > self.epoch:
            self.begin_epoch(epoch)
        snapshot = self._snapshots.get(step)
        if snapshot is not None:
            if snapshot.state is not SnapshotState.RECEIVING or snapshot.epoch != epoch:
                raise WrongStateError(f"the snapshot of step {step}, epoch {snapshot.epoch}, is {snapshot.state.value}")
            return snapshot
        if step <= self._last_ended_step:
            # Beginning it again for a straggler would push out the snapshot that all others are at.
            raise WrongStateError(f"the snapshot of step {step} was aborted; later ones have begun")
        receiving = sorted(s for s, item in self._snapshots.items() if item.state is SnapshotState.RECEIVING)
        if self._motion is not None and self._nowcast is not None:
            # Its vector is that of the state before, which the engine still reads.
            raise SaturatedError(f"the push of step {self._nowcast.base_step} is still being made")
        if len(receiving) >= self.settings.max_receiving:
            if self._motion is not None and rank in self._snapshots[receiving[0]].rank_digests:
                raise SaturatedError(f"other ranks' parts of step {receiving[0]} are still on their way")
            self._abort(receiving[0], f"not complete when the snapshot of step {step} began")
        vector = self._store.create(self.settings.manifest.num_elements)
        snapshot = self._snapshots[step] = Snapshot(step, epoch, vector)
        return snapshot

    def _abort(self, step: int, reason: str) -> None:
        snapshot = self._snapshots.pop(step)
        snapshot.state = SnapshotState.ABORTED
        snapshot.vector.delete()
        self._last_ended_step = max(self._last_ended_step, step)
        self.counts.aborted += 1
        self._notify(SnapshotEvent(step, snapshot.epoch, reason))

    def _discard_before(self, newest: int) -> None:
        """Drops what no later window can use."""
        first = newest - (self.settings.context_len - 1) * self.settings.snapshot_interval_steps
        for step in [step for step in self._snapshots if step < newest]:
            snapshot = self._snapshots[step]
            if snapshot.state is SnapshotState.RECEIVING:
                self._abort(step, f"not complete when the snapshot of step {newest} was")
            elif step < first:
                self._snapshots.pop(step).vector.delete()

    def begin_epoch(self, epoch: int) -> None:
        """States from before and after a jump never mix: forgets what belongs to earlier epochs."""
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        if self._motion is not None:
            return
        for step in list(self._snapshots):
            if self._snapshots[step].state is SnapshotState.RECEIVING:
                self._abort(step, f"epoch {epoch} began")
            else:
                self._snapshots.pop(step).vector.delete()

    # --- predicting

    def _due_nowcast(self, step: int) -> NowcastTask | None:
        settings = self.settings
        if step % settings.period_steps != 0:
            return None
        window = settings.window(step)
        missing = [item for item in window if item not in self._snapshots]
        if missing:
            self.fail(step, f"the window lacks the snapshots of steps {missing}")
            return None
        if self._nowcast is not None:
            # A queue of nowcasts, each holding a window on disk, would outgrow what was budgeted at Open.
            self.fail(step, f"the nowcast of step {self._nowcast.base_step} is still being made")
            return None
        try:
            delta = self._store.create(settings.manifest.num_elements)
        except SaturatedError as error:
            # The snapshot is committed all the same: its commit must not be refused for the prediction's sake.
            self.fail(step, str(error))
            return None
        task = NowcastTask(
            version=step // settings.period_steps,
            base_step=step,
            epoch=self.epoch,
            horizon_intervals=settings.horizon_at(step),
            states=tuple(self._snapshots[item].vector for item in window),
            delta=delta,
        )
        return self._begin(task)

    def _due_push(self, snapshot: Snapshot, motion: CarriedMotion) -> NowcastTask | None:
        if motion.base is not None:
            del self._snapshots[motion.base.step]
        task = motion.advance(snapshot, self.prediction)
        if isinstance(task, str):
            if motion.is_due(snapshot.step):
                self.fail(snapshot.step, task)
            return None
        return self._begin(task)

    def _begin(self, task: NowcastTask) -> NowcastTask:
        self._nowcast = task
        for vector in task.held_files:
            vector.pin()
        return task

    def finish(self, task: NowcastTask, prediction: Prediction | None, reason: str = "") -> None:
        """Takes a nowcast's result: publishes the prediction, or counts the failure. A push may come to nothing."""
        if self._successor is not None:
            self._successor.finish(task, prediction, reason)
            return
        self._nowcast = None
        if reason:
            # An engine that was given up on may still be reading the states and writing its delta.
            for vector in (*task.held_files, task.delta):
                vector.forbid_reuse()
        if self._motion is not None:
            self._motion.end(has_failed=bool(reason))
        for vector in task.held_files:
            vector.unpin()
        if prediction is None or self._is_closed:
            task.delta.delete()
            if reason or self._motion is None or self._motion.is_due(task.base_step):
                self.fail(task.base_step, reason or "there is nothing to apply")
            return
        if self.prediction is not None:
            self.prediction.task.delta.delete()
        self.prediction = prediction
        self.counts.published += 1
        self._notify(prediction)

    def settle(self, version: int) -> None:
        """Takes note that the run has decided about a prediction: no resume brings it, or an earlier one, back."""
        self._settled_version = max(self._settled_version, version)

    def fail(self, base_step: int, reason: str) -> None:
        """Counts a nowcast that was not made."""
        self.counts.failed += 1
        self._notify(FailureEvent(base_step, reason))

    def fetch_plan(self, rank: int, version: int) -> tuple[RankPlan, Prediction]:
        """What a rank may read of the published prediction.

        Raises:
            WrongStateError: That version is not, or no longer, published.
        """
        self._check_rank(rank)
        prediction = self.prediction
        if prediction is None or prediction.task.version != version:
            current = "none" if prediction is None else f"version {prediction.task.version}"
            raise WrongStateError(f"version {version} is not published; published: {current}")
        return self._ranks.fetch_plan(rank), prediction

    # --- from one session of a run to the next

    def adopt(self, earlier: Session, step: int, epoch: int) -> None:
        """Takes over what a resumed run's earlier session has of one epoch, up to a step.

        The snapshots; and a prediction that the run has not decided about, or that is still being made, if its base
        is among them.
        """
        self.epoch = epoch
        # A copy: the earlier session may still count the end of a nowcast.
        self.counts = replace(earlier.counts)
        is_other_model = earlier.settings.manifest.schema_hash != self.settings.manifest.schema_hash
        if is_other_model or (self._motion is None) != (earlier._motion is None):
            return
        predicts_alike = self.settings.predicts_like(earlier.settings)
        if self._motion is None or earlier._motion is None:
            for known in list(earlier._snapshots):
                snapshot = earlier._snapshots[known]
                if snapshot.state is SnapshotState.COMMITTED and snapshot.epoch == epoch and known <= step:
                    self._snapshots[known] = earlier._snapshots.pop(known)
            oldest_step, kept_epoch, settled_version = 0, epoch, earlier._settled_version
        else:
            base = self._motion.adopt(earlier._motion, step, epoch) if predicts_alike else None
            if base is None:
                return
            self._snapshots[base.step] = earlier._snapshots.pop(base.step)
            # Also one that was applied: it is to be taken out of the motion since.
            oldest_step, kept_epoch, settled_version = base.step, base.epoch, -1

        def is_kept(task: NowcastTask) -> bool:
            is_alike = predicts_alike and task.epoch == kept_epoch and task.version > settled_version
            return is_alike and oldest_step <= task.base_step <= step

        if earlier.prediction is not None and is_kept(earlier.prediction.task):
            self.prediction, earlier.prediction = earlier.prediction, None
        if earlier._nowcast is not None and is_kept(earlier._nowcast):
            self._nowcast, earlier._successor = earlier._nowcast, self

    def close(self) -> None:
        """Refuses everything from now on and gives all space back."""
        self._is_closed = True
        if self._motion is not None:
            self._motion.close()
        for snapshot in self._snapshots.values():
            snapshot.vector.delete()
        self._snapshots.clear()
        self._ranks.forget_shared()
        if self.prediction is not None:
            self.prediction.task.delta.delete()
            self.prediction = None
