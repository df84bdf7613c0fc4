"""How far ahead each nowcast of a run looks."""

from __future__ import annotations

from collections.abc import Sequence

from sidecast.errors import ConfigError

# Beyond these the schedule is a constant or a cliff in all but name, and its terms leave the range of a float.
MIN_POWER = 0.05
MAX_POWER = 50.0


def horizon_schedule(num_nowcasts: int, max_horizon: int, power: float = 2.0) -> tuple[int, ...]:
    """The horizon of every nowcast of a run, falling from ``max_horizon`` to 1.

    Args:
        num_nowcasts: n, how many nowcasts the run makes; at least 1.
        max_horizon: K, the first horizon, in snapshot intervals; at least 1.
        power: p, how fast the horizon falls.

    Returns:
        n horizons in snapshot intervals: ``round(linspace(K ** (1 / p), 1, n) ** p)``.

    Source: NiNo (arXiv 2409.04434), section 4.2 and the published training loop.
    """
    if num_nowcasts < 1:
        raise ConfigError(f"num_nowcasts is {num_nowcasts}; it must be at least 1")
    if max_horizon < 1:
        raise ConfigError(f"max_horizon is {max_horizon}; it must be at least 1 snapshot interval")
    if not MIN_POWER <= power <= MAX_POWER:
        raise ConfigError(f"horizon power is {power}; allowed: {MIN_POWER} to {MAX_POWER}")
    if num_nowcasts == 1:
        return (max_horizon,)
    start = max_horizon ** (1.0 / power)
    step = (1.0 - start) / (num_nowcasts - 1)
    return tuple(max(1, round((start + i * step) ** power)) for i in range(num_nowcasts))


def resolve_horizons(
    schedule: str, max_intervals: int, power: float, max_steps: int, period_steps: int, predictor_max: int
) -> tuple[int, ...]:
    """The horizons of all nowcasts of a run.

    Args:
        schedule: ``constant``, ``power``, or empty: ``power`` where the run's length is known, else ``constant``.
        max_intervals: K in snapshot intervals; 0 for the predictor's own.
        power: p of the ``power`` schedule.
        max_steps: Length of the run in optimizer steps; 0 if unknown.
        period_steps: Optimizer steps between nowcasts.
        predictor_max: The predictor's own K.

    Raises:
        ConfigError: The schedule is unknown, or needs the run's length and does not have it.
    """
    largest = max_intervals if max_intervals > 0 else predictor_max
    if schedule == "constant" or (schedule == "" and max_steps == 0):
        return (largest,)
    if schedule not in ("power", ""):
        raise ConfigError(f"horizon.schedule is {schedule!r}; allowed: 'constant', 'power'")
    if max_steps == 0:
        raise ConfigError("horizon.schedule 'power' needs max_steps, the length of the run in optimizer steps")
    return horizon_schedule(max(1, max_steps // period_steps), largest, power)


def horizon_at(horizons: Sequence[int], base_step: int, period_steps: int) -> int:
    """The horizon of the nowcast made at a step, in snapshot intervals: a function of the step alone.

    Args:
        horizons: Of all nowcasts of the run; the last one repeats.
        base_step: Optimizer step of the newest state.
        period_steps: Optimizer steps between nowcasts.
    """
    index = base_step // period_steps - 1
    return horizons[min(max(index, 0), len(horizons) - 1)]
