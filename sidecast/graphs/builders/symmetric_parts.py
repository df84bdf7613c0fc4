"""The parts of transformers in the symmetric layout: attention, MLPs, norms, residual connections.

One set of stream nodes for every position in the chain of residual additions. What reads the stream reads those nodes,
what writes it writes the next set, and norm weights attach to the nodes that they scale. The automorphisms of what is
drawn here that leave boundary nodes in place are exactly the permutations that leave the network's output unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler, VectorSlice
from sidecast.graphs.model_config import AttentionShape
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A matrix and its bias.

    Attributes:
        matrix: The matrix.
        bias: Its bias; None if it has none.
    """

    matrix: MatrixSlice
    bias: VectorSlice | None = None

    @classmethod
    def linear(cls, name: str, num_inputs: int, num_outputs: int, *, has_bias: bool) -> Projection:
        """A ``torch.nn.Linear`` of that module name."""
        bias = VectorSlice(fqn=f"{name}.bias", shape=(num_outputs,)) if has_bias else None
        return cls(matrix=MatrixSlice.linear(f"{name}.weight", num_inputs, num_outputs), bias=bias)


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The parameters of one attention layer.

    Attributes:
        query: Stream to query heads.
        key: Stream to key heads.
        value: Stream to value heads.
        output: All heads' mixed values to the stream.
        query_norm: Norm weight over a query head's dimensions, shared by heads; None if there is none.
        key_norm: The same for keys.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    query_norm: str | None = None
    key_norm: str | None = None

    @classmethod
    def separate(
        cls, names: tuple[str, str, str, str], shape: AttentionShape, *, has_bias: bool, has_output_bias: bool
    ) -> AttentionWeights:
        """Four ``torch.nn.Linear`` modules: query, key, value, output."""
        query, key, value, output = names
        return cls(
            query=Projection.linear(query, shape.hidden, shape.query_width, has_bias=has_bias),
            key=Projection.linear(key, shape.hidden, shape.kv_width, has_bias=has_bias),
            value=Projection.linear(value, shape.hidden, shape.kv_width, has_bias=has_bias),
            output=Projection.linear(output, shape.query_width, shape.hidden, has_bias=has_output_bias),
        )


def attach(assembler: TopologyAssembler, fqn: str, target: NodeRange, edge_type: EdgeType) -> None:
    """Draws a vector on edges from a node of its own to as many target nodes."""
    attach_part(assembler, fqn, VectorSlice(fqn=fqn, shape=(len(target),)), target, edge_type)


def attach_part(
    assembler: TopologyAssembler, name: str, vector: VectorSlice, target: NodeRange, edge_type: EdgeType
) -> None:
    """Draws a run of a parameter's elements on edges from a node of its own to as many target nodes."""
    node = assembler.nodes(1, name, is_boundary=True)
    assembler.vector_part(name, vector, node, target, edge_type)


def layer_norm(assembler: TopologyAssembler, name: str, target: NodeRange) -> None:
    """Draws a norm's weight and bias on the nodes that it scales."""
    attach(assembler, f"{name}.weight", target, EdgeType.NORM)
    attach(assembler, f"{name}.bias", target, EdgeType.BIAS)


def project(
    assembler: TopologyAssembler,
    name: str,
    projection: Projection,
    inputs: NodeRange,
    outputs: NodeRange,
    edge_type: EdgeType = EdgeType.FULLY_CONNECTED,
    *,
    is_reversed: bool = False,
) -> None:
    """Draws a matrix and its bias."""
    assembler.matrix(f"{name}.weight", projection.matrix, inputs, outputs, edge_type, is_reversed=is_reversed)
    if projection.bias is not None:
        attach_part(assembler, f"{name}.bias", projection.bias, outputs, EdgeType.BIAS)


def next_stream(assembler: TopologyAssembler, name: str, stream: NodeRange, *, is_output: bool = False) -> NodeRange:
    """Appends the stream's next set of nodes, tied to the last one by the residual connection.

    Those of a model's output are boundary nodes: what reads it knows their order.
    """
    following = assembler.nodes(len(stream), f"{name}.stream", is_boundary=is_output)
    assembler.structural(f"{name}.res", EdgeType.RESIDUAL, stream, following, BlockKind.DIAGONAL)
    return following


