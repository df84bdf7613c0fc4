"""Triton kernels, in Triton's interpreter, equal the CPU tiles on shapes that do not divide their blocks."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nino_goldens import GoldenPrediction

from sidecast.errors import ConfigError
from sidecast.predictors.nino import NinoPredictor
from sidecast.predictors.nino_fusion import Affine
from sidecast.predictors.nino_kernels import CpuKernels, Layer
from sidecast.predictors.weights import load_weights

DIM = 32


@pytest.fixture(scope="module")
def triton_kernels() -> ModuleType:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled on this machine, and tested there by the tests that need a GPU")
    return importlib.import_module("sidecast.predictors.nino_triton")


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


@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 1), (3, 16), (2, 37), (5, 33)])
@pytest.mark.parametrize(("num_features", "num_layers"), [(5, 1), (5, 3), (45, 2)])
def test_equal_to_the_cpu(
    triton_kernels: ModuleType, num_targets: int, num_sources: int, num_features: int, num_layers: int
) -> None:
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers)
    scale, gain = torch.randn(DIM, DIM) / DIM**0.5, torch.randn(num_sources, DIM)
    output = Affine(torch.randn(DIM, 4), torch.randn(4))
    kernels, reference = triton_kernels.TritonKernels("ieee", block_sources=16), CpuKernels()
    for found, expected in zip(
        kernels.message_sums(features, layers, scale, gain),
        reference.message_sums(features, layers, scale, gain),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        kernels.changes(features, layers, output), reference.changes(features, layers, output), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["mlp", "convnet_mixed"])
def test_published_predictions(triton_kernels: ModuleType, name: str, nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    kernels = triton_kernels.TritonKernels("ieee", block_sources=16)
    # Triton's interpreter keeps the program's position in one place: it cannot run on two threads.
    weights = load_weights(golden.weights_path)
    golden.check(NinoPredictor(weights, graphs=golden.graphs(), kernels=kernels, num_threads=1))


@pytest.mark.parametrize(("precision", "block_sources"), [("fp8", 64), ("bf16", 8), ("bf16", 48)])
def test_bad_settings(triton_kernels: ModuleType, precision: str, block_sources: int) -> None:
    with pytest.raises(ConfigError, match=r"precision|block_sources"):
        triton_kernels.TritonKernels(precision, block_sources)


def test_widths_that_triton_cannot_multiply(triton_kernels: ModuleType) -> None:
    layer = Layer(torch.ones(5, 12), None, torch.ones(1, 12))
    with pytest.raises(ConfigError, match="hidden_dim is 12"):
        triton_kernels.TritonKernels().changes(torch.ones(5, 1, 1), [layer], Affine(torch.ones(12, 1), torch.ones(1)))
