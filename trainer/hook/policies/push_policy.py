"""Pushes: small and frequent, none of them judged alone; a rise of the loss ends them all."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sidecast.policies.loss_guard import LossGuard, LossGuardConfig
from sidecast.policies.push import GUARD_LEAD_STEPS, PushConfig, age_weight
from sidecast.trainer.hook.reporting import Reporter
from sidecast.trainer.partitions import Partition
from sidecast.trainer.pipe.messages import Applied, Prediction

log = logging.getLogger(__name__)


class PushPolicy:
    """Implements ``Policy``.

    Args:
        config: Of the pushes.
        partition: Whose learning rates scale them.
        reporter: Is told when they end.
    """

    merge = "add"
    moments = "keep"
    is_on_probation = False

    def __init__(
        self, config: PushConfig, partition: Partition, reporter: Reporter, *, has_read_outs: bool = False
    ) -> None:
        self.last_loss: float | None = None
        self.learning_rate_sum = 0.0
        self.applied: Applied | None = None
        self._config = config
        self._partition = partition
        self._reporter = reporter
        self._has_read_outs = has_read_outs
        self._guard = LossGuard(LossGuardConfig())
        self._last_loss_step = 0
        self._are_losses_gone = False
        self._is_warned = False

    @property
    def is_suspended(self) -> bool:
        return self._guard.is_alarmed

    @property
    def allows(self) -> bool:
        return not self.is_suspended and not self._is_blind

    @property
    def _is_blind(self) -> bool:
        # Without losses, or without any more of them, there is no guard.
        return self.last_loss is None or self._are_losses_gone

    @property
    def wants_snapshots(self) -> bool:
        return self._has_read_outs or not self.is_suspended

    def end_probation(self) -> None:
        """Nothing: no push is ever on probation."""

    def after_step(self) -> None:
        # Groups mostly share one schedule; what differs between them by a constant factor is in the average itself.
        rates = [rate for rate in self._partition.learning_rates() if math.isfinite(rate)]
        self.learning_rate_sum += sum(rates) / max(1, len(rates))

    def at_snapshot(self, step: int) -> None:
        is_blind = self._config.is_active(step) and self._is_blind and not self.is_suspended
        if is_blind and not self._is_warned:
            log.warning(
                "no push is applied as long as no loss is seen, since nothing would end pushes that harm: call "
                "observe(loss) with the mean loss of each micro-batch"
            )
        self._is_warned |= is_blind

    def is_due(self, step: int) -> bool:
        return self.allows and self._config.is_active(step)

    def weight_scale(self) -> float:
        # The service has scaled the push by the learning rates of the interval before it.
        return 1.0

    def weight(self, held: Prediction, step: int, weight_scale: float) -> float:
        if not self.allows:
            # The vote that brought the alarm, or no loss any more, may have brought a push, too.
            return 0.0
        return age_weight(step - held.base_step, self._config.interval_steps)

    def on_applied(self, held: Prediction, weight: float, step: int) -> None:
        self.applied = Applied(version=held.version, weight=weight)

    def on_loss(self, loss_step: int, mean_loss: float | None) -> None:
        if mean_loss is None:
            self._are_losses_gone = loss_step - self._last_loss_step > self._config.interval_steps
            return
        self._are_losses_gone = False
        self.last_loss = mean_loss
        num_steps, self._last_loss_step = max(1, loss_step - self._last_loss_step), loss_step
        if self._config.gain == 0:
            # Nothing is pushed, and snapshots serve the read-outs, whatever the loss does.
            return
        if self.is_suspended or loss_step <= self._config.start_step - GUARD_LEAD_STEPS:
            return
        if self._guard.observe(mean_loss, num_steps):
            log.warning("no more pushes for the rest of the run: %s", self._guard.reason)
            self._reporter.emit("suspended", reason=self._guard.reason)

    def state(self) -> dict[str, Any]:
        applied = None if self.applied is None else asdict(self.applied)
        return {
            "push": {
                "learning_rate_sum": self.learning_rate_sum,
                "applied": applied,
                "guard": self._guard.state(),
                "last_loss": self.last_loss,
                "last_loss_step": self._last_loss_step,
            }
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        self._guard = LossGuard(LossGuardConfig())
        self._are_losses_gone = False
        own = None if state is None else state.get("push")
        if state is not None and own is None:
            log.warning("the checkpoint is of a run with jumps; pushes begin anew")
        self.last_loss = None if own is None else own["last_loss"]
        self.learning_rate_sum = 0.0 if own is None else own["learning_rate_sum"]
        self.applied = None if own is None or own["applied"] is None else Applied(**own["applied"])
        self._last_loss_step = 0 if own is None else own["last_loss_step"]
        if own is not None and self._config.gain != 0:
            self._guard.load(own["guard"])
