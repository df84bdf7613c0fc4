"""Pushes along a predictor's change: what it sees, and how long they are."""

from __future__ import annotations

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.evaluation.methods.predicted_push import PredictedDirection, PredictedPushMethod
from sidecast.manifest import ModelManifest, ParameterSpec
from sidecast.policies.push import PushConfig
from sidecast.predictors.registry import create_predictor

MANIFEST = ModelManifest((ParameterSpec("weight", (6,)),), {}, {})
# Sums and thirds of them are exact in fp32.
VELOCITY_P = torch.tensor([3.0, -6.0, 0.0, 12.0, 24.0, -48.0])


def _direction(*, spacing: int = 1, horizon: int = 1, gain: float = 1.0) -> PredictedDirection:
    config = PushConfig(start_step=0, gain=gain, max_relative_norm=None)
    start_P = torch.zeros_like(VELOCITY_P)
    predictor = create_predictor("linear")
    return PredictedDirection(config, MANIFEST, start_P, predictor, context_len=3, spacing=spacing, horizon=horizon)


@pytest.mark.parametrize(("spacing", "horizon"), [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_a_run_that_goes_straight_is_pushed_by_one_interval_of_its_own_motion(spacing: int, horizon: int) -> None:
    direction = _direction(spacing=spacing, horizon=horizon)
    state_P = torch.zeros_like(VELOCITY_P)
    pushes = []
    for interval in range(1, 10):
        state_P = state_P + VELOCITY_P
        made = direction.advance(state_P, step=20 * interval, lr_sum=0.5)
        if made is not None:
            push_P, is_capped = made
            assert not is_capped
            # What is applied is no part of what is seen, whatever its weight.
            direction.applied(push_P, 0.25)
            state_P = state_P + push_P * 0.25
            pushes.append(push_P)
    assert len(pushes) == 10 - 2 * spacing
    for push_P in pushes:
        torch.testing.assert_close(push_P, VELOCITY_P, rtol=1e-6, atol=0)


def test_a_push_gets_shorter_with_the_learning_rate_and_longer_with_the_gain() -> None:
    direction = _direction(gain=2.0)
    state_P = torch.zeros_like(VELOCITY_P)
    for interval, lr_sum in enumerate((0.5, 0.25), start=1):
        # Two intervals, the second at half the rate and half as long: per unit of rate the motion is the same.
        state_P = state_P + VELOCITY_P * lr_sum
        made = direction.advance(state_P, step=20 * interval, lr_sum=lr_sum)
    assert made is not None
    slope_P = VELOCITY_P * 0.375
    torch.testing.assert_close(made[0], 2.0 * slope_P * 0.25 / 0.375, rtol=1e-6, atol=0)


def test_the_cap_is_relative_to_the_own_motion() -> None:
    config = PushConfig(start_step=0, gain=20.0, max_relative_norm=0.5)
    direction = PredictedDirection(
        config, MANIFEST, torch.zeros(6), create_predictor("linear"), context_len=2, spacing=1, horizon=1
    )
    made = direction.advance(VELOCITY_P, step=20, lr_sum=0.5)
    assert made is not None
    assert made[1]
    torch.testing.assert_close(made[0], 0.5 * VELOCITY_P, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_len": 1}, "context_len is 1; "),
        ({"spacing": 0}, "push.spacing is 0; it must be at least 1"),
        ({"horizon": 0}, "push.horizon is 0; it must be at least 1"),
        ({"late_steps": -1}, "push.late_steps is -1; it must be at least 0"),
    ],
)
def test_what_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PredictedPushMethod(MANIFEST, torch.zeros(6), **options)  # type: ignore[arg-type]
