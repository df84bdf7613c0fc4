from __future__ import annotations

import torch

from sidecast.trainer.job.corpus import Corpus
from sidecast.trainer.job.data import DataOrder

CORPUS = Corpus(torch.arange(200, dtype=torch.uint8), torch.arange(50, dtype=torch.uint8), vocab_size=256)


def order(*, rank: int = 0, world_size: int = 2, micro_batch_size: int = 3, seed: int = 0) -> DataOrder:
    return DataOrder(
        corpus=CORPUS,
        seed=seed,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        num_micro_batches=2,
        sequence_length=8,
    )


def starts(data: DataOrder, step: int) -> list[list[int]]:
    return [batch.inputs[:, 0].tolist() for batch in data.micro_batches(step)]


def test_a_step_is_the_same_whatever_was_read_before() -> None:
    data = order()
    first = starts(data, 5)
    for step in range(5):
        starts(data, step)
    assert starts(data, 5) == first


def test_steps_seeds_ranks_and_micro_batches_all_differ() -> None:
    draws = [starts(order(), 0), starts(order(), 1), starts(order(seed=1), 0), starts(order(rank=1), 0)]
    rows = [tuple(row) for draw in draws for row in draw]
    assert len(set(rows)) == len(rows)


def test_targets_follow_their_inputs() -> None:
    for batch in order().micro_batches(0):
        assert batch.inputs.shape == batch.targets.shape == (3, 8)
        assert torch.equal(batch.targets, batch.inputs + 1)


def test_one_rank_reads_what_two_ranks_share() -> None:
    alone = order(world_size=1, micro_batch_size=6)
    shared = [sorted(a + b) for a, b in zip(starts(order(rank=0), 3), starts(order(rank=1), 3), strict=True)]
    assert [sorted(row) for row in starts(alone, 3)] == shared


def test_validation_covers_the_held_out_text_and_is_dealt_out_evenly() -> None:
    parts = [list(order(rank=rank).validation_batches(10)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    firsts = sorted(int(start) for part in parts for batch in part for start in batch.inputs[:, 0])
    assert (firsts[0], firsts[-1]) == (0, 50 - 8 - 1)
    assert all(int(batch.targets.max()) < 50 for part in parts for batch in part)


def test_dropout_seeds_differ_between_ranks_and_steps() -> None:
    seeds = {order(rank=rank).dropout_seed(step) for rank in range(2) for step in range(5)}
    assert len(seeds) == 10
