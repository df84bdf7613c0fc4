"""The service over a real loopback gRPC server: what it does, and every refusal with its status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from sidecast.nowcaster_service.vector_store import MAX_SPARES
from sidecast.protos import nowcast_pb2 as pb
from tests.support.service_harness import (
    MANIFEST,
    WAIT_S,
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)

INVALID, WRONG_STATE, UNKNOWN = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path) as running:
        yield running


@pytest.fixture
def joined(service: RunningService) -> RunningService:
    join(service)
    return service


def join(service: RunningService, session_id: str = "s1", **changes: Any) -> None:
    service.stub.Open(open_request(session_id=session_id, **changes))
    for rank in (0, 1):
        service.stub.Join(join_request(rank, session_id))


def send(service: RunningService, seed: int, step: int, ranks: tuple[int, ...] = (0, 1), **key: Any) -> list[bool]:
    """Uploads and commits some ranks' parts; returns whether each commit completed the snapshot."""
    done = []
    for rank in ranks:
        messages = chunks(rank_bytes(state(seed), rank), rank, step, **key)
        service.stub.Upload(iter(messages))
        done.append(service.stub.Commit(commit_request(messages)).snapshot_committed)
    return done


def refusal(call: Any, *args: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return caught.value.code(), caught.value.details()


def status(service: RunningService) -> pb.SessionStatus:
    (session,) = service.stub.Status(pb.StatusRequest()).sessions
    return session


def next_event(watch: Any, kind: str) -> Any:
    for event in watch:
        if event.WhichOneof("event") == kind:
            return getattr(event, kind)
    raise AssertionError(f"the watch ended without {kind}")


def watching(service: RunningService, session_id: str = "s1") -> Any:
    return service.stub.Watch(pb.WatchRequest(session_id=session_id, rank=0), timeout=WAIT_S)


def fetched(service: RunningService, rank: int, version: int, session_id: str = "s1") -> bytes:
    request = pb.FetchRequest(session_id=session_id, rank=rank, version=version)
    return b"".join(chunk.data for chunk in service.stub.Fetch(request))


def test_a_window_becomes_a_prediction_of_which_each_rank_fetches_its_ranges(joined: RunningService) -> None:
    assert send(joined, 1, 10) == [False, True]
    assert send(joined, 2, 20) == [False, True]
    published = next_event(watching(joined), "published")
    assert (published.version, published.base_step, published.horizon_intervals) == (1, 20, 5)
    for rank in (0, 1):
        assert fetched(joined, rank, 1) == rank_bytes(state(2) - state(1), rank)
    item = status(joined)
    assert list(item.history_steps) == [10, 20]
    assert (item.num_joined, item.num_committed, item.num_published, item.num_failed) == (2, 2, 1, 0)


def test_chunks_may_come_twice_and_in_any_order_even_after_the_commit(joined: RunningService) -> None:
    messages = chunks(rank_bytes(state(1), 0), 0, 10)
    assert len(messages) > 1
    joined.stub.Upload(iter([*reversed(messages), messages[0]]))
    joined.stub.Commit(commit_request(messages))
    send(joined, 1, 10, ranks=(1,))
    joined.stub.Upload(iter(messages))
    assert not joined.stub.Commit(commit_request(messages)).snapshot_committed
    send(joined, 2, 20)
    next_event(watching(joined), "published")
    assert fetched(joined, 0, 1) == rank_bytes(state(2) - state(1), 0)
    assert status(joined).num_committed == 2


def test_a_fetch_goes_on_from_an_offset(joined: RunningService) -> None:
    send(joined, 1, 10)
    send(joined, 2, 20)
    next_event(watching(joined), "published")
    rest = joined.stub.Fetch(pb.FetchRequest(session_id="s1", rank=1, version=1, offset_bytes=4096))
    assert b"".join(chunk.data for chunk in rest) == rank_bytes(state(2) - state(1), 1)[4096:]


def test_corrupt_truncated_and_unfinished_uploads_are_no_snapshot(joined: RunningService) -> None:
    messages = chunks(rank_bytes(state(1), 0), 0, 10)
    damaged = pb.Chunk.FromString(messages[0].SerializeToString())
    damaged.data = b"\xff" + damaged.data[1:]
    code, text = refusal(joined.stub.Upload, iter([damaged]))
    assert code is grpc.StatusCode.DATA_LOSS
    assert "byte 0 of rank 0's part of step 10" in text
    joined.stub.Upload(iter(messages[:-1]))
    code, text = refusal(joined.stub.Commit, commit_request(messages))
    assert code is WRONG_STATE
    assert "has a gap at byte 65536" in text
    joined.stub.Upload(iter(messages))
    wrong = commit_request(messages)
    wrong.digest = b"0" * 16
    assert refusal(joined.stub.Commit, wrong)[0] is WRONG_STATE
    short = commit_request(messages)
    short.num_bytes -= 4
    assert refusal(joined.stub.Commit, short)[0] is INVALID
    assert status(joined).num_committed == 0
    assert not joined.stub.Commit(commit_request(messages)).snapshot_committed


def test_an_interrupted_upload_is_told_which_bytes_are_there(joined: RunningService) -> None:
    messages = chunks(rank_bytes(state(1), 0), 0, 10)
    request = pb.ProgressRequest(key=messages[0].key)

    def received() -> list[tuple[int, int]]:
        return [(item.start, item.stop) for item in joined.stub.Progress(request).received]

    assert received() == []
    joined.stub.Upload(iter(messages[1:]))
    assert received() == [(65536, 80040)]
    joined.stub.Upload(iter(messages[:1]))
    assert received() == [(0, 80040)]
    joined.stub.Commit(commit_request(messages))
    assert received() == [(0, 80040)]
    assert refusal(joined.stub.Progress, pb.ProgressRequest(key=pb.ChunkKey(session_id="nobody")))[0] is UNKNOWN


def test_bytes_that_are_no_chunk_are_refused_in_words(joined: RunningService) -> None:
    upload = joined.channel.stream_unary(
        "/sidecast.v1.Nowcaster/Upload", request_serializer=bytes, response_deserializer=pb.UploadReply.FromString
    )
    # A key field whose content is no ChunkKey.
    for message in (b"\xff\xff", b"\x0a\x02\xff\xff"):
        code, text = refusal(upload, iter([message]))
        assert code is INVALID
        assert "not a Chunk" in text


def test_a_chunk_outside_the_ranks_buffer_is_refused(joined: RunningService) -> None:
    (first, *_) = chunks(rank_bytes(state(1), 0), 0, 10)
    first.offset_bytes = 10**9
    code, text = refusal(joined.stub.Upload, iter([first]))
    assert code is INVALID
    assert "outside this rank's buffer of 80040 bytes" in text


def test_stale_epochs_odd_steps_and_strangers_are_refused(joined: RunningService) -> None:
    data = rank_bytes(state(1), 0)
    joined.stub.Report(pb.ReportRequest(session_id="s1", rank=0, version=1, outcome="APPLIED", epoch=3))
    assert refusal(joined.stub.Upload, iter(chunks(data, 0, 10, epoch=2)))[0] is WRONG_STATE
    assert refusal(joined.stub.Upload, iter(chunks(data, 0, 7, epoch=3))) == (
        INVALID,
        "a snapshot of step 7 was sent; allowed: multiples of 10",
    )
    assert refusal(joined.stub.Upload, iter(chunks(data, 9, 10, epoch=3)))[0] is INVALID
    for call in (
        lambda: joined.stub.Upload(iter(chunks(data, 0, 10, session_id="nobody"))),
        lambda: joined.stub.Join(join_request(0, "nobody")),
        lambda: list(joined.stub.Watch(pb.WatchRequest(session_id="nobody"))),
        lambda: list(joined.stub.Fetch(pb.FetchRequest(session_id="nobody"))),
        lambda: joined.stub.Report(pb.ReportRequest(session_id="nobody", outcome="APPLIED")),
        lambda: joined.stub.Commit(pb.CommitRequest(session_id="nobody")),
    ):
        assert refusal(call)[0] is UNKNOWN
    assert refusal(lambda: list(joined.stub.Fetch(pb.FetchRequest(session_id="s1", version=8)))) == (
        WRONG_STATE,
        "version 8 is not published; published: none",
    )
    assert refusal(joined.stub.Report, pb.ReportRequest(session_id="s1", outcome=77))[0] is INVALID


def test_a_new_epoch_forgets_the_states_before_it(joined: RunningService) -> None:
    send(joined, 1, 10)
    assert send(joined, 2, 20, epoch=1) == [False, True]
    item = status(joined)
    assert (item.epoch, list(item.history_steps), item.num_published) == (1, [20], 0)
    # The window of step 20 lacks step 10 now: a failure that is counted.
    assert item.num_failed == 1


def test_a_straggler_does_not_push_out_what_the_others_send(joined: RunningService) -> None:
    for step in (10, 20, 30):
        joined.stub.Upload(iter(chunks(rank_bytes(state(step), 0), 0, step)))
    assert status(joined).num_aborted == 1
    late = chunks(rank_bytes(state(10), 1), 1, 10)
    assert refusal(joined.stub.Upload, iter(late))[0] is WRONG_STATE
    assert send(joined, 20, 20) == [False, True]
    assert send(joined, 30, 30) == [False, True]
    assert status(joined).num_aborted == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_hash": "0"}, "schema hash is '0'"),
        ({"session_id": ""}, "session_id is ''"),
        ({"world_size": 0}, "world_size is 0"),
        ({"period_steps": 25}, "period_steps is 25; allowed: multiples of snapshot_interval_steps (10)"),
        ({"context_len": 1}, "context_len is 1; allowed: 2 or more"),
        ({"predictor_options_json": "[]"}, "predictor_options_json is []; it must be a JSON object"),
        ({"predictor_options_json": "{"}, "predictor_options_json is not JSON"),
        ({"horizon": pb.Horizon(schedule="magic")}, "horizon.schedule is 'magic'"),
        ({"horizon": pb.Horizon(schedule="power")}, "needs max_steps"),
        ({"max_steps": 10**15}, "max_steps is"),
        ({"horizon": pb.Horizon(power=-1.0), "max_steps": 400}, "horizon power is -1.0"),
    ],
)
def test_open_refuses_what_can_never_work(service: RunningService, changes: dict[str, Any], words: str) -> None:
    code, text = refusal(service.stub.Open, open_request(**changes))
    assert code is INVALID
    assert words in text
    assert "Traceback" not in text


