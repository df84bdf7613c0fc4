"""Any network of linear, convolutional, recurrent, embedding and norm modules, from its traced operations.

There is no published graph of branched networks, so there is no official layout.
"""

from __future__ import annotations

from math import prod
from typing import Any

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.operation_roles import roles_of
from sidecast.graphs.builders.recurrent import RecurrentShape, draw_recurrent
from sidecast.graphs.builders.symmetric_parts import attach
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


def draw_module_graph(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws the operations that ``manifest_of_module`` has read."""
    operations = config.values.get("operations")
    if not isinstance(operations, list) or not operations:
        raise ConfigError("the model's configuration lacks 'operations'; make the manifest with manifest_of_module")
    _ModuleGraph(assembler, operations).draw()


class _ModuleGraph:
    """Draws operations one after another, keeping which nodes every value lives on."""

    def __init__(self, assembler: TopologyAssembler, operations: list[dict[str, Any]]) -> None:
        self._assembler = assembler
        self._operations = operations
        self._nodes: dict[str, NodeRange] = {}
        self._tables: dict[str, NodeRange] = {}
        self._outputs = _output_values(operations)
        self._roles = roles_of(operations, assembler.has)
        self._role_nodes: dict[str, NodeRange] = {}

    def draw(self) -> None:
        drawers = {
            "pass": self._pass,
            "add": self._add,
            "linear": self._linear,
            "convolution": self._convolution,
            "embedding": self._embedding,
            "norm": self._norm,
            "recurrent": self._recurrent,
        }
        for operation in self._operations:
            if operation["kind"] in ("input", "output"):
                continue
            drawer = drawers.get(operation["kind"])
            if drawer is None:
                raise ConfigError(f"operation kind {operation['kind']!r} is unknown; allowed: {', '.join(drawers)}")
            drawer(operation)

    def _read(self, operation: dict[str, Any], width: int) -> NodeRange:
        """Nodes of the operation's input; a model's input gets its nodes from the first that reads it."""
        value = operation["inputs"][0]
        if value not in self._nodes:
            self._nodes[value] = self._assembler.nodes(width, value, is_boundary=True)
        return self._nodes[value]

    def _new(self, operation: dict[str, Any], width: int) -> NodeRange:
        value = operation["value"]
        nodes = self._assembler.nodes(width, value, is_boundary=value in self._outputs)
        self._nodes[value] = nodes
        for role in self._roles.get(value, ()):
            if role not in self._role_nodes:
                self._role_nodes[role] = self._assembler.nodes(1, f"role {role}", is_boundary=True)
            self._assembler.structural(f"{value}.role", EdgeType.HEAD, self._role_nodes[role], nodes)
        return nodes

    def _pass(self, operation: dict[str, Any]) -> None:
        value = operation["inputs"][0]
        if value in self._nodes:
            self._nodes[operation["value"]] = self._nodes[value]

    def _add(self, operation: dict[str, Any]) -> None:
        terms = [self._nodes[value] for value in operation["inputs"] if value in self._nodes]
        widths = {len(term) for term in terms}
        if len(terms) != len(operation["inputs"]) or len(widths) != 1:
            raise ConfigError(f"{operation['value']!r} combines values of different or unknown widths {sorted(widths)}")
        total = self._new(operation, widths.pop())
        for number, term in enumerate(terms):
            name = f"{operation['value']}.res{number}"
            self._assembler.structural(name, EdgeType.RESIDUAL, term, total, BlockKind.DIAGONAL)

    def _linear(self, operation: dict[str, Any]) -> None:
        num_inputs, name = operation["num_inputs"], operation["module"]
        source = self._read(operation, num_inputs)
        if num_inputs % len(source):
            raise ConfigError(f"module {name!r} reads {num_inputs} values from {len(source)} channels")
        target = self._new(operation, operation["num_outputs"])
        self._tie_to_table(f"{name}.weight", source, target)
        # After flattening, a channel's positions are the elements of a kernel.
        num_elements = num_inputs // len(source)
        matrix = MatrixSlice(
            fqn=f"{name}.weight",
            shape=(len(target), num_inputs),
            input_stride=num_elements,
            output_stride=num_inputs,
        )
        self._assembler.kernel(matrix, num_elements, source, target, EdgeType.FULLY_CONNECTED)
        self._attach_bias(operation, target)

    def _convolution(self, operation: dict[str, Any]) -> None:
        num_inputs, num_groups = operation["num_inputs"], operation["num_groups"]
        source = self._read(operation, num_inputs)
        if num_inputs != len(source):
            raise ConfigError(f"module {operation['module']!r} reads {num_inputs} channels from {len(source)}")
        target = self._new(operation, operation["num_outputs"])
        num_elements = prod(operation["kernel_size"])
        inputs_per_group, outputs_per_group = num_inputs // num_groups, len(target) // num_groups
        shape = (len(target), inputs_per_group, *operation["kernel_size"])
        fqn = f"{operation['module']}.weight"
        matrix = MatrixSlice(
            fqn=fqn, shape=shape, input_stride=num_elements, output_stride=inputs_per_group * num_elements
        )
        if num_groups == num_inputs == len(target):
            self._assembler.kernel(matrix, num_elements, source, target, kind=BlockKind.DIAGONAL)
        else:
            for group in range(num_groups):
                first_output = group * outputs_per_group
                part = MatrixSlice(
                    fqn=fqn,
                    shape=shape,
                    offset=first_output * matrix.output_stride,
                    input_stride=matrix.input_stride,
                    output_stride=matrix.output_stride,
                )
                inputs = _part(source, group * inputs_per_group, inputs_per_group)
                self._assembler.kernel(part, num_elements, inputs, _part(target, first_output, outputs_per_group))
        self._attach_bias(operation, target)

    def _embedding(self, operation: dict[str, Any]) -> None:
        fqn = f"{operation['module']}.weight"
        rows = self._assembler.nodes(operation["num_inputs"], f"{operation['value']}.rows", is_boundary=True)
        columns = self._tables[fqn] = self._new(operation, operation["num_outputs"])
        self._assembler.lookup(fqn, rows, columns, EdgeType.TOKEN_EMBEDDING)

    def _tie_to_table(self, fqn: str, source: NodeRange, target: NodeRange) -> None:
        """A tied output layer reads its inputs with a table's rows, so both are permuted alike."""
        tied = self._assembler.manifest.aliases.get(fqn)
        if tied is None:
            return
        if tied not in self._tables or len(self._tables[tied]) != len(source):
            raise ConfigError(f"parameter {fqn!r} is tied to {tied!r}; a graph has a place for ties to embeddings only")
        self._assembler.structural(f"{fqn}.tie", EdgeType.RESIDUAL, source, self._tables[tied], BlockKind.DIAGONAL)

    def _norm(self, operation: dict[str, Any]) -> None:
        value = operation["inputs"][0]
        if value not in self._nodes:
            raise ConfigError(f"module {operation['module']!r} normalises the model's input, whose width is not known")
        target = self._nodes[operation["value"]] = self._nodes[value]
        if operation["has_weight"]:
            attach(self._assembler, f"{operation['module']}.weight", target, EdgeType.NORM)
        self._attach_bias(operation, target)

    def _recurrent(self, operation: dict[str, Any]) -> None:
        shape = RecurrentShape(
            gates=tuple(operation["gates"]),
            num_inputs=operation["num_inputs"],
            num_hidden=operation["num_outputs"],
            num_layers=operation["num_layers"],
            has_bias=operation["has_bias"],
            is_bidirectional=operation["is_bidirectional"],
        )
        inputs = self._read(operation, shape.num_inputs)
        is_boundary = operation["value"] in self._outputs
        self._nodes[operation["value"]] = draw_recurrent(
            self._assembler, operation["module"], shape, inputs, is_boundary=is_boundary
        )

    def _attach_bias(self, operation: dict[str, Any], target: NodeRange) -> None:
        if operation["has_bias"]:
            attach(self._assembler, f"{operation['module']}.bias", target, EdgeType.BIAS)


def _part(nodes: NodeRange, first: int, count: int) -> NodeRange:
    return NodeRange(nodes.start + first, nodes.start + first + count)


def _output_values(operations: list[dict[str, Any]]) -> set[str]:
    """Values whose nodes are the model's outputs: what it returns, seen through operations that keep nodes."""
    outputs: set[str] = set()
    for operation in reversed(operations):
        if operation["kind"] == "output" or (operation["kind"] in ("pass", "norm") and operation["value"] in outputs):
            outputs.update(operation["inputs"])
    return outputs


BUILDER = GraphBuilder(family="module_graph", model_types=("module_graph",), layouts={"symmetric": draw_module_graph})
