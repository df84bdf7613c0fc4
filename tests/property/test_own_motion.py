"""Own motion is exact, whatever was pushed, when, and how often."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecast.policies.push import CarriedMotion, PushConfig, apply_

NUM_ELEMENTS = 7
# It forgets all of an interval by the end of the next: the average is that one's own motion.
LAST_ONLY = PushConfig(interval_steps=20, time_constant_steps=1e-3)
# What happens between two snapshots: a step of the optimizer of some size, or a push of some weight.
EVENTS = st.lists(st.tuples(st.sampled_from(["step", "push"]), st.floats(-2, 2, width=32)), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(intervals=st.lists(EVENTS, min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_own_motion_equals_the_optimizers_steps(intervals: list[list[tuple[str, float]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params_P = torch.randn(NUM_ELEMENTS, generator=generator)
    motion = CarriedMotion(LAST_ONLY, params_P.clone(), torch.zeros(NUM_ELEMENTS))
    for events in intervals:
        # The reference knows everything, in double precision.
        expected_P, largest = torch.zeros(NUM_ELEMENTS, dtype=torch.float64), params_P.abs()
        for kind, size in events:
            change_P = torch.randn(NUM_ELEMENTS, generator=generator)
            if kind == "step":
                params_P.add_(change_P, alpha=size)
                expected_P += size * change_P.double()
            else:
                apply_(params_P, change_P, size)
                motion.applied(change_P, size)
            largest = torch.maximum(largest, params_P.abs()) + (size * change_P).abs()
        motion.advance(params_P, step=20, num_steps=20, lr_sum=1.0)
        own_P = motion.carry_P
        # Each addition rounds the weights once and the anchor at most once.
        round_off = 2.0**-24 * (2 * len(events) + 1) * largest
        assert ((own_P.double() - expected_P).abs() <= round_off).all()


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(pushes=st.lists(st.floats(-2, 2, width=32), max_size=6))
def test_a_run_that_stands_still_has_no_own_motion_at_all(pushes: list[float]) -> None:
    """The anchor is rounded exactly as the weights are: what only was pushed has not moved by one bit."""
    generator = torch.Generator().manual_seed(0)
    params_P = torch.randn(NUM_ELEMENTS, generator=generator)
    motion = CarriedMotion(LAST_ONLY, params_P.clone(), torch.zeros(NUM_ELEMENTS))
    for weight in pushes:
        change_P = torch.randn(NUM_ELEMENTS, generator=generator)
        apply_(params_P, change_P, weight)
        motion.applied(change_P, weight)
    motion.carry_P.fill_(1.0)
    motion.advance(params_P, step=20, num_steps=20, lr_sum=1.0)
    assert not motion.carry_P.any()
