"""One jump: how much of it is applied, and how; the same arithmetic in a run and in its replay.

A predictor extrapolates the way that the weights went during its window. With the optimizers in use a step's length
is proportional to the learning rate, so where the rate has since fallen, the steps that the prediction stands for
would have been shorter by the same factor. That factor, lr now / highest lr at the window's snapshots, is taken
rather than a ratio of areas under the schedule: the schedule ahead is not known here, the rates of the window are,
and the highest of them errs towards the smaller jump.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.partitions import Partition


class LearningRateWindow:
    """The learning rates at the snapshots of one window.

    Args:
        num_snapshots: In a window.
    """

    def __init__(self, num_snapshots: int) -> None:
        self._rates: deque[tuple[float, ...]] = deque(maxlen=num_snapshots)

    def add(self, rates: Sequence[float]) -> None:
        """Takes note of a snapshot's learning rates, one per parameter group."""
        self._rates.append(tuple(rates))

    def remaining(self, rates: Sequence[float]) -> float:
        """The part of the window's highest learning rate that is left, by the group that has least left: 0 to 1.

        Args:
            rates: Now, one per parameter group.
        """
        if not all(math.isfinite(rate) for each in (*self._rates, rates) for rate in each):
            # Nobody knows whether it decays; at the start this is refused.
            return 0.0
        highest = [max(each) for each in zip(*self._rates, rates, strict=False)]
        return min([now / most for now, most in zip(rates, highest, strict=False) if most > 0], default=1.0)

    def state(self) -> list[list[float]]:
        """Plain values for a checkpoint."""
        return [list(rates) for rates in self._rates]

    def load(self, state: Iterable[Sequence[float]]) -> None:
        """Goes on from what ``state`` gave."""
        self._rates.clear()
        self._rates.extend(tuple(rates) for rates in state)


def require_learning_rates(config: NowcasterConfig, partition: Partition) -> None:
    """Refuses an optimizer whose learning rates cannot be seen where something follows them.

    Raises:
        ConfigError: Naming the group, and what is allowed.
    """
    if config.policy == "jump" and config.during_decay == "allow":
        return
    unknown = [index for index, rate in enumerate(partition.learning_rates()) if not math.isfinite(rate)]
    if not unknown:
        return
    optimizer = f"group {unknown[0]} of the optimizer's parameters has no learning rate that is a number"
    if config.policy == "push":
        raise ConfigError(f"nowcaster.policy is 'push', which scales by learning rates, and {optimizer}")
    raise ConfigError(
        f"nowcaster.during_decay is {config.during_decay!r}, and {optimizer}, so that no decay of it could be seen; "
        "allowed: 'allow'"
    )


def jump_weight(staleness_steps: int, horizon_steps: int, config: NowcasterConfig, weight_scale: float) -> float:
    """The fraction of a predicted jump that is applied.

    A prediction made at step s for s + h, applied at s + d, repeats d steps that training has made itself. Merged
    by age it falls linearly from ``max_weight`` at d = 0 to nothing at d = h; ``add`` and ``replace`` ignore d.

    Args:
        staleness_steps: d.
        horizon_steps: h.
        config: Of the run.
        weight_scale: What a decaying learning rate leaves, 0 to 1.
    """
    aged = max(0.0, 1.0 - staleness_steps / horizon_steps) if config.merge == "age_weighted" else 1.0
    return config.max_weight * aged * weight_scale


def merge(
    partition: Partition,
    delta: Tensor,
    weight: float,
    *,
    base: Tensor | None,
    moments: Literal["keep", "reset", "scale"],
) -> None:
    """Moves the weights, and does to the optimizer's moments what is to be done; collective.

    Args:
        partition: What this rank holds.
        delta: Prediction minus base, owned elements in order.
        weight: Factor on ``delta``.
        base: What the jump starts from if it replaces the weights of now; None: it is added to them.
        moments: ``keep``, ``reset``, or ``scale`` the first ones by ``1 - weight``.
    """
    partition.apply(delta, weight, base=base)
    if moments == "reset":
        partition.reset_moments()
    elif moments == "scale":
        partition.scale_momentum(1.0 - weight)
