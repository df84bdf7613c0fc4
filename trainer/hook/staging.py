"""Copies of this rank's shard into the memory that the courier sends from, at step boundaries.

From a CUDA device the copies run on a side stream into page-locked memory while training goes on: the next optimizer
step waits for them on the device, the host does not. From host memory they are made at once.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from sidecast.trainer.hook.inbox import Inbox
from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.slots import Slot
from sidecast.trainer.partitions import Partition, StalePartitionError
from sidecast.trainer.pipe.messages import Applied, Snapshot

log = logging.getLogger(__name__)

# Of windows in a row. A script that offloads its optimizer now and then costs one at a time.
MANY_STALE = 2


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the training's; None where there is nothing to overlap."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Stager:
    """Fills the messenger's slots, one snapshot each.

    Args:
        messenger: Whose slots to fill.
        inbox: Hears of the slots that are free again.
        stream: For the copies; None: they are made on the spot.

    Attributes:
        seconds: That training was held up by copying, since the beginning.
        step: Of the snapshot that was begun last.
    """

    def __init__(self, messenger: Messenger, inbox: Inbox, stream: torch.cuda.Stream | None = None) -> None:
        self.seconds = 0.0
        self.step = 0
        self._messenger = messenger
        self._inbox = inbox
        self._stream = stream
        self._pinned = [slot.values for slot in messenger.slots if stream is not None and _pin(slot.values)]
        self._copied: torch.cuda.Event | None = None
        self._copying: Snapshot | None = None
        self._stands_still = False
        self._num_stale = 0

    def take_slot(self, deadline_s: float | None) -> Slot | None:
        """A slot to fill; waits for one only while the service is there.

        Args:
            deadline_s: On the monotonic clock; None: not at all.
        """
        slot = self._messenger.take_slot()
        if slot is not None:
            self._stands_still = False
        if slot is not None or deadline_s is None or self._stands_still:
            # A courier that stands still costs the time once, and not at every snapshot.
            return slot
        while slot is None and self._inbox.is_linked and (left_s := deadline_s - time.monotonic()) > 0:
            self._inbox.poll(left_s)
            slot = self._messenger.take_slot()
        self._stands_still = slot is None and self._inbox.is_linked
        return slot

    def after_late_prediction(self) -> None:
        """Finds out whether it is the service that is late, or a courier that has not even sent the snapshot."""
        self._stands_still = not self._messenger.has_free_slot

    def stage(
        self,
        partition: Partition,
        step: int,
        epoch: int,
        slot: Slot | None,
        *,
        learning_rate_sum: float = 0.0,
        applied: Applied | None = None,
    ) -> str:
        """Begins to copy a snapshot, and hands it over where the copy is made on the spot.

        Args:
            partition: What to copy.
            step: Of the snapshot.
            epoch: Of the snapshot.
            slot: From ``take_slot``.
            learning_rate_sum: See ``Snapshot``.
            applied: See ``Snapshot``.

        Returns:
            Why there will be no snapshot; empty if all is well so far.
        """
        if slot is None:
            return "the courier has not sent the snapshots before"
        self.step = step
        started_s = time.perf_counter()
        try:
            partition.read(slot.values, self._stream)
        except StalePartitionError as error:
            # Somebody moved the optimizer's tensors; training is none the worse for a missing snapshot.
            slot.free()
            self._num_stale += 1
            if self._num_stale == MANY_STALE:
                log.warning("nothing is nowcasted as long as snapshots cannot be taken: %s", error)
            return str(error)
        except BaseException:
            # A notebook's stop button, say, whose next cell trains on.
            slot.free()
            raise
        finally:
            self.seconds += time.perf_counter() - started_s
        self._num_stale = 0
        self._copying = Snapshot(
            slot=slot.index, step=step, epoch=epoch, learning_rate_sum=learning_rate_sum, applied=applied
        )
        if self._stream is None:
            return self.collect()
        self._copied = self._stream.record_event()
        return ""

    def collect(self) -> str:
        """Hands over the snapshot whose copy was begun last, if that has not been done yet.

        At the next step boundary at the latest: by then the copy is over, as the optimizer step waited for it.

        Returns:
            Why it could not; empty if it could, or if there is none.
        """
        snapshot, self._copying = self._copying, None
        if snapshot is None:
            return ""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return "" if self._messenger.post(snapshot) else "the courier cannot be reached"

    def close(self) -> None:
        """Hands over what is left and lets go of the shared memory."""
        self.collect()
        for slot in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())
        self._pinned = []


def _pin(slot: Tensor) -> bool:
    """Page-locks shared memory, without which copies from a device hold up the host; False if that fails."""
    if not slot.numel():
        return False
    status = int(torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0))
    if status:
        log.warning("snapshots of %d bytes are staged through pageable memory (CUDA error %d)", slot.nbytes, status)
    return status == 0
