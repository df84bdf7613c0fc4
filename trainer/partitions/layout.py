"""The seam between DeepSpeed's optimizers and what is done with their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.trainer.partitions.fragments import Fragment

_NEEDED_STATES = ("hp_params", "lp_params", "optim_states")


class StalePartitionError(SidecastError):
    """The optimizer's tensors changed since the partition was made; ``partition_of(engine)`` makes a new one."""


def require_loaded(optimizer: Any) -> None:
    """Refuses an optimizer whose tensors ``engine.offload_states()`` has taken away.

    Raises:
        StalePartitionError: Naming what is away.
    """
    away = {state.name for state in getattr(optimizer, "offloaded_states", ())}.intersection(_NEEDED_STATES)
    if away:
        raise StalePartitionError(
            f"engine.offload_states() took away {', '.join(sorted(away))}; engine.reload_states() brings them back"
        )


class Layout(Protocol):
    """How one kind of optimizer keeps the master weights of one rank.

    Attributes:
        owned: Every piece that this rank applies, in the order in which it lies in memory.
        upload: The pieces that this rank uploads, in the same order.
    """

    @property
    def owned(self) -> tuple[Fragment, ...]: ...

    @property
    def upload(self) -> tuple[Fragment, ...]: ...

    def masters(self) -> Sequence[Tensor]:
        """The tensors that the inner optimizer updates, as it holds them now; contiguous."""

    def placement(self) -> object:
        """A value that changes when parameters move relative to their masters; cheap enough for every call."""

    def publish(self) -> None:
        """Derives the model's own weights from the masters, on every rank; collective."""
