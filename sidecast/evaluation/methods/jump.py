"""Jumps in a farm: predictions of the real predictors, applied with the weight that the hook gives them.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.horizon import horizon_at, resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.policies.jump import jump_weight, remaining_rate
from sidecast.predictors.base import History, ModelPredictor
from sidecast.predictors.registry import create_predictor


class JumpMethod:
    """Implements ``Method``.

    Every period the window's states, equally spaced, make one prediction; it is applied some steps later, and the
    window begins anew. There is no probation: a farm shows what jumps do, harm included.

    Args:
        manifest: The model.
        params_P: Where the run starts.
        predictor: Name of a predictor.
        weights: Its weights file.
        predictor_options: Its options.
        context_len: States in a window; None: the predictor's own, else 5.
        period_steps: Steps between predictions.
        horizon: k, or the first of falling ones, in intervals; 0: the predictor's own.
        horizon_schedule: ``constant`` or ``power``.
        max_steps: Length of the run, for falling horizons.
        max_weight: Share of a prediction that is applied when it is fresh.
        late_steps: Age of a prediction when it is applied.
        max_relative_norm: Predictions that are longer, relative to the weights, are dropped.
        start_step: No prediction is made from a window that ends earlier.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        params_P: Tensor,
        *,
        predictor: str = "linear",
        weights: str | None = None,
        predictor_options: Mapping[str, Any] | None = None,
        context_len: int | None = None,
        period_steps: int = 200,
        horizon: int = 0,
        horizon_schedule: str = "constant",
        max_steps: int = 0,
        max_weight: float = 1.0,
        late_steps: int = 0,
        max_relative_norm: float = 0.5,
        start_step: int = 0,
    ) -> None:
        self._predictor = create_predictor(
            predictor, weights=None if weights is None else Path(weights), options=predictor_options
        )
        length = context_len or self._predictor.context_len or 5
        if period_steps < length or period_steps % length:
            raise ConfigError(f"jump.period_steps is {period_steps}; it must be a multiple of context_len, {length}")
        if not 0 <= late_steps < period_steps:
            raise ConfigError(f"jump.late_steps is {late_steps}; it must be at least 0 and below {period_steps}")
        if isinstance(self._predictor, ModelPredictor):
            self._predictor.prepare(manifest)
        self._manifest = manifest
        self._horizons = resolve_horizons(
            horizon_schedule, horizon, 2.0, max_steps, period_steps, self._predictor.max_horizon
        )
        self._interval_steps = period_steps // length
        self._period_steps = period_steps
        self._max_weight = max_weight
        self._late_steps = late_steps
        self._max_relative_norm = max_relative_norm
        self._start_step = start_step
        self._states: deque[Tensor] = deque(maxlen=length)
        self._rates: deque[float] = deque(maxlen=length)
        self._held: tuple[int, Tensor] | None = None
        self._num_jumps = self._num_dropped = 0

    def after_step(self, step: int, params_P: Tensor, lr: float, loss: float) -> None:
        """See ``Method.after_step``."""
        if step % self._interval_steps == 0 and self._held is None:
            self._states.append(params_P.clone())
            self._rates.append(lr)
            is_full = len(self._states) == self._states.maxlen
            if step % self._period_steps == 0 and is_full and step >= self._start_step:
                self._predict(step)
        if self._held is not None and step - self._held[0] >= self._late_steps:
            self._apply(step, params_P, lr)

    @torch.no_grad()
    def _predict(self, step: int) -> None:
        delta_P = torch.empty_like(self._states[-1])
        horizon = horizon_at(self._horizons, step, self._period_steps)
        self._predictor.predict(History(self._manifest, list(self._states)), horizon, delta_P)
        ratio = float(torch.linalg.vector_norm(delta_P) / torch.linalg.vector_norm(self._states[-1]))
        if ratio <= self._max_relative_norm:
            self._held = (step, delta_P)
        else:
            self._num_dropped += 1
            self._states.clear()

    def _apply(self, step: int, params_P: Tensor, lr: float) -> None:
        assert self._held is not None
        base_step, delta_P = self._held
        horizon_steps = horizon_at(self._horizons, base_step, self._period_steps) * self._interval_steps
        weight = jump_weight(
            step - base_step,
            horizon_steps,
            max_weight=self._max_weight,
            weight_scale=remaining_rate(list(self._rates), lr),
        )
        if weight > 0:
            params_P.add_(delta_P, alpha=weight)
            self._num_jumps += 1
        self._held = None
        self._states.clear()
        self._rates.clear()

    def report(self) -> dict[str, float | int | str]:
        """See ``Method.report``."""
        return {"num_jumps": self._num_jumps, "num_dropped": self._num_dropped}

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {
            "states": list(self._states),
            "rates": list(self._rates),
            "held": self._held,
            "counts": [self._num_jumps, self._num_dropped],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        self._states.clear()
        self._states.extend(state["states"])
        self._rates.clear()
        self._rates.extend(state["rates"])
        self._held = None if state["held"] is None else (int(state["held"][0]), state["held"][1])
        self._num_jumps, self._num_dropped = state["counts"]
