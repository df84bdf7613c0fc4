"""Published predictions are reproduced, scaled and unscaled, at every stored horizon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sidecast.graphs.export import edge_features
from sidecast.metatraining.edges import EdgeSampler
from sidecast.metatraining.networks import hidden_to_changes, nino_hidden, wnn_plus_hidden
from sidecast.predictors.nino.loops import LOOPS
from sidecast.predictors.nino.network import load_network
from sidecast.predictors.nino.plain import PlainNinoPredictor, scale_history
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from tests.support.nino_goldens import GOLDEN_NAMES, GoldenPrediction
from tests.support.nino_loops import loops_or_skip

FP32 = [name for name, kind in LOOPS.items() if kind.dtype == torch.float32]
BF16 = [name for name, kind in LOOPS.items() if kind.dtype == torch.bfloat16]


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest, nino_data: Path) -> GoldenPrediction:
    return GoldenPrediction.load(nino_data, request.param)


@pytest.mark.parametrize("loops", ["torch", *FP32])
def test_fused(golden: GoldenPrediction, loops: str) -> None:
    if loops in FP32:
        loops_or_skip(loops)
    golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), loops=loops))


@pytest.mark.parametrize("loops", BF16)
def test_fused_in_bf16(golden: GoldenPrediction, loops: str) -> None:
    loops_or_skip(loops)
    weights = load_weights(golden.weights_path)
    if weights.config.hidden_dim % LOOPS[loops].dim_step:
        pytest.skip(f"no width that the loops {loops!r} know")
    predictor = NinoPredictor(weights, graphs=golden.graphs(), precision="auto", loops=loops)
    newest = golden.history.states[-1]
    for horizon in golden.case.description["horizons"]:
        delta = torch.empty_like(newest)
        predictor.predict(golden.history, horizon, delta)
        exact = torch.from_numpy(golden.case.arrays[f"prediction_k{horizon}"]) - newest
        assert 0 < (delta - exact).abs().mean() < 0.01 * exact.abs().mean()


def test_fused_on_several_threads(nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), num_threads=3))


def test_plain(golden: GoldenPrediction) -> None:
    golden.check(PlainNinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()))


@torch.no_grad()
def test_what_metatraining_differentiates(golden: GoldenPrediction) -> None:
    weights = load_weights(golden.weights_path)
    manifest = golden.history.manifest
    graph = golden.graphs().graph(manifest, None, 8)
    sampler = EdgeSampler(manifest, graph)
    everything = sampler.all_edges()
    plain = PlainNinoPredictor(weights, graphs=golden.graphs())
    scaled_PC, _ = scale_history(plain, golden.history)
    features_EX = edge_features(everything.edges, scaled_PC)
    network, types_E = load_network(weights), everything.edges.type_E
    if weights.config.gnn:
        hidden_ED = nino_hidden(
            weights.config, weights.tensors, features_EX, everything, sampler.degree_V, graph.lpe_VL
        )
        num_elements = everything.edges.element_EF.shape[1]
        expected = network(features_EX, everything.edges.index_2E, types_E, graph.lpe_VL)[:, :num_elements]
    else:
        first_EC = features_EX[:, : weights.config.context_len]
        hidden_ED = wnn_plus_hidden(weights.config, weights.tensors, first_EC, types_E)
        num_elements, expected = 1, network(first_EC, types_E)[:, None]
    found = hidden_to_changes(weights.config, weights.tensors, hidden_ED, num_elements)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "convnet_wnnplus_h32"])
def test_horizons_that_are_not_stored(name: str, nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    weights = load_weights(golden.weights_path)
    fused = NinoPredictor(weights, graphs=golden.graphs())
    plain = PlainNinoPredictor(weights, graphs=golden.graphs())
    found, expected = torch.empty(2, golden.history.manifest.num_elements)
    for horizon in range(1, 41):
        fused.predict(golden.history, horizon, found)
        plain.predict(golden.history, horizon, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_last_convolution_does_not_matter(nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "mlp")
    golden.check(PlainNinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), trimmed=False))
