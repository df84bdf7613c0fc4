"""From a preset to weights files: trajectories first, then one nowcaster after the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError
from sidecast.evaluation.gradients import AutogradGradients, Engine, Gradients
from sidecast.evaluation.native.llama_gradients import native_gradients
from sidecast.metatraining.presets import Preset
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.sources import Source
from sidecast.metatraining.training import Training, train
from sidecast.metatraining.trajectories import Report, TrajectoryStore
from sidecast.metatraining.validation import JudgedWindow, judge, judged_windows, reference_predictors
from sidecast.metatraining.windows import Window, num_horizons
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights, save_weights


def metatrain(preset: Preset, recipes: Sequence[Recipe], store: TrajectoryStore, out: Path, report: Report) -> None:
    """Trains nowcasters; what is interrupted goes on from the last validation at the next call.

    Args:
        preset: Says what trajectories there are.
        recipes: One for each nowcaster.
        store: Of the trajectories.
        out: The folder of ``NOWCASTER.safetensors`` and unfinished states; is made.
        report: Told how far the work is.

    Raises:
        ConfigError: The trajectories take too much room, or one of their runs diverged.
    """
    store.ensure(preset.sources, report)
    out.mkdir(parents=True, exist_ok=True)
    digests = [source.digest(store.corpus(source).digest) for source in preset.sources]
    trajectories = [
        trajectory for source in preset.sources if source.use == "training" for trajectory in store.load(source)
    ]
    for recipe in recipes:
        windows = _validation_windows(preset, recipe, store)
        for name, predictor in reference_predictors().items():
            report(f"{recipe.nowcaster}: to be better than the {name}: loss {judge(predictor, windows)}")
        training = Training(recipe, trajectories, windows)
        train(training, out / f"{recipe.nowcaster}.unfinished.pt", recipe.digest(digests), report)
        _save(recipe, training, out / f"{recipe.nowcaster}.safetensors")
        report(
            f"{recipe.nowcaster}: {out / recipe.nowcaster}.safetensors, change of the loss {training.best_score:+.4f}"
        )


def _validation_windows(preset: Preset, recipe: Recipe, store: TrajectoryStore) -> list[JudgedWindow]:
    judged = []
    for source in preset.sources:
        if source.use == "validation":
            windows = [
                Window(trajectory, newest, spacing)
                for trajectory in store.load(source)
                for newest in recipe.validation_newest
                for spacing in recipe.validation_spacings
            ]
            judged += judged_windows(
                [window for window in windows if num_horizons(window, recipe.max_horizon)],
                recipe,
                source.task.model.build().manifest,
                _gradients(source, store),
                store.corpus(source).validation_tokens,
            )
    if not judged:
        raise ConfigError("no source is for validation; nowcasters cannot be judged")
    return judged


def _gradients(source: Source, store: TrajectoryStore) -> Gradients:
    model = source.task.model.build()
    compiled = native_gradients(model, source.task.sequence_length, store.native)
    return compiled or AutogradGradients(model, Engine())


def _save(recipe: Recipe, training: Training, path: Path) -> None:
    assert training.best is not None
    tensors = {name: tensor.contiguous() for name, tensor in training.best.items()}
    config = recipe.config
    with replacing(path) as partial:
        if isinstance(config, NinoConfig):
            save_weights(partial, NinoWeights(config, tensors, recipe.nowcaster, layout=recipe.layout))
        else:
            save_file(tensors, partial, metadata={"sidecast.wnn": json.dumps(asdict(config))})
