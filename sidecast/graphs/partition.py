"""Equitable partitions of a topology's undirected graph, found on node ranges, never on edges.

A partition is equitable if every node of cell a has the same number of neighbours in cell b, for all a and b.
The undirected graph is simple: directions, types, parallel edges and self-loops are ignored.

Shape suffixes: A atoms or cells, N entries of a sparse matrix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sidecast.graphs.topology import BlockKind, NodeRange, Topology

_DENSE, _DIAGONAL = 1, 0


@dataclass(frozen=True, eq=False)
class EquitablePartition:
    """An equitable partition into cells.

    Attributes:
        size_A: Nodes in each cell.
        neighbours_AA: How many neighbours a node of cell a has in cell b.
        diagonal_AA: 1 where cells a and b are joined node by node, and not completely; else 0. Symmetric.
    """

    size_A: NDArray[np.int64]
    neighbours_AA: csr_array
    diagonal_AA: csr_array

    @property
    def num_cells(self) -> int:
        return len(self.size_A)


def atoms(topology: Topology) -> EquitablePartition:
    """The coarsest equitable partition into contiguous ranges: no block separates two nodes of a cell.

    Cells are in node order.
    """
    cuts = cut_points(topology)
    position = {cut: number for number, cut in enumerate(cuts)}
    size_A: NDArray[np.int64] = np.diff(np.asarray(cuts, dtype=np.int64)).astype(np.int64)
    pairs = _AtomPairs(len(size_A), size_A)
    for block in topology.blocks:
        sources = range(position[block.source.start], position[block.source.stop])
        targets = range(position[block.target.start], position[block.target.stop])
        if block.kind is BlockKind.DENSE:
            pairs.add_rectangle(sources, targets)
        else:
            pairs.add_diagonal(sources, targets)
    return pairs.partition()


def cut_points(topology: Topology, further: Iterable[int] = ()) -> list[int]:
    """Where ranges of any block begin or end, closed under the diagonal blocks, which carry cuts across.

    Args:
        topology: Of any size.
        further: Nodes before which to cut as well.
    """
    cuts = {0, topology.num_nodes, *further}
    diagonals: list[tuple[NodeRange, int]] = []
    for block in topology.blocks:
        cuts.update((block.source.start, block.source.stop, block.target.start, block.target.stop))
        if block.kind is BlockKind.DIAGONAL and block.source != block.target:
            shift = block.target.start - block.source.start
            diagonals += [(block.source, shift), (block.target, -shift)]
    diagonals.sort(key=lambda entry: entry[0].start)
    pending = _cuts_inside(sorted(cuts), diagonals)
    by_start = _RangesByStart(diagonals)
    while pending:
        new = {cut + shift for cut, shift in pending} - cuts
        cuts |= new
        pending = [(cut, shift) for cut in new for shift in by_start.shifts_around(cut)]
    return sorted(cuts)


def _cuts_inside(cuts: list[int], diagonals: list[tuple[NodeRange, int]]) -> list[tuple[int, int]]:
    inside = []
    for nodes, shift in diagonals:
        for number in range(bisect_left(cuts, nodes.start + 1), bisect_left(cuts, nodes.stop)):
            inside.append((cuts[number], shift))
    return inside


class _RangesByStart:
    """Finds the ranges around a point among ranges sorted by their start."""

    def __init__(self, diagonals: list[tuple[NodeRange, int]]) -> None:
        self._diagonals = diagonals
        self._starts = [nodes.start for nodes, _ in diagonals]
        # The furthest end so far: scanning backwards may stop once nothing earlier reaches the point.
        self._reach: list[int] = []
        reach = 0
        for nodes, _ in diagonals:
            reach = max(reach, nodes.stop)
            self._reach.append(reach)

    def shifts_around(self, cut: int) -> list[int]:
        shifts = []
        number = bisect_left(self._starts, cut) - 1
        while number >= 0 and self._reach[number] > cut:
            nodes, shift = self._diagonals[number]
            if nodes.start < cut < nodes.stop:
                shifts.append(shift)
            number -= 1
        return shifts


class _AtomPairs:
    """Which pairs of atoms are joined, completely or node by node, each pair counted once."""

    def __init__(self, num_atoms: int, size_A: NDArray[np.int64]) -> None:
        self._num_atoms = num_atoms
        self._size_A = size_A
        self._keys: list[NDArray[np.int64]] = []

    def add_rectangle(self, sources: range, targets: range) -> None:
        source, target = np.arange(sources.start, sources.stop), np.arange(targets.start, targets.stop)
        self._add(np.repeat(source, len(target)), np.tile(target, len(source)), _DENSE)

    def add_diagonal(self, sources: range, targets: range) -> None:
        self._add(np.arange(sources.start, sources.stop), np.arange(targets.start, targets.stop), _DIAGONAL)

    def _add(self, source: NDArray[np.int64], target: NDArray[np.int64], kind: int) -> None:
        low, high = np.minimum(source, target), np.maximum(source, target)
        self._keys.append((low * self._num_atoms + high) * 2 + kind)

    def partition(self) -> EquitablePartition:
        keys = np.unique(np.concatenate([*self._keys, np.empty(0, dtype=np.int64)]))
        pair, kind = keys // 2, keys % 2
        # A pair that is joined completely as well as node by node comes twice, the complete one last.
        is_last = np.append(pair[1:] != pair[:-1], True) if len(pair) else np.empty(0, dtype=bool)
        low, high, is_dense = pair[is_last] // self._num_atoms, pair[is_last] % self._num_atoms, kind[is_last] == _DENSE
        is_used = is_dense | (low != high)
        low, high, is_dense = low[is_used], high[is_used], is_dense[is_used]
        is_cross = low != high
        row = np.concatenate([low, high[is_cross]])
        column = np.concatenate([high, low[is_cross]])
        dense = np.concatenate([is_dense, is_dense[is_cross]])
        shape = (self._num_atoms, self._num_atoms)
        # Inside one cell a node is no neighbour of its own.
        count = np.where(dense, self._size_A[column] - (row == column), 1).astype(np.float64)
        neighbours_AA = csr_array((count, (row, column)), shape=shape)
        ones = np.ones(np.count_nonzero(~dense))
        return EquitablePartition(
            self._size_A, neighbours_AA, csr_array((ones, (row[~dense], column[~dense])), shape=shape)
        )


def coarsest(fine: EquitablePartition) -> NDArray[np.int64]:
    """The coarsest equitable partition, by colour refinement of a finer one.

    Every automorphism of the undirected graph maps each of its classes onto itself.

    Args:
        fine: Any equitable partition.

    Returns:
        The class of each cell of ``fine``, int64 (A), numbered from 0 in order of first appearance.
    """
    label_A = np.zeros(fine.num_cells, dtype=np.int64)
    num_classes = min(1, fine.num_cells)
    while True:
        label_A = _refined_by_hash(fine.neighbours_AA, label_A)
        if int(label_A.max(initial=-1)) + 1 == num_classes:
            break
        num_classes = int(label_A.max()) + 1
    return _refined_exactly(fine.neighbours_AA, label_A)


def _refined_by_hash(neighbours_AA: csr_array, label_A: NDArray[np.int64]) -> NDArray[np.int64]:
    """One round: cells stay together if they had one label and equal hashes of their neighbours' labels."""
    weight_A = _scrambled(label_A.astype(np.uint64))
    count_N = neighbours_AA.data.astype(np.uint64)
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(count_N * weight_A[neighbours_AA.indices])])
    sum_A = total[neighbours_AA.indptr[1:]] - total[neighbours_AA.indptr[:-1]]
    return _renumbered(np.unique(_scrambled(sum_A + weight_A * np.uint64(3)), return_inverse=True)[1])


