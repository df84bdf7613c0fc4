"""The arithmetic of pushes on small vectors, and the alarm that ends them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.policies.jump import jump_weight, remaining_rate
from sidecast.policies.loss_guard import LossGuard, LossGuardConfig
from sidecast.policies.push import CarriedMotion, PushConfig, age_weight, apply_, average_interval_, fold_, push_factor

CONFIG = PushConfig(interval_steps=20, start_step=40, stop_step=100)


def test_a_steady_run_ends_up_at_twice_its_speed() -> None:
    """Own motion of 1 an interval, carried and pushed on with gain 1, makes 2 an interval."""
    config = PushConfig(interval_steps=20, time_constant_steps=100)
    params = torch.zeros(1)
    motion = CarriedMotion(config, params.clone(), torch.zeros(1))
    for step in range(20, 2020, 20):
        before = params.clone()
        params += 1.0
        factor = motion.advance(params, step=step, num_steps=20, lr_sum=20 * 1e-3)
        assert factor is not None
        apply_(params, motion.carry_P, factor)
        motion.applied(motion.carry_P, factor)
    torch.testing.assert_close(params - before, torch.full((1,), 2.0), rtol=0, atol=1e-3)


def test_a_push_is_scaled_by_the_learning_rate() -> None:
    full = push_factor(PushConfig(), 0, 0.2, 1.0, 1.0)
    assert push_factor(PushConfig(), 0, 0.1, 1.0, 1.0) == pytest.approx(full / 2)


def test_an_interval_without_a_learning_rate_says_nothing() -> None:
    carry = torch.ones(3)
    fold_(carry, torch.ones(3), 0.0, 0.5)
    assert torch.equal(carry, torch.ones(3))


def test_a_push_is_capped_by_the_runs_own_motion() -> None:
    config = PushConfig(gain=20.0, max_relative_norm=2.0, start_step=0)
    factor = push_factor(config, 0, 0.1, carry_norm=10.0, own_norm=1.0)
    assert factor * 10.0 == pytest.approx(2.0)
    free = PushConfig(gain=20.0, max_relative_norm=None, start_step=0)
    assert push_factor(free, 0, 0.1, carry_norm=10.0, own_norm=1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("step", [0, 20, 100, 120])
def test_nothing_is_pushed_before_the_start_or_after_the_stop(step: int) -> None:
    assert push_factor(CONFIG, step, 0.1, 1.0, 1.0) == 0.0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nothing_is_pushed_that_is_not_finite(norm: float) -> None:
    assert push_factor(PushConfig(), 0, 0.1, norm, 1.0) == 0.0
    assert push_factor(PushConfig(), 0, 0.1, 1.0, norm) == 0.0


@pytest.mark.parametrize(("age_steps", "weight"), [(0, 1), (10, 1), (25, 0.5), (40, 0), (41, 0), (400, 0)])
def test_age_damps_a_push(age_steps: int, weight: float) -> None:
    assert age_weight(age_steps, 20) == pytest.approx(weight)


def test_a_push_is_worth_one_interval_however_long_the_last_one_was() -> None:
    config = PushConfig(interval_steps=20, time_constant_steps=1e-3, start_step=0, max_relative_norm=1.0)
    for num_steps in (5, 20, 40):
        motion = CarriedMotion(config, torch.zeros(1), torch.zeros(1))
        state = torch.full((1,), 0.5 * num_steps)
        factor = motion.advance(state, step=40, num_steps=num_steps, lr_sum=0.25 * num_steps)
        assert factor == pytest.approx(20 * 0.25)
        assert float(motion.carry_P) * factor == pytest.approx(20 * 0.5)


def test_pieces_of_a_long_vector_give_what_the_whole_gives() -> None:
    """Pieces are for the cache; the cap is by the norms of all of them."""
    config = PushConfig(interval_steps=20, time_constant_steps=1e-3, start_step=0, gain=4.0, max_relative_norm=2.0)
    num_elements = (1 << 18) + 3
    before, push = torch.zeros(num_elements), torch.ones(num_elements)
    after, carry = torch.full((num_elements,), 3.0), torch.zeros(num_elements)
    settings = {"step": 20, "num_steps": 20, "lr_sum": 0.5, "applied_P": push, "weight": 0.5}
    factor = average_interval_(config, carry, before, after, **settings)
    # Of 3 that it went, half were pushed; 2.5 per 0.5 of the learning rate.
    assert torch.equal(carry, torch.full((num_elements,), 5.0))
    assert factor == pytest.approx(2.0 * 0.5)
    apply_(before, push, 0.5)
    assert torch.equal(before, torch.full((num_elements,), 0.5))


def test_an_average_that_is_not_finite_is_to_be_thrown_away() -> None:
    motion = CarriedMotion(PushConfig(), torch.zeros(2), torch.zeros(2))
    assert motion.advance(torch.tensor([1.0, math.nan]), step=300, num_steps=20, lr_sum=1.0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval_steps": 0}, "push.interval_steps is 0; it must be at least 1"),
        ({"gain": math.nan}, "push.gain is nan; it must be at least 0 and finite"),
        ({"start_step": 5, "stop_step": 4}, "push.stop_step is 4; it must be at least start_step, 5"),
        ({"max_relative_norm": 0}, "push.max_relative_norm is 0; it must be above 0, or null"),
        ({"time_constant_steps": 0}, "push.time_constant_steps is 0; it must be above 0"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PushConfig(**settings)


def _noisy_losses(seed: int, num: int, noise: float = 0.04) -> list[float]:
    """A loss as in a run of a small language model, whose batches differ."""
    generator = random.Random(seed)
    return [1.15 + 0.9 / math.sqrt(1 + step / 60) + noise * generator.gauss(0, 1) for step in range(num)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_no_alarm(seed: int) -> None:
    guard = LossGuard(LossGuardConfig())
    assert not any(guard.observe(loss) for loss in _noisy_losses(seed, 3000))


@pytest.mark.parametrize("seed", range(20))
def test_the_alarm_comes_before_the_loss_has_risen_by_5_percent(seed: int) -> None:
    guard = LossGuard(LossGuardConfig())
    losses = _noisy_losses(seed, 1000, noise=0.02)
    for loss in losses[:600]:
        assert not guard.observe(loss)
    rise = 0.0
    for step in range(1, 400):
        # A hundredth every twenty steps.
        rise = 0.0005 * step
        if guard.observe(losses[600 + step] + 1.4 * rise):
            break
    assert rise < 0.05
    assert "the mean loss rose from" in guard.reason


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_alarm(loss: float) -> None:
    guard = LossGuard(LossGuardConfig())
    assert guard.observe(loss)
    assert guard.observe(1.0)
    assert guard.reason == f"the loss is {loss}"


def test_a_guard_goes_on_from_its_state() -> None:
    losses = _noisy_losses(0, 200) + [3.0] * 40
    whole, first, second = (LossGuard(LossGuardConfig()) for _ in range(3))
    answers = [whole.observe(loss) for loss in losses]
    for loss in losses[:150]:
        first.observe(loss)
    second.load(first.state())
    assert [second.observe(loss) for loss in losses[150:]] == answers[150:]
    assert second.reason == whole.reason != ""


@pytest.mark.parametrize("staleness_steps", [0, 7, 100, 300])
@pytest.mark.parametrize("merge", ["age_weighted", "add"])
def test_jump_weights_are_those_of_the_hook(staleness_steps: int, merge: str) -> None:
    from sidecast.trainer.hook import jump as hook
    from sidecast.trainer.hook.config import NowcasterConfig

    config = NowcasterConfig(merge=merge, max_weight=0.8)  # type: ignore[arg-type]
    expected = hook.jump_weight(staleness_steps, 200, config, 0.5)
    is_aged = merge == "age_weighted"
    assert jump_weight(staleness_steps, 200, is_aged=is_aged, max_weight=0.8, weight_scale=0.5) == expected
    window = hook.LearningRateWindow(3)
    for rate in (1.0, 3.0, 2.0):
        window.add([rate])
    assert remaining_rate([1.0, 3.0, 2.0], 1.5) == window.remaining([1.5]) == 0.5
