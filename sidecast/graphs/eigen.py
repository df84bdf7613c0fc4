"""The lowest eigenpairs of I - S for a sparse symmetric S, with one canonical basis for each eigenspace.

Shape suffixes: A rows of the matrix, K eigenvectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.sparse import csc_array, csr_array, eye_array
from scipy.sparse.linalg import LinearOperator, SuperLU, eigsh, splu

# Eigenvalues closer than this are taken for one eigenspace: solvers are good to 1e-13, and the spectra at hand have
# gaps above 1e-7 where they have any.
EIGENVALUE_TOLERANCE = 1e-9
_LARGEST_DENSE = 400
_SHIFT = -1e-2


@dataclass(frozen=True, eq=False)
class EigenPairs:
    """Eigenvalues, ascending, and the eigenvectors that belong to them, as columns."""

    value_K: NDArray[np.float64]
    vector_AK: NDArray[np.float64]


def lowest_eigenpairs(similarity_AA: csr_array, count: int, first_A: NDArray[np.float64]) -> EigenPairs:
    """The lowest eigenpairs of I - S, at least ``count`` of them if there are as many, eigenspaces complete.

    Args:
        similarity_AA: S, symmetric, with a spectrum in [-1, 1].
        count: How many are needed.
        first_A: A known eigenvector of the lowest eigenvalue, unit norm: comes first.

    Returns:
        Ascending; every eigenspace in its canonical basis, but for ``first_A``.
    """
    size = similarity_AA.shape[0]
    wanted = min(size, count + 4)
    while True:
        pairs = _solve(similarity_AA, wanted)
        if wanted == size or _num_complete(pairs.value_K) >= count:
            break
        wanted = min(size, 2 * wanted)
    kept = size if wanted == size else _num_complete(pairs.value_K)
    vector_AK = pairs.vector_AK[:, :kept].copy()
    for start, stop in _eigenspaces(pairs.value_K[:kept]):
        if start == 0:
            space = canonical_basis(_orthogonal_rest(vector_AK[:, :stop], first_A))
            vector_AK[:, :stop] = np.column_stack([first_A, space])
            continue
        vector_AK[:, start:stop] = canonical_basis(vector_AK[:, start:stop])
    return EigenPairs(pairs.value_K[:kept], vector_AK)


def canonical_basis(basis_AK: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis that depends on the spanned space alone.

    Takes the row with the largest projection on the space (the first of equals), makes that projection the next
    vector, with a positive entry in that row, and goes on in what is orthogonal to it.

    Args:
        basis_AK: Any orthonormal basis.
    """
    rest = basis_AK.copy()
    result = np.empty_like(basis_AK)
    for number in range(basis_AK.shape[1]):
        weight_A = np.einsum("ak,ak->a", rest, rest)
        pivot = int(np.argmax(weight_A >= weight_A.max() * (1 - 1e-6)))
        vector = rest @ rest[pivot]
        vector /= np.linalg.norm(vector)
        result[:, number] = vector
        rest = rest - np.outer(vector, vector @ rest)
    return result


def _orthogonal_rest(basis_AK: NDArray[np.float64], first_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """An orthonormal basis of what a spanned space has orthogonal to one of its unit vectors."""
    coordinates = first_A @ basis_AK
    complement = np.linalg.svd(coordinates[None, :])[2][1:]
    return basis_AK @ complement.T


def _solve(similarity_AA: csr_array, count: int) -> EigenPairs:
    size = similarity_AA.shape[0]
    if size <= _LARGEST_DENSE or 8 * count >= size:
        laplacian = np.eye(size) - similarity_AA.toarray()
        value, vector = eigh(laplacian, subset_by_index=[0, count - 1])
        return EigenPairs(value, vector)
    return _solve_sparse(csc_array(eye_array(size, format="csc") - similarity_AA), count)


def _solve_sparse(laplacian_AA: csc_array, count: int) -> EigenPairs:
    """Shift-and-invert Lanczos, repeated on what is orthogonal to the vectors found until nothing lower turns up.

    One run may return an eigenspace without some of its dimensions.
    """
    size = laplacian_AA.shape[0]
    shifted = csc_array(laplacian_AA - _SHIFT * eye_array(size, format="csc"))
    factors = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    rng = np.random.default_rng(0)
    found_K, found_AK = np.empty(0), np.empty((size, 0))
    while True:
        inverse = LinearOperator(
            (size, size), matvec=partial(_solve_outside, factors, found_AK), dtype=np.dtype(np.float64)
        )
        inverse_value, vector_AK = eigsh(inverse, k=count, which="LA", v0=rng.standard_normal(size))
        value_K = _SHIFT + 1 / inverse_value
        is_settled = len(found_K) >= count and value_K.min() > found_K[count - 1] - EIGENVALUE_TOLERANCE
        if is_settled:
            return EigenPairs(found_K[:count], found_AK[:, :count])
        order = np.argsort(np.concatenate([found_K, value_K]), kind="stable")
        found_K = np.concatenate([found_K, value_K])[order]
        found_AK = np.concatenate([found_AK, vector_AK], axis=1)[:, order]


def _solve_outside(factors: SuperLU, found_AK: NDArray[np.float64], x_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse, restricted to what is orthogonal to eigenvectors already found."""
    solution_A: NDArray[np.float64] = factors.solve(x_A - found_AK @ (found_AK.T @ x_A))
    return solution_A - found_AK @ (found_AK.T @ solution_A)


def _eigenspaces(value_K: NDArray[np.float64]) -> list[tuple[int, int]]:
    bounds = [0, *(np.flatnonzero(np.diff(value_K) > EIGENVALUE_TOLERANCE) + 1).tolist(), len(value_K)]
    return [(start, stop) for start, stop in pairwise(bounds) if start < stop]


def _num_complete(value_K: NDArray[np.float64]) -> int:
    """How many of the lowest eigenvalues lie in eigenspaces that certainly are complete: all but the last one's."""
    return _eigenspaces(value_K)[-1][0]
