"""NiNo and WNN+ evaluated edge by edge as published: the reference for the fast paths, for models that fit in memory.

Shape suffixes: C context, P elements of the parameter vector, E edges, F kernel elements, K horizons.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sidecast.graphs.export import EdgeList, edge_features, from_edges, to_edges
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, Predictor, check_history, fp32_states
from sidecast.predictors.nino.graph_cache import GraphCache, NeuralGraph
from sidecast.predictors.nino.network import WnnPlusNetwork, load_network
from sidecast.predictors.nino.weights import NinoWeights, load_weights
from sidecast.predictors.step_length import StepLength, check_step_length, step_length
from sidecast.scaling import Scale, tensor_scale


class PlainNinoPredictor:
    """NiNo (or WNN+, if the weights are such) by the PyTorch Geometric module.

    Args:
        weights: The network.
        graphs: Where graphs are kept between calls.
        layout: ``official`` or ``symmetric``; None for the one that the weights state, else ``official`` where the
            family has it, else ``symmetric``.
        upd_scale: Share of the predicted scaled change that is used, for all parameters or by name pattern.
        trimmed: Leave out the last convolution, which the prediction does not depend on.
    """

    def __init__(
        self,
        weights: NinoWeights,
        *,
        graphs: GraphCache,
        layout: str | None = None,
        upd_scale: StepLength = 1.0,
        trimmed: bool = True,
    ) -> None:
        check_step_length("upd_scale", upd_scale)
        self.name = "nino_plain" if weights.config.gnn else "wnn_plus_plain"
        self.context_len: int | None = weights.config.context_len
        self.max_horizon = weights.config.max_horizon
        self._network = load_network(weights)
        self._graphs = graphs
        self._layout = weights.layout if layout is None else layout
        self._upd_scale = upd_scale
        self._trimmed = trimmed

    def prepare(self, manifest: ModelManifest) -> None:
        self._graphs.graph(manifest, self._layout, self._network.config.lpe_dim)

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        check_history(self, history, horizon_intervals)
        config = self._network.config
        config.check_horizon(self.name, horizon_intervals)
        graph = self._graphs.graph(history.manifest, self._layout, config.lpe_dim)
        edges = to_edges(graph.topology)
        scaled_PC, scales = scale_history(self, history)
        with torch.inference_mode():
            change_EF = self._scaled_change(graph, edges, scaled_PC, horizon_intervals)
        change_P = from_edges(graph.topology, edges, change_EF)
        start = 0
        for spec, scale in zip(history.manifest.parameters, scales, strict=True):
            stop = start + spec.numel
            used = change_P[start:stop] * step_length(self._upd_scale, spec.fqn)
            out[start:stop] = scale.delta(used, history.states[-1][start:stop])
            start = stop

    def _scaled_change(self, graph: NeuralGraph, edges: EdgeList, scaled_PC: Tensor, horizon_intervals: int) -> Tensor:
        features_EX = edge_features(edges, scaled_PC)
        num_kernel_elements = edges.element_EF.shape[1]
        if isinstance(self._network, WnnPlusNetwork):
            features_EFC = features_EX.unflatten(1, (num_kernel_elements, -1))
            types_EF = edges.type_E[:, None].expand(-1, num_kernel_elements)
            return self._network(features_EFC, types_EF)[..., horizon_intervals - 1]
        change_EFK = self._network(features_EX, edges.index_2E, edges.type_E, graph.lpe_VL, trimmed=self._trimmed)
        return change_EFK[:, :num_kernel_elements, horizon_intervals - 1]


def scale_history(predictor: Predictor, history: History) -> tuple[Tensor, list[Scale]]:
    """All states in scaled space, (P, C), and the scale of each parameter in manifest order."""
    scaled, scales = [], []
    for spec in history.manifest.parameters:
        states_CN = fp32_states(predictor, history, spec.fqn)
        scale = tensor_scale(list(states_CN))
        scaled.append(scale.scaled(states_CN).T)
        scales.append(scale)
    return torch.cat(scaled), scales


def create(
    *, weights: Path, layout: str | None = None, upd_scale: StepLength = 1.0, trimmed: bool = True
) -> PlainNinoPredictor:
    """The predictor with the weights of a file."""
    return PlainNinoPredictor(
        load_weights(weights), graphs=GraphCache(), layout=layout, upd_scale=upd_scale, trimmed=trimmed
    )
