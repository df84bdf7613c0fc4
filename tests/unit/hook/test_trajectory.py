"""Where a run is, and what of a prediction that leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecast.trainer.hook.trajectory import Trajectory
from tests.support.hook_harness import PREDICTION

BASE_STEP = PREDICTION.base_step


@pytest.mark.parametrize(
    ("step", "num_epochs", "reason"),
    [
        (BASE_STEP, 0, ""),
        (BASE_STEP + 5, 0, ""),
        (BASE_STEP + 6, 0, "its base is 6 steps old"),
        (BASE_STEP, 1, "its base is of epoch 0, this is epoch 1"),
    ],
)
def test_a_prediction_is_of_use_in_its_epoch_until_it_is_stale(step: int, num_epochs: int, reason: str) -> None:
    trajectory = Trajectory("run", step)
    for _ in range(num_epochs):
        trajectory.begin_epoch()
    assert trajectory.why_unusable(PREDICTION, 5) == reason


STATE = {"run_id": "run", "epoch": 0, "step": BASE_STEP}


@pytest.mark.parametrize(
    ("state", "step", "stays"),
    [
        (STATE, BASE_STEP, True),
        (STATE, BASE_STEP - 1, False),
        ({**STATE, "run_id": "another"}, BASE_STEP, False),
        ({**STATE, "epoch": 1}, BASE_STEP, False),
        (None, BASE_STEP, False),
    ],
)
def test_a_prediction_stays_of_use_if_its_base_is_in_the_checkpoints_past(
    state: dict[str, Any] | None, step: int, stays: bool
) -> None:
    trajectory = Trajectory("run", BASE_STEP + 3)
    assert trajectory.stays_usable(PREDICTION, state, step) is stays
    # The rank itself may be epochs further on: what counts is where it goes back to.
    trajectory.begin_epoch()
    assert trajectory.stays_usable(replace(PREDICTION, epoch=0), state, step) is stays


def test_a_resume_takes_over_what_was_saved_or_begins_the_run_that_it_is_given() -> None:
    saved = Trajectory("run", 7)
    saved.begin_epoch()
    resumed = Trajectory("unused", 0)
    resumed.resume(saved.state(), "unused", 7)
    assert resumed.state() == saved.state() == {"run_id": "run", "epoch": 1, "step": 7}
    resumed.resume(None, "new", 3)
    assert resumed.state() == {"run_id": "new", "epoch": 0, "step": 3}
