"""The symmetric layout: its automorphisms are the network's symmetries, and nowcasts commute with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidecast.graphs.automorphisms import SmallGraph
from tests.support.edgewise_nino import CONTEXT, EdgewiseNino
from tests.support.symmetric_models import SMALL_MODELS, SmallModel

NUM_PERMUTATIONS = 3


@pytest.fixture(scope="module", params=sorted(SMALL_MODELS))
def model(request: pytest.FixtureRequest) -> SmallModel:
    return SMALL_MODELS[request.param]()


@pytest.fixture(scope="module")
def graph(model: SmallModel) -> SmallGraph:
    return SmallGraph(model.topology())


def test_every_automorphism_leaves_the_output_unchanged(model: SmallModel, graph: SmallGraph) -> None:
    rng = np.random.default_rng(0)
    for _ in range(NUM_PERMUTATIONS):
        vector_P = model.random_vectors(rng, 1)[:, 0]
        image = graph.random_automorphism(rng)
        permuted_P = graph.permuted(image, vector_P)
        assert (permuted_P != vector_P).mean() > 0.3
        before, after = model.output(vector_P), model.output(permuted_P)
        assert before.std() > 1e-3
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_nowcasts_commute_with_every_automorphism(model: SmallModel, graph: SmallGraph) -> None:
    rng = np.random.default_rng(1)
    nino = EdgewiseNino(graph.element_EF.shape[1], seed=2)
    states_PC = model.random_vectors(rng, CONTEXT)
    with torch.no_grad():
        nowcast_P = nino(graph.topology, torch.from_numpy(states_PC)).numpy()
        for _ in range(NUM_PERMUTATIONS):
            image = graph.random_automorphism(rng)
            of_permuted = nino(graph.topology, torch.from_numpy(graph.permuted(image, states_PC))).numpy()
            expected = graph.permuted(image, nowcast_P)
            assert np.abs(of_permuted - expected).max() < 1e-6 * np.abs(expected).max()
