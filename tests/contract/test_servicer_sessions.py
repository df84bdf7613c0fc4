"""Sessions over a real loopback gRPC server: who is let in, what a resume brings back, when a session ends."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.vector_store import MAX_SPARES
from sidecast.protos import nowcast_pb2 as pb
from tests.support.services.calls import (
    INVALID,
    UNKNOWN,
    WRONG_STATE,
    fetched,
    join,
    next_event,
    refusal,
    refusal_name,
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

NUM_BYTES = 4 * MANIFEST.num_elements


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_hash": "0"}, "schema hash is '0'"),
        ({"session_id": ""}, "session_id is ''"),
        ({"world_size": 0}, "world_size is 0"),
        ({"period_steps": 25}, "period_steps is 25; allowed: multiples of snapshot_interval_steps (10)"),
        ({"context_len": 1}, "context_len is 1; allowed: 2 to 1000"),
        ({"context_len": 1001}, "context_len is 1001; allowed: 2 to 1000"),
        ({"max_relative_norm": math.nan}, "max_relative_norm is nan; allowed: 0 (any jump) or more"),
        ({"max_relative_norm": -1.0}, "max_relative_norm is -1.0; allowed: 0 (any jump) or more"),
        ({"push": pb.Push(time_constant_steps=1.0)}, "context_len is 2 and period_steps 20; allowed with push: 2 and"),
        ({"push": pb.Push(), "period_steps": 10}, "push.time_constant_steps is 0.0; it must be above 0 and finite"),
        ({"push": pb.Push(time_constant_steps=9, gain=math.nan), "period_steps": 10}, "push.gain is nan"),
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
        assert len(list(service.store.folder.rglob("*.f32"))) == 3 + MAX_SPARES


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


def test_a_refusal_names_its_kind_beside_the_status(tmp_path: Path) -> None:
    needed_bytes = (2 + 5) * 4 * MANIFEST.num_elements
    with RunningService(tmp_path, token="secret", history_budget_bytes=needed_bytes) as service:
        stub = service.stub
        entitled = {"metadata": (("authorization", "Bearer secret"),)}
        part = chunks(rank_bytes(state(1), 0), 0, 10)
        changed = pb.Chunk.FromString(part[0].SerializeToString())
        changed.key.dtype, changed.key.base_step = pb.BF16, 20
        damaged = pb.Chunk.FromString(part[0].SerializeToString())
        damaged.crc32 ^= 1

        def named(call: Any, request: Any) -> str:
            return refusal_name(lambda: call(request, **entitled))

        assert refusal_name(stub.Status, pb.StatusRequest()) == "UNAUTHENTICATED"
        assert named(stub.Open, open_request(context_len=1)) == "MALFORMED"
        # Refused by the core, which knows of no wire.
        assert named(stub.Open, open_request(horizon=pb.Horizon(schedule="magic"))) == "MALFORMED"
        assert named(stub.Join, join_request(0)) == "UNKNOWN_SESSION"
        stub.Open(open_request(), **entitled)
        assert named(stub.Upload, iter(part)) == "NOT_JOINED"
        assert named(stub.Open, open_request(session_id="s2", run_id="other")) == "SATURATED"
        for rank in (0, 1):
            stub.Join(join_request(rank), **entitled)
        assert named(stub.Commit, commit_request(part)) == "OUTDATED"
        assert named(stub.Upload, iter([changed])) == "MISSING_REFERENCE"
        assert named(stub.Upload, iter([damaged])) == "CORRUPT"
        # What a fault of the service's is called.
        service.servicer.sessions.get = None  # type: ignore[assignment]
        assert named(stub.Join, join_request(0)) == "FAILED"
