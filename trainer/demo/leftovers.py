"""What DeepSpeed leaves behind on a CPU, and nobody takes away."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OPERATOR = "deepspeed_shm_comm"


def free_shared_buffers(master_port: str, folder: Path = SHARED_MEMORY) -> None:
    """Frees the buffers that the ranks of one launch have shared, 69 MB for each; they outlive all processes.

    Args:
        master_port: Of the launch.
        folder: Where they are.
    """
    for path in folder.glob(f"deepspeed_allreduce_buffer_*_{master_port}_*"):
        with contextlib.suppress(OSError):
            path.unlink()


def find_lock(environment: Mapping[str, str]) -> Path | None:
    """Finds the lock of whoever compiles DeepSpeed's operator, or was killed while it did; every start waits for it.

    Args:
        environment: Of the processes that would wait.
    """
    chosen = environment.get("TORCH_EXTENSIONS_DIR")
    # Torch has a folder for each Python and device where it chooses.
    folders = [Path(chosen)] if chosen else sorted((Path.home() / ".cache" / "torch_extensions").glob("*"))
    locks = (folder / OPERATOR / "lock" for folder in folders)
    return next((lock for lock in locks if lock.exists()), None)
