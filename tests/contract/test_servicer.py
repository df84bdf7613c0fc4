"""The service over a real loopback gRPC server: what it does, and every refusal with its status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from sidecast.protos import nowcast_pb2 as pb
from tests.support.services.calls import (
    INVALID,
    UNKNOWN,
    WRONG_STATE,
    commit,
    fetched,
    join,
    next_event,
    refusal,
    send,
    status,
    watching,
)
from tests.support.services.harness import (
    MANIFEST,
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)


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
    assert not commit(joined, messages)
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
    assert not commit(joined, messages)


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
    assert refusal(service.stub.Open, open_request(session_id="../../escaped"))[0] is INVALID
    join(service, "..")
    send(service, 1, 10, session_id="..")
    (run_folder,) = [path for path in service.store.folder.iterdir() if path.is_dir()]
    assert [path.parent for path in tmp_path.rglob("*.f32")] == [run_folder]
    assert run_folder.name.replace("-", "").isalnum()
    assert not list(tmp_path.parent.glob("escaped*"))


def test_the_assembled_vector_is_the_model(joined: RunningService) -> None:
    send(joined, 1, 10)
    send(joined, 2, 20)
    next_event(watching(joined), "published")
    paths = joined.engines.requests[0].state_paths
    assert np.array_equal(np.fromfile(paths[0], np.float32), state(1))
    assert np.array_equal(np.fromfile(paths[1], np.float32), state(2))
