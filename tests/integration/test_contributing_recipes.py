"""The builder and the predictor of CONTRIBUTING.md are what they are said to be."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.graphs import graph_builders, registry
from sidecast.graphs.automorphisms import SmallGraph
from sidecast.manifest import ModelManifest
from sidecast.predictors import registry as predictors
from sidecast.predictors.base import History
from tests.support.recipes import listing
from tests.support.symmetric_models import SmallModel, small_decoder


@pytest.fixture
def granite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallModel]:
    (tmp_path / "granite_of_the_page.py").write_text(listing('"""Granite'))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("granite", "granite_of_the_page:BUILDER", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    graph_builders.cache_clear()
    yield small_decoder("Granite")
    graph_builders.cache_clear()


def test_the_builder_of_the_recipe_has_the_symmetries_of_the_network(granite: SmallModel) -> None:
    rng = np.random.default_rng(0)
    graph = SmallGraph(granite.topology())
    vector_P = granite.random_vectors(rng, 1)[:, 0]
    permuted_P = graph.permuted(graph.random_automorphism(rng), vector_P)
    assert (permuted_P != vector_P).mean() > 0.3
    torch.testing.assert_close(granite.output(permuted_P), granite.output(vector_P), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predictor_of_the_recipe_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    (tmp_path / "damped_of_the_page.py").write_text(listing('"""The last change'))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("damped", "damped_of_the_page:DampedPredictor", predictors.ENTRY_POINT_GROUP)
    monkeypatch.setattr(predictors, "entry_points", lambda group: [point])
    manifest = ModelManifest.from_shapes([("a", [4, 5]), ("b", [3])])
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(manifest.num_elements, generator=generator).to(dtype) for _ in range(3)]
    out = torch.empty(manifest.num_elements)
    predictors.create_predictor("damped", options={"damping": 0.7}).predict(History(manifest, states), 2, out)
    torch.testing.assert_close(out, 1.19 * (states[-1].float() - states[-2].float()))
    with pytest.raises(ConfigError, match=r"damping is 0; it must be above 0 and at most 1"):
        predictors.create_predictor("damped", options={"damping": 0})
