"""How far a nowcaster is from the averages that it is to predict.

Shape suffixes: E edges, N edges that carry a parameter, K horizons, Q parameters, C context.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sidecast.evaluation.tasks import Task
from sidecast.manifest import ModelManifest
from sidecast.metatraining.edges import STRUCTURAL, EdgeSampler, SampledEdges
from sidecast.metatraining.networks import nino_changes, wnn_changes, wnn_plus_changes
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.windows import ScaledWindow, Window, num_horizons
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.graph_cache import build_graph
from sidecast.predictors.wnn import OPERATIONS, operation_of

_LEAST_SQUARE = 1e-8
"""Below this mean square, in units of a tensor's scale, a change is none: it must not be divided by."""


class ModelObjective:
    """The loss of a nowcaster on windows of one model's runs.

    Args:
        task: The model.
        recipe: Of the nowcaster.
    """

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self._recipe = recipe
        self._config = recipe.config
        self._manifest: ModelManifest = task.model.build().manifest
        is_graph = isinstance(self._config, NinoConfig) and self._config.gnn
        lpe_dim = self._config.lpe_dim if isinstance(self._config, NinoConfig) and is_graph else 0
        self._sampler = EdgeSampler(self._manifest, build_graph(self._manifest, recipe.layout, lpe_dim))
        self._operation_Q = torch.tensor([OPERATIONS.index(operation_of(spec)) for spec in self._manifest.parameters])
        # Large tensors count for more, but not by as much as they are larger.
        self._importance_Q = torch.tensor([float(spec.numel) for spec in self._manifest.parameters]).sqrt()

    def __call__(self, tensors: Mapping[str, Tensor], window: Window, generator: torch.Generator) -> Tensor:
        """The loss on random edges, a scalar: 1 is what predicting no change has.

        The squared error of each parameter tensor and horizon is divided by that of no change.

        Args:
            tensors: The nowcaster.
            window: Of a run of the model.
            generator: Decides which edges enter, and the signs.
        """
        sampled = self._sampler.sample(self._recipe.num_sources, generator)
        scaled = ScaledWindow(window, self._manifest, self._recipe.context_len)
        # Which sign a network's hidden unit has is arbitrary, and so is that of a parameter.
        sign = _sign((), generator)
        parameter_N = (sampled.row_E != STRUCTURAL).nonzero()[:, 0]
        element_N = sampled.edges.element_EF[parameter_N, 0]
        row_N = sampled.row_E[parameter_N]
        states_NC = sign * scaled.states(element_N, row_N)
        target_NK = sign * scaled.targets(element_N, row_N, num_horizons(window, self._recipe.max_horizon))
        change_NK = self._changes(tensors, states_NC, sampled, parameter_N, generator)[:, : target_NK.shape[1]]
        return self._relative_error(change_NK, target_NK, sampled.weight_E[parameter_N, None], row_N)

    def _changes(
        self,
        tensors: Mapping[str, Tensor],
        states_NC: Tensor,
        sampled: SampledEdges,
        parameter_N: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        if not isinstance(self._config, NinoConfig):
            return wnn_changes(tensors, states_NC, self._operation_Q[sampled.row_E[parameter_N]])
        if not self._config.gnn:
            return wnn_plus_changes(self._config, tensors, states_NC, sampled.edges.type_E[parameter_N])
        features_EC = sampled.edges.constant_E[:, None].repeat(1, self._config.context_len)
        features_EC[parameter_N] = states_NC
        lpe_VL = self._sampler.lpe_VL
        lpe_VL = lpe_VL * _sign(lpe_VL.shape[1:], generator)
        change_EFK = nino_changes(self._config, tensors, features_EC, sampled, self._sampler.degree_V, lpe_VL)
        return change_EFK[parameter_N, 0]

    def _relative_error(self, change_NK: Tensor, target_NK: Tensor, weight_N1: Tensor, row_N: Tensor) -> Tensor:
        num_parameters, num_horizons = len(self._importance_Q), target_NK.shape[1]
        error_NK = weight_N1 * (change_NK - target_NK).square()
        size_NK = weight_N1 * (target_NK.square() + _LEAST_SQUARE)
        error_QK = torch.zeros(num_parameters, num_horizons).index_add(0, row_N, error_NK)
        size_QK = torch.zeros(num_parameters, num_horizons).index_add(0, row_N, size_NK)
        is_there_Q = size_QK[:, 0] > 0
        ratio_Q = (error_QK[is_there_Q] / size_QK[is_there_Q]).mean(1)
        importance_Q = self._importance_Q[is_there_Q]
        return (ratio_Q * importance_Q).sum() / importance_Q.sum()


def _sign(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0
