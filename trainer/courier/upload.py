"""One rank's part of one snapshot on its way to the service: what is cut, what is sent, what is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest


class Upload:
    """Hands out chunks, each once, to the streams that share the work.

    Args:
        key: Of the snapshot.
        num_bytes: Of the rank's part as it travels.
        read: The bytes from an offset on, so many of them; the same ones whenever it is asked.
        shared_buffer: Which of the rank's buffers this is, if the service has mapped them: chunks then leave it there.
        base_digest: For changes since an earlier snapshot: the digest that this rank's part of it was committed with.
    """

    def __init__(
        self,
        key: pb.ChunkKey,
        num_bytes: int,
        read: Callable[[int, int], memoryview],
        base_digest: bytes = b"",
        shared_buffer: int | None = None,
    ) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self._read = read
        self._base_digest = base_digest
        self._shared_buffer = shared_buffer
        self._lock = threading.Lock()
        self._chunk_bytes = 0
        self._left: Iterator[int] = iter(())
        self._checksums: dict[int, tuple[int, int]] = {}

    def fill(self, chunk_bytes: int, received: Sequence[tuple[int, int]] = ()) -> None:
        """Lays out what is still to be sent.

        Args:
            chunk_bytes: Size of all chunks but the last.
            received: ``(start, stop)`` of the bytes that the service has already, from an attempt before.
        """
        if chunk_bytes != self._chunk_bytes:
            # Chunks of two sizes would overlap: the service takes the new ones for another attempt.
            self._checksums.clear()
        self._chunk_bytes = chunk_bytes
        known = {start for start in self._checksums if any(a <= start < b for a, b in received)}
        self._left = iter([start for start in range(0, self.num_bytes, chunk_bytes) if start not in known])

    def frames(self) -> Iterator[ChunkFrame]:
        """Yields chunks until none is left; several streams may take from it at once."""
        while True:
            with self._lock:
                start = next(self._left, None)
            if start is None:
                return
            length = min(self._chunk_bytes, self.num_bytes - start)
            data = self._read(start, length)
            checksum = crc32(data)
            self._checksums[start] = (length, checksum)
            if self._shared_buffer is None:
                yield ChunkFrame(self.key, start, checksum, data)
            else:
                yield ChunkFrame(self.key, start, checksum, memoryview(b""), length, self._shared_buffer)

    @property
    def digest(self) -> bytes:
        """Of everything that was sent."""
        rows = ((start, length, checksum) for start, (length, checksum) in self._checksums.items())
        return buffer_digest(rows, self._base_digest)
