"""Unit tests talk to nobody: no connections, no Ray, no process groups."""

from __future__ import annotations

import socket
import sys
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a unit test must not open connections, start Ray or a process group")

    for name in ("connect", "connect_ex", "bind", "listen"):
        monkeypatch.setattr(socket.socket, name, refuse)
    # Only where the code under test has imported them: Ray alone takes seconds.
    for module, name in (("torch.distributed", "init_process_group"), ("ray", "init"), ("grpc.aio", "server")):
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], name, refuse)
