"""Vision transformers of the ``transformers`` library, under the names that run and those that are saved.

There is no published graph of this family, so there is no official layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler, VectorSlice
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.symmetric_parts import (
    AttentionWeights,
    Projection,
    attach,
    attach_part,
    attention,
    layer_norm,
    mlp,
    next_stream,
    project,
)
from sidecast.graphs.model_config import AttentionShape, ModelConfig
from sidecast.graphs.topology import EdgeType, NodeRange


@dataclass(frozen=True, kw_only=True)
class _LayerNames:
    """Names of one layer's modules: transformers 5 renames them when it loads a model, and back when it saves one."""

    layer: str
    projections: tuple[str, str, str, str]
    into: str
    out_of: str

    @classmethod
    def running(cls, prefix: str, number: int) -> _LayerNames:
        name = f"{prefix}layers.{number}"
        attention = f"{name}.attention"
        return cls(
            layer=name,
            projections=(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", f"{attention}.o_proj"),
            into=f"{name}.mlp.fc1",
            out_of=f"{name}.mlp.fc2",
        )

    @classmethod
    def saved(cls, prefix: str, number: int) -> _LayerNames:
        name = f"{prefix}encoder.layer.{number}"
        attention = f"{name}.attention.attention"
        return cls(
            layer=name,
            projections=(
                f"{attention}.query",
                f"{attention}.key",
                f"{attention}.value",
                f"{name}.attention.output.dense",
            ),
            into=f"{name}.intermediate.dense",
            out_of=f"{name}.output.dense",
        )


def draw_vit(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws a vision transformer so that its symmetries are the graph's."""
    shape = AttentionShape.from_config(config)
    prefix = "vit." if assembler.has_prefix("vit.") else ""
    stream = _embeddings(assembler, config, f"{prefix}embeddings", shape.hidden)
    is_saved = assembler.has_prefix(f"{prefix}encoder.layer.")
    num_layers = config.count("num_hidden_layers")
    for layer in range(num_layers):
        names = _LayerNames.saved(prefix, layer) if is_saved else _LayerNames.running(prefix, layer)
        name = names.layer
        weights = AttentionWeights.separate(
            names.projections,
            shape,
            has_bias=config.flag("qkv_bias", True),
            has_output_bias=True,
        )
        layer_norm(assembler, f"{name}.layernorm_before", stream)
        attended = next_stream(assembler, f"{name}.attention", stream)
        attention(assembler, f"{name}.attention", weights, shape, stream, attended, has_rotary=False)
        layer_norm(assembler, f"{name}.layernorm_after", attended)
        # A bare encoder returns its stream.
        is_output = not prefix and layer == num_layers - 1
        stream = next_stream(assembler, f"{name}.mlp", attended, is_output=is_output)
        inner = config.count("intermediate_size")
        into = Projection.linear(names.into, shape.hidden, inner, has_bias=True)
        out_of = Projection.linear(names.out_of, inner, shape.hidden, has_bias=True)
        mlp(assembler, f"{name}.mlp", into, out_of, inner, attended, stream)
    layer_norm(assembler, f"{prefix}layernorm", stream)
    for head in (f"{prefix}pooler.dense", "classifier"):
        if assembler.has(f"{head}.weight"):
            num_outputs = assembler.manifest.spec(f"{head}.weight").shape[0]
            outputs = assembler.nodes(num_outputs, f"{head}.outputs", is_boundary=True)
            project(assembler, head, Projection.linear(head, shape.hidden, num_outputs, has_bias=True), stream, outputs)


def _embeddings(assembler: TopologyAssembler, config: ModelConfig, name: str, width: int) -> NodeRange:
    num_channels, patch, image = config.count("num_channels"), config.count("patch_size"), config.count("image_size")
    num_positions = (image // patch) ** 2 + 1
    channels = assembler.nodes(num_channels, "channels", is_boundary=True)
    positions = assembler.nodes(num_positions, "positions", is_boundary=True)
    stream = assembler.nodes(width, "embeddings.stream")
    projection = f"{name}.patch_embeddings.projection"
    kernels = MatrixSlice(
        fqn=f"{projection}.weight",
        shape=(width, num_channels, patch, patch),
        input_stride=patch * patch,
        output_stride=num_channels * patch * patch,
    )
    assembler.kernel(kernels, patch * patch, channels, stream)
    attach(assembler, f"{projection}.bias", stream, EdgeType.BIAS)
    for token in ("cls_token", "mask_token"):
        fqn = f"{name}.{token}"
        if token == "cls_token" or assembler.has(fqn):
            vector = VectorSlice(fqn=fqn, shape=(1, 1, width))
            attach_part(assembler, fqn, vector, stream, EdgeType.TOKEN_EMBEDDING)
    table = MatrixSlice(
        fqn=f"{name}.position_embeddings", shape=(1, num_positions, width), input_stride=width, output_stride=1
    )
    assembler.matrix(table.fqn, table, positions, stream, EdgeType.POSITION_EMBEDDING)
    return stream


BUILDER = GraphBuilder(family="vit", model_types=("vit",), layouts={"symmetric": draw_vit})
