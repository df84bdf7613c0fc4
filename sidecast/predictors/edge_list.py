"""A topology written out edge by edge, for training and for checking; never on the serving path.

Shape suffixes: E edges, F kernel elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.graphs.topology import Block, BlockKind, EdgeType, Topology


@dataclass(frozen=True)
class EdgeList:
    """All edges of a graph, self-loops last.

    Attributes:
        edge_index: Source and target of each edge, (2, E), int64.
        edge_type_E: Edge types, int64.
        element_EF: Which element of the parameter vector each feature carries; -1 for structure and padding.
        constant_E: The first feature of structural edges; 0 on parameters.
    """

    edge_index: Tensor
    edge_type_E: Tensor
    element_EF: Tensor
    constant_E: Tensor


def expand_edges(topology: Topology) -> EdgeList:
    """Writes out every edge of a topology in its published order."""
    offsets, position = {}, 0
    for spec in topology.parameters:
        offsets[spec.fqn] = position
        position += spec.numel
    num_features = max([1, *(block.view.num_kernel_elements for block in topology.blocks if block.view)])
    parts = [_expand_block(block, offsets, num_features) for block in topology.blocks]
    nodes = torch.arange(topology.num_nodes)
    parts.append(
        EdgeList(
            torch.stack([nodes, nodes]),
            torch.full_like(nodes, EdgeType.SELF_LOOP),
            torch.full((topology.num_nodes, num_features), -1),
            torch.full((topology.num_nodes,), topology.SELF_LOOP_CONSTANT),
        )
    )
    return EdgeList(
        torch.cat([part.edge_index for part in parts], dim=1),
        torch.cat([part.edge_type_E for part in parts]),
        torch.cat([part.element_EF for part in parts]),
        torch.cat([part.constant_E for part in parts]),
    )


def _expand_block(block: Block, offsets: dict[str, int], num_features: int) -> EdgeList:
    sources, targets = torch.arange(len(block.source)), torch.arange(len(block.target))
    if block.kind is BlockKind.DIAGONAL:
        targets = torch.zeros_like(sources)
        target_nodes = block.target.start + sources
    else:
        grid = torch.meshgrid(sources, targets, indexing="ij")
        sources, targets = ((side if block.source_major else side.T).flatten() for side in grid)
        target_nodes = block.target.start + targets
    element_EF = torch.full((len(sources), num_features), -1)
    view = block.view
    if view is not None:
        kernel = torch.arange(view.num_kernel_elements)
        position = view.offset + sources[:, None] * view.source_stride + targets[:, None] * view.target_stride
        position = position + kernel * view.kernel_stride
        if view.transposed_shape is not None:
            rows, columns = view.transposed_shape
            position = position % rows * columns + position // rows
        element_EF[:, : view.num_kernel_elements] = position + offsets[view.fqn]
    constant = 0.0 if view is not None else block.constant
    return EdgeList(
        torch.stack([block.source.start + sources, target_nodes]),
        torch.full_like(sources, block.edge_type),
        element_EF,
        torch.full((len(sources),), constant),
    )
