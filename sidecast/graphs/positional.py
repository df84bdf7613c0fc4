"""Laplacian positional encodings at any model size, from the small quotient of an equitable partition.

Eigenvectors of the normalised Laplacian that are constant on the cells of an equitable partition are those of its
quotient matrix; all others sum to zero on every cell, where complete blocks vanish and only node-by-node blocks act.

Source: NiNo (arXiv 2409.04434), section 4; quotients: Godsil and Royle, Algebraic Graph Theory, section 9.3.

Shape suffixes: V nodes, A cells, K vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from sidecast.graphs.eigen import EIGENVALUE_TOLERANCE, EigenPairs, lowest_eigenpairs
from sidecast.graphs.partition import EquitablePartition, atoms, coarsest, merge
from sidecast.graphs.topology import Topology

_NUM_CACHED_TOPOLOGIES = 8


def laplacian_encoding(topology: Topology, num_vectors: int = 8) -> Tensor:
    """Eigenvectors 1 .. num_vectors of the symmetric normalised Laplacian, by ascending eigenvalue.

    The graph is taken as undirected and simple, without self-loops. Layout ``official``: the same vectors as a dense
    solver's. Layout ``symmetric``: only those that are constant on the coarsest equitable partition, hence on
    every orbit of the graph's automorphisms, so that permuted models have permuted encodings.

    Args:
        topology: Any size.
        num_vectors: K.

    Returns:
        fp32 (V, K), columns of unit norm; zero columns where there are fewer eigenvectors. Signs and the basis of
        degenerate eigenspaces are canonical: equal topologies have equal encodings.
    """
    summary = _summary(topology, num_vectors)
    encoding_VK = np.empty((topology.num_nodes, num_vectors), dtype=np.float32)
    start_A = np.concatenate([[0], np.cumsum(summary.size_A)])
    for atom, vector_K in enumerate(summary.constant_AK.astype(np.float32)):
        encoding_VK[start_A[atom] : start_A[atom + 1]] = vector_K
    for contrast in summary.contrasts:
        for atom, weight in zip(contrast.atoms, contrast.weights, strict=True):
            nodes = slice(start_A[atom], start_A[atom] + contrast.order + 1)
            encoding_VK[nodes, contrast.column] = weight * _helmert(contrast.order)
    return torch.from_numpy(encoding_VK)


@dataclass(frozen=True, eq=False)
class _Contrast:
    """An eigenvector that sums to zero on every atom.

    Attributes:
        column: Which of the K vectors it is.
        atoms: The atoms it lives on; all have the same size.
        weights: Its weight on each.
        order: Its profile on every one of them is the Helmert contrast of this order.
    """

    column: int
    atoms: tuple[int, ...]
    weights: tuple[float, ...]
    order: int


@dataclass(frozen=True, eq=False)
class _Summary:
    """An encoding in numbers of atoms, not of nodes: small enough to keep.

    Attributes:
        size_A: Nodes of each atom.
        constant_AK: Each vector's value on the nodes of each atom; zero in the columns of contrasts.
        contrasts: The vectors that are not constant on atoms.
    """

    size_A: NDArray[np.int64]
    constant_AK: NDArray[np.float64]
    contrasts: tuple[_Contrast, ...]


@lru_cache(maxsize=_NUM_CACHED_TOPOLOGIES)
def _summary(topology: Topology, num_vectors: int) -> _Summary:
    fine = atoms(topology)
    if topology.layout == "symmetric":
        class_A = coarsest(fine)
        cells = merge(fine, class_A)
        constant_CK = _constant_vectors(cells, _nontrivial(cells, num_vectors), num_vectors)
        return _Summary(fine.size_A, constant_CK[class_A], ())
    constant = _nontrivial(fine, num_vectors)
    candidates = _contrasts(fine, constant.value_K, num_vectors)
    # A stable sort: in a shared eigenspace the vectors that are constant on atoms come first.
    value_N = np.concatenate([constant.value_K, [value for value, _ in candidates]])
    order = np.argsort(np.round(value_N / EIGENVALUE_TOLERANCE), kind="stable")[:num_vectors]
    constant_AK = np.zeros((fine.num_cells, num_vectors))
    contrasts = []
    per_node_AK = constant.vector_AK / np.sqrt(fine.size_A)[:, None]
    for column, number in enumerate(order.tolist()):
        if number < len(constant.value_K):
            constant_AK[:, column] = per_node_AK[:, number]
        else:
            contrasts.append(_with_column(candidates[number - len(constant.value_K)][1], column))
    return _Summary(fine.size_A, constant_AK, tuple(contrasts))


def _constant_vectors(cells: EquitablePartition, pairs: EigenPairs, num_vectors: int) -> NDArray[np.float64]:
    constant = np.zeros((cells.num_cells, num_vectors))
    kept = pairs.vector_AK[:, :num_vectors] / np.sqrt(cells.size_A)[:, None]
    constant[:, : kept.shape[1]] = kept
    return constant


def _degree(cells: EquitablePartition) -> NDArray[np.float64]:
    degree: NDArray[np.float64] = cells.neighbours_AA.sum(axis=1)
    return degree


def _inverse_sqrt(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(1.0, np.sqrt(value), out=np.zeros_like(value), where=value > 0)


def _nontrivial(cells: EquitablePartition, num_vectors: int) -> EigenPairs:
    """The lowest eigenpairs of the quotient but the constant one, each eigenspace in its canonical basis."""
    if not cells.num_cells:
        return EigenPairs(np.empty(0), np.empty((0, 0)))
    degree_A = _degree(cells)
    left = diags_array(np.sqrt(cells.size_A) * _inverse_sqrt(degree_A))
    right = diags_array(_inverse_sqrt(degree_A) / np.sqrt(cells.size_A))
    similarity = csr_array(left @ cells.neighbours_AA @ right)
    trivial_A = np.sqrt(cells.size_A * degree_A)
    norm = np.linalg.norm(trivial_A)
    if norm:
        trivial_A /= norm
    pairs = lowest_eigenpairs(similarity, num_vectors + 1, trivial_A)
    return EigenPairs(pairs.value_K[1:], pairs.vector_AK[:, 1:])


def _contrasts(
    fine: EquitablePartition, constant_value_K: NDArray[np.float64], num_vectors: int
) -> list[tuple[float, _Contrast]]:
    """The lowest eigenpairs that sum to zero on every atom, if any can be among the lowest of all."""
    inverse = _inverse_sqrt(_degree(fine))
    # Inside an atom that is joined to itself a zero-sum vector only misses its own node's share.
    joined_to_self = (fine.neighbours_AA.diagonal() > 0).astype(float)
    action = csr_array(diags_array(inverse) @ (fine.diagonal_AA - diags_array(joined_to_self)) @ diags_array(inverse))
    largest = float(abs(action).sum(axis=1).max()) if fine.num_cells else 0.0
    if len(constant_value_K) >= num_vectors and constant_value_K[num_vectors - 1] < 1 - largest:
        return []
    candidates: list[tuple[float, _Contrast]] = []
    num_components, component_A = connected_components(fine.diagonal_AA, directed=False)
    members = np.split(np.argsort(component_A, kind="stable"), np.cumsum(np.bincount(component_A))[:-1])
    for component in members[:num_components]:
        size = int(fine.size_A[component[0]])
        if size == 1:
            continue
        values, vectors = np.linalg.eigh(np.eye(len(component)) - action[component][:, component].toarray())
        for value, vector in list(zip(values, vectors.T, strict=True))[:num_vectors]:
            sign = np.sign(vector[np.argmax(np.abs(vector) > 1e-9)])
            weights = tuple((sign * vector).tolist())
            for order in range(1, min(size, num_vectors + 1)):
                candidates.append((float(value), _Contrast(-1, tuple(component.tolist()), weights, order)))
    candidates.sort(key=lambda candidate: round(candidate[0] / EIGENVALUE_TOLERANCE))
    return candidates[:num_vectors]


def _with_column(contrast: _Contrast, column: int) -> _Contrast:
    return _Contrast(column, contrast.atoms, contrast.weights, contrast.order)


def _helmert(order: int) -> NDArray[np.float64]:
    """The first ``order`` nodes against the next one: unit norm, sum zero, orthogonal to every other order."""
    profile = np.append(np.ones(order), -order)
    profile /= np.linalg.norm(profile)
    return profile
