"""Rectangular parts of a neural graph: the unit of work of predictors that read a history piece by piece.

Shape suffixes: C context, F kernel elements, S source nodes, T target nodes, V nodes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, prod
from typing import overload

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.graphs.topology import Block, BlockKind, EdgeType, ParameterView, Topology

MAX_SCALARS = 32_768
"""Scalar parameters of one part: their states take 0.7 MB in fp32, and a processor some 40 ms: little beside a pass
over a model of a million, at the end of which one thread waits for another's last part."""
MAX_SOURCES = 256
"""With the targets that this leaves a part is nearly square, and so has few nodes for its edges."""
MAX_NODES = 1_024
"""Nodes on one side of a part, so that what it adds to their sums takes half a megabyte: some such wait for their turn
to be added."""


@dataclass(frozen=True, kw_only=True)
class PartLimits:
    """How large parts may be.

    Attributes:
        max_scalars: Scalar parameters of one part.
        max_sources: Sources of one part, unless it reads a scrambled parameter.
        max_nodes: Nodes on one side of a part.
    """

    max_scalars: int
    max_sources: int
    max_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPart:
    """Some edges of a graph that are worked on together.

    Attributes:
        edge_type: Type of all these edges.
        sources: Their source nodes, as a range or as an index tensor.
        targets: Their target nodes, likewise.
        num_sources: S.
        num_targets: T.
        paired: Source i goes to target i only (S = T), instead of every source to every target.
        view: Where the parameters on the edges are, counted from the first edge of this part; None for structure.
        constant: Structural edges only: the first edge feature.
    """

    edge_type: EdgeType
    sources: slice | Tensor
    targets: slice | Tensor
    num_sources: int
    num_targets: int
    paired: bool = False
    view: ParameterView | None = None
    constant: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        """Targets and sources of each: (T, S), or (T, 1) for pairs."""
        return self.num_targets, 1 if self.paired else self.num_sources

    @property
    def fqn(self) -> str | None:
        """The parameter on the edges; None for structure."""
        return self.view.fqn if self.view is not None else None

    @property
    def num_kernel_elements(self) -> int:
        return self.view.num_kernel_elements if self.view is not None else 1

    @property
    def num_scalars(self) -> int:
        """Features to compute: scalar parameters, or structural edges. What a part costs."""
        rows, columns = self.grid
        return rows * columns * self.num_kernel_elements

    def strides(self) -> tuple[int, int, int]:
        """Steps of the parameter view along (T, S, F)."""
        assert self.view is not None
        if self.paired:
            return self.view.source_stride, 0, self.view.kernel_stride
        return self.view.target_stride, self.view.source_stride, self.view.kernel_stride

    def read(self, states: Sequence[Tensor], parameter_start: int) -> list[Tensor]:
        """The states of the parameters on the edges.

        Args:
            states: C parameter vectors.
            parameter_start: Where the part's parameter begins in them.

        Returns:
            C tensors (T, S, F): strided views of the states, or copies if elements are scattered.
        """
        index = _scattered_index(self, states[0].device)
        if index is not None:
            return [self._parameter(state, parameter_start)[index] for state in states]
        return [_strided(self, state, parameter_start) for state in states]

    def write(self, values_TSF: Tensor, out: Tensor, parameter_start: int) -> None:
        """Writes one value for each parameter on the edges into a parameter vector."""
        index = _scattered_index(self, out.device)
        if index is not None:
            self._parameter(out, parameter_start)[index] = values_TSF.to(out.device)
        else:
            _strided(self, out, parameter_start).copy_(values_TSF)

    def _parameter(self, vector: Tensor, parameter_start: int) -> Tensor:
        # Alone, because indexing a view of the whole rest would need wide offsets on a GPU.
        assert self.view is not None
        assert self.view.transposed_shape is not None
        return vector.narrow(0, parameter_start, prod(self.view.transposed_shape))

    def add_to(self, sums_VD: Tensor, values_TD: Tensor) -> None:
        """Adds one row for each target to the sums of its node."""
        if isinstance(self.targets, slice):
            sums_VD[self.targets] += values_TD
        else:
            sums_VD.index_add_(0, self.targets, values_TD)


