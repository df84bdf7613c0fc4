"""A straight line through the window, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.predictors.base import History, check_history
from sidecast.predictors.window import combine_window


class LinearPredictor:
    """Extrapolates every parameter along its least-squares line over the window.

    Only the slope is used: the predicted change is ``k * slope``, so the prediction starts at the newest state
    and not at the line's (noisier-looking, but lagging) value there.
    """

    name = "linear"
    context_len: int | None = None
    max_horizon = 5

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        check_history(self, history, horizon_intervals)
        combine_window(self, history, slope_weights(history.context_len) * horizon_intervals, out)


def slope_weights(context_len: int) -> Tensor:
    """Weights of equally spaced values in the slope of their least-squares line, (C,) fp32; they add up to 0."""
    centred_C = torch.arange(context_len, dtype=torch.float32) - (context_len - 1) / 2
    return centred_C / centred_C.square().sum()
