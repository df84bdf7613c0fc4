"""A tiny regression around any torch optimizer, nowcasted or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sidecast.trainer.integrations.optimizer import NowcastOptimizer

PERIOD_STEPS = 20
CONTEXT_LEN = 4
NEVER = 1e-12


class Counting(torch.optim.Optimizer):
    """Counts in its groups, in numbers and in a tensor, as schedule-free and distance-adapting optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.02, "k": 0, "sums": [0.0], "norm": torch.zeros(())})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            group["k"] += 1
            group["sums"][0] += 1 / group["k"]
            for parameter in group["params"]:
                group["norm"] += parameter.grad.norm()
                parameter.sub_(parameter.grad, alpha=group["lr"] * group["sums"][0] / (1 + group["norm"].item()))
        return loss


class CountingAround(torch.optim.SGD):
    """Counts in its groups, and leaves the rest of its step to its parent."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.02)
        self.param_groups[0]["k"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["k"] += 1
        return super().step(closure)


class Rateless(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"size": 0.01, "lr": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["size"])
                self.state[parameter].setdefault("own", torch.ones_like(parameter))
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "counting": Counting,
    "counting around": CountingAround,
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
