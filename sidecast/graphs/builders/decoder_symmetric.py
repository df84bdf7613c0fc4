"""Llama-like decoders in the symmetric layout: rotary attention, gated MLPs or mixtures of them, pre-norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.builders.llama_official import decoder_prefix
from sidecast.graphs.builders.output_heads import draw_output_head
from sidecast.graphs.builders.symmetric_parts import (
    AttentionWeights,
    Projection,
    attach,
    attention,
    gated_mlp,
    next_stream,
)
from sidecast.graphs.model_config import AttentionShape, ModelConfig
from sidecast.graphs.topology import EdgeType, NodeRange

DrawMlp = Callable[[TopologyAssembler, ModelConfig, str, NodeRange, NodeRange], None]
"""Draws what stands in an MLP's place: assembler, configuration, layer name, stream it reads, stream it writes."""


def draw_gated_mlp(
    assembler: TopologyAssembler, config: ModelConfig, layer: str, reads: NodeRange, writes: NodeRange
) -> None:
    """Draws the gated MLP of a Llama layer."""
    inner, has_bias = config.count("intermediate_size"), config.flag("mlp_bias", False)
    name, width = f"{layer}.mlp", len(reads)
    gate, up = (Projection.linear(f"{name}.{part}_proj", width, inner, has_bias=has_bias) for part in ("gate", "up"))
    down = Projection.linear(f"{name}.down_proj", inner, width, has_bias=has_bias)
    gated_mlp(assembler, name, gate, up, down, inner, reads, writes)


def draw_decoder_symmetric(
    assembler: TopologyAssembler,
    config: ModelConfig,
    *,
    has_qk_norm: bool = False,
    has_qkv_bias: bool | None = None,
    draw_mlp: DrawMlp = draw_gated_mlp,
) -> None:
    """Draws a Llama-like decoder so that its symmetries are the graph's.

    Args:
        assembler: Takes the nodes and blocks.
        config: Hugging Face configuration of the model.
        has_qk_norm: Whether queries and keys are normalised per head (Qwen3).
        has_qkv_bias: Whether queries, keys and values have biases; None if ``attention_bias`` says so, for the
            attention's output too.
        draw_mlp: Draws what stands in the MLP's place.
    """
    shape = AttentionShape.from_config(config)
    attention_bias = config.flag("attention_bias", False)
    prefix = decoder_prefix(assembler)
    tokens = assembler.nodes(config.count("vocab_size"), "tokens", is_boundary=True)
    stream = assembler.nodes(shape.hidden, "embeddings.stream")
    assembler.lookup(f"{prefix}embed_tokens.weight", tokens, stream, EdgeType.TOKEN_EMBEDDING)
    num_layers = config.count("num_hidden_layers")
    for layer in range(num_layers):
        name = f"{prefix}layers.{layer}"
        projections = tuple(f"{name}.self_attn.{part}_proj" for part in "qkvo")
        weights = AttentionWeights.separate(
            (projections[0], projections[1], projections[2], projections[3]),
            shape,
            has_bias=attention_bias if has_qkv_bias is None else has_qkv_bias,
            has_output_bias=attention_bias if has_qkv_bias is None else False,
        )
        if has_qk_norm:
            norm = f"{name}.self_attn.{{}}_norm.weight"
            weights = replace(weights, query_norm=norm.format("q"), key_norm=norm.format("k"))
        attach(assembler, f"{name}.input_layernorm.weight", stream, EdgeType.NORM)
        attended = next_stream(assembler, f"{name}.self_attn", stream)
        attention(assembler, f"{name}.self_attn", weights, shape, stream, attended, has_rotary=True)
        attach(assembler, f"{name}.post_attention_layernorm.weight", attended, EdgeType.NORM)
        # A bare decoder returns its stream.
        is_output = not prefix and layer == num_layers - 1
        stream = next_stream(assembler, f"{name}.mlp", attended, is_output=is_output)
        draw_mlp(assembler, config, name, attended, stream)
    attach(assembler, f"{prefix}norm.weight", stream, EdgeType.NORM)
    if prefix:
        draw_output_head(assembler, stream, len(tokens), is_tied=config.flag("tie_word_embeddings", False))
