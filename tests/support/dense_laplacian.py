"""The normalised Laplacian the expensive way: every edge, a dense matrix, a dense solver, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sidecast.graphs import Topology, to_edges


def dense_eigenpairs(topology: Topology) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, ascending, and eigenvectors as columns."""
    source, target = to_edges(topology).index_2E.numpy()
    adjacency = np.zeros((topology.num_nodes, topology.num_nodes))
    adjacency[source, target] = adjacency[target, source] = 1
    np.fill_diagonal(adjacency, 0)
    degree = adjacency.sum(axis=1)
    inverse = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    return np.linalg.eigh(np.eye(topology.num_nodes) - inverse[:, None] * adjacency * inverse)
