"""An outer optimizer around the steps of the run's own.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest


class OuterNesterov:
    """An outer optimizer that takes a Nesterov step over every few steps of the inner one.

    Args:
        manifest: The model.
        params_P: Where the run starts.
        interval_steps: K, inner steps in one outer step.
        outer_lr: The outer learning rate.
        momentum: The outer momentum.

    Source: SNOO (arXiv 2510.15830); DiLoCo (arXiv 2311.08105) with one worker.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        params_P: Tensor,
        *,
        interval_steps: int = 30,
        outer_lr: float = 0.7,
        momentum: float = 0.5,
    ) -> None:
        if interval_steps < 1:
            raise ConfigError(f"outer-nesterov: interval_steps is {interval_steps}; it must be at least 1")
        if not 0 <= momentum < 1:
            raise ConfigError(f"outer-nesterov: momentum is {momentum}; it must be at least 0 and below 1")
        if not outer_lr > 0:
            raise ConfigError(f"outer-nesterov: outer_lr is {outer_lr}; it must be above 0")
        self._interval_steps = interval_steps
        self._outer_lr = outer_lr
        self._momentum = momentum
        self._slow_P = params_P.clone()
        self._velocity_P = params_P.new_zeros(params_P.shape)

    def after_step(self, step: int, params_P: Tensor, lr: float, loss: float) -> None:
        """See ``Method.after_step``."""
        if step % self._interval_steps:
            return
        back_P = self._slow_P - params_P
        self._velocity_P.mul_(self._momentum).add_(back_P)
        self._slow_P.sub_(back_P.add_(self._velocity_P, alpha=self._momentum), alpha=self._outer_lr)
        params_P.copy_(self._slow_P)

    def report(self) -> dict[str, float | int | str]:
        """See ``Method.report``."""
        return {}

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {"slow": self._slow_P, "velocity": self._velocity_P}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        self._slow_P.copy_(state["slow"])
        self._velocity_P.copy_(state["velocity"])
