"""Ranks of a run with pushes that are not at the same snapshot, and a push that comes to nothing."""

from __future__ import annotations

import math
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import SaturatedError, WrongStateError
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import Event, FailureEvent, NowcastTask, SnapshotEvent
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest
from sidecast.protos.shards import ShardSpec

INTERVAL_STEPS = 10
PART = np.arange(4, dtype=np.float32)
START_STEP = 30
PUSH = PushConfig(interval_steps=INTERVAL_STEPS, start_step=START_STEP)


class Run:
    """A session, and two ranks that share the vector evenly."""

    def __init__(self, store: HistoryStore, push: PushConfig | None) -> None:
        self.events: list[Event] = []
        settings = SessionSettings(
            session_id="s",
            run_id="run",
            world_size=2,
            manifest=ModelManifest.from_shapes([("w", (2 * len(PART),))], {"model_type": "toy"}),
            context_len=2,
            snapshot_interval_steps=INTERVAL_STEPS,
            period_steps=INTERVAL_STEPS,
            horizons=(1,),
            predictor="push",
            predictor_options={},
            max_relative_norm=math.inf,
            push=push,
        )
        self.session = Session(settings, store, self.events.append)
        for rank in (0, 1):
            shards = [ShardSpec(0, rank * len(PART), (rank + 1) * len(PART))]
            self.session.join(rank, shards, shards)

    def upload(self, rank: int, step: int, *, epoch: int = 0) -> None:
        data = memoryview(PART.tobytes())
        key = pb.ChunkKey(rank=rank, id=step, epoch=epoch)
        self.session.receive(ChunkFrame(key, 0, crc32(data), data))

    def send(self, rank: int, step: int, *, learning_rate_sum: float = 1.0) -> NowcastTask | None:
        self.upload(rank, step)
        data = PART.tobytes()
        digest = buffer_digest([(0, len(data), crc32(data))])
        return self.session.commit(
            pb.CommitRequest(
                rank=rank, step=step, num_bytes=len(data), digest=digest, learning_rate_sum=learning_rate_sum
            )
        )


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path / "vectors", 1 << 20)


@pytest.fixture
def run(store: HistoryStore) -> Run:
    return Run(store, PUSH)


def test_a_rank_that_is_ahead_waits_for_the_others(run: Run) -> None:
    run.send(0, 10)
    with pytest.raises(SaturatedError, match="other ranks' parts of step 10 are still on their way"):
        run.upload(0, 20)
    run.send(1, 10)
    assert run.events == [SnapshotEvent(10, 0)]
    run.upload(0, 20)


def test_a_rank_that_has_given_a_snapshot_up_begins_the_next(run: Run) -> None:
    run.send(0, 10)
    run.upload(1, 20)
    assert run.events == [SnapshotEvent(10, 0, "not complete when the snapshot of step 20 began")]
    run.upload(0, 20)


def test_ranks_that_say_different_things_of_a_snapshot_have_none(run: Run) -> None:
    run.send(0, 10)
    with pytest.raises(WrongStateError, match="another rank"):
        run.send(1, 10, learning_rate_sum=2.0)
    with pytest.raises(WrongStateError, match="the snapshot of step 10, epoch 0, is receiving"):
        run.upload(1, 10, epoch=1)
    assert run.events == []


@pytest.mark.parametrize(("step", "num_failed"), [(START_STEP - INTERVAL_STEPS, 0), (START_STEP, 1)])
def test_a_push_that_comes_to_nothing_is_told_where_one_may_be_awaited(run: Run, step: int, num_failed: int) -> None:
    for rank in (0, 1):
        assert run.send(rank, step - INTERVAL_STEPS) is None
    run.send(0, step)
    task = run.send(1, step)
    assert task is not None
    run.session.finish(task, None)
    failures = [event for event in run.events if isinstance(event, FailureEvent)]
    assert failures == num_failed * [FailureEvent(step, "there is nothing to apply")]
    # Nothing was lost: the average goes on.
    for rank in (0, 1):
        task = run.send(rank, step + INTERVAL_STEPS)
    assert task is not None
    assert run.session.counts.failed == num_failed


@pytest.mark.parametrize(("earlier_push", "later_push"), [(None, PUSH), (PUSH, None)])
def test_a_resume_with_the_other_policy_takes_nothing_over(
    store: HistoryStore, earlier_push: PushConfig | None, later_push: PushConfig | None
) -> None:
    """Neither has a use for the other's states, which would stay until the session ends."""
    earlier, later = Run(store, earlier_push), Run(store, later_push)
    for rank in (0, 1):
        earlier.send(rank, 10)
    later.session.adopt(earlier.session, 10, 0)
    earlier.session.close()
    assert later.session.history_steps == []
    assert store.used_bytes == 0
