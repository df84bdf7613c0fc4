"""One state of all parameters, whole or on its way."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import Enum

from sidecast.nowcaster_service.assembly import RankPlan, fp32_range
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.keeping.checksums import Piece, packed_checksums
from sidecast.nowcaster_service.vector_store import VectorFile
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest


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
        pieces: Offset -> what lies in the vector of that chunk.
    """

    dtype: int
    base_step: int
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)
    pieces: dict[int, list[Piece]] = field(default_factory=dict)

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
    """The state of all parameters at one step, whole or on its way.

    Attributes:
        checksums: Of the whole vector; empty until it is committed.
    """

    step: int
    epoch: int
    vector: VectorFile
    state: SnapshotState = SnapshotState.RECEIVING
    parts: dict[int, RankPart] = field(default_factory=dict)
    rank_digests: dict[int, bytes] = field(default_factory=dict)
    motion: Motion | None = None
    checksums: bytes = b""

    def part_of(self, rank: int, dtype: int, base_step: int) -> RankPart:
        """What has arrived of a rank's part, for more to come; nothing where that travels in another way than before.

        Args:
            rank: The rank.
            dtype: How it travels, a WireDtype.
            base_step: Step of the earlier snapshot that bf16 values are the changes since.
        """
        part = self.parts.get(rank)
        if part is None or (part.dtype, part.base_step) != (dtype, base_step):
            # A rank that turns from changes to states, because the base is gone, begins anew.
            part = self.parts[rank] = RankPart(dtype, base_step)
        return part

    def take(self, frame: ChunkFrame, data: memoryview, plan: RankPlan, base: Snapshot | None) -> None:
        """Puts a chunk's values where they belong.

        Args:
            frame: The chunk.
            data: Its bytes.
            plan: Of the rank.
            base: What bf16 values are the changes since.

        Raises:
            MalformedError: The bytes are of no known type, or outside of the rank's part.
        """
        key, vector, offset_bytes = frame.key, self.vector.view, frame.offset_bytes
        part = self.part_of(key.rank, key.dtype, key.base_step)
        if key.dtype == pb.BF16:
            assert base is not None, "found before"
            plan.scatter_changes(vector, base.vector.view, offset_bytes, data)
            pieces = plan.pieces(vector, *fp32_range(offset_bytes, len(data)), None)
        elif key.dtype == pb.FP32:
            plan.scatter(vector, offset_bytes, data)
            pieces = plan.pieces(vector, offset_bytes, len(data), frame.crc32)
        else:
            raise MalformedError(f"a chunk's dtype is {key.dtype}; allowed: {', '.join(pb.WireDtype.keys())}")
        part.chunks[offset_bytes] = (len(data), frame.crc32)
        part.pieces[offset_bytes] = pieces

    def seal(self) -> None:
        """Commits it: all ranks have."""
        self.state = SnapshotState.COMMITTED
        pieces = itertools.chain.from_iterable(found for part in self.parts.values() for found in part.pieces.values())
        self.checksums = packed_checksums(pieces, self.vector.num_bytes)
        self.parts.clear()
