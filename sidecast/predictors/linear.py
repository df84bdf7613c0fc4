"""A straight line through the window, by least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.predictors.base import History, check_history, fp32_states


class LinearPredictor:
    """Extrapolates every parameter along its least-squares line over the window.

    Only the slope is used: the predicted change is ``k * slope``, so the prediction starts at the newest state
    and not at the line's (noisier-looking, but lagging) value there.
    """

    name = "linear"
    context_len = None
    max_horizon = 5

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        check_history(self, history, horizon_intervals)
        context_len = history.context_len
        centred = torch.arange(context_len, dtype=torch.float32) - (context_len - 1) / 2
        weights_C = centred / centred.square().sum() * horizon_intervals
        start = 0
        for spec in history.manifest.parameters:
            states_CN = fp32_states(self, history, spec.fqn)
            out[start : start + spec.numel] = weights_C @ states_CN
            start += spec.numel
