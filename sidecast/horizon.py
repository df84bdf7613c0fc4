"""How far ahead each nowcast of a run looks."""

from __future__ import annotations

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
