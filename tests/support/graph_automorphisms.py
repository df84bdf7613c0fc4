"""Automorphisms of small topologies, found on the written-out edges, and what they do to parameters.

Independent of how topologies are built: colours every node, refines by neighbours, individualises, and checks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sidecast.graphs import Topology, to_edges

Ints = NDArray[np.int64]


class SmallGraph:
    """A small topology's edges, each with a colour that tells its type, constant and place among parallel edges."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        edges = to_edges(topology)
        self.source, self.target = edges.index_2E.numpy()
        self.element_EF: Ints = edges.element_EF.numpy()
        self.num_nodes = topology.num_nodes
        is_structural = self.element_EF[:, 0] < 0
        base = edges.type_E.numpy() * 8 + (edges.constant_E.numpy() * 2).astype(np.int64)
        self.colour = base * 64 + self._rank_among_parallel(base)
        self.is_parametric = ~is_structural
        self.num_elements = sum(spec.numel for spec in topology.parameters)
        self.layers = {layer.name: layer.nodes for layer in topology.layers}
        self.is_boundary = np.zeros(self.num_nodes, dtype=bool)
        for layer in topology.layers:
            if layer.is_boundary:
                self.is_boundary[layer.nodes.start : layer.nodes.stop] = True

    def _key(self, source: Ints, target: Ints, colour: Ints) -> Ints:
        return (colour * self.num_nodes + source) * self.num_nodes + target

    def _rank_among_parallel(self, base: Ints) -> Ints:
        key = self._key(self.source, self.target, base)
        order = np.argsort(key, kind="stable")
        start = np.flatnonzero(np.append(True, np.diff(key[order]) != 0))
        rank = np.empty_like(key)
        length = np.diff(np.append(start, len(key)))
        rank[order] = np.arange(len(key)) - np.repeat(start, length)
        return rank

    def layer(self, name: str) -> Ints:
        """The nodes of one layer."""
        nodes = self.layers[name]
        return np.arange(nodes.start, nodes.stop)

    def is_automorphism(self, image: Ints) -> bool:
        """Whether a node permutation maps edges onto edges of the same colour and leaves boundary nodes in place."""
        before = np.sort(self._key(self.source, self.target, self.colour))
        after = np.sort(self._key(image[self.source], image[self.target], self.colour))
        is_fixed = (image == np.arange(self.num_nodes))[self.is_boundary].all()
        return bool(is_fixed and (before == after).all())

    def permuted(self, image: Ints, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Parameter vectors (first axis P) after a node permutation: each edge's value moves to the edge's image.

        Structural edges are not looked at, so that permutations that are no automorphisms can be carried out too.
        """
        edges = np.flatnonzero(self.is_parametric)
        key = self._key(self.source[edges], self.target[edges], self.colour[edges])
        order = np.argsort(key)
        wanted = self._key(image[self.source[edges]], image[self.target[edges]], self.colour[edges])
        found = order[np.searchsorted(key, wanted, sorter=order).clip(max=len(key) - 1)]
        assert (key[found] == wanted).all(), "a parameter's edge has no image"
        old, new = self.element_EF[edges], self.element_EF[edges[found]]
        assert ((old < 0) == (new < 0)).all(), "a kernel maps to one of another size"
        result = np.full_like(vectors, np.nan)
        result[new[new >= 0]] = vectors[old[old >= 0]]
        assert not np.isnan(result).any(), "an element lies on no edge"
        return result

    def _refined(self, colours: list[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
        edge_colour = _mixed(self.colour.astype(np.uint64))
        num_classes = len(np.unique(colours[0]))
        while True:
            new = []
            for node_colour in colours:
                total = _mixed(node_colour) * np.uint64(5)
                np.add.at(total, self.target, _mixed(edge_colour ^ node_colour[self.source]))
                np.add.at(total, self.source, _mixed(~edge_colour ^ node_colour[self.target]))
                new.append(total)
            colours = new
            if len(np.unique(colours[0])) == num_classes:
                return colours
            num_classes = len(np.unique(colours[0]))

    def random_automorphism(self, rng: np.random.Generator) -> Ints:
        """A random automorphism that leaves boundary nodes in place."""
        start = np.where(self.is_boundary, np.arange(self.num_nodes) + 1, 0).astype(np.uint64)
        here, there = self._refined([start, start.copy()])
        fresh = np.uint64(2**63)
        while True:
            classes, counts = np.unique(here, return_counts=True)
            if (counts == 1).all():
                break
            chosen = rng.choice(classes[counts > 1])
            first = np.flatnonzero(here == chosen)[0]
            for second in rng.permutation(np.flatnonzero(there == chosen)):
                next_here, next_there = here.copy(), there.copy()
                fresh += np.uint64(1)
                next_here[first] = next_there[second] = fresh
                next_here, next_there = self._refined([next_here, next_there])
                if (np.sort(next_here) == np.sort(next_there)).all():
                    here, there = next_here, next_there
                    break
            else:
                raise AssertionError("no node of the class is an image")
        image = np.empty(self.num_nodes, dtype=np.int64)
        image[np.argsort(here)] = np.argsort(there)
        assert self.is_automorphism(image)
        return image

    def moved(self, moves: Mapping[str, Ints]) -> Ints:
        """The node permutation that permutes each named layer: node i of it goes where ``moves[name][i]`` was."""
        image = np.arange(self.num_nodes)
        for name, order in moves.items():
            nodes = self.layer(name)
            image[nodes] = nodes[order]
        return image


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
    return value ^ (value >> np.uint64(32))
