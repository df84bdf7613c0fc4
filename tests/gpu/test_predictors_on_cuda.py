"""Predictors on a real GPU equal themselves on the CPU, wherever the history lies. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.nino import backend as nino_backend
from sidecast.predictors.nino.block_parts import PartLimits
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.wnn import WnnConfig, WnnNetwork
from tests.support.nino_goldens import GOLDEN_NAMES, GoldenPrediction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

MANIFEST = ModelManifest.from_shapes([("matrix", [300, 257]), ("vector", [1000]), ("kernel", [7, 5, 3, 3])])


def delta(predictor: Predictor, history: History, out_device: str = "cpu") -> Tensor:
    out = torch.full((history.manifest.num_elements,), torch.nan, device=out_device)
    predictor.predict(history, 3, out)
    return out.cpu()


def walk(device: str) -> History:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, MANIFEST.num_elements, generator=generator).cumsum(0)
    return History(MANIFEST, [state.to(device) for state in states])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_predictions(name: str, nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    golden.check(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs(), device="cuda"))


@pytest.mark.parametrize(("precision", "share"), [("tf32", 0.005), ("bf16", 0.02)])
@pytest.mark.parametrize("name", ["llama_gqa_untied", "qwen3_gqa_tied", "convnet_mixed"])
def test_less_precise_products_are_close(name: str, precision: str, share: float, nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    weights = load_weights(golden.weights_path)
    exact = delta(NinoPredictor(weights, graphs=golden.graphs()), golden.history)
    rough = delta(NinoPredictor(weights, graphs=golden.graphs(), device="cuda", precision=precision), golden.history)
    assert (rough - exact).abs().mean() < share * exact.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [(1 << 24, 4096, 65_536), (1000, 48, 50)])
def test_histories_on_either_side(
    dtype: torch.dtype, limits: tuple[int, int, int], nino_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many small parts: buffers of the transfers are used over and over.
    cut = PartLimits(max_scalars=limits[0], max_sources=limits[1], max_nodes=limits[2])
    monkeypatch.setattr(nino_backend, "GPU_LIMITS", cut)
    golden = GoldenPrediction.load(nino_data, "llama_gqa_tied")
    weights = load_weights(golden.weights_path)
    host = History(golden.history.manifest, [state.to(dtype) for state in golden.history.states])
    resident = History(host.manifest, [state.cuda() for state in host.states])
    predictor = NinoPredictor(weights, graphs=golden.graphs(), device="cuda")
    expected = delta(NinoPredictor(weights, graphs=golden.graphs()), host)
    for history, out_device in ((host, "cpu"), (host, "cuda"), (resident, "cuda"), (resident, "cpu")):
        torch.testing.assert_close(delta(predictor, history, out_device), expected, rtol=1e-3, atol=2e-6)


def test_every_run_gives_the_same_bits(nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "llama_gqa_tied")
    predictor = NinoPredictor(
        load_weights(golden.weights_path), graphs=golden.graphs(), device="cuda", precision="bf16"
    )
    first = delta(predictor, golden.history)
    for _ in range(3):
        assert torch.equal(delta(predictor, golden.history), first)


@pytest.mark.parametrize("name", ["linear", "average", "outer_nesterov", "rank1"])
def test_closed_forms_work_where_the_history_is(name: str) -> None:
    predictor = create_predictor(name)
    expected = delta(predictor, walk("cpu"))
    for out_device in ("cpu", "cuda"):
        torch.testing.assert_close(delta(predictor, walk("cuda"), out_device), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("history_device", ["cpu", "cuda"])
def test_wnn(history_device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(WnnNetwork(WnnConfig()).state_dict(), tmp_path / "wnn.safetensors")
    expected = delta(create_predictor("wnn", weights=tmp_path / "wnn.safetensors"), walk("cpu"))
    on_cuda = create_predictor("wnn", weights=tmp_path / "wnn.safetensors", options={"device": "cuda"})
    torch.testing.assert_close(delta(on_cuda, walk(history_device)), expected, rtol=1e-3, atol=1e-4)