def test_open_passes_on_what_the_predictor_refuses(service: RunningService) -> None:
    service.engines.refusal = "predictor is 'fake'; allowed: linear"
    assert refusal(service.stub.Open, open_request()) == (INVALID, "predictor is 'fake'; allowed: linear")


def test_open_is_idempotent_but_not_for_another_model(joined: RunningService) -> None:
    joined.stub.Open(open_request())
    assert status(joined).num_joined == 2
    other = ModelManifest.from_shapes([("a", (3,))], {"model_type": "toy"})
    code, text = refusal(joined.stub.Open, open_request(other))
    assert code is INVALID
    assert "already open for another model" in text


def test_ranges_must_cover_the_model_once(service: RunningService) -> None:
    service.stub.Open(open_request())
    service.stub.Join(join_request(0))
    code, text = refusal(service.stub.Join, join_request(1, shards=[(1, 20_000, 40_000)]))
    assert code is INVALID
    assert "no rank holds elements 10 to 15 of parameter 0" in text
    assert refusal(service.stub.Join, join_request(1, shards=[(0, 3, 99)]))[0] is INVALID
    assert refusal(service.stub.Join, join_request(1, shards=[(7, 0, 1)]))[0] is INVALID
    assert refusal(service.stub.Upload, iter(chunks(b"abcd", 1, 10)))[0] is WRONG_STATE
    service.stub.Join(join_request(1))
    assert send(service, 1, 10) == [False, True]


