"""NiNo evaluated edge by edge in float64 with random weights: an independent check of what graphs do to nowcasts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidecast.graphs import Topology, laplacian_encoding, to_edges
from sidecast.graphs.export import edge_features, from_edges

WIDTH, CONTEXT = 12, 5


class EdgewiseNino(nn.Module):
    """Two message-passing layers with edge updates, mean aggregation, and an edge read-out."""

    def __init__(self, num_kernel_elements: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.node_proj = nn.Linear(8, WIDTH)
        self.edge_proj = nn.Linear(num_kernel_elements * CONTEXT, WIDTH)
        self.types = nn.Embedding(15, WIDTH)
        self.modulate = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.before = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.after = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.update = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, num_kernel_elements))
        self.double()

    def forward(self, topology: Topology, states_PC: Tensor) -> Tensor:
        """The predicted, scaled change of every parameter (P)."""
        edges = to_edges(topology)
        source, target = edges.index_2E
        x = self.node_proj(laplacian_encoding(topology).double())
        e = self.edge_proj(edge_features(edges, _scaled(topology, states_PC))) + self.types(edges.type_E)
        num_incoming = torch.zeros(len(x), dtype=torch.float64).index_add(0, target, torch.ones(len(e)).double())
        for modulate, before, after, update in zip(self.modulate, self.before, self.after, self.update, strict=True):
            scale, shift = modulate(e).chunk(2, dim=1)
            message = scale * before(torch.cat([x[target], x[source]], dim=1)) + shift
            mean = torch.zeros_like(x).index_add(0, target, message) / num_incoming[:, None]
            x = nn.functional.silu(after(torch.cat([x, mean], dim=1)))
            e = nn.functional.silu(update(torch.cat([e, x[source], x[target]], dim=1)))
        return from_edges(topology, edges, self.out(e))


def _scaled(topology: Topology, states_PC: Tensor) -> Tensor:
    parts = states_PC.split([spec.numel for spec in topology.parameters])
    return torch.cat([(part - part.mean()) / (part.std() + 1e-6) for part in parts])
