"""The main direction of every tensor's trajectory, and a straight line along it.

Shape suffixes: R parameter tensors, C context, N elements of one part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.linear import slope_weights
from sidecast.predictors.passes import BlockPass, Found, PartContext, PassPlan, predict_in_passes
from sidecast.predictors.tensor_parts import ElementRange, split_tensors
from sidecast.predictors.window import CombinePass, relative_states

_WEIGHTS = "rank1_weights"


class Rank1Predictor:
    """Extrapolates every tensor along the first principal direction of its trajectory.

    Of the centred states of a tensor, a C x N matrix, only the first singular component is kept, which drops what
    the states do not share; its coordinate is then extrapolated along a least-squares line.

    Source: rank-1 trajectories of fine-tuning and RL, RELEX and ExPO (arXiv 2404.16792).
    """

    name = "rank1"
    context_len: int | None = None
    max_horizon = 5

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[ElementRange]:
        def weights(part: ElementRange, context: PartContext) -> Tensor:
            return context.found[_WEIGHTS][manifest.rows[part.fqn]]

        passes: list[BlockPass[ElementRange]] = [
            DirectionPass(self.name, manifest, horizon_intervals),
            CombinePass(self.name, weights),
        ]
        return PassPlan(split_tensors(manifest), passes)

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        predict_in_passes(self, history, horizon_intervals, out)


class DirectionPass:
    """Sums the products of the states of every tensor, and finds its direction in the window.

    The main direction in the space of N parameters is a weighted sum of the C states, so that C x C products say
    all, however large the tensor is.

    Args:
        predictor: Name for messages.
        manifest: The model.
        horizon_intervals: k.
    """

    def __init__(self, predictor: str, manifest: ModelManifest, horizon_intervals: int) -> None:
        self._predictor = predictor
        self._manifest = manifest
        self._horizon_intervals = horizon_intervals

    def zeros(self, context: PartContext) -> Tensor:
        shape = (len(self._manifest.parameters), len(context.states), len(context.states))
        return torch.zeros(shape, dtype=torch.float64, device=context.states[-1].device)

    def map(self, part: ElementRange, context: PartContext) -> Tensor:
        relative_CN = relative_states(self._predictor, part, context).double()
        return relative_CN @ relative_CN.T

    def add(self, part: ElementRange, contribution: Tensor, sums: Tensor) -> None:
        sums[self._manifest.rows[part.fqn]] += contribution

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        context_len = len(context.states)
        centring_CC = torch.eye(context_len, dtype=torch.float64) - 1 / context_len
        slope_C = slope_weights(context_len).double() * self._horizon_intervals
        direction_RC = torch.linalg.eigh(centring_CC @ sums.cpu() @ centring_CC).eigenvectors[..., -1]
        # slope of the coordinates, times the direction in parameter space, as one sum over the states
        weights_RC = direction_RC @ centring_CC * (direction_RC @ slope_C)[:, None]
        return {_WEIGHTS: weights_RC.float()}