def test_a_session_beyond_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    needed_bytes = (2 + 5) * 4 * MANIFEST.num_elements
    with RunningService(tmp_path, history_budget_bytes=2 * needed_bytes - 1) as service:
        service.stub.Open(open_request())
        watch = watching(service)
        while not service.servicer.sessions.num_watchers("s1"):
            service.stub.Status(pb.StatusRequest())
        service.clock.now_s += 31
        code, text = refusal(service.stub.Open, open_request(session_id="s2", run_id="other"))
        watch.cancel()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"needs {needed_bytes} bytes" in text
        assert f"{needed_bytes} of {2 * needed_bytes - 1} bytes are promised" in text


def test_a_session_that_can_never_fit_is_refused_for_good(tmp_path: Path) -> None:
    needed_bytes = (2 + 5) * 4 * MANIFEST.num_elements
    with RunningService(tmp_path, history_budget_bytes=needed_bytes - 1) as service:
        code, text = refusal(service.stub.Open, open_request())
        assert code is INVALID
        assert f"needs {needed_bytes} bytes" in text


def test_a_dead_jobs_session_makes_room_for_the_next(tmp_path: Path) -> None:
    needed_bytes = (2 + 5) * 4 * MANIFEST.num_elements
    with RunningService(tmp_path, history_budget_bytes=needed_bytes) as service:
        service.stub.Open(open_request())
        # It may only be between its calls.
        code, _ = refusal(service.stub.Open, open_request(session_id="s2", run_id="restarted"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        service.clock.now_s += 31
        service.stub.Open(open_request(session_id="s2", run_id="restarted"))
        assert status(service).session_id == "s2"


def test_a_session_never_outgrows_what_it_was_promised(tmp_path: Path) -> None:
    needed_bytes = (2 + 5) * 4 * MANIFEST.num_elements
    with RunningService(tmp_path, history_budget_bytes=needed_bytes) as service:
        join(service)
        service.engines.may_finish.clear()
        for step in range(10, 90, 10):
            assert send(service, step, step) == [False, True]
        # Nowcasts that cannot be made while the first is being made are counted, not queued.
        assert status(service).num_failed == 3
        service.engines.may_finish.set()
        assert next_event(watching(service), "published").base_step == 20
        send(service, 90, 90)
        send(service, 100, 100)
        while next_event(watching(service), "published").base_step != 100:
            pass
        # Two states of the window and one prediction.
        assert service.store.used_bytes == 3 * 4 * MANIFEST.num_elements
        assert len(list(service.store.folder.glob("*.f32"))) == 3 + MAX_SPARES


def test_a_prediction_replaced_during_a_fetch_stays_whole_and_gives_its_space_back(joined: RunningService) -> None:
    send(joined, 1, 10)
    send(joined, 2, 20)
    watch = watching(joined)
    next_event(watch, "published")

    async def fetch_across_a_replacement() -> list[bytes]:
        frames = joined.servicer.fetch(pb.FetchRequest(session_id="s1", rank=0, version=1))
        pieces = [bytes((await anext(frames)).data)]
        session = joined.servicer.sessions.get("s1")
        session.prediction.task.delta.delete()  # type: ignore[union-attr]
        pieces += [bytes(frame.data) async for frame in frames]
        session.prediction = None
        return pieces

    before = joined.store.used_bytes
    assert b"".join(joined.call(fetch_across_a_replacement())) == rank_bytes(state(2) - state(1), 0)
    assert joined.store.used_bytes == before - 4 * MANIFEST.num_elements


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (NowcastAnswer(refusal="the prediction is not finite: first in a"), "not finite: first in a"),
        (RuntimeError("secret path"), "the service's log says how"),
    ],
)
def test_a_failed_nowcast_is_told_and_not_published(joined: RunningService, answer: Any, words: str) -> None:
    joined.engines.answer = answer
    watch = watching(joined)
    send(joined, 1, 10)
    next_event(watch, "committed")
    send(joined, 2, 20)
    failed = next_event(watch, "failed")
    assert failed.base_step == 20
    assert words in failed.reason
    assert "secret" not in failed.reason
    # Its working file is gone: two states remain.
    assert joined.store.used_bytes == 2 * 4 * MANIFEST.num_elements


