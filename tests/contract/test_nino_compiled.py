"""The compiled tile loops equal torch's on every shape, and torch's stand in where they cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.predictors.nino import compiled as nino_compiled
from sidecast.predictors.nino import loops as nino_loops
from sidecast.predictors.nino.compiled import CompiledKernels, cpu_kernels
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import CpuKernels, Layer
from sidecast.predictors.nino.loops import LOOPS, Loops, compiled_loops, find_compiled_loops
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from tests.support.nino_goldens import GoldenPrediction
from tests.support.nino_loops import loops_or_skip

FP32 = [name for name, kind in LOOPS.items() if kind.dtype == torch.float32]
BF16 = [name for name, kind in LOOPS.items() if kind.dtype == torch.bfloat16]


@pytest.fixture
def fresh_search() -> Iterator[None]:
    find_compiled_loops.cache_clear()
    yield
    find_compiled_loops.cache_clear()


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


@pytest.mark.parametrize("name", FP32)
@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 4), (3, 6), (2, 97), (2, 199)])
@pytest.mark.parametrize(
    ("num_features", "num_layers", "dim", "num_elements"),
    # Of 112 columns the widest vectors leave some for narrower strips; the last width is none that the loops know.
    [(5, 1, 16, 1), (5, 3, 128, 1), (45, 2, 32, 9), (5, 2, 112, 1), (5, 2, 24, 1)],
)
def test_equal_to_torch(
    name: str, num_targets: int, num_sources: int, num_features: int, num_layers: int, dim: int, num_elements: int
) -> None:
    kernels = CompiledKernels(loops_or_skip(name))
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers, dim)
    scale, gain = torch.randn(dim, dim) / dim**0.5, torch.randn(num_sources, dim)
    output = Affine(torch.randn(dim, num_elements) / dim**0.5, torch.randn(num_elements))
    for found, expected in zip(
        kernels.message_sums(features, layers, scale, gain),
        CpuKernels().message_sums(features, layers, scale, gain),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        kernels.changes(features, layers, output),
        CpuKernels().changes(features, layers, output),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", FP32)
def test_silu_at_its_ends(name: str) -> None:
    loops = loops_or_skip(name)
    values = torch.tensor([-1e4, -200.0, -87.0, -1e-3, 0.0, 1e-3, 87.0, 200.0, 1e4])
    layer = Layer(torch.ones(1, 16), None, torch.zeros(1, 16))
    output = Affine(torch.eye(16)[:, :1].contiguous(), torch.zeros(1))
    found = CompiledKernels(loops).changes(values[None, None], [layer], output)
    torch.testing.assert_close(found[0, :, 0], torch.nn.functional.silu(values), rtol=1e-6, atol=1e-33)


@pytest.mark.usefixtures("fresh_search")
def test_torch_stands_in_for_a_missing_library(
    nino_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(nino_loops, "__file__", str(tmp_path / "loops.py"))
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    with caplog.at_level(logging.WARNING):
        golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()))
    assert not compiled_loops()
    (warning,) = [record for record in caplog.records if "a nowcast on CPU will take longer" in record.message]
    assert "there is no" in warning.message


@pytest.mark.usefixtures("fresh_search")
def test_a_broken_library_is_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_nino_tiles.so").write_bytes(b"no library")
    monkeypatch.setattr(nino_loops, "__file__", str(tmp_path / "loops.py"))
    assert not compiled_loops()


@pytest.mark.usefixtures("fresh_search")
def test_loops_that_are_not_installed_are_no_fault_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nino_loops, "__file__", str(tmp_path / "loops.py"))
    with pytest.raises(ConfigError, match=r"are not to be had \(there is no .* compiler\); allowed here: auto, torch"):
        cpu_kernels("fp32", "avx2", 32)


def rounded_hidden(features: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Hidden vectors (T, S, D) of the last layer in fp32, from bf16 ones of the layers before and bf16 weights."""
    inputs = features.permute(1, 2, 0)
    for depth, layer in enumerate(layers):
        weight = layer.weight if depth == 0 else layer.weight.bfloat16().float()
        nodes = layer.target_TD[:, None] if layer.source_SD is None else layer.target_TD[:, None] + layer.source_SD
        hidden = torch.nn.functional.silu(inputs @ weight + nodes)
        inputs = hidden.bfloat16().float()
    return hidden


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize(("num_targets", "num_sources"), [(1, 4), (3, 6), (2, 97), (2, 199)])
@pytest.mark.parametrize(
    ("num_features", "num_layers", "dim", "num_elements"),
    # AMX takes 32 of K at a time: 320 columns are ten steps for sixteen rows.
    [(5, 1, 64, 1), (5, 3, 128, 1), (45, 2, 64, 9), (5, 2, 320, 1)],
)
def test_bf16_products_round_nothing_but_their_operands(
    name: str, num_targets: int, num_sources: int, num_features: int, num_layers: int, dim: int, num_elements: int
) -> None:
    kernels = CompiledKernels(loops_or_skip(name))
    torch.manual_seed(0)
    features = torch.randn(num_features, num_targets, num_sources)
    layers = random_layers(num_features, num_targets, num_sources, num_layers, dim)
    scale, gain = torch.randn(dim, dim) / dim**0.5, torch.randn(num_sources, dim)
    output = Affine(torch.randn(dim, num_elements) / dim**0.5, torch.randn(num_elements))
    hidden = rounded_hidden(features, layers)
    gained = (hidden.bfloat16().float() @ scale.bfloat16().float() * gain).sum(1)
    found = (*kernels.message_sums(features, layers, scale, gain), kernels.changes(features, layers, output))
    expected = (hidden.sum(1), gained, hidden.bfloat16().float() @ output.weight + output.bias)
    for ours, reference in zip(found, expected, strict=True):
        # What is left is the approximate SiLU, and hidden values that it rounds to another neighbour.
        assert (ours - reference).abs().mean() < 2e-3 * reference.abs().mean()
        assert (ours - reference).abs().max() < 2e-2 * reference.abs().mean()


