"""Neural graphs with their node features, built once per model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.graphs import build_topology
from sidecast.graphs.positional import laplacian_encoding
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest


@dataclass(frozen=True)
class NeuralGraph:
    """A topology and the positional encoding of its nodes (V x lpe_dim, fp32)."""

    topology: Topology
    lpe_VL: Tensor


def build_graph(manifest: ModelManifest, layout: str | None, lpe_dim: int) -> NeuralGraph:
    """The graph of a model by its registered builder, with its Laplacian encoding (unless ``lpe_dim`` is 0)."""
    topology = build_topology(manifest, layout)
    if lpe_dim == 0:
        return NeuralGraph(topology, torch.empty(topology.num_nodes, 0))
    return NeuralGraph(topology, laplacian_encoding(topology, lpe_dim))


class GraphCache:
    """The graphs used last, by model and layout; safe to share between predictors and threads.

    Args:
        build: Makes the graph of a manifest in a layout with so many eigenvectors.
        capacity: Graphs kept; the one unused for longest goes first.
    """

    def __init__(
        self, build: Callable[[ModelManifest, str | None, int], NeuralGraph] = build_graph, capacity: int = 8
    ) -> None:
        self._build = build
        self._capacity = capacity
        self._graphs: OrderedDict[tuple[str, str | None, int], NeuralGraph] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(
        self,
    ) -> tuple[type[GraphCache], tuple[Callable[[ModelManifest, str | None, int], NeuralGraph], int]]:
        # Graphs are rebuilt where a predictor is sent to; sending them would cost more.
        return GraphCache, (self._build, self._capacity)

    def graph(self, manifest: ModelManifest, layout: str | None, lpe_dim: int) -> NeuralGraph:
        """The graph of this model, built now if it is not at hand."""
        key = (manifest.schema_hash, layout, lpe_dim)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._build(manifest, layout, lpe_dim)
                while len(self._graphs) > self._capacity:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            return self._graphs[key]
