from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from sidecast.errors import NoRoomError
from sidecast.mapped_memory import map_new_file, map_unnamed_file


@pytest.fixture
def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def test_a_new_file_holds_what_is_written_to_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "vector.f32"
    mapped = map_new_file(path, 8)
    mapped[:3] = b"abc"
    assert path.read_bytes() == b"abc" + bytes(5)


def test_a_file_that_is_there_is_never_emptied(tmp_path: Path) -> None:
    path = tmp_path / "vector.f32"
    path.write_bytes(b"somebody has it mapped")
    with pytest.raises(FileExistsError):
        map_new_file(path, 8)
    assert path.read_bytes() == b"somebody has it mapped"


def test_only_this_user_reads_a_new_file(tmp_path: Path) -> None:
    map_new_file(tmp_path / "vector.f32", 8)
    assert (tmp_path / "vector.f32").stat().st_mode & 0o777 == 0o600


def test_room_is_reserved_without_being_written(tmp_path: Path) -> None:
    map_new_file(tmp_path / "vector.f32", 1 << 20)
    assert (tmp_path / "vector.f32").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("num_bytes", [0, 1, 5000])
def test_an_unnamed_file_leaves_nothing_in_its_folder(tmp_path: Path, num_bytes: int) -> None:
    mapped = map_unnamed_file(tmp_path, num_bytes, "sums")
    assert len(mapped) == max(1, num_bytes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_refused_and_nothing_is_left_there(tmp_path: Path) -> None:
    path = tmp_path / "vector.f32"
    with pytest.raises(NoRoomError, match=f"^no room for 8 bytes at {path}: No space left on device$"):
        map_new_file(path, 8)
    with pytest.raises(NoRoomError, match=f"^no room in {tmp_path} for 8 bytes of sums: No space left on device$"):
        map_unnamed_file(tmp_path, 8, "sums")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match=r"No such file or directory$"):
        map_unnamed_file(tmp_path / "nowhere", 8, "sums")
    with pytest.raises(NoRoomError, match=r"No such file or directory$"):
        map_new_file(tmp_path / "nowhere" / "vector.f32", 8)
