"""Memory that a rank and its courier share."""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

from sidecast.errors import ConfigError


class SharedBuffer:
    """Anonymous shared memory, addressed by a file descriptor that a child process inherits.

    ``memfd_create`` rather than ``multiprocessing.shared_memory``: nothing to unlink under the peer, and nothing
    left behind by a crash. Allocated up front: an unbacked page would end in SIGBUS at some later step.

    Attributes:
        map: The memory, until ``close``; what is made over it must refer to this object.
        view: Its bytes, until ``close``.
        descriptor: To be inherited; -1 once closed.

    Args:
        name: For /proc listings only.
        num_bytes: Size; 0 is allowed.

    Raises:
        ConfigError: There is not enough memory.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # A mapping needs a byte at least.
            os.posix_fallocate(self.descriptor, 0, max(1, num_bytes))
            # Whoever else maps it, as a service on this host does, can rely on its size.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            # Mapped here and now: a page that is mapped when it is first written costs several times the write.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self.map = mmap.mmap(self.descriptor, max(1, num_bytes), flags)
        except OSError as error:
            os.close(self.descriptor)
            raise ConfigError(
                f"no memory for the nowcaster's {name} buffer of {num_bytes} bytes: {error.strerror}"
            ) from error
        self.view = memoryview(self.map)[:num_bytes]
        # Of a buffer that is dropped without having been closed. The mapping goes by itself.
        self._give_back = weakref.finalize(self, os.close, self.descriptor)
        self._give_back.atexit = False

    def close(self) -> None:
        """Gives up the descriptor; the memory goes once nothing refers to ``map`` any more.

        The mapping is never closed here: a tensor made over it would then read unmapped memory.
        """
        if self.descriptor >= 0:
            self.view.release()
            del self.map
            self._give_back()
            self.descriptor = -1


def map_inherited(descriptor: int, num_bytes: int) -> memoryview:
    """The courier's view of a buffer whose descriptor it inherited."""
    return memoryview(mmap.mmap(descriptor, max(1, num_bytes)))[:num_bytes]
