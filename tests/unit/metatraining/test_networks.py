"""What is trained is what predictors compute: the same functions as the networks that are published."""

from __future__ import annotations

import pytest
import torch

from sidecast.graphs.export import edge_features
from sidecast.metatraining.edges import EdgeSampler
from sidecast.metatraining.networks import hidden_to_changes, initial_tensors, nino_hidden, wnn_changes, wnn_plus_hidden
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.graph_cache import build_graph
from sidecast.predictors.nino.network import NinoNetwork, WnnPlusNetwork
from sidecast.predictors.wnn import OPERATIONS, WnnConfig, WnnNetwork
from tests.support.small_trajectories import SOURCE

MANIFEST = SOURCE.task.model.build().manifest
NINO = NinoConfig(hidden_dim=16, max_horizon=3, max_kernel_elements=1)
WNN_PLUS = NinoConfig(gnn=False, hidden_dim=16, max_horizon=3)


@pytest.fixture(params=["official", "symmetric"])
def sampler(request: pytest.FixtureRequest) -> EdgeSampler:
    return EdgeSampler(MANIFEST, build_graph(MANIFEST, request.param, 8))


@torch.no_grad()
def test_nino(sampler: EdgeSampler) -> None:
    network = NinoNetwork(NINO).eval()
    everything = sampler.all_edges()
    features = edge_features(everything.edges, torch.randn(MANIFEST.num_elements, 5))
    tensors = network.state_dict()
    hidden = nino_hidden(NINO, tensors, features, everything, sampler.degree_V, sampler.lpe_VL)
    found = hidden_to_changes(NINO, tensors, hidden)
    expected = network(features, everything.edges.index_2E, everything.edges.type_E, sampler.lpe_VL)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_wnn_plus(sampler: EdgeSampler) -> None:
    network = WnnPlusNetwork(WNN_PLUS)
    edges = sampler.all_edges().edges
    features = edge_features(edges, torch.randn(MANIFEST.num_elements, 5))
    hidden = wnn_plus_hidden(WNN_PLUS, network.state_dict(), features, edges.type_E)
    found = hidden_to_changes(WNN_PLUS, network.state_dict(), hidden)
    torch.testing.assert_close(found[:, 0], network(features, edges.type_E), rtol=0, atol=1e-5)


@torch.no_grad()
def test_wnn() -> None:
    network = WnnNetwork(WnnConfig(max_horizon=3))
    states, operations = torch.randn(60, 5), torch.arange(60) % 3
    found = wnn_changes(network.state_dict(), states, operations)
    for number, operation in enumerate(OPERATIONS):
        chosen = operations == number
        torch.testing.assert_close(found[chosen], network(operation, states[chosen]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [NINO, WNN_PLUS, WnnConfig(max_horizon=3)])
def test_training_begins_with_no_change_and_the_published_names(config: NinoConfig | WnnConfig) -> None:
    tensors = initial_tensors(config, torch.Generator().manual_seed(0))
    again = initial_tensors(config, torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    states = torch.randn(20, 5)
    if isinstance(config, WnnConfig):
        WnnNetwork(config).load_state_dict(tensors)
        change = wnn_changes(tensors, states, torch.arange(20) % 3)
    else:
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == config.shapes()
        network = NinoNetwork(config) if config.gnn else WnnPlusNetwork(config)
        network.load_state_dict(tensors)
        index, types = torch.arange(20).repeat(2, 1), torch.ones(20, dtype=torch.int64)
        change = network(states, index, types, torch.randn(20, 8)) if config.gnn else network(states, types)
    assert torch.equal(change, torch.zeros_like(change))
