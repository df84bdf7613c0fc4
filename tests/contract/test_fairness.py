"""What one client does slowly, again or too much of is not at the cost of the others."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service import handover, joined_ranks, vector_store
from sidecast.nowcaster_service.config import MAX_CHUNK_BYTES
from sidecast.nowcaster_service.errors import MalformedError, WrongStateError
from sidecast.nowcaster_service.handover import TICKET_S
from sidecast.nowcaster_service.joined_ranks import JoinedRanks
from sidecast.nowcaster_service.vector_store import MAX_SPARES, HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.local_socket import short_name
from sidecast.protos.shards import ShardSpec
from tests.support.limits import HANG_S
from tests.support.local_engines import LocalEngines
from tests.support.services.calls import INVALID, join, next_event, refusal, send, watching
from tests.support.services.harness import (
    MANIFEST,
    RunningService,
    join_request,
    open_request,
    rank_bytes,
    state,
)

VECTOR_BYTES = 4 * MANIFEST.num_elements


def fetch(service: RunningService, version: int) -> Any:
    return service.servicer.fetch(pb.FetchRequest(session_id="s1", rank=0, version=version))


def test_a_client_that_does_not_read_keeps_no_more_than_was_promised(joined: RunningService) -> None:
    watch, fetches = watching(joined), []
    for version in (1, 2, 3, 4):
        for step in (20 * version - 10, 20 * version):
            assert send(joined, step, step) == [False, True]
        assert next_event(watch, "published").version == version
        fetches.append(fetch(joined, version))
        # Begun, and then left alone.
        joined.call(anext(fetches[-1]))
    # The window, the newest prediction, and one before it.
    assert joined.store.used_bytes == 4 * VECTOR_BYTES

    async def rest(frames: Any) -> bytes:
        return b"".join([bytes(frame.data) async for frame in frames])

    for version in (1, 2):
        with pytest.raises(WrongStateError, match=f"version {version} is not published any more"):
            joined.call(rest(fetches[version - 1]))
    for version in (3, 4):
        data = rank_bytes(state(20 * version) - state(20 * version - 10), 0)
        assert data.endswith(joined.call(rest(fetches[version - 1])))
    assert joined.store.used_bytes == 3 * VECTOR_BYTES


def test_a_session_that_ends_keeps_nothing(joined: RunningService) -> None:
    for step in (10, 20):
        send(joined, step, step)
    next_event(watching(joined), "published")
    left = fetch(joined, 1)
    joined.call(anext(left))
    joined.stub.Open(open_request(session_id="s2", run_id="run"))
    assert joined.store.used_bytes == 0
    with pytest.raises(WrongStateError):
        joined.call(anext(left))


def test_a_chunk_refers_to_so_much_memory_at_most(joined: RunningService) -> None:
    key = pb.ChunkKey(session_id="s1", rank=0, id=10)
    code, text = refusal(joined.stub.Upload, iter([pb.Chunk(key=key, shared_bytes=MAX_CHUNK_BYTES + 1)]))
    assert (code, text) == (
        INVALID,
        f"a chunk refers to {MAX_CHUNK_BYTES + 1} bytes of shared memory; allowed: {MAX_CHUNK_BYTES}",
    )


# --- joining


def split(world_size: int, num_parameters: int) -> tuple[ModelManifest, list[tuple[ShardSpec, ...]]]:
    numel = 8 * world_size
    manifest = ModelManifest.from_shapes(((f"w{index}", (numel,)) for index in range(num_parameters)), {})
    shards = [
        tuple(ShardSpec(parameter, 8 * rank, 8 * rank + 8) for parameter in range(num_parameters))
        for rank in range(world_size)
    ]
    return manifest, shards


@pytest.fixture
def num_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often all ranks' shards were looked at."""
    calls: list[None] = []
    check = joined_ranks.coverage_error

    def counting(*args: Any) -> str | None:
        calls.append(None)
        return check(*args)

    monkeypatch.setattr(joined_ranks, "coverage_error", counting)
    return lambda: len(calls)


def test_ranks_that_join_again_cost_nothing(num_checks: Callable[[], int]) -> None:
    manifest, shards = split(64, 20)
    ranks = JoinedRanks("s", manifest, 64)
    for _ in range(2):
        for rank, held in enumerate(shards):
            ranks.join(rank, held, held)
    assert (len(ranks), num_checks()) == (64, 1)
    plan = ranks.upload_plan(7)
    ranks.join(7, list(shards[7]), list(shards[7]))
    assert ranks.upload_plan(7) is plan
    # The same elements in another order are another plan, and no matter of the other ranks'.
    ranks.join(7, shards[7][::-1], shards[7])
    assert ranks.upload_plan(7) is not plan
    pieces = [ShardSpec(0, 56, 60), ShardSpec(0, 60, 64), *shards[7][1:]]
    ranks.join(7, pieces, shards[7])
    assert num_checks() == 1
    twice = [*shards[7], shards[7][0]]
    for wrong in (shards[8], shards[7][1:], twice):
        with pytest.raises(MalformedError, match="rank 7 names other elements than it did when all ranks had joined"):
            ranks.join(7, wrong, shards[7])


