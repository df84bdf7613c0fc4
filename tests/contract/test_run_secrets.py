"""A run belongs to who opened it: the token that all clients share is not the key to everybody's runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.limits import HANG_S
from tests.support.services.calls import INVALID, next_event
from tests.support.services.harness import (
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)

OWN, OTHER = ((RUN_SECRET_KEY, "the victim's own secret"),), ((RUN_SECRET_KEY, "what an intruder makes up"),)
FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED


def send(service: RunningService, step: int) -> None:
    for rank in (0, 1):
        messages = chunks(rank_bytes(state(step), rank), rank, step)
        service.stub.Upload(iter(messages), metadata=OWN)
        service.stub.Commit(commit_request(messages), metadata=OWN)


@pytest.fixture
def victim(service: RunningService) -> Iterator[RunningService]:
    """A service with one protected run, of which a prediction is published."""
    service.stub.Open(open_request(protocol_version=PROTOCOL_VERSION), metadata=OWN)
    for rank in (0, 1):
        service.stub.Join(join_request(rank), metadata=OWN)
    watch = service.stub.Watch(pb.WatchRequest(session_id="s1"), timeout=HANG_S, metadata=OWN)
    for step in (10, 20):
        send(service, step)
    next_event(watch, "published")
    yield service
    watch.cancel()


def stream(call: Any) -> Callable[..., Any]:
    return lambda request, metadata: next(iter(call(request, timeout=HANG_S, metadata=metadata)))


CALLS: dict[str, Callable[[Any], tuple[Callable[..., Any], Any]]] = {
    "adopts its states": lambda stub: (
        stub.Open,
        open_request(session_id="s2", resumed=True, resume_step=2**63, protocol_version=PROTOCOL_VERSION),
    ),
    "supersedes it": lambda stub: (stub.Open, open_request(session_id="s2", protocol_version=PROTOCOL_VERSION)),
    "supersedes it as an older trainer": lambda stub: (stub.Open, open_request(session_id="s2")),
    "opens its session again": lambda stub: (stub.Open, open_request(protocol_version=PROTOCOL_VERSION)),
    "ends its epoch": lambda stub: (
        stub.Report,
        pb.ReportRequest(session_id="s1", rank=0, version=1, outcome="APPLIED", epoch=2**63),
    ),
    "overtakes its steps": lambda stub: (stub.Upload, chunks(b"abcd", 0, 2**62)),
    "joins in its place and drops its buffers": lambda stub: (stub.Join, join_request(0)),
    "fetches its prediction": lambda stub: (
        stream(stub.Fetch),
        pb.FetchRequest(session_id="s1", rank=0, version=1),
    ),
    "watches it": lambda stub: (stream(stub.Watch), pb.WatchRequest(session_id="s1")),
    "asks what has arrived": lambda stub: (
        stub.Progress,
        pb.ProgressRequest(key=pb.ChunkKey(session_id="s1", rank=0, id=10)),
    ),
    "commits for it": lambda stub: (stub.Commit, commit_request(chunks(rank_bytes(state(1), 0), 0, 30))),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("metadata", [OTHER, ()])
def test_who_has_not_the_runs_secret_can_do_nothing_to_it(victim: RunningService, what: str, metadata: Any) -> None:
    call, request = CALLS[what](victim.stub)
    if isinstance(request, pb.OpenRequest) and request.protocol_version and not metadata:
        # Whoever knows of secrets is told at once that one is missing.
        expected = INVALID
    else:
        expected = FORBIDDEN
    with pytest.raises(grpc.RpcError) as refused:
        call(iter(request) if isinstance(request, list) else request, metadata=metadata)
    assert refused.value.code() is expected
    assert "intruder" not in refused.value.details()
    before = victim.servicer.sessions.get("s1").counts.committed
    send(victim, 30)
    assert victim.servicer.sessions.get("s1").counts.committed == before + 1
    assert victim.servicer.sessions.get("s1").epoch == 0


def test_who_has_it_resumes_the_run(victim: RunningService) -> None:
    resumed = open_request(session_id="s2", resumed=True, resume_step=20, protocol_version=PROTOCOL_VERSION)
    victim.stub.Open(resumed, metadata=OWN)
    assert victim.servicer.sessions.get("s2").history_steps == [10, 20]
    # The secret goes on with the run.
    with pytest.raises(grpc.RpcError) as refused:
        victim.stub.Join(join_request(0, "s2"), metadata=OTHER)
    assert refused.value.code() is FORBIDDEN


def test_a_run_without_a_secret_gets_one_when_its_trainer_is_updated(service: RunningService) -> None:
    service.stub.Open(open_request())
    service.stub.Open(
        open_request(session_id="s2", resumed=True, resume_step=20, protocol_version=PROTOCOL_VERSION), metadata=OWN
    )
    with pytest.raises(grpc.RpcError) as refused:
        service.stub.Join(join_request(0, "s2"))
    assert refused.value.code() is FORBIDDEN


@pytest.mark.parametrize("secret", ["", "fifteen letters", "x" * 129])
def test_a_secret_is_neither_missing_nor_short(service: RunningService, secret: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        service.stub.Open(
            open_request(protocol_version=PROTOCOL_VERSION), metadata=((RUN_SECRET_KEY, secret),) if secret else ()
        )
    assert (refused.value.code(), refused.value.details()) == (
        INVALID,
        f"the run's secret has {len(secret)} characters; allowed: 16 to 128",
    )


def test_the_id_of_a_protected_session_is_shown_to_its_run_alone(victim: RunningService) -> None:
    def shown(metadata: Any) -> str:
        (session,) = victim.stub.Status(pb.StatusRequest(), metadata=metadata).sessions
        return str(session.session_id)

    assert (shown(OWN), shown(OTHER), shown(())) == ("s1", "", "")


def test_a_session_is_opened_again_as_the_same_or_not_at_all(victim: RunningService) -> None:
    again = open_request(protocol_version=PROTOCOL_VERSION)
    victim.stub.Open(again, metadata=OWN)
    for field, value in (("world_size", 3), ("predictor", "other"), ("run_id", "other"), ("context_len", 4)):
        changed = open_request(protocol_version=PROTOCOL_VERSION, **{field: value})
        with pytest.raises(grpc.RpcError) as refused:
            victim.stub.Open(changed, metadata=OWN)
        assert refused.value.code() is INVALID
        assert f"session s1 is already open with another {field}: " in refused.value.details()
        assert refused.value.details().endswith(f", not {value}")
