"""Neural graphs: topology, builders per model family, positional encodings."""

from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.export import to_edges, to_pyg
from sidecast.graphs.module_trace import manifest_of_chain, manifest_of_module, remember_graph, topology_of_module
from sidecast.graphs.positional import laplacian_encoding
from sidecast.graphs.registry import build_topology, graph_builders
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
    "manifest_of_chain",
    "manifest_of_module",
    "remember_graph",
    "to_edges",
    "to_pyg",
    "topology_of_module",
]
