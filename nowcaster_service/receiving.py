"""What a session takes in: its ranks, and the snapshots of one epoch on their way from them.

A snapshot goes RECEIVING -> COMMITTED when every rank has committed its part of it, or RECEIVING -> ABORTED with
a reason. A history is the equally spaced committed snapshots of one epoch; see docs/adr/0003-commit-rule.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from zlib import crc32

from sidecast.nowcaster_service.errors import (
    CorruptChunkError,
    MalformedError,
    MissingReferenceError,
    SaturatedError,
    WrongStateError,
)
from sidecast.nowcaster_service.joined_ranks import JoinedRanks
from sidecast.nowcaster_service.session_events import Event, NowcastTask, SessionCounts, SnapshotEvent
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Motion, RankPart, Snapshot, SnapshotState
from sidecast.nowcaster_service.vector_store import VectorFile, Vectors
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame
from sidecast.protos.shards import ShardSpec


class Receiving(ABC):
    """The receiving half of a session.

    Args:
        settings: What rank 0 announced.
        vectors: Where vectors come from.
        notify: Called with every event.
    """

    def __init__(self, settings: SessionSettings, vectors: Vectors, notify: Callable[[Event], None]) -> None:
        self.settings = settings
        self.epoch = 0
        self.counts = SessionCounts()
        self._vectors = vectors
        self._notify = notify
        self._ranks = JoinedRanks(settings.session_id, settings.manifest, settings.world_size)
        self._snapshots: dict[int, Snapshot] = {}
        self._has_pushes = settings.push is not None
        # Snapshots up to this step have been committed, aborted or overtaken: none of them begins again.
        self._last_ended_step = -1
        self._nowcast: NowcastTask | None = None
        self._is_closed = False

    @abstractmethod
    def record(self) -> None:
        """Writes down what a later service is to go on with, if this one dies, and gives back what was dropped."""

    @abstractmethod
    def _drop(self, vector: VectorFile) -> None:
        """Gives a vector back, once no record names it any more."""

    @abstractmethod
    def _due(self, snapshot: Snapshot) -> NowcastTask | None:
        """The nowcast that is due with a snapshot that was just committed."""

    @abstractmethod
    def _work_in_progress(self) -> str:
        """What of a run with pushes is still being made of the last snapshot; empty for nothing."""

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

    async def prepare(self) -> bool:
        """Lets the next vector be had at once; see ``HistoryStore.prepare``."""
        return await self._vectors.prepare(self.settings.manifest.num_elements)

    def begins(self, key: pb.ChunkKey) -> bool:
        """Whether a chunk is the first of its snapshot, which needs a vector."""
        is_due = key.id > self._last_ended_step and key.id % self.settings.snapshot_interval_steps == 0
        return is_due and key.id not in self._snapshots and not self._is_closed

    def completes(self, request: pb.CommitRequest) -> bool:
        """Whether a commit is the last one that its snapshot waits for."""
        snapshot = self._snapshots.get(request.step)
        if snapshot is None or snapshot.state is not SnapshotState.RECEIVING:
            return False
        return len(snapshot.rank_digests.keys() | {request.rank}) == self.settings.world_size

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
        base = self._base(snapshot, key) if key.dtype == pb.BF16 else None
        snapshot.take(frame, data, self._ranks.upload_plan(key.rank), base)

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
        snapshot.seal()
        self._last_ended_step = max(self._last_ended_step, step)
        self.counts.committed += 1
        self._notify(SnapshotEvent(step, epoch))
        if not self._has_pushes:
            self._discard_before(step)
        task = self._due(snapshot)
        # Before an engine writes to what an earlier record names.
        self.record()
        return task

    def _receiving(self, step: int, epoch: int, rank: int) -> Snapshot:
        interval_steps = self.settings.snapshot_interval_steps
        if step == 0 or step % interval_steps != 0:
            raise MalformedError(f"a snapshot of step {step} was sent; allowed: multiples of {interval_steps}")
        # Pushes are taken out of the run's motion: no state is of no use because of one.
        if epoch < self.epoch and not self._has_pushes:
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
        if self._has_pushes and (work := self._work_in_progress()):
            # Its vector would be that of the state before; and what is still read is written to by the next push.
            raise SaturatedError(f"{work} still being made")
        if len(receiving) >= self.settings.max_receiving:
            if self._has_pushes and rank in self._snapshots[receiving[0]].rank_digests:
                raise SaturatedError(f"other ranks' parts of step {receiving[0]} are still on their way")
            self._abort(receiving[0], f"not complete when the snapshot of step {step} began")
        vector = self._vectors.create(self.settings.manifest.num_elements)
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
                self._drop(self._snapshots.pop(step).vector)

    def begin_epoch(self, epoch: int) -> None:
        """States from before and after a jump never mix: forgets what belongs to earlier epochs."""
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        if self._has_pushes:
            return
        for step in list(self._snapshots):
            if self._snapshots[step].state is SnapshotState.RECEIVING:
                self._abort(step, f"epoch {epoch} began")
            else:
                self._drop(self._snapshots.pop(step).vector)
        # Before another state is written to their files.
        self.record()
