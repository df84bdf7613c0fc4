"""What a test does to a service through its stub, and what it asks it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.refusals import REFUSAL_KEY
from tests.support.limits import HANG_S
from tests.support.services.harness import (
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
        done.append(commit(service, messages))
    return done


def commit(service: RunningService, messages: list[pb.Chunk]) -> bool:
    """Seals a rank's part; returns whether this completed the snapshot."""

    def num_committed() -> int:
        sessions = service.stub.Status(pb.StatusRequest()).sessions
        return sum(item.num_committed for item in sessions if item.session_id == messages[0].key.session_id)

    before = num_committed()
    service.stub.Commit(commit_request(messages))
    return num_committed() > before


def refusal(call: Any, *args: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return caught.value.code(), caught.value.details()


def refusal_name(call: Any, *args: Any) -> str:
    """The kind of refusal that a call is answered with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args)
    return str(dict(caught.value.trailing_metadata())[REFUSAL_KEY])


def status(service: RunningService) -> pb.SessionStatus:
    (session,) = service.stub.Status(pb.StatusRequest()).sessions
    return session


def next_event(watch: Any, kind: str) -> Any:
    for event in watch:
        if event.WhichOneof("event") == kind:
            return getattr(event, kind)
    raise AssertionError(f"the watch ended without {kind}")


def watching(service: RunningService, session_id: str = "s1") -> Any:
    return service.stub.Watch(pb.WatchRequest(session_id=session_id, rank=0), timeout=HANG_S)


def fetched(service: RunningService, rank: int, version: int, session_id: str = "s1") -> bytes:
    request = pb.FetchRequest(session_id=session_id, rank=rank, version=version)
    return b"".join(chunk.data for chunk in service.stub.Fetch(request))
