"""Pushes in a farm along what a predictor expects, in place of the average of the own motion.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.evaluation.methods.push import DelayedPushes
from sidecast.manifest import ModelManifest
from sidecast.policies.loss_guard import LossGuardConfig
from sidecast.policies.push import PushConfig, apply_, push_factor
from sidecast.predictors.base import History, ModelPredictor, Predictor, check_context_len
from sidecast.predictors.registry import create_predictor


class PredictedDirection:
    """Along a predictor's change; implements ``Direction``.

    The predictor sees the way that led to the weights of now, as it would have been without what was applied.

    Args:
        config: Of the pushes.
        manifest: The model.
        params_P: Where the run starts.
        predictor: Made for the model.
        context_len: C, states that it sees.
        spacing: Intervals between two of them.
        horizon: For which it is asked, in units of the spacing; a push is the part of it that falls to one interval.
    """

    def __init__(
        self,
        config: PushConfig,
        manifest: ModelManifest,
        params_P: Tensor,
        predictor: Predictor,
        *,
        context_len: int,
        spacing: int,
        horizon: int,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._predictor = predictor
        self._spacing = spacing
        self._horizon = horizon
        # The last state plus everything that has been applied since.
        self._anchor_P = params_P.clone()
        self._own: deque[Tensor] = deque(maxlen=(context_len - 1) * spacing)
        self._lr_sums: deque[float] = deque(maxlen=self._own.maxlen)

    def applied(self, push_P: Tensor, weight: float) -> None:
        """See ``Direction.applied``."""
        apply_(self._anchor_P, push_P, weight)

    @torch.no_grad()
    def advance(self, state_P: Tensor, *, step: int, lr_sum: float) -> tuple[Tensor, bool] | None:
        """See ``Direction.advance``."""
        self._own.append(state_P - self._anchor_P)
        self._lr_sums.append(lr_sum)
        self._anchor_P.copy_(state_P)
        mean_lr_sum = sum(self._lr_sums) / len(self._lr_sums)
        if len(self._own) < (self._own.maxlen or 0) or not self._config.is_active(step) or mean_lr_sum == 0.0:
            return None
        delta_P = torch.empty_like(state_P)
        self._predictor.predict(History(self._manifest, self._way_to(state_P)), self._horizon, delta_P)
        # Per unit of the learning rate, as the average is: steps get shorter as it decays.
        delta_P /= self._horizon * self._spacing * mean_lr_sum
        norms = (float(torch.linalg.vector_norm(each)) for each in (delta_P, self._own[-1]))
        factor = push_factor(self._config, step, lr_sum, *norms)
        return (delta_P.mul_(factor), factor < self._config.gain * lr_sum) if factor else None

    def _way_to(self, state_P: Tensor) -> Sequence[Tensor]:
        """C states, the last of them the weights of now."""
        states = [state_P.clone()]
        steps_back = list(self._own)[::-1]
        for start in range(0, len(steps_back), self._spacing):
            states.append(states[-1] - torch.stack(steps_back[start : start + self._spacing]).sum(0))
        return states[::-1]

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {"anchor": self._anchor_P, "own": list(self._own), "own_lr_sums": list(self._lr_sums)}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""
        self._anchor_P.copy_(state["anchor"])
        self._own.extend(state["own"])
        self._lr_sums.extend(state["own_lr_sums"])


class PredictedPushMethod(DelayedPushes):
    """Pushes along what a predictor expects; implements ``Method``.

    Args:
        manifest: The model.
        params_P: Where the run starts.
        predictor: Name of a predictor.
        weights: Its weights file.
        context_len: States that it sees; None: its own, else 5.
        spacing: Intervals between two of them.
        horizon: For which it is asked, in units of the spacing.
        interval_steps: K.
        gain: Length of a push: 1 is what the predictor expects of one interval.
        start_step: First step of a snapshot that leads to a push.
        stop_step: First step of a snapshot that leads to none again.
        max_relative_norm: The cap; None for none.
        late_steps: Age of a push when it is applied.
        guard: Whether a rise of the loss ends pushing.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        params_P: Tensor,
        *,
        predictor: str = "linear",
        weights: str | None = None,
        context_len: int | None = None,
        spacing: int = 1,
        horizon: int = 1,
        interval_steps: int = 20,
        gain: float = 1.0,
        start_step: int = 200,
        stop_step: int | None = None,
        max_relative_norm: float | None = 1.0,
        late_steps: int = 10,
        guard: bool = True,
    ) -> None:
        config = PushConfig(
            interval_steps=interval_steps,
            gain=gain,
            start_step=start_step,
            stop_step=stop_step,
            max_relative_norm=max_relative_norm,
        )
        made = create_predictor(predictor, weights=None if weights is None else Path(weights))
        length = context_len or made.context_len or 5
        check_context_len(made, length)
        for name, value in (("spacing", spacing), ("horizon", horizon)):
            if value < 1:
                raise ConfigError(f"push.{name} is {value}; it must be at least 1")
        if isinstance(made, ModelPredictor):
            made.prepare(manifest)
        direction = PredictedDirection(
            config, manifest, params_P, made, context_len=length, spacing=spacing, horizon=horizon
        )
        super().__init__(
            config,
            direction,
            late_steps=late_steps,
            damped=True,
            guard=LossGuardConfig() if guard else None,
        )
