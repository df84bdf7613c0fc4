"""The compiled tile loops equal torch's on every shape, and torch's stand in where they cannot run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidecast.predictors.nino import compiled as nino_compiled
from sidecast.predictors.nino.compiled import (
    CompiledKernels,
    compiled_tiles,
    cpu_kernels,
    find_compiled_tiles,
    multiplies_bf16,
)
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import CpuKernels, Layer
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from tests.support.nino_goldens import GoldenPrediction


@pytest.fixture
def fresh_search() -> Iterator[None]:
    find_compiled_tiles.cache_clear()
    yield
    find_compiled_tiles.cache_clear()


def random_layers(num_features: int, num_targets: int, num_sources: int, num_layers: int, dim: int) -> list[Layer]:
    layers = []
    for depth in range(num_layers):
        inputs = dim if depth else num_features
        is_output = depth == num_layers - 1 and depth > 0
        layers.append(
            Layer(
                torch.randn(inputs, dim) / inputs**0.5,
                None if is_output else torch.randn(num_sources, dim),
                torch.randn(1 if is_output else num_targets, dim),
            )
        )
    return layers


@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 4), (3, 6), (2, 97), (2, 199)])
@pytest.mark.parametrize(
    ("num_features", "num_layers", "dim", "num_elements"),
    # The last width is none that the compiled loops know.
    [(5, 1, 16, 1), (5, 3, 128, 1), (45, 2, 32, 9), (5, 2, 24, 1)],
)
def test_equal_to_torch(
    num_targets: int, num_sources: int, num_features: int, num_layers: int, dim: int, num_elements: int
) -> None:
    if compiled_tiles() is None:
        pytest.skip("installed without a compiler, or no processor for it")
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers, dim)
    scale, gain = torch.randn(dim, dim) / dim**0.5, torch.randn(num_sources, dim)
    output = Affine(torch.randn(dim, num_elements) / dim**0.5, torch.randn(num_elements))
    for found, expected in zip(
        CompiledKernels().message_sums(features, layers, scale, gain),
        CpuKernels().message_sums(features, layers, scale, gain),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        CompiledKernels().changes(features, layers, output),
        CpuKernels().changes(features, layers, output),
        rtol=1e-5,
        atol=1e-5,
    )


def test_silu_at_its_ends() -> None:
    if compiled_tiles() is None:
        pytest.skip("installed without a compiler, or no processor for it")
    values = torch.tensor([-1e4, -200.0, -87.0, -1e-3, 0.0, 1e-3, 87.0, 200.0, 1e4])
    layer = Layer(torch.ones(1, 16), None, torch.zeros(1, 16))
    output = Affine(torch.eye(16)[:, :1].contiguous(), torch.zeros(1))
    found = CompiledKernels().changes(values[None, None], [layer], output)
    torch.testing.assert_close(found[0, :, 0], torch.nn.functional.silu(values), rtol=1e-6, atol=1e-33)


@pytest.mark.usefixtures("fresh_search")
def test_torch_stands_in_for_a_missing_library(
    nino_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(nino_compiled, "__file__", str(tmp_path / "nino_compiled.py"))
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    with caplog.at_level(logging.WARNING):
        golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()))
    assert compiled_tiles() is None
    (warning,) = [record for record in caplog.records if "a nowcast on CPU will take longer" in record.message]
    assert "there is no" in warning.message


@pytest.mark.usefixtures("fresh_search")
def test_a_broken_library_is_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_nino_tiles.so").write_bytes(b"no library")
    monkeypatch.setattr(nino_compiled, "__file__", str(tmp_path / "nino_compiled.py"))
    assert compiled_tiles() is None


def rounded_hidden(features: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Hidden vectors (T, S, D) of the last layer in fp32, from bf16 ones of the layers before and bf16 weights."""
    inputs = features.permute(1, 2, 0)
    for depth, layer in enumerate(layers):
        weight = layer.weight if depth == 0 else layer.weight.bfloat16().float()
        nodes = layer.target_TD[:, None] if layer.source_SD is None else layer.target_TD[:, None] + layer.source_SD
        hidden = torch.nn.functional.silu(inputs @ weight + nodes)
        inputs = hidden.bfloat16().float()
    return hidden


@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 4), (3, 6), (2, 97), (2, 199)])
@pytest.mark.parametrize(
    ("num_features", "num_layers", "dim", "num_elements"), [(5, 1, 64, 1), (5, 3, 128, 1), (45, 2, 64, 9)]
)
def test_bf16_products_round_nothing_but_their_operands(
    num_targets: int, num_sources: int, num_features: int, num_layers: int, dim: int, num_elements: int
) -> None:
    if not multiplies_bf16():
        pytest.skip("installed without a compiler, or no processor that multiplies bf16")
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers, dim)
    scale, gain = torch.randn(dim, dim) / dim**0.5, torch.randn(num_sources, dim)
    output = Affine(torch.randn(dim, num_elements) / dim**0.5, torch.randn(num_elements))
    hidden = rounded_hidden(features, layers)
    gained = (hidden.bfloat16().float() @ scale.bfloat16().float() * gain).sum(1)
    kernels = CompiledKernels(torch.bfloat16)
    found = (*kernels.message_sums(features, layers, scale, gain), kernels.changes(features, layers, output))
    expected = (hidden.sum(1), gained, hidden.bfloat16().float() @ output.weight + output.bias)
    for ours, reference in zip(found, expected, strict=True):
        # What is left is the approximate SiLU, and hidden values that it rounds to another neighbour.
        assert (ours - reference).abs().mean() < 2e-3 * reference.abs().mean()
        assert (ours - reference).abs().max() < 2e-2 * reference.abs().mean()


def test_bf16_silu_at_its_ends() -> None:
    if not multiplies_bf16():
        pytest.skip("installed without a compiler, or no processor that multiplies bf16")
    values = torch.tensor([-1e30, -1e4, -200.0, -87.0, -1e-3, 0.0, 1e-3, 87.0, 200.0, 1e30])
    layer = Layer(torch.ones(1, 64), None, torch.zeros(1, 64))
    output = Affine(torch.eye(64)[:, :1].contiguous(), torch.zeros(1))
    found = CompiledKernels(torch.bfloat16).changes(values[None, None], [layer], output)
    torch.testing.assert_close(found[0, :, 0], torch.nn.functional.silu(values), rtol=2**-8, atol=1e-33)


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_is_torchs_where_the_processor_does_not_multiply_it(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nino_compiled, "multiplies_bf16", lambda: multiplies)
    assert isinstance(cpu_kernels(torch.bfloat16), CompiledKernels if multiplies else CpuKernels)
    assert isinstance(cpu_kernels(torch.float32), CompiledKernels)
    assert isinstance(cpu_kernels(torch.float16), CpuKernels)


def test_widths_that_the_bf16_loops_do_not_know_are_torchs() -> None:
    torch.manual_seed(0)
    features, layers = torch.randn(5, 2, 7), random_layers(5, 2, 7, 2, 32)
    output = Affine(torch.randn(32, 1), torch.randn(1))
    found = CompiledKernels(torch.bfloat16).changes(features, layers, output)
    assert torch.equal(found, CpuKernels(torch.bfloat16).changes(features, layers, output))


def test_bf16_is_close_on_a_published_model(nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    exact, rough = torch.empty(2, golden.history.manifest.num_elements)
    for precision, delta in (("fp32", exact), ("bf16", rough)):
        predictor = NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), precision=precision)
        predictor.predict(golden.history, 20, delta)
    assert 0 < (rough - exact).abs().mean() < 0.01 * exact.abs().mean()
