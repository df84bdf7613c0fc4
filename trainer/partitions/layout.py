"""The seam between DeepSpeed's optimizers and what is done with their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sidecast.trainer.partitions.fragments import Fragment


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
