"""Copies of this rank's shard into the memory that the courier sends from, at step boundaries."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from sidecast.trainer.nowcast.buffers import SharedBuffer
from sidecast.trainer.nowcast.courier_handle import CourierHandle
from sidecast.trainer.nowcast.partitions import Partition, StalePartitionError


def as_tensor(buffer: SharedBuffer) -> Tensor:
    """A flat fp32 tensor over shared memory."""
    # Over the mapping itself, which then lives as long as the tensor; a released view would not keep it.
    count = buffer.num_bytes // 4
    return torch.frombuffer(buffer.map, dtype=torch.float32, count=count) if count else torch.empty(0)


class Stager:
    """Fills the courier's slots, one snapshot each.

    Args:
        courier: Whose slots to fill.

    Attributes:
        seconds: Spent copying since the beginning.
    """

    def __init__(self, courier: CourierHandle) -> None:
        self.seconds = 0.0
        self._courier = courier
        self._slots = [as_tensor(slot) for slot in courier.slots]

    def stage(self, partition: Partition, step: int, epoch: int) -> str:
        """Hands the courier a snapshot.

        Returns:
            Why it could not; empty if it could.
        """
        slot = self._courier.take_slot()
        if slot is None:
            return "the courier has not sent the snapshots before"
        started_s = time.perf_counter()
        try:
            partition.read(self._slots[slot])
        except StalePartitionError as error:
            # Somebody moved the optimizer's tensors; training is none the worse for a missing snapshot.
            self._courier.return_slot(slot)
            return str(error)
        self.seconds += time.perf_counter() - started_s
        if not self._courier.post({"type": "snapshot", "slot": slot, "step": step, "epoch": epoch}):
            return "the courier cannot be reached"
        return ""

    def close(self) -> None:
        """Lets go of the shared memory."""
        self._slots = []
