"""NiNo and WNN+ as trainable PyTorch Geometric modules, with the tensor names of the published checkpoints.

Shape suffixes: V nodes, E edges, D hidden, X edge features (kernel elements x context),
C context, K horizons.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch_geometric.nn import MessagePassing

from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights


class Mlp(nn.Module):
    """Linear layers with SiLU between them, under the published name ``fc``."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(dims):
            layers += [nn.SiLU(), nn.Linear(inputs, outputs)]
        self.fc = nn.Sequential(*layers[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class EdgeModulatedConv(MessagePassing):
    """Mean of linear messages whose scale and shift are given by the edge."""

    def __init__(self, dim: int) -> None:
        super().__init__(aggr="mean")
        self.edge_encoder = nn.Linear(dim, 2 * dim)
        self.pre_nns = nn.ModuleList([nn.Sequential(nn.Linear(2 * dim, dim))])
        self.post_nns = nn.ModuleList([nn.Sequential(nn.Linear(2 * dim, dim))])
        self.lin = nn.Linear(dim, dim)

    def forward(self, nodes_VD: Tensor, edge_index: Tensor, edges_ED: Tensor) -> Tensor:
        mean_VD = self.propagate(edge_index, x=nodes_VD, edges=edges_ED)
        return self.lin(self.post_nns[0](torch.cat([nodes_VD, mean_VD], dim=-1)))

    def message(self, x_i: Tensor, x_j: Tensor, edges: Tensor) -> Tensor:
        scale_ED, shift_ED = self.edge_encoder(edges).chunk(2, dim=-1)
        return scale_ED * self.pre_nns[0](torch.cat([x_i, x_j], dim=-1)) + shift_ED


class EdgeUpdate(nn.Module):
    """New edge features from the old ones and those of both ends."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lin_e = nn.Linear(dim, dim)
        self.lin_s = nn.Linear(dim, dim)
        self.lin_t = nn.Linear(dim, dim)
        self.lin1 = nn.Linear(dim, dim)

    def forward(self, nodes_VD: Tensor, edge_index: Tensor, edges_ED: Tensor) -> Tensor:
        source, target = edge_index
        ends_ED = self.lin_s(nodes_VD)[source] + self.lin_t(nodes_VD)[target]
        return self.lin1(silu(self.lin_e(edges_ED) + ends_ED))


class GraphNetwork(nn.Module):
    """M convolutions with an edge update between each two."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(EdgeModulatedConv(dim) for _ in range(num_layers))
        self.edge_update = nn.ModuleList(EdgeUpdate(dim) for _ in range(num_layers - 1))

    def forward(self, nodes_VD: Tensor, edge_index: Tensor, edges_ED: Tensor, *, trimmed: bool) -> Tensor:
        for conv, update in zip(self.convs, self.edge_update, strict=False):
            nodes_VD = silu(conv(nodes_VD, edge_index, edges_ED))
            edges_ED = update(nodes_VD, edge_index, edges_ED)
        if not trimmed:
            self.convs[-1](nodes_VD, edge_index, edges_ED)
        return edges_ED


class NinoNetwork(nn.Module):
    """The graph network of NiNo: from edge features to predicted changes at every horizon.

    In training mode the signs of the positional encoding, which are arbitrary, are flipped at random.

    Source: NiNo (arXiv 2409.04434), section 4.3 and the published checkpoints.
    """

    def __init__(self, config: NinoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        self.layer_embed = nn.Embedding(config.num_edge_types, dim)
        self.node_proj = Mlp(config.lpe_dim, dim)
        self.edge_proj = Mlp(config.feature_dim, dim)
        self.edge_out = Mlp(dim, dim, config.num_outputs)
        self.gnn = GraphNetwork(dim, config.num_layers)

    def forward(
        self, features_EX: Tensor, edge_index: Tensor, edge_type_E: Tensor, lpe_V8: Tensor, *, trimmed: bool = True
    ) -> Tensor:
        """Predicts scaled changes.

        Args:
            features_EX: Scaled states on each edge, fp32, kernel-element-major; columns beyond those given count as 0.
            edge_index: Source and target node of each edge, (2, E), int64.
            edge_type_E: Rows of the edge-type embedding.
            lpe_V8: Positional encoding of the nodes.
            trimmed: Leave out the last convolution, which the output does not depend on.

        Returns:
            (E, max_kernel_elements, K) changes in scaled space; [..., k - 1] is horizon k.
        """
        if self.training:
            lpe_V8 = lpe_V8 * (torch.randint(0, 2, lpe_V8.shape[1:], device=lpe_V8.device) * 2 - 1)
        edges_ED = self.edge_proj(pad(features_EX, (0, self.config.feature_dim - features_EX.shape[1])))
        edges_ED = self.gnn(
            self.node_proj(lpe_V8), edge_index, edges_ED + self.layer_embed(edge_type_E), trimmed=trimmed
        )
        return self.edge_out(edges_ED).unflatten(-1, (self.config.max_kernel_elements, self.config.max_horizon))


class WnnPlusNetwork(nn.Module):
    """NiNo without the graph: every scalar parameter by itself.

    Source: NiNo (arXiv 2409.04434), section 5 (WNN+), and the published checkpoints.
    """

    def __init__(self, config: NinoConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        self.layer_embed = nn.Embedding(config.num_edge_types, dim)
        self.edge_proj = Mlp(config.feature_dim, dim)
        self.edge_mlp = Mlp(*[dim] * config.num_mlp_layers, config.num_outputs)

    def forward(self, features_NC: Tensor, edge_type_N: Tensor) -> Tensor:
        """Predicts scaled changes (N, K) from the scaled states of N scalar parameters and their edge types."""
        return self.edge_mlp(self.edge_proj(features_NC) + self.layer_embed(edge_type_N))


def build_network(config: NinoConfig) -> NinoNetwork | WnnPlusNetwork:
    """A freshly initialised network with these hyper-parameters."""
    return NinoNetwork(config) if config.gnn else WnnPlusNetwork(config)


def load_network(weights: NinoWeights) -> NinoNetwork | WnnPlusNetwork:
    """A network in evaluation mode with these weights."""
    network = build_network(weights.config)
    network.load_state_dict(dict(weights.tensors))
    return network.eval()