def test_a_nowcast_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with RunningService(tmp_path, nowcast_timeout_s=0.05) as service:
        join(service)
        service.engines.may_finish.clear()
        watch = watching(service)
        send(service, 1, 10)
        send(service, 2, 20)
        assert next_event(watch, "failed").reason == "the nowcast took longer than 0.05 s"


def test_reports_are_counted_once_for_all_ranks_and_begin_an_epoch(joined: RunningService) -> None:
    for outcome, epoch in (("APPLIED", 1), ("ROLLED_BACK", 2), ("REJECTED", 2)):
        for rank in (0, 1):
            joined.stub.Report(pb.ReportRequest(session_id="s1", rank=rank, outcome=outcome, epoch=epoch))
    item = status(joined)
    assert (item.num_applied, item.num_rolled_back, item.epoch) == (1, 1, 2)


def test_a_resumed_run_adopts_its_history_up_to_its_step_and_fences_off_the_session_before(
    joined: RunningService,
) -> None:
    for step in (10, 20, 30):
        send(joined, step, step)
    watch = watching(joined)
    next_event(watch, "published")
    join(joined, "s2", resumed=True, resume_step=25, resume_epoch=0)
    assert list(watch) == []
    item = status(joined)
    assert (item.session_id, list(item.history_steps), item.num_committed) == ("s2", [20], 3)
    assert refusal(joined.stub.Upload, iter(chunks(b"", 0, 40) or chunks(b"abcd", 0, 40)))[0] is UNKNOWN
    code, text = refusal(joined.stub.Open, open_request())
    assert code is WRONG_STATE
    assert "superseded" in text
    send(joined, 5, 30, session_id="s2")
    send(joined, 6, 40, session_id="s2")
    watch = watching(joined, "s2")
    while next_event(watch, "published").version != 2:
        pass
    assert fetched(joined, 1, 2, "s2") == rank_bytes(state(6) - state(5), 1)


