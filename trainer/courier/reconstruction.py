"""What the service holds of this rank's newest committed snapshot, bit for bit, so that the next can go as a change.

A change is taken from this reconstruction and not from the true states: what one change loses to rounding is part of
the next one, so that errors do not add up (docs/adr/0011-sixteen-bit-changes.md). Shape legend: N elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import BF16_BYTES, TILE, from_bf16, round_to_bf16

FP32_BYTES = 4


@dataclass(frozen=True)
class Base:
    """The snapshot that a reconstruction is of."""

    session_id: str
    epoch: int
    step: int
    digest: bytes


class Reconstruction:
    """Takes 4 bytes per uploaded element, at once.

    Args:
        num_bytes: Of the rank's part of a snapshot, fp32.
    """

    def __init__(self, num_bytes: int) -> None:
        self._values_N = np.empty(num_bytes // FP32_BYTES, np.float32)
        self._values_N.fill(0.0)
        self.base: Base | None = None

    def change(self, state: memoryview, offset_bytes: int, num_bytes: int) -> memoryview:
        """The change from the reconstruction to a state, as bf16.

        Args:
            state: The rank's part of the state, fp32.
            offset_bytes: Where to begin, in bytes of the change.
            num_bytes: How much of the change.
        """
        where = slice(offset_bytes // BF16_BYTES, (offset_bytes + num_bytes) // BF16_BYTES)
        return self._change(state, where).data.cast("B")

    def _change(self, state: memoryview, where: slice) -> np.ndarray:
        return round_to_bf16(np.frombuffer(state, np.float32)[where] - self._values_N[where])

    def follow(self, key: pb.ChunkKey, state: memoryview, digest: bytes) -> None:
        """Does what the service did with an upload that it has committed.

        Args:
            key: Of the upload.
            state: The rank's part of the state, fp32.
            digest: Of the upload.
        """
        for start in range(0, len(self._values_N), TILE):
            tile = slice(start, start + TILE)
            if key.dtype == pb.BF16:
                self._values_N[tile] += from_bf16(self._change(state, tile))
            else:
                self._values_N[tile] = np.frombuffer(state, np.float32)[tile]
        self.base = Base(key.session_id, key.epoch, key.id, digest)
