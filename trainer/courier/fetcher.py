"""The courier's incoming side: fetches predictions into the buffer that the hook applies them from."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from sidecast.errors import SidecastError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.trainer.courier.attempts import Attempts
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.refusals import CorruptError, UnavailableError
from sidecast.trainer.courier.unserved_metrics import Metrics
from sidecast.trainer.pipe.messages import Failed, Prediction, ToHook

FINITE_BLOCK = 1 << 20


class Fetcher:
    """Fetches what is published, the newest first; ``run`` is a thread's work.

    Args:
        client: To the service.
        rank: This rank.
        buffer: The prediction buffer.
        link: Says which session is open, and whether the service is there.
        metrics: The rank's series.
        tell: Tells the hook.
        dtype: How values travel, a WireDtype.
        is_held: Whether the buffer holds a prediction that the hook has not released.
    """

    def __init__(
        self,
        client: NowcastClient,
        rank: int,
        buffer: memoryview,
        link: Link,
        metrics: Metrics,
        tell: Callable[[ToHook], None],
        *,
        dtype: pb.WireDtype,
        is_held: bool,
    ) -> None:
        self._client = client
        self._rank = rank
        self._buffer = buffer
        self._link = link
        self._metrics = metrics
        self._tell = tell
        self._dtype = dtype
        self._queue: queue.SimpleQueue[tuple[str, pb.PredictionPublished]] = queue.SimpleQueue()
        self._buffer_is_free = threading.Semaphore(0 if is_held else 1)
        self._newest: tuple[str, int, int] | None = None

    def put(self, session_id: str, published: pb.PredictionPublished) -> None:
        """Takes note of a published prediction."""
        self._queue.put((session_id, published))

    def release(self) -> None:
        """The hook is done with the buffer."""
        self._buffer_is_free.release()

    def run(self) -> None:
        """Fetches until the process ends."""
        while True:
            session_id, published = self._queue.get()
            identity = (session_id, published.version, published.digest)
            # A reconnected watch begins with the newest prediction, which may have been fetched before.
            if identity == self._newest:
                continue
            self._buffer_is_free.acquire()
            if session_id != self._link.session.session_id or not self._queue.empty():
                # Waiting for the buffer took longer than the prediction lasted.
                self._buffer_is_free.release()
                continue
            self._newest = identity
            reason = self._fetch(session_id, published)
            if reason:
                self._newest = None
                self._buffer_is_free.release()
                self._tell(Failed(step=published.base_step, reason=reason))

    def _fetch(self, session_id: str, published: pb.PredictionPublished) -> str:
        """Fills the buffer and tells the hook; says why it could not, if so."""
        started_s = time.perf_counter()
        # Into shared memory in full width; rounded values are the same either way.
        dtype = pb.FP32 if self._client.is_sharing else self._dtype
        key = pb.ChunkKey(session_id=session_id, rank=self._rank, id=published.version, dtype=dtype)
        download = self._client.new_download(key, self._buffer)
        deadline_s = time.monotonic() + self._client.transfer_s(download.num_bytes)
        attempts = Attempts(self._link, session_id, deadline_s)
        while True:
            try:
                self._client.fetch(download)
                break
            except CorruptError as error:
                reason = str(error)
                attempts.note_corrupt()
            except UnavailableError as error:
                reason = str(error)
            except SidecastError as error:
                return str(error)
            if not attempts.wait():
                return reason
            self._metrics.count_resumed("fetch")
        if not _is_finite(self._buffer):
            return "the prediction is not finite"
        self._metrics.count_fetch(download.num_bytes, time.perf_counter() - started_s)
        self._tell(
            Prediction(
                session_id=session_id,
                version=published.version,
                base_step=published.base_step,
                epoch=published.epoch,
                horizon_intervals=published.horizon_intervals,
                digest=published.digest,
                relative_norm=published.relative_norm,
                nowcast_s=published.nowcast_seconds,
                num_bytes=download.num_bytes,
            )
        )
        return ""


def _is_finite(buffer: memoryview) -> bool:
    values = np.frombuffer(buffer, dtype=np.float32)
    # Block by block: the temporary must not double the courier's memory.
    return all(
        bool(np.isfinite(values[start : start + FINITE_BLOCK]).all()) for start in range(0, len(values), FINITE_BLOCK)
    )
