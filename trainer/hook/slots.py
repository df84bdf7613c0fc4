"""Staging slots: shared memory for one snapshot each, and whose turn it is to use it."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import torch
from torch import Tensor

from sidecast.trainer.pipe.buffers import SharedBuffer

FP32_BYTES = 4


def as_tensor(buffer: SharedBuffer) -> Tensor:
    """A flat fp32 tensor over shared memory."""
    # Over the mapping itself, which then lives as long as the tensor; a released view would not keep it.
    count = buffer.num_bytes // FP32_BYTES
    return torch.frombuffer(buffer.map, dtype=torch.float32, count=count) if count else torch.empty(0)


class SlotState(enum.Enum):
    """Whose a slot is."""

    FREE = "free"
    """Nobody's."""
    FILLING = "filling"
    """The hook's, which copies a snapshot into it: no courier has it, whichever dies."""
    POSTED = "posted"
    """The messenger's, until it is done with the snapshot."""


class Slot:
    """A staging buffer.

    Args:
        index: Names it between rank and courier.
        buffer: Its memory; closed with the slot.

    Attributes:
        values: The memory as a flat fp32 tensor.
        state: Whose it is.
    """

    def __init__(self, index: int, buffer: SharedBuffer) -> None:
        self.index = index
        self.buffer = buffer
        self.values = as_tensor(buffer)
        self.state = SlotState.FREE

    def free(self) -> None:
        """Gives it back."""
        self.state = SlotState.FREE

    def close(self) -> None:
        """Lets go of the memory."""
        self.values = self.values.new_empty(0)
        self.buffer.close()


def take_free(slots: Iterable[Slot]) -> Slot | None:
    """A free slot, to be filled from now on; None if there is none."""
    slot = next((slot for slot in slots if slot.state is SlotState.FREE), None)
    if slot is not None:
        slot.state = SlotState.FILLING
    return slot


def has_free(slots: Iterable[Slot]) -> bool:
    """Whether ``take_free`` would give one."""
    return any(slot.state is SlotState.FREE for slot in slots)