def test_ranks_that_join_again_have_lost_their_memory() -> None:
    manifest, shards = split(2, 3)
    ranks = JoinedRanks("s", manifest, 2)
    for rank, held in enumerate(shards):
        ranks.join(rank, held, held)
    ranks.share(0, [memoryview(bytearray(96))])
    ranks.join(0, shards[0], shards[0])
    assert ranks._shared == {}


# --- memory that is handed over


def connect(connection: socket.socket, path: str) -> None:
    with short_name(Path(path)) as name:
        connection.connect(name)


def hand_over(service: RunningService, rank: int, num_bytes: int) -> bytes:
    """Joins, and shows the ticket with sealed memory; what the service says to it."""
    reply = service.stub.Join(join_request(rank))
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(HANG_S)
            connect(connection, reply.local_socket)
            socket.send_fds(connection, [reply.local_ticket], [descriptor])
            return connection.recv(1)
    finally:
        os.close(descriptor)


def test_no_buffer_ends_the_handover_of_others(joined: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hand_over(joined, 0, 0) == b""
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", lambda *_: 1 / 0)
        assert hand_over(joined, 0, mmap.PAGESIZE) == b""
    assert hand_over(joined, 1, mmap.PAGESIZE) == b"k"


def test_a_connection_that_says_nothing_holds_up_nobody(
    joined: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "HANDOVER_S", 3600.0)
    path = joined.stub.Join(join_request(0)).local_socket
    with socket.socket(socket.AF_UNIX) as silent:
        connect(silent, path)
        assert hand_over(joined, 1, mmap.PAGESIZE) == b"k"


def test_tickets_are_good_for_a_minute_and_one_for_each_rank(joined: RunningService) -> None:
    taking = joined.servicer.handover
    joined.stub.Join(join_request(0))
    assert taking.num_tickets == 2
    joined.clock.now_s += TICKET_S + 1
    joined.stub.Join(join_request(1))
    assert taking.num_tickets == 1


# --- files


def test_files_are_removed_where_nobody_waits_for_it(tmp_path: Path) -> None:
    left: list[Callable[[], None]] = []
    store = HistoryStore(tmp_path, 1 << 20, remove=left.append)
    vectors = [store.create(1000) for _ in range(MAX_SPARES + 1)]
    for vector in vectors:
        vector.delete()
    store.drop_spares()
    assert store.used_bytes == 0
    # Their space is free for others from now on, and on the disk once this work is done.
    assert all(vector.path.exists() for vector in vectors)
    assert len(left) == len(vectors)
    thread = threading.Thread(target=lambda: [work() for work in left])
    thread.start()
    thread.join(HANG_S)
    assert not any(vector.path.exists() for vector in vectors)


def test_files_are_allocated_where_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, threads = vector_store.map_new_file, []

    def allocate_noted(path: Path, num_bytes: int) -> mmap.mmap:
        threads.append(threading.current_thread())
        return allocate(path, num_bytes)

    monkeypatch.setattr(vector_store, "map_new_file", allocate_noted)
    push = pb.Push(gain=1.0, time_constant_steps=20.0, start_step=1, stop_step=10**6)
    with RunningService(tmp_path, engines=LocalEngines()) as service:
        loop_thread = service.call(current_thread())
        join(service, read_outs=["ema5"], predictor="linear")
        join(service, session_id="s2", run_id="pushed", push=push, period_steps=10, predictor="")
        watch = watching(service, session_id="s2")
        for step in (10, 20, 30, 40):
            assert send(service, step, step) == [False, True]
            assert send(service, step, step, session_id="s2") == [False, True]
            # Of no motion, as the rate's sum stays the same; until then the next state must wait.
            assert next_event(watch, "failed").base_step == step
        assert loop_thread not in threads
        # Of both runs: states, and what is predicted or averaged from them.
        assert len(threads) > 5


async def current_thread() -> threading.Thread:
    return threading.current_thread()


# --- engines


def test_an_open_waits_for_an_engine_that_is_coming_back_and_not_for_one_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunningService(tmp_path, nowcast_timeout_s=0.05) as service:
        is_asked, is_back = threading.Event(), threading.Event()

        async def ready() -> None:
            is_asked.set()
            while not is_back.is_set():
                await asyncio.sleep(0.001)

        monkeypatch.setattr(service.engines, "ready", ready)
        opening = service.stub.Open.future(open_request(), timeout=HANG_S)
        assert is_asked.wait(HANG_S)
        # Longer than a check may take.
        service.call(asyncio.sleep(0.1))
        assert not opening.done()
        is_back.set()
        opening.result()
        monkeypatch.setattr(service.engines, "fault", lambda: "no engine has answered for 20 s")
        code, text = refusal(service.stub.Open, open_request(session_id="s2", run_id="other"))
        assert (code, text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no engine has answered for 20 s")


def test_a_check_that_hangs_costs_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningService(tmp_path, nowcast_timeout_s=0.05) as service:

        async def check(request: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(service.engines, "check", check)
        code, text = refusal(service.stub.Open, open_request())
        assert (code, text) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "predictor fake took longer than 0.05 s to set up",
        )
        assert service.engines.num_replaced == 1
