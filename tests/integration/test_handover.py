"""Which sockets a courier trusts with its buffers."""

from __future__ import annotations

import mmap
import socket
from contextlib import closing
from pathlib import Path

import pytest

from sidecast.trainer.courier.handover import _is_ours, hand_over, is_this_host
from sidecast.trainer.pipe.buffers import SharedBuffer
from tests.support.services.calls import join
from tests.support.services.harness import RunningService, join_request


def test_a_service_in_a_folder_of_any_path_takes_buffers(tmp_path: Path) -> None:
    folder = tmp_path / "a-long-name" / ("b" * 100) / ("c" * 100)
    folder.mkdir(parents=True)
    with RunningService(folder) as service:
        join(service)
        handover = service.servicer.handover
        assert len(str(handover.path)) > 200
        reply = service.stub.Join(join_request(0))
        with closing(SharedBuffer("test", mmap.PAGESIZE)) as buffer:
            assert hand_over(service.endpoint, reply.local_socket, reply.local_ticket, [buffer.descriptor])
    assert not handover.path.exists()


@pytest.mark.parametrize(
    ("endpoint", "is_here"), [("127.0.0.1:1", True), ("localhost:1", True), ("192.0.2.1:1", False)]
)
def test_knows_its_own_host(endpoint: str, is_here: bool) -> None:
    assert is_this_host(endpoint) is is_here


def test_trusts_only_a_socket_in_a_folder_that_nobody_else_can_enter(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir(mode=0o700)
    path = folder / "s"
    assert not _is_ours(path)
    path.write_text("no socket")
    assert not _is_ours(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert _is_ours(path)
        folder.chmod(0o755)
        assert not _is_ours(path)
