"""Memory that a rank and its courier share."""

from __future__ import annotations

import mmap
import os

from sidecast.errors import ConfigError


class SharedBuffer:
    """Anonymous shared memory, addressed by a file descriptor that a child process inherits.

    ``memfd_create`` rather than ``multiprocessing.shared_memory``: nothing to unlink under the peer, and nothing
    left behind by a crash. Allocated up front: an unbacked page would end in SIGBUS at some later step.

    Args:
        name: For /proc listings only.
        num_bytes: Size; 0 is allowed.

    Raises:
        ConfigError: There is not enough memory.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.descriptor = os.memfd_create(name, 0)
        try:
            # A mapping needs a byte at least.
            os.posix_fallocate(self.descriptor, 0, max(1, num_bytes))
        except OSError as error:
            os.close(self.descriptor)
            raise ConfigError(
                f"no memory for the nowcaster's {name} buffer of {num_bytes} bytes: {error.strerror}"
            ) from error
        self._map = mmap.mmap(self.descriptor, max(1, num_bytes))
        self.view = memoryview(self._map)[:num_bytes]

    def close(self) -> None:
        """Gives up this side's mapping where nothing else refers to it, and the descriptor."""
        self.view.release()
        os.close(self.descriptor)


def map_inherited(descriptor: int, num_bytes: int) -> memoryview:
    """The courier's view of a buffer whose descriptor it inherited."""
    return memoryview(mmap.mmap(descriptor, max(1, num_bytes)))[:num_bytes]
