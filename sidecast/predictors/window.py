"""Predictions that are weighted sums of the states of a window, part by part.

Shape suffixes: C context, N elements of one part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sidecast.predictors.base import non_finite
from sidecast.predictors.passes import PartContext, WritingPass
from sidecast.predictors.tensor_parts import ElementRange

Weights = Callable[[ElementRange, PartContext], Tensor]
"""Weights of the C states for the tensor that a part belongs to, (C,) fp32."""


class CombinePass(WritingPass):
    """Writes the sum of ``weight * (state - newest)`` over the states of a window.

    Args:
        predictor: The name that messages give the predictor.
        weights: Gives the weights of a part's C states, (C,) fp32.
    """

    def __init__(self, predictor: str, weights: Weights) -> None:
        self._predictor = predictor
        self._weights = weights

    def map(self, part: ElementRange, context: PartContext) -> None:
        relative_CN = relative_states(self._predictor, part, context)
        weights_C = self._weights(part, context).to(relative_CN)
        part.write(weights_C @ relative_CN, context.out, context.manifest.offsets[part.fqn])


def relative_states(predictor: str, part: ElementRange, context: PartContext) -> Tensor:
    """The states of a part relative to its newest one, (C, N) fp32, where the history lies.

    Relative values keep the small changes of large parameters precise.

    Raises:
        ConfigError: A value is not finite; predictions from such a history would be noise.
    """
    states = part.read(context.states, context.manifest.offsets[part.fqn])
    newest_N = states[-1].to(torch.float32)
    relative_CN = torch.stack([state.to(torch.float32) - newest_N for state in states])
    # Infinities cancel to NaN, or stay. The sum of finite values may overflow too, so that alone is no proof.
    if not relative_CN.sum().isfinite() and not all(bool(state.isfinite().all()) for state in states):
        raise non_finite(predictor, part.fqn)
    return relative_CN
