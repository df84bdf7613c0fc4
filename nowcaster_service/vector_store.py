"""Parameter vectors in memory-mapped files on this node, within a budget."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sidecast.errors import ConfigError, NoRoomError
from sidecast.mapped_memory import map_new_file
from sidecast.nowcaster_service.errors import SaturatedError

FP32_BYTES = 4
# Vectors of a run that are kept for its next ones: one snapshot and one prediction come and go at a time.
MAX_SPARES = 2
# Of the file that says what the vectors beside it are.
RECORD_NAME = "record"
LOCK_NAME = "lock"
LOCK_RETRY_S = 0.05


class VectorFile:
    """One parameter vector (fp32, little-endian) in a memory-mapped file.

    A file that is pinned, because an engine or a fetch reads it, outlives its deletion until it is unpinned.

    Attributes:
        path: Where engines on this node open it.
        view: Its bytes, writable.
    """

    def __init__(self, store: HistoryStore, path: Path, num_bytes: int, mapped: mmap.mmap) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._store = store
        self._num_pins = 0
        self._is_deleted = False
        self._may_be_reused = True
        self._map = mapped
        self.view = memoryview(mapped)

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
        """Removes the file (the store only); a second for every four GB that were written to it."""
        self.path.unlink(missing_ok=True)
        self.view.release()
        # A fetch that is being ended may still refer to a slice; the mapping then goes with that.
        with contextlib.suppress(BufferError):
            self._map.close()


class Vectors(Protocol):
    """Where a session's vectors come from."""

    def create(self, num_elements: int) -> VectorFile:
        """Allocates one vector of fp32; its bytes are undefined until they are written.

        Raises:
            SaturatedError: There is no room for it.
        """
        ...

    async def prepare(self, num_elements: int) -> bool:
        """Lets the next ``create`` find a vector; see ``HistoryStore.prepare``."""
        ...


class FolderLock:
    """Keeps a folder to one process: the system lets go of it when that process ends, however it does.

    Args:
        folder: Made if it is not there.
        timeout_s: How long to wait for a process that is just ending.

    Raises:
        ConfigError: The folder is another process's, or none can be there.
    """

    def __init__(self, folder: Path, timeout_s: float = 0.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        try:
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"--history-dir {folder} cannot be used: {error.strerror}") from error
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    os.close(self._descriptor)
                    raise ConfigError(f"--history-dir {folder} is in use by another running service") from None
            threading.Event().wait(LOCK_RETRY_S)

    def release(self) -> None:
        """Lets others have the folder."""
        os.close(self._descriptor)


