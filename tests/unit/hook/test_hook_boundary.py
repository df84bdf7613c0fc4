"""What the hook does with messages and modes that the two-rank runs do not bring about; one rank, nothing real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.messenger import ForHook
from sidecast.trainer.hook.slots import SlotState
from sidecast.trainer.partitions import RollbackCopy
from sidecast.trainer.pipe.messages import Committed, Connected, Disconnected, Failed, Report, Sent, Stats
from tests.support.hook_harness import PREDICTION, FakeCourier, FakePartition, OneVoter, new_hook


@pytest.mark.parametrize(("session_id", "weight"), [("now", 0.94), ("before the checkpoint was loaded", 0.0)])
def test_a_prediction_of_an_earlier_session_is_given_back_unapplied(session_id: str, weight: float) -> None:
    courier, partition = FakeCourier(), FakePartition()
    hook = new_hook(courier, partition, step=22)
    courier.unread.append(replace(PREDICTION, session_id=session_id))
    hook.after_step(23)
    assert partition.weights.tolist() == pytest.approx([weight, weight])
    assert courier.num_released == 1


@pytest.mark.parametrize(("is_suspended", "num_waits"), [(False, 1), (True, 0)])
def test_sync_mode_waits_only_for_what_it_would_apply(is_suspended: bool, num_waits: int) -> None:
    courier = FakeCourier()
    hook = new_hook(courier, FakePartition(), step=19, mode="sync")
    hook._policy._probation.is_suspended = is_suspended  # type: ignore[attr-defined]
    hook.after_step(20)
    assert len(courier.waited_s) == num_waits


@pytest.mark.parametrize(("later", "num_waits"), [([], 0), ([Connected(session_id="now")], 1)])
def test_sync_mode_does_not_wait_for_a_service_that_is_known_to_be_gone(later: list[ForHook], num_waits: int) -> None:
    courier = FakeCourier()
    hook = new_hook(courier, FakePartition(), step=18, mode="sync")
    courier.unread += [Disconnected(reason="gone"), *later]
    hook.after_step(19)
    hook.after_step(20)
    assert len(courier.waited_s) == num_waits


SENT = Sent(slot=0, step=0, seconds=0.5, num_bytes=8, reason="")


class BusyCourier(FakeCourier):
    """Needs its slot until it has said that it has sent it; each wait for a message takes ``message_s``.

    Args:
        messages: What it says, a wait each; it is silent after.
        message_s: On its own clock.
    """

    after_post = SlotState.POSTED

    def __init__(self, messages: list[ForHook], message_s: float = 4.0) -> None:
        super().__init__()
        self.now_s = 100.0
        self.slots[0].state = SlotState.POSTED
        self._messages = messages
        self._message_s = message_s

    def clock(self) -> float:
        return self.now_s

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        if timeout_s == 0:
            return
        self.waited_s.append(timeout_s)
        assert len(self.waited_s) < 20
        self.now_s += min(timeout_s, self._message_s)
        if self._messages and timeout_s >= self._message_s:
            message = self._messages.pop(0)
            if isinstance(message, Sent):
                self.slots[message.slot].free()
            yield message


def busy_hook(courier: BusyCourier, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> NowcastHook:
    clock = SimpleNamespace(perf_counter=courier.clock, monotonic=courier.clock)
    for module in ("boundary", "inbox", "staging"):
        monkeypatch.setattr(f"sidecast.trainer.hook.{module}.time", clock)
    return new_hook(courier, FakePartition(), step=9, sync_deadline_s=10.0, **settings)


def test_sync_mode_waits_for_a_slot_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([Committed(step=0), SENT])
    hook = busy_hook(courier, monkeypatch, mode="sync")
    hook.after_step(10)
    assert (hook.totals.num_staged, hook.totals.num_dropped) == (1, 0)
    assert courier.waited_s == [10.0, 6.0]
    assert hook.totals.blocked_s == 8.0


def test_async_mode_never_waits_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([SENT])
    hook = busy_hook(courier, monkeypatch)
    hook.after_step(10)
    assert (hook.totals.num_staged, hook.totals.num_dropped) == (0, 1)
    assert courier.waited_s == []


def test_a_courier_that_stands_still_costs_sync_mode_its_deadline_once(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([])
    hook = busy_hook(courier, monkeypatch, mode="sync")
    hook.after_step(10)
    # Of the next window: the rest of the first one is of no use.
    hook.after_step(30)
    assert hook.totals.num_dropped == 2
    assert hook.totals.blocked_s == 10.0
    # It has sent after all, and is waited for again.
    courier._messages = [SENT]
    courier.slots[0].free()
    hook.after_step(50)
    hook.after_step(70)
    assert (hook.totals.num_staged, hook.totals.num_dropped) == (2, 2)


def test_a_base_step_waits_for_its_slot_and_its_prediction_until_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([SENT])
    hook = busy_hook(courier, monkeypatch, mode="sync")
    hook.after_step(20)
    assert hook.totals.num_staged == 1
    # The first for the slot, the others for the prediction.
    assert courier.waited_s == [10.0, 6.0, 2.0]
    assert hook.totals.blocked_s == 10.0


def test_a_courier_that_stands_still_after_a_base_step_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([])
    courier.slots[0].free()
    hook = busy_hook(courier, monkeypatch, mode="sync")
    hook.after_step(20)
    assert (hook.totals.num_staged, hook.totals.blocked_s) == (1, 10.0)
    hook.after_step(30)
    # The base of another window.
    hook.after_step(60)
    assert (hook.totals.num_dropped, hook.totals.blocked_s) == (2, 10.0)


def test_a_slow_service_is_waited_for_at_every_base_step(monkeypatch: pytest.MonkeyPatch) -> None:
    courier = BusyCourier([SENT])
    courier.slots[0].free()
    hook = busy_hook(courier, monkeypatch, mode="sync")
    hook.after_step(20)
    hook.after_step(40)
    assert (hook.totals.num_staged, hook.totals.num_dropped) == (2, 0)
    assert hook.totals.blocked_s == 20.0


@pytest.mark.parametrize(
    ("is_linked", "is_suspended", "num_waits"), [(True, False, 1), (False, False, 0), (True, True, 0)]
)
def test_sync_mode_waits_for_no_slot_of_which_nothing_would_come(
    is_linked: bool, is_suspended: bool, num_waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    courier = BusyCourier([Disconnected(reason="gone"), SENT])
    hook = busy_hook(courier, monkeypatch, mode="sync", is_linked=is_linked)
    hook._policy._probation.is_suspended = is_suspended  # type: ignore[attr-defined]
    hook.after_step(10)
    assert len(courier.waited_s) == num_waits
    assert hook.totals.num_dropped == 1


def test_steps_that_move_nothing_for_ever_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    courier = FakeCourier()
    hook = new_hook(courier, FakePartition(), step=22)
    for _ in range(49):
        hook.after_skipped_step()
    hook.after_step(23)
    assert caplog.text == ""
    for _ in range(120):
        hook.after_skipped_step()
    assert caplog.text.count("50 optimizer steps in a row were skipped") == 1
    assert hook.summary()["num_skipped"] == 169
    (*_, stats) = [message for message in courier.posted if isinstance(message, Stats)]
    assert stats.totals.num_skipped == 149


def test_a_nowcast_that_was_never_made_is_failed_and_not_rejected() -> None:
    courier = FakeCourier()
    hook = new_hook(courier, FakePartition(), step=22)
    kinds: list[str] = []
    hook.add_listener(lambda event: kinds.append(event.kind))
    courier.unread.append(Failed(step=20, reason="none today"))
    hook.after_step(23)
    assert kinds == ["failed"]
    assert (hook.totals.num_failed, hook.totals.num_rejected) == (1, 0)


@pytest.mark.parametrize(
    ("step", "changes", "reported"),
    [
        (20, {}, []),
        (19, {}, ["rejected"]),
        (22, {"epoch": 1}, ["rejected"]),
        (22, {"run_id": "another"}, ["rejected"]),
        (22, {"state": None}, ["rejected"]),
    ],
)
def test_a_prediction_that_a_resume_leaves_of_use_is_not_rejected_but_applied_when_it_comes_again(
    step: int, changes: dict[str, Any], reported: list[str]
) -> None:
    courier, partition = FakeCourier(), FakePartition()
    hook = new_hook(courier, partition, step=21)
    state: Any = {**hook.state_dict(), "step": step, **changes}
    courier.unread.append(PREDICTION)
    hook._inbox.poll()
    hook.resume(state.get("state", state), step, "new", is_kept=True)
    assert courier.num_released == 1
    assert [message.outcome for message in courier.posted if isinstance(message, Report)] == reported
    courier.session_id = "later"
    if not reported:
        courier.unread.append(replace(PREDICTION, session_id="later"))
        hook.after_step(21)
        assert hook.totals.num_applied == 1
        assert partition.weights.tolist() == pytest.approx([0.98, 0.98])


BASE_STEP, JUMP_STEP = 20, 25


def jumped(partition: FakePartition, **settings: Any) -> tuple[list[float], list[str]]:
    """The weights after a jump of (1, 1), and the events: they were 1 at its base and 3 five steps later."""
    courier = FakeCourier()
    hook = new_hook(courier, partition, step=BASE_STEP - 1, **settings)
    kinds: list[str] = []
    hook.add_listener(lambda event: kinds.append(event.kind))
    partition.weights = torch.ones(2)
    partition.rates = (0.5,)
    hook.after_step(BASE_STEP)
    partition.weights = torch.full((2,), 3.0)
    partition.rates = (0.25,)
    courier.unread.append(PREDICTION)
    hook.after_step(JUMP_STEP)
    return partition.weights.tolist(), kinds


@pytest.mark.parametrize(
    ("merge", "weights"), [("age_weighted", [3.9, 3.9]), ("add", [4.0, 4.0]), ("replace", [2.0, 2.0])]
)
def test_how_a_jump_meets_what_training_did_since(merge: str, weights: list[float]) -> None:
    assert jumped(FakePartition(), merge=merge, during_decay="allow")[0] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("during_decay", "weights", "kind"),
    [("allow", [4.0, 4.0], "applied"), ("scale", [3.5, 3.5], "applied"), ("suspend", [3.0, 3.0], "rejected")],
)
def test_what_becomes_of_a_jump_while_the_learning_rate_decays(
    during_decay: str, weights: list[float], kind: str
) -> None:
    found, kinds = jumped(FakePartition(), merge="add", during_decay=during_decay)
    assert found == weights
    assert kind in kinds


def test_without_its_base_a_prediction_replaces_nothing() -> None:
    courier, partition = FakeCourier(), FakePartition()
    hook = new_hook(courier, partition, step=22, merge="replace")
    reasons: list[Any] = []
    hook.add_listener(lambda event: reasons.append((event.kind, event.details.get("reason"))))
    courier.unread.append(PREDICTION)
    hook.after_step(23)
    assert partition.weights.tolist() == [0.0, 0.0]
    assert ("rejected", "the base of step 20, which it would replace, is not held") in reasons


@pytest.mark.parametrize(("is_resumed", "weight", "kind"), [(False, 2.0, "applied"), (True, 1.0, "rejected")])
def test_a_base_from_before_a_checkpoint_was_loaded_is_not_replaced(is_resumed: bool, weight: float, kind: str) -> None:
    courier, partition = FakeCourier(), FakePartition()
    hook = new_hook(courier, partition, step=BASE_STEP - 1, merge="replace")
    kinds: list[str] = []
    hook.add_listener(lambda event: kinds.append(event.kind))
    partition.weights = torch.ones(2)
    hook.after_step(BASE_STEP)
    if is_resumed:
        hook.resume({**hook.state_dict(), "step": BASE_STEP}, BASE_STEP, "run", is_kept=True)
    courier.unread = [PREDICTION]
    hook.after_step(JUMP_STEP)
    assert partition.weights.tolist() == [weight, weight]
    assert kind in kinds


@pytest.mark.parametrize(("moments", "done"), [("keep", []), ("reset", ["reset"]), ("scale", [0.5])])
def test_what_a_jump_does_to_the_moments(moments: str, done: list[Any]) -> None:
    partition = FakePartition()
    jumped(partition, merge="add", moments=moments)
    assert partition.moments == done


def test_a_copy_that_turns_out_too_small_is_made_anew_at_the_next_snapshot() -> None:
    partition = FakePartition()
    config = NowcasterConfig(context_len=2, period_steps=20, vote_interval_steps=1)
    copy = RollbackCopy.allocate(4)
    hook = NowcastHook(config, partition, FakeCourier(), OneVoter(), step=9, run_id="r", rollback_copy=copy)  # type: ignore[arg-type]
    hook.after_step(10)
    made_anew = hook._applier.rollback_copy
    assert made_anew is not None
    assert made_anew.num_bytes == partition.rollback_bytes()
