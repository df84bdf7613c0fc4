"""Neural graphs: topology, builders per model family, positional encodings."""

from sidecast.graphs.export import to_edges, to_pyg
from sidecast.graphs.positional import laplacian_encoding
from sidecast.graphs.registry import GraphBuilder, build_topology, graph_builders
from sidecast.graphs.topology import Block, BlockKind, EdgeType, NodeLayer, NodeRange, ParameterView, Topology

__all__ = [
    "Block",
    "BlockKind",
    "EdgeType",
    "GraphBuilder",
    "NodeLayer",
    "NodeRange",
    "ParameterView",
    "Topology",
    "build_topology",
    "graph_builders",
    "laplacian_encoding",
    "to_edges",
    "to_pyg",
]
