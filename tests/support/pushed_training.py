"""Small trainings in one process, plain or with a ``NowcastOptimizer`` around their optimizer."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sidecast.trainer.integrations.optimizer import NowcastOptimizer

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
