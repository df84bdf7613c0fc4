"""Nowcasting around torch optimizers in one process: harmless, exact, undone bit for bit, and resumed bit for bit."""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.predictors.base import History
from sidecast.predictors.linear import LinearPredictor
from sidecast.trainer.integrations.optimizer import NowcastOptimizer
from sidecast.trainer.partitions.rollback import RollbackError
from tests.support.limits import HANG_S
from tests.support.optimizer_training import CONTEXT_LEN, NEVER, OPTIMIZERS, PERIOD_STEPS, Training, assert_equal


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_applied_changes_nothing(name: str) -> None:
    plain, nowcasted = Training(name, is_nowcasted=False), Training(name, max_relative_norm=NEVER)
    for training in (plain, nowcasted):
        training.train(2 * PERIOD_STEPS + 3)
    assert len(nowcasted.steps_of("staged")) == 2 * CONTEXT_LEN
    assert nowcasted.optimizer.hook.totals.num_failed == 2
    assert nowcasted.losses == plain.losses
    assert_equal(nowcasted.inner_state(), plain.inner_state())


def test_a_jump_replaces_the_parameters_by_the_prediction() -> None:
    plain, nowcasted = Training(is_nowcasted=False), Training(predictor="linear", horizon={"max": 3})
    states = []
    for _ in range(CONTEXT_LEN):
        plain.train(PERIOD_STEPS // CONTEXT_LEN)
        states.append(plain.weights())
    nowcasted.train(PERIOD_STEPS)
    assert nowcasted.steps_of("applied") == [PERIOD_STEPS]
    relative = torch.stack(states) - states[-1]
    centred = torch.arange(CONTEXT_LEN) - (CONTEXT_LEN - 1) / 2
    expected = states[-1] + 3 * (centred / centred.square().sum()) @ relative
    torch.testing.assert_close(nowcasted.weights(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_jump_that_does_not_pay_is_undone_bit_for_bit(name: str) -> None:
    before, nowcasted = Training(name, is_nowcasted=False), Training(name)
    before.train(PERIOD_STEPS)
    nowcasted.train(PERIOD_STEPS)
    assert not torch.equal(nowcasted.weights(), before.weights())
    nowcasted.train(1, spoil_from=PERIOD_STEPS + 1)
    assert nowcasted.steps_of("rolled_back") == [PERIOD_STEPS + 1]
    assert_equal(nowcasted.weights(), before.weights())
    assert_equal(nowcasted.inner_state(), before.inner_state())


@pytest.mark.parametrize("save_step", [PERIOD_STEPS + 3, 2 * PERIOD_STEPS - 2])
def test_a_resumed_run_equals_the_uninterrupted_one(save_step: int) -> None:
    # Saved in the middle of a probation that ends badly, or of a window.
    num_steps, spoil_from = 4 * PERIOD_STEPS, PERIOD_STEPS + 5
    straight, first, second = (
        Training(max_steps=num_steps),
        Training(max_steps=num_steps),
        Training(max_steps=num_steps),
    )
    straight.train(num_steps, spoil_from if save_step < spoil_from else None)
    first.train(save_step)
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.num_steps = save_step
    second.train(num_steps - save_step, spoil_from if save_step < spoil_from else None)
    assert [event for event in straight.events if event[1] > save_step] == second.events
    assert straight.steps_of("applied") == first.steps_of("applied") + second.steps_of("applied")
    torch.testing.assert_close(straight.losses[save_step:], second.losses, rtol=0, atol=0, equal_nan=True)
    assert_equal(second.weights(), straight.weights())


@pytest.mark.parametrize("access", ["save", "load"])
def test_a_rollback_copy_whose_pages_are_gone_costs_a_checkpoint_no_more_than_the_probation(
    access: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Training(), Training()
    first.train(PERIOD_STEPS + 3)

    def refuse(*_: Any, **__: Any) -> None:
        raise RollbackError("no pages")

    failing = first if access == "save" else second
    second.model.load_state_dict(first.model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(failing.optimizer.hook._applier.rollback_copy, "_require_pages", refuse)
        saved = deepcopy(first.optimizer.state_dict())
        second.optimizer.load_state_dict(saved)
    assert (saved["sidecast"]["rollback"] is None) == (access == "save")
    assert ("cannot undo the jump on probation: no pages" in caplog.text) == (access == "save")
    assert first.optimizer.hook.is_on_probation
    assert not second.optimizer.hook.is_on_probation
    assert "the jump on probation cannot be undone: " in caplog.text
    second.num_steps = PERIOD_STEPS + 3
    second.train(1, spoil_from=PERIOD_STEPS + 4)
    assert second.events == []
    second.train(PERIOD_STEPS - 4)
    assert second.steps_of("applied") == [2 * PERIOD_STEPS]


def test_a_run_that_goes_back_to_its_checkpoint_equals_the_uninterrupted_one() -> None:
    straight, returning = Training(), Training()
    straight.train(3 * PERIOD_STEPS)
    # Saved with two states in the window, and loaded with three: whose places are all needed again.
    save_step = PERIOD_STEPS + 12
    returning.train(save_step)
    file = io.BytesIO()
    torch.save({"model": returning.model.state_dict(), "optimizer": returning.optimizer.state_dict()}, file)
    returning.train(5)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    returning.model.load_state_dict(saved["model"])
    returning.optimizer.load_state_dict(saved["optimizer"])
    returning.num_steps = save_step
    returning.train(3 * PERIOD_STEPS - save_step)
    assert returning.steps_of("applied") == straight.steps_of("applied")
    assert returning.steps_of("dropped") == []
    assert_equal(returning.weights(), straight.weights())


def test_the_inner_optimizer_can_load_what_was_saved_and_the_other_way_round() -> None:
    nowcasted, plain = Training(), Training(is_nowcasted=False)
    nowcasted.train(PERIOD_STEPS + 1)
    saved = deepcopy(nowcasted.optimizer.state_dict())
    plain.optimizer.load_state_dict(saved)
    assert_equal(plain.inner_state(), nowcasted.inner_state())
    nowcasted.optimizer.load_state_dict(plain.inner_state())
    nowcasted.train(PERIOD_STEPS)
    assert nowcasted.steps_of("applied") == [PERIOD_STEPS, PERIOD_STEPS]


@pytest.mark.parametrize("settings", [{"context_len": 2}, {"period_steps": 2 * PERIOD_STEPS}])
def test_a_window_of_other_settings_is_not_gone_on_with(settings: dict[str, Any]) -> None:
    first, second = Training(), Training(**settings)
    first.train(PERIOD_STEPS - 1)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(deepcopy(first.optimizer.state_dict()))
    assert second.optimizer.state_dict()["sidecast"]["window"]["states"] == []
    second.num_steps = PERIOD_STEPS - 1
    second.train(1)
    assert second.steps_of("applied") == []


def test_a_window_of_another_model_is_refused() -> None:
    first = Training()
    first.train(PERIOD_STEPS - 1)
    saved = deepcopy(first.optimizer.state_dict())
    window = saved["sidecast"]["window"]
    window["states"] = [state[:-1] for state in window["states"]]
    with pytest.raises(ConfigError, match="window is of 25 parameters; allowed: 26, as this model has"):
        Training().optimizer.load_state_dict(saved)


def test_a_closed_hook_leaves_a_run_that_can_be_saved_and_loaded() -> None:
    closed, other = Training(), Training()
    closed.train(PERIOD_STEPS - 1)
    closed.optimizer.hook.close()
    weights, state = deepcopy(closed.model.state_dict()), deepcopy(closed.optimizer.state_dict())
    for training in (closed, other):
        training.model.load_state_dict(weights)
        training.optimizer.load_state_dict(deepcopy(state))
        training.num_steps = PERIOD_STEPS - 1
        training.train(1)
    assert other.optimizer.hook.step == PERIOD_STEPS
    assert_equal(other.weights(), closed.weights())


class GatedPredictor(LinearPredictor):
    """Predicts once it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        assert self.gate.wait(HANG_S)
        super().predict(history, horizon_intervals, out)


def test_training_goes_on_while_a_thread_predicts() -> None:
    predictor = GatedPredictor()
    training = Training(predictor=predictor, asynchronous=True)
    training.train(PERIOD_STEPS + 2)
    assert training.steps_of("applied") == []
    predictor.gate.set()
    # The thread has one worker: what comes after the nowcast is done once the nowcast is.
    training.optimizer._messenger._thread.submit(int).result()
    training.train(1)
    assert training.steps_of("applied") == [PERIOD_STEPS + 3]
    training.optimizer.hook.close()


class FaultyPredictor(LinearPredictor):
    """Fails as somebody else's predictor might."""

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        raise RuntimeError("out of ideas")


def test_a_predictor_that_fails_costs_its_nowcast_only(caplog: pytest.LogCaptureFixture) -> None:
    plain, nowcasted = Training(is_nowcasted=False), Training(predictor=FaultyPredictor())
    for training in (plain, nowcasted):
        training.train(PERIOD_STEPS + 1)
    assert nowcasted.losses == plain.losses
    assert nowcasted.optimizer.hook.totals.num_failed == 1
    assert "out of ideas" in caplog.text


def test_schedulers_and_gradient_scalers_take_it_for_an_optimizer() -> None:
    training = Training(max_relative_norm=NEVER)
    optimizer = training.optimizer
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    rates = []
    for gradient in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        loss = training.model(torch.ones(1, 3)).sum() * gradient
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    # The step with infinite gradients was not made, so it does not count either.
    assert optimizer.hook.step == 2
    assert rates[0] < rates[1] < rates[2]


def test_torchs_own_hooks_reach_the_inner_optimizer() -> None:
    training = Training()
    called = []
    training.optimizer.register_step_post_hook(lambda *_: called.append(True))
    training.train(2)
    assert called == [True, True]


@pytest.mark.parametrize("hidden_from", [0, PERIOD_STEPS + 2])
def test_no_jump_is_kept_whose_losses_are_hidden(hidden_from: int, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(period_steps=PERIOD_STEPS)
    observe = training.optimizer.observe
    training.optimizer.observe = lambda loss: observe(loss) if training.num_steps <= hidden_from else None
    training.train(5 * PERIOD_STEPS)
    is_late = hidden_from > 0
    assert training.steps_of("applied") == ([PERIOD_STEPS] if is_late else [])
    assert training.steps_of("rolled_back") == ([PERIOD_STEPS + PERIOD_STEPS // 2] if is_late else [])
    assert training.steps_of("accepted") == []
    # Five base steps, one warning of each kind.
    assert caplog.text.count("no jump is applied as long as too few losses are seen") == 1
    assert caplog.text.count("is undone: too few losses to judge by") == (1 if is_late else 0)
    summary = training.optimizer.hook.summary()
    assert summary["verdict_losses"] == ([(11, 0)] if is_late else [])
    assert summary["num_losses"] == hidden_from


@pytest.mark.parametrize(("period_steps", "undone_step"), [(8, 15), (10, 17), (20, 30)])
def test_the_shortest_probations_undo_a_harmful_jump(period_steps: int, undone_step: int) -> None:
    training = Training(period_steps=period_steps, context_len=2, max_relative_norm=1e3)
    training.train(period_steps)
    for _ in range(period_steps):
        training.optimizer.observe(1000.0)
        training.train(1)
    assert training.steps_of("applied")[0] == period_steps
    assert training.steps_of("rolled_back") == [undone_step]


@pytest.mark.parametrize(
    "duplicate", [copy, deepcopy, pickle.dumps, lambda optimizer: torch.save(optimizer, io.BytesIO())]
)
def test_it_is_saved_by_its_state_and_not_whole(duplicate: Callable[[Any], Any]) -> None:
    training = Training()
    with pytest.raises(ConfigError, match=r"cannot be pickled or copied; save its state_dict\(\)"):
        duplicate(training.optimizer)
    training.train(1)


def test_what_is_assigned_is_the_inner_optimizers() -> None:
    training = Training()
    training.train(1)
    inner = training.optimizer.optimizer
    groups, state = list(inner.param_groups), dict(inner.state)
    training.optimizer.param_groups, training.optimizer.state = groups, state
    assert inner.param_groups is training.optimizer.param_groups is groups
    assert inner.state is training.optimizer.state is state


class TwoModes(torch.optim.SGD):
    """Evaluates other weights than it trains, as schedule-free optimizers do."""

    mode = ""

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_modes_are_the_inner_optimizers() -> None:
    model = nn.Linear(2, 1)
    inner = TwoModes(model.parameters(), lr=0.1)
    optimizer: Any = NowcastOptimizer(inner, model)
    optimizer.eval()
    assert inner.mode == "eval"
    optimizer.train()
    assert inner.mode == "train"
    # Libraries ask by the name whether there are modes.
    assert not hasattr(Training().optimizer, "train")
    assert not hasattr(Training().optimizer, "eval")


class FullyShardedDataParallel(nn.Module):
    """Named as torch's wrapper is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def refused(model: nn.Module, words: str, parameters: Any = None, **settings: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    with pytest.raises(ConfigError, match=words):
        NowcastOptimizer(optimizer, model, **settings)


def test_refusals() -> None:
    model = nn.Linear(2, 2)
    refused(model, "no setting 'endpoint'; allowed: context_len", endpoint="host:1")
    refused(model, "predictor is 'oracle'; allowed: average", predictor="oracle")
    refused(model, "period_steps is 7; allowed: a multiple of context_len", period_steps=7)
    refused(model, "probation_steps is 6; allowed: 0", period_steps=20, probation_steps=6)
    refused(model, "needs a weights file", predictor="nino")
    refused(nn.Linear(2, 2).bfloat16(), "'weight' is torch.bfloat16 and has no fp32 master")
    refused(nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last), "'weight' is not contiguous")
    refused(FullyShardedDataParallel(), "the model is sharded")
    refused(model, r"parameter of shape \(3, 3\) that the model does not have", [nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(ConfigError, match="cannot take further parameters"):
        Training().optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("is_said", [True, False])
def test_a_rollback_copy_of_another_jump_is_not_taken(is_said: bool, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Training(), Training()
    first.train(PERIOD_STEPS + 3)
    saved = deepcopy(first.optimizer.state_dict())
    run_id, epoch = saved["sidecast"]["rollback"].pop("of")
    if is_said:
        saved["sidecast"]["rollback"]["of"] = [run_id, epoch + 1]
    second.optimizer.load_state_dict(saved)
    assert not second.optimizer.hook.is_on_probation
    assert "cannot be undone: the copy is of another jump" in caplog.text


def memory_files() -> int:
    """Descriptors of shared memory that this process holds."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += "memfd:" in str(path.readlink())
    return found


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_what_is_done_with_leaves_no_memory(end: str) -> None:
    gc.collect()
    before = memory_files()
    for _ in range(3):
        training = Training()
        training.train(PERIOD_STEPS)
        assert memory_files() > before
        if end == "closed":
            training.optimizer.hook.close()
        gone = weakref.ref(training.model)
        del training
        gc.collect()
        assert gone() is None
        assert memory_files() == before
