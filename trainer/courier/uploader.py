"""Uploads snapshots from the staging slots, by the shortest way that is open."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

from sidecast.errors import SidecastError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import BF16_BYTES
from sidecast.trainer.courier.attempts import Attempts
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.reconstruction import FP32_BYTES, Base, Reconstruction
from sidecast.trainer.courier.refusals import (
    CorruptError,
    OutdatedError,
    RefusedError,
    ReopenError,
    ResendError,
    UnavailableError,
)
from sidecast.trainer.courier.snapshot_outcomes import SnapshotOutcomes
from sidecast.trainer.courier.unserved_metrics import Metrics
from sidecast.trainer.courier.upload import Upload
from sidecast.trainer.pipe.messages import Sent, Snapshot, ToHook

log = logging.getLogger(__name__)

# For the slowest rank's part of the snapshot before; a change can only be sent once that is whole.
BASE_WAIT_S = 2.0


class Uploader:
    """Uploads one snapshot at a time.

    Args:
        client: To the service.
        rank: This rank.
        slots: The staging buffers.
        link: Says whether the service is there.
        outcomes: What becomes of snapshots.
        metrics: The rank's series.
        tell: Tells the hook.
        reconstruction: For sending changes; None to send states always.
    """

    def __init__(
        self,
        client: NowcastClient,
        rank: int,
        slots: Sequence[memoryview],
        link: Link,
        outcomes: SnapshotOutcomes,
        metrics: Metrics,
        tell: Callable[[ToHook], None],
        reconstruction: Reconstruction | None,
    ) -> None:
        self._client = client
        self._rank = rank
        self._slots = slots
        self._link = link
        self._outcomes = outcomes
        self._metrics = metrics
        self._tell = tell
        self._reconstruction = reconstruction

    def upload(self, session_id: str, snapshot: Snapshot) -> None:
        """Uploads and commits a snapshot, if the link and the service allow it, and says that its slot is free.

        Args:
            session_id: The session that the snapshot was made in.
            snapshot: What to upload.
        """
        buffer = self._slots[snapshot.slot]
        started_s = time.perf_counter()
        transfer_s = self._client.transfer_s(len(buffer))
        deadline_s = time.monotonic() + transfer_s
        upload, reason = self._state(session_id, snapshot, buffer), "not connected"
        # A break of an instant costs no snapshot; while the service is away, the slot is free again at once.
        if self._link.wait_connected(session_id, transfer_s, outlasts_outage=False):
            upload, reason = self._deliver_somehow(session_id, snapshot, buffer, deadline_s)
        seconds = time.perf_counter() - started_s
        num_bytes = 0
        if not reason:
            num_bytes = upload.num_bytes
            self._metrics.count_upload(num_bytes, seconds)
            if self._reconstruction is not None:
                self._reconstruction.follow(upload.key, buffer, upload.digest)
        elif self._outcomes.lose(session_id, snapshot.epoch, snapshot.step):
            self._metrics.count_snapshot("unsent")
        else:
            # The service has told of its end before: that loss has been counted.
            reason = ""
        self._tell(Sent(slot=snapshot.slot, step=snapshot.step, seconds=seconds, num_bytes=num_bytes, reason=reason))

    def _deliver_somehow(
        self, session_id: str, snapshot: Snapshot, buffer: memoryview, deadline_s: float
    ) -> tuple[Upload, str]:
        """Delivers by the shortest way that is open: shared memory, a change, the whole state."""
        base = self._base(session_id, snapshot.epoch)
        try:
            if self._client.is_sharing:
                upload = self._state(session_id, snapshot, buffer, shared_buffer=snapshot.slot)
                return upload, self._deliver(upload, snapshot, deadline_s)
            if base is not None:
                upload = self._change(base, snapshot, buffer)
                return upload, self._deliver(upload, snapshot, deadline_s)
        except ResendError as error:
            log.info("rank %d sends step %d once more, in full: %s", self._rank, snapshot.step, error)
            self._client.is_sharing = False
        upload = self._state(session_id, snapshot, buffer)
        return upload, self._deliver(upload, snapshot, deadline_s)

    def _base(self, session_id: str, epoch: int) -> Base | None:
        """The snapshot that the service holds as this rank's reconstruction does; None if there is none."""
        if self._reconstruction is None or self._client.is_sharing:
            # Memory that both sides have mapped is faster than rounding.
            return None
        base = self._reconstruction.base
        if base is None or (base.session_id, base.epoch) != (session_id, epoch):
            return None
        return base if self._outcomes.is_committed(session_id, epoch, base.step, BASE_WAIT_S) else None

    def _state(
        self, session_id: str, snapshot: Snapshot, buffer: memoryview, *, shared_buffer: int | None = None
    ) -> Upload:
        key = pb.ChunkKey(session_id=session_id, rank=self._rank, id=snapshot.step, epoch=snapshot.epoch)
        return Upload(
            key, len(buffer), lambda start, length: buffer[start : start + length], shared_buffer=shared_buffer
        )

    def _change(self, base: Base, snapshot: Snapshot, buffer: memoryview) -> Upload:
        reconstruction = self._reconstruction
        assert reconstruction is not None, "there is a base"
        key = pb.ChunkKey(
            session_id=base.session_id,
            rank=self._rank,
            id=snapshot.step,
            epoch=base.epoch,
            dtype=pb.BF16,
            base_step=base.step,
        )
        num_bytes = len(buffer) // FP32_BYTES * BF16_BYTES
        return Upload(key, num_bytes, functools.partial(reconstruction.change, buffer), base.digest)

    def _deliver(self, upload: Upload, snapshot: Snapshot, deadline_s: float) -> str:
        """Uploads and commits, going on after interruptions; says why it could not, if so.

        Raises:
            ResendError: The service lacks what the upload refers to.
        """
        attempts = Attempts(self._link, upload.key.session_id, deadline_s)
        upload.fill(self._client.chunk_bytes)
        while True:
            try:
                self._client.upload(upload)
                self._client.commit(upload, snapshot)
                return ""
            except CorruptError as error:
                reason = str(error)
                attempts.note_corrupt()
            except (UnavailableError, ReopenError) as error:
                reason = str(error)
            except (OutdatedError, RefusedError) as error:
                return str(error)
            received = None
            while received is None:
                if not attempts.wait():
                    return reason
                received = self._received(upload)
            self._metrics.count_resumed("upload")
            upload.fill(self._client.chunk_bytes, received)

    def _received(self, upload: Upload) -> list[tuple[int, int]] | None:
        """What the service has of an upload; None if it cannot be asked yet."""
        try:
            return self._client.progress(upload.key)
        except (UnavailableError, ReopenError):
            # The link may not have noticed yet that it is down.
            return None
        except SidecastError as error:
            # Everything again, then; if that is of no use either, the upload says so.
            log.debug("rank %d: not known what has arrived: %s", self._rank, error)
            return []
