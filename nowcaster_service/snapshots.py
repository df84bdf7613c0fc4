"""One state of all parameters, whole or on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sidecast.nowcaster_service.vector_store import VectorFile


class SnapshotState(Enum):
    RECEIVING = "receiving"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass
class RankPart:
    """What has arrived of one rank's part.

    Attributes:
        dtype: How it travels, a WireDtype.
        base_step: Step of the earlier snapshot that bf16 values are the changes since; 0 for fp32 values.
        chunks: Offset -> (length, crc32), in bytes as they travel.
    """

    dtype: int
    base_step: int
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """``(start, stop)`` of what is there, disjoint and rising."""
        ranges: list[tuple[int, int]] = []
        for offset, (length, _) in sorted(self.chunks.items()):
            if ranges and ranges[-1][1] == offset:
                ranges[-1] = (ranges[-1][0], offset + length)
            else:
                ranges.append((offset, offset + length))
        return ranges


@dataclass
class Snapshot:
    """The state of all parameters at one step, whole or on its way."""

    step: int
    epoch: int
    vector: VectorFile
    state: SnapshotState = SnapshotState.RECEIVING
    parts: dict[int, RankPart] = field(default_factory=dict)
    rank_digests: dict[int, bytes] = field(default_factory=dict)
