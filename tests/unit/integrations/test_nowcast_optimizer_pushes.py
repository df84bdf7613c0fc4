"""Pushes around torch optimizers in one process: the farm's bit for bit, harmless, and ended by the guard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sidecast.errors import ConfigError
from sidecast.evaluation.methods.push import PushMethod
from sidecast.manifest import ModelManifest, ParameterSpec
from sidecast.predictors.linear import LinearPredictor
from sidecast.trainer.integrations.in_process_pushes import InProcessPusher
from sidecast.trainer.integrations.optimizer import NowcastOptimizer
from sidecast.trainer.pipe.buffers import SharedBuffer
from tests.support.pushed_training import (
    INTERVAL_STEPS,
    PUSH,
    TiedModel,
    Training,
    adamw,
    assert_equal,
    flat,
    grouped,
    lbfgs,
    mlp,
    pushed,
)


def train_as_the_farm_does(training: Training, num_steps: int, spoil_from: int | None, **push: Any) -> PushMethod:
    """Every optimizer step is the plain one; the farm's method then looks at the vector, and changes it."""
    trained = [each for each in training.model.parameters() if each.requires_grad]
    specs = tuple(ParameterSpec(f"{index}", tuple(each.shape)) for index, each in enumerate(trained))
    params_P = flat(training.model)
    method = PushMethod(ModelManifest(specs, {}, {}), params_P, late_steps=0, **{**PUSH, **push})
    for _ in range(num_steps):
        training.step(is_spoilt=spoil_from is not None and training.num_steps + 1 >= spoil_from)
        params_P = flat(training.model)
        rates = [float(group["lr"]) for group in training.inner.param_groups]
        method.after_step(training.num_steps, params_P, sum(rates) / len(rates), training.losses[-1])
        with torch.no_grad():
            nn.utils.vector_to_parameters(params_P, trained)
    return method


@pytest.mark.parametrize("models", [(mlp, adamw), (mlp, lbfgs), (TiedModel, grouped)], ids=["mlp", "lbfgs", "tied"])
@pytest.mark.parametrize(
    "push", [{"max_relative_norm": None}, {"gain": 3.0, "max_relative_norm": 0.7}], ids=["free", "capped"]
)
def test_a_run_with_pushes_is_the_farms_bit_for_bit(models: Any, push: dict[str, Any]) -> None:
    num_steps, spoil_from = 14 * INTERVAL_STEPS + 3, 12 * INTERVAL_STEPS
    farm, ours = Training(*models), pushed(*models, **push)
    method = train_as_the_farm_does(farm, num_steps, spoil_from, **push)
    ours.train(num_steps, spoil_from)
    report = method.report()
    # From the snapshots of 20, 30, ... 110; then the guard has ended it.
    assert ours.steps_of("applied") == list(range(20, 120, 10))
    assert report["num_pushes"] == 10
    assert bool(report["num_capped"]) == ("gain" in push)
    assert ours.steps_of("suspended") == [spoil_from] == [report["alarm_step"]]
    assert ours.losses == farm.losses
    assert_equal(flat(ours.model), flat(farm.model))


@pytest.mark.parametrize("new_optimizer", [adamw, lbfgs])
def test_a_gain_of_zero_changes_nothing(new_optimizer: Any) -> None:
    plain, ours = Training(mlp, new_optimizer), pushed(mlp, new_optimizer, gain=0.0)
    for training in (plain, ours):
        training.train(5 * INTERVAL_STEPS + 1)
    assert len(ours.steps_of("committed")) == 5
    assert ours.losses == plain.losses
    assert_equal(ours.inner.state_dict(), plain.inner.state_dict())


def further() -> nn.Module:
    """Weights that are far from those of ``mlp``."""
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def test_weights_that_are_loaded_before_the_first_step_are_no_motion() -> None:
    loaded, reference = pushed(), pushed(further)
    loaded.model.load_state_dict(reference.model.state_dict())
    for training in (loaded, reference):
        training.train(3 * INTERVAL_STEPS)
    assert reference.steps_of("applied") != []
    assert_equal(flat(loaded.model), flat(reference.model))


# --- memory


