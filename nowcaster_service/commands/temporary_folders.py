"""Temporary folders of services: each has its own, and clears those whose services were killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.vector_store import FolderLock


def make_temporary(prefix: str, parent: Path) -> Path:
    """Makes a folder that is this process's, and that of the processes forked from it, until all of them have ended.

    Args:
        prefix: What its name begins with.
        parent: Where it is made.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    FolderLock(folder)
    return folder


def remove_left(prefix: str, parent: Path, min_age_s: float, locked: Sequence[str] = ()) -> None:
    """Removes folders of ours that no process has any more.

    Args:
        prefix: What their names begin with.
        parent: Where they are.
        min_age_s: Those that have changed since are left: one that is just being made is not locked yet.
        locked: Folders within them that are locked, too, while somebody works there.
    """
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(ConfigError, OSError), contextlib.ExitStack() as locks:
            found = folder.lstat()
            is_old = time.time() - found.st_mtime > min_age_s
            if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and is_old:
                for path in (folder, *(folder / name for name in locked)):
                    locks.callback(FolderLock(path).release)
                shutil.rmtree(folder, ignore_errors=True)
