"""Maps files whose room is reserved first: all of it is there, or one line says that it is not."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

from sidecast.errors import NoRoomError


def map_unnamed_file(folder: Path, num_bytes: int, purpose: str) -> mmap.mmap:
    """Maps a new file without a name, which goes when nobody maps it any more, however the process ends.

    Args:
        folder: An existing one, on the disk to use.
        num_bytes: Size; 0 maps one byte, the least there is.
        purpose: What the file holds, for the message.

    Raises:
        NoRoomError: The disk has no room for it, or the folder takes no file.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return _reserved(file.fileno(), num_bytes)
    except OSError as error:
        raise NoRoomError(f"no room in {folder} for {num_bytes} bytes of {purpose}: {error.strerror}") from error


def map_new_file(path: Path, num_bytes: int) -> mmap.mmap:
    """Creates a file that only this user may read, and maps it.

    Args:
        path: The file; it is removed again if there is no room for it.
        num_bytes: Size; 0 maps one byte, the least there is.

    Raises:
        FileExistsError: There is such a file: whoever has it mapped would see other bytes, or none.
        NoRoomError: The disk has no room for it, or the folder takes no file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            return _reserved(descriptor, num_bytes)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except FileExistsError:
        raise
    except OSError as error:
        raise NoRoomError(f"no room for {num_bytes} bytes at {path}: {error.strerror}") from error


def _reserved(descriptor: int, num_bytes: int) -> mmap.mmap:
    # Allocated at once, so that a full disk is an error here and not a SIGBUS at some later store.
    os.posix_fallocate(descriptor, 0, max(1, num_bytes))
    return mmap.mmap(descriptor, max(1, num_bytes))
