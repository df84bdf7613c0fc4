"""A hook with pushes: what is applied, what snapshots say, when it ends, and what a checkpoint keeps."""

from __future__ import annotations

from typing import Any

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig, parse_section
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.hook.rollback_memory import keeps_rollback_copy
from sidecast.trainer.pipe.messages import Applied, Prediction, Report, Snapshot
from tests.support.hook_harness import FakeCourier, FakePartition, hook_with
from tests.support.hook_harness import new_hook as new_jumping_hook

INTERVAL_STEPS = 10


def push_of(step: int, epoch: int) -> Prediction:
    """A push made from the snapshot of a step."""
    return Prediction(
        session_id="now",
        version=step // INTERVAL_STEPS,
        base_step=step,
        epoch=epoch,
        horizon_intervals=1,
        digest=7,
        relative_norm=0.01,
        nowcast_s=0.1,
        num_bytes=8,
    )


@pytest.fixture
def courier() -> FakeCourier:
    return FakeCourier()


@pytest.fixture
def partition() -> FakePartition:
    return FakePartition()


def new_hook(
    courier: FakeCourier, partition: FakePartition, *, step: int = 0, section: dict[str, Any] | None = None, **push: Any
) -> NowcastHook:
    config = parse_section(
        {
            **(section or {}),
            "policy": "push",
            "vote_interval_steps": 1,
            "vote_lag_steps": 0,
            "push": {"interval_steps": INTERVAL_STEPS, "start_step": 0, **push},
        }
    )
    return hook_with(config, courier, partition, step)


def snapshots(courier: FakeCourier) -> list[Snapshot]:
    return [message for message in courier.posted if isinstance(message, Snapshot)]


# Whole up to half an interval, then less by two thirds of a tenth a step: nothing would be left after two intervals.
@pytest.mark.parametrize(("late_steps", "weight"), [(1, 1.0), (5, 1.0), (8, 0.8), (9, 11 / 15)])
def test_a_push_weighs_by_its_age(
    courier: FakeCourier, partition: FakePartition, late_steps: int, weight: float
) -> None:
    hook = new_hook(courier, partition, step=INTERVAL_STEPS - 1)
    hook.observe(1.0)
    for step in range(INTERVAL_STEPS, INTERVAL_STEPS + late_steps):
        hook.after_step(step)
    courier.unread.append(push_of(INTERVAL_STEPS, 0))
    hook.after_step(INTERVAL_STEPS + late_steps)
    assert partition.weights.tolist() == pytest.approx([weight, weight])
    assert hook.epoch == 1


def test_a_push_of_the_interval_before_is_never_applied(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition, step=2 * INTERVAL_STEPS - 1)
    hook.observe(1.0)
    hook.after_step(2 * INTERVAL_STEPS)
    courier.unread.append(push_of(INTERVAL_STEPS, 0))
    hook.after_step(2 * INTERVAL_STEPS + 1)
    assert partition.weights.tolist() == [0.0, 0.0]
    assert hook.totals.num_rejected == 1


def test_snapshots_say_what_is_to_be_taken_out_of_the_motion(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition)
    for step in range(1, 2 * INTERVAL_STEPS + 1):
        if step == INTERVAL_STEPS + 2:
            courier.unread.append(push_of(INTERVAL_STEPS, 0))
        hook.observe(1.0)
        partition.rates = (0.25, 0.75) if step > INTERVAL_STEPS else (0.25, 0.25)
        hook.after_step(step)
    first, second = snapshots(courier)
    assert (first.epoch, first.applied, first.learning_rate_sum) == (0, None, 2.5)
    assert (second.epoch, second.applied, second.learning_rate_sum) == (1, Applied(version=1, weight=1.0), 7.5)
    assert [message.outcome for message in courier.posted if isinstance(message, Report)] == ["applied"]


