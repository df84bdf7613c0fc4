"""Which elements of which parameter a rank holds, and whether all ranks together hold everything once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ShardSpec:
    """A contiguous range of one parameter's elements, in row-major order.

    A rank's shards, concatenated in their order, are the rank-local buffer that it stages, uploads and fetches.

    Attributes:
        parameter: Index of the parameter in the manifest.
        start: First element.
        stop: One past the last element; greater than ``start``.
    """

    parameter: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def total_elements(shards: Iterable[ShardSpec]) -> int:
    """How many elements the shards hold together."""
    return sum(shard.numel for shard in shards)


def coverage_error(numels: Sequence[int], shards_of_ranks: Sequence[Sequence[ShardSpec]]) -> str | None:
    """Checks that the shards of all ranks cover every element of every parameter exactly once.

    Args:
        numels: Elements of each parameter, in manifest order.
        shards_of_ranks: Each rank's shards.

    Returns:
        None if they do; otherwise one sentence naming the first parameter, range and rank at fault.
    """
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in numels]
    for rank, shards in enumerate(shards_of_ranks):
        for shard in shards:
            if not 0 <= shard.parameter < len(numels):
                return f"rank {rank} names parameter {shard.parameter}; the manifest has {len(numels)}"
            if not 0 <= shard.start < shard.stop <= numels[shard.parameter]:
                return (
                    f"rank {rank} names elements {shard.start} to {shard.stop} of parameter {shard.parameter}, "
                    f"which has {numels[shard.parameter]}"
                )
            pieces[shard.parameter].append((shard.start, shard.stop, rank))
    for parameter, numel in enumerate(numels):
        position = 0
        for start, stop, rank in sorted(pieces[parameter]):
            if start > position:
                return f"no rank holds elements {position} to {start} of parameter {parameter}"
            if start < position:
                overlap = min(position, stop)
                return f"elements {start} to {overlap} of parameter {parameter} are held twice, by rank {rank} too"
            position = stop
        if position < numel:
            return f"no rank holds elements {position} to {numel} of parameter {parameter}"
    return None
