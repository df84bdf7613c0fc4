"""What `sidecast serve` does before Ray: ports, addresses, and what services that were killed have left."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.commands import serve
from sidecast.nowcaster_service.commands.temporary_folders import make_temporary, remove_left
from sidecast.nowcaster_service.config import host_and_port
from sidecast.nowcaster_service.vector_store import FolderLock


def test_a_free_port_is_none_that_the_system_gives_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "range"
    setting.write_text("20000\t60999\n")
    monkeypatch.setattr(serve, "EPHEMERAL_PORT_RANGE", setting)
    for _ in range(50):
        assert not 20_000 <= serve._free_port("127.0.0.1") <= 60_999
    # Where it gives away all of them, one of those.
    setting.write_text("1024 65535")
    assert serve._free_port("127.0.0.1") > 0


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_addresses_of_version_6_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, object]] = []
    monkeypatch.setattr(
        socket, "create_server", lambda address, family: asked.append((address, family)) or socket.socket()
    )
    for host in ("::1", "127.0.0.1"):
        serve._listener(host, 5).close()
    assert asked == [(("::1", 5), socket.AF_INET6), (("127.0.0.1", 5), socket.AF_INET)]
    assert (host_and_port("::1", 5), host_and_port("127.0.0.1", 5)) == ("[::1]:5", "127.0.0.1:5")


def test_only_what_nobody_uses_any_more_is_removed(tmp_path: Path) -> None:
    folders = {}
    for name in ("left", "new", "supervised", "served", "other"):
        prefix = "" if name == "other" else serve.HISTORY_PREFIX
        folders[name] = tmp_path / f"{prefix}{name}"
        (folders[name] / serve.VECTORS).mkdir(parents=True)
        (folders[name] / serve.VECTORS / "000000000.f32").write_bytes(b"state")
    locks = [FolderLock(folders["supervised"]), FolderLock(folders["served"] / serve.VECTORS)]
    (tmp_path / f"{serve.HISTORY_PREFIX}link").symlink_to(folders["other"])
    for name, folder in folders.items():
        if name != "new":
            os.utime(folder, (0, 0))
    remove_left(serve.HISTORY_PREFIX, tmp_path, serve.MIN_LEFT_S, locked=(serve.VECTORS,))
    assert [name for name, folder in folders.items() if not folder.exists()] == ["left"]
    assert (folders["other"] / serve.VECTORS / "000000000.f32").exists()
    for lock in locks:
        lock.release()
    remove_left(serve.HISTORY_PREFIX, tmp_path, 0.0, locked=(serve.VECTORS,))
    assert [name for name, folder in folders.items() if folder.exists()] == ["other"]


def test_a_temporary_folder_is_its_makers_until_that_ends(tmp_path: Path) -> None:
    folder = make_temporary("ours-", tmp_path)
    os.utime(folder, (0, 0))
    remove_left("ours-", tmp_path, 60.0)
    assert folder.exists()
    with pytest.raises(ConfigError, match="in use by another running service"):
        FolderLock(folder)
