"""Pushes in a farm: the arithmetic of ``sidecast.policies.push``, with the delay that a service would have.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.policies.loss_guard import LossGuard, LossGuardConfig
from sidecast.policies.push import GUARD_LEAD_STEPS, CarriedMotion, PushConfig, age_weight, apply_


class Direction(Protocol):
    """Makes pushes out of a run's own motion."""

    def applied(self, push_P: Tensor, weight: float) -> None:
        """Takes note of ``weight * push_P`` having been added to the run."""
        ...

    def advance(self, state_P: Tensor, *, step: int, lr_sum: float) -> tuple[Tensor, bool] | None:
        """Ends an interval with a snapshot.

        Args:
            state_P: The weights of now, with all that was applied.
            step: Of the snapshot.
            lr_sum: The sum of the learning rates of the interval's steps.

        Returns:
            The push, a vector of its own, and whether the cap has shortened it; None where there is none.
        """
        ...

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        ...


class AverageDirection:
    """Along the average of the own motion; implements ``Direction``.

    Args:
        config: Of the pushes.
        params_P: Where the run starts.
    """

    def __init__(self, config: PushConfig, params_P: Tensor) -> None:
        self._config = config
        self._motion = CarriedMotion(config, params_P.clone(), torch.zeros_like(params_P))

    def applied(self, push_P: Tensor, weight: float) -> None:
        """See ``Direction.applied``."""
        self._motion.applied(push_P, weight)

    def advance(self, state_P: Tensor, *, step: int, lr_sum: float) -> tuple[Tensor, bool] | None:
        """See ``Direction.advance``."""
        factor = self._motion.advance(state_P, step=step, num_steps=self._config.interval_steps, lr_sum=lr_sum)
        return (factor * self._motion.carry_P, factor < self._config.gain * lr_sum) if factor else None

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {"anchor": self._motion.anchor_P, "carry": self._motion.carry_P}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        self._motion.anchor_P.copy_(state["anchor"])
        self._motion.carry_P.copy_(state["carry"])


class DelayedPushes:
    """Applies what a direction makes some steps later, as long as the guard lets it; implements ``Method``.

    Args:
        config: Of the pushes.
        direction: Makes them.
        late_steps: Age of a push when it is applied.
        damped: Whether late pushes are shortened by their age.
        guard: Whether a rise of the loss ends pushing; None: it does not.
    """

    def __init__(
        self, config: PushConfig, direction: Direction, *, late_steps: int, damped: bool, guard: LossGuardConfig | None
    ) -> None:
        if late_steps < 0:
            raise ConfigError(f"push.late_steps is {late_steps}; it must be at least 0")
        self._config = config
        self._direction = direction
        self._late_steps = late_steps
        self._damped = damped
        self._guard = None if guard is None else LossGuard(guard)
        # Of all steps, and of those before the last snapshot: what a trainer and its service know.
        self._lr_sum = self._base_lr_sum = 0.0
        self._in_flight: deque[tuple[int, Tensor]] = deque()
        self._num_pushes = self._num_capped = 0
        self._alarm_step = 0

    def after_step(self, step: int, params_P: Tensor, lr: float, loss: float) -> None:
        """See ``Method.after_step``."""
        self._lr_sum += lr
        # It knows the loss by the time that pushes begin, and nothing of what came long before.
        is_watched = step > self._config.start_step - GUARD_LEAD_STEPS and not self._alarm_step
        if self._guard is not None and is_watched and self._guard.observe(loss):
            self._alarm_step = step
            self._in_flight.clear()
        self._apply_due(step, params_P)
        if self._config.is_snapshot_step(step):
            self._snapshot(step, params_P)
            self._apply_due(step, params_P)

    def _apply_due(self, step: int, params_P: Tensor) -> None:
        while self._in_flight and step - self._in_flight[0][0] >= self._late_steps:
            base_step, push_P = self._in_flight.popleft()
            weight = age_weight(step - base_step, self._config.interval_steps) if self._damped else 1.0
            apply_(params_P, push_P, weight)
            self._direction.applied(push_P, weight)
            self._num_pushes += weight > 0

    def _snapshot(self, step: int, params_P: Tensor) -> None:
        lr_sum, self._base_lr_sum = self._lr_sum - self._base_lr_sum, self._lr_sum
        made = self._direction.advance(params_P, step=step, lr_sum=lr_sum)
        if made is not None and not self._alarm_step:
            push_P, is_capped = made
            self._num_capped += is_capped
            self._in_flight.append((step, push_P))

    def report(self) -> dict[str, float | int | str]:
        """See ``Method.report``."""
        reason = "" if self._guard is None else self._guard.reason
        return {
            "num_pushes": self._num_pushes,
            "num_capped": self._num_capped,
            "alarm_step": self._alarm_step,
            "alarm": reason,
        }

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {
            **self._direction.state(),
            "lr_sums": [self._lr_sum, self._base_lr_sum],
            "in_flight": list(self._in_flight),
            "counts": [self._num_pushes, self._num_capped, self._alarm_step],
            "guard": None if self._guard is None else self._guard.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        self._direction.load(state)
        self._lr_sum, self._base_lr_sum = state["lr_sums"]
        self._in_flight = deque((int(step), push_P) for step, push_P in state["in_flight"])
        self._num_pushes, self._num_capped, self._alarm_step = state["counts"]
        if self._guard is not None:
            self._guard.load(state["guard"])


class PushMethod(DelayedPushes):
    """Pushes as a service makes them: along the average of the own motion.

    Args:
        manifest: The model.
        params_P: Where the run starts.
        interval_steps: K.
        time_constant_steps: Of the average of the run's own motion.
        gain: Length of a push.
        start_step: First step of a snapshot that leads to a push.
        stop_step: First step of a snapshot that leads to none again.
        max_relative_norm: The cap; None for none.
        late_steps: Age of a push when it is applied.
        damped: Whether late pushes are shortened by their age.
        guard: Whether a rise of the loss ends pushing.
        max_relative_rise: See ``LossGuardConfig``.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        params_P: Tensor,
        *,
        interval_steps: int = 20,
        time_constant_steps: float = 100.0,
        gain: float = 1.0,
        start_step: int = 200,
        stop_step: int | None = None,
        max_relative_norm: float | None = 1.0,
        late_steps: int = 10,
        damped: bool = True,
        guard: bool = True,
        max_relative_rise: float = 0.01,
    ) -> None:
        config = PushConfig(
            interval_steps=interval_steps,
            time_constant_steps=time_constant_steps,
            gain=gain,
            start_step=start_step,
            stop_step=stop_step,
            max_relative_norm=max_relative_norm,
        )
        super().__init__(
            config,
            AverageDirection(config, params_P),
            late_steps=late_steps,
            damped=damped,
            guard=LossGuardConfig(max_relative_rise=max_relative_rise) if guard else None,
        )
