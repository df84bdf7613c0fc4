"""The published layout of GPT-2, flaws included, because the published weights were trained on it.

Nodes of biases and norms come before the range that they attach to. The first norm and the key bias of a layer attach
to the output of the layer before it.

Source: NiNo (arXiv 2409.04434), published checkpoints and the graphs that they were evaluated with.
"""

from __future__ import annotations

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.builders.gpt2_shape import Gpt2Shape
from sidecast.graphs.builders.llama_official import head_edges
from sidecast.graphs.builders.output_heads import draw_output_head
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


def draw_gpt2_official(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws GPT-2 as the published weights know it."""
    shape = Gpt2Shape.from_config(assembler, config)
    tokens = assembler.nodes(shape.vocab_size, "tokens", is_boundary=True)
    positions = assembler.nodes(shape.num_positions, "positions", is_boundary=True)
    before = _nodes_before_stream(assembler, shape, 0)
    stream = assembler.nodes(shape.hidden, "embeddings")
    assembler.lookup(f"{shape.prefix}wte.weight", tokens, stream, EdgeType.TOKEN_EMBEDDING)
    assembler.lookup(f"{shape.prefix}wpe.weight", positions, stream, EdgeType.POSITION_EMBEDDING)
    for layer in range(shape.num_layers):
        name = f"{shape.prefix}h.{layer}"
        key_bias = before[2]
        _norm(assembler, f"{name}.ln_1", before, stream)
        attended = _attention(assembler, name, stream, key_bias, shape)
        stream, before = _mlp(assembler, name, attended, layer, shape)
    _norm(assembler, f"{shape.prefix}ln_f", before, stream)
    if shape.has_head:
        draw_output_head(assembler, stream, shape.vocab_size, is_tied=shape.is_tied)


def _nodes_before_stream(assembler: TopologyAssembler, shape: Gpt2Shape, layer: int) -> list[NodeRange]:
    """The norm weight and bias, and the key bias, that attach to the stream which this layer reads."""
    if layer == shape.num_layers:
        names = [f"{shape.prefix}ln_f.weight", f"{shape.prefix}ln_f.bias"]
    else:
        name = f"{shape.prefix}h.{layer}"
        names = [f"{name}.ln_1.weight", f"{name}.ln_1.bias", f"{name}.attn.c_attn.k.bias"]
    return [assembler.nodes(1, name, is_boundary=True) for name in names]


def _norm(assembler: TopologyAssembler, name: str, nodes: list[NodeRange], stream: NodeRange) -> None:
    assembler.vector(f"{name}.weight", nodes[0], stream, EdgeType.NORM)
    assembler.vector(f"{name}.bias", nodes[1], stream, EdgeType.BIAS)


def _attention(
    assembler: TopologyAssembler, layer_name: str, stream: NodeRange, key_bias: NodeRange, shape: Gpt2Shape
) -> NodeRange:
    name, fused = f"{layer_name}.attn", f"{layer_name}.attn.c_attn"
    heads = assembler.nodes(shape.num_heads, f"{name}.heads")
    query_bias = assembler.nodes(1, f"{fused}.q.bias", is_boundary=True)
    value_bias = assembler.nodes(1, f"{fused}.v.bias", is_boundary=True)
    queries = assembler.nodes(shape.hidden, f"{name}.queries")
    values = assembler.nodes(shape.hidden, f"{name}.values")
    output_bias = assembler.nodes(1, f"{name}.c_proj.bias", is_boundary=True)
    norm = [assembler.nodes(1, f"{layer_name}.ln_2.{part}", is_boundary=True) for part in ("weight", "bias")]
    attended = assembler.nodes(shape.hidden, f"{name}.output")

    query, key, value = shape.fused_projections(fused)
    query_vector, key_vector, value_vector = shape.fused_biases(fused)
    assembler.matrix(f"{fused}.q.weight", query, stream, queries, EdgeType.QUERY)
    head_edges(assembler, f"{fused}.q", heads, queries, shape.num_heads, shape.head_dim)
    assembler.vector_part(f"{fused}.q.bias", query_vector, query_bias, queries, EdgeType.BIAS)
    assembler.matrix(f"{fused}.k.weight", key, stream, queries, EdgeType.KEY, is_reversed=True)
    assembler.vector_part(f"{fused}.k.bias", key_vector, key_bias, stream, EdgeType.BIAS)
    assembler.matrix(f"{fused}.v.weight", value, stream, values, EdgeType.VALUE)
    head_edges(assembler, f"{fused}.v", heads, values, shape.num_heads, shape.head_dim)
    assembler.vector_part(f"{fused}.v.bias", value_vector, value_bias, values, EdgeType.BIAS)
    assembler.structural(f"{fused}.v.res", EdgeType.RESIDUAL, stream, attended, BlockKind.DIAGONAL)
    projection = shape.projection(f"{name}.c_proj", len(values), len(attended))
    assembler.matrix(projection.fqn, projection, values, attended, EdgeType.FULLY_CONNECTED)
    assembler.vector(f"{name}.c_proj.bias", output_bias, attended, EdgeType.BIAS)
    _norm(assembler, f"{layer_name}.ln_2", norm, attended)
    return attended


def _mlp(
    assembler: TopologyAssembler, layer_name: str, attended: NodeRange, layer: int, shape: Gpt2Shape
) -> tuple[NodeRange, list[NodeRange]]:
    name = f"{layer_name}.mlp"
    hidden_bias = assembler.nodes(1, f"{name}.c_fc.bias", is_boundary=True)
    hidden = assembler.nodes(shape.inner_width, f"{name}.hidden")
    output_bias = assembler.nodes(1, f"{name}.c_proj.bias", is_boundary=True)
    before = _nodes_before_stream(assembler, shape, layer + 1)
    output = assembler.nodes(shape.hidden, f"{name}.output")

    projection = shape.projection(f"{name}.c_fc", len(attended), len(hidden))
    assembler.matrix(projection.fqn, projection, attended, hidden, EdgeType.FULLY_CONNECTED)
    assembler.vector(f"{name}.c_fc.bias", hidden_bias, hidden, EdgeType.BIAS)
    assembler.structural(f"{name}.c_fc.res", EdgeType.RESIDUAL, attended, output, BlockKind.DIAGONAL)
    projection = shape.projection(f"{name}.c_proj", len(hidden), len(output))
    assembler.matrix(projection.fqn, projection, hidden, output, EdgeType.FULLY_CONNECTED)
    assembler.vector(f"{name}.c_proj.bias", output_bias, output, EdgeType.BIAS)
    return output, before
