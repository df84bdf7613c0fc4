"""How far a nowcaster is from the averages that it is to predict.

Shape suffixes: E edges, N edges that carry a parameter, K horizons, Q parameters, C context,
D hidden, I inputs of the last layer, the constant included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.evaluation.tasks import Task
from sidecast.manifest import ModelManifest
from sidecast.metatraining.edges import STRUCTURAL, EdgeSampler, SampledEdges
from sidecast.metatraining.networks import hidden_to_changes, nino_hidden, wnn_changes, wnn_plus_hidden
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
        drawn = self._draw(window, generator)
        if isinstance(self._config, NinoConfig):
            hidden_ND = self._hidden(self._config, tensors, drawn, generator)
            change_NK = hidden_to_changes(self._config, tensors, hidden_ND)[:, 0]
        else:
            change_NK = wnn_changes(tensors, drawn.states_NC, self._operation_Q[drawn.row_N])
        horizons = drawn.target_NK.shape[1]
        return (self._importance(drawn) * (change_NK[:, :horizons] - drawn.target_NK).square()).sum()

    @torch.no_grad()
    def normal_equations(
        self, tensors: Mapping[str, Tensor], window: Window, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the loss is as a function of the last layer: its weights and bias solve the sums of these.

        Args:
            tensors: The nowcaster, not a WNN.
            window: Of a run of the model.
            generator: Decides which edges enter, and the signs.

        Returns:
            Squares (K, D + 1, D + 1) and products with the targets (K, D + 1), fp64; zero for horizons without target.
        """
        assert isinstance(self._config, NinoConfig)
        drawn = self._draw(window, generator)
        hidden_ND = self._hidden(self._config, tensors, drawn, generator).double()
        inputs_NI = torch.cat([hidden_ND, torch.ones(len(hidden_ND), 1, dtype=torch.float64)], dim=1)
        importance_NK = self._importance(drawn).double()
        num_inputs = inputs_NI.shape[1]
        squares_KII = torch.zeros(self._config.max_horizon, num_inputs, num_inputs, dtype=torch.float64)
        products_KI = torch.zeros(self._config.max_horizon, num_inputs, dtype=torch.float64)
        for horizon in range(drawn.target_NK.shape[1]):
            weighted_NI = importance_NK[:, horizon, None] * inputs_NI
            squares_KII[horizon] = weighted_NI.T @ inputs_NI
            products_KI[horizon] = weighted_NI.T @ drawn.target_NK[:, horizon].double()
        return squares_KII, products_KI

    def _draw(self, window: Window, generator: torch.Generator) -> _Drawn:
        sampled = self._sampler.sample(self._recipe.num_sources, generator)
        scaled = ScaledWindow(window, self._manifest, self._recipe.context_len)
        # Which sign a network's hidden unit has is arbitrary, and so is that of a parameter.
        sign = _sign((), generator)
        parameter_N = (sampled.row_E != STRUCTURAL).nonzero()[:, 0]
        element_N = sampled.edges.element_EF[parameter_N, 0]
        row_N = sampled.row_E[parameter_N]
        states_NC = sign * scaled.states(element_N, row_N)
        target_NK = sign * scaled.targets(element_N, row_N, num_horizons(window, self._recipe.max_horizon))
        return _Drawn(sampled, parameter_N, row_N, states_NC, target_NK)

    def _hidden(
        self, config: NinoConfig, tensors: Mapping[str, Tensor], drawn: _Drawn, generator: torch.Generator
    ) -> Tensor:
        edges = drawn.sampled.edges
        if not config.gnn:
            return wnn_plus_hidden(config, tensors, drawn.states_NC, edges.type_E[drawn.parameter_N])
        features_EC = edges.constant_E[:, None].repeat(1, config.context_len)
        features_EC[drawn.parameter_N] = drawn.states_NC
        lpe_VL = self._sampler.lpe_VL
        lpe_VL = lpe_VL * _sign(lpe_VL.shape[1:], generator)
        hidden_ED = nino_hidden(config, tensors, features_EC, drawn.sampled, self._sampler.degree_V, lpe_VL)
        return hidden_ED[drawn.parameter_N]

    def _importance(self, drawn: _Drawn) -> Tensor:
        """What the squared error of each parameter and horizon counts for, (N, K)."""
        num_parameters, horizons = len(self._importance_Q), drawn.target_NK.shape[1]
        weight_N1 = drawn.sampled.weight_E[drawn.parameter_N, None]
        size_NK = weight_N1 * (drawn.target_NK.square() + _LEAST_SQUARE)
        size_QK = torch.zeros(num_parameters, horizons).index_add(0, drawn.row_N, size_NK)
        is_there_Q = size_QK[:, 0] > 0
        share_Q = self._importance_Q / self._importance_Q[is_there_Q].sum()
        return weight_N1 * (share_Q[:, None] / size_QK / horizons)[drawn.row_N]


@dataclass(frozen=True)
class _Drawn:
    """Random edges of a window's graph, with what is known of their parameters.

    Attributes:
        sampled: The edges.
        parameter_N: Those that carry a parameter, by number.
        row_N: Number of the parameter tensor of each.
        states_NC: Their scaled states.
        target_NK: Their scaled changes, at the horizons that have a target.
    """

    sampled: SampledEdges
    parameter_N: Tensor
    row_N: Tensor
    states_NC: Tensor
    target_NK: Tensor


def _sign(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0
