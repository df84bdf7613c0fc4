"""Where a rank's pieces of the parameters lie in the optimizer's flat tensors; pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sidecast.protos.shards import ShardSpec


@dataclass(frozen=True, slots=True)
class Fragment:
    """One contiguous piece of one parameter inside a flat master tensor.

    Attributes:
        shard: Which elements of which parameter.
        master: Index of the master tensor.
        offset: Where the piece begins in it, in elements.
    """

    shard: ShardSpec
    master: int
    offset: int


@dataclass(frozen=True, slots=True)
class Run:
    """One contiguous copy between a rank-local buffer and a master tensor.

    Attributes:
        start: First element in the rank-local buffer.
        master: Index of the master tensor.
        offset: First element in the master tensor.
        numel: Elements to copy.
    """

    start: int
    master: int
    offset: int
    numel: int

    @property
    def buffer(self) -> slice:
        return slice(self.start, self.start + self.numel)

    @property
    def source(self) -> slice:
        return slice(self.offset, self.offset + self.numel)


def runs_of(fragments: Iterable[Fragment]) -> tuple[Run, ...]:
    """Joins fragments that follow one another in memory, so that few large copies move them all.

    Args:
        fragments: In the order of the rank-local buffer.

    Returns:
        The copies, in the same order.
    """
    runs: list[Run] = []
    position = 0
    for fragment in fragments:
        numel = fragment.shard.numel
        last = runs[-1] if runs else None
        if last is not None and (last.master, last.source.stop) == (fragment.master, fragment.offset):
            runs[-1] = Run(last.start, last.master, last.offset, last.numel + numel)
        else:
            runs.append(Run(position, fragment.master, fragment.offset, numel))
        position += numel
    return tuple(runs)


def even_share(fragments: Sequence[Fragment], rank: int, world_size: int) -> tuple[Fragment, ...]:
    """The part of a replicated set of fragments that one rank answers for.

    Shares differ by one element at most and cover everything once; with fewer elements than ranks some are empty.

    Args:
        fragments: The same on every rank.
        rank: Whose share.
        world_size: Number of ranks.
    """
    total = sum(fragment.shard.numel for fragment in fragments)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    share: list[Fragment] = []
    position = 0
    for fragment in fragments:
        shard = fragment.shard
        skipped = max(begin - position, 0)
        kept = min(end - position, shard.numel)
        if skipped < kept:
            clipped = ShardSpec(shard.parameter, shard.start + skipped, shard.start + kept)
            share.append(Fragment(clipped, fragment.master, fragment.offset + skipped))
        position += shard.numel
    return tuple(share)
