"""GPT-2 in the symmetric layout."""

from __future__ import annotations

from sidecast.graphs.assembler import TopologyAssembler, VectorSlice
from sidecast.graphs.builders.gpt2_shape import Gpt2Shape
from sidecast.graphs.builders.output_heads import draw_output_head
from sidecast.graphs.builders.symmetric_parts import (
    AttentionWeights,
    Projection,
    attention,
    layer_norm,
    mlp,
    next_stream,
)
from sidecast.graphs.model_config import AttentionShape, ModelConfig
from sidecast.graphs.topology import EdgeType


def draw_gpt2_symmetric(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws GPT-2 so that its symmetries are the graph's."""
    shape = Gpt2Shape.from_config(assembler, config)
    attention_shape = AttentionShape(
        hidden=shape.hidden, num_heads=shape.num_heads, num_kv_heads=shape.num_heads, head_dim=shape.head_dim
    )
    tokens = assembler.nodes(shape.vocab_size, "tokens", is_boundary=True)
    positions = assembler.nodes(shape.num_positions, "positions", is_boundary=True)
    stream = assembler.nodes(shape.hidden, "embeddings.stream")
    assembler.lookup(f"{shape.prefix}wte.weight", tokens, stream, EdgeType.TOKEN_EMBEDDING)
    assembler.lookup(f"{shape.prefix}wpe.weight", positions, stream, EdgeType.POSITION_EMBEDDING)
    for layer in range(shape.num_layers):
        name = f"{shape.prefix}h.{layer}"
        layer_norm(assembler, f"{name}.ln_1", stream)
        attended = next_stream(assembler, f"{name}.attn", stream)
        weights = _attention_weights(shape, f"{name}.attn")
        attention(assembler, f"{name}.attn", weights, attention_shape, stream, attended, has_rotary=False)
        layer_norm(assembler, f"{name}.ln_2", attended)
        # A bare decoder returns its stream.
        is_output = not shape.has_head and layer == shape.num_layers - 1
        stream = next_stream(assembler, f"{name}.mlp", attended, is_output=is_output)
        into = _projection(shape, f"{name}.mlp.c_fc", shape.hidden, shape.inner_width)
        out_of = _projection(shape, f"{name}.mlp.c_proj", shape.inner_width, shape.hidden)
        mlp(assembler, f"{name}.mlp", into, out_of, shape.inner_width, attended, stream)
    layer_norm(assembler, f"{shape.prefix}ln_f", stream)
    if shape.has_head:
        draw_output_head(assembler, stream, shape.vocab_size, is_tied=shape.is_tied)


def _attention_weights(shape: Gpt2Shape, name: str) -> AttentionWeights:
    fused = f"{name}.c_attn"
    query, key, value = (
        Projection(matrix=matrix, bias=bias)
        for matrix, bias in zip(shape.fused_projections(fused), shape.fused_biases(fused), strict=True)
    )
    output = _projection(shape, f"{name}.c_proj", shape.hidden, shape.hidden)
    return AttentionWeights(query=query, key=key, value=value, output=output)


def _projection(shape: Gpt2Shape, name: str, num_inputs: int, num_outputs: int) -> Projection:
    bias = VectorSlice(fqn=f"{name}.bias", shape=(num_outputs,))
    return Projection(matrix=shape.projection(name, num_inputs, num_outputs), bias=bias)
