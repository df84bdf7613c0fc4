"""What a decaying learning rate leaves of a jump."""

from __future__ import annotations

import pytest

from sidecast.trainer.hook.jump import LearningRateWindow


def window_of(*rates: tuple[float, ...]) -> LearningRateWindow:
    window = LearningRateWindow(3)
    for each in rates:
        window.add(each)
    return window


@pytest.mark.parametrize(
    ("seen", "now", "remaining"),
    [
        ([], (0.1,), 1.0),
        ([(0.1,), (0.1,)], (0.1,), 1.0),
        ([(0.1,), (0.2,)], (0.4,), 1.0),
        ([(0.4,), (0.2,)], (0.1,), 0.25),
        # The group that has least left decides; one that does not train says nothing.
        ([(0.4, 0.1, 0.0)], (0.2, 0.1, 0.0), 0.5),
        ([(0.4,)], (0.0,), 0.0),
        # What lies before the window is forgotten.
        ([(0.8,), (0.2,), (0.2,), (0.2,)], (0.2,), 1.0),
        ([], (), 1.0),
    ],
    ids=["unknown", "constant", "warm-up", "decay", "groups", "zero", "window", "no groups"],
)
def test_what_is_left(seen: list[tuple[float, ...]], now: tuple[float, ...], remaining: float) -> None:
    assert window_of(*seen).remaining(now) == remaining


def test_it_survives_a_checkpoint() -> None:
    resumed = LearningRateWindow(3)
    resumed.load(window_of((0.4, 0.1), (0.2, 0.1)).state())
    assert resumed.remaining((0.1, 0.1)) == 0.25
