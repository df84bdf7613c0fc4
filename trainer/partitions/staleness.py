"""What is raised when the optimizer was rebuilt under a partition that still points at its old tensors."""

from __future__ import annotations

from typing import Any

from sidecast.errors import SidecastError

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