class LargeTensors(TorchDispatchMode):
    """Remembers the memory of all large tensors that operations return.

    Args:
        num_bytes: What is large.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self._num_bytes = num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() >= self._num_bytes:
                self.seen.add(each.untyped_storage().data_ptr())
        return result


@contextmanager
def shared_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of all shared buffers that are made meanwhile."""
    sizes: list[int] = []
    original = SharedBuffer.__init__

    def counted(self: SharedBuffer, name: str, num_bytes: int) -> None:
        sizes.append(num_bytes)
        original(self, name, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(SharedBuffer, "__init__", counted)
        yield sizes


@pytest.mark.parametrize("asynchronous", [False, True])
def test_it_holds_16_bytes_a_parameter_and_nothing_else_for_a_moment(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces of what is worked on piece by piece.
    parameter = nn.Parameter(torch.zeros(5 * (1 << 18) + 7))
    model = nn.ParameterList([parameter])
    parameter.grad = torch.ones_like(parameter)
    inner = torch.optim.SGD([parameter], lr=0.1)
    with shared_bytes(monkeypatch) as sizes, LargeTensors(parameter.nbytes) as large:
        optimizer = NowcastOptimizer(
            inner,
            model,
            policy="push",
            push={"interval_steps": 2, "start_step": 0},
            asynchronous=asynchronous,
            max_relative_norm=1e3,
        )
        for _ in range(6):
            optimizer.observe(1.0)
            optimizer.step()
            if asynchronous:
                optimizer._messenger._thread.submit(int).result()  # type: ignore[union-attr]
    own = {each.untyped_storage().data_ptr() for each in (parameter, parameter.grad)}
    messenger = optimizer._messenger
    assert isinstance(messenger, InProcessPusher)
    shared = [*(slot.values for slot in messenger.slots), messenger._push_P, messenger._motion.carry_P]
    own |= {each.untyped_storage().data_ptr() for each in (*shared, messenger._motion.anchor_P)}
    assert optimizer.hook.totals.num_applied >= 2
    assert sum(sizes) == 4 * parameter.nbytes
    assert large.seen - own == set()
    assert optimizer.hook._applier.rollback_copy is None
    optimizer.hook.close()


# --- losses


def test_without_losses_nothing_is_pushed_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    plain, ours = Training(), pushed()
    for training in (plain, ours):
        training.model(torch.ones(1, 4)).sum().backward()
    with warnings.catch_warnings():
        # What is said of jumps after a period is not said of pushes.
        warnings.simplefilter("error")
        for _ in range(1001):
            plain.optimizer.step()
            ours.optimizer.step()
    assert ours.steps_of("applied") == []
    assert caplog.text.count("no push is applied as long as no loss is seen") == 1
    assert_equal(flat(ours.model), flat(plain.model))


def test_skipped_steps_of_a_gradient_scaler_do_not_count() -> None:
    training = pushed()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3 * INTERVAL_STEPS + 2):
        training.optimizer.zero_grad()
        loss = training.model(torch.ones(1, 4)).sum() * (torch.inf if step in (3, 4) else 1.0)
        scaler.scale(loss).backward()
        training.optimizer.observe(1.0)
        scaler.step(training.optimizer)
        scaler.update()
    assert training.optimizer.hook.step == 3 * INTERVAL_STEPS
    assert training.steps_of("applied") == [20, 30]


# --- settings


def refused(words: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        Training(**settings)


def test_settings_of_the_other_policy_are_refused_as_in_the_section() -> None:
    refused("nowcaster.merge is 'replace'; allowed: nothing with policy 'push'", policy="push", merge="replace")
    refused("nowcaster.period_steps is 50; allowed: nothing with policy 'push'", policy="push", period_steps=50)
    refused("nowcaster.context_len is 4; allowed: nothing with policy 'push'", policy="push", context_len=4)
    refused("nowcaster.probation_steps is 0; allowed: nothing", policy="push", probation_steps=0)
    refused("nowcaster.predictor is 'rank1'; allowed: nothing with policy 'push'", policy="push", predictor="rank1")
    refused("nowcaster.predictor is <.*Linear.*>; allowed: nothing", policy="push", predictor=LinearPredictor())
    refused("nowcaster.weights is 'w.pt'; allowed: nothing with policy 'push'", policy="push", weights="w.pt")
    refused(r"nowcaster.push is .*; allowed: nothing with policy 'jump'", push={"gain": 2.0})
    refused("nowcaster.policy is 'leap'; allowed: 'jump', 'push'", policy="leap")
    refused("nowcaster.push has an unknown key 'gane'; allowed: gain", policy="push", push={"gane": 1.0})
    refused("nowcaster.push is 20; allowed: an object", policy="push", push=20)
    refused("push.interval_steps is 0; it must be at least 1", policy="push", push={"interval_steps": 0})
    refused("no setting 'gain'; allowed: .*push", policy="push", gain=1.0)


def test_it_says_which_policy_it_has() -> None:
    pushing, jumping = pushed(), Training(period_steps=20, context_len=2)
    for training in (pushing, jumping):
        training.train(25)
    assert (pushing.policies, jumping.policies) == ({"push"}, {"jump"})
    assert pushing.optimizer.hook.summary()["policy"] == "push"
    assert jumping.optimizer.hook.summary()["policy"] == "jump"
    assert repr(pushing.optimizer).endswith("policy='push')")
    assert repr(jumping.optimizer).endswith("policy='jump', predictor='linear')")
