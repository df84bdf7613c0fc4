"""Where the copy for undoing a jump is kept: memory of this host, or a file."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import torch

from sidecast.errors import ConfigError, NoRoomError
from sidecast.mapped_memory import map_unnamed_file
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.partitions import Partition, RollbackCopy
from sidecast.trainer.partitions.rollback import RollbackError

# Of Linux 5.14 and later; Python's mmap does not name them yet.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23


class MappedRollbackCopy(RollbackCopy):
    """A copy in a mapped file.

    A page that the disk cannot read is SIGBUS to whoever touches it, and would end the training run. So the kernel is
    asked for pages first, and the jump, or the rollback, does not take place if it cannot give them. What it evicts
    in between is not covered, nor is anything on a kernel that cannot be asked.

    Args:
        mapping: The file.
        num_bytes: Of it that the copy may use.
    """

    def __init__(self, mapping: mmap.mmap, num_bytes: int) -> None:
        super().__init__(torch.frombuffer(mapping, dtype=torch.uint8)[:num_bytes])
        self._mapping = mapping

    def _require_pages(self, offset: int, num_bytes: int, *, for_writing: bool) -> None:
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        if num_bytes == 0:
            return
        try:
            advice = _MADV_POPULATE_WRITE if for_writing else _MADV_POPULATE_READ
            self._mapping.madvise(advice, start, offset + num_bytes - start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise RollbackError(f"the disk does not give the rollback copy's pages: {error.strerror}") from error


def keeps_rollback_copy(config: NowcasterConfig) -> bool:
    """Whether jumps are judged, and so must be undoable."""
    return config.policy == "jump" and config.rollback != "off" and config.resolved_probation_steps > 0


def reserve_rollback_copy(config: NowcasterConfig, partition: Partition) -> RollbackCopy | None:
    """Makes the copy that the settings ask for, with every page of it backed; None if they ask for none.

    Raises:
        ConfigError: There is no room for it.
    """
    if not keeps_rollback_copy(config):
        return None
    num_bytes = partition.rollback_bytes()
    if config.rollback == "disk":
        assert config.rollback_dir is not None
        return _in_file(Path(config.rollback_dir), num_bytes)
    try:
        copy = RollbackCopy.allocate(num_bytes, pin_memory=torch.cuda.is_available())
    except RuntimeError as error:
        raise ConfigError(f"no memory for the nowcaster's rollback copy of {num_bytes} bytes: {error}") from error
    copy.touch()
    return copy


def _in_file(folder: Path, num_bytes: int) -> RollbackCopy:
    """A copy mapped from a file without a name, which goes with the process however that ends.

    Capturing is a copy into the page cache; the kernel writes it out later. It is the disk that a jump waits for
    only where the copy is larger than what may be unwritten (``vm.dirty_ratio``).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mapped = map_unnamed_file(folder, num_bytes, "the rollback copy")
    except (OSError, NoRoomError) as error:
        raise ConfigError(f"nowcaster.rollback_dir cannot be used: {error}") from error
    return MappedRollbackCopy(mapped, num_bytes)
