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
            config.interval_steps,
            config.nowcast_interval_steps,
            config.resolved_vote_interval_steps,
            config.vote_lag_steps,
        )

    def is_snapshot(self, step: int) -> bool:
        return step > 0 and step % self.interval_steps == 0

    def is_base(self, step: int) -> bool:
        """Whether a window ends, and a nowcast begins, at this step."""
        return step > 0 and step % self.period_steps == 0

    def is_vote(self, step: int) -> bool:
        return step > 0 and step % self.vote_interval_steps == 0
