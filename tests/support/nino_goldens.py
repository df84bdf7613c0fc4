"""Golden predictions of published NiNo weights, and how closely a predictor must meet them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidecast.graphs import build_topology
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.nino.graph_cache import GraphCache, NeuralGraph
from sidecast.scaling import tensor_scale
from tests.support.golden_models import GOLDEN_NAMES, GoldenCase

__all__ = ["GOLDEN_NAMES", "GoldenPrediction"]

SCALED_TOLERANCE = 2e-5
UNSCALED_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GoldenPrediction:
    """One golden case, ready for a predictor.

    Attributes:
        case: Its files.
        weights_path: The published weights that made it.
        history: Its states.
    """

    case: GoldenCase
    weights_path: Path
    history: History

    @classmethod
    def load(cls, nino_data: Path, name: str) -> GoldenPrediction:
        case = GoldenCase.load(nino_data, name)
        states = [torch.from_numpy(column.copy()) for column in case.arrays["states"].T]
        return cls(case, nino_data / case.description["checkpoint"], History(case.manifest, states))

    def graphs(self) -> GraphCache:
        """The graph with the golden encoding, because the signs and bases of another one may differ."""
        topology = build_topology(self.case.manifest)
        lpe = self.case.arrays.get("lpe")
        graph = NeuralGraph(topology, torch.empty(topology.num_nodes, 0) if lpe is None else torch.from_numpy(lpe))
        # A lambda travels to workers by value: they cannot import this module.
        return GraphCache(lambda manifest, layout, lpe_dim: graph)

    def check(self, predictor: Predictor) -> None:
        """Asserts every stored horizon, scaled and unscaled."""
        newest = self.history.states[-1]
        for horizon in self.case.description["horizons"]:
            delta = torch.full_like(newest, torch.nan)
            predictor.predict(self.history, horizon, delta)
            self._check_horizon(horizon, newest, delta)

    def _check_horizon(self, horizon: int, newest: Tensor, delta: Tensor) -> None:
        unscaled = torch.from_numpy(self.case.arrays[f"prediction_k{horizon}"])
        torch.testing.assert_close(newest + delta, unscaled, rtol=0, atol=UNSCALED_TOLERANCE)
        scaled = torch.from_numpy(self.case.arrays[f"scaled_prediction_k{horizon}"])
        start = 0
        for spec in self.history.manifest.parameters:
            part = slice(start, start := start + spec.numel)
            scale = tensor_scale(self.history.tensor(spec.fqn))
            # Unscaling has no epsilon, so that undoing it this way shows one that was added.
            found = (newest[part].double() + delta[part].double() - scale.mean) / scale.std
            torch.testing.assert_close(found.float(), scaled[part], rtol=0, atol=SCALED_TOLERANCE, msg=spec.fqn)
