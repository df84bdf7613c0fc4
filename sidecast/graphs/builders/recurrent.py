"""Stacks of LSTM, GRU or plain recurrent layers, as ``torch.nn`` names and fuses their parameters."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler, VectorSlice
from sidecast.graphs.builders.symmetric_parts import attach_part
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


@dataclass(frozen=True, kw_only=True)
class RecurrentShape:
    """One ``torch.nn`` recurrent module.

    Attributes:
        gates: Their names, in the order of the fused parameters.
        num_inputs: Inputs of the first layer.
        num_hidden: Hidden units of each layer and direction.
        num_layers: Stacked layers.
        has_bias: Whether there are two bias vectors to a layer.
        is_bidirectional: Whether a second network reads backwards.
    """

    gates: tuple[str, ...]
    num_inputs: int
    num_hidden: int
    num_layers: int
    has_bias: bool
    is_bidirectional: bool


def draw_recurrent(
    assembler: TopologyAssembler, name: str, shape: RecurrentShape, inputs: NodeRange, *, is_boundary: bool
) -> NodeRange:
    """Draws the stack; returns the nodes of the last layer's outputs.

    A hidden unit is tied to its own node in every gate. Gates differ in what they do, so a boundary node holds each.

    Args:
        assembler: Takes the nodes and blocks.
        name: Name of the module.
        shape: What it is.
        inputs: Nodes that the first layer reads.
        is_boundary: Whether the last layer's units are outputs of the model.
    """
    suffixes = ("", "_reverse") if shape.is_bidirectional else ("",)
    reads = inputs
    for layer in range(shape.num_layers):
        is_output = is_boundary and layer == shape.num_layers - 1
        hidden = assembler.nodes(shape.num_hidden * len(suffixes), f"{name}.l{layer}.hidden", is_boundary=is_output)
        for direction, suffix in enumerate(suffixes):
            start = hidden.start + direction * shape.num_hidden
            units = NodeRange(start, start + shape.num_hidden)
            _draw_direction(assembler, name, f"l{layer}{suffix}", shape, reads, units)
        reads = hidden
    return reads


def _draw_direction(
    assembler: TopologyAssembler, name: str, part: str, shape: RecurrentShape, reads: NodeRange, hidden: NodeRange
) -> None:
    num_rows = len(shape.gates) * shape.num_hidden
    for number, gate in enumerate(shape.gates):
        gate_name = f"{name}.{part}.{gate}"
        role = assembler.nodes(1, f"{gate_name}.role", is_boundary=True)
        units = assembler.nodes(shape.num_hidden, gate_name)
        assembler.structural(f"{gate_name}.role", EdgeType.HEAD, role, units)
        for kind, source in (("ih", reads), ("hh", hidden)):
            matrix = MatrixSlice(
                fqn=f"{name}.weight_{kind}_{part}",
                shape=(num_rows, len(source)),
                offset=number * shape.num_hidden * len(source),
                input_stride=1,
                output_stride=len(source),
            )
            assembler.matrix(f"{matrix.fqn}.{gate}", matrix, source, units, EdgeType.FULLY_CONNECTED)
            if shape.has_bias:
                fqn = f"{name}.bias_{kind}_{part}"
                vector = VectorSlice(fqn=fqn, shape=(num_rows,), offset=number * shape.num_hidden)
                attach_part(assembler, f"{fqn}.{gate}", vector, units, EdgeType.BIAS)
        assembler.structural(f"{gate_name}.res", EdgeType.RESIDUAL, units, hidden, BlockKind.DIAGONAL)
