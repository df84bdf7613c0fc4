"""Where a nowcast keeps what it finds for every node of a neural graph: gigabytes, for a model of billions.

Shape suffixes: V nodes, D hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Workspace(Protocol):
    """Memory, or something as good."""

    def zeros(self, num_nodes: int, dim: int) -> Tensor:
        """One fp32 vector of zeros for each node, (V, D), there for as long as the tensor is."""
        ...

    def trim(self) -> None:
        """Lets go of what need not stay in memory; called after each piece of work, which other threads go on with."""
        ...


class MemoryWorkspace:
    """Plain memory, all of which stays."""

    def zeros(self, num_nodes: int, dim: int) -> Tensor:
        """See ``Workspace.zeros``."""
        return torch.zeros(num_nodes, dim)

    def trim(self) -> None:
        """There is nothing to let go of."""
