"""Nodes of products of sets of neurons, tied so that each set is permuted as one, and each product stays what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange


@dataclass(frozen=True, kw_only=True)
class NeuronSet:
    """A set of neurons that are permuted alike wherever they are.

    Attributes:
        size: How many there are.
        is_held: Whether their order means something, so that no symmetry moves them.
        within: Sets in each of whose members there is a permutation of its own, by number.
    """

    size: int
    is_held: bool
    within: tuple[int, ...]


def row_major(indices: Sequence[int], sizes: Sequence[int]) -> int:
    """The number of a member of a product of sets, the last set fastest."""
    number = 0
    for index, size in zip(indices, sizes, strict=True):
        number = number * size + index
    return number


class NeuronSets:
    """Makes nodes for products of sets.

    A product that is written to anew gets nodes of its own, tied node by node to its earlier ones: a chain, so that
    places in the network are told apart and their neurons are not. The first nodes of a product are tied to those of
    its sets. A set that lies within others has nodes for each of their members.
    """

    def __init__(self, assembler: TopologyAssembler, sets: Sequence[NeuronSet]) -> None:
        self._assembler = assembler
        self._sets = sets
        self._last: dict[tuple[int, ...], NodeRange] = {}
        self._of_set: dict[int, NodeRange] = {}

    def size(self, number: int) -> int:
        """How many neurons a set has."""
        return self._sets[number].size

    def nodes(self, key: tuple[int, ...], name: str, *, opens: bool) -> NodeRange:
        """The nodes of a product of sets, in row-major order.

        Args:
            key: Its sets, each after those that it lies within; none for a single node that stays.
            name: For the nodes, if they are new.
            opens: Whether something is written there, which needs new nodes.
        """
        before = self._last.get(key)
        if before is not None and not opens and key:
            return before
        is_held = all(self._sets[number].is_held for number in key)
        nodes = self._assembler.nodes(prod(self.size(number) for number in key), name, is_boundary=is_held)
        self._last[key] = nodes
        if is_held:
            return nodes
        if before is not None:
            self._assembler.structural(f"{name}.res", EdgeType.RESIDUAL, before, nodes, BlockKind.DIAGONAL)
            return nodes
        for place, number in enumerate(key):
            self._tie(key, place, number, nodes, name)
        return nodes

    def _tie(self, key: tuple[int, ...], place: int, number: int, nodes: NodeRange, name: str) -> None:
        """Ties the nodes of a product to those of one of its sets."""
        own = (*self._sets[number].within, number)
        if key == own:
            self._of_set.setdefault(number, nodes)
            return
        if any(number in self._sets[other].within and key != (*self._sets[other].within, other) for other in key):
            # They are tied to it by the nodes of what lies within it.
            return
        if number not in self._of_set:
            self._of_set[number] = self._nodes_of_set(number, own)
        of_set = self._of_set[number]
        sizes = [self.size(other) for other in key]
        own_sizes = [self.size(other) for other in own]
        is_last = place == len(key) - 1
        outer = sizes[:place] if is_last else sizes[: place + 1]
        width = prod(sizes[place:]) if is_last else prod(sizes[place + 1 :])
        for indices in product(*map(range, outer)):
            index_of = dict(zip(key, indices, strict=False))
            start = nodes.start + width * row_major(indices, outer)
            targets = NodeRange(start, start + width)
            label = f"{name}.set{number}" + "".join(f".{index}" for index in indices)
            if is_last:
                first = self.size(number) * row_major([index_of[other] for other in own[:-1]], own_sizes[:-1])
                sources = NodeRange(of_set.start + first, of_set.start + first + self.size(number))
                self._assembler.structural(label, EdgeType.RESIDUAL, sources, targets, BlockKind.DIAGONAL)
            else:
                node = of_set.start + row_major([index_of[other] for other in own], own_sizes)
                self._assembler.structural(label, EdgeType.HEAD, NodeRange(node, node + 1), targets)

    def _nodes_of_set(self, number: int, own: tuple[int, ...]) -> NodeRange:
        if self._sets[number].is_held:
            return self._assembler.nodes(self.size(number), f"set{number}", is_boundary=True)
        if own not in self._last:
            return self.nodes(own, f"set{number}", opens=True)
        return self._last[own]
