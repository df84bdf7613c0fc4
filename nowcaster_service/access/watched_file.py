"""What a file says, read again when it has changed: secrets are replaced while the service runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from sidecast.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_INTERVAL_S = 1.0


class WatchedFile(Generic[T]):
    """A small file's meaning, at most ``LOOK_INTERVAL_S`` old.

    A file that is gone or makes no sense, as while it is being replaced, changes nothing: what it said last holds, and
    one warning says so.

    Args:
        path: Of the file.
        read: Makes its value; raises ConfigError if the file cannot be read or says nothing that is allowed.
        others: More files that the value is made of.
        clock: Monotonic seconds.

    Raises:
        ConfigError: It cannot be read to begin with.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Path], T],
        others: Sequence[Path] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._paths = (path, *others)
        self._read = read
        self._clock = clock
        self._looked_s = clock()
        # Before it is read: what changes in between is then read once more.
        self._seen = self._signatures()
        self._value = read(path)

    @property
    def value(self) -> T:
        """What it says."""
        now_s = self._clock()
        if now_s - self._looked_s >= LOOK_INTERVAL_S:
            self._looked_s = now_s
            seen = self._signatures()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._value = self._read(self._path)
                    log.info("%s has changed, and was read again", self._path)
                except ConfigError as error:
                    log.warning("%s; what it said before holds", error)
        return self._value

    def _signatures(self) -> list[tuple[int, int, int, int] | None]:
        return [_signature(path) for path in self._paths]


def _signature(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
