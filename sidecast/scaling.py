"""Layerwise standardisation: the space in which trained predictors see parameters.

Shape suffixes: C context, N elements of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the deviation when scaling and *not* when unscaling: published weights were trained with the asymmetry."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and deviation of one parameter tensor over all its elements and all states of a history."""

    mean: float
    std: float

    @property
    def inverse(self) -> float:
        """What a centred value is multiplied with."""
        return 1.0 / (self.std + EPSILON)

    @property
    def residue(self) -> float:
        """Share of a centred value that is lost by scaling and unscaling it, because of the asymmetric epsilon."""
        return EPSILON / (self.std + EPSILON)

    def scaled(self, values: Tensor) -> Tensor:
        """(w - mean) / (std + epsilon), in fp32."""
        return (values.to(torch.float32) - self.mean) * self.inverse

    def delta(self, scaled_change: Tensor, newest: Tensor) -> Tensor:
        """The change of raw parameters that a change of scaled ones amounts to.

        Algebraically ``unscale(scale(newest) + scaled_change) - newest``, without cancelling large numbers.

        Args:
            scaled_change: Predicted change in scaled space, fp32.
            newest: The newest raw state, of the same shape.

        Source: NiNo (arXiv 2409.04434), section 4.1 (unscaling has no epsilon).
        """
        return scaled_change * self.std - (newest.to(torch.float32) - self.mean) * self.residue


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over some elements of one tensor, relative to a pivot: parts add up to those of the whole tensor.

    Attributes:
        count: Elements summed, all states together.
        total: Sum of (w - pivot).
        total_squared: Sum of (w - pivot) squared.
    """

    count: int
    total: float
    total_squared: float

    def scale(self, pivot: float) -> Scale:
        """Mean and unbiased standard deviation; a tensor of one value has deviation 0."""
        if self.count == 0:
            return Scale(pivot, 0.0)
        mean = self.total / self.count
        variance = max(0.0, self.total_squared - self.total * mean) / max(1, self.count - 1)
        return Scale(pivot + mean, variance**0.5)


def moment_sums(states: Sequence[Tensor], pivot: Tensor) -> Tensor:
    """The fields of the moments of equally shaped parts of C states, (3,) fp64, on the device of the states.

    Args:
        states: The parts.
        pivot: One value near them, a tensor without dimensions on any device.
    """
    sums = states[0].new_zeros(3, dtype=torch.float64)
    sums[0] = sum(state.numel() for state in states)
    # Differences of fp32 values that are near each other are exact or nearly so; a GPU's time goes with the bytes.
    work_dtype = torch.float64 if sums.device.type == "cpu" else torch.float32
    pivot = pivot.to(sums.device, work_dtype)
    for state in states:
        centred = state.to(work_dtype) - pivot
        sums[1] += centred.sum(dtype=torch.float64)
        sums[2] += centred.square().sum(dtype=torch.float64)
    return sums


def tensor_scale(states: Sequence[Tensor]) -> Scale:
    """The scale of one tensor.

    Args:
        states: Its C states, equally shaped, of any floating dtype.

    Source: NiNo (arXiv 2409.04434), section 4.1, ``method = std``.
    """
    if states[-1].numel() == 0:
        return Scale(0.0, 0.0)
    # Near the mean in units of the deviation, and exact for a constant tensor.
    pivot = states[-1].flatten()[0]
    count, total, total_squared = moment_sums(states, pivot).tolist()
    return Moments(int(count), total, total_squared).scale(float(pivot))