def attention(
    assembler: TopologyAssembler,
    name: str,
    weights: AttentionWeights,
    shape: AttentionShape,
    reads: NodeRange,
    writes: NodeRange,
    *,
    has_rotary: bool,
) -> None:
    """Draws one attention layer.

    A head's queries are tied to its group's keys dimension by dimension, its group's values to the head's mixed
    values likewise, and one node for each head ties its queries to its mixed values. With rotary embeddings every
    dimension has a frequency and a place in its pair, so boundary nodes hold the dimensions in place.

    Args:
        assembler: Takes the nodes and blocks.
        name: Prefix of the blocks' names.
        weights: The parameters.
        shape: The widths.
        reads: Stream nodes that queries, keys and values are made from.
        writes: Stream nodes that the output is added to.
        has_rotary: Whether queries and keys are rotated by position.
    """
    heads = assembler.nodes(shape.num_heads, f"{name}.heads")
    queries = assembler.nodes(shape.query_width, f"{name}.queries")
    keys = assembler.nodes(shape.kv_width, f"{name}.keys")
    values = assembler.nodes(shape.kv_width, f"{name}.values")
    mixed = assembler.nodes(shape.query_width, f"{name}.mixed")

    project(assembler, f"{name}.query", weights.query, reads, queries, EdgeType.QUERY)
    project(assembler, f"{name}.key", weights.key, reads, keys, EdgeType.KEY, is_reversed=True)
    project(assembler, f"{name}.value", weights.value, reads, values, EdgeType.VALUE)
    project(assembler, f"{name}.output", weights.output, mixed, writes)
    for head in range(shape.num_heads):
        group = head // shape.heads_per_group
        node = NodeRange(heads.start + head, heads.start + head + 1)
        query, mix = _head(queries, head, shape.head_dim), _head(mixed, head, shape.head_dim)
        key, value = _head(keys, group, shape.head_dim), _head(values, group, shape.head_dim)
        assembler.structural(f"{name}.query.head{head}", EdgeType.HEAD, node, query)
        assembler.structural(f"{name}.mixed.head{head}", EdgeType.HEAD, node, mix)
        assembler.structural(f"{name}.score.head{head}", EdgeType.RESIDUAL, query, key, BlockKind.DIAGONAL)
        assembler.structural(f"{name}.mix.head{head}", EdgeType.RESIDUAL, value, mix, BlockKind.DIAGONAL)
    if has_rotary:
        _hold_dimensions(assembler, f"{name}.key", weights.key_norm, keys, shape.num_kv_heads)
    if weights.query_norm is not None:
        _hold_dimensions(assembler, f"{name}.query", weights.query_norm, queries, shape.num_heads)


def _head(nodes: NodeRange, head: int, head_dim: int) -> NodeRange:
    start = nodes.start + head * head_dim
    return NodeRange(start, start + head_dim)


def _hold_dimensions(
    assembler: TopologyAssembler, name: str, norm: str | None, nodes: NodeRange, num_heads: int
) -> None:
    """Ties a head's dimensions to boundary nodes that all heads share, with the norm's weight on those."""
    head_dim = len(nodes) // num_heads
    dimensions = assembler.nodes(head_dim, f"{name}.dimensions", is_boundary=True)
    for head in range(num_heads):
        target = _head(nodes, head, head_dim)
        assembler.structural(f"{name}.dimensions{head}", EdgeType.RESIDUAL, dimensions, target, BlockKind.DIAGONAL)
    if norm is not None:
        attach(assembler, norm, dimensions, EdgeType.NORM)


def mlp(
    assembler: TopologyAssembler,
    name: str,
    into: Projection,
    out_of: Projection,
    inner_width: int,
    reads: NodeRange,
    writes: NodeRange,
) -> None:
    """Draws a two-layer MLP."""
    hidden = assembler.nodes(inner_width, f"{name}.hidden")
    project(assembler, f"{name}.into", into, reads, hidden)
    project(assembler, f"{name}.out_of", out_of, hidden, writes)


def gated_mlp(
    assembler: TopologyAssembler,
    name: str,
    gate: Projection,
    up: Projection,
    down: Projection,
    inner_width: int,
    reads: NodeRange,
    writes: NodeRange,
) -> NodeRange:
    """Draws an MLP whose hidden units are activated gates times linear units; returns the gates' nodes."""
    gates = assembler.nodes(inner_width, f"{name}.hidden")
    linear_units = assembler.nodes(inner_width, f"{name}.up")
    project(assembler, f"{name}.gate", gate, reads, gates)
    project(assembler, f"{name}.up", up, reads, linear_units)
    assembler.structural(f"{name}.product", EdgeType.RESIDUAL, linear_units, gates, BlockKind.DIAGONAL)
    project(assembler, f"{name}.down", down, gates, writes)
    return gates
