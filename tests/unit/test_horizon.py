"""How far ahead each nowcast of a run looks."""

from __future__ import annotations

import pytest

from sidecast.errors import ConfigError
from sidecast.horizon import horizon_at, horizon_schedule, resolve_horizons
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.jump import jump_weight


def test_ten_nowcasts_as_published() -> None:
    assert horizon_schedule(10, 40) == (40, 33, 26, 21, 16, 11, 8, 5, 3, 1)


@pytest.mark.parametrize(("arguments", "expected"), [((1, 7), (7,)), ((3, 1), (1, 1, 1)), ((3, 9, 1.0), (9, 5, 1))])
def test_edges(arguments: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert horizon_schedule(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 5), "num_nowcasts is 0"),
        ((5, 0), "max_horizon is 0"),
        ((5, 5, 0.0), "power is 0.0"),
        ((5, 5, 1e-9), "power is 1e-09"),
        ((5, 5, float("nan")), "power is nan"),
    ],
)
def test_refusals(arguments: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        horizon_schedule(*arguments)


def test_the_run_decides_where_nothing_is_said() -> None:
    assert resolve_horizons("", 0, 2.0, 0, 20, 5) == (5,)
    assert resolve_horizons("", 40, 2.0, 200, 20, 5) == horizon_schedule(10, 40)
    assert resolve_horizons("constant", 3, 2.0, 200, 20, 5) == (3,)
    with pytest.raises(ConfigError, match="needs max_steps"):
        resolve_horizons("power", 3, 2.0, 0, 20, 5)


def test_the_horizon_follows_from_the_step_alone() -> None:
    assert [horizon_at((9, 4, 1), step, 20) for step in (20, 40, 60, 80, 200)] == [9, 4, 1, 1, 1]


def test_a_jump_is_worth_less_the_older_its_base() -> None:
    by_age, as_it_is = NowcasterConfig(max_weight=0.8), NowcasterConfig(max_weight=0.8, merge="add")
    assert [jump_weight(age, 10, by_age, 1.0) for age in (0, 5, 10, 11)] == [0.8, 0.4, 0.0, 0.0]
    assert [jump_weight(age, 10, as_it_is, 0.5) for age in (0, 5, 11)] == [0.4, 0.4, 0.4]
