"""The neural graph as a short list of rectangular blocks: never an edge list.

Shape suffixes: V nodes, S source range, T target range, F kernel elements.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum, IntEnum
from functools import cached_property
from typing import Any

from sidecast.manifest import ParameterSpec


class EdgeType(IntEnum):
    """Rows of the published 15-row edge-type embedding. Rows 12 and 14 are unused.

    Source: NiNo (arXiv 2409.04434), published checkpoints.
    """

    PADDING = 0
    FULLY_CONNECTED = 1
    BIAS = 2
    CONV = 3
    NORM = 4
    TOKEN_EMBEDDING = 5
    POSITION_EMBEDDING = 6
    QUERY = 7
    KEY = 8
    VALUE = 9
    RESIDUAL = 10
    HEAD = 11
    SELF_LOOP = 13


class BlockKind(Enum):
    """How the edges of a block connect its two node ranges."""

    DENSE = "dense"
    """Complete bipartite: every source node to every target node."""
    DIAGONAL = "diagonal"
    """Node i of the source range to node i of the target range; both have the same length."""


@dataclass(frozen=True, slots=True)
class NodeRange:
    """The half-open range of nodes ``start .. stop - 1``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterView:
    """Which element of a parameter tensor each edge of a block carries.

    Edge (i, j), i counted in the source range and j in the target range, carries for its kernel element f the
    element number ``p = offset + i * source_stride + j * target_stride + f * kernel_stride`` of the row-major
    tensor. On a diagonal block j is 0. If ``transposed_shape = (rows, columns)`` is set, p counts in the
    row-major order of the *transpose* of a ``rows x columns`` tensor instead: the element is then
    ``(p % rows) * columns + p // rows`` (the published Llama graph's token embedding needs it).

    Attributes:
        fqn: The parameter.
        num_kernel_elements: F, edges' scalar parameters: 1, or a convolution kernel's height x width.
    """

    fqn: str
    offset: int = 0
    source_stride: int = 0
    target_stride: int = 0
    kernel_stride: int = 0
    num_kernel_elements: int = 1
    transposed_shape: tuple[int, int] | None = None

    def element(self, source: int, target: int, kernel: int = 0) -> int:
        """The row-major element number that edge (source, target) carries for one kernel element."""
        position = self.offset + source * self.source_stride + target * self.target_stride + kernel * self.kernel_stride
        if self.transposed_shape is None:
            return position
        rows, columns = self.transposed_shape
        return (position % rows) * columns + position // rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """All edges between one contiguous range of source nodes and one of target nodes.

    Attributes:
        name: The parameter's dotted name, or for structural edges a name derived from the one they belong to.
        edge_type: The type of every edge of the block.
        source: Source nodes.
        target: Target nodes.
        kind: Dense or diagonal.
        view: The parameters on the edges; None for structural edges.
        constant: Structural edges only: the first edge feature, in all c states; never scaled.
        source_major: Edge order in exports: source-major, or else target-major.
    """

    name: str
    edge_type: EdgeType
    source: NodeRange
    target: NodeRange
    kind: BlockKind = BlockKind.DENSE
    view: ParameterView | None = None
    constant: float = 1.0
    source_major: bool = True

    @property
    def num_edges(self) -> int:
        return len(self.source) * (len(self.target) if self.kind is BlockKind.DENSE else 1)


@dataclass(frozen=True, slots=True)
class NodeLayer:
    """Nodes that play one role: a residual stream, a head's queries, the node of one norm weight.

    Attributes:
        name: Unique in its topology.
        nodes: Which nodes they are.
        is_boundary: Nodes that a symmetry of the network leaves where they are: tokens, positions, inputs, outputs,
            rotary dimensions, and the constant-one sources of biases and norm weights.
    """

    name: str
    nodes: NodeRange
    is_boundary: bool = False


@dataclass(frozen=True)
class Topology:
    """A neural graph without its weights: immutable, hashable, built from names, shapes and configuration.

    Every node also has a self-loop (type SELF_LOOP, constant 2), last in edge order; self-loops are not listed.

    Attributes:
        family: Name of the builder that made it.
        layout: ``official`` or ``symmetric``.
        num_nodes: V.
        blocks: In edge order.
        parameters: The model's parameters, in manifest order.
        layers: What the nodes are, in node order; together they cover every node once.
        absent: Names of parameters that the architecture has and the manifest lacks, because they are frozen: their
            nodes are there, their edges are not.
    """

    family: str
    layout: str
    num_nodes: int
    blocks: tuple[Block, ...]
    parameters: tuple[ParameterSpec, ...]
    layers: tuple[NodeLayer, ...] = ()
    absent: tuple[str, ...] = ()

    SELF_LOOP_CONSTANT = 2.0

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def num_edges(self) -> int:
        """E, self-loops included."""
        return sum(block.num_edges for block in self.blocks) + self.num_nodes

    @cached_property
    def digest(self) -> str:
        """Hex digest of everything in the topology: equal topologies have equal digests on every machine."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: equal topologies give equal text."""
        return json.dumps(asdict(self), default=_enum_value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Topology:
        data = json.loads(text)
        return cls(
            family=data["family"],
            layout=data["layout"],
            num_nodes=data["num_nodes"],
            blocks=tuple(_block(block) for block in data["blocks"]),
            parameters=tuple(ParameterSpec(spec["fqn"], tuple(spec["shape"])) for spec in data["parameters"]),
            layers=tuple(
                NodeLayer(layer["name"], NodeRange(**layer["nodes"]), layer["is_boundary"]) for layer in data["layers"]
            ),
            absent=tuple(data["absent"]),
        )


def _enum_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} has no place in a topology's JSON")


def _block(data: dict[str, Any]) -> Block:
    view = data["view"]
    if view is not None:
        shape = view["transposed_shape"]
        view = ParameterView(**{**view, "transposed_shape": None if shape is None else tuple(shape)})
    return Block(
        name=data["name"],
        edge_type=EdgeType(data["edge_type"]),
        source=NodeRange(**data["source"]),
        target=NodeRange(**data["target"]),
        kind=BlockKind(data["kind"]),
        view=view,
        constant=data["constant"],
        source_major=data["source_major"],
    )
