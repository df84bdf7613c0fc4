"""Triton kernels, in Triton's interpreter, equal the CPU tiles on shapes that do not divide their blocks."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import test_nino_any_graph as any_graph
import torch

from sidecast.errors import ConfigError
from sidecast.predictors.nino import backend as nino_backend
from sidecast.predictors.nino.block_parts import PartLimits
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import CpuKernels, Layer
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from tests.support.nino_goldens import GoldenPrediction

DIM = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nino_triton() -> ModuleType:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled on this machine, and tested there by the tests that need a GPU")
    from sidecast.predictors.nino import triton_kernels

    return triton_kernels


def random_layers(num_features: int, num_targets: int, num_sources: int, num_layers: int) -> list[Layer]:
    layers = []
    for depth in range(num_layers):
        inputs = DIM if depth else num_features
        is_output = depth == num_layers - 1 and depth > 0
        layers.append(
            Layer(
                torch.randn(inputs, DIM) / inputs**0.5,
                None if is_output else torch.randn(num_sources, DIM),
                torch.randn(1 if is_output else num_targets, DIM),
            )
        )
    return layers


@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 1), (16, 3), (37, 2), (33, 5)])
@pytest.mark.parametrize(("num_features", "num_layers"), [(5, 1), (5, 3), (45, 2)])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.06)])
def test_equal_to_the_cpu(
    nino_triton: ModuleType,
    num_targets: int,
    num_sources: int,
    num_features: int,
    num_layers: int,
    precision: str,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers)
    scale, gain = torch.randn(DIM, DIM) / DIM**0.5, torch.randn(num_sources, DIM)
    output = Affine(torch.randn(DIM, 4), torch.randn(4))
    shape = nino_triton.TileShape(block_targets=16, group_sources=2)
    kernels, reference = nino_triton.TritonKernels(precision, 5, shape), CpuKernels()
    for found, expected in zip(
        kernels.message_sums(features, layers, scale, gain),
        reference.message_sums(features, layers, scale, gain),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        kernels.changes(features, layers, output),
        reference.changes(features, layers, output),
        rtol=tolerance,
        atol=2 * tolerance,
    )


def test_bf16_keeps_small_changes_of_large_features(nino_triton: ModuleType) -> None:
    torch.manual_seed(0)
    newest = torch.randn(1, 20, 3)
    features = torch.cat([newest + 1e-3 * torch.randn(4, 20, 3), newest])
    still = newest.expand(5, 20, 3)
    # A network that reads changes only: without care all that it sees would be rounding.
    weight = torch.randn(5, DIM) * 100
    weight[-1] = -weight[:-1].sum(0)
    layer = Layer(weight, None, torch.zeros(1, DIM))
    output = Affine(torch.randn(DIM, 1), torch.zeros(1))
    kernels = nino_triton.TritonKernels("bf16", 5, nino_triton.TileShape(block_targets=16))
    exact = CpuKernels().changes(features, [layer], output)
    error = (kernels.changes(features, [layer], output) - exact).abs().mean()
    assert error < 0.02 * (exact - CpuKernels().changes(still, [layer], output)).abs().mean()


@pytest.mark.parametrize("name", ["mlp", "convnet_mixed", "convnet_wnnplus_h32"])
def test_published_predictions(nino_triton: ModuleType, name: str, nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    backend = nino_backend.triton_backend(CPU, "fp32", 5)
    golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), backend=backend))


# Every pair of two values, but not every three: the interpreter is slow, and no code looks at more than two of them.
@pytest.mark.parametrize(
    ("gnn", "dtype", "limits"),
    [
        (True, torch.float32, (1 << 24, 4096, 65_536)),
        (True, torch.bfloat16, (16, 4, 2)),
        (False, torch.bfloat16, (1 << 24, 4096, 65_536)),
        (False, torch.float32, (16, 4, 2)),
    ],
)
def test_every_kind_of_block(
    nino_triton: ModuleType,
    limits: tuple[int, int, int],
    dtype: torch.dtype,
    gnn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = PartLimits(max_scalars=limits[0], max_sources=limits[1], max_nodes=limits[2])
    monkeypatch.setattr(nino_backend, "GPU_LIMITS", cut)
    weights, history = any_graph.network_weights(gnn=gnn, hidden_dim=16), any_graph.history(dtype)
    expected = any_graph.delta(NinoPredictor(weights, graphs=any_graph.graphs()), history)
    predictor = NinoPredictor(
        weights, graphs=any_graph.graphs(), backend=nino_backend.triton_backend(CPU, "fp32", 5), num_threads=3
    )
    torch.testing.assert_close(any_graph.delta(predictor, history), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block_targets", "group_sources"), [(8, 1), (48, 1), (16, 0)])
def test_bad_tiles(nino_triton: ModuleType, block_targets: int, group_sources: int) -> None:
    with pytest.raises(ConfigError, match=r"block_targets|group_sources"):
        nino_triton.TileShape(block_targets=block_targets, group_sources=group_sources)


def test_bad_precision(nino_triton: ModuleType) -> None:
    with pytest.raises(ConfigError, match="precision is 'fp8'; allowed: fp32, tf32, bf16"):
        nino_triton.TritonKernels("fp8", 5)


def test_widths_that_triton_cannot_multiply(nino_triton: ModuleType) -> None:
    layer = Layer(torch.ones(5, 12), None, torch.ones(1, 12))
    kernels = nino_triton.TritonKernels("fp32", 5)
    with pytest.raises(ConfigError, match="hidden_dim is 12"):
        kernels.changes(torch.ones(5, 1, 1), [layer], Affine(torch.ones(12, 1), torch.ones(1)))
