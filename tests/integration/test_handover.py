"""Which sockets a courier trusts with its buffers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sidecast.trainer.courier.handover import _is_ours, is_this_host


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
