"""What is made of a farm's results: choices without the judged seed, paired differences, equivalent steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from sidecast.evaluation.analysis import ArmRuns, Results, Setting, interval
from sidecast.evaluation.equivalent_steps import StepsOfLoss
from sidecast.evaluation.farm import MemberResult
from sidecast.evaluation.reports.charts import loss_chart
from sidecast.evaluation.reports.report import html_page, markdown
from sidecast.evaluation.reports.tables import comparison_tables
from sidecast.evaluation.results import Finished
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import MemberSettings, OptimizerSettings

SETTING = Setting("smoke", "cosine", 1000)


def _finished(arm: str, lr: float, seed: int, loss: float, num_steps: int = 1000) -> Finished:
    settings = MemberSettings(
        task="smoke",
        arm=arm,
        seed=seed,
        num_steps=num_steps,
        schedule=Schedule(kind="cosine"),
        optimizer=OptimizerSettings(lr=lr),
    )
    result = MemberResult(
        final_losses={"raw": loss, "ema5": loss - 0.001},
        curve=[(num_steps, loss)],
        worst_spike=0.1,
        method_s=0.5,
        step_s=50.0,
        method={},
    )
    return Finished(key=f"{settings}", settings=settings, result=result, conditions={})


def _baseline_loss(num_steps: int) -> float:
    return 3.0 - 0.3 * math.log(num_steps)


def _results(gain: float) -> Results:
    """A baseline of three lengths; an arm that is better by what a factor ``gain`` of steps would bring; all noisy."""
    finished = []
    for seed in range(8):
        luck = 0.01 * (seed - 3.5)
        for lr, worse in ((0.01, 0.0), (0.02, 0.05)):
            for num_steps in (800, 1000, 1300):
                loss = _baseline_loss(num_steps) + worse + luck
                finished.append(_finished("adamw", lr, seed, loss, num_steps))
            own = 0.0005 * (-1) ** seed
            finished.append(_finished("push", lr, seed, _baseline_loss(round(1000 * gain)) + worse + luck + own))
    return Results(finished)


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])
    # t(0.975, 3) = 3.18245, standard error 0.645497
    assert (found.low, found.high) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-4)
    assert interval([1.0]).high == math.inf


def test_a_seed_is_judged_at_the_point_that_the_others_choose() -> None:
    losses: Mapping[tuple[float, float], Mapping[int, float]] = {
        (0.1, 0.9): {0: 1.0, 1: 3.5, 2: 3.5},
        (0.2, 0.9): {0: 2.0, 1: 2.0, 2: 2.0},
    }
    assert ArmRuns(losses).tuned() == {0: 2.0, 1: 2.0, 2: 2.0}
    assert ArmRuns({(0.1, 0.9): {4: 1.0}}).tuned() == {4: 1.0}


def test_only_seeds_that_every_point_has_are_used() -> None:
    assert ArmRuns({(0.1, 0.9): {0: 1.0, 1: 1.0}, (0.2, 0.9): {1: 1.0, 2: 1.0}}).seeds == [1]


def test_a_known_gain_is_found_in_steps() -> None:
    row = _results(1.15).compare(SETTING, "push", "raw", "adamw", "raw", "cosine")
    assert row is not None
    assert row.saved is not None
    assert row.saved.low < 1 - 1 / 1.15 < row.saved.high
    assert row.saved.high - row.saved.low < 0.01
    assert (row.best, row.is_edge, row.num_better, row.difference.num) == ((0.01, 0.9), True, 8, 8)
    assert row.overhead == pytest.approx(0.01)


def test_a_gain_beyond_all_lengths_is_cut_and_said_to_be() -> None:
    row = _results(2.0).compare(SETTING, "push", "raw", "adamw", "raw", "cosine")
    assert row is not None
    assert row.saved is not None
    assert row.saved.mean == pytest.approx(1 - 1000 / 1300)
    assert row.is_saved_bounded


def test_losses_out_of_order_are_pooled() -> None:
    curve = StepsOfLoss({100: 2.0, 200: 1.5, 300: 1.6, 400: 1.0})
    assert curve.loss_at(200) == pytest.approx(1.55, abs=1e-6)
    assert curve.loss_at(300) == pytest.approx(1.55, abs=1e-6)
    steps = [curve.steps_for(loss).steps for loss in (2.0, 1.8, 1.5, 1.2, 1.0)]
    assert steps == sorted(steps)
    assert curve.steps_for(0.9) == curve.steps_for(1.0).__class__(pytest.approx(400), True)


def test_lengths_are_compared_over_the_same_seeds() -> None:
    """A lucky seed that only the longest length has would otherwise look like progress."""
    finished = [
        _finished("adamw", 0.01, seed, _baseline_loss(length), length)
        for seed in (0, 1)
        for length in (800, 1000, 1300)
    ]
    curve = Results([*finished, _finished("adamw", 0.01, 2, 0.5, 1300)]).steps_of_loss(
        "smoke", "cosine", "adamw", "raw", [(0.01, 0.9)]
    )
    assert curve is not None
    assert curve.loss_at(1300) == pytest.approx(_baseline_loss(1300))


def test_arms_choose_from_the_points_that_both_have_and_the_report_says_what_is_left_out() -> None:
    """A pilot's runs in the same folder neither help one arm nor cost the other seeds in silence."""
    finished = [_finished(arm, 0.01, seed, 1.0) for arm in ("adamw", "push") for seed in range(4)]
    finished += [_finished("push", 0.02, seed, 0.5) for seed in range(2)]
    finished += [_finished(arm, 0.03, seed, 1.5) for arm in ("adamw", "push") for seed in range(3)]
    results = Results(finished)
    row = results.compare(SETTING, "push", "raw", "adamw", "raw", "cosine")
    assert row is not None
    assert (row.best, row.difference.mean, row.difference.num) == ((0.01, 0.9), 0.0, 3)
    assert results.gaps(SETTING, "adamw") == [
        "no use is made of adamw with seed 3, which was not run at lr 0.03, b1 0.9",
        "adamw was not run at lr 0.02, b1 0.9, so that push is not judged there",
        "no use is made of push with seed 3, which was not run at lr 0.03, b1 0.9",
    ]
    text = markdown(comparison_tables(results))
    assert (
        "What is lacking: no use is made of adamw with seed 3, which was not run at lr 0.03, b1 0.9. adamw was not"
        in text
    )


