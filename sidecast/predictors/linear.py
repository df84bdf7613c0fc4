"""A straight line through the window, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.passes import PartContext, PassPlan, predict_in_passes
from sidecast.predictors.tensor_parts import ElementRange, split_tensors
from sidecast.predictors.window import CombinePass


class LinearPredictor:
    """Extrapolates every parameter along its least-squares line over the window.

    Only the slope is used: the predicted change is ``k * slope``, so the prediction starts at the newest state
    and not at the line's (noisier-looking, but lagging) value there.
    """

    name = "linear"
    context_len: int | None = None
    max_horizon = 5

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[ElementRange]:
        def weights(part: ElementRange, context: PartContext) -> Tensor:
            return slope_weights(len(context.states)) * horizon_intervals

        return PassPlan(split_tensors(manifest), [CombinePass(self.name, weights)])

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        predict_in_passes(self, history, horizon_intervals, out)


def slope_weights(context_len: int) -> Tensor:
    """Weights of equally spaced values in the slope of their least-squares line, (C,) fp32; they add up to 0."""
    centred_C = torch.arange(context_len, dtype=torch.float32) - (context_len - 1) / 2
    return centred_C / centred_C.square().sum()
