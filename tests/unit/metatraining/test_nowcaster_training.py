"""A training goes on bit for bit, keeps its best network, and takes no step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.metatraining import training as training_module
from sidecast.metatraining.networks import last_layer
from sidecast.metatraining.objective import ModelObjective
from sidecast.metatraining.presets import PRESETS
from sidecast.metatraining.recipe import NOWCASTERS, Recipe
from sidecast.metatraining.training import Training, train
from sidecast.metatraining.validation import JudgedWindow, Judgement
from sidecast.metatraining.windows import Window
from tests.support.farm_runs import one_thread
from tests.support.small_trajectories import SOURCE, drifting

MANIFEST = SOURCE.task.model.build().manifest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def judged() -> list[JudgedWindow]:
    """A model whose loss is the distance to where a straight line would be."""
    trajectory = drifting()
    goal = trajectory.states_NP[9].float()

    def loss(params_P: Tensor) -> float:
        return float((params_P - goal).square().mean())

    history = Window(trajectory, 6, 1).history(MANIFEST, 5)
    return [JudgedWindow(history, (1, 3), loss, loss(history.states[-1]))]


def recipe(nowcaster: str, **changes: object) -> Recipe:
    return replace(PRESETS["ci"].recipes[nowcaster], **changes)  # type: ignore[arg-type]


def make(nowcaster: str, **changes: object) -> Training:
    return Training(recipe(nowcaster, **changes), [drifting()], judged())


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
def test_an_interrupted_training_goes_on_bit_for_bit(nowcaster: str, tmp_path: Path) -> None:
    whole = make(nowcaster)
    train(whole, tmp_path / "whole.pt", "digest", silent)

    class KilledError(Exception):
        pass

    def kill(line: str) -> None:
        if "step 6" in line:
            raise KilledError

    path = tmp_path / "cut.pt"
    with pytest.raises(KilledError):
        train(make(nowcaster), path, "digest", kill)
    lines: list[str] = []
    resumed = make(nowcaster)
    train(resumed, path, "digest", lines.append)
    assert lines[0] == f"goes on from step 3 in {path}"
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    assert resumed.best_score == whole.best_score
    assert resumed.best is not None
    assert whole.best is not None
    assert all(torch.equal(tensor, whole.best[name]) for name, tensor in resumed.best.items())


def test_a_state_of_another_recipe_is_not_gone_on_from(tmp_path: Path) -> None:
    path, lines = tmp_path / "state.pt", list[str]()
    train(make("wnn"), path, "one", silent)
    again = make("wnn")
    train(again, path, "another", lines.append)
    assert lines[0] == f"{path} is of another recipe or other trajectories: begins anew"
    assert len(lines) == 4


@pytest.mark.parametrize("nowcaster", ["nino", "wnn_plus"])
def test_no_last_layer_fits_better_than_the_first_one(nowcaster: str) -> None:
    trajectory = drifting(noise=0.02)
    fitted = Training(recipe(nowcaster, num_fit_windows=1), [trajectory], judged())
    fitted._fit_last_layer()

    def loss(factor: float) -> float:
        generator = torch.Generator().manual_seed(6)
        objective, window = fitted._draw(generator)
        layer = last_layer(fitted._recipe.config)  # type: ignore[arg-type]
        changed = {name: tensor * factor if layer in name else tensor for name, tensor in fitted.tensors.items()}
        return objective(changed, window, generator).item()

    # Seed and number of steps decide what it is fitted to: 0 and 6.
    assert loss(1.0) < min(loss(0.9), loss(1.1))
    assert loss(1.0) < 0.9
    assert loss(0.0) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("nowcaster", NOWCASTERS)
def test_straight_lines_are_learned(nowcaster: str) -> None:
    learning = make(nowcaster, num_steps=30, validation_steps=30, peak_lr=1e-2)
    learning.advance(silent)
    # Of the way to the goal, half is made: no change has the score 0.
    nothing = sum(window.newest_loss for window in judged())
    assert learning.best_score < -0.25 * nothing


def test_the_best_network_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([-0.05, -0.1, -0.3, -0.2])
    monkeypatch.setattr(training_module, "judge", lambda predictor, windows: Judgement({}, next(scores)))
    learning = make("wnn", num_steps=9)
    kept = []
    while not learning.is_done:
        learning.advance(silent)
        kept.append({name: tensor.detach().clone() for name, tensor in learning.tensors.items()})
    assert learning.best_score == -0.3
    assert learning.best is not None
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in learning.best.items())


def test_a_loss_that_is_not_finite_costs_a_step_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    learning, lines = make("wnn"), list[str]()
    before = {name: tensor.detach().clone() for name, tensor in learning.tensors.items()}
    # A WNN's last layer is not fitted.
    exact = ModelObjective.__call__
    monkeypatch.setattr(ModelObjective, "__call__", lambda *arguments: exact(*arguments) * math.nan)
    learning.advance(lines.append)
    assert learning.step == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in learning.tensors.items())
    assert lines[-1].endswith(", 3 steps skipped as not finite")


def test_seeds_differ() -> None:
    first, other = make("nino"), make("nino", seed=1)
    assert not torch.equal(first.tensors["edge_proj.fc.0.weight"], other.tensors["edge_proj.fc.0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nowcaster": "nin"}, "nowcaster is 'nin'; allowed: nino, wnn_plus, wnn"),
        ({"layout": "round"}, "layout is 'round'; allowed: official, symmetric"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PRESETS["ci"].recipes["wnn"], **changes)  # type: ignore[arg-type]


def test_held_out_tasks_are_never_trained_on() -> None:
    from sidecast.evaluation.tasks import TASKS

    with pytest.raises(ConfigError, match="task 'english-wide' is held-out"):
        replace(SOURCE, task=TASKS["english-wide"])
    for preset in PRESETS.values():
        assert all(source.task.corpus == "python-source" for source in preset.sources)
        names = [source.name for source in preset.sources]
        assert len(set(names)) == len(names)
        seeds = {
            use: {source.seed for source in preset.sources if source.use == use} for use in ("training", "validation")
        }
        assert not seeds["training"] & seeds["validation"]
