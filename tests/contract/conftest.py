"""A service over a real loopback gRPC server, alone and with both ranks joined."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.services.calls import join
from tests.support.services.dead import as_if_killed, begin, published, send
from tests.support.services.harness import RunningService


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path) as running:
        yield running


@pytest.fixture
def joined(service: RunningService) -> RunningService:
    join(service)
    return service


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """What is left of a service that has published the prediction of step 20 and taken the snapshot of step 30."""
    with RunningService(tmp_path / "first") as first:
        begin(first)
        for step in (10, 20):
            send(first, step)
        published(first, 20)
        send(first, 30)
        return as_if_killed(first, tmp_path / "second")
