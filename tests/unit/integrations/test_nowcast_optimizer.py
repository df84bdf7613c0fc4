"""Nowcasting around torch optimizers in one process: harmless, exact, undone bit for bit, and resumed bit for bit."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.predictors.base import History
from sidecast.predictors.linear import LinearPredictor
from sidecast.trainer.integrations.optimizer import NowcastOptimizer
from sidecast.trainer.partitions.rollback import RollbackError

PERIOD_STEPS = 20
CONTEXT_LEN = 4
NEVER = 1e-12

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.05, max_iter=2, tolerance_change=0),
}


class Training:
    """A tiny regression whose data depend on the step alone."""

    def __init__(self, optimizer: str = "adamw", *, is_nowcasted: bool = True, **settings: Any) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        inner = OPTIMIZERS[optimizer](self.model.parameters())
        self.events: list[tuple[str, int]] = []
        self.optimizer: Any = inner
        if is_nowcasted:
            settings = {"context_len": CONTEXT_LEN, "period_steps": PERIOD_STEPS, "max_relative_norm": 1e3} | settings
            self.optimizer = NowcastOptimizer(inner, self.model, **settings)
            self.optimizer.hook.add_listener(lambda event: self.events.append((event.kind, event.step)))
        self.num_steps = 0
        self.losses: list[float] = []

    def train(self, num_steps: int, spoil_from: int | None = None) -> None:
        for _ in range(num_steps):
            self.num_steps += 1
            is_spoilt = spoil_from is not None and self.num_steps >= spoil_from
            generator = torch.Generator().manual_seed(self.num_steps)
            inputs = torch.randn(8, 3, generator=generator)

            def loss_now(inputs: Tensor = inputs, is_spoilt: bool = is_spoilt) -> Tensor:
                self.optimizer.zero_grad()
                loss = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
                loss.backward()
                return loss * torch.nan if is_spoilt else loss

            self.losses.append(float(self.optimizer.step(loss_now).detach()))

    def steps_of(self, kind: str) -> list[int]:
        return [step for event, step in self.events if event == kind]

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def inner_state(self) -> dict[str, Any]:
        return getattr(self.optimizer, "optimizer", self.optimizer).state_dict()


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


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
        assert self.gate.wait(30)
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


def test_a_run_without_losses_is_warned() -> None:
    model = nn.Linear(2, 1)
    optimizer = NowcastOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, context_len=2, period_steps=4)
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(3):
        optimizer.step()
    with pytest.warns(UserWarning, match="has seen no loss"):
        optimizer.step()


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
    refused(model, "needs a weights file", predictor="nino")
    refused(nn.Linear(2, 2).bfloat16(), "'weight' is torch.bfloat16 and has no fp32 master")
    refused(nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last), "'weight' is not contiguous")
    refused(FullyShardedDataParallel(), "the model is sharded")
    refused(model, r"parameter of shape \(3, 3\) that the model does not have", [nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(ConfigError, match="cannot take further parameters"):
        Training().optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
