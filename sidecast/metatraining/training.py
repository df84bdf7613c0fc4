"""Trains one nowcaster, and keeps the network that was best on the validation runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.atomic_files import replacing
from sidecast.metatraining.networks import initial_tensors, last_layer
from sidecast.metatraining.objective import ModelObjective
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.trajectories import Report, Trajectory
from sidecast.metatraining.validation import JudgedWindow, judge, trained_predictor
from sidecast.metatraining.windows import Window, draw_window
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.graph_cache import GraphCache

_MAX_SEED = 1 << 32
_RIDGE = 1e-6
"""By how much the squares of each hidden feature count for more than they are: features are nearly dependent."""


class Training:
    """The training of one nowcaster; may be stopped after any step, and taken up from its state bit for bit.

    Args:
        recipe: How.
        trajectories: To learn from.
        windows: To judge by.

    Attributes:
        step: Steps taken.
        tensors: The network of now.
        best: The best network so far; None before the first validation.
        best_score: Its mean change of the loss.
    """

    def __init__(self, recipe: Recipe, trajectories: Sequence[Trajectory], windows: Sequence[JudgedWindow]) -> None:
        self.step = 0
        self.best: Mapping[str, Tensor] | None = None
        self.best_score = math.inf
        self._recipe = recipe
        self._trajectories = trajectories
        self._windows = windows
        self._objectives: dict[str, ModelObjective] = {}
        self._graphs = GraphCache()
        self.tensors = initial_tensors(recipe.config, torch.Generator().manual_seed(recipe.seed))
        for tensor in self.tensors.values():
            tensor.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            self.tensors.values(), lr=recipe.peak_lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        self._losses: list[float] = []
        self._num_skipped = 0

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self._recipe.num_steps

    def advance(self, report: Report) -> None:
        """Takes the steps up to the next validation, and validates; the first call does so beforehand, too."""
        if self.step == 0:
            self._fit_last_layer()
            self._validate(report)
        interval = self._recipe.validation_steps
        stop = min(self._recipe.num_steps, (self.step // interval + 1) * interval)
        while self.step < stop:
            self._take_step()
        self._validate(report)

    def _take_step(self) -> None:
        recipe = self._recipe
        # Decided by the step alone, so that taking up a training needs no state of a generator.
        generator = torch.Generator().manual_seed(recipe.seed * _MAX_SEED + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr()
        self._optimizer.zero_grad()
        total = 0.0
        for _ in range(recipe.windows_per_step):
            objective, window = self._draw(generator)
            loss = objective(self.tensors, window, generator) / recipe.windows_per_step
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.tensors.values(), recipe.max_grad_norm)
        if math.isfinite(total) and norm.isfinite():
            self._optimizer.step()
            self._losses.append(total)
        else:
            self._num_skipped += 1
        self.step += 1

    def _fit_last_layer(self) -> None:
        """Gives the last layer the weights that are best for the others, which are random: a least squares problem."""
        config = self._recipe.config
        if not isinstance(config, NinoConfig) or not self._recipe.num_fit_windows:
            return
        generator = torch.Generator().manual_seed(self._recipe.seed * _MAX_SEED + self._recipe.num_steps)
        squares_KII, products_KI = torch.zeros(2, dtype=torch.float64)
        for _ in range(self._recipe.num_fit_windows):
            objective, window = self._draw(generator)
            squares, products = objective.normal_equations(self.tensors, window, generator)
            squares_KII, products_KI = squares_KII + squares, products_KI + products
        squares_KII.diagonal(dim1=1, dim2=2).mul_(1.0 + _RIDGE)
        solution_KI = torch.linalg.solve(squares_KII, products_KI).float()
        layer = last_layer(config)
        with torch.no_grad():
            self.tensors[f"{layer}.weight"].copy_(solution_KI[:, :-1])
            self.tensors[f"{layer}.bias"].copy_(solution_KI[:, -1])

    def _draw(self, generator: torch.Generator) -> tuple[ModelObjective, Window]:
        recipe = self._recipe
        window = draw_window(self._trajectories, recipe.spacings, recipe.context_len, recipe.first_snapshot, generator)
        task = window.trajectory.source.task
        if task.name not in self._objectives:
            self._objectives[task.name] = ModelObjective(task, recipe)
        return self._objectives[task.name], window

    def _lr(self) -> float:
        recipe = self._recipe
        warm = min(1.0, (self.step + 1) / max(1, recipe.warmup_steps))
        return recipe.peak_lr * warm * (1 + math.cos(math.pi * self.step / recipe.num_steps)) / 2

    def _validate(self, report: Report) -> None:
        network = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        judgement = judge(trained_predictor(self._recipe, network, self._graphs), self._windows)
        is_best = judgement.score < self.best_score
        if is_best:
            self.best, self.best_score = network, judgement.score
        error = f", relative error {sum(self._losses) / len(self._losses):.4f}" if self._losses else ""
        self._losses.clear()
        skipped = f", {self._num_skipped} steps skipped as not finite" if self._num_skipped else ""
        report(
            f"{self._recipe.nowcaster}: step {self.step} of {self._recipe.num_steps}{error}, "
            f"loss {judgement}{' best' if is_best else ''}{skipped}"
        )

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which a training goes on bit for bit; between validations only."""
        return {
            "step": self.step,
            "tensors": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "optimizer": self._optimizer.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "num_skipped": self._num_skipped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        self.step = int(state["step"])
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state["tensors"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_score = state["best"], state["best_score"]
        self._num_skipped = state["num_skipped"]


def train(training: Training, state_path: Path, digest: str, report: Report) -> None:
    """Trains to the end, saving the state after each validation.

    Args:
        training: A new one; goes on from the file's state if that is of the same recipe and trajectories.
        state_path: The file; its folder exists.
        digest: Names recipe and trajectories.
        report: Told how far it is.
    """
    if state_path.is_file():
        saved = torch.load(state_path, weights_only=True)
        if saved["digest"] == digest:
            training.load(saved["state"])
            report(f"goes on from step {training.step} in {state_path}")
        else:
            report(f"{state_path} is of another recipe or other trajectories: begins anew")
    while not training.is_done:
        training.advance(report)
        with replacing(state_path) as partial:
            torch.save({"digest": digest, "state": training.state()}, partial)