NUM_BYTES = 4 * MANIFEST.num_elements


def finish_nowcasts(service: RunningService) -> None:
    """Returns once no nowcast is being made."""

    async def finish() -> None:
        await asyncio.gather(*service.servicer._dispatcher._tasks)

    service.engines.may_finish.set()
    service.call(finish())


def predict(service: RunningService, *, is_published: bool) -> None:
    """Makes the window's nowcast, or only begins it."""
    if not is_published:
        service.engines.may_finish.clear()
    send(service, 1, 10)
    send(service, 2, 20)
    if is_published:
        finish_nowcasts(service)


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize("num_resumes", [1, 2])
def test_a_pending_prediction_survives_a_resume(joined: RunningService, is_published: bool, num_resumes: int) -> None:
    predict(joined, is_published=is_published)
    for index in range(num_resumes):
        join(joined, f"s{2 + index}", resumed=True, resume_step=20 + 3 * index, resume_epoch=0)
    last = f"s{1 + num_resumes}"
    watch = watching(joined, last)
    finish_nowcasts(joined)
    event = next_event(watch, "published")
    assert (event.version, event.base_step, event.epoch) == (1, 20, 0)
    delta = state(2) - state(1)
    for rank in (0, 1):
        assert fetched(joined, rank, 1, last) == rank_bytes(delta, rank)
    assert (status(joined).num_published, joined.store.used_bytes) == (1, 3 * NUM_BYTES)
    # It is the later session's now, and gives its space back when the next one comes, or the session ends.
    send(joined, 3, 30, session_id=last)
    send(joined, 4, 40, session_id=last)
    finish_nowcasts(joined)
    assert joined.store.used_bytes == 3 * NUM_BYTES
    join(joined, "anew")
    assert joined.store.used_bytes == 0


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize(
    ("resumed", "report"),
    [
        ({"resume_step": 19}, {}),
        ({"resume_step": 25, "resume_epoch": 1}, {}),
        ({"resume_step": 25, "max_relative_norm": 0.4}, {}),
        ({"resume_step": 25, "predictor_options_json": '{"scale": 2}'}, {}),
        ({"resume_step": 25}, {"outcome": "APPLIED", "epoch": 1}),
        ({"resume_step": 25}, {"outcome": "REJECTED", "rank": 1}),
    ],
)
def test_a_prediction_that_a_resumed_run_cannot_use_is_dropped(
    joined: RunningService, is_published: bool, resumed: dict[str, Any], report: dict[str, Any]
) -> None:
    predict(joined, is_published=is_published)
    if report:
        joined.stub.Report(pb.ReportRequest(session_id="s1", version=1, **report))
    join(joined, "s2", resumed=True, **resumed)
    finish_nowcasts(joined)
    code, text = refusal(fetched, joined, 0, 1, "s2")
    assert (code, text) == (WRONG_STATE, "version 1 is not published; published: none")
    assert joined.store.used_bytes == len(status(joined).history_steps) * NUM_BYTES


