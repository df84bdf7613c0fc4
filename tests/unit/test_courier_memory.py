"""The memory that a rank shares with its courier is taken as a whole, or not at all."""

from __future__ import annotations

import os

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.nowcast.courier_handle import CourierHandle


def held_buffers() -> list[str]:
    """Names of the shared memory that this process has open."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            # The listing's own.
            continue
    return sorted(name for name in names if name.startswith("/memfd:"))


@pytest.mark.parametrize("num_granted", [0, 1, 2])
def test_buffers_that_were_granted_are_given_back_when_one_is_not(
    monkeypatch: pytest.MonkeyPatch, num_granted: int
) -> None:
    granted: list[int] = []
    allocate = os.posix_fallocate

    def refuse(descriptor: int, offset: int, length: int) -> None:
        if len(granted) == num_granted:
            raise OSError(12, "Cannot allocate memory")
        granted.append(descriptor)
        allocate(descriptor, offset, length)

    before = held_buffers()
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="no memory for the nowcaster's"):
        CourierHandle({}, upload_bytes=64, fetch_bytes=64, num_slots=2)
    assert len(granted) == num_granted
    assert held_buffers() == before
