"""Nowcasts divided among Ray actors equal those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.engine_pool import DividedRunner, EnginePool
from sidecast.nowcaster_service.vector_files import HistoryFiles
from sidecast.predictors.base import History
from sidecast.predictors.nino.graph_cache import GraphCache
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights
from sidecast.predictors.registry import create_predictor
from tests.support.nino_goldens import GOLDEN_NAMES, GoldenPrediction


@pytest.fixture(scope="module")
def pools(nino_data: Path) -> Iterator[dict[int, EnginePool]]:
    ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        predictor = NinoPredictor(load_weights(nino_data / "nino_mlp_h32.pt"), graphs=GraphCache())
        yield {num_workers: EnginePool(predictor, num_workers) for num_workers in (1, 2)}
    finally:
        ray.shutdown()


class PooledPredictor:
    """A pool as a predictor: histories go through files."""

    name = "pooled"
    context_len = 5
    max_horizon = 40

    def __init__(self, pool: EnginePool, folder: Path) -> None:
        self._pool = pool
        self._folder = folder

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        self._pool.predict(write_history(history, self._folder), horizon_intervals, self._folder / "delta")
        out.copy_(torch.from_numpy(np.fromfile(self._folder / "delta", dtype=np.float32)))


def write_history(history: History, folder: Path) -> HistoryFiles:
    paths = tuple(folder / f"state{index}" for index in range(history.context_len))
    for path, state in zip(paths, history.states, strict=True):
        state.numpy().tofile(path)
    return HistoryFiles(manifest=history.manifest, paths=paths)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_predictions(
    pools: dict[int, EnginePool], num_workers: int, name: str, nino_data: Path, tmp_path: Path
) -> None:
    golden = GoldenPrediction.load(nino_data, name)
    pools[num_workers].load(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()))
    golden.check(PooledPredictor(pools[num_workers], tmp_path))


@pytest.mark.parametrize("name", ["linear", "rank1"])
def test_any_model_is_divided(pools: dict[int, EnginePool], name: str, tmp_path: Path) -> None:
    manifest = ModelManifest.from_shapes([("matrix", [40, 30]), ("vector", [41])], {"model_type": "unheard of"})
    history = History(manifest, [torch.randn(manifest.num_elements) for _ in range(5)])
    predictor = create_predictor(name)
    expected = torch.empty(manifest.num_elements)
    predictor.predict(history, 4, expected)
    runner = DividedRunner(2, 1)
    runner.prepare(predictor, manifest, 4)
    runner.predict(predictor, write_history(history, tmp_path), 4, tmp_path / "delta")
    found = torch.from_numpy(np.fromfile(tmp_path / "delta", dtype=np.float32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    history.states[1][3] = torch.inf
    with pytest.raises(ConfigError, match=r"^parameter 'matrix' has NaN"):
        runner.predict(predictor, write_history(history, tmp_path), 4, tmp_path / "delta")
    runner.close()


def test_workers_are_prepared_when_a_run_opens(pools: dict[int, EnginePool], nino_data: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "mlp")
    runner = DividedRunner(2, 1)
    predictor = NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs())
    with pytest.raises(ConfigError, match=r"^horizon is 41"):
        runner.prepare(predictor, golden.history.manifest, 41)
    runner.prepare(predictor, golden.history.manifest, 40)
    runner.close()


def test_refusals_reach_the_caller(pools: dict[int, EnginePool], nino_data: Path, tmp_path: Path) -> None:
    golden = GoldenPrediction.load(nino_data, "mlp")
    pools[2].load(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()))
    files = write_history(golden.history, tmp_path)
    with pytest.raises(ConfigError, match="horizon is 41"):
        pools[2].predict(files, 41, tmp_path / "delta")
    golden.history.states[2][0] = torch.nan
    files = write_history(golden.history, tmp_path)
    with pytest.raises(ConfigError, match=r"'fc\.0\.weight' has NaN"):
        pools[2].predict(files, 1, tmp_path / "delta")
    files.paths[3].write_bytes(b"short")
    with pytest.raises(ConfigError, match="state3 has 5 bytes"):
        pools[2].predict(files, 1, tmp_path / "delta")
    with pytest.raises(ConfigError, match="num_workers is 0"):
        EnginePool(NinoPredictor(load_weights(golden.weights_path), graphs=golden.graphs()), 0)
