"""Edges that are drawn at random stand for all edges of their blocks."""

from __future__ import annotations

import pytest
import torch

from sidecast.metatraining.edges import STRUCTURAL, EdgeSampler
from sidecast.predictors.nino.graph_cache import build_graph
from tests.support.small_trajectories import SOURCE

MANIFEST = SOURCE.task.model.build().manifest


@pytest.fixture(params=["official", "symmetric"])
def sampler(request: pytest.FixtureRequest) -> EdgeSampler:
    return EdgeSampler(MANIFEST, build_graph(MANIFEST, request.param, 8))


def test_all_edges_hold_every_parameter_once(sampler: EdgeSampler) -> None:
    everything = sampler.all_edges()
    is_parameter = everything.row_E != STRUCTURAL
    elements = everything.edges.element_EF[is_parameter, 0]
    assert torch.equal(elements.sort().values, torch.arange(MANIFEST.num_elements))
    rows = torch.cat([torch.full((spec.numel,), row) for row, spec in enumerate(MANIFEST.parameters)])
    assert torch.equal(everything.row_E[is_parameter], rows[elements])
    assert torch.equal(everything.weight_E, torch.ones(len(everything.weight_E)))


def test_weights_add_up_to_the_degree_of_every_node(sampler: EdgeSampler) -> None:
    sampled = sampler.sample(4, torch.Generator().manual_seed(1))
    assert len(sampled.weight_E) < len(sampler.all_edges().weight_E) / 2
    degrees = torch.zeros(len(sampler.degree_V)).index_add(0, sampled.edges.index_2E[1], sampled.weight_E)
    torch.testing.assert_close(degrees, sampler.degree_V)


def test_every_edge_may_be_drawn(sampler: EdgeSampler) -> None:
    generator = torch.Generator().manual_seed(2)
    seen = torch.cat([sampler.sample(8, generator).edges.element_EF[:, 0] for _ in range(200)]).unique()
    assert len(seen) > 0.99 * MANIFEST.num_elements


def test_what_is_drawn_is_decided_by_the_generator(sampler: EdgeSampler) -> None:
    first, again, other = (sampler.sample(4, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.edges.index_2E, again.edges.index_2E)
    assert not torch.equal(first.edges.index_2E, other.edges.index_2E)
