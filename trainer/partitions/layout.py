"""The seam between optimizers that shard in their own ways and what is done with their tensors.

A further backend implements ``Layout``; the suite in ``tests/contract/test_layout_contract.py`` says what it must keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sidecast.errors import SidecastError
from sidecast.trainer.partitions.fragments import Fragment
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters


class StalePartitionError(SidecastError):
    """The optimizer's tensors are not those that were mapped, and cannot be mapped anew, or not now."""


class Layout(Protocol):
    """How one kind of optimizer keeps the full-precision weights of one rank.

    It describes what is there when it is made, and is made anew when that has moved.

    Attributes:
        trainable: What is trained; the same on every rank.
        state: What the optimizer keeps for each master.
        owned: Every piece that this rank applies, in the order in which it lies in memory. Padding is part of none.
        upload: The pieces that this rank uploads, in the same order; those of all ranks cover every element once.
    """

    @property
    def trainable(self) -> TrainableParameters: ...

    @property
    def state(self) -> OptimizerState: ...

    @property
    def owned(self) -> tuple[Fragment, ...]: ...

    @property
    def upload(self) -> tuple[Fragment, ...]: ...

    def masters(self) -> Sequence[Master]:
        """The optimizer's tensors as it holds them now, at least one, in the order that fragments number them by.

        Raises:
            StalePartitionError: They are away, and may come back.
        """

    def placement(self) -> object:
        """A value that changes when parameters move relative to their masters; cheap enough for every call.

        Raises:
            StalePartitionError: As for ``masters``.
        """

    def publish(self) -> None:
        """Derives the model's own weights from the masters, on every rank; collective."""
