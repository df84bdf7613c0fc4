"""What a session does with changes whose base is not what the sender thinks, and with a nowcast without room."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import CorruptChunkError, MissingReferenceError, SaturatedError, WrongStateError
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import Event, FailureEvent, NowcastTask, Prediction, SnapshotEvent
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import from_bf16, round_to_bf16
from sidecast.protos.codec import ChunkFrame, buffer_digest
from sidecast.protos.shards import ShardSpec

NUM_ELEMENTS = 12
VECTOR_BYTES = 4 * NUM_ELEMENTS
MANIFEST = ModelManifest.from_shapes([("w", (NUM_ELEMENTS,))], {"model_type": "toy"})


class Run:
    """A session, and ranks that share the vector evenly.

    Args:
        store: For its vectors.
        world_size: How many ranks.
    """

    def __init__(self, store: HistoryStore, world_size: int = 2) -> None:
        self.events: list[Event] = []
        self.world_size = world_size
        settings = SessionSettings(
            session_id="s",
            run_id="run",
            world_size=world_size,
            manifest=MANIFEST,
            context_len=2,
            snapshot_interval_steps=10,
            period_steps=20,
            horizons=(5,),
            predictor="fake",
            predictor_options={},
            max_relative_norm=1.0,
        )
        self.session = Session(settings, store, self.events.append)
        self._part = NUM_ELEMENTS // world_size
        self._digests: dict[tuple[int, int], bytes] = {}
        for rank in range(world_size):
            shards = [ShardSpec(0, rank * self._part, (rank + 1) * self._part)]
            self.session.join(rank, shards, shards)

    def _values(self, values: np.ndarray, rank: int) -> np.ndarray:
        return values[rank * self._part : (rank + 1) * self._part]

    def send(
        self, values: np.ndarray, rank: int, step: int, *, base_step: int | None = None, epoch: int = 0
    ) -> NowcastTask | None:
        """Uploads and commits a rank's part: a state, or a change since a step."""
        is_change = base_step is not None
        key = pb.ChunkKey(rank=rank, id=step, epoch=epoch, base_step=base_step or 0)
        key.dtype = pb.BF16 if is_change else pb.FP32
        part = self._values(values, rank)
        data = memoryview((round_to_bf16(part) if is_change else part).tobytes())
        self.session.receive(ChunkFrame(key, 0, crc32(data), data))
        digest = buffer_digest([(0, len(data), crc32(data))], self._digests.get((base_step or 0, rank), b""))
        self._digests[step, rank] = digest
        return self.session.commit(
            pb.CommitRequest(
                rank=rank,
                step=step,
                epoch=epoch,
                num_bytes=len(data),
                digest=digest,
                dtype=key.dtype,
                base_step=key.base_step,
            )
        )

    def send_all(
        self, values: np.ndarray, step: int, *, base_step: int | None = None, epoch: int = 0
    ) -> NowcastTask | None:
        """The same for all ranks."""
        tasks = [self.send(values, rank, step, base_step=base_step, epoch=epoch) for rank in range(self.world_size)]
        return tasks[-1]

    def state_at(self, step: int) -> np.ndarray:
        return np.frombuffer(self.session._snapshots[step].vector.view, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path / "vectors", 100 * VECTOR_BYTES)


@pytest.fixture
def run(store: HistoryStore) -> Run:
    return Run(store)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(NUM_ELEMENTS).astype(np.float32)


# --- changes and their base


def test_changes_are_added_to_the_committed_base(run: Run) -> None:
    run.send_all(vector(1), 10)
    run.send_all(vector(2), 20, base_step=10)
    assert np.array_equal(run.state_at(20), vector(1) + from_bf16(round_to_bf16(vector(2))))


def test_changes_since_a_step_that_was_never_sent_are_refused(run: Run) -> None:
    with pytest.raises(MissingReferenceError, match="a change since step 10, which is not held here: send the state"):
        run.send(vector(2), 0, 20, base_step=10)


def test_changes_since_a_snapshot_that_is_not_whole_are_refused(run: Run) -> None:
    run.send(vector(1), 0, 10)
    with pytest.raises(MissingReferenceError):
        run.send(vector(2), 0, 20, base_step=10)


def test_changes_since_themselves_are_refused(run: Run) -> None:
    with pytest.raises(MissingReferenceError):
        run.send(vector(2), 0, 20, base_step=20)


def test_changes_since_a_snapshot_before_a_jump_are_refused(run: Run) -> None:
    run.send_all(vector(1), 10)
    with pytest.raises(MissingReferenceError):
        run.send(vector(2), 0, 20, base_step=10, epoch=1)


def test_changes_never_mix_epochs_although_an_old_snapshot_were_kept(run: Run) -> None:
    run.send_all(vector(1), 10)
    run.session._snapshots[10].epoch = -1
    with pytest.raises(MissingReferenceError):
        run.send(vector(2), 0, 20, base_step=10)


def test_a_rank_that_the_adopted_base_did_not_have_is_refused(store: HistoryStore) -> None:
    before, after = Run(store, world_size=1), Run(store, world_size=2)
    before.send_all(vector(1), 10)
    after.session.adopt(before.session, 10, 0)
    with pytest.raises(MissingReferenceError, match="rank 1's part of step 20"):
        after.send(vector(2), 1, 20, base_step=10)