class BlockParts(Sequence[BlockPart]):
    """All parts of a graph, of which only those without parameters are kept: a large model has a million others.

    Args:
        grids: The blocks with parameters.
        structural: The parts without.
    """

    def __init__(self, grids: Sequence[_Grid], structural: Sequence[BlockPart]) -> None:
        self._grids = grids
        self._structural = structural
        self._ends = list(accumulate(len(grid) for grid in grids))
        self._num_carrying = self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return self._num_carrying + len(self._structural)

    @overload
    def __getitem__(self, index: int) -> BlockPart: ...

    @overload
    def __getitem__(self, index: slice) -> list[BlockPart]: ...

    def __getitem__(self, index: int | slice) -> BlockPart | list[BlockPart]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"part {index} of {len(self)}")
        if position >= self._num_carrying:
            return self._structural[position - self._num_carrying]
        row = bisect_right(self._ends, position)
        grid = self._grids[row]
        return grid.part(position - self._ends[row] + len(grid))


def split_topology(
    topology: Topology, limits: PartLimits | None = None, device: torch.device | None = None
) -> BlockParts:
    """Divides all edges of a graph, self-loops included, into parts of bounded size.

    Args:
        topology: The graph.
        limits: How large parts may be; the constants of this module if None, which suit the caches of a CPU.
        device: Where node indices are needed; where they are made if None.

    Raises:
        ConfigError: Some parameter is on no edge, or on several.
    """
    if limits is None:
        limits = PartLimits(max_scalars=MAX_SCALARS, max_sources=MAX_SOURCES, max_nodes=MAX_NODES)
    grids: list[_Grid] = []
    structural: dict[tuple[EdgeType, float], list[Tensor]] = {}
    carried = 0
    for block in topology.blocks:
        if block.num_edges == 0:
            continue
        if block.view is None:
            structural.setdefault((block.edge_type, block.constant), []).append(_pairs(block))
        else:
            carried += block.num_edges * block.view.num_kernel_elements
            grids.append(_Grid.of(block, limits))
    num_elements = sum(spec.numel for spec in topology.parameters)
    if carried != num_elements:
        raise ConfigError(
            f"the {topology.layout!r} graph of this {topology.family!r} model carries {carried} scalar parameters; "
            f"the model has {num_elements}"
        )
    parts = []
    for (edge_type, constant), pairs in structural.items():
        for piece in _pieces_of_unique_targets(torch.cat(pairs, dim=1), limits.max_nodes):
            source, target = piece.to(device=device).unbind()
            parts.append(_structural_part(edge_type, constant, source, target, len(source)))
    for start in range(0, topology.num_nodes, limits.max_nodes):
        nodes = slice(start, min(start + limits.max_nodes, topology.num_nodes))
        num_nodes = nodes.stop - start
        parts.append(_structural_part(EdgeType.SELF_LOOP, topology.SELF_LOOP_CONSTANT, nodes, nodes, num_nodes))
    return BlockParts(grids, parts)


def _structural_part(
    edge_type: EdgeType, constant: float, sources: slice | Tensor, targets: slice | Tensor, num_pairs: int
) -> BlockPart:
    return BlockPart(
        edge_type=edge_type,
        sources=sources,
        targets=targets,
        num_sources=num_pairs,
        num_targets=num_pairs,
        paired=True,
        constant=constant,
    )


def in_degrees(topology: Topology) -> Tensor:
    """Incoming edges of each node, its self-loop included, (V,) fp32."""
    degrees_V = torch.ones(topology.num_nodes)
    for block in topology.blocks:
        degrees_V[block.target.start : block.target.stop] += len(block.source) if block.kind is BlockKind.DENSE else 1
    return degrees_V


