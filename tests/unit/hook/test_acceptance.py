"""When a jump is kept and when it is undone."""

from __future__ import annotations

import math
import random

import pytest

from sidecast.trainer.hook.policies.verdicts import LossPoint, LossTrend, Verdict, judge


def trend(start: int, stop: int, shift: float = 0.0, noise: float = 0.02, seed: int = 0) -> list[LossPoint]:
    """A loss that falls with log(step), with noise."""
    rng = random.Random(f"{seed}-{start}")
    return [LossPoint(step, 4 - 0.3 * math.log(step) + shift + rng.gauss(0, noise)) for step in range(start, stop, 10)]


@pytest.mark.parametrize(("shift", "verdict"), [(-0.2, Verdict.ACCEPT), (0.2, Verdict.ROLL_BACK)])
def test_clearly_better_and_clearly_worse(shift: float, verdict: Verdict) -> None:
    judgement = judge(trend(1000, 1500), trend(1750, 2000, shift), 3.0)
    assert judgement.verdict is verdict
    assert "expected, standard error" in judgement.reason
    assert (judgement.num_before, judgement.num_after, judgement.is_blind) == (50, 25, False)


def test_noise_alone_is_not_undone() -> None:
    verdicts = [judge(trend(1000, 1500, seed=seed), trend(1750, 2000, seed=seed), 3.0)[0] for seed in range(200)]
    assert verdicts.count(Verdict.ROLL_BACK) <= 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_undone(bad: float) -> None:
    after = [*trend(1750, 2000), LossPoint(2000, bad)]
    assert judge(trend(1000, 1500), after, 3.0)[:2] == (Verdict.ROLL_BACK, "the loss is not finite")


def test_a_loss_that_was_not_finite_before_the_jump_is_not_held_against_it() -> None:
    before = [*trend(1000, 1500), LossPoint(1500, math.nan)]
    assert judge(before, trend(1750, 2000, 0.2), 3.0)[0] is Verdict.ROLL_BACK
    assert judge(before, trend(1750, 2000), 3.0)[0] is Verdict.ACCEPT


@pytest.mark.parametrize(("num_before", "num_after"), [(3, 10), (10, 3), (0, 0)])
def test_what_cannot_be_judged_is_not_kept(num_before: int, num_after: int) -> None:
    judgement = judge(trend(1000, 1500)[:num_before], trend(1750, 2000, -9.0)[:num_after], 3.0)
    assert judgement.verdict is Verdict.ROLL_BACK
    assert judgement.is_blind
    assert f"({num_before} before, {num_after} after; 4 are needed each)" in judgement.reason


def test_a_rising_trend_is_no_licence_to_rise_on() -> None:
    before = [LossPoint(step, 1 + step / 1000 + 0.001 * (step % 3)) for step in range(100, 200, 5)]
    after = [LossPoint(step, 1.3 + step / 1000) for step in range(300, 350, 5)]
    assert judge(before, after, 3.0)[0] is Verdict.ROLL_BACK


def test_a_loss_without_noise_is_not_undone_for_its_rounding() -> None:
    for loss in (4.545, 4.569, 3.613, 2.493):
        before = [LossPoint(step, loss) for step in range(7, 40)]
        after = [LossPoint(step, loss) for step in range(60, 80)]
        assert judge(before, after, 3.0)[0] is Verdict.ACCEPT


def test_the_trend_keeps_a_bounded_window_and_judges_by_its_second_half() -> None:
    losses = LossTrend(100)
    for step in range(1, 1001):
        recovering = 5.0 if 900 < step <= 950 else 0.0
        losses.add(LossPoint(step, 1.0 + recovering + 0.001 * (step % 7)))
    assert losses.judge(900, 3.0)[0] is Verdict.ACCEPT
    assert len(losses.state()) == 201
    copy = LossTrend(100)
    copy.load([list(item) for item in losses.state()])  # type: ignore[misc]
    assert copy.state() == losses.state()
