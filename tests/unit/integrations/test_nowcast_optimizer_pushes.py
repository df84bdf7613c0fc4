"""Pushes around torch optimizers in one process: the farm's, harmless, ended by the guard, resumed bit for bit."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
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

INTERVAL_STEPS = 10
PUSH: Mapping[str, Any] = {"interval_steps": INTERVAL_STEPS, "time_constant_steps": 35.0, "start_step": 20}


class TiedModel(nn.Module):
    """Two layers that share their weights, a frozen one, and one whose group has a learning rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.frozen(self.first(inputs))))))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def grouped(model: TiedModel) -> torch.optim.Optimizer:
    """Groups that are not in the model's order; rates as numbers and as tensors."""
    groups = [
        {"params": [*model.last.parameters()], "lr": 0.03},
        {"params": [*model.first.parameters(), model.second.bias], "lr": torch.tensor(0.007)},
    ]
    return torch.optim.AdamW(groups, lr=0.01, foreach=False)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2, tolerance_change=0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


def flat(model: nn.Module) -> Tensor:
    """The parameter vector of what is trained."""
    return torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad])


class Training:
    """A tiny regression whose data and learning rates depend on the step alone."""

    def __init__(
        self,
        new_model: Callable[[], Any] = mlp,
        new_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
        **settings: Any,
    ) -> None:
        torch.manual_seed(5)
        self.model = new_model()
        self.inner = new_optimizer(self.model)
        self.optimizer: Any = self.inner
        self.first_rates = [group["lr"] for group in self.inner.param_groups]
        self.events: list[tuple[str, int]] = []
        self.policies: set[str] = set()
        if settings:
            self.optimizer = NowcastOptimizer(self.inner, self.model, **settings)
            self.optimizer.hook.add_listener(self._on_event)
        self.num_steps = 0
        self.losses: list[float] = []

    def _on_event(self, event: Any) -> None:
        self.events.append((event.kind, event.step))
        self.policies.add(event.policy)

    def train(self, num_steps: int, spoil_from: int | None = None) -> None:
        for _ in range(num_steps):
            self.step(is_spoilt=spoil_from is not None and self.num_steps + 1 >= spoil_from)

    def step(self, *, is_spoilt: bool = False) -> None:
        self.num_steps += 1
        generator = torch.Generator().manual_seed(self.num_steps)
        inputs = torch.randn(8, 4, generator=generator)
        for group, rate in zip(self.inner.param_groups, self.first_rates, strict=True):
            group["lr"] = rate * (1 + 0.1 * (self.num_steps % 7)) / 1.3

        def loss_now() -> Tensor:
            self.optimizer.zero_grad()
            loss = (self.model(inputs) - inputs.sin()).square().mean()
            loss.backward()
            return loss * torch.inf if is_spoilt else loss

        self.losses.append(float(self.optimizer.step(loss_now).detach()))

    def steps_of(self, kind: str) -> list[int]:
        return [step for event, step in self.events if event == kind]

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, num_steps: int) -> None:
        saved = torch.load(file, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.num_steps = num_steps


def pushed(*arguments: Any, asynchronous: bool = False, **push: Any) -> Training:
    return Training(*arguments, policy="push", push={**PUSH, **push}, asynchronous=asynchronous)


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


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


def test_weights_that_are_loaded_before_the_first_step_are_no_motion() -> None:
    loaded, reference = pushed(), pushed()
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1.0)
    loaded.model.load_state_dict(reference.model.state_dict())
    for training in (loaded, reference):
        training.train(6 * INTERVAL_STEPS)
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


# --- on a thread


@contextmanager
def held_up(training: Training) -> Iterator[None]:
    """The thread has one worker, which does nothing else meanwhile; afterwards it has done what came."""
    gate = threading.Event()
    thread = training.optimizer._messenger._thread
    thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()
        thread.submit(int).result()


def settle(training: Training) -> None:
    """Waits until the thread has done what came."""
    training.optimizer._messenger._thread.submit(int).result()


def train_settled(training: Training, num_steps: int) -> None:
    """Trains with a thread that is always as fast as the steps."""
    for _ in range(num_steps):
        training.train(1)
        settle(training)


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


# --- checkpoints


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
        second.train(7)
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
