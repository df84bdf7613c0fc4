"""The alarm that ends pushing: a running comparison of the loss with the best that it has been."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sidecast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossGuardConfig:
    """When a loss counts as having risen."""

    time_constant_steps: float = 35.0
    """Length of the running mean that is watched."""
    max_relative_rise: float = 0.01
    """A rise of the running mean above its lowest value by less than this is never an alarm."""
    sigmas: float = 6.0
    """Nor is one by less than this many standard deviations of the running mean. In thousands of steps a mean that has
    no trend is once 6 above its lowest value, so that less would be a false alarm in most runs."""
    settle_steps: int = 60
    """No alarm before so many losses have been seen."""

    def __post_init__(self) -> None:
        if not self.time_constant_steps >= 1:
            raise ConfigError(f"guard.time_constant_steps is {self.time_constant_steps}; it must be at least 1")
        for name in ("max_relative_rise", "sigmas", "settle_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"guard.{name} is {getattr(self, name)}; it must be at least 0")


class LossGuard:
    """Watches the losses of a run, in constant memory.

    The mean of the last losses is compared with the lowest mean so far. The noise of a single loss is estimated from
    the differences of neighbours, which a trend or a rise does not inflate. Pushes help little by little and need no
    verdict of their own, so that a false alarm costs what pushes would still have brought, and nothing else.

    Args:
        config: When to raise the alarm.

    Attributes:
        reason: Why the alarm was raised, in one sentence; empty as long as it was not.
    """

    def __init__(self, config: LossGuardConfig) -> None:
        self._config = config
        self.reason = ""
        self._num_losses = 0
        self._last = self._mean = self._variance = 0.0
        self._lowest = math.inf

    @property
    def is_alarmed(self) -> bool:
        """Whether pushing has to end."""
        return bool(self.reason)

    def observe(self, loss: float, num_steps: int = 1) -> bool:
        """Takes note of a loss.

        Args:
            loss: The mean training loss of some steps.
            num_steps: How many steps it is the mean of.

        Returns:
            Whether the alarm is raised, now or since earlier.
        """
        if self.is_alarmed:
            return True
        if not math.isfinite(loss):
            self.reason = f"the loss is {loss}"
            return True
        if self._num_losses == 0:
            self._mean = loss
        else:
            # Early on a plain mean of all losses, so that the first of them does not linger.
            share = max(1.0 - math.exp(-num_steps / self._config.time_constant_steps), 1.0 / (self._num_losses + 1))
            self._mean += share * (loss - self._mean)
            slow = max(share / 4, 1.0 / self._num_losses)
            self._variance += slow * ((loss - self._last) ** 2 / 2 - self._variance)
            if self._num_losses * num_steps >= self._config.settle_steps:
                self._compare(share)
        self._last = loss
        self._num_losses += 1
        return self.is_alarmed

    def _compare(self, share: float) -> None:
        self._lowest = min(self._lowest, self._mean)
        error = math.sqrt(self._variance * share / (2.0 - share))
        rise = self._mean - self._lowest
        if rise > max(self._config.max_relative_rise * abs(self._lowest), self._config.sigmas * error):
            self.reason = (
                f"the mean loss rose from {self._lowest:.4f} to {self._mean:.4f}, standard deviation {error:.4f}"
            )

    def state(self) -> dict[str, float | int | str]:
        """Plain values for a checkpoint."""
        return {
            "reason": self.reason,
            "num_losses": self._num_losses,
            "last": self._last,
            "mean": self._mean,
            "variance": self._variance,
            "lowest": self._lowest,
        }

    def load(self, state: dict[str, float | int | str]) -> None:
        """Goes on from what ``state`` gave."""
        self.reason = str(state["reason"])
        self._num_losses = int(state["num_losses"])
        self._last = float(state["last"])
        self._mean = float(state["mean"])
        self._variance = float(state["variance"])
        self._lowest = float(state["lowest"])
