from __future__ import annotations

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.job.schedules import ScheduleConfig, lr_ratio


def test_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    ratio = lr_ratio(ScheduleConfig(kind="constant", warmup_steps=4), 10)
    assert [ratio(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_its_floor() -> None:
    ratio = lr_ratio(ScheduleConfig(kind="cosine", warmup_steps=10, min_ratio=0.1), 110)
    assert ratio(10) == 1.0
    assert ratio(60) == pytest.approx(0.55)
    assert ratio(110) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_in_a_straight_line() -> None:
    ratio = lr_ratio(ScheduleConfig(kind="wsd", warmup_steps=5, decay_steps=20), 100)
    assert {ratio(step) for step in range(5, 81)} == {1.0}
    assert ratio(90) == pytest.approx(0.5)
    assert ratio(100) == 0.0


def test_wsd_decays_over_a_fifth_of_the_run_by_default() -> None:
    ratio = lr_ratio(ScheduleConfig(kind="wsd"), 100)
    assert ratio(80) == 1.0
    assert ratio(81) < 1.0


def test_a_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"110.*at most.*100"):
        lr_ratio(ScheduleConfig(kind="wsd", warmup_steps=60, decay_steps=50), 100)