def _scrambled(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads consecutive numbers over all of 64 bits (the finaliser of SplitMix64)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _refined_exactly(neighbours_AA: csr_array, label_A: NDArray[np.int64]) -> NDArray[np.int64]:
    """Refines by exact neighbour counts until stable: a single round, unless two hashes were equal by chance."""
    num_cells = len(label_A)
    while True:
        num_classes = int(label_A.max(initial=-1)) + 1
        indicator = csr_array((np.ones(num_cells), (np.arange(num_cells), label_A)), shape=(num_cells, num_classes))
        signature = neighbours_AA @ indicator
        signature.sort_indices()
        table: dict[tuple[int, bytes, bytes], int] = {}
        new_A = np.empty_like(label_A)
        for cell in range(num_cells):
            entries = slice(signature.indptr[cell], signature.indptr[cell + 1])
            key = (int(label_A[cell]), signature.indices[entries].tobytes(), signature.data[entries].tobytes())
            new_A[cell] = table.setdefault(key, len(table))
        if len(table) == num_classes:
            return new_A
        label_A = new_A


def _renumbered(label_A: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same classes, numbered in order of first appearance."""
    _, first, inverse = np.unique(label_A, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def merge(fine: EquitablePartition, class_A: NDArray[np.int64]) -> EquitablePartition:
    """The partition whose cells are the classes of another's cells; ``diagonal_AA`` is left empty."""
    num_classes = int(class_A.max()) + 1 if len(class_A) else 0
    size = np.bincount(class_A, weights=fine.size_A, minlength=num_classes).astype(np.int64)
    _, representative = np.unique(class_A, return_index=True)
    indicator = csr_array(
        (np.ones(fine.num_cells), (np.arange(fine.num_cells), class_A)), shape=(fine.num_cells, num_classes)
    )
    neighbours = csr_array(fine.neighbours_AA[representative] @ indicator)
    return EquitablePartition(size, neighbours, csr_array((num_classes, num_classes)))
