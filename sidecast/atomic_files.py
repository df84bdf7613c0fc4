"""Files that are there whole or not at all, also for whoever reads while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to write to, which takes its place at the end.

    What was at ``path`` stays if the block raises; the half-written file is then removed, since it is of no use, and
    takes room from what comes next.

    Args:
        path: The file; its folder exists. Two may not replace it at once.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
