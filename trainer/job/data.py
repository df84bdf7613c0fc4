"""Which tokens a rank reads at a step: a pure function of seed, step and rank, so that resuming needs no state.

Shape suffixes: T tokens of a split, B sequences, L tokens that a sequence predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidecast.trainer.job.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs and what should follow them, both int64 of shape [B, L]."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """One rank's share of every step's samples.

    The samples of a step are drawn for all ranks together and then dealt out, so a step reads the same samples
    however many ranks share it, as long as their number is the same.

    Attributes:
        corpus: Where the samples come from.
        seed: Decides every draw.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_size: B, samples per forward pass.
        num_micro_batches: Forward passes per step (gradient accumulation).
        sequence_length: L.
    """

    corpus: Corpus
    seed: int
    rank: int
    world_size: int
    micro_batch_size: int
    num_micro_batches: int
    sequence_length: int

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of this rank at a step (counted from 0)."""
        # A counter-based generator: step is part of its key, so no step depends on having drawn the ones before.
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        shape = (self.num_micro_batches, self.world_size, self.micro_batch_size)
        starts = rng.integers(0, len(self.corpus.train_tokens) - self.sequence_length, size=shape)
        for starts_B in starts[:, self.rank]:
            yield _cut(self.corpus.train_tokens, starts_B, self.sequence_length)

    def validation_batches(self, num_sequences: int) -> Iterator[Batch]:
        """This rank's share of the held-out samples, the same ones at every validation.

        Args:
            num_sequences: Samples over all ranks, evenly spaced over the held-out text; rounded up to whole batches
                on every rank, because under ZeRO-3 all ranks must make the same number of forward passes.
        """
        num_batches = -(-num_sequences // (self.world_size * self.micro_batch_size))
        num_starts = num_batches * self.world_size * self.micro_batch_size
        last = len(self.corpus.validation_tokens) - self.sequence_length - 1
        starts = np.linspace(0, last, num_starts).astype(np.int64)
        for starts_B in starts.reshape(num_batches, self.world_size, self.micro_batch_size)[:, self.rank]:
            yield _cut(self.corpus.validation_tokens, starts_B, self.sequence_length)

    def dropout_seed(self, step: int) -> int:
        """Seed of torch's generators for this rank at a step."""
        return int(np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1)[0])


def _cut(tokens_T: Tensor, starts_B: np.ndarray, length: int) -> Batch:
    windows = torch.stack([tokens_T[start : start + length + 1] for start in starts_B.tolist()]).to(torch.int64)
    return Batch(inputs=windows[:, :-1].contiguous(), targets=windows[:, 1:].contiguous())
