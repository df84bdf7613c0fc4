"""Everything that decides what a nowcaster becomes, besides its trajectories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sidecast.errors import ConfigError
from sidecast.graphs.registry import LAYOUTS
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.wnn import WnnConfig

NOWCASTERS = ("nino", "wnn_plus", "wnn")
FORMAT = 1
"""Counts changes of what training does with a recipe."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one nowcaster is trained.

    Attributes:
        nowcaster: One of ``NOWCASTERS``.
        layout: Of the graph: ``official`` or ``symmetric``; also names the edge types that WNN+ sees.
        hidden_dim: D.
        context_len: C, states that it reads.
        max_horizon: K, the largest horizon in intervals.
        num_steps: Optimizer steps.
        peak_lr: Learning rate after warm-up; it falls along a cosine to zero.
        warmup_steps: Steps over which it rises.
        weight_decay: Decoupled.
        max_grad_norm: Gradients are shortened to this norm.
        num_fit_windows: Windows that the last layer is fitted to before the first step; 0: it begins at zero, as that
            of a WNN always does.
        windows_per_step: Windows whose mean loss makes one step.
        num_sources: Edges of each target in each dense block that enter a step.
        spacings: Snapshots between two states of a window; each window has one of these.
        first_snapshot: Oldest snapshot that a window may begin with: before it, warm-up moves the weights.
        validation_steps: Steps between two validations.
        validation_spacings: As ``spacings``, of the windows that are validated.
        validation_newest: Newest snapshots of the windows that are validated.
        validation_horizons: Horizons that are validated.
        seed: Decides the initial network and all that is drawn.
    """

    nowcaster: str
    layout: str = "symmetric"
    hidden_dim: int = 32
    context_len: int = 5
    max_horizon: int = 10
    num_steps: int
    peak_lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    num_fit_windows: int = 64
    windows_per_step: int = 2
    num_sources: int = 8
    spacings: tuple[int, ...] = (1, 2, 4)
    first_snapshot: int = 5
    validation_steps: int
    validation_spacings: tuple[int, ...] = (2, 4)
    validation_newest: tuple[int, ...] = (24, 40)
    validation_horizons: tuple[int, ...] = (1, 3, 10)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nowcaster not in NOWCASTERS:
            raise ConfigError(f"nowcaster is {self.nowcaster!r}; allowed: {', '.join(NOWCASTERS)}")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; allowed: {', '.join(LAYOUTS)}")
        for name in ("num_steps", "windows_per_step", "num_sources", "validation_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")

    @property
    def config(self) -> NinoConfig | WnnConfig:
        """The hyper-parameters of the network. Kernels have one element: the farm trains no convolutions."""
        if self.nowcaster == "wnn":
            return WnnConfig(context_len=self.context_len, max_horizon=self.max_horizon, hidden_dim=self.hidden_dim)
        return NinoConfig(
            gnn=self.nowcaster == "nino",
            context_len=self.context_len,
            max_horizon=self.max_horizon,
            hidden_dim=self.hidden_dim,
            max_kernel_elements=1,
        )

    def digest(self, trajectories: Sequence[str]) -> str:
        """Equal if and only if the nowcasters are the same, up to round-off.

        Args:
            trajectories: Digests of the sources.
        """
        text = json.dumps([FORMAT, asdict(self), list(trajectories)], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
