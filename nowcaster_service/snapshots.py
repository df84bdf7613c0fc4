"""One state of all parameters, whole or on its way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum

from sidecast.nowcaster_service.history import VectorFile


class SnapshotState(Enum):
    RECEIVING = "receiving"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass
class Snapshot:
    """The state of all parameters at one step, whole or on its way."""

    step: int
    epoch: int
    vector: VectorFile
    state: SnapshotState = SnapshotState.RECEIVING
    # Per rank: offset -> (length, crc32) of the chunks that have arrived.
    chunks: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    rank_digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """Digest over all ranks' parts, 16 bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for rank in sorted(self.rank_digests):
            digest.update(self.rank_digests[rank])
        return digest.digest()
