"""Momentum on the changes between snapshots, looking ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.passes import PartContext, PassPlan, predict_in_passes
from sidecast.predictors.tensor_parts import ElementRange, split_tensors
from sidecast.predictors.window import CombinePass


class OuterNesterovPredictor:
    """Lets the momentum of the window's changes run on for the horizon.

    With d_t the change of snapshot interval t, momentum is b_t = momentum * b_(t-1) + d_t. The newest state has d_t
    itself, so that one Nesterov look-ahead adds momentum * b_t; k of them add
    (momentum + ... + momentum ** k) * b_t.

    Args:
        momentum: Share of the momentum that one snapshot interval leaves, at least 0 and below 1.

    Source: outer Nesterov momentum as in SNOO (arXiv 2510.15830) and DiLoCo (arXiv 2311.08105).
    Deviations: momentum is recomputed from the window instead of carried along, because predictors keep no state.
    """

    name = "outer_nesterov"
    context_len: int | None = None
    max_horizon = 1

    def __init__(self, *, momentum: float = 0.7) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum}; it must be at least 0 and below 1")
        self._momentum = momentum

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[ElementRange]:
        def weights(part: ElementRange, context: PartContext) -> Tensor:
            return self._weights(len(context.states), horizon_intervals)

        return PassPlan(split_tensors(manifest), [CombinePass(self.name, weights)])

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        predict_in_passes(self, history, horizon_intervals, out)

    def _weights(self, context_len: int, horizon_intervals: int) -> Tensor:
        ages_D = torch.arange(context_len - 2, -1, -1, dtype=torch.float32)
        look_ahead = sum(self._momentum**step for step in range(1, horizon_intervals + 1))
        change_weights_D = look_ahead * self._momentum**ages_D
        # Change t is state t + 1 minus state t.
        weights_C = torch.zeros(context_len)
        weights_C[1:] += change_weights_D
        weights_C[:-1] -= change_weights_D
        return weights_C
