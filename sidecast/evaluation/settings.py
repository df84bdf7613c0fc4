"""What one member of a farm is: everything that its result depends on, and a name that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sidecast.errors import ConfigError
from sidecast.evaluation.schedules import Schedule

FORMAT = 1
"""Counts changes of the farm's arithmetic: results of different formats are never compared."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer and its hyper-parameters."""

    name: str = "adamw"
    """One of ``optimizers.OPTIMIZERS``."""
    lr: float = 4e-3
    """Peak learning rate."""
    b1: float = 0.9
    """Time constant of the first moment; the momentum of optimizers that have but one."""
    b2: float = 0.95
    """Time constant of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled, multiplied by the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are shortened to this norm; 0: they are not."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of a library's optimizer."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("eps", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What is done to a run besides its optimizer's steps."""

    name: str = "none"
    """One of ``methods.METHODS``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method."""


@dataclass(frozen=True, kw_only=True)
class MemberSettings:
    """One run. Members of one task and seed see the same data and start from the same weights."""

    task: str
    """Name of the recipe."""
    arm: str
    """What the run is called in tables: its method and optimizer, without what is tuned."""
    seed: int
    """Decides the initial weights and the order of the data."""
    num_steps: int
    """Length of the run in optimizer steps."""
    schedule: Schedule = field(default_factory=Schedule)
    """Of the learning rate."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """Its optimizer."""
    method: MethodSettings = field(default_factory=MethodSettings)
    """Its method."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"steps is {self.num_steps}; it must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")
        if self.schedule.warmup_steps > self.num_steps:
            raise ConfigError(
                f"warmup_steps is {self.schedule.warmup_steps}; it must be at most the length of the run, "
                f"{self.num_steps} steps"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MemberSettings:
        """What ``to_json`` gave."""
        parts = {
            "schedule": Schedule(**values["schedule"]),
            "optimizer": OptimizerSettings(**values["optimizer"]),
            "method": MethodSettings(**values["method"]),
        }
        return cls(**{**values, **parts})

    def with_seed(self, seed: int) -> MemberSettings:
        """The same run from other weights on other data."""
        return replace(self, seed=seed)

    def key(self, task_digest: str) -> str:
        """A name for the run's result.

        The arm's own name is not part of it: two arms that agree in everything share their runs.

        Args:
            task_digest: Of the task's recipe and data.
        """
        values = self.to_json()
        del values["arm"]
        text = json.dumps([FORMAT, task_digest, values], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
