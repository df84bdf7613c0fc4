"""Pushes: small, frequent additions along a long average of the run's own motion.

Between two snapshots a run moves by its optimizer's steps and by the pushes that were applied to it. Its *own motion*
is what is left without the pushes. Per unit of learning rate it is averaged over many snapshots (the *carry*), and
every interval a push goes a little further along that average. An average over many intervals hardly turns while a
push is on its way, so that a late push is as good as a punctual one.

Everything here works element by element, on a whole vector or on any part of it, but the two norms of the cap, whose
squares add up over parts.

Shape suffix: P elements of the parameter vector, or of a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.errors import ConfigError

GUARD_LEAD_STEPS = 100
"""Steps before the first push from which on the guard sees losses: what came long before says nothing of a trend."""
CONTEXT_LEN = 2
"""States that a push is made from: those before and after an interval."""
DAMPED_FROM_INTERVALS = 0.5
DROPPED_FROM_INTERVALS = 2.0
# A few of them fit a core's cache; large enough to hide the cost of a call.
_PIECE_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of the pushes of one run; steps are optimizer steps."""

    interval_steps: int = 20
    """K, the steps between two snapshots, and so between two pushes."""
    time_constant_steps: float = 100.0
    """How long the average of the own motion is; a time constant of T steps is a momentum of exp(-K / T)."""
    gain: float = 1.0
    """Length of a push in units of the averaged own motion of one interval: 1 doubles the steady speed."""
    start_step: int = 200
    """No push is made from a snapshot before this step: what a run does in its warm-up says little of its way."""
    stop_step: int | None = None
    """No push is made from a snapshot at or after this step; None: pushes go on to the end."""
    max_relative_norm: float | None = 1.0
    """Largest ||push|| / ||own motion of the interval||; longer pushes are shortened to it. None: no cap. With a gain
    of 1 few are half as long as that; a gain that is far too large does no harm at a cap of 1, and some at 2."""

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ConfigError(f"push.interval_steps is {self.interval_steps}; it must be at least 1")
        if not (math.isfinite(self.time_constant_steps) and self.time_constant_steps > 0):
            raise ConfigError(f"push.time_constant_steps is {self.time_constant_steps}; it must be above 0 and finite")
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise ConfigError(f"push.gain is {self.gain}; it must be at least 0 and finite")
        if self.start_step < 0:
            raise ConfigError(f"push.start_step is {self.start_step}; it must be at least 0")
        if self.stop_step is not None and self.stop_step < self.start_step:
            raise ConfigError(f"push.stop_step is {self.stop_step}; it must be at least start_step, {self.start_step}")
        if self.max_relative_norm is not None and not self.max_relative_norm > 0:
            raise ConfigError(f"push.max_relative_norm is {self.max_relative_norm}; it must be above 0, or null")

    def momentum(self, num_steps: int) -> float:
        """The share of the carry that is kept over so many steps."""
        return math.exp(-num_steps / self.time_constant_steps)

    def is_snapshot_step(self, step: int) -> bool:
        """Whether a snapshot is taken after this many steps."""
        return step % self.interval_steps == 0

    def is_active(self, step: int) -> bool:
        """Whether a snapshot of this step may lead to a push."""
        return self.gain > 0 and step >= self.start_step and (self.stop_step is None or step < self.stop_step)


@torch.no_grad()
def average_interval_(
    config: PushConfig,
    carry_P: Tensor,
    before_P: Tensor,
    after_P: Tensor,
    *,
    step: int,
    num_steps: int,
    lr_sum: float,
    applied_P: Tensor | None = None,
    weight: float = 0.0,
    over_before: bool = False,
) -> float | None:
    """Averages the own motion of one interval into the carry, and says which multiple of it is to be pushed.

    Args:
        config: Settings of the run.
        carry_P: The average; the new one takes its place.
        before_P: State at the interval's beginning.
        after_P: State at its end.
        step: Of that.
        num_steps: Of the interval; more than one of the settings where a snapshot was lost, and fewer where it began
            in between.
        lr_sum: The sum of the learning rates of those steps.
        applied_P: What was added within it; None for nothing, or for what is in ``before_P``.
        weight: Factor of that.
        over_before: Whether the new average is to take the place of ``before_P`` instead, and ``carry_P`` to stay.

    Returns:
        The factor; 0 where there is nothing to push. None if the carry is not finite any more, and to be thrown away.
    """
    momentum = config.momentum(num_steps)
    carry_norm, own_norm = _fold_pieces_(
        carry_P, before_P, after_P, applied_P, weight, lr_sum, momentum, over_before=over_before
    )
    if not math.isfinite(carry_norm):
        return None
    # A push is worth one interval, also after one that was longer.
    share = config.interval_steps / num_steps
    return push_factor(config, step, share * lr_sum, carry_norm, share * own_norm)


