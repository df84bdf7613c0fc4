"""The weights of read-outs, and the names that they have."""

from __future__ import annotations

import math

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.policies.read_outs import fold, read_out_of, read_outs_of


def weights(name: str, steps: list[int], begin_step: int = 0) -> list[float]:
    """Of states of these steps, from the shares that they come in with."""
    read_out = read_out_of(name)
    found: list[float] = []
    before = begin_step
    for step in steps:
        share = read_out.share(begin_step, before, step)
        found = [weight * (1 - share) for weight in found] + [share]
        before = step
    return found


@pytest.mark.parametrize("percent", [2, 5, 10, 20])
@pytest.mark.parametrize("num_steps", [1_000, 10_000])
def test_half_of_an_ema_lies_on_the_last_percent_of_the_steps(percent: int, num_steps: int) -> None:
    found = weights(f"ema{percent}", list(range(10, num_steps + 1, 10)))
    newest = num_steps * percent // 100 // 10
    assert sum(found[-newest:]) == pytest.approx(0.5)


def test_a_mean_weighs_all_steps_alike_from_its_step_on() -> None:
    assert weights("mean@100", [110, 120, 140], begin_step=100) == pytest.approx([0.25, 0.25, 0.5])


def test_wsm_has_the_weights_of_a_decay_by_one_minus_the_root() -> None:
    steps = list(range(2_020, 2_201, 20))
    rates = [1 - math.sqrt((step - 20 - 2_000) / 200) for step in steps]
    # What an update is worth in a decay is what all states from it on weigh together.
    expected = [rate - later for rate, later in zip(rates, [*rates[1:], 0.0], strict=True)]
    assert weights("wsm@2000", steps, begin_step=2_000) == pytest.approx(expected)


def test_a_lost_state_leaves_its_steps_to_the_next_one() -> None:
    whole, lost = weights("ema5", [10, 20, 30, 40]), weights("ema5", [10, 40])
    assert lost == pytest.approx([whole[0], sum(whole[1:])])


def test_an_average_that_begins_late_has_the_same_proportions() -> None:
    whole, late = weights("ema10", list(range(10, 1_001, 10))), weights("ema10", list(range(810, 1_001, 10)), 800)
    rest = sum(whole[80:])
    assert late == pytest.approx([weight / rest for weight in whole[80:]])


@pytest.mark.parametrize(
    "name", ["", "ema", "ema0", "ema51", "ema-5", "ema5@3", "mean", "mean@-1", "wsm@", "wsm@01", "raw", "ema5 ", "em\n"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a read-out is .*; allowed: 'emaP' \(P percent, 0.1 to 50\), 'mean@STEP'"):
        read_out_of(name)


def test_a_read_out_is_named_once_and_there_are_not_too_many() -> None:
    with pytest.raises(ConfigError, match="the read-out 'ema5' is named twice; allowed: once"):
        read_outs_of(["ema5", "ema2", "ema5"])
    with pytest.raises(ConfigError, match="9 read-outs are named; allowed: 8, a vector each"):
        read_outs_of([f"mean@{step}" for step in range(9)])


def test_folding_gives_both_ends_and_says_what_is_not_finite() -> None:
    before_P, state_P = torch.rand(600_000), torch.rand(600_000)
    out_P = torch.empty(600_000)
    assert fold(before_P, state_P, 1.0, out_P)
    assert torch.equal(out_P, state_P)
    assert fold(None, state_P, 0.5, out_P)
    assert torch.equal(out_P, state_P)
    assert fold(before_P, state_P, 0.25, out_P)
    torch.testing.assert_close(out_P, 0.75 * before_P + 0.25 * state_P)
    state_P[-1] = torch.inf
    assert not fold(before_P, state_P, 0.25, out_P)
