"""Automorphisms of small topologies, found on the written-out edges, and what they do to parameters.

Independent of how topologies are built: colours every node, refines by neighbours, individualises, and verifies.

Shape suffixes: E edges, F kernel elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sidecast.graphs.export import to_edges
from sidecast.graphs.topology import Topology

Ints = NDArray[np.int64]


class SearchError(Exception):
    """Refinement by neighbours does not tell which node is an image of which: the search is at a dead end."""


class GraphAutomorphisms(Protocol):
    """A topology whose automorphisms can be drawn and carried out on parameters."""

    topology: Topology

    def may_move(self) -> NDArray[np.bool_]:
        """Nodes that an automorphism may move, as far as colours tell; no other node is moved by any."""

    def random_automorphism(self, rng: np.random.Generator) -> Ints:
        """The image of every node, int64 (nodes), under a random automorphism; boundary nodes stay.

        Raises:
            SearchError: None is found.
        """

    def elementary_automorphisms(self, rng: np.random.Generator) -> Iterator[Ints]:
        """Images under automorphisms that move little each, and together every node that any automorphism moves."""

    def permuted(self, image: Ints, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Parameter vectors (first axis P) after a node permutation: each edge's value moves to the edge's image."""


class ColouredGraph:
    """A directed graph with colours on nodes and edges.

    Attributes:
        source: Source node of each edge.
        target: Target node of each edge.
        colour: Colour of each edge, not negative.
        start: Colour of each node; automorphisms keep it.
    """

    def __init__(self, source: Ints, target: Ints, colour: Ints, start: NDArray[np.uint64]) -> None:
        self.source, self.target, self.colour, self.start = source, target, colour, start
        self.num_nodes = len(start)
        self._edge_colour = _mixed(colour.astype(np.uint64))

    def keys(self, source: Ints, target: Ints, colour: Ints) -> Ints:
        """One number for each edge; equal for equal edges."""
        return (colour * self.num_nodes + source) * self.num_nodes + target

    def is_automorphism(self, image: Ints) -> bool:
        """Whether a node permutation maps edges onto edges of the same colour and nodes onto nodes of theirs."""
        before = np.sort(self.keys(self.source, self.target, self.colour))
        after = np.sort(self.keys(image[self.source], image[self.target], self.colour))
        return bool((self.start[image] == self.start).all() and (before == after).all())

    def classes(self) -> NDArray[np.uint64]:
        """The coarsest colours that refine the nodes' own and those of their neighbours: orbits lie inside them."""
        return self._refined([self.start])[0]

    def is_in_company(self) -> NDArray[np.bool_]:
        """Whether each node has others in its class."""
        _, number, count = np.unique(self.classes(), return_inverse=True, return_counts=True)
        is_shared: NDArray[np.bool_] = count[number] > 1
        return is_shared

    def random_automorphism(self, rng: np.random.Generator) -> Ints:
        """The image of every node under a random automorphism.

        Raises:
            SearchError: The search comes to a dead end.
        """
        here, there = self._refined([self.start, self.start.copy()])
        return self._completed(here, there, rng, keeps_nodes=False)

    def automorphism_that_moves(self, node: int, image: int, rng: np.random.Generator) -> Ints | None:
        """An automorphism that takes a node to another, and leaves others where they are if it can; None if none is."""
        here, there = self._refined([self.start, self.start.copy()])
        if here[node] != there[image]:
            return None
        here[node] = there[image] = _FRESH
        here, there = self._refined([here, there])
        if not _are_alike(here, there):
            return None
        try:
            return self._completed(here, there, rng, keeps_nodes=True)
        except SearchError:
            return None

    def _completed(
        self, here: NDArray[np.uint64], there: NDArray[np.uint64], rng: np.random.Generator, *, keeps_nodes: bool
    ) -> Ints:
        fresh = _FRESH
        while True:
            classes, counts = np.unique(here, return_counts=True)
            if (counts == 1).all():
                break
            chosen = rng.choice(classes[counts > 1])
            first = np.flatnonzero(here == chosen)[0]
            seconds = rng.permutation(np.flatnonzero(there == chosen))
            if keeps_nodes:
                seconds = seconds[np.argsort(seconds != first, kind="stable")]
            for second in seconds:
                next_here, next_there = here.copy(), there.copy()
                fresh += np.uint64(1)
                next_here[first] = next_there[second] = fresh
                next_here, next_there = self._refined([next_here, next_there])
                if _are_alike(next_here, next_there):
                    here, there = next_here, next_there
                    break
            else:
                raise SearchError("no node of the class is an image")
        image = np.empty(self.num_nodes, dtype=np.int64)
        image[np.argsort(here)] = np.argsort(there)
        if not self.is_automorphism(image):
            raise SearchError("nodes that refinement does not tell apart are no images of each other")
        return image

    def _refined(self, colours: list[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
        num_classes = len(np.unique(colours[0]))
        while True:
            new = []
            for node_colour in colours:
                total = _mixed(node_colour) * np.uint64(5)
                np.add.at(total, self.target, _mixed(self._edge_colour ^ node_colour[self.source]))
                np.add.at(total, self.source, _mixed(~self._edge_colour ^ node_colour[self.target]))
                new.append(total)
            colours = new
            if len(np.unique(colours[0])) == num_classes:
                return colours
            num_classes = len(np.unique(colours[0]))


_FRESH = np.uint64(2**63)


def _are_alike(here: NDArray[np.uint64], there: NDArray[np.uint64]) -> bool:
    return bool((np.sort(here) == np.sort(there)).all())


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
    return value ^ (value >> np.uint64(32))


def boundary_nodes(topology: Topology) -> NDArray[np.bool_]:
    """Which nodes are boundary nodes."""
    is_boundary = np.zeros(topology.num_nodes, dtype=bool)
    for layer in topology.layers:
        if layer.is_boundary:
            is_boundary[layer.nodes.start : layer.nodes.stop] = True
    return is_boundary


def rank_among_equal(key: Ints) -> Ints:
    """How many equal keys come before each key."""
    order = np.argsort(key, kind="stable")
    start = np.flatnonzero(np.append(True, np.diff(key[order]) != 0)) if len(key) else np.empty(0, dtype=np.int64)
    rank = np.empty_like(key)
    length = np.diff(np.append(start, len(key)))
    rank[order] = np.arange(len(key)) - np.repeat(start, length)
    return rank


class SmallGraph:
    """A small topology's edges, each with a colour that tells its type, constant, kernel and place among parallel ones.

    Attributes:
        topology: What was written out; memory is in proportion to its edges.
        source: Source node of each edge, int64 (E).
        target: Target node of each edge, int64 (E).
        element_EF: Which element of the parameter vector each kernel element is; -1 where there is none.
        layers: The nodes of each layer, by name.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        edges = to_edges(topology)
        self.source, self.target = edges.index_2E.numpy()
        self.element_EF: Ints = edges.element_EF.numpy()
        self.num_nodes = topology.num_nodes
        kernel_size = (self.element_EF >= 0).sum(axis=1)
        base = edges.type_E.numpy() * 8 + (edges.constant_E.numpy() * 2).astype(np.int64)
        base = base * (self.element_EF.shape[1] + 1) + kernel_size
        parallel = (base * self.num_nodes + self.source) * self.num_nodes + self.target
        rank = rank_among_equal(parallel)
        self.colour: Ints = base * (rank.max(initial=0) + 1) + rank
        self.is_parametric = kernel_size > 0
        self.layers = {layer.name: layer.nodes for layer in topology.layers}
        # Boundary nodes have a colour each, so that they stay.
        numbers = np.arange(self.num_nodes) + 1
        start = np.where(boundary_nodes(topology), numbers, 0).astype(np.uint64)
        self._coloured = ColouredGraph(self.source, self.target, self.colour, start)

    def layer(self, name: str) -> Ints:
        """The nodes of one layer."""
        nodes = self.layers[name]
        return np.arange(nodes.start, nodes.stop)

    def is_automorphism(self, image: Ints) -> bool:
        """Whether a node permutation maps edges onto edges of the same colour and leaves boundary nodes in place."""
        return self._coloured.is_automorphism(image)

    def permuted(self, image: Ints, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Parameter vectors (first axis P) after a node permutation: each edge's value moves to the edge's image.

        Structural edges are not looked at, so that permutations that are no automorphisms can be carried out too.
        """
        edges = np.flatnonzero(self.is_parametric)
        key = self._coloured.keys(self.source[edges], self.target[edges], self.colour[edges])
        order = np.argsort(key)
        wanted = self._coloured.keys(image[self.source[edges]], image[self.target[edges]], self.colour[edges])
        found = order[np.searchsorted(key, wanted, sorter=order).clip(max=len(key) - 1)]
        assert (key[found] == wanted).all(), "a parameter's edge has no image"
        old, new = self.element_EF[edges], self.element_EF[edges[found]]
        result = np.full_like(vectors, np.nan)
        result[new[new >= 0]] = vectors[old[old >= 0]]
        assert not np.isnan(result).any(), "an element lies on no edge"
        return result

    def may_move(self) -> NDArray[np.bool_]:
        """Nodes that an automorphism may move, as far as colours tell."""
        return self._coloured.is_in_company()

    def random_automorphism(self, rng: np.random.Generator) -> Ints:
        """A random automorphism that leaves boundary nodes in place.

        Raises:
            SearchError: The search comes to a dead end.
        """
        return self._coloured.random_automorphism(rng)

    def elementary_automorphisms(self, rng: np.random.Generator) -> Iterator[Ints]:
        """Automorphisms that move little: one inside each layer of a class of nodes, and one between layers."""
        classes = self._coloured.classes()
        layer_of = np.zeros(self.num_nodes, dtype=np.int64)
        for number, layer in enumerate(self.topology.layers):
            layer_of[layer.nodes.start : layer.nodes.stop] = number
        for value in np.unique(classes):
            nodes = np.flatnonzero(classes == value)
            groups = [nodes[layer_of[nodes] == layer] for layer in np.unique(layer_of[nodes])]
            inside = [(group[0], group[1]) for group in groups if len(group) > 1]
            between = [(groups[0][0], group[0]) for group in groups[1:]]
            for node, other in (*inside, *between):
                image = self._coloured.automorphism_that_moves(int(node), int(other), rng)
                if image is not None:
                    yield image

    def moved(self, moves: Mapping[str, Ints]) -> Ints:
        """The node permutation that permutes each named layer: node i of it goes where ``moves[name][i]`` was."""
        image = np.arange(self.num_nodes)
        for name, order in moves.items():
            nodes = self.layer(name)
            image[nodes] = nodes[order]
        return image
