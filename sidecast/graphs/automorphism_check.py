"""Proves a topology's symmetries on the network: no automorphism of the graph may change what the network computes.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.graphs.automorphisms import GraphAutomorphisms, Ints, SearchError, SmallGraph
from sidecast.graphs.block_automorphisms import BlockwiseGraph
from sidecast.graphs.double_precision import DoublePrecisionCopy, ExampleInputs
from sidecast.graphs.topology import EdgeType, Topology

LARGEST_CHANGE = 1e-8
"""In standard deviations of the output; rounding in double precision changes it by some 1e-14."""

_ROUNDING = 1e-12
_NUM_AUTOMORPHISMS = 4
_MAX_WRITTEN_EDGES, _MAX_WRITTEN_NODES = 20_000, 500
_MAX_TRIED = 200


@dataclass(frozen=True, kw_only=True)
class AutomorphismCheck:
    """What a check that found nothing wrong has done.

    Attributes:
        num_automorphisms: Automorphisms that were carried out on parameters.
        num_moved_nodes: Nodes that any of them moved.
        num_moved_elements: Elements of the parameter vector that any of them moved.
        num_elements: P.
        largest_change: The largest change of any output, in standard deviations of that output.
        without_effect: Parameters on which the output does not depend with these inputs: nothing is proved of them.
    """

    num_automorphisms: int
    num_moved_nodes: int
    num_moved_elements: int
    num_elements: int
    largest_change: float
    without_effect: tuple[str, ...]


def check_automorphisms(topology: Topology, module: nn.Module, example_inputs: ExampleInputs) -> AutomorphismCheck:
    """Runs a network before and after random automorphisms of its graph.

    Together they move every node that automorphisms move. Small graphs are searched edge by edge; of larger ones,
    whole ranges of nodes and the nodes inside them are permuted.

    Args:
        topology: The graph of all of the module's parameters.
        module: The network; it is copied, so that it stays as it is.
        example_inputs: What it is called with: a tensor, a sequence of arguments, or a mapping of named ones.
            Floating-point inputs that are the same number throughout are replaced by random ones.

    Returns:
        What was done.

    Raises:
        ConfigError: An automorphism changes the output by more than ``LARGEST_CHANGE``; the network cannot be run with
            these inputs; its output is constant or not finite; or no automorphism can be found.
        NoRoomError: Memory has no room for a copy.
    """
    network = DoublePrecisionCopy(module, example_inputs, topology.parameters)
    return _Check(topology, network, type(module).__name__).run()


class _Check:
    """One check: a network, its graph, and the parameters and outputs of every draw."""

    def __init__(self, topology: Topology, network: DoublePrecisionCopy, name: str) -> None:
        is_small = topology.num_edges <= _MAX_WRITTEN_EDGES and topology.num_nodes <= _MAX_WRITTEN_NODES
        self._graph: GraphAutomorphisms = SmallGraph(topology) if is_small else BlockwiseGraph(topology)
        self._topology, self._network, self._name = topology, network, name
        self._rng = np.random.default_rng(0)
        self._vector_P = self._random_vector()
        self._before = network.outputs(self._vector_P)
        again = network.outputs(self._random_vector())
        self._scales = [self._scale(one, other) for one, other in zip(self._before, again, strict=True)]
        if not any(self._scales):
            raise ConfigError(f"{name} gives the same output whatever its parameters, so its graph cannot be checked")
        self._moved_nodes = np.zeros(topology.num_nodes, dtype=bool)
        self._moved_elements_P = np.zeros(len(self._vector_P), dtype=bool)
        self._num_automorphisms, self._largest_change = 0, 0.0

    def run(self) -> AutomorphismCheck:
        try:
            for _ in range(_NUM_AUTOMORPHISMS):
                self._try(self._graph.random_automorphism(self._rng))
            if (self._graph.may_move() & ~self._moved_nodes).any():
                for image in self._graph.elementary_automorphisms(self._rng):
                    if (image != np.arange(len(image)))[~self._moved_nodes].any():
                        self._try(image)
        except SearchError as error:
            raise ConfigError(f"the graph of {self._name} cannot be checked: {error}") from error
        return AutomorphismCheck(
            num_automorphisms=self._num_automorphisms,
            num_moved_nodes=int(self._moved_nodes.sum()),
            num_moved_elements=int(self._moved_elements_P.sum()),
            num_elements=len(self._vector_P),
            largest_change=self._largest_change,
            without_effect=self._network.without_effect(self._vector_P),
        )

    def _random_vector(self) -> NDArray[np.float64]:
        norms = {
            block.view.fqn
            for block in self._topology.blocks
            if block.view is not None and block.edge_type is EdgeType.NORM
        }
        parts = [np.empty(0)]
        for spec in self._topology.parameters:
            if len(spec.shape) < 2:
                parts.append(self._rng.standard_normal(spec.numel) * 0.3 + float(spec.fqn in norms))
            else:
                # Signals stay of one size through any depth, so that no part of the network is saturated.
                fan_in = max(1, spec.numel // max(1, spec.shape[0]))
                parts.append(self._rng.standard_normal(spec.numel) * np.sqrt(2 / fan_in))
        return np.concatenate(parts)

    def _scale(self, one: Tensor, other: Tensor) -> float:
        both = np.concatenate([one.numpy().ravel(), other.numpy().ravel()])
        if not np.isfinite(both).all():
            raise ConfigError(
                f"{self._name} gives outputs that are not finite with random parameters and these example inputs, "
                "so its graph cannot be checked"
            )
        scale = float(both.std()) if both.size else 0.0
        # What varies by rounding alone is constant.
        return scale if scale > _ROUNDING * np.abs(both).max(initial=0.0) else 0.0

    def _change(self, permuted_P: NDArray[np.float64]) -> float:
        after = self._network.outputs(permuted_P)
        changes = [
            float((new - old).abs().max()) / scale
            for new, old, scale in zip(after, self._before, self._scales, strict=True)
            if scale
        ]
        return max(changes)

    def _try(self, image: Ints) -> None:
        permuted_P = self._graph.permuted(image, self._vector_P)
        change = self._change(permuted_P)
        self._num_automorphisms += 1
        self._moved_nodes |= image != np.arange(len(image))
        self._moved_elements_P |= permuted_P != self._vector_P
        if not change <= LARGEST_CHANGE:
            raise ConfigError(self._failure(image, permuted_P, change))
        self._largest_change = max(self._largest_change, change)

    def _failure(self, image: Ints, permuted_P: NDArray[np.float64], change: float) -> str:
        """What is wrong, told by the automorphism that moves least of those that change the output."""
        fewest = int((permuted_P != self._vector_P).sum())
        for number, other in enumerate(self._graph.elementary_automorphisms(self._rng)):
            if number == _MAX_TRIED:
                break
            other_P = self._graph.permuted(other, self._vector_P)
            num_moved, other_change = int((other_P != self._vector_P).sum()), self._change(other_P)
            if not other_change <= LARGEST_CHANGE and num_moved < fewest:
                image, permuted_P, change, fewest = other, other_P, other_change, num_moved
        moved = image != np.arange(len(image))
        layers = [layer.name for layer in self._topology.layers if moved[layer.nodes.start : layer.nodes.stop].any()]
        parameters, position = [], 0
        for spec in self._topology.parameters:
            elements = slice(position, position + spec.numel)
            position += spec.numel
            if (permuted_P[elements] != self._vector_P[elements]).any():
                parameters.append(spec.fqn)
        return (
            f"the graph of {self._name} has a symmetry that the model lacks: a permutation of the nodes of "
            f"{_listed(layers)}, with the parameters {_listed(parameters)}, changes the output by {change:.1e} of its "
            "standard deviation; use a predictor without a graph (linear, average, rank1, wnn), or write a builder "
            "(docs/graph-builders.md)"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more