class HistoryStore:
    """Hands out vector files under one folder.

    The files lie in a folder of this store's own, with a name that no store before it had: an engine that still works
    on the nowcast of a service that has died knows paths that lead nowhere, and not to another run's states. What is
    left of runs that earlier services have recorded is moved into it, folder by folder, before anything else happens.

    A few deleted files are kept for new vectors of their size: fresh pages cost more than what is written to them.

    Args:
        root: Where it is made. What earlier services left there without a record is removed.
        budget_bytes: Most bytes that all files together may take.
        lock_timeout_s: How long to wait for a service that is just ending.
        remove: Runs what removes a file, in a thread where others must not wait for it; at once by default.

    Attributes:
        folder: Of the files.
        left: Folders within it, of runs that earlier services have recorded.
        used_bytes: Of the vectors that are in use.

    Raises:
        ConfigError: Another process's store is at ``root``, or none can be there.
    """

    def __init__(
        self,
        root: Path,
        budget_bytes: int,
        lock_timeout_s: float = 0.0,
        *,
        remove: Callable[[Callable[[], None]], object] = lambda work: work(),
    ) -> None:
        self._remove = remove
        self._lock = FolderLock(root, lock_timeout_s)
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._spares: list[VectorFile] = []
        self._allocations: dict[tuple[Path, int], asyncio.Task[bool]] = {}
        self._serial = itertools.count()
        earlier = [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
        self.folder = Path(tempfile.mkdtemp(prefix="v", dir=root))
        self._folders = {self.folder}
        self.left: list[Path] = []
        for life in earlier:
            for recorded in sorted(life.glob(f"*/{RECORD_NAME}")):
                self.left.append(self.new_folder(recorded.parent.name.partition("-")[0]))
                # Over the new, empty one. Whoever knew the old path finds nothing there from now on.
                recorded.parent.rename(self.left[-1])
            shutil.rmtree(life, ignore_errors=True)

    def close(self) -> None:
        """Removes all files that no record names, and lets another store have the place."""
        recorded = {path.parent for path in self.folder.glob(f"*/{RECORD_NAME}")}
        for path in self.folder.iterdir():
            if path not in recorded:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not recorded:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def new_folder(self, name: str) -> Path:
        """Makes a folder for the files of one run.

        Args:
            name: What its name begins with, without a hyphen.
        """
        folder = self.folder / f"{name}-{next(self._serial):09d}"
        folder.mkdir(mode=0o700)
        self._folders.add(folder)
        return folder

    def remove_folder(self, folder: Path) -> None:
        """Removes a run's folder with all that is in it, once what was to be removed before is."""
        self._folders.discard(folder)
        self._remove(lambda: shutil.rmtree(folder, ignore_errors=True))

    def create(self, num_elements: int, folder: Path | None = None) -> VectorFile:
        """Allocates one vector, whose bytes are undefined until they are written.

        Nothing that a client says goes into its file's name, and no path comes twice.

        Args:
            num_elements: Of fp32.
            folder: Where its file is to lie: the store's own, or one that it has made.

        Raises:
            SaturatedError: The budget or the disk has no room for it.
        """
        num_bytes = num_elements * FP32_BYTES
        if self.used_bytes + num_bytes > self.budget_bytes:
            raise SaturatedError(
                f"a vector of {num_bytes} bytes does not fit: {self.used_bytes} of {self.budget_bytes} bytes of "
                "history are in use (sidecast serve --history-gib)"
            )
        folder = folder or self.folder
        spare = self._spare(num_bytes, folder)
        if spare is not None:
            self._spares.remove(spare)
            spare.revive()
            vector = spare
        else:
            self._drop_spares(self.budget_bytes - self.used_bytes - num_bytes - self._allocating_bytes)
            path = self._new_path(folder)
            try:
                vector = VectorFile(self, path, num_bytes, map_new_file(path, num_bytes))
            except NoRoomError as error:
                raise SaturatedError(str(error)) from error
        self.used_bytes += num_bytes
        return vector

    async def prepare(self, num_elements: int, folder: Path | None = None) -> bool:
        """Lets the next ``create`` find a vector, which is allocated in a thread: nobody waits but who asks.

        In memory a GiB takes a fifth of a second; where a file system cannot reserve room, all of it is written.

        Args:
            num_elements: Of fp32.
            folder: As for ``create``.

        Returns:
            Whether it took time, in which others may have taken what was allocated, or made it needless. False: there
            is a vector, or ``create`` will say why there is none.
        """
        folder, num_bytes = folder or self.folder, num_elements * FP32_BYTES
        if self._spare(num_bytes, folder) is not None:
            return False
        allocation = self._allocations.get((folder, num_bytes))
        if allocation is None:
            spare_bytes = self.budget_bytes - self.used_bytes - num_bytes - self._allocating_bytes
            if spare_bytes < 0:
                return False
            self._drop_spares(spare_bytes)
            allocation = asyncio.get_running_loop().create_task(self._allocate(num_bytes, folder))
            self._allocations[folder, num_bytes] = allocation
        # Whoever gives up waiting leaves it to others.
        return await asyncio.shield(allocation)

    async def _allocate(self, num_bytes: int, folder: Path) -> bool:
        path = self._new_path(folder)
        try:
            vector = VectorFile(self, path, num_bytes, await asyncio.to_thread(map_new_file, path, num_bytes))
        except NoRoomError:
            return False
        finally:
            del self._allocations[folder, num_bytes]
        if folder not in self._folders:
            # Its run has ended meanwhile.
            self._remove(vector.discard)
            return False
        self._spares.append(vector)
        return True

    @property
    def _allocating_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self._allocations)

    def _spare(self, num_bytes: int, folder: Path) -> VectorFile | None:
        beside = (spare for spare in self._spares if spare.path.parent == folder)
        return next((spare for spare in beside if spare.num_bytes == num_bytes), None)

    def _new_path(self, folder: Path) -> Path:
        # A run's folder may hold files of earlier services, whose serial numbers are the same.
        return folder / f"{self.folder.name}-{next(self._serial):09d}.f32"

    def take_over(self, path: Path, mapped: mmap.mmap) -> VectorFile:
        """Counts a vector that an earlier service has left, and that has been found to be what it was.

        Args:
            path: Of its file, in a folder of this store's.
            mapped: All of it.
        """
        self.used_bytes += len(mapped)
        return VectorFile(self, path, len(mapped), mapped)

    def take_back(self, vector: VectorFile, *, may_be_reused: bool) -> None:
        """Takes a vector that nobody uses any more."""
        self.used_bytes -= vector.num_bytes
        if not may_be_reused:
            self._remove(vector.discard)
            return
        self._spares.append(vector)
        beside = [spare for spare in self._spares if spare.path.parent == vector.path.parent]
        for spare in beside[:-MAX_SPARES]:
            self._spares.remove(spare)
            self._remove(spare.discard)

    def drop_spares(self) -> None:
        """Gives all space back that no vector uses."""
        self._drop_spares(0)

    def _drop_spares(self, kept_bytes: int) -> None:
        while sum(spare.num_bytes for spare in self._spares) > kept_bytes:
            self._remove(self._spares.pop(0).discard)
