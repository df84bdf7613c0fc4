"""Jumps: how much of a rare, far prediction is applied."""

from __future__ import annotations

from collections.abc import Sequence


def jump_weight(
    staleness_steps: int,
    horizon_steps: int,
    *,
    is_aged: bool = True,
    max_weight: float = 1.0,
    weight_scale: float = 1.0,
) -> float:
    """The fraction of a predicted jump that is applied.

    A prediction made at step s for s + h, applied at s + d, repeats d steps that training has made itself. Merged by
    age it falls linearly from ``max_weight`` at d = 0 to nothing at d = h.

    Args:
        staleness_steps: d.
        horizon_steps: h.
        is_aged: Whether the fraction falls with age at all.
        max_weight: The fraction at d = 0.
        weight_scale: What a decaying learning rate leaves, 0 to 1.
    """
    aged = max(0.0, 1.0 - staleness_steps / horizon_steps) if is_aged else 1.0
    return max_weight * aged * weight_scale


def remaining_rate(window_rates: Sequence[float], rate: float) -> float:
    """The part that is left of the highest learning rate of a window's snapshots, 0 to 1.

    Args:
        window_rates: The learning rates at the window's snapshots.
        rate: The learning rate now, which counts among them.
    """
    highest = max([*window_rates, rate])
    return rate / highest if highest > 0 else 1.0
