"""The live page of a service in this process, and runs of every kind to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.page.server import PageServer
from tests.support.services.harness import (
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)


@contextmanager
def served_page(service: RunningService, port: int = 0) -> Iterator[PageServer]:
    """Serves a running service's page, on a free port if none is given."""

    async def start() -> PageServer:
        return PageServer(service.servicer, callers_of(service.config), port)

    page = service.call(start())
    try:
        yield page
    finally:
        page.close()


def commit_step(service: RunningService, step: int, session_id: str = "s1") -> None:
    """Lets both ranks of a run upload and commit a snapshot."""
    for rank in (0, 1):
        messages = chunks(rank_bytes(state(step), rank), rank, step, session_id=session_id)
        service.stub.Upload(iter(messages))
        service.stub.Commit(commit_request(messages))


def open_run(service: RunningService, run_id: str, num_joined: int = 2, **changes: object) -> None:
    """Opens a run, whose session has its name, and lets ranks join."""
    service.stub.Open(open_request(session_id=run_id, run_id=run_id, **changes))
    for rank in range(num_joined):
        service.stub.Join(join_request(rank, session_id=run_id))
