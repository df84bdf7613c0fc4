"""Positional encodings: of large models, of layouts, and their canonical form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from sidecast.graphs import build_topology, eigen, laplacian_encoding, positional
from sidecast.graphs.partition import atoms, coarsest, merge
from sidecast.manifest import ModelManifest
from tests.support.dense_laplacian import dense_eigenpairs
from tests.support.symmetric_models import SMALL_MODELS

LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def large_manifest() -> ModelManifest:
    """The shapes of an 8B decoder with tied embeddings."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (128256, 4096))]
    for layer in range(32):
        name = f"model.layers.{layer}"
        for part, shape in (
            ("self_attn.q_proj", (4096, 4096)),
            ("self_attn.k_proj", (1024, 4096)),
            ("self_attn.v_proj", (1024, 4096)),
            ("self_attn.o_proj", (4096, 4096)),
            ("mlp.gate_proj", (14336, 4096)),
            ("mlp.up_proj", (14336, 4096)),
            ("mlp.down_proj", (4096, 14336)),
            ("input_layernorm", (4096,)),
            ("post_attention_layernorm", (4096,)),
        ):
            shapes.append((f"{name}.{part}.weight", shape))
    shapes.append(("model.norm.weight", (4096,)))
    return ModelManifest.from_shapes(shapes, LARGE)


def test_an_8b_model_has_as_many_cells_as_its_heads_imply() -> None:
    fine = atoms(build_topology(large_manifest()))
    num_layers, num_heads, num_kv_heads = 32, 32, 8
    assert fine.num_cells == num_layers * (2 * num_heads + num_kv_heads + 6) + 3


@pytest.mark.parametrize("layout", ["official", "symmetric"])
def test_encoding_of_an_8b_model_is_orthonormal_and_repeats(layout: str) -> None:
    topology = build_topology(large_manifest(), layout)
    encoding_VK = laplacian_encoding(topology)
    assert encoding_VK.shape == (topology.num_nodes, 8)
    assert encoding_VK.dtype == torch.float32
    gram = encoding_VK.double().T @ encoding_VK.double()
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
    positional._summary.cache_clear()
    assert torch.equal(laplacian_encoding(build_topology(large_manifest(), layout)), encoding_VK)


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_symmetric_encoding_consists_of_eigenvectors_that_are_constant_on_orbits(name: str) -> None:
    topology = SMALL_MODELS[name]().topology()
    encoding_VK = laplacian_encoding(topology).double().numpy()
    value_V, vector_VV = dense_eigenpairs(topology)
    used = [column for column in range(8) if np.abs(encoding_VK[:, column]).max() > 0]
    assert len(used) >= 3
    assert used == list(range(len(used))), "zero columns come last"
    previous = 0.0
    for column in used:
        share = (vector_VV.T @ encoding_VK[:, column]) ** 2
        value = float(share @ value_V)
        assert share[np.abs(value_V - value) > 1e-6].sum() < 1e-9
        assert value >= previous - 1e-6
        previous = value


def test_merged_partition_is_equitable_and_no_finer_than_needed() -> None:
    topology = SMALL_MODELS["llama"]().topology()
    fine = atoms(topology)
    class_A = coarsest(fine)
    cells = merge(fine, class_A)
    assert cells.num_cells < fine.num_cells
    for cell in range(fine.num_cells):
        neighbours = np.bincount(class_A, weights=fine.neighbours_AA[[cell]].toarray()[0], minlength=cells.num_cells)
        np.testing.assert_array_equal(neighbours, cells.neighbours_AA[[class_A[cell]]].toarray()[0])
    signatures = {tuple(row) for row in cells.neighbours_AA.toarray()}
    assert len(signatures) == cells.num_cells


def test_canonical_basis_depends_on_the_space_alone() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((9, 3)))
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    expected = eigen.canonical_basis(basis)
    np.testing.assert_allclose(expected.T @ expected, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(eigen.canonical_basis(basis @ rotation), expected, atol=1e-9)
    np.testing.assert_allclose(eigen.canonical_basis(-basis), expected, atol=1e-9)


def test_sparse_and_dense_solver_agree_and_complete_the_last_eigenspace(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nine equal stars on one hub: a degenerate eigenspace of eight.
    num_stars, size = 9, 40
    count = 1 + num_stars * (size + 1)
    adjacency = np.zeros((count, count))
    for star in range(num_stars):
        centre = 1 + star * (size + 1)
        adjacency[0, centre] = adjacency[centre, 0] = 1
        leaves = slice(centre + 1, centre + size + 1)
        adjacency[centre, leaves] = adjacency[leaves, centre] = 1
    degree = adjacency.sum(axis=1)
    similarity = csr_array(adjacency / np.sqrt(degree[:, None] * degree))
    first = np.sqrt(degree) / np.sqrt(degree.sum())
    dense = eigen.lowest_eigenpairs(similarity, 3, first)
    monkeypatch.setattr(eigen, "_LARGEST_DENSE", 10)
    sparse = eigen.lowest_eigenpairs(similarity, 3, first)
    assert len(dense.value_K) >= 9
    num_shared = min(len(dense.value_K), len(sparse.value_K))
    assert num_shared >= 9
    np.testing.assert_allclose(sparse.value_K[:num_shared], dense.value_K[:num_shared], atol=1e-10)
    np.testing.assert_allclose(sparse.vector_AK[:, :9], dense.vector_AK[:, :9], atol=1e-7)
