"""Automorphisms of topologies of any size, found on ranges of nodes instead of edges.

A block that joins two ranges completely or node by node keeps its edges if the nodes of each range are permuted, and
those of all ranges that are joined node by node alike. Such permutations, and automorphisms of the graph whose nodes
are the ranges, generate what is drawn here: a subgroup of all automorphisms, in which ranges move as a whole.

Shape suffixes: A ranges.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sidecast.graphs.automorphisms import ColouredGraph, Ints, boundary_nodes, rank_among_equal
from sidecast.graphs.partition import cut_points
from sidecast.graphs.topology import Block, BlockKind, ParameterView, Topology

_CHUNK_ELEMENTS = 2**22


class BlockwiseGraph:
    """A topology as a graph of node ranges; memory is in proportion to its blocks.

    Attributes:
        topology: The topology.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._cuts: Ints = np.asarray(cut_points(topology, (layer.nodes.start for layer in topology.layers)))
        self._size_A: Ints = np.diff(self._cuts)
        pieces = [piece for number in range(len(topology.blocks)) for piece in self._pieces(number)]
        numbers = np.asarray(pieces, dtype=np.int64).reshape(-1, 3)
        source, target, self._block = numbers.T
        colours = {block: _colour(block) for block in topology.blocks}
        order = sorted(set(colours.values()))
        base = np.asarray([order.index(colours[topology.blocks[block]]) for block in self._block], dtype=np.int64)
        num_ranges = len(self._size_A)
        rank = rank_among_equal((base * num_ranges + source) * num_ranges + target)
        is_boundary = boundary_nodes(topology)[self._cuts[:-1]]
        # Odd colours are a boundary range's own, even ones tell the sizes of the others.
        start = np.where(is_boundary, 2 * np.arange(num_ranges) + 1, 2 * self._size_A).astype(np.uint64)
        self._coloured = ColouredGraph(source, target, base * (rank.max(initial=0) + 1) + rank, start)
        self._keys = self._coloured.keys(source, target, self._coloured.colour)
        self._by_key = np.argsort(self._keys)
        is_diagonal = np.asarray(
            [topology.blocks[block].kind is BlockKind.DIAGONAL for block in self._block], dtype=bool
        )
        joined = coo_array(
            (np.ones(is_diagonal.sum()), (source[is_diagonal], target[is_diagonal])), shape=(num_ranges, num_ranges)
        )
        # Ranges of one component are joined node by node, so that their nodes are permuted alike or not at all.
        num_components, self._component_A = connected_components(joined, directed=False)
        is_held = np.zeros(num_components, dtype=bool)
        is_held[self._component_A[is_boundary]] = True
        self._is_held = is_held

    def _pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """The pairs of ranges that a block joins."""
        block = self.topology.blocks[number]
        first, last, low, high = np.searchsorted(
            self._cuts, (block.source.start, block.source.stop, block.target.start, block.target.stop)
        )
        if block.kind is BlockKind.DIAGONAL:
            yield from ((first + step, low + step, number) for step in range(last - first))
        else:
            yield from ((source, target, number) for source in range(first, last) for target in range(low, high))

    def _image(self, range_image: Ints, orders: dict[int, Ints]) -> Ints:
        image = np.empty(self.topology.num_nodes, dtype=np.int64)
        for number, component in enumerate(self._component_A):
            order = orders.get(int(component))
            places = np.arange(self._size_A[number]) if order is None else order
            image[self._cuts[number] : self._cuts[number + 1]] = self._cuts[range_image[number]] + places
        return image

    def _movable(self) -> Iterator[tuple[int, int]]:
        """The components whose nodes may be permuted, and how many nodes each of their ranges has."""
        components, firsts = np.unique(self._component_A, return_index=True)
        for component, first in zip(components, firsts, strict=True):
            if self._size_A[first] > 1 and not self._is_held[component]:
                yield int(component), int(self._size_A[first])

    def may_move(self) -> NDArray[np.bool_]:
        """Nodes that an automorphism that is drawn here may move, as far as colours tell."""
        is_permuted_A = (self._size_A > 1) & ~self._is_held[self._component_A]
        return np.repeat(is_permuted_A | self._coloured.is_in_company(), self._size_A)

    def random_automorphism(self, rng: np.random.Generator) -> Ints:
        """The image of every node, int64 (nodes), under a random automorphism; boundary nodes stay.

        Raises:
            SearchError: None is found.
        """
        orders = {component: rng.permutation(size) for component, size in self._movable()}
        return self._image(self._coloured.random_automorphism(rng), orders)

    def elementary_automorphisms(self, rng: np.random.Generator) -> Iterator[Ints]:
        """Automorphisms that move little: two nodes of ranges that are permuted alike, or ranges as a whole."""
        everything = np.arange(len(self._size_A))
        for component, size in self._movable():
            yield self._image(everything, {component: np.append([1, 0], np.arange(2, size))})
        classes = self._coloured.classes()
        for value in np.unique(classes):
            ranges = np.flatnonzero(classes == value)
            for number in ranges[1:]:
                image = self._coloured.automorphism_that_moves(int(ranges[0]), int(number), rng)
                if image is not None:
                    yield self._image(image, {})

    def permuted(self, image: Ints, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Parameter vectors (first axis P) after an automorphism that was drawn here."""
        offsets, position = {}, 0
        for spec in self.topology.parameters:
            offsets[spec.fqn] = position
            position += spec.numel
        range_image = np.searchsorted(self._cuts, image[self._cuts[:-1]], side="right") - 1
        graph = self._coloured
        wanted = graph.keys(range_image[graph.source], range_image[graph.target], graph.colour)
        found = self._by_key[np.searchsorted(self._keys, wanted, sorter=self._by_key).clip(max=len(self._keys) - 1)]
        assert (self._keys[found] == wanted).all(), "a block has no image"
        result = np.full_like(vectors, np.nan)
        for piece, other in enumerate(found):
            block, twin = (self.topology.blocks[self._block[number]] for number in (piece, other))
            if block.view is None or twin.view is None:
                continue
            sources, targets = (
                np.arange(self._cuts[number], self._cuts[number + 1])
                for number in (graph.source[piece], graph.target[piece])
            )
            num_rows = max(1, _CHUNK_ELEMENTS // max(1, len(targets)))
            for first in range(0, len(sources), num_rows):
                rows = sources[first : first + num_rows]
                old = _elements(block, block.view, rows, targets) + offsets[block.view.fqn]
                new = _elements(twin, twin.view, image[rows], image[targets]) + offsets[twin.view.fqn]
                result[new] = vectors[old]
        assert not np.isnan(result).any(), "an element lies on no edge"
        return result


def _colour(block: Block) -> tuple[int, float, int, str]:
    is_structural = block.view is None
    kernel_size = 0 if block.view is None else block.view.num_kernel_elements
    return int(block.edge_type), block.constant if is_structural else 0.0, kernel_size, block.kind.value


def _elements(block: Block, view: ParameterView, sources: Ints, targets: Ints) -> Ints:
    """Element numbers that the edges between these nodes carry."""
    source, target = sources - block.source.start, targets - block.target.start
    if block.kind is BlockKind.DIAGONAL:
        target = np.zeros(1, dtype=np.int64)
    kernel = np.arange(view.num_kernel_elements) * view.kernel_stride
    position = (
        view.offset
        + (source * view.source_stride)[:, None, None]
        + (target * view.target_stride)[None, :, None]
        + kernel[None, None, :]
    )
    if view.transposed_shape is None:
        return position
    rows, columns = view.transposed_shape
    return position % rows * columns + position // rows
