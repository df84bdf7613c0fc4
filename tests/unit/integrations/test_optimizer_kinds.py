"""Optimizers and parameters that are not the usual ones: rolled back and reset exactly, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sidecast.errors import ConfigError
from sidecast.trainer.integrations.optimizer import NowcastOptimizer
from tests.support.optimizer_training import OPTIMIZERS, PERIOD_STEPS, Counting, Rateless, Training, assert_equal

RESET: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.01),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.5),
    "dampened": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, dampening=0.5),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


@pytest.mark.parametrize("name", RESET)
def test_the_step_after_a_reset_is_the_first_one_of_a_new_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, name, RESET[name])
    nowcasted = Training(name, moments="reset", max_weight=1e-30, probation_steps=0)
    nowcasted.train(PERIOD_STEPS)
    assert nowcasted.steps_of("applied") == [PERIOD_STEPS]
    fresh = Training(name, is_nowcasted=False)
    fresh.model.load_state_dict(nowcasted.model.state_dict())
    fresh.num_steps = PERIOD_STEPS
    for training in (nowcasted, fresh):
        training.train(2)
    assert_equal(nowcasted.weights(), fresh.weights())


# A dampened momentum begins as the first gradient, so that before it there is nothing to be saved.
@pytest.mark.parametrize("name", sorted(RESET.keys() - {"dampened"}))
def test_a_distributed_checkpoint_after_a_reset_loads(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Torch refuses one that lacks the state of a trained parameter (pytorch issue 192224)."""
    monkeypatch.setitem(OPTIMIZERS, name, RESET[name])
    nowcasted = Training(name, moments="reset", max_weight=1e-30, probation_steps=0)
    nowcasted.train(PERIOD_STEPS)
    _, saved = get_state_dict(nowcasted.model, nowcasted.optimizer.optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    fresh = Training(name, is_nowcasted=False)
    weights, loaded = get_state_dict(fresh.model, fresh.optimizer)
    dcp.load({"optimizer": loaded}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(fresh.model, fresh.optimizer, model_state_dict=weights, optim_state_dict=loaded)
    assert_equal(fresh.inner_state()["state"], nowcasted.inner_state()["state"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Counting, "cannot reset 'k'"), (Rateless, "does not know what 'own' of the optimizer's state begins with")],
)
def test_what_cannot_be_reset_keeps_jumps_from_being_applied(
    make: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "own", make)
    training = Training("own", moments="reset", during_decay="allow")
    training.train(PERIOD_STEPS + 1)
    assert training.steps_of("rejected") == [PERIOD_STEPS]
    assert reason in caplog.text


def test_without_a_learning_rate_its_decay_is_not_to_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "rateless", Rateless)
    with pytest.raises(
        ConfigError, match=r"during_decay is 'scale', and group 0 .* no learning rate .*allowed: 'allow'"
    ):
        Training("rateless")
    training = Training("rateless", during_decay="allow")
    training.train(PERIOD_STEPS + 1)
    assert training.steps_of("applied") == [PERIOD_STEPS]
    # A rate that is lost on the way is no reason to fail, or to jump.
    lost = Training()
    lost.train(PERIOD_STEPS - 1)
    lost.optimizer.param_groups[0]["lr"] = torch.nan
    lost.optimizer.optimizer.step = lambda closure: closure()
    lost.train(1)
    assert lost.steps_of("applied") == []


def test_optimizers_that_keep_a_second_copy_of_the_weights_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="the optimizer is a ASGD, which keeps a second copy of the weights"):
        NowcastOptimizer(torch.optim.ASGD(model.parameters()), model)


@pytest.mark.parametrize("change", ["nothing", "unfrozen", "frozen"])
def test_parameters_that_are_frozen_or_unfrozen_in_mid_run_cost_no_rollback_and_no_nowcast(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    first: Any = model[0]
    first.requires_grad_(change != "unfrozen")
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = NowcastOptimizer(
        inner, model, context_len=4, period_steps=20, probation_steps=10, max_relative_norm=1e3
    )
    events: list[tuple[str, int]] = []
    optimizer.hook.add_listener(lambda event: events.append((event.kind, event.step)))
    at_step: dict[int, Tensor] = {}
    for step in range(1, 62):
        if step == 23 and change != "nothing":
            first.requires_grad_(change == "unfrozen")
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.observe(loss.item() + (1000.0 if 20 < step <= 30 else 0.0))
        optimizer.step()
        at_step[step] = first.weight.detach().clone()
    assert ("rolled_back", 30) in events
    assert [step for kind, step in events if kind == "applied"] == [20, 60]
    assert [step for kind, step in events if kind == "dropped"] == []
    assert torch.equal(at_step[31], at_step[61]) == (change == "frozen")
    assert caplog.text.count("no jump moves them") == (change == "unfrozen")
    # What a loaded checkpoint asks for.
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.hook.close()