def test_a_base_that_is_gone_before_the_commit_is_missed_there(run: Run) -> None:
    run.send_all(vector(1), 10)
    part = memoryview(round_to_bf16(vector(2)[:6]).tobytes())
    key = pb.ChunkKey(rank=0, id=20, dtype=pb.BF16, base_step=10)
    run.session.receive(ChunkFrame(key, 0, crc32(part), part))
    run.session._snapshots.pop(10)
    commit = pb.CommitRequest(rank=0, step=20, num_bytes=len(part), dtype=pb.BF16, base_step=10)
    with pytest.raises(MissingReferenceError):
        run.session.commit(commit)


def test_changes_to_another_reconstruction_than_the_base_are_never_committed(run: Run) -> None:
    run.send_all(vector(1), 10)
    run._digests[10, 0] = b"of other bytes"
    with pytest.raises(WrongStateError, match="does not have the digest that it committed"):
        run.send(vector(2), 0, 20, base_step=10)
    assert run.session.history_steps == [10]


# --- memory that is shared


def test_memory_that_changes_between_checksum_and_read_is_noticed(run: Run) -> None:
    buffer = bytearray(vector(1)[:6].tobytes())
    run.session.share(0, [memoryview(buffer), memoryview(bytearray(24))])
    frame = ChunkFrame(pb.ChunkKey(rank=0, id=10), 0, crc32(buffer), memoryview(b""), len(buffer), 0)
    buffer[5] ^= 1
    with pytest.raises(CorruptChunkError, match="byte 0 of rank 0's part of step 10 fails its checksum"):
        run.session.receive(frame)
    buffer[5] ^= 1
    run.session.receive(frame)
    assert run.state_at(10)[:6].tobytes() == bytes(buffer)


def test_a_rank_that_joins_again_has_handed_over_nothing(run: Run) -> None:
    run.session.share(0, [memoryview(bytearray(24)), memoryview(bytearray(24))])
    shards = [ShardSpec(0, 0, 6)]
    run.session.join(0, shards, shards)
    with pytest.raises(MissingReferenceError, match="rank 0 shares no buffer 0 with a byte 23: send the bytes"):
        run.session.shared(0, 0, 0, 24)


@pytest.mark.parametrize(("index", "offset_bytes"), [(2, 0), (-3, 0), (0, 1)])
def test_memory_outside_of_what_is_shared_is_never_read(run: Run, index: int, offset_bytes: int) -> None:
    run.session.share(0, [memoryview(bytearray(24)), memoryview(bytearray(24))])
    with pytest.raises(MissingReferenceError):
        run.session.shared(0, index, offset_bytes, 24)


# --- a nowcast that finds no room


@pytest.mark.parametrize("full", ["the budget", "the disk"])
def test_a_nowcast_without_room_fails_alone(run: Run, store: HistoryStore, full: str) -> None:
    run.send_all(vector(1), 10)
    run.send(vector(2), 0, 20)
    with pytest.MonkeyPatch.context() as patch:
        if full == "the budget":
            reason = f"a vector of {VECTOR_BYTES} bytes does not fit: {2 * VECTOR_BYTES} of"
            patch.setattr(store, "budget_bytes", store.used_bytes)
        else:
            reason = f"no room for {VECTOR_BYTES} bytes at "

            def allocate(*_: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, "posix_fallocate", allocate)
        # Neither refused nor a task: the snapshot is whole, and no more than its nowcast is lost.
        assert run.send(vector(2), 1, 20) is None
    assert run.session.history_steps == [10, 20]
    assert isinstance(run.events[-2], SnapshotEvent)
    assert (run.events[-2].step, run.events[-2].reason) == (20, "")
    assert isinstance(run.events[-1], FailureEvent)
    assert run.events[-1].base_step == 20
    assert run.events[-1].reason.startswith(reason)
    assert (run.session.counts.committed, run.session.counts.failed) == (2, 1)
    assert store.used_bytes == 2 * VECTOR_BYTES
    # The next one has room again.
    run.send_all(vector(3), 30)
    task = run.send_all(vector(4), 40)
    assert task is not None
    assert task.base_step == 40


def test_a_snapshot_without_room_is_refused_and_begins_again(run: Run, store: HistoryStore) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "budget_bytes", 0)
        with pytest.raises(SaturatedError):
            run.send(vector(1), 0, 10)
    run.send_all(vector(1), 10)
    assert run.session.history_steps == [10]


# --- what a resume brings back


def predict(run: Run, step: int) -> None:
    """Publishes a prediction whose base is at a step."""
    run.send_all(vector(step - 10), step - 10)
    task = run.send_all(vector(step), step)
    assert task is not None
    run.session.finish(task, Prediction(task, digest=0, relative_norm=0.1, nowcast_s=0.1))


@pytest.mark.parametrize("num_published", [1, 2])
@pytest.mark.parametrize("settled", [(2, 1), (1, 2)])
def test_a_report_on_an_earlier_prediction_brings_no_later_one_back(
    store: HistoryStore, num_published: int, settled: tuple[int, ...]
) -> None:
    before, after = Run(store), Run(store)
    for version in range(1, num_published + 1):
        predict(before, 20 * version)
    # The second is rejected while the first is on probation, and then the first is accepted.
    for version in settled:
        before.session.settle(version)
    after.session.adopt(before.session, 45, 0)
    assert after.session.prediction is None


def test_a_resume_brings_back_what_no_report_was_about(store: HistoryStore) -> None:
    before, after = Run(store), Run(store)
    before.session.settle(1)
    predict(before, 40)
    after.session.adopt(before.session, 45, 0)
    assert after.session.prediction is not None
    assert after.session.prediction.task.version == 2