def test_lengths_that_were_tuned_less_give_no_equivalent_steps() -> None:
    """They would be worse by that alone, and every arm would seem to save steps."""
    results = _results(1.15)
    assert results.gaps(SETTING, "adamw") == []
    finished = [_finished("adamw", lr, seed, 1.0 + lr) for lr in (0.01, 0.02) for seed in range(3)]
    finished += [_finished("push", lr, seed, 0.9 + lr) for lr in (0.01, 0.02) for seed in range(3)]
    finished += [_finished("adamw", 0.02, seed, 0.8, length) for length in (1300, 1700) for seed in range(3)]
    fewer = Results(finished)
    row = fewer.compare(SETTING, "push", "raw", "adamw", "raw", "cosine")
    assert row is not None
    assert row.saved is None
    assert fewer.gaps(SETTING, "adamw") == [
        f"no equivalent steps are read from adamw of {length} steps, which was not run at lr 0.01, b1 0.9"
        for length in ("1,300", "1,700")
    ]


def test_a_cut_value_has_no_interval() -> None:
    text = markdown(comparison_tables(_results(2.0)))
    assert "| over 23.1 % (cut) |" in text


def test_reports_hold_every_arm() -> None:
    results = _results(1.15)
    text = markdown(comparison_tables(results))
    assert "| push | 0.01, 0.9 * |" in text
    # Of the read-outs that these results lack there is no row, rather than one of infinities.
    assert "| push | ema5 |" in text
    assert "inf" not in text
    assert "adamw by length" in text
    page = html_page(results, "here <and> now")
    assert page.count("<svg") == 3
    assert "here &lt;and&gt; now" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert loss_chart(results, Setting("smoke", "wsd", 1)) == ""
