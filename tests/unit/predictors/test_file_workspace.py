"""Node sums in files: the same nowcast, little memory, and a full disk that is told in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from sidecast.errors import NoRoomError
from sidecast.predictors.file_workspace import FileWorkspace


def resident_bytes(folder: Path) -> int:
    """Of what this process has mapped from a folder."""
    total, is_here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_here = str(folder) in line
        elif is_here and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_what_is_trimmed_is_not_lost(tmp_path: Path) -> None:
    workspace = FileWorkspace(tmp_path, min_file_bytes=0)
    sums_VD = workspace.zeros(4_096, 128)
    assert not sums_VD.any()
    values_VD = torch.arange(4_096 * 128, dtype=torch.float32).view(4_096, 128)
    sums_VD += values_VD
    assert resident_bytes(tmp_path) == 4_096 * 128 * 4
    workspace.trim()
    assert resident_bytes(tmp_path) == 0
    assert torch.equal(sums_VD, values_VD)


def test_files_have_no_names_and_go_with_their_tensors(tmp_path: Path) -> None:
    workspace = FileWorkspace(tmp_path, min_file_bytes=0)
    sums_VD = workspace.zeros(64, 128)
    assert list(tmp_path.iterdir()) == []
    part_ND = sums_VD[:3]
    del sums_VD
    part_ND += 1
    del part_ND
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    workspace.trim()


def test_small_sums_stay_in_memory(tmp_path: Path) -> None:
    workspace = FileWorkspace(tmp_path, min_file_bytes=64 * 128 * 4)
    assert resident_bytes(tmp_path) == 0
    small_VD, large_VD = workspace.zeros(63, 128), workspace.zeros(64, 128)
    small_VD += 1
    large_VD += 1
    assert resident_bytes(tmp_path) == 64 * 128 * 4


def test_a_full_disk_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    workspace = FileWorkspace(tmp_path, min_file_bytes=0)
    with pytest.raises(NoRoomError, match=r"no room in .* for 512 bytes of node sums: No space left on device"):
        workspace.zeros(1, 128)
