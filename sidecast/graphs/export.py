"""Writes a topology out edge by edge: for verification, research and meta-training on small models only.

Shape suffixes: V nodes, E edges, F kernel elements, P elements of the parameter vector, C context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidecast.graphs.positional import laplacian_encoding
from sidecast.graphs.topology import Block, BlockKind, EdgeType, ParameterView, Topology

if TYPE_CHECKING:
    from torch_geometric.data import Data

NO_ELEMENT = -1


@dataclass(frozen=True, eq=False)
class EdgeList:
    """Every edge of a graph, self-loops last.

    Attributes:
        index_2E: Source and target node of each edge, int64.
        type_E: Edge types, int64.
        element_EF: Which element of the parameter vector each kernel element of an edge is, int64;
            -1 on structural edges and beyond the end of smaller kernels.
        constant_E: The first edge feature of structural edges and self-loops, fp32; 0 on the others.
    """

    index_2E: Tensor
    type_E: Tensor
    element_EF: Tensor
    constant_E: Tensor


def view_elements(view: ParameterView, num_sources: int, num_targets: int) -> Tensor:
    """Row-major element numbers of a view, int64 (sources, targets, kernel elements)."""
    source = torch.arange(num_sources)[:, None, None] * view.source_stride
    target = torch.arange(num_targets)[None, :, None] * view.target_stride
    kernel = torch.arange(view.num_kernel_elements)[None, None, :] * view.kernel_stride
    position = view.offset + source + target + kernel
    if view.transposed_shape is None:
        return position
    rows, columns = view.transposed_shape
    return position % rows * columns + position // rows


def to_edges(topology: Topology) -> EdgeList:
    """Writes out every edge.

    Args:
        topology: A small graph; memory is in proportion to its edges.

    Returns:
        The edges, in block order and then the self-loops.
    """
    offsets, position = {}, 0
    for spec in topology.parameters:
        offsets[spec.fqn] = position
        position += spec.numel
    num_kernel_elements = max(
        (block.view.num_kernel_elements for block in topology.blocks if block.view is not None), default=1
    )
    num_edges, num_nodes = topology.num_edges, topology.num_nodes
    index_2E = torch.empty(2, num_edges, dtype=torch.int64)
    type_E = torch.empty(num_edges, dtype=torch.int64)
    element_EF = torch.full((num_edges, num_kernel_elements), NO_ELEMENT, dtype=torch.int64)
    constant_E = torch.zeros(num_edges)
    start = 0
    for block in topology.blocks:
        edges = slice(start, start + block.num_edges)
        index_2E[:, edges] = _block_index(block)
        type_E[edges] = block.edge_type
        if block.view is None:
            constant_E[edges] = block.constant
        else:
            elements = _block_elements(block, block.view)
            element_EF[edges, : elements.shape[1]] = elements + offsets[block.view.fqn]
        start = edges.stop
    index_2E[:, start:] = torch.arange(num_nodes)
    type_E[start:] = EdgeType.SELF_LOOP
    constant_E[start:] = Topology.SELF_LOOP_CONSTANT
    return EdgeList(index_2E, type_E, element_EF, constant_E)


def _block_index(block: Block) -> Tensor:
    source = torch.arange(block.source.start, block.source.stop)
    target = torch.arange(block.target.start, block.target.stop)
    if block.kind is BlockKind.DIAGONAL:
        return torch.stack([source, target])
    if block.source_major:
        return torch.stack([source.repeat_interleave(len(target)), target.repeat(len(source))])
    return torch.stack([source.repeat(len(target)), target.repeat_interleave(len(source))])


def _block_elements(block: Block, view: ParameterView) -> Tensor:
    num_targets = len(block.target) if block.kind is BlockKind.DENSE else 1
    elements = view_elements(view, len(block.source), num_targets)
    if not block.source_major:
        elements = elements.transpose(0, 1)
    return elements.reshape(-1, view.num_kernel_elements)


def edge_features(edges: EdgeList, states_PC: Tensor) -> Tensor:
    """Edge features (E, F x C), kernel-element-major.

    Args:
        edges: Every edge.
        states_PC: Parameter vectors as columns, newest last, already scaled if they are meant for NiNo.
    """
    context_len = states_PC.shape[1]
    element_EF = edges.element_EF
    features_EFC = states_PC[element_EF.clamp(min=0)] * (element_EF != NO_ELEMENT).unsqueeze(-1)
    features_EFC[:, 0] += edges.constant_E.to(features_EFC.dtype).unsqueeze(-1)
    return features_EFC.reshape(len(element_EF), element_EF.shape[1] * context_len)


def to_pyg(topology: Topology, states_PC: Tensor) -> Data:
    """A PyTorch Geometric graph of a small model.

    Args:
        topology: A small graph.
        states_PC: Parameter vectors as columns, newest last, already scaled if they are meant for NiNo.

    Returns:
        ``Data`` with ``edge_index`` (2, E), ``edge_attr`` (E, F x C), ``edge_type`` (E), ``edge_element`` (E, F) and
        the Laplacian positional encoding as ``pos`` (V, 8).
    """
    from torch_geometric.data import Data

    edges = to_edges(topology)
    return Data(
        edge_index=edges.index_2E,
        edge_attr=edge_features(edges, states_PC),
        edge_type=edges.type_E,
        edge_element=edges.element_EF,
        pos=laplacian_encoding(topology),
        num_nodes=topology.num_nodes,
    )


def from_edges(topology: Topology, edges: EdgeList, values_EF: Tensor) -> Tensor:
    """Collects one value for each kernel element of each edge into a parameter vector (P).

    Every element of the parameter vector lies on exactly one edge, so this undoes ``edge_features``.

    Args:
        topology: A small graph.
        edges: Its edges.
        values_EF: A value each; those of structural edges and padding are not read.
    """
    vector_P = values_EF.new_zeros(sum(spec.numel for spec in topology.parameters))
    is_parameter_EF = edges.element_EF != NO_ELEMENT
    vector_P[edges.element_EF[is_parameter_EF]] = values_EF[is_parameter_EF]
    return vector_P
