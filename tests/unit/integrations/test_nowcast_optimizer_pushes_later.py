"""Pushes in one process that come later than their snapshot, from a thread, or after a checkpoint was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from sidecast.errors import ConfigError
from tests.support.pushed_training import (
    INTERVAL_STEPS,
    Training,
    assert_equal,
    flat,
    held_up,
    pushed,
    train_settled,
)


@pytest.mark.parametrize(("late_steps", "weight"), [(1, 1.0), (5, 1.0), (8, 0.8), (9, 11 / 15)])
def test_a_late_push_is_damped_as_with_a_service(late_steps: int, weight: float) -> None:
    plain, ours = pushed(asynchronous=True), pushed(asynchronous=True)
    details: list[Mapping[str, Any]] = []
    ours.optimizer.hook.add_listener(lambda event: details.append(event.details) if event.kind == "applied" else None)
    for training in (plain, ours):
        train_settled(training, 2 * INTERVAL_STEPS - 1)
    with held_up(ours):
        ours.train(late_steps)
    assert ours.steps_of("applied") == []
    with held_up(plain):
        plain.train(late_steps + 1)
        ours.train(1)
        assert [each["staleness_steps"] for each in details] == [late_steps]
        assert details[0]["weight"] == pytest.approx(weight)
        push_P = ours.optimizer._messenger._push_P
        assert float(push_P.norm()) > 0.01
        torch.testing.assert_close(flat(ours.model) - flat(plain.model), push_P * weight, rtol=0, atol=1e-6)
    for training in (plain, ours):
        training.optimizer.hook.close()


def test_a_thread_that_is_an_interval_late_costs_pushes_and_no_motion() -> None:
    ours = pushed(asynchronous=True)
    messenger = ours.optimizer._messenger
    train_settled(ours, 2 * INTERVAL_STEPS - 1)
    with held_up(ours):
        ours.train(INTERVAL_STEPS + 2)
    train_settled(ours, INTERVAL_STEPS - 2)
    assert ours.steps_of("applied") == []
    assert ours.steps_of("dropped") == [30]
    # The interval from 20 to 40 is known all the same.
    assert messenger._base.step == 20
    train_settled(ours, 2)
    assert messenger._base.step == 40
    assert ours.steps_of("applied") == [41]
    ours.optimizer.hook.close()


def test_a_push_that_is_under_way_is_saved() -> None:
    first, second = pushed(asynchronous=True), pushed(asynchronous=True)
    train_settled(first, 2 * INTERVAL_STEPS - 1)
    with held_up(first):
        first.train(3)
    second.load(first.saved(), first.num_steps)
    for training in (first, second):
        train_settled(training, 1)
        assert training.steps_of("applied") == [2 * INTERVAL_STEPS + 3]
    assert_equal(flat(second.model), flat(first.model))
    # And it is taken out of the next interval.
    for training in (first, second):
        train_settled(training, INTERVAL_STEPS - 3)
        assert training.optimizer._messenger._base.step == 3 * INTERVAL_STEPS
    assert_equal(second.optimizer._messenger._motion.carry_P, first.optimizer._messenger._motion.carry_P)
    for training in (first, second):
        training.optimizer.hook.close()


@pytest.mark.parametrize("save_step", [0, 1, 19, 20, 27, 50, 53, 99, 100, 104])
@pytest.mark.parametrize("is_returning", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(save_step: int, is_returning: bool) -> None:
    num_steps, spoil_from = 13 * INTERVAL_STEPS, 10 * INTERVAL_STEPS
    straight, first = pushed(), pushed()
    straight.train(num_steps, spoil_from)
    first.train(save_step, spoil_from)
    file = first.saved()
    second = first if is_returning else pushed()
    if is_returning:
        second.train(2 * INTERVAL_STEPS + 7)
    second.load(file, save_step)
    del second.events[:], second.losses[:]
    second.train(num_steps - save_step, spoil_from)
    for kind in ("applied", "suspended", "dropped"):
        assert second.steps_of(kind) == [step for step in straight.steps_of(kind) if step > save_step]
    assert second.losses == straight.losses[save_step:]
    assert_equal(flat(second.model), flat(straight.model))
    assert_equal(second.inner.state_dict(), straight.inner.state_dict())
    messengers = [each.optimizer._messenger for each in (second, straight)]
    assert_equal(*(each._motion.carry_P for each in messengers))


def test_the_inner_optimizer_can_load_what_was_saved_and_the_other_way_round() -> None:
    ours, plain = pushed(), Training()
    ours.train(33)
    plain.load(ours.saved(), 33)
    assert_equal(plain.inner.state_dict(), ours.inner.state_dict())
    again = pushed()
    again.load(plain.saved(), 33)
    # Counted from 0, as the steps are not in an optimizer's own state.
    again.train(2 * INTERVAL_STEPS)
    assert again.steps_of("applied") == [2 * INTERVAL_STEPS]


def test_a_checkpoint_of_the_other_policy_is_a_beginning(caplog: pytest.LogCaptureFixture) -> None:
    jumps = {"context_len": 2, "period_steps": 20, "max_relative_norm": 1e3}
    pushing, jumping = pushed(), Training(**jumps)
    for training in (pushing, jumping):
        training.train(2 * INTERVAL_STEPS + 3)
    assert jumping.optimizer.hook.is_on_probation
    of_pushes, of_jumps = pushing.saved(), jumping.saved()
    pushing.load(of_jumps, 23)
    assert "the checkpoint is of a run with jumps; pushes begin anew" in caplog.text
    jumping.load(of_pushes, 23)
    assert "the checkpoint is of a run with pushes; jumps begin anew" in caplog.text
    assert not jumping.optimizer.hook.is_on_probation
    assert jumping.optimizer.state_dict()["sidecast"]["window"]["states"] == []
    start_P = flat(pushing.model)
    for training in (pushing, jumping):
        del training.events[:]
    # The first interval begins in between, and only its own way is in the average.
    pushing.train(INTERVAL_STEPS - 4)
    way_P = flat(pushing.model) - start_P
    before_P = flat(pushing.model)
    pushing.train(1)
    way_P += flat(pushing.model) - before_P - pushing.optimizer._messenger._push_P
    average_P = pushing.optimizer._messenger._motion.carry_P
    assert float(torch.cosine_similarity(way_P, average_P, dim=0)) == pytest.approx(1.0)
    assert pushing.steps_of("applied") == [30]
    jumping.train(2 * INTERVAL_STEPS)
    assert jumping.steps_of("applied") == [40]


def test_a_checkpoint_of_another_model_is_refused() -> None:
    ours, other = pushed(), pushed(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)))
    for training in (ours, other):
        training.train(3)
    with pytest.raises(ConfigError, match="pushes are of 58 parameters; allowed: 49, as this model has"):
        ours.optimizer.load_state_dict(other.optimizer.state_dict())


def test_a_closed_hook_leaves_a_run_that_can_be_saved_and_loaded() -> None:
    closed, ours, plain = pushed(), pushed(), Training()
    closed.train(25)
    closed.optimizer.hook.close()
    closed.train(2)
    file = closed.saved()
    plain.load(file, 27)
    file.seek(0)
    ours.load(file, 27)
    file.seek(0)
    closed.load(file, 27)
    for training in (closed, ours, plain):
        training.train(2)
    assert_equal(flat(closed.model), flat(plain.model))
    # Its own count goes on.
    assert ours.optimizer.hook.step == 29
