"""The learning rate as a pure function of the step, so that a resumed run needs no more than its step number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sidecast.errors import ConfigError

KINDS = ("constant", "cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves between the start and the end of a run.

    Attributes:
        kind: ``constant``; ``cosine`` (falls over the whole run after the warm-up); or ``wsd`` (warm-up, stable,
            then a straight decay over the last ``decay_steps``).
        warmup_steps: Steps over which the rate rises from near zero to its peak; 0 for none.
        decay_steps: Length of the final decay; ``wsd`` only, default a fifth of the run.
        min_ratio: The final rate as a share of the peak; ``cosine`` and ``wsd`` only.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"training.schedule.kind is {self.kind!r}; allowed are {', '.join(KINDS)}")
        if self.warmup_steps < 0:
            raise ConfigError(f"training.schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.decay_steps is not None and self.kind != "wsd":
            raise ConfigError(
                f"training.schedule.decay_steps is {self.decay_steps}, but only kind 'wsd' decays at the end; "
                f"kind is {self.kind!r}"
            )
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ConfigError(f"training.schedule.decay_steps is {self.decay_steps}; it must be at least 1")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"training.schedule.min_ratio is {self.min_ratio}; it must lie between 0 and 1")


def lr_ratio(config: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Builds the schedule of a run.

    Args:
        config: The schedule's shape.
        num_steps: Length of the run, in optimizer steps.

    Returns:
        A function from the number of steps already taken to the share of the peak rate that the next one uses.

    Raises:
        ConfigError: Warm-up and decay do not fit into the run.
    """
    decay_steps = config.decay_steps if config.decay_steps is not None else max(1, num_steps // 5)
    fixed_steps = config.warmup_steps + (decay_steps if config.kind == "wsd" else 0)
    if fixed_steps > num_steps:
        parts = "warmup_steps + decay_steps" if config.kind == "wsd" else "warmup_steps"
        raise ConfigError(
            f"training.schedule: {parts} is {fixed_steps}; it must be at most the run's training.steps, {num_steps}"
        )
    decay_start = num_steps - decay_steps if config.kind == "wsd" else config.warmup_steps

    def ratio(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.kind == "constant" or step < decay_start:
            return 1.0
        progress = min(1.0, (step - decay_start) / max(1, num_steps - decay_start))
        fall = 1.0 - progress if config.kind == "wsd" else (1.0 + math.cos(math.pi * progress)) / 2
        return config.min_ratio + (1.0 - config.min_ratio) * fall

    return ratio


def lr_scheduler(config: ScheduleConfig, num_steps: int) -> Callable[[Optimizer], LambdaLR]:
    """The schedule in the form that ``deepspeed.initialize(lr_scheduler=...)`` takes."""
    ratio = lr_ratio(config, num_steps)
    return lambda optimizer: LambdaLR(optimizer, ratio)
