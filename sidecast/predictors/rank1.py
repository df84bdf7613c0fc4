"""The main direction of every tensor's trajectory, and a straight line along it.

Shape suffixes: C context, N elements of one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.predictors.base import History, check_history
from sidecast.predictors.linear import slope_weights
from sidecast.predictors.window import tensor_pieces


class Rank1Predictor:
    """Extrapolates every tensor along the first principal direction of its trajectory.

    Of the centred states of a tensor, a C x N matrix, only the first singular component is kept, which drops what
    the states do not share; its coordinate is then extrapolated along a least-squares line.

    Source: rank-1 trajectories of fine-tuning and RL, RELEX and ExPO (arXiv 2404.16792).
    """

    name = "rank1"
    context_len: int | None = None
    max_horizon = 5

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        check_history(self, history, horizon_intervals)
        context_len = history.context_len
        centring_CC = torch.eye(context_len, dtype=torch.float64) - 1 / context_len
        slope_C = slope_weights(context_len).double() * horizon_intervals
        for spec in history.manifest.parameters:
            gram_CC = torch.zeros(context_len, context_len, dtype=torch.float64)
            for _, relative_CN in tensor_pieces(self, history, spec):
                gram_CC += relative_CN.double() @ relative_CN.double().T
            direction_C = torch.linalg.eigh(centring_CC @ gram_CC @ centring_CC).eigenvectors[:, -1]
            # slope of the coordinates, times the direction in parameter space, as one sum over the states
            weights_C = (centring_CC @ direction_C * (slope_C @ direction_C)).float()
            for piece, relative_CN in tensor_pieces(self, history, spec):
                out[piece] = weights_C @ relative_CN
