"""The average of the window: where training seems to circle around."""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.passes import PartContext, PassPlan, predict_in_passes
from sidecast.predictors.tensor_parts import ElementRange, split_tensors
from sidecast.predictors.window import CombinePass


class AveragePredictor:
    """Predicts the (weighted) mean of the window, at any horizon.

    Args:
        decay: Weight of a state relative to the one after it: 1 is the plain mean of the newest states (LAWA), less
            an exponential moving average.

    Source: LAWA (arXiv 2209.14981), section 2.
    """

    name = "average"
    context_len: int | None = None
    max_horizon = 1

    def __init__(self, *, decay: float = 1.0) -> None:
        if not 0 < decay <= 1:
            raise ConfigError(f"decay is {decay}; it must be above 0 and at most 1")
        self._decay = decay

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[ElementRange]:
        return PassPlan(split_tensors(manifest), [CombinePass(self.name, self._weights)])

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        predict_in_passes(self, history, horizon_intervals, out)

    def _weights(self, part: ElementRange, context: PartContext) -> Tensor:
        ages_C = torch.arange(len(context.states) - 1, -1, -1, dtype=torch.float32)
        weights_C = self._decay**ages_C
        return weights_C / weights_C.sum()
