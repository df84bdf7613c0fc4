"""The published layout of Llama-like decoders, flaws included, because the published weights were trained on it.

Source: NiNo (arXiv 2409.04434), published checkpoints and the graphs that they were evaluated with.
"""

from __future__ import annotations

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.builders.output_heads import draw_output_head
from sidecast.graphs.model_config import AttentionShape, ModelConfig
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange, ParameterView


def draw_llama_official(assembler: TopologyAssembler, config: ModelConfig, *, has_qk_norm: bool = False) -> None:
    """Draws a Llama-like decoder as the published weights know it.

    Args:
        assembler: Takes the nodes and blocks.
        config: Hugging Face configuration of the model.
        has_qk_norm: Whether queries and keys are normalised per head (Qwen3).

    Raises:
        ConfigError: The model has biases, which this layout cannot place.
    """
    _refuse_biases(assembler, config)
    shape = AttentionShape.from_config(config)
    tokens = assembler.nodes(config.count("vocab_size"), "tokens", is_boundary=True)
    stream = assembler.nodes(shape.hidden, "embeddings")
    prefix = decoder_prefix(assembler)
    _scrambled_embedding(assembler, f"{prefix}embed_tokens.weight", tokens, stream)
    num_layers = config.count("num_hidden_layers")
    for layer in range(num_layers):
        name = f"{prefix}layers.{layer}"
        attended = _attention(assembler, f"{name}.self_attn", stream, shape, has_qk_norm)
        norms = [f"{name}.input_layernorm.weight", f"{name}.post_attention_layernorm.weight"]
        if layer == num_layers - 1:
            norms.append(f"{prefix}norm.weight")
        stream = _mlp(assembler, f"{name}.mlp", attended, config.count("intermediate_size"), norms)
    if prefix:
        draw_output_head(assembler, stream, len(tokens), is_tied=config.flag("tie_word_embeddings", False))


def decoder_prefix(assembler: TopologyAssembler) -> str:
    """``model.`` if the decoder is wrapped in a model with a head, nothing if it is bare."""
    return "model." if assembler.has_prefix("model.") else ""


def _refuse_biases(assembler: TopologyAssembler, config: ModelConfig) -> None:
    for spec in assembler.manifest.parameters:
        if spec.fqn.endswith("_proj.bias"):
            raise ConfigError(
                f"the 'official' layout of model_type {config.model_type!r} has no place for the bias {spec.fqn!r}; "
                "use layout 'symmetric'"
            )


def _scrambled_embedding(assembler: TopologyAssembler, fqn: str, tokens: NodeRange, stream: NodeRange) -> None:
    # The published graph reads the transposed table as if it were not transposed; the weights have learned that.
    vocab_size, width = len(tokens), len(stream)
    if assembler.use(fqn, (vocab_size, width)):
        view = ParameterView(fqn=fqn, source_stride=width, target_stride=1, transposed_shape=(vocab_size, width))
        assembler.parametric(fqn, EdgeType.TOKEN_EMBEDDING, tokens, stream, view)


def _attention(
    assembler: TopologyAssembler, name: str, stream: NodeRange, shape: AttentionShape, has_qk_norm: bool
) -> NodeRange:
    heads = assembler.nodes(shape.num_heads, f"{name}.heads")
    queries = assembler.nodes(shape.query_width, f"{name}.queries")
    values = assembler.nodes(shape.kv_width, f"{name}.values")
    attended = assembler.nodes(shape.hidden, f"{name}.output")

    assembler.linear(f"{name}.q_proj.weight", stream, queries, EdgeType.QUERY)
    head_edges(assembler, f"{name}.q_proj", heads, queries, shape.num_heads, shape.head_dim)
    key_nodes = NodeRange(queries.start, queries.start + shape.kv_width)
    key = MatrixSlice.linear(f"{name}.k_proj.weight", shape.hidden, shape.kv_width)
    assembler.matrix(key.fqn, key, stream, key_nodes, EdgeType.KEY, is_reversed=True)
    assembler.linear(f"{name}.v_proj.weight", stream, values, EdgeType.VALUE)
    head_edges(assembler, f"{name}.v_proj", heads, values, shape.num_kv_heads, shape.head_dim)
    assembler.structural(f"{name}.v_proj.res", EdgeType.RESIDUAL, stream, attended, BlockKind.DIAGONAL)
    # With grouped queries this range is wider than the values and reaches back into the queries.
    assembler.linear(f"{name}.o_proj.weight", NodeRange(values.stop - shape.query_width, values.stop), attended)
    if has_qk_norm:
        _shifted_norm(assembler, f"{name}.q_norm.weight", queries.start, shape.head_dim)
        _shifted_norm(assembler, f"{name}.k_norm.weight", stream.start, shape.head_dim)
    return attended


def _shifted_norm(assembler: TopologyAssembler, fqn: str, start: int, head_dim: int) -> None:
    if assembler.use(fqn, (head_dim,)):
        source = NodeRange(start, start + head_dim)
        target = NodeRange(start + head_dim, start + 2 * head_dim)
        view = ParameterView(fqn=fqn, source_stride=1)
        assembler.parametric(fqn, EdgeType.NORM, source, target, view, BlockKind.DIAGONAL)


def _mlp(assembler: TopologyAssembler, name: str, attended: NodeRange, inner_width: int, norms: list[str]) -> NodeRange:
    up_inputs = assembler.nodes(len(attended), f"{name}.up_inputs")
    hidden = assembler.nodes(inner_width, f"{name}.hidden")
    norm_nodes = [assembler.nodes(1, norm, is_boundary=True) for norm in norms]
    output = assembler.nodes(len(attended), f"{name}.output")

    assembler.linear(f"{name}.gate_proj.weight", attended, hidden)
    assembler.structural(f"{name}.gate_proj.res", EdgeType.RESIDUAL, attended, output, BlockKind.DIAGONAL)
    assembler.linear(f"{name}.up_proj.weight", up_inputs, hidden)
    assembler.structural(f"{name}.up_proj.res", EdgeType.RESIDUAL, up_inputs, output, BlockKind.DIAGONAL)
    assembler.linear(f"{name}.down_proj.weight", hidden, output)
    for norm, node in zip(norms, norm_nodes, strict=True):
        assembler.vector(norm, node, output, EdgeType.NORM)
    return output


def head_edges(
    assembler: TopologyAssembler, name: str, heads: NodeRange, targets: NodeRange, num_heads: int, head_dim: int
) -> None:
    """Ties each of the first ``num_heads`` head nodes to its ``head_dim`` nodes of the target range."""
    for head in range(num_heads):
        source = NodeRange(heads.start + head, heads.start + head + 1)
        start = targets.start + head * head_dim
        assembler.structural(f"{name}.head{head}", EdgeType.HEAD, source, NodeRange(start, start + head_dim))
