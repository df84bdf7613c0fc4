"""Parameter vectors in memory-mapped files on this node, within a budget."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from pathlib import Path

from sidecast.errors import NoRoomError
from sidecast.mapped_memory import map_new_file
from sidecast.nowcaster_service.errors import SaturatedError

FP32_BYTES = 4
# Vectors that are kept for the next ones of their size: one snapshot and one prediction come and go at a time.
MAX_SPARES = 2


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
        self._may_be_reused = True
        try:
            self._map = map_new_file(path, num_bytes)
        except NoRoomError as error:
            raise SaturatedError(str(error)) from error
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

    def forbid_reuse(self) -> None:
        """Keeps the file from ever holding another vector: somebody who was given up on may still have it mapped."""
        self._may_be_reused = False

    def revive(self) -> None:
        """Makes a spare file hold a new vector, whose bytes are undefined until they are written."""
        self._is_deleted = False

    def _release_if_unused(self) -> None:
        if self._is_deleted and self._num_pins == 0:
            self._store.take_back(self, may_be_reused=self._may_be_reused)

    def discard(self) -> None:
        """Removes the file (the store only)."""
        self.path.unlink(missing_ok=True)
        self.view.release()
        # A fetch that is being ended may still refer to a slice; the mapping then goes with that.
        with contextlib.suppress(BufferError):
            self._map.close()


class HistoryStore:
    """Hands out vector files under one folder.

    A few deleted files are kept for new vectors of their size: fresh pages cost more than what is written to them.

    Args:
        folder: Emptied first: what an earlier service left there belongs to no session.
        budget_bytes: Most bytes that all files together may take.

    Attributes:
        used_bytes: Of the vectors that are in use.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._spares: list[VectorFile] = []
        self._serial = itertools.count()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)

    def create(self, num_elements: int) -> VectorFile:
        """Allocates one vector, whose bytes are undefined until they are written.

        Nothing that a client says goes into its file's name, and no name comes twice: truncating a file that an
        engine has mapped would kill the engine.

        Raises:
            SaturatedError: The budget or the disk has no room for it.
        """
        num_bytes = num_elements * FP32_BYTES
        if self.used_bytes + num_bytes > self.budget_bytes:
            raise SaturatedError(
                f"a vector of {num_bytes} bytes does not fit: {self.used_bytes} of {self.budget_bytes} bytes of "
                "history are in use (sidecast serve --history-gib)"
            )
        for index, spare in enumerate(self._spares):
            if spare.num_bytes == num_bytes:
                vector = self._spares.pop(index)
                vector.revive()
                break
        else:
            self._drop_spares(self.budget_bytes - self.used_bytes - num_bytes)
            vector = VectorFile(self, self.folder / f"{next(self._serial):09d}.f32", num_bytes)
        self.used_bytes += num_bytes
        return vector

    def take_back(self, vector: VectorFile, *, may_be_reused: bool) -> None:
        """Takes a vector that nobody uses any more."""
        self.used_bytes -= vector.num_bytes
        if not may_be_reused:
            vector.discard()
            return
        self._spares.append(vector)
        if len(self._spares) > MAX_SPARES:
            self._spares.pop(0).discard()

    def drop_spares(self) -> None:
        """Gives all space back that no vector uses."""
        self._drop_spares(0)

    def _drop_spares(self, kept_bytes: int) -> None:
        while sum(spare.num_bytes for spare in self._spares) > kept_bytes:
            self._spares.pop(0).discard()
