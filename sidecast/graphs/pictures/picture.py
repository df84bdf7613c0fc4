"""Where everything goes in a picture of a topology: an adjacency map and a flow of layers, in pixels.

Widths are logarithmic, so that one node and a hundred thousand can be seen side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

from sidecast.graphs.topology import Block, BlockKind, EdgeType, NodeLayer, NodeRange, Topology

# Okabe and Ito's palette, which colour-blind people can tell apart, and three greys.
EDGE_COLOURS = {
    EdgeType.FULLY_CONNECTED: "#0072b2",
    EdgeType.BIAS: "#7f7f7f",
    EdgeType.CONV: "#56b4e9",
    EdgeType.NORM: "#4d4d4d",
    EdgeType.TOKEN_EMBEDDING: "#b8860b",
    EdgeType.POSITION_EMBEDDING: "#e6c700",
    EdgeType.QUERY: "#d55e00",
    EdgeType.KEY: "#e69f00",
    EdgeType.VALUE: "#009e73",
    EdgeType.RESIDUAL: "#b0b0b0",
    EdgeType.HEAD: "#cc79a7",
}
MAP_PX, _COLUMN_PX, _BAND_PX, _GAP_PX = 860.0, 96.0, 12.0, 22.0


@dataclass(frozen=True, slots=True)
class Patch:
    """A block, or blocks of one type between the same two layers, on the adjacency map.

    Attributes:
        x: Left edge, by target node.
        y: Upper edge, by source node.
        width: Along the targets.
        height: Along the sources.
        edge_type: Decides the colour.
        is_diagonal: Drawn as a line from corner to corner.
        label: What it is.
        block: The one block that it shows; None if it shows several.
    """

    x: float
    y: float
    width: float
    height: float
    edge_type: EdgeType
    is_diagonal: bool
    label: str
    block: Block | None


@dataclass(frozen=True, slots=True)
class Band:
    """A layer of nodes in the flow."""

    x: float
    y: float
    height: float
    layer: NodeLayer


@dataclass(frozen=True, slots=True)
class Ribbon:
    """Blocks of one type between two layers in the flow: from band to band, left to right."""

    source: int
    target: int
    edge_type: EdgeType
    label: str


@dataclass(frozen=True)
class Picture:
    """Everything there is to draw.

    Attributes:
        title: One line on the topology.
        ticks: Boundaries of layers on the adjacency map, with the layers' names.
        patches: The adjacency map, MAP_PX wide and high.
        bands: The flow's layers, by layer number.
        ribbons: The flow's connections.
        flow_width: Width of the flow, in pixels.
        flow_height: Height of the flow, in pixels.
        edge_types: The types that occur, with their numbers of edges.
    """

    title: str
    ticks: tuple[tuple[float, float, str], ...]
    patches: tuple[Patch, ...]
    bands: tuple[Band, ...]
    ribbons: tuple[Ribbon, ...]
    flow_width: float
    flow_height: float
    edge_types: tuple[tuple[EdgeType, int], ...]


def arrange(topology: Topology) -> Picture:
    """Decides where everything goes in a picture of a topology of any size."""
    scale = _NodeScale(topology)
    joined = _joined_layers(topology, scale)
    bands = _bands(topology, joined)
    ribbons = tuple(
        Ribbon(source, target, edge_type, f"{blocks[0].name}{_and_more(blocks)}")
        for (source, target, edge_type), blocks in joined.items()
        if source != target
    )
    counts: dict[EdgeType, int] = defaultdict(int)
    for block in topology.blocks:
        counts[block.edge_type] += block.num_edges
    num_elements = sum(spec.numel for spec in topology.parameters)
    return Picture(
        title=(
            f"{topology.family}, layout {topology.layout}: {num_elements:,} parameters, {topology.num_nodes:,} nodes, "
            f"{topology.num_edges:,} edges in {len(topology.blocks):,} blocks"
        ),
        ticks=scale.ticks(),
        patches=tuple(_patches(joined, scale)),
        bands=bands,
        ribbons=ribbons,
        flow_width=max((band.x for band in bands), default=0) + _COLUMN_PX,
        flow_height=max((band.y + band.height for band in bands), default=0) + 2 * _GAP_PX,
        edge_types=tuple(sorted(counts.items())),
    )


def short_name(name: str) -> str:
    """The end of a long name: what tells layers apart."""
    return name if len(name) <= 27 else "…" + name[-26:].lstrip(".")


def _extent(num_nodes: int) -> float:
    return 1 + log2(num_nodes)


class _NodeScale:
    """Maps node numbers to pixels: every layer gets the logarithm of its size, and is linear inside."""

    def __init__(self, topology: Topology) -> None:
        self._layers = topology.layers
        self._starts = [0.0]
        for layer in topology.layers:
            self._starts.append(self._starts[-1] + _extent(len(layer.nodes)))
        self._px = MAP_PX / max(self._starts[-1], 1.0)
        self._bounds = [layer.nodes.start for layer in topology.layers]

    def layer_at(self, node: int) -> int:
        return bisect_right(self._bounds, node) - 1

    def at(self, node: int) -> float:
        number = self.layer_at(node)
        nodes = self._layers[number].nodes
        inside = (node - nodes.start) / len(nodes)
        return self._px * (self._starts[number] + inside * (self._starts[number + 1] - self._starts[number]))

    def end(self, stop: int) -> float:
        """Where the node before ``stop`` ends."""
        nodes = self._layers[self.layer_at(stop - 1)].nodes
        return self.at(stop - 1) + self._px * _extent(len(nodes)) / len(nodes)

    def ticks(self) -> tuple[tuple[float, float, str], ...]:
        return tuple(
            (self._px * self._starts[number], self._px * self._starts[number + 1], layer.name)
            for number, layer in enumerate(self._layers)
        )


def _joined_layers(topology: Topology, scale: _NodeScale) -> dict[tuple[int, int, EdgeType], list[Block]]:
    """Blocks by the layers that they begin in and their type, keys turned to run with the computation."""
    joined: dict[tuple[int, int, EdgeType], list[Block]] = defaultdict(list)
    for block in topology.blocks:
        source, target = scale.layer_at(block.source.start), scale.layer_at(block.target.start)
        if block.edge_type is EdgeType.KEY:
            source, target = target, source
        joined[source, target, block.edge_type].append(block)
    return joined


def _and_more(blocks: list[Block]) -> str:
    return f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""


def _patches(joined: dict[tuple[int, int, EdgeType], list[Block]], scale: _NodeScale) -> Iterable[Patch]:
    for (_, _, edge_type), blocks in joined.items():
        # Up to a few dozen, such as one model's heads, can be told apart.
        groups = [[block] for block in blocks] if len(blocks) <= 16 else [blocks]
        for group in groups:
            rows = NodeRange(min(b.source.start for b in group), max(b.source.stop for b in group))
            columns = NodeRange(min(b.target.start for b in group), max(b.target.stop for b in group))
            x, y = scale.at(columns.start), scale.at(rows.start)
            right, lower = scale.end(columns.stop), scale.end(rows.stop)
            yield Patch(
                x=x,
                y=y,
                width=right - x,
                height=lower - y,
                edge_type=edge_type,
                is_diagonal=group[0].kind is BlockKind.DIAGONAL or len(group) > 1,
                label=f"{group[0].name}{_and_more(group)}: {len(rows):,} to {len(columns):,} nodes",
                block=group[0] if len(group) == 1 else None,
            )


def _bands(topology: Topology, joined: dict[tuple[int, int, EdgeType], list[Block]]) -> tuple[Band, ...]:
    rank = _ranks(len(topology.layers), [(source, target) for source, target, _ in joined])
    trunk = {
        number
        for (source, target, _), blocks in joined.items()
        for number in (source, target)
        if any(block.kind is BlockKind.DIAGONAL and block.name.rsplit(".", 1)[-1].startswith("res") for block in blocks)
    }
    columns: dict[int, list[int]] = defaultdict(list)
    for number in range(len(topology.layers)):
        columns[rank[number]].append(number)
    placed: dict[int, Band] = {}
    lowest_trunk = max((6 * _extent(len(topology.layers[number].nodes)) for number in trunk), default=0.0)
    for column, numbers in columns.items():
        numbers.sort(key=lambda number: (number not in trunk, len(topology.layers[number].nodes) == 1, number))
        y = _GAP_PX
        for number in numbers:
            if number not in trunk:
                y = max(y, lowest_trunk + 3 * _GAP_PX)
            height = 6 * _extent(len(topology.layers[number].nodes))
            placed[number] = Band(column * _COLUMN_PX + _BAND_PX, y, height, topology.layers[number])
            y += height + _GAP_PX
    return tuple(placed[number] for number in range(len(topology.layers)))


def _ranks(num_layers: int, edges: list[tuple[int, int]]) -> list[int]:
    """Columns: each layer right of all that feed it, and otherwise as close as can be to what it feeds."""
    targets_of: dict[int, list[int]] = defaultdict(list)
    for source, target in edges:
        if source != target:
            targets_of[source].append(target)
    fed = {target for targets in targets_of.values() for target in targets}
    roots = [number for number in range(num_layers) if number not in fed] + list(range(num_layers))
    order = _depth_first(roots, targets_of)
    position = {number: place for place, number in enumerate(order)}
    # What runs against the order closes a cycle.
    later = {number: [t for t in targets_of[number] if position[t] > position[number]] for number in order}
    rank = [0] * num_layers
    for number in order:
        for target in later[number]:
            rank[target] = max(rank[target], rank[number] + 1)
    for number in reversed(order):
        if later[number]:
            rank[number] = min(rank[target] for target in later[number]) - 1
    return rank


def _depth_first(roots: list[int], following: dict[int, list[int]]) -> list[int]:
    """Reverse post-order: topological wherever there is no cycle."""
    seen: set[int] = set()
    finished: list[int] = []
    for root in roots:
        stack = [(root, iter(following[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            number, targets = stack[-1]
            target = next((target for target in targets if target not in seen), None)
            if target is None:
                finished.append(number)
                stack.pop()
            else:
                seen.add(target)
                stack.append((target, iter(following[target])))
    return finished[::-1]
