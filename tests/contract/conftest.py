"""A service over a real loopback gRPC server, alone and with both ranks joined."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.service_calls import join
from tests.support.service_harness import RunningService


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path) as running:
        yield running


@pytest.fixture
def joined(service: RunningService) -> RunningService:
    join(service)
    return service
