"""Unix sockets in folders of any path: the kernel's names of sockets have 107 bytes at most, and paths have not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of a socket, to bind or to connect to within the block, that is short however long its path is.

    Args:
        path: Of the socket, which may be there or not; its own name has 80 bytes at most.

    Raises:
        OSError: There is no such folder.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