@pytest.mark.parametrize("name", BF16)
def test_bf16_silu_at_its_ends(name: str) -> None:
    loops = loops_or_skip(name)
    values = torch.tensor([-1e30, -1e4, -200.0, -87.0, -1e-3, 0.0, 1e-3, 87.0, 200.0, 1e30])
    layer = Layer(torch.ones(1, 64), None, torch.zeros(1, 64))
    output = Affine(torch.eye(64)[:, :1].contiguous(), torch.zeros(1))
    found = CompiledKernels(loops).changes(values[None, None], [layer], output)
    torch.testing.assert_close(found[0, :, 0], torch.nn.functional.silu(values), rtol=2**-8, atol=1e-33)


def has(*names: str) -> Callable[[], Mapping[str, Loops]]:
    """A processor that can run these loops."""
    return lambda: {name: Loops(name, LOOPS[name], None, None, None) for name in names}


@pytest.mark.parametrize(
    ("here", "precision", "dim", "taken"),
    [
        (("amx", "avx512_bf16", "avx512", "avx2"), "fp32", 128, "avx512"),
        (("amx", "avx512_bf16", "avx512", "avx2"), "bf16", 128, "amx"),
        (("amx", "avx512_bf16", "avx512", "avx2"), "auto", 128, "amx"),
        (("avx512_bf16", "avx512", "avx2"), "auto", 128, "avx512_bf16"),
        (("avx512", "avx2"), "auto", 128, "avx512"),
        (("avx2",), "auto", 128, "avx2"),
        # No strip of the bf16 loops.
        (("amx", "avx512_bf16", "avx512", "avx2"), "auto", 32, "avx512"),
    ],
)
def test_the_fastest_loops_are_taken(
    here: tuple[str, ...], precision: str, dim: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nino_compiled, "compiled_loops", has(*here))
    kernels = cpu_kernels(precision, "auto", dim)
    assert isinstance(kernels, CompiledKernels)
    assert kernels.loops.name == taken


@pytest.mark.parametrize(
    ("here", "precision", "loops", "dim"),
    [
        (("avx2",), "bf16", "auto", 128),
        ((), "auto", "auto", 128),
        (("avx2",), "fp32", "auto", 24),
        (("avx2",), "fp32", "torch", 128),
    ],
)
def test_torch_stands_in_for_loops_that_are_not_there(
    here: tuple[str, ...], precision: str, loops: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nino_compiled, "compiled_loops", has(*here))
    assert isinstance(cpu_kernels(precision, loops, dim), CpuKernels)


@pytest.mark.parametrize(
    ("loops", "dim", "refusal"),
    [
        ("avx512", 128, r"loops is 'avx512', which need a processor with AVX-512 .*; here there are: avx2, torch"),
        (
            "avx2",
            24,
            "loops is 'avx2', which need a hidden width that is a multiple of 16; that of these .* 24",
        ),
    ],
)
def test_forced_loops_are_taken_or_refused(loops: str, dim: int, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nino_compiled, "compiled_loops", has("avx2"))
    with pytest.raises(ConfigError, match=refusal):
        cpu_kernels("fp32", loops, dim)


def test_a_processor_without_tiles_is_refused_by_the_predictor(
    nino_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    predictor = NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), precision="bf16", loops="amx")
    monkeypatch.setattr(nino_compiled, "compiled_loops", has("avx2"))
    with pytest.raises(ConfigError, match="loops is 'amx', which need a processor with AMX"):
        golden.check(predictor)


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    kind = replace(LOOPS["avx2"], pack=lambda weight, is_first: packed.append(weight) or weight)
    nothing = lambda *arguments: 0  # noqa: E731
    kernels = CompiledKernels(Loops("avx2", kind, nothing, nothing, nothing))
    layers = random_layers(5, 2, 7, 2, 16)
    for _ in range(3):
        kernels.message_sums(torch.randn(5, 2, 7), layers, torch.randn(16, 16), torch.randn(7, 16))
    assert sum(weight is layers[1].weight for weight in packed) == 1


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_close_on_a_published_model(name: str, nino_data: Path) -> None:
    loops_or_skip(name)
    golden = GoldenPrediction.load(nino_data, "llama_gqa_untied")
    exact, rough = torch.empty(2, golden.history.manifest.num_elements)
    for options, delta in (({}, exact), ({"precision": "bf16", "loops": name}, rough)):
        predictor = NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), **options)
        predictor.predict(golden.history, 20, delta)
    assert 0 < (rough - exact).abs().mean() < 0.01 * exact.abs().mean()
