"""Parameter vectors in memory-mapped files on this node, within a budget."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
from pathlib import Path

from sidecast.nowcaster_service.errors import SaturatedError

FP32_BYTES = 4


class VectorFile:
    """One parameter vector (fp32, little-endian) in a memory-mapped file.

    A file that is pinned, because an engine or a fetch reads it, outlives its deletion until it is unpinned.

    Attributes:
        path: Where engines on this node open it.
        view: Its bytes, writable.
    """

    def __init__(self, store: HistoryStore, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._store = store
        self._num_pins = 0
        self._is_deleted = False
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # Allocated at once, so that a full disk is an error here and not a SIGBUS at some later store.
            os.posix_fallocate(descriptor, 0, num_bytes)
            self._map = mmap.mmap(descriptor, num_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise SaturatedError(f"no room for {num_bytes} bytes at {path}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        self.view = memoryview(self._map)

    def pin(self) -> None:
        """Keeps the file on disk until ``unpin``."""
        self._num_pins += 1

    def unpin(self) -> None:
        self._num_pins -= 1
        self._release_if_unused()

    def delete(self) -> None:
        """Gives the space back, now or once the last pin is gone."""
        self._is_deleted = True
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._is_deleted and self._num_pins == 0:
            self.path.unlink(missing_ok=True)
            self._store.used_bytes -= self.num_bytes
            self.view.release()
            # A fetch that is being ended may still refer to a slice; the mapping then goes with that.
            with contextlib.suppress(BufferError):
                self._map.close()


class HistoryStore:
    """Hands out vector files under one folder.

    Args:
        folder: Emptied first: what an earlier service left there belongs to no session.
        budget_bytes: Most bytes that all files together may take.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._serial = itertools.count()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)

    def create(self, num_elements: int) -> VectorFile:
        """Allocates one vector, in a file of its own name.

        Nothing that a client says goes into the name, and no name comes twice: truncating a file that an engine has
        mapped would kill the engine.

        Raises:
            SaturatedError: The budget or the disk has no room for it.
        """
        num_bytes = num_elements * FP32_BYTES
        if self.used_bytes + num_bytes > self.budget_bytes:
            raise SaturatedError(
                f"a vector of {num_bytes} bytes does not fit: {self.used_bytes} of {self.budget_bytes} bytes of "
                "history are in use (sidecast serve --history-gib)"
            )
        vector = VectorFile(self, self.folder / f"{next(self._serial):09d}.f32", num_bytes)
        self.used_bytes += num_bytes
        return vector
