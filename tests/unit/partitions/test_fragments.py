"""Where pieces of parameters lie, and how they are shared and copied."""

from __future__ import annotations

import pytest

from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.partitions.fragments import Fragment, Run, even_share, runs_of


def fragment(parameter: int, start: int, stop: int, master: int, offset: int) -> Fragment:
    return Fragment(ShardSpec(parameter, start, stop), master, offset)


def test_neighbours_in_memory_are_one_copy() -> None:
    fragments = [fragment(0, 2, 5, 0, 0), fragment(1, 0, 4, 0, 3), fragment(2, 0, 1, 0, 8), fragment(3, 0, 2, 1, 9)]
    assert runs_of(fragments) == (
        Run(start=0, master=0, offset=0, numel=7),
        Run(start=7, master=0, offset=8, numel=1),
        Run(start=8, master=1, offset=9, numel=2),
    )


def test_nothing_owned_is_nothing_to_copy() -> None:
    assert runs_of([]) == ()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
def test_even_shares_cover_everything_once(world_size: int) -> None:
    numels = [5, 1, 7]
    fragments = [fragment(0, 0, 5, 0, 0), fragment(1, 0, 1, 0, 5), fragment(2, 0, 7, 1, 0)]
    shares = [even_share(fragments, rank, world_size) for rank in range(world_size)]
    assert coverage_error(numels, [[each.shard for each in share] for share in shares]) is None
    sizes = [total_elements(each.shard for each in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_clipped_fragment_moves_in_its_master_too() -> None:
    assert even_share([fragment(0, 10, 20, 3, 100)], rank=1, world_size=2) == (fragment(0, 15, 20, 3, 105),)
