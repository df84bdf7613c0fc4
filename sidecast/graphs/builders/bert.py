"""BERT and its usual heads: masked language model, next sentence, classifiers, question answering.

There is no published graph of this family, so there is no official layout.
"""

from __future__ import annotations

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.symmetric_parts import (
    AttentionWeights,
    Projection,
    attach,
    attention,
    layer_norm,
    mlp,
    next_stream,
    project,
)
from sidecast.graphs.model_config import AttentionShape, ModelConfig
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


def draw_bert(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws BERT so that its symmetries are the graph's."""
    shape = AttentionShape.from_config(config)
    prefix = "bert." if assembler.has_prefix("bert.") else ""
    tokens = assembler.nodes(config.count("vocab_size"), "tokens", is_boundary=True)
    embeddings = _embeddings(assembler, config, f"{prefix}embeddings", tokens, shape.hidden)
    stream = embeddings
    num_layers = config.count("num_hidden_layers")
    for layer in range(num_layers):
        name = f"{prefix}encoder.layer.{layer}"
        attended = next_stream(assembler, f"{name}.attention", stream)
        projections = tuple(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))
        weights = AttentionWeights.separate(
            (projections[0], projections[1], projections[2], f"{name}.attention.output.dense"),
            shape,
            has_bias=True,
            has_output_bias=True,
        )
        attention(assembler, f"{name}.attention", weights, shape, stream, attended, has_rotary=False)
        layer_norm(assembler, f"{name}.attention.output.LayerNorm", attended)
        # A bare encoder returns its stream.
        is_output = not prefix and layer == num_layers - 1
        stream = next_stream(assembler, f"{name}.output", attended, is_output=is_output)
        inner = config.count("intermediate_size")
        into = Projection.linear(f"{name}.intermediate.dense", shape.hidden, inner, has_bias=True)
        out_of = Projection.linear(f"{name}.output.dense", inner, shape.hidden, has_bias=True)
        mlp(assembler, f"{name}.mlp", into, out_of, inner, attended, stream)
        layer_norm(assembler, f"{name}.output.LayerNorm", stream)
    _classifiers(assembler, f"{prefix}pooler.dense", stream)
    if assembler.has("cls.predictions.transform.dense.weight"):
        _language_model_head(assembler, config, stream, embeddings, tokens)


def _embeddings(
    assembler: TopologyAssembler, config: ModelConfig, name: str, tokens: NodeRange, width: int
) -> NodeRange:
    positions = assembler.nodes(config.count("max_position_embeddings"), "positions", is_boundary=True)
    segments = assembler.nodes(config.count("type_vocab_size"), "segments", is_boundary=True)
    stream = assembler.nodes(width, "embeddings.stream")
    assembler.lookup(f"{name}.word_embeddings.weight", tokens, stream, EdgeType.TOKEN_EMBEDDING)
    assembler.lookup(f"{name}.position_embeddings.weight", positions, stream, EdgeType.POSITION_EMBEDDING)
    assembler.lookup(f"{name}.token_type_embeddings.weight", segments, stream, EdgeType.TOKEN_EMBEDDING)
    layer_norm(assembler, f"{name}.LayerNorm", stream)
    return stream


def _classifiers(assembler: TopologyAssembler, pooler: str, stream: NodeRange) -> None:
    heads = [head for head in ("classifier", "cls.seq_relationship") if assembler.has(f"{head}.weight")]
    reads = stream
    if assembler.has(f"{pooler}.weight"):
        # Without a head the pooled units are the output, and their order matters to whoever reads it.
        reads = assembler.nodes(len(stream), f"{pooler}.outputs", is_boundary=not heads)
        project(assembler, pooler, Projection.linear(pooler, len(stream), len(stream), has_bias=True), stream, reads)
    for head in heads:
        _classifier(assembler, head, reads)
    if assembler.has("qa_outputs.weight"):
        _classifier(assembler, "qa_outputs", stream)


def _classifier(assembler: TopologyAssembler, name: str, reads: NodeRange) -> None:
    num_outputs = assembler.manifest.spec(f"{name}.weight").shape[0]
    outputs = assembler.nodes(num_outputs, f"{name}.outputs", is_boundary=True)
    project(assembler, name, Projection.linear(name, len(reads), num_outputs, has_bias=True), reads, outputs)


def _language_model_head(
    assembler: TopologyAssembler, config: ModelConfig, stream: NodeRange, embeddings: NodeRange, tokens: NodeRange
) -> None:
    name = "cls.predictions"
    transformed = assembler.nodes(len(stream), f"{name}.transform.stream")
    dense = Projection.linear(f"{name}.transform.dense", len(stream), len(stream), has_bias=True)
    project(assembler, f"{name}.transform.dense", dense, stream, transformed)
    layer_norm(assembler, f"{name}.transform.LayerNorm", transformed)
    logits = assembler.nodes(len(tokens), "logits", is_boundary=True)
    if config.flag("tie_word_embeddings", True):
        # The tied decoder reads these nodes with the token table, so both are permuted alike.
        assembler.structural(f"{name}.tie", EdgeType.RESIDUAL, transformed, embeddings, BlockKind.DIAGONAL)
    else:
        assembler.linear(f"{name}.decoder.weight", transformed, logits)
    attach(assembler, f"{name}.bias", logits, EdgeType.BIAS)


BUILDER = GraphBuilder(family="bert", model_types=("bert",), layouts={"symmetric": draw_bert})
