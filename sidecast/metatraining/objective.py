"""How far a nowcaster is from the averages that it is to predict.

Shape suffixes: E edges, K horizons, Q parameters, C context.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sidecast.evaluation.tasks import Task
from sidecast.graphs.export import edge_features
from sidecast.manifest import ModelManifest
from sidecast.metatraining.edges import STRUCTURAL, EdgeSampler, SampledEdges
from sidecast.metatraining.networks import nino_changes, wnn_changes, wnn_plus_changes
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.windows import ScaledWindow, Window, num_horizons, scale_window
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
        scaled = scale_window(window, self._manifest, self._recipe.context_len)
        # Which sign a network's hidden unit has is arbitrary, and so is that of a parameter.
        sign = _sign((), generator)
        is_parameter_E = sampled.row_E != STRUCTURAL
        row_E = sampled.row_E[is_parameter_E]
        horizons = num_horizons(window, self._recipe.max_horizon)
        element_E = sampled.edges.element_EF[is_parameter_E, 0]
        target_EK = sign * scaled.targets(element_E, row_E, horizons)
        change_EK = self._changes(tensors, scaled, sampled, is_parameter_E, sign, generator)[:, :horizons]
        weight_E1 = sampled.weight_E[is_parameter_E, None]
        return self._relative_error(change_EK, target_EK, weight_E1, row_E)

    def _changes(
        self,
        tensors: Mapping[str, Tensor],
        scaled: ScaledWindow,
        sampled: SampledEdges,
        is_parameter_E: Tensor,
        sign: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        features_EC = edge_features(sampled.edges, sign * scaled.states_PC)
        if not isinstance(self._config, NinoConfig):
            operation_E = self._operation_Q[sampled.row_E[is_parameter_E]]
            return wnn_changes(tensors, features_EC[is_parameter_E], operation_E)
        if not self._config.gnn:
            return wnn_plus_changes(self._config, tensors, features_EC, sampled.edges)[is_parameter_E]
        lpe_VL = self._sampler.lpe_VL
        lpe_VL = lpe_VL * _sign(lpe_VL.shape[1:], generator)
        change_EFK = nino_changes(self._config, tensors, features_EC, sampled, self._sampler.degree_V, lpe_VL)
        return change_EFK[is_parameter_E, 0]

    def _relative_error(self, change_EK: Tensor, target_EK: Tensor, weight_E1: Tensor, row_E: Tensor) -> Tensor:
        num_parameters, num_horizons = len(self._importance_Q), target_EK.shape[1]
        error_EK = weight_E1 * (change_EK - target_EK).square()
        size_EK = weight_E1 * (target_EK.square() + _LEAST_SQUARE)
        error_QK = torch.zeros(num_parameters, num_horizons).index_add(0, row_E, error_EK)
        size_QK = torch.zeros(num_parameters, num_horizons).index_add(0, row_E, size_EK)
        is_there_Q = size_QK[:, 0] > 0
        ratio_Q = (error_QK[is_there_Q] / size_QK[is_there_Q]).mean(1)
        importance_Q = self._importance_Q[is_there_Q]
        return (ratio_Q * importance_Q).sum() / importance_Q.sum()


def _sign(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0
