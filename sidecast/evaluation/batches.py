"""Which tokens a step reads: a pure function of seed and step, so that taking up a run needs no state.

Shape suffixes: T tokens of a text, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sidecast.errors import ConfigError


def training_batch(tokens_T: Tensor, seed: int, step: int, num_sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Random pieces of a text.

    Args:
        tokens_T: The text.
        seed: Of the run.
        step: Steps already taken; part of the generator's key, so that no step depends on those before.
        num_sequences: B.
        length: L.

    Returns:
        Inputs and what follows each of them, int64, (B, L) both.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    return _pieces(tokens_T, generator.integers(0, len(tokens_T) - length, size=num_sequences), length)


def validation_batches(
    tokens_T: Tensor, num_sequences: int, batch_size: int, length: int
) -> list[tuple[Tensor, Tensor]]:
    """Evenly spaced pieces of a text, in whole batches."""
    num_batches = max(1, num_sequences // batch_size)
    starts = np.linspace(0, len(tokens_T) - length - 1, num_batches * batch_size).astype(np.int64)
    return [_pieces(tokens_T, starts_B, length) for starts_B in starts.reshape(num_batches, batch_size)]


def probe_batches(tokens_T: Tensor, num_sequences: int, batch_size: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """As many pieces halfway between those of ``validation_batches``, so that no token is in both.

    Raises:
        ConfigError: The text is too short for that.
    """
    num_batches = max(1, num_sequences // batch_size)
    starts = np.linspace(0, len(tokens_T) - length - 1, num_batches * batch_size).astype(np.int64)
    middles = (starts[:-1] + starts[1:]) // 2
    if len(starts) < 2 or np.diff(starts).min() < 2 * (length + 1):
        raise ConfigError(
            f"the held-out text has {len(tokens_T)} tokens; a probe beside {len(starts)} sequences of {length} tokens "
            "needs more"
        )
    # One less lies between them.
    starts_B = np.resize(middles, len(starts)).reshape(num_batches, batch_size)
    return [_pieces(tokens_T, each, length) for each in starts_B]


def _pieces(tokens_T: Tensor, starts_B: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    positions_BL = torch.from_numpy(starts_B)[:, None] + torch.arange(length + 1)
    pieces = tokens_T[positions_BL].to(torch.int64)
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