def test_a_rise_of_the_loss_ends_pushes_and_snapshots_and_says_so(
    courier: FakeCourier, partition: FakePartition, caplog: pytest.LogCaptureFixture
) -> None:
    hook = new_hook(courier, partition)
    told: list[NowcastEvent] = []
    hook.add_listener(told.append)
    for step in range(1, 400):
        hook.observe(1.0 + 0.01 * (step % 2) + max(0.0, 0.01 * (step - 300)))
        hook.after_step(step)
    suspended = [event for event in told if event.kind == "suspended"]
    assert len(suspended) == 1
    assert suspended[0].step > 300
    assert "rose" in str(suspended[0].details["reason"])
    assert "no more pushes" in caplog.text
    assert hook.summary()["suspended"]
    num_snapshots = len(snapshots(courier))
    courier.unread.append(push_of(390, hook.epoch))
    for step in range(400, 400 + 2 * INTERVAL_STEPS):
        hook.after_step(step)
    assert len(snapshots(courier)) == num_snapshots
    assert partition.weights.tolist() == [0.0, 0.0]


def test_without_a_gain_snapshots_go_on_whatever_the_loss_does_or_unseen(
    courier: FakeCourier, partition: FakePartition, caplog: pytest.LogCaptureFixture
) -> None:
    hook = new_hook(courier, partition, gain=0)
    for step in range(1, 400):
        if step > 100:
            hook.observe(1.0 + 0.01 * (step % 2) + max(0.0, 0.01 * (step - 300)))
        hook.after_step(step)
    assert [snapshot.step for snapshot in snapshots(courier)] == list(range(INTERVAL_STEPS, 400, INTERVAL_STEPS))
    assert not hook.summary()["suspended"]
    assert caplog.text == ""


@pytest.mark.parametrize(("num_seen", "num_pushes"), [(0, 0), (INTERVAL_STEPS, 1), (INTERVAL_STEPS + 1, 2)])
def test_no_push_is_applied_unseen(
    courier: FakeCourier, partition: FakePartition, caplog: pytest.LogCaptureFixture, num_seen: int, num_pushes: int
) -> None:
    """Without losses, or once they come no more, nothing would end pushes that harm; it is said once."""
    hook = new_hook(courier, partition)
    for step in range(1, 5 * INTERVAL_STEPS):
        if step % INTERVAL_STEPS == 1 and step > 1:
            courier.unread.append(push_of(step - 1, hook.epoch))
        if step <= num_seen:
            hook.observe(1.0)
        hook.after_step(step)
    assert partition.weights.tolist() == [num_pushes, num_pushes]
    assert caplog.text.count("no push is applied as long as no loss is seen") == 1


def test_a_checkpoint_keeps_sums_guard_and_what_was_applied(
    courier: FakeCourier, partition: FakePartition, caplog: pytest.LogCaptureFixture
) -> None:
    hook = new_hook(courier, partition)
    for step in range(1, INTERVAL_STEPS + 3):
        if step == INTERVAL_STEPS + 1:
            courier.unread.append(push_of(INTERVAL_STEPS, 0))
        hook.observe(1.0)
        hook.after_step(step)
    state = hook.state_dict()
    later = new_hook(FakeCourier(), partition)
    later.resume(state, INTERVAL_STEPS + 2, "run")
    assert later.state_dict() == state
    assert state["push"]["applied"] == {"version": 1, "weight": 1.0}
    assert (later.epoch, later.step) == (1, INTERVAL_STEPS + 2)
    # What was seen of the losses is known, before the first vote.
    for step in range(INTERVAL_STEPS + 3, 2 * INTERVAL_STEPS + 1):
        later.after_step(step)
    assert "no loss is seen" not in caplog.text


class FakeStream:
    """Copies that are begun and not over."""

    def record_event(self) -> FakeStream:
        return self

    def synchronize(self) -> None:
        pass