def _fold_pieces_(
    carry_P: Tensor,
    before_P: Tensor,
    after_P: Tensor,
    applied_P: Tensor | None,
    weight: float,
    lr_sum: float,
    momentum: float,
    *,
    over_before: bool,
) -> tuple[float, float]:
    """Folds piece by piece; returns the Euclidean norms of the whole carry and of the whole own motion."""
    carry_square = own_square = 0.0
    for piece in _pieces(carry_P):
        anchor_P = before_P[piece]
        if applied_P is not None and weight != 0.0:
            anchor_P = anchor_P + applied_P[piece] * weight
        own_P = after_P[piece] - anchor_P
        average_P = carry_P[piece].clone() if over_before else carry_P[piece]
        fold_(average_P, own_P, lr_sum, momentum)
        if over_before:
            before_P[piece] = average_P
        carry_square += float(torch.linalg.vector_norm(average_P)) ** 2
        own_square += float(torch.linalg.vector_norm(own_P)) ** 2
    return math.sqrt(carry_square), math.sqrt(own_square)


def _pieces(vector_P: Tensor) -> Iterator[slice]:
    return (slice(start, start + _PIECE_ELEMENTS) for start in range(0, len(vector_P), _PIECE_ELEMENTS))


class CarriedMotion:
    """A run's own motion and its average, where one process sees all of the run: two vectors, and no other in between.

    Args:
        config: Settings of the run.
        anchor_P: Where the run starts.
        carry_P: Zeros. Both are kept, and written to.

    Attributes:
        anchor_P: The last state plus everything that has been applied since: where the run would be had its optimizer
            stood still. What a new state differs from it by is the run's own motion, whatever was applied and whenever.
        carry_P: The average.
    """

    def __init__(self, config: PushConfig, anchor_P: Tensor, carry_P: Tensor) -> None:
        self.anchor_P = anchor_P
        self.carry_P = carry_P
        self._config = config

    def applied(self, push_P: Tensor, weight: float) -> None:
        """Takes note of ``weight * push_P`` having been added to the run, as by ``apply_``."""
        apply_(self.anchor_P, push_P, weight)

    def advance(self, state_P: Tensor, *, step: int, num_steps: int, lr_sum: float) -> float | None:
        """Ends an interval with a snapshot, which begins the next one; see ``average_interval_``."""
        factor = average_interval_(
            self._config, self.carry_P, self.anchor_P, state_P, step=step, num_steps=num_steps, lr_sum=lr_sum
        )
        self.anchor_P.copy_(state_P)
        return factor


def fold_(carry_P: Tensor, own_P: Tensor, lr_sum: float, momentum: float) -> None:
    """Averages one interval's own motion per unit of learning rate into the carry, in place.

    An interval whose learning rate was 0 throughout says nothing and changes nothing.

    Args:
        carry_P: The average, which starts from zeros.
        own_P: The interval's own motion.
        lr_sum: The sum of the learning rates of its steps.
        momentum: The share of the carry that is kept.
    """
    if lr_sum > 0.0:
        carry_P.mul_(momentum).add_(own_P, alpha=(1.0 - momentum) / lr_sum)


def push_factor(config: PushConfig, step: int, lr_sum: float, carry_norm: float, own_norm: float) -> float:
    """What the carry is multiplied with to make a push.

    Args:
        config: Settings of the run.
        step: Of the snapshot.
        lr_sum: The sum of the learning rates of the interval that ends there.
        carry_norm: Euclidean norm of the whole carry.
        own_norm: Euclidean norm of the whole own motion of that interval.

    Returns:
        The factor; 0 where there is nothing to push.
    """
    if not config.is_active(step):
        return 0.0
    factor = config.gain * lr_sum
    if not (math.isfinite(carry_norm) and math.isfinite(own_norm) and factor > 0.0):
        return 0.0
    if config.max_relative_norm is not None and factor * carry_norm > config.max_relative_norm * own_norm:
        factor = config.max_relative_norm * own_norm / carry_norm
    return factor


def age_weight(age_steps: int, interval_steps: int) -> float:
    """The part of a push that is applied by its age: all of it up to half an interval, nothing from two intervals on.

    Args:
        age_steps: Steps from its snapshot to its application.
        interval_steps: K.
    """
    full, none = DAMPED_FROM_INTERVALS * interval_steps, DROPPED_FROM_INTERVALS * interval_steps
    return min(1.0, max(0.0, (none - age_steps) / (none - full)))


def apply_(params_P: Tensor, push_P: Tensor, weight: float) -> None:
    """Adds a push to the weights in place; a weight of 0 leaves every bit alone."""
    if weight != 0.0:
        for piece in _pieces(params_P):
            # Product and sum are rounded one after the other, as in a trainer's partition: the same bits everywhere.
            params_P[piece].add_(push_P[piece] * weight)