def _pieces_of_unique_targets(pairs: Tensor, max_pairs: int) -> Iterator[Tensor]:
    """Pieces with no target twice: a GPU would add what such a target gets in an order of its own in every run."""
    target = pairs[1]
    order = torch.argsort(target, stable=True)
    ordered = target[order]
    occurrence = torch.empty_like(target)
    occurrence[order] = torch.arange(len(target)) - torch.searchsorted(ordered, ordered)
    for number in range(int(occurrence.max()) + 1):
        yield from pairs[:, occurrence == number].split(max_pairs, dim=1)


def _pairs(block: Block) -> Tensor:
    source = torch.arange(block.source.start, block.source.stop)
    target = torch.arange(block.target.start, block.target.stop)
    if block.kind is BlockKind.DIAGONAL:
        return torch.stack([source, target])
    return torch.cartesian_prod(source, target).T.reshape(2, -1)


@dataclass(frozen=True, slots=True)
class _Grid:
    """How one block with parameters is divided: a part for each step of its sources, and for each of its targets.

    Attributes:
        block: The block.
        source_step: Sources of a part.
        target_step: Targets of a part; of a diagonal block, the same nodes in the order of the sources.
    """

    block: Block
    source_step: int
    target_step: int

    @classmethod
    def of(cls, block: Block, limits: PartLimits) -> _Grid:
        view = block.view
        assert view is not None
        max_edges = max(1, limits.max_scalars // view.num_kernel_elements)
        max_nodes = limits.max_nodes
        num_sources, num_targets = len(block.source), len(block.target)
        if block.kind is BlockKind.DIAGONAL:
            source_step = target_step = min(num_sources, max_edges, max_nodes)
        elif view.transposed_shape is not None:
            # Positions run along the targets, so that a part of all targets reads one narrow band of columns.
            target_step = min(num_targets, max_edges, max_nodes)
            source_step = min(num_sources, max(1, max_edges // target_step), max_nodes)
        else:
            source_step = min(num_sources, max_edges, limits.max_sources)
            target_step = min(num_targets, max(1, max_edges // source_step), max_nodes)
        return cls(block, source_step, target_step)

    def __len__(self) -> int:
        return ceil(len(self.block.source) / self.source_step) * self._num_columns

    @property
    def _num_columns(self) -> int:
        return 1 if self.block.kind is BlockKind.DIAGONAL else ceil(len(self.block.target) / self.target_step)

    def part(self, index: int) -> BlockPart:
        """One of the parts; those of the same sources follow one another."""
        block, view = self.block, self.block.view
        assert view is not None
        row, column = divmod(index, self._num_columns)
        is_diagonal = block.kind is BlockKind.DIAGONAL
        source = row * self.source_step
        target = source if is_diagonal else column * self.target_step
        num_sources = min(self.source_step, len(block.source) - source)
        num_targets = min(self.target_step, len(block.target) - target)
        offset = view.offset + source * view.source_stride + (0 if is_diagonal else target * view.target_stride)
        return BlockPart(
            edge_type=block.edge_type,
            sources=slice(block.source.start + source, block.source.start + source + num_sources),
            targets=slice(block.target.start + target, block.target.start + target + num_targets),
            num_sources=num_sources,
            num_targets=num_targets,
            paired=is_diagonal,
            view=replace(view, offset=offset),
        )


def _strided(part: BlockPart, vector: Tensor, parameter_start: int) -> Tensor:
    assert part.view is not None
    step = vector.stride(0)
    first = vector.storage_offset() + (parameter_start + part.view.offset) * step
    strides = tuple(stride * step for stride in part.strides())
    return vector.as_strided((*part.grid, part.num_kernel_elements), strides, first)


def _scattered_index(part: BlockPart, device: torch.device) -> Tensor | None:
    view = part.view
    assert view is not None
    if view.transposed_shape is None:
        return None
    axes = [
        torch.arange(count, device=device) * stride
        for count, stride in zip((*part.grid, part.num_kernel_elements), part.strides(), strict=True)
    ]
    position = view.offset + axes[0][:, None, None] + axes[1][:, None] + axes[2]
    rows, columns = view.transposed_shape
    return position % rows * columns + position // rows
