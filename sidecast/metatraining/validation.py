"""Judges nowcasters by the losses of models at the weights that they predict, on runs that they have not seen.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.evaluation.batches import validation_batches
from sidecast.evaluation.gradients import Gradients, mean_losses
from sidecast.manifest import ModelManifest
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.windows import Window, num_horizons
from sidecast.predictors.average import AveragePredictor
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.linear import LinearPredictor
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.graph_cache import GraphCache
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import NinoWeights
from sidecast.predictors.wnn import WnnPredictor, network_from_tensors


@dataclass(frozen=True)
class JudgedWindow:
    """A window of a run, with what it takes to compute the model's loss.

    Attributes:
        history: What predictors are given.
        horizons: That are judged.
        loss: The validation loss of the model with these weights (P,).
        newest_loss: With the newest state of the window.
    """

    history: History
    horizons: Sequence[int]
    loss: Callable[[Tensor], float]
    newest_loss: float


def judged_windows(
    windows: Sequence[Window],
    recipe: Recipe,
    manifest: ModelManifest,
    gradients: Gradients,
    validation_tokens: Tensor,
) -> list[JudgedWindow]:
    """The windows of one model's runs, made ready.

    Args:
        windows: All of one task.
        recipe: Says which horizons are judged.
        manifest: Of the model.
        gradients: Computes its losses.
        validation_tokens: The text that they are computed on.
    """
    judged = []
    for window in windows:
        task = window.trajectory.source.task
        batches = validation_batches(
            validation_tokens, task.num_validation_sequences, task.batch_size, task.sequence_length
        )

        def loss(params_P: Tensor, batches: list[tuple[Tensor, Tensor]] = batches) -> float:
            return mean_losses(gradients, params_P[None].contiguous(), batches)[0]

        history = window.history(manifest, recipe.context_len)
        fitting = num_horizons(window, recipe.max_horizon)
        horizons = [horizon for horizon in recipe.validation_horizons if horizon <= fitting]
        judged.append(JudgedWindow(history, horizons, loss, loss(history.states[-1])))
    return judged


@dataclass(frozen=True)
class Judgement:
    """What came of a predictor's predictions.

    Attributes:
        change_by_horizon: Mean change of the loss from the newest state's, by horizon.
        score: Its mean over all windows and horizons.
    """

    change_by_horizon: Mapping[int, float]
    score: float

    def __str__(self) -> str:
        by_horizon = ", ".join(f"k {horizon}: {change:+.4f}" for horizon, change in self.change_by_horizon.items())
        return f"{self.score:+.4f} ({by_horizon})"


def judge(predictor: Predictor, windows: Sequence[JudgedWindow]) -> Judgement:
    """The loss at predicted weights minus that at the newest state."""
    changes: dict[int, list[float]] = {}
    for window in windows:
        newest_P = window.history.states[-1]
        delta_P = torch.empty_like(newest_P)
        for horizon in window.horizons:
            predictor.predict(window.history, horizon, delta_P)
            changes.setdefault(horizon, []).append(window.loss(newest_P + delta_P) - window.newest_loss)
    everything = [change for each in changes.values() for change in each]
    means = {horizon: sum(each) / len(each) for horizon, each in sorted(changes.items())}
    return Judgement(means, sum(everything) / len(everything))


def reference_predictors() -> dict[str, Predictor]:
    """What a nowcaster has to be better than."""
    return {"mean of the window": AveragePredictor(), "straight line": LinearPredictor()}


def trained_predictor(recipe: Recipe, tensors: Mapping[str, Tensor], graphs: GraphCache) -> Predictor:
    """The product's predictor with these tensors."""
    config = recipe.config
    if not isinstance(config, NinoConfig):
        return WnnPredictor(network_from_tensors("metatrain", tensors))
    weights = NinoWeights(config, tensors, "metatrain")
    return NinoPredictor(weights, graphs=graphs, layout=recipe.layout, num_threads=1)
