"""Copies of this rank's shard into the memory that the courier sends from, at step boundaries.

From a CUDA device the copies run on a side stream into page-locked memory while training goes on: the next optimizer
step waits for them on the device, the host does not. From host memory they are made at once.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.partitions import Partition, StalePartitionError
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Message

log = logging.getLogger(__name__)


def as_tensor(buffer: SharedBuffer) -> Tensor:
    """A flat fp32 tensor over shared memory."""
    # Over the mapping itself, which then lives as long as the tensor; a released view would not keep it.
    count = buffer.num_bytes // 4
    return torch.frombuffer(buffer.map, dtype=torch.float32, count=count) if count else torch.empty(0)


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the training's; None where there is nothing to overlap."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Stager:
    """Fills the courier's slots, one snapshot each.

    Args:
        courier: Whose slots to fill.
        stream: For the copies; None: they are made on the spot.

    Attributes:
        seconds: That training was held up by copying, since the beginning.
        step: Of the snapshot that was begun last.
    """

    def __init__(self, courier: Messenger, stream: torch.cuda.Stream | None = None) -> None:
        self.seconds = 0.0
        self.step = 0
        self._courier = courier
        self._stream = stream
        self._slots = [as_tensor(slot) for slot in courier.slots]
        self._pinned = [slot for slot in self._slots if stream is not None and _pin(slot)]
        self._copied: torch.cuda.Event | None = None
        self._message: Message | None = None

    def stage(self, partition: Partition, step: int, epoch: int, slot: int | None) -> str:
        """Begins to copy a snapshot, and hands it to the courier where the copy is made on the spot.

        Args:
            partition: What to copy.
            step: Of the snapshot.
            epoch: Of the snapshot.
            slot: Taken from the courier; None if it needs all.

        Returns:
            Why there will be no snapshot; empty if all is well so far.
        """
        if slot is None:
            return "the courier has not sent the snapshots before"
        self.step = step
        started_s = time.perf_counter()
        try:
            partition.read(self._slots[slot], self._stream)
        except StalePartitionError as error:
            # Somebody moved the optimizer's tensors; training is none the worse for a missing snapshot.
            self._courier.return_slot(slot)
            return str(error)
        finally:
            self.seconds += time.perf_counter() - started_s
        self._message = {"type": "snapshot", "slot": slot, "step": step, "epoch": epoch}
        if self._stream is None:
            return self.collect()
        self._copied = self._stream.record_event()
        return ""

    def collect(self) -> str:
        """Hands the courier the snapshot whose copy was begun last, if it has not got it yet.

        At the next step boundary at the latest: by then the copy is over, as the optimizer step waited for it.

        Returns:
            Why it could not; empty if it could, or if there is none.
        """
        message, self._message = self._message, None
        if message is None:
            return ""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return "" if self._courier.post(message) else "the courier cannot be reached"

    def close(self) -> None:
        """Hands over what is left and lets go of the shared memory."""
        self.collect()
        for slot in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())
        self._slots, self._pinned = [], []


def _pin(slot: Tensor) -> bool:
    """Page-locks shared memory, without which copies from a device hold up the host; False if that fails."""
    if not slot.numel():
        return False
    status = int(torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0))
    if status:
        log.warning("snapshots of %d bytes are staged through pageable memory (CUDA error %d)", slot.nbytes, status)
    return status == 0