def test_a_run_that_starts_anew_adopts_nothing(joined: RunningService) -> None:
    send(joined, 1, 10)
    join(joined, "s2")
    assert list(status(joined).history_steps) == []
    assert joined.store.used_bytes == 0


def test_idle_sessions_expire_unless_somebody_watches(joined: RunningService) -> None:
    send(joined, 1, 10)
    watch = watching(joined)
    send(joined, 2, 20)
    next_event(watch, "committed")
    joined.clock.now_s += 61
    joined.expire_sessions()
    assert status(joined).idle_seconds == 61
    watch.cancel()
    while joined.servicer.sessions.num_watchers("s1"):
        joined.expire_sessions()
    joined.expire_sessions()
    assert not joined.stub.Status(pb.StatusRequest()).sessions
    assert joined.store.used_bytes == 0
    # It may come back: nothing superseded it.
    joined.stub.Open(open_request())


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)])
def test_every_call_needs_the_token(tmp_path: Path, metadata: tuple[tuple[str, str], ...]) -> None:
    with RunningService(tmp_path, token="secret") as service:
        stub = service.stub
        for call in (
            lambda: stub.Open(open_request(), metadata=metadata),
            lambda: stub.Status(pb.StatusRequest(), metadata=metadata),
            lambda: list(stub.Watch(pb.WatchRequest(), metadata=metadata)),
            lambda: list(stub.Fetch(pb.FetchRequest(), metadata=metadata)),
            lambda: stub.Upload(iter(chunks(b"abcd", 0, 10)), metadata=metadata),
        ):
            assert refusal(call)[0] is grpc.StatusCode.UNAUTHENTICATED
        stub.Open(open_request(), metadata=(("authorization", "Bearer secret"),))


def test_names_from_the_wire_never_become_file_names(service: RunningService, tmp_path: Path) -> None:
    join(service, "../../escaped")
    send(service, 1, 10, session_id="../../escaped")
    assert [path for path in tmp_path.rglob("*.f32") if path.parent != service.store.folder] == []
    assert not list(tmp_path.parent.glob("escaped*"))


def test_the_assembled_vector_is_the_model(joined: RunningService) -> None:
    send(joined, 1, 10)
    send(joined, 2, 20)
    next_event(watching(joined), "published")
    paths = joined.engines.requests[0].state_paths
    assert np.array_equal(np.fromfile(paths[0], np.float32), state(1))
    assert np.array_equal(np.fromfile(paths[1], np.float32), state(2))
