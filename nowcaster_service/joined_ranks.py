"""The ranks of a session: which ranges each uploads and fetches, and the memory that it shares."""

from __future__ import annotations

from collections.abc import Sequence

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.assembly import RankPlan
from sidecast.nowcaster_service.errors import MalformedError, MissingReferenceError, NotJoinedError
from sidecast.protos.shards import ShardSpec, coverage_error


class JoinedRanks:
    """What the ranks of one session have named.

    Args:
        session_id: The session, for messages.
        manifest: The model.
        world_size: Number of ranks.
    """

    def __init__(self, session_id: str, manifest: ModelManifest, world_size: int) -> None:
        self._session_id = session_id
        self._manifest = manifest
        self._world_size = world_size
        self._numels = [spec.numel for spec in manifest.parameters]
        self._upload_shards: dict[int, tuple[ShardSpec, ...]] = {}
        self._fetch_shards: dict[int, tuple[ShardSpec, ...]] = {}
        self._is_checked = False
        self._upload_plans: dict[int, RankPlan] = {}
        self._fetch_plans: dict[int, RankPlan] = {}
        self._shared: dict[int, tuple[memoryview, ...]] = {}

    def __len__(self) -> int:
        """How many have joined."""
        return len(self._upload_plans)

    def join(self, rank: int, upload_shards: Sequence[ShardSpec], fetch_shards: Sequence[ShardSpec]) -> None:
        """Takes in one rank's ranges; once all ranks have joined, they must cover the model exactly once.

        Raises:
            MalformedError: A rank or range that the model does not have, or ranges that overlap or leave gaps.
        """
        self.require(rank, must_have_joined=False)
        upload_shards, fetch_shards = tuple(upload_shards), tuple(fetch_shards)
        if (upload_shards, fetch_shards) == (self._upload_shards.get(rank), self._fetch_shards.get(rank)):
            # As after a break of the connection: all ranks come again at once, and nothing is to be checked anew.
            self._shared.pop(rank, None)
            return
        numels = self._numels
        for shard in (*upload_shards, *fetch_shards):
            if not (0 <= shard.parameter < len(numels) and 0 <= shard.start < shard.stop <= numels[shard.parameter]):
                raise MalformedError(f"rank {rank} names {shard}, which the model does not have")
        if self._is_checked:
            # The others' cover all but what this one's did.
            if _covered(upload_shards) != _covered(self._upload_shards[rank]):
                raise MalformedError(f"rank {rank} names other elements than it did when all ranks had joined")
        elif len({*self._upload_shards, rank}) == self._world_size:
            candidate = {**self._upload_shards, rank: upload_shards}
            fault = coverage_error(numels, [candidate[index] for index in range(self._world_size)])
            if fault is not None:
                raise MalformedError(f"the ranks' ranges do not cover the model exactly once: {fault}")
            self._is_checked = True
        self._shared.pop(rank, None)
        self._upload_shards[rank], self._fetch_shards[rank] = upload_shards, fetch_shards
        self._upload_plans[rank] = RankPlan(self._manifest, upload_shards)
        self._fetch_plans[rank] = RankPlan(self._manifest, fetch_shards)

    def require(self, rank: int, *, must_have_joined: bool = True) -> None:
        """Refuses a rank that the session does not have.

        Raises:
            MalformedError: No rank has this number.
            NotJoinedError: It has not joined.
        """
        if not 0 <= rank < self._world_size:
            raise MalformedError(f"rank is {rank}; the session has ranks 0 to {self._world_size - 1}")
        if must_have_joined and rank not in self._upload_plans:
            raise NotJoinedError(f"rank {rank} has not joined session {self._session_id}")

    def upload_plan(self, rank: int) -> RankPlan:
        """Where a rank's part of a snapshot goes."""
        return self._upload_plans[rank]

    def fetch_plan(self, rank: int) -> RankPlan:
        """Where a rank's part of a prediction comes from."""
        return self._fetch_plans[rank]

    # --- buffers of ranks on this host

    def share(self, rank: int, buffers: Sequence[memoryview]) -> None:
        """Takes a rank's mapped buffers: those that it stages in, and its prediction buffer last."""
        self.require(rank)
        self._shared[rank] = tuple(buffers)

    def shared(self, rank: int, index: int, offset_bytes: int, num_bytes: int) -> memoryview:
        """A piece of one of a rank's buffers.

        Raises:
            MissingReferenceError: The rank shares no such memory.
        """
        buffers = self._shared.get(rank, ())
        end = offset_bytes + num_bytes
        if not -len(buffers) <= index < len(buffers) or end > len(buffers[index]):
            raise MissingReferenceError(f"rank {rank} shares no buffer {index} with a byte {end - 1}: send the bytes")
        return buffers[index][offset_bytes:end]

    def forget_shared(self) -> None:
        """Lets go of all memory of ranks."""
        self._shared.clear()


def _covered(shards: Sequence[ShardSpec]) -> list[tuple[int, int, int]]:
    """``(parameter, start, stop)`` of what shards hold, in order, neighbours put together; overlaps stay apart."""
    covered: list[tuple[int, int, int]] = []
    for shard in sorted(shards):
        if covered and covered[-1][0] == shard.parameter and covered[-1][2] == shard.start:
            covered[-1] = (shard.parameter, covered[-1][1], shard.stop)
        else:
            covered.append((shard.parameter, shard.start, shard.stop))
    return covered
