"""Jumps: rare and far, each on probation, undone if the loss does not come back to its trend."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sidecast.trainer.hook.application import JumpApplier
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.jump import LearningRateWindow, jump_weight
from sidecast.trainer.hook.messenger import Messenger
from sidecast.trainer.hook.policies.probation import Probation
from sidecast.trainer.hook.policies.verdicts import Verdict
from sidecast.trainer.hook.reporting import Reporter
from sidecast.trainer.hook.trajectory import Trajectory
from sidecast.trainer.pipe.messages import Prediction

log = logging.getLogger(__name__)


class JumpPolicy:
    """Implements ``Policy``.

    Args:
        config: Settings.
        applier: Undoes jumps.
        trajectory: Of the run.
        reporter: Is told of verdicts.
        messenger: Keeps the apply log.
    """

    learning_rate_sum = 0.0
    applied = None
    wants_snapshots = True

    def __init__(
        self,
        config: NowcasterConfig,
        applier: JumpApplier,
        trajectory: Trajectory,
        reporter: Reporter,
        messenger: Messenger,
    ) -> None:
        self.merge, self.moments = config.merge, config.moments
        self._config = config
        self._applier = applier
        self._trajectory = trajectory
        self._reporter = reporter
        self._messenger = messenger
        self._probation = Probation(config)
        self._learning_rates = LearningRateWindow(config.context_len)
        self._num_unseen = 0
        self._is_warned = False

    @property
    def last_loss(self) -> float | None:
        return self._probation.last_loss

    @property
    def is_suspended(self) -> bool:
        return self._probation.is_suspended

    @property
    def allows(self) -> bool:
        # What could not be judged would be kept whatever it did.
        return self._probation.allows_jumps and (not self._is_judging or self._can_judge)

    @property
    def _is_judging(self) -> bool:
        return self._applier.rollback_copy is not None

    @property
    def _can_judge(self) -> bool:
        return self._probation.can_judge(self._trajectory.step)

    @property
    def is_on_probation(self) -> bool:
        return self._probation.jump is not None

    def end_probation(self) -> None:
        self._probation.end()

    def after_step(self) -> None:
        """Nothing: what counts are the rates at snapshots."""

    def at_snapshot(self, step: int) -> None:
        self._learning_rates.add(self._applier.partition.learning_rates())
        is_base = step % self._config.period_steps == 0
        is_blind = is_base and self._is_judging and self._num_unseen > 0 and not self._can_judge
        if is_blind and self._probation.allows_jumps and not self._is_warned:
            log.warning(
                "no jump is applied as long as too few losses are seen to judge one by (%d of the votes so far brought "
                "none): call observe(loss) with the mean loss of each micro-batch, or set nowcaster.probation_steps "
                "to 0, and jumps are neither judged nor undone",
                self._num_unseen,
            )
            self._is_warned = True

    def is_due(self, step: int) -> bool:
        # Not for one that could not be applied: waiting for it would cost the deadline at every base step.
        return self.allows and self.weight_scale() > 0

    def weight_scale(self) -> float:
        if self._config.during_decay == "allow":
            return 1.0
        remaining = self._learning_rates.remaining(self._applier.partition.learning_rates())
        return remaining if self._config.during_decay == "scale" else float(remaining == 1.0)

    def weight(self, held: Prediction, step: int, weight_scale: float) -> float:
        horizon_steps = held.horizon_intervals * self._config.interval_steps
        return jump_weight(step - held.base_step, horizon_steps, self._config, weight_scale)

    def on_applied(self, held: Prediction, weight: float, step: int) -> None:
        if self._applier.rollback_copy is not None:
            self._probation.begin(held.version, step)

    def on_loss(self, loss_step: int, mean_loss: float | None) -> None:
        if mean_loss is None:
            self._num_unseen += 1
        else:
            self._probation.add(loss_step, mean_loss)
        judgement = self._probation.verdict(self._trajectory.step, mean_loss)
        if judgement is None:
            return
        jump = self._probation.jump
        assert jump is not None
        verdict, reason = judgement.verdict, judgement.reason
        grounds: dict[str, int | str] = {
            "version": jump.version,
            "reason": reason,
            "num_losses_before": judgement.num_before,
            "num_losses_after": judgement.num_after,
        }
        if verdict is Verdict.ACCEPT:
            self._probation.accepted()
            self._reporter.totals.num_accepted += 1
            self._reporter.report("accepted", jump.version)
            self._reporter.totals.count_verdict(judgement.num_before, judgement.num_after)
            self._reporter.emit("accepted", **grounds)
            return
        if obstacle := self._applier.undo():
            # Tried again at every vote; until then no other jump is applied.
            if self._probation.postpone(reason):
                log.error("the jump of step %d must be undone (%s), but cannot: %s", jump.step, reason, obstacle)
                self._reporter.emit("rollback_delayed", version=jump.version, reason=obstacle)
            return
        why_suspended = self._probation.rolled_back()
        self._trajectory.begin_epoch()
        self._reporter.totals.num_rolled_back += 1
        self._messenger.log({"action": "rolled_back", "step": self._trajectory.step})
        self._reporter.report("rolled_back", jump.version)
        self._reporter.totals.count_verdict(judgement.num_before, judgement.num_after)
        self._reporter.emit("rolled_back", **grounds)
        if judgement.is_blind:
            log.warning("the jump of step %d is undone: %s", jump.step, reason)
        if why_suspended:
            self._reporter.emit("suspended", reason=why_suspended)

    def state(self) -> dict[str, Any]:
        return {"learning_rates": self._learning_rates.state(), **self._probation.state()}

    def load(self, state: Mapping[str, Any] | None) -> None:
        own = state if state is not None and "learning_rates" in state else None
        if state is not None and own is None:
            log.warning("the checkpoint is of a run with pushes; jumps begin anew")
        self._learning_rates.load([] if own is None else own["learning_rates"])
        self._probation.load(own)
