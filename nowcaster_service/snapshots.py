"""One state of all parameters, whole or on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from sidecast.nowcaster_service.vector_store import VectorFile
from sidecast.protos.codec import buffer_digest


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

    def fault(self, num_bytes: int, digest: bytes, base_digest: bytes) -> str:
        """Why what is there is not what the rank commits; empty if it is.

        Args:
            num_bytes: That the part has as it travels.
            digest: That the rank commits.
            base_digest: Of the earlier snapshot's part that its bf16 values are the changes since; empty for fp32.
        """
        ranges = self.ranges
        position = ranges[0][1] if ranges and ranges[0][0] == 0 else 0
        if position != num_bytes:
            return f"has a gap at byte {position} of {num_bytes}"
        rows = ((offset, length, crc) for offset, (length, crc) in self.chunks.items())
        return "" if buffer_digest(rows, base_digest) == digest else "does not have the digest that it committed"


@dataclass(frozen=True)
class Motion:
    """What a run with pushes says with each snapshot, to be taken out of its motion.

    Attributes:
        learning_rate_sum: Of all steps up to the snapshot's, since the run began.
        applied_version: Of the prediction that began the snapshot's epoch; 0 if none did.
        applied_weight: The factor that it was applied with.
    """

    learning_rate_sum: float
    applied_version: int
    applied_weight: float


@dataclass
class Snapshot:
    """The state of all parameters at one step, whole or on its way."""

    step: int
    epoch: int
    vector: VectorFile
    state: SnapshotState = SnapshotState.RECEIVING
    parts: dict[int, RankPart] = field(default_factory=dict)
    rank_digests: dict[int, bytes] = field(default_factory=dict)
    motion: Motion | None = None
