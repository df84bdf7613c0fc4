"""The learning rate as a pure function of the step, so that a resumed run needs no more than its step number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sidecast.trainer.settings import require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves between the start and the end of a run."""

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up ``constant`` stays at the peak, ``cosine`` falls over the whole run, and ``wsd`` (warm-up,
    stable, decay) falls in a straight line over the last ``decay_steps``."""
    warmup_steps: int = 0
    """Steps over which the rate rises from near zero to its peak; 0 for none."""
    decay_steps: int | None = None
    """Length of the final decay; ``wsd`` only; None: a fifth of the run."""
    min_ratio: float = 0.0
    """The final rate as a share of the peak; ``cosine`` and ``wsd`` only."""

    def __post_init__(self) -> None:
        require("training.schedule.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        decay = self.decay_steps
        is_for_wsd = decay is None or self.kind == "wsd"
        require("training.schedule.decay_steps", decay, is_for_wsd, f"null, since kind is {self.kind!r} and not 'wsd'")
        require("training.schedule.decay_steps", decay, decay is None or decay >= 1, "1 or more, or null")
        require("training.schedule.min_ratio", self.min_ratio, 0.0 <= self.min_ratio <= 1.0, "0 to 1")


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
    parts = "warmup_steps + decay_steps" if config.kind == "wsd" else "warmup_steps"
    allowed = f"at most the run's training.steps, {num_steps}"
    require(f"training.schedule: {parts}", fixed_steps, fixed_steps <= num_steps, allowed)
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
