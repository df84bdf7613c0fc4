"""Between a rank's local buffer and the parameter vector: where each byte goes, and back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.keeping.checksums import Piece
from sidecast.nowcaster_service.vector_store import FP32_BYTES
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import BF16_BYTES, from_bf16
from sidecast.protos.shards import ShardSpec


class RankPlan:
    """The mapping of one rank's buffer (its shards, concatenated) onto the parameter vector, computed once.

    Args:
        manifest: The model.
        shards: The rank's shards, in buffer order; already checked against the manifest.
    """

    def __init__(self, manifest: ModelManifest, shards: Sequence[ShardSpec]) -> None:
        self._buffer_starts: list[int] = []
        self._vector_starts: list[int] = []
        position = 0
        next_in_vector = -1
        for shard in shards:
            spec = manifest.parameters[shard.parameter]
            start = (manifest.offsets[spec.fqn] + shard.start) * FP32_BYTES
            # Neighbours in both orders become one segment: one copy instead of many.
            if start != next_in_vector:
                self._buffer_starts.append(position)
                self._vector_starts.append(start)
            position += shard.numel * FP32_BYTES
            next_in_vector = start + shard.numel * FP32_BYTES
        self.num_bytes = position

    def _segments(self, offset_bytes: int, num_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yields (position in the requested range, position in the vector, length), all in bytes."""
        end = offset_bytes + num_bytes
        if not 0 <= offset_bytes <= end <= self.num_bytes:
            raise MalformedError(
                f"bytes {offset_bytes} to {end} are outside this rank's buffer of {self.num_bytes} bytes"
            )
        index = bisect_right(self._buffer_starts, offset_bytes) - 1
        position = offset_bytes
        while position < end:
            is_last = index + 1 == len(self._buffer_starts)
            segment_end = self.num_bytes if is_last else self._buffer_starts[index + 1]
            length = min(end, segment_end) - position
            yield (
                position - offset_bytes,
                self._vector_starts[index] + position - self._buffer_starts[index],
                length,
            )
            position += length
            index += 1

    def scatter(self, vector: memoryview, offset_bytes: int, data: memoryview) -> None:
        """Copies bytes of the rank's buffer to where they belong in the vector."""
        for source, target, length in self._segments(offset_bytes, len(data)):
            vector[target : target + length] = data[source : source + length]

    def pieces(self, vector: memoryview, offset_bytes: int, num_bytes: int, checksum: int | None) -> list[Piece]:
        """What lies in the vector of a range of the rank's buffer.

        Args:
            vector: As it is written.
            offset_bytes: Where the range begins in the buffer, in bytes of fp32.
            num_bytes: How long it is.
            checksum: CRC-32 of the range if that is known: a range in one piece is not read then.
        """
        segments = list(self._segments(offset_bytes, num_bytes))
        if len(segments) == 1 and checksum is not None:
            return [(segments[0][1], num_bytes, checksum)]
        return [(start, length, crc32(vector[start : start + length])) for _, start, length in segments]

    def scatter_changes(self, vector: memoryview, base: memoryview, offset_bytes: int, data: memoryview) -> None:
        """Adds bf16 changes to a base vector's values and puts the sums where they belong.

        Args:
            vector: To be written.
            base: The vector that the changes are since.
            offset_bytes: Where the changes begin in the rank's buffer, in bytes of bf16.
            data: The changes.
        """
        start, length = fp32_range(offset_bytes, len(data))
        values_N = from_bf16(np.frombuffer(data, np.uint16))
        values_N += np.frombuffer(self.gather(base, start, length), np.float32)
        self.scatter(vector, start, values_N.data.cast("B"))

    def gather_halves(self, vector: memoryview, offset_bytes: int, num_bytes: int) -> memoryview:
        """Collects a range of values that bf16 holds exactly, as bf16; offset and length are bytes of bf16."""
        values_N = np.frombuffer(self.gather(vector, *fp32_range(offset_bytes, num_bytes)), np.uint32)
        return (values_N >> 16).astype(np.uint16).data.cast("B")

    def travelling_bytes(self, dtype: int) -> int:
        """Size of the rank's buffer in a WireDtype."""
        return self.num_bytes // FP32_BYTES * BF16_BYTES if dtype == pb.BF16 else self.num_bytes

    def gather(self, vector: memoryview, offset_bytes: int, num_bytes: int) -> memoryview:
        """Collects a range of the rank's buffer from the vector; a view where it lies in one piece."""
        segments = list(self._segments(offset_bytes, num_bytes))
        if len(segments) == 1:
            _, start, length = segments[0]
            return vector[start : start + length]
        return memoryview(b"".join(vector[start : start + length] for _, start, length in segments))


def fp32_range(offset_bytes: int, num_bytes: int) -> tuple[int, int]:
    """Offset and length of the same values as fp32."""
    if offset_bytes % BF16_BYTES or num_bytes % BF16_BYTES:
        raise MalformedError(f"bytes {offset_bytes} to {offset_bytes + num_bytes} are no whole bf16 values")
    return offset_bytes * FP32_BYTES // BF16_BYTES, num_bytes * FP32_BYTES // BF16_BYTES
