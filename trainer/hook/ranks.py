"""What ranks tell one another beside the votes: when the hook starts, and when a checkpoint is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from sidecast.errors import ConfigError, SidecastError
from sidecast.trainer.hook.vote import SoloVotes, VoteBox, Votes, end_group


class Ranks:
    """All ranks of the run; this process alone where it runs without ``torch.distributed``.

    Args:
        group: A gloo group of all ranks that nobody else uses; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_world(cls) -> Ranks:
        """All ranks of the default process group, if there are several; collective then."""
        is_alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        return cls(None if is_alone else dist.new_group(backend="gloo"))

    def close(self) -> None:
        """Gives the group back, which nobody may need any more."""
        if self._group is not None:
            end_group(self._group)

    def votes(self) -> Votes:
        """Where these ranks vote."""
        return SoloVotes() if self._group is None else VoteBox(self._group, owns_group=True)

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, in the order of ranks; collective."""
        said: list[Any] = [value]
        if self._group is not None:
            said *= self.world_size
            dist.all_gather_object(said, value, group=self._group)
        return said

    def from_first(self, value: Any) -> Any:
        """What rank 0 says; collective."""
        said = [value]
        if self._group is not None:
            dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    @contextlib.contextmanager
    def refused_together(self) -> Iterator[None]:
        """What one rank refuses inside the block, all raise; the others would wait for it in the next collective."""
        error = ""
        try:
            yield
        except SidecastError as refusal:
            error = str(refusal)
        except OSError as failure:
            error = f"rank {self.rank} cannot start its courier: {failure}"
        for other_error in self.gather(error):
            if other_error:
                raise ConfigError(other_error)
