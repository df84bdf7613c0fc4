"""What is raised when the optimizer was rebuilt under a partition that still points at its old tensors."""

from __future__ import annotations

from sidecast.errors import SidecastError


class StalePartitionError(SidecastError):
    """The optimizer's tensors changed since the partition was made; ``partition_of(engine)`` makes a new one."""
