"""Random parts of a neural graph, so that what a step costs does not grow with the model.

Shape suffixes: V nodes, E edges, F kernel elements, S sources, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.graphs.export import EdgeList, to_edges
from sidecast.graphs.topology import Block, BlockKind
from sidecast.manifest import ModelManifest
from sidecast.predictors.nino.block_parts import in_degrees
from sidecast.predictors.nino.graph_cache import NeuralGraph

STRUCTURAL = -1
"""Row of edges that carry no parameter."""


@dataclass(frozen=True)
class SampledEdges:
    """Some edges of a graph.

    Attributes:
        edges: They.
        weight_E: How many edges of its block and target each one stands for.
        row_E: Number of the parameter tensor of each; ``STRUCTURAL`` where it carries none.
    """

    edges: EdgeList
    weight_E: Tensor
    row_E: Tensor


class EdgeSampler:
    """The graph of a model, from which random edges are taken.

    Args:
        manifest: The model; small, since its edges are written out.
        graph: Of the model.

    Attributes:
        lpe_VL: The positional encoding of the nodes.
        degree_V: Incoming edges of each node.
    """

    def __init__(self, manifest: ModelManifest, graph: NeuralGraph) -> None:
        self._topology = graph.topology
        self._edges = to_edges(graph.topology)
        rows = [
            torch.full((block.num_edges,), STRUCTURAL if block.view is None else manifest.rows[block.view.fqn])
            for block in graph.topology.blocks
        ]
        self._row_E = torch.cat([*rows, torch.full((graph.topology.num_nodes,), STRUCTURAL)])
        self.lpe_VL = graph.lpe_VL
        self.degree_V = in_degrees(graph.topology)

    def all_edges(self) -> SampledEdges:
        """Every edge, standing for itself."""
        return self._take([(slice(0, self._topology.num_edges), 1.0)])

    def sample(self, num_sources: int, generator: torch.Generator) -> SampledEdges:
        """Some incoming edges of every node.

        Args:
            num_sources: Edges of each target in each dense block, drawn with replacement; blocks with no more
                sources than this, diagonal ones and self-loops are taken whole.
            generator: Decides.
        """
        pieces: list[tuple[slice | Tensor, float]] = []
        start = 0
        for block in self._topology.blocks:
            if block.kind is BlockKind.DENSE and len(block.source) > num_sources:
                drawn = _draw(block, num_sources, generator) + start
                pieces.append((drawn, len(block.source) / num_sources))
            else:
                pieces.append((slice(start, start + block.num_edges), 1.0))
            start += block.num_edges
        pieces.append((slice(start, start + self._topology.num_nodes), 1.0))
        return self._take(pieces)

    def _take(self, pieces: list[tuple[slice | Tensor, float]]) -> SampledEdges:
        numbers = torch.arange(len(self._row_E))
        taken = [numbers[piece] if isinstance(piece, slice) else piece for piece, _ in pieces]
        weights = [torch.full((len(each),), weight) for each, (_, weight) in zip(taken, pieces, strict=True)]
        number_E = torch.cat(taken)
        every = self._edges
        edges = EdgeList(
            every.index_2E[:, number_E],
            every.type_E[number_E],
            every.element_EF[number_E],
            every.constant_E[number_E],
        )
        return SampledEdges(edges, torch.cat(weights), self._row_E[number_E])


def _draw(block: Block, num_sources: int, generator: torch.Generator) -> Tensor:
    """Numbers of edges inside a dense block: so many sources for every target."""
    num_targets = len(block.target)
    source_ST = torch.randint(len(block.source), (num_sources, num_targets), generator=generator)
    target_T = torch.arange(num_targets)
    if block.source_major:
        return (source_ST * num_targets + target_T).flatten()
    return (target_T * len(block.source) + source_ST).flatten()