def test_a_snapshot_of_before_a_loaded_checkpoint_is_none_of_after(
    courier: FakeCourier, partition: FakePartition, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = new_hook(courier, partition, step=INTERVAL_STEPS - 1)
    monkeypatch.setattr(hook._stager, "_stream", FakeStream())
    hook.after_step(INTERVAL_STEPS)
    assert snapshots(courier) == []
    hook.resume(None, 3, "run")
    num_posted = len(snapshots(courier))
    hook.after_step(4)
    assert len(snapshots(courier)) == num_posted


def test_a_checkpoint_of_the_other_policy_is_a_beginning(
    courier: FakeCourier, partition: FakePartition, caplog: pytest.LogCaptureFixture
) -> None:
    pushing, jumping = new_hook(courier, partition), new_jumping_hook(FakeCourier(), partition, step=0)
    for step in range(1, 5):
        for hook in (pushing, jumping):
            hook.observe(1.0)
            hook.after_step(step)
    of_pushes, of_jumps = pushing.state_dict(), jumping.state_dict()
    jumping.resume(of_pushes, 4, "run")
    pushing.resume(of_jumps, 4, "run")
    assert jumping.state_dict()["trend"] == []
    assert pushing.state_dict()["push"]["learning_rate_sum"] == 0.0
    assert "the checkpoint is of a run with pushes; jumps begin anew" in caplog.text
    assert "the checkpoint is of a run with jumps; pushes begin anew" in caplog.text


def test_no_push_is_applied_by_the_vote_that_brings_the_alarm(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition, step=INTERVAL_STEPS - 1)
    hook.observe(1.0)
    hook.after_step(INTERVAL_STEPS)
    courier.unread.append(push_of(INTERVAL_STEPS, 0))
    hook.observe(float("nan"))
    hook.after_step(INTERVAL_STEPS + 1)
    assert hook.summary()["suspended"]
    assert partition.weights.tolist() == [0.0, 0.0]


def alarmed(courier: FakeCourier, partition: FakePartition, **section: Any) -> NowcastHook:
    """A hook whose guard has ended its pushes."""
    hook = new_hook(courier, partition, section=section)
    for loss in (1.0, float("nan")):
        hook.observe(loss)
        hook.after_step(hook.step + 1)
    hook.after_step(hook.step + 1)
    assert hook.summary()["suspended"]
    return hook


@pytest.mark.parametrize(("read_outs", "is_staged"), [([], False), (["ema5"], True)])
def test_read_outs_see_states_after_an_alarm_too(
    courier: FakeCourier, partition: FakePartition, read_outs: list[str], is_staged: bool
) -> None:
    hook = alarmed(courier, partition, read_outs=read_outs)
    for step in range(hook.step + 1, INTERVAL_STEPS + 1):
        hook.after_step(step)
    assert [snapshot.step for snapshot in snapshots(courier)] == [INTERVAL_STEPS] * is_staged


def test_a_run_without_pushes_knows_no_alarm_of_an_earlier_one(courier: FakeCourier, partition: FakePartition) -> None:
    state = alarmed(courier, partition).state_dict()
    later = new_hook(FakeCourier(), partition, gain=0.0)
    later.resume(state, 3, "run")
    assert not later.summary()["suspended"]


def test_a_run_with_pushes_keeps_no_rollback_copy_and_one_staging_slot() -> None:
    config = NowcasterConfig(policy="push")
    assert not keeps_rollback_copy(config)
    assert config.num_slots == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": "push", "merge": "replace"}, "nowcaster.merge is 'replace'; allowed: nothing with policy 'push'"),
        ({"policy": "push", "period_steps": 500}, "nowcaster.period_steps is 500; allowed: nothing"),
        ({"policy": "push", "wire_dtype": "bf16_delta"}, "nowcaster.wire_dtype is 'bf16_delta'; allowed: 'fp32'"),
        ({"push": {"gain": 2.0}}, "allowed: nothing with policy 'jump'"),
        ({"policy": "push", "push": {"gain": -1.0}}, "push.gain is -1.0"),
        ({"policy": "push", "push": {"gane": 1.0}}, "nowcaster.push has an unknown key 'gane'"),
        ({"policy": "leap"}, "nowcaster.policy is 'leap'; allowed: 'jump', 'push'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_section(section)
