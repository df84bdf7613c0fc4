"""Published predictions are reproduced, scaled and unscaled, at every stored horizon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from goldens import NAMES, Golden, load_golden

from sidecast.predictors.base import Predictor
from sidecast.predictors.edge_list import expand_edges
from sidecast.predictors.nino_plain import PlainNinoPredictor
from sidecast.predictors.weights import load_weights
from sidecast.scaling import tensor_scale

SCALED_TOLERANCE = 2e-5
UNSCALED_TOLERANCE = 1e-6


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, nino_data: Path) -> Golden:
    return load_golden(nino_data, request.param)


def check_golden(predictor: Predictor, golden: Golden) -> None:
    newest = golden.history.states[-1]
    for horizon in golden.horizons:
        out = torch.full_like(newest, torch.nan)
        predictor.predict(golden.history, horizon, out)
        scaled, unscaled = golden.expected(horizon)
        torch.testing.assert_close(newest + out, unscaled, rtol=0, atol=UNSCALED_TOLERANCE)
        start = 0
        for spec in golden.history.manifest.parameters:
            part = slice(start, start := start + spec.numel)
            scale = tensor_scale(golden.history.tensor(spec.fqn))
            # Undoes the unscaling, which has no epsilon, so that a wrong epsilon shows.
            found = (newest[part].double() + out[part].double() - scale.mean) / scale.std
            torch.testing.assert_close(found.float(), scaled[part], rtol=0, atol=SCALED_TOLERANCE)


def test_plain_module_reproduces_published_predictions(golden: Golden) -> None:
    check_golden(PlainNinoPredictor(load_weights(golden.checkpoint), graphs=golden.cache()), golden)


def test_last_convolution_does_not_matter(nino_data: Path) -> None:
    golden = load_golden(nino_data, "mlp")
    check_golden(PlainNinoPredictor(load_weights(golden.checkpoint), graphs=golden.cache(), trimmed=False), golden)


def test_edges_are_written_out_in_published_order(golden: Golden) -> None:
    edges = expand_edges(golden.graph.topology)
    arrays = golden.arrays
    width = arrays["edge_element"].shape[1]
    assert edges.edge_index.tolist() == arrays["edge_index"].tolist()
    assert edges.edge_type_E.tolist() == arrays["edge_type"].tolist()
    assert edges.element_EF[:, :width].tolist() == arrays["edge_element"].tolist()
