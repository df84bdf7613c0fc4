"""Predictions that are weighted sums of the states of a window, piece by piece.

Shape suffixes: C context, N elements of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sidecast.manifest import ParameterSpec
from sidecast.predictors.base import History, Predictor, non_finite

PIECE_ELEMENTS = 1 << 20
"""Elements of a tensor that are worked on at once: 4 MiB of each state in fp32."""


def tensor_pieces(predictor: Predictor, history: History, spec: ParameterSpec) -> Iterator[tuple[slice, Tensor]]:
    """The states of one parameter in pieces, relative to its newest state.

    Yields:
        Where a piece is in the parameter vector, and its C states minus the newest, (C, N) fp32. Relative values keep
        the small changes of large parameters precise.

    Raises:
        ConfigError: A value is not finite.
    """
    first = history.manifest.offsets[spec.fqn]
    for start in range(first, first + spec.numel, PIECE_ELEMENTS):
        piece = slice(start, min(start + PIECE_ELEMENTS, first + spec.numel))
        newest_N = history.states[-1][piece].to(torch.float32)
        relative_CN = torch.stack([state[piece].to(torch.float32) - newest_N for state in history.states])
        # Infinities cancel to NaN, or stay.
        if not relative_CN.sum().isfinite():
            raise non_finite(predictor.name, spec.fqn)
        yield piece, relative_CN


def combine_window(predictor: Predictor, history: History, weights_C: Tensor, out: Tensor) -> None:
    """Writes the sum of ``weight * (state - newest)`` over the states of a window, for every parameter."""
    for spec in history.manifest.parameters:
        for piece, relative_CN in tensor_pieces(predictor, history, spec):
            out[piece] = weights_C @ relative_CN
