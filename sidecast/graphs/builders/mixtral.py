"""Mixtral: Llama with a routed mixture of gated MLPs.

There is no published graph of this family, so there is no official layout.
"""

from __future__ import annotations

from functools import partial

from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.decoder_symmetric import draw_decoder_symmetric
from sidecast.graphs.builders.symmetric_parts import Projection, gated_mlp, project
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import EdgeType, NodeRange


def _draw_experts(
    assembler: TopologyAssembler, config: ModelConfig, layer: str, reads: NodeRange, writes: NodeRange
) -> None:
    """Draws the router, one node an expert, and the experts, each tied to its router node."""
    num_experts, inner, width = config.count("num_local_experts"), config.count("intermediate_size"), len(reads)
    # Before version 5, transformers kept one module for each expert.
    is_split = assembler.has(f"{layer}.block_sparse_moe.gate.weight")
    name = f"{layer}.block_sparse_moe" if is_split else f"{layer}.mlp"
    router = assembler.nodes(num_experts, f"{name}.experts")
    project(
        assembler, f"{name}.gate", Projection.linear(f"{name}.gate", width, num_experts, has_bias=False), reads, router
    )
    for expert in range(num_experts):
        if is_split:
            gate, down, up = _split_expert(f"{name}.experts.{expert}", width, inner)
        else:
            gate, down, up = _fused_expert(f"{name}.experts", expert, num_experts, width, inner)
        expert_name = f"{name}.expert{expert}"
        units = gated_mlp(
            assembler,
            expert_name,
            Projection(matrix=gate),
            Projection(matrix=up),
            Projection(matrix=down),
            inner,
            reads,
            writes,
        )
        node = NodeRange(router.start + expert, router.start + expert + 1)
        assembler.structural(f"{expert_name}.route", EdgeType.HEAD, node, units)


def _split_expert(name: str, width: int, inner: int) -> tuple[MatrixSlice, MatrixSlice, MatrixSlice]:
    return (
        MatrixSlice.linear(f"{name}.w1.weight", width, inner),
        MatrixSlice.linear(f"{name}.w2.weight", inner, width),
        MatrixSlice.linear(f"{name}.w3.weight", width, inner),
    )


def _fused_expert(
    name: str, expert: int, num_experts: int, width: int, inner: int
) -> tuple[MatrixSlice, MatrixSlice, MatrixSlice]:
    gate, up = (
        MatrixSlice(
            fqn=f"{name}.gate_up_proj",
            shape=(num_experts, 2 * inner, width),
            offset=(2 * expert + part) * inner * width,
            input_stride=1,
            output_stride=width,
        )
        for part in range(2)
    )
    down = MatrixSlice(
        fqn=f"{name}.down_proj",
        shape=(num_experts, width, inner),
        offset=expert * inner * width,
        input_stride=1,
        output_stride=inner,
    )
    return gate, down, up


BUILDER = GraphBuilder(
    family="mixtral",
    model_types=("mixtral",),
    layouts={"symmetric": partial(draw_decoder_symmetric, draw_mlp=_draw_experts)},
)
