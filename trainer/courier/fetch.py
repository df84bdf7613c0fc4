"""One rank's ranges of one prediction on their way from the service: what has come, what is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import BF16_BYTES, from_bf16

FP32_BYTES = 4


@dataclass
class FetchPart:
    """A piece of the buffer that one stream fills, in order; bytes as they travel."""

    position: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.position == self.stop


class Download:
    """A prediction being received; a part that was interrupted goes on where it stopped.

    Args:
        key: Session, rank and version.
        buffer: The rank's prediction buffer, fp32, whatever the key says of how its values travel.
        num_parts: Streams that share the work.
        chunk_bytes: Size of the service's chunks, at which parts begin.
        is_shared: The service writes into the buffer itself.
    """

    def __init__(
        self, key: pb.ChunkKey, buffer: memoryview, num_parts: int, chunk_bytes: int, *, is_shared: bool = False
    ) -> None:
        self.key = key
        self.is_shared = is_shared
        self.buffer = buffer
        self.num_bytes = len(buffer) // (FP32_BYTES // BF16_BYTES if key.dtype == pb.BF16 else 1)
        part_bytes = max(1, math.ceil(self.num_bytes / chunk_bytes / num_parts)) * chunk_bytes
        self.parts = [
            FetchPart(start, min(start + part_bytes, self.num_bytes)) for start in range(0, self.num_bytes, part_bytes)
        ]

    def put(self, offset_bytes: int, data: memoryview) -> None:
        """Stores the next bytes of a part."""
        if self.key.dtype == pb.BF16:
            halves = np.frombuffer(data, np.uint16)
            start = offset_bytes // BF16_BYTES
            np.frombuffer(self.buffer, np.float32)[start : start + len(halves)] = from_bf16(halves)
        else:
            self.buffer[offset_bytes : offset_bytes + len(data)] = data

    def at(self, offset_bytes: int, num_bytes: int) -> memoryview:
        """What the service has put into the buffer."""
        return self.buffer[offset_bytes : offset_bytes + num_bytes]

    @property
    def received_bytes(self) -> int:
        """All that has come, over all attempts."""
        return self.num_bytes - sum(part.stop - part.position for part in self.parts)
