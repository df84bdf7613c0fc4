"""Which steps are snapshot, base and vote steps: pure functions of the step, equal on all ranks and after a resume."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.trainer.hook.config import NowcasterConfig


@dataclass(frozen=True)
class Schedule:
    """Step arithmetic of one run."""

    interval_steps: int
    period_steps: int
    vote_interval_steps: int
    vote_lag_steps: int

    @classmethod
    def of(cls, config: NowcasterConfig) -> Schedule:
        return cls(
            config.interval_steps, config.period_steps, config.resolved_vote_interval_steps, config.vote_lag_steps
        )

    def is_snapshot(self, step: int) -> bool:
        return step > 0 and step % self.interval_steps == 0

    def is_base(self, step: int) -> bool:
        """Whether a window ends, and a nowcast begins, at this step."""
        return step > 0 and step % self.period_steps == 0

    def is_vote(self, step: int) -> bool:
        return step > 0 and step % self.vote_interval_steps == 0


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
