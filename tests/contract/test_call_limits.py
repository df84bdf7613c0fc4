"""What a caller can make the service read, hold and write: nothing without the token, and within limits with it."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.nowcaster_service.access import reading
from sidecast.nowcaster_service.access.rarely import MAX_KINDS, Rarely
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import AUTHORIZATION_KEY, SERVICE_NAME
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.refusals import RefusedError, translated
from sidecast.trainer.pipe.messages import ClientSettings
from tests.support.limits import HANG_S
from tests.support.services.calls import INVALID, refusal, send, status
from tests.support.services.harness import FakeClock, RunningService, join_request, open_request

TOKEN = "a token"
METHODS = ["Open", "Join", "Upload", "Progress", "Commit", "Watch", "Fetch", "Report", "Status"]


def raw(
    service: RunningService, method: str, messages: Iterator[bytes], **metadata: str
) -> tuple[grpc.StatusCode, str]:
    """How a call is refused whose messages are any bytes."""
    call = service.channel.stream_stream(f"/{SERVICE_NAME}/{method}")(
        messages, timeout=HANG_S, metadata=tuple(metadata.items())
    )
    with pytest.raises(grpc.RpcError) as refused:
        list(call)
    return refused.value.code(), refused.value.details()


@pytest.mark.parametrize("method", METHODS)
def test_without_the_token_nothing_is_read(tmp_path: Path, method: str) -> None:
    with RunningService(tmp_path, token=TOKEN) as service:
        # It is answered although its message never comes.
        silence: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        code, text = raw(service, method, iter(silence.get, None), authorization="Bearer wrong")
        silence.put(None)
        assert (code, text) == (grpc.StatusCode.UNAUTHENTICATED, "the call carries no token, or a wrong one")
        code, _ = raw(service, method, iter([b"\xff"]), **{AUTHORIZATION_KEY: f"Bearer {TOKEN}"})
        assert code is INVALID


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_message_is_refused_in_a_sentence_and_leaves_no_trace(
    service: RunningService, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, text = raw(service, method, iter([b"\xff\xff\xff"]))
    kind = "Chunk" if method == "Upload" else f"{method}Request"
    assert (code, text) == (INVALID, f"the call holds a message that is not a {kind}")
    assert caplog.records == []


def test_small_calls_are_small_and_large_ones_hold_so_many_things(service: RunningService) -> None:
    assert refusal(service.stub.Report, pb.ReportRequest(session_id="s" * (64 << 10))) == (
        INVALID,
        "a message of 65540 bytes was sent as ReportRequest; allowed: 65536",
    )
    many = pb.Manifest(parameters=[pb.Parameter()] * (reading.MAX_PARAMETERS + 1))
    assert refusal(service.stub.Open, pb.OpenRequest(manifest=many)) == (
        INVALID,
        "the manifest has more parameters and aliases than are allowed: 262144",
    )
    shards = pb.JoinRequest(session_id="s1", upload_shards=[pb.Shard()] * (reading.MAX_SHARDS + 1))
    assert refusal(service.stub.Join, shards) == (INVALID, "a rank names more shards than are allowed: 262144")
    long = pb.Manifest(parameters=[pb.Parameter(fqn="w" * (64 << 10))])
    assert refusal(service.stub.Open, pb.OpenRequest(manifest=long))[0] is INVALID


def test_a_model_of_many_tensors_is_served(service: RunningService) -> None:
    names = [f"model.layers.0.mlp.experts.{index}.up_proj.weight_of_one_more_expert" for index in range(75_000)]
    manifest = pb.Manifest(parameters=[pb.Parameter(fqn=name, shape=(1,)) for name in names])
    assert manifest.ByteSize() > 4 << 20
    code, text = refusal(service.stub.Open, pb.OpenRequest(manifest=manifest))
    # Read whole: what is wrong with it is only that nothing else was said.
    assert (code, text.partition(" is ")[0]) == (INVALID, "schema hash")


def test_what_is_too_large_for_grpc_itself_is_not_sent_again(service: RunningService) -> None:
    waits = {"connect_s": HANG_S, "chunk_s": HANG_S, "stream_s": HANG_S}
    client = NowcastClient(ClientSettings(endpoint=service.endpoint, token_file=None, tls_ca=None, **waits))
    with pytest.raises(RefusedError, match=r"larger than max .* does not fit into one message"):
        client.open(pb.OpenRequest(predictor_options_json=" " * reading.MAX_MESSAGE_BYTES))
    client.close()


def test_a_service_without_room_is_asked_again() -> None:
    class Saturated(grpc.RpcError):  # type: ignore[misc]
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self) -> str:
            return "larger than max"

        def trailing_metadata(self) -> Any:
            return (("sidecast-refusal", "SATURATED"),)

    assert not isinstance(translated(Saturated()), RefusedError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_id": "r" * 129}, f"run_id is '{'r' * 99}... (131 characters); allowed: at most 128 letters, digits and"),
        ({"session_id": "a\nb"}, "session_id is 'a\\nb'; allowed: at most 128 letters, digits and . _ -"),
        ({"run_id": "a run"}, "run_id is 'a run'; allowed"),
        ({"predictor": "p" * 129}, "predictor is 'ppp"),
        ({"predictor_options_json": '{"a":' * 50_000}, "predictor_options_json is nested deeper than is allowed: 64"),
        ({"predictor_options_json": f'{{"a":{"[" * 64 + "]" * 64}}}'}, "is nested deeper than is allowed: 64"),
        ({"predictor_options_json": f'{{"a":{"9" * 5000}}}'}, "predictor_options_json is not JSON: Exceeds the limit"),
        ({"predictor_options_json": f'{{"a":{"9" * 4000}}}'}, "has an integer of 13288 bits; allowed: 64"),
        ({"predictor_options_json": '{"a":NaN}'}, "predictor_options_json has the number nan; allowed: finite ones"),
        ({"predictor_options_json": '{"a":[1e999]}'}, "predictor_options_json has the number inf; allowed"),
        ({"predictor_options_json": f"[{'1,' * 5000}1]"}, "it must be a JSON object"),
    ],
)
def test_open_refuses_what_would_break_somebody_later(service: RunningService, changes: Any, words: str) -> None:
    code, text = refusal(service.stub.Open, open_request(**changes))
    assert code is INVALID
    assert words in text
    assert len(text) < 1000


def test_sessions_are_so_many_at_most(tmp_path: Path) -> None:
    with RunningService(tmp_path, max_sessions=2) as service:
        for name in ("s1", "s2"):
            service.stub.Open(open_request(session_id=name, run_id=name))
        code, text = refusal(service.stub.Open, open_request(session_id="s3", run_id="s3"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text == "2 sessions are open, as many as are allowed (sidecast serve --max-sessions)"
        # A resumed run takes its own place, and a dead job's is free.
        service.stub.Open(open_request(session_id="s4", run_id="s2"))
        service.clock.now_s += 31
        service.stub.Open(open_request(session_id="s3", run_id="s3"))


def test_one_run_may_have_so_much_history_at_most(tmp_path: Path) -> None:
    with RunningService(tmp_path, run_budget_bytes=1_000_000) as service:
        code, text = refusal(service.stub.Open, open_request())
        assert code is INVALID
        assert text.endswith("; one run may have 1000000 (sidecast serve --history-gib-per-run)")


def test_whether_a_service_is_there_needs_no_list(joined: RunningService) -> None:
    assert len(joined.stub.Status(pb.StatusRequest()).sessions) == 1
    assert len(joined.stub.Status(pb.StatusRequest(without_sessions=True)).sessions) == 0


def test_failures_are_logged_once_in_a_while(
    joined: RunningService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(joined.servicer.sessions.get("s1")), "join", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert refusal(joined.stub.Join, join_request(0))[0] is grpc.StatusCode.INTERNAL
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert send(joined, 1, 10) == [False, True]
    assert status(joined).num_committed == 1


def test_rarely_counts_what_it_leaves_out() -> None:
    clock = FakeClock()
    rarely = Rarely(60.0, clock=clock)
    assert [rarely.num_unsaid("a") for _ in range(3)] == [0, None, None]
    assert rarely.num_unsaid("b") == 0
    clock.now_s += 60
    assert [rarely.num_unsaid("a"), rarely.num_unsaid("a")] == [2, None]
    said = [rarely.num_unsaid(number) for number in range(2 * MAX_KINDS)]
    assert said.count(0) <= MAX_KINDS


def test_a_courier_shows_its_token_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("yesterday's\n")
    with RunningService(tmp_path, token=TOKEN) as service:
        waits = {"connect_s": HANG_S, "chunk_s": HANG_S, "stream_s": HANG_S}
        settings = ClientSettings(endpoint=service.endpoint, token_file=str(path), tls_ca=None, **waits)
        client = NowcastClient(settings)
        with pytest.raises(RefusedError, match="carries no token, or a wrong one"):
            client.wait_reachable()
        # A link that stands is not made anew for it.
        path.write_text(f"{TOKEN}\n")
        client.wait_reachable()
        # It is being replaced just now.
        path.write_text("")
        client.wait_reachable()
        path.unlink()
        client.wait_reachable()
        client.close()


def test_an_orchestrator_learns_whether_the_service_is_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(service: RunningService, name: str) -> bytes:
        check = service.channel.unary_unary("/grpc.health.v1.Health/Check")
        reply: bytes = check(b"\x0a" + bytes((len(name),)) + name.encode(), timeout=HANG_S)
        return reply

    with RunningService(tmp_path, token=TOKEN) as service:
        for name in ("", SERVICE_NAME):
            assert asked(service, name) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as refused:
            asked(service, "another")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        monkeypatch.setattr(service.engines, "fault", lambda: "no engine has answered for 20 s")
        assert asked(service, "") == b"\x08\x02"
        reply = service.stub.Status(pb.StatusRequest(), metadata=((AUTHORIZATION_KEY, f"Bearer {TOKEN}"),))
        assert reply.engines_fault == "no engine has answered for 20 s"
