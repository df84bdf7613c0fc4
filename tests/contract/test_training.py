"""The networks can be trained, and what was trained can be saved, loaded and used by the fast predictor."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_nino_any_graph as any_graph
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sidecast.graphs.export import edge_features, from_edges, to_edges
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.network import NinoNetwork, build_network
from sidecast.predictors.nino.plain import PlainNinoPredictor, scale_history
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import NinoWeights, load_weights, save_weights
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.wnn import OPERATIONS, WnnConfig, WnnNetwork

NUM_STEPS = 60


def train(network: nn.Module, loss_of: object) -> tuple[float, float]:
    """Losses before and after."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = loss_of()  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def without_gradient(network: nn.Module) -> set[str]:
    return {name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()}


@pytest.mark.parametrize("gnn", [True, False])
def test_nino_and_wnn_plus(gnn: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = NinoConfig(gnn=gnn, hidden_dim=8, max_horizon=3, lpe_dim=3, max_kernel_elements=4)
    network = build_network(config)
    history = any_graph.history()
    graph = any_graph.graphs().graph(history.manifest, "official", 3)
    edges = to_edges(graph.topology)
    scaled_PC, _ = scale_history(
        PlainNinoPredictor(any_graph.network_weights(gnn=gnn), graphs=any_graph.graphs()), history
    )
    features_EX = edge_features(edges, scaled_PC)
    target_P = scaled_PC[:, -1] - scaled_PC[:, -2]

    def loss() -> Tensor:
        if isinstance(network, NinoNetwork):
            change_EFK = network(features_EX, edges.index_2E, edges.type_E, graph.lpe_VL)
        else:
            features_EFC = features_EX.unflatten(1, (edges.element_EF.shape[1], -1))
            change_EFK = network(features_EFC, edges.type_E[:, None].expand(features_EFC.shape[:2]))
        change_P = from_edges(graph.topology, edges, change_EFK[..., 1])
        return (change_P - target_P).square().mean()

    before, after = train(network, loss)
    assert after < 0.8 * before
    # By design the prediction does not depend on the last convolution.
    assert {
        name for name in without_gradient(network) if not name.startswith(f"gnn.convs.{config.num_layers - 1}.")
    } == set()
    path = tmp_path / "trained.safetensors"
    save_weights(path, NinoWeights(config, network.state_dict(), "memory"))
    loaded = load_weights(path)
    assert loaded.config == config
    plain = any_graph.delta(PlainNinoPredictor(loaded, graphs=any_graph.graphs()), history)
    fused = any_graph.delta(NinoPredictor(loaded, graphs=any_graph.graphs()), history)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_wnn(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = WnnNetwork(WnnConfig(max_horizon=4, hidden_dim=8))
    states_NC = torch.randn(50, 5)
    target_N = states_NC[:, -1] - states_NC[:, -2]

    def loss() -> Tensor:
        return sum((network(name, states_NC)[:, 2] - target_N).square().mean() for name in OPERATIONS)  # type: ignore[return-value]

    before, after = train(network, loss)
    assert after < 0.8 * before
    assert without_gradient(network) == set()
    save_file(network.state_dict(), tmp_path / "wnn.safetensors")
    predictor = create_predictor("wnn", weights=tmp_path / "wnn.safetensors")
    out = any_graph.delta(predictor, any_graph.history(), 3)
    assert out.isfinite().all()
    assert not out.requires_grad
