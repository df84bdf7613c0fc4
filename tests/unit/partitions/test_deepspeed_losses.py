"""Which losses of an engine are seen, and how large; the engine's hooks are imitated."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidecast.trainer.partitions.deepspeed_losses import LossWatch


class Engine:
    """What DeepSpeed does around a backward pass: its outputs tell the engine, and losses are scaled by 8."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 1)
        self.num_prologues = 0
        self.seen: list[float] = []
        LossWatch(self, lambda loss: self.seen.append(float(loss)))

    def __call__(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(inputs)
        outputs.register_hook(self._tell)
        return outputs

    def _tell(self, gradient: Tensor) -> None:
        self._backward_prologue()

    def _backward_prologue(self) -> None:
        self.num_prologues += 1

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 8

    def backward(self, loss: Tensor) -> None:
        self.scale(loss).backward()


def value_of(loss: Tensor) -> float:
    return pytest.approx(float(loss.detach()))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def loss(engine: Engine) -> Tensor:
    return engine(torch.ones(3, 2)).square().mean() + 1


@pytest.mark.parametrize("way", ["engine", "tensor", "scaled", "torch", "list"])
def test_a_loss_is_seen_once_and_unscaled(engine: Engine, loss: Tensor, way: str) -> None:
    ways: dict[str, Any] = {
        "engine": lambda: engine.backward(loss),
        "tensor": loss.backward,
        "scaled": lambda: engine.scale(loss).backward(),
        "torch": lambda: torch.autograd.backward(loss),
        "list": lambda: torch.autograd.backward([loss]),
    }
    ways[way]()
    assert engine.seen == [value_of(loss)]
    assert engine.num_prologues == 1


@pytest.mark.parametrize("is_through_engine", [False, True])
def test_one_loss_of_two_engines_is_seen_by_both(is_through_engine: bool) -> None:
    first, second, third = Engine(), Engine(), Engine()
    loss = (first(torch.ones(3, 2)) + second(torch.ones(3, 2))).square().mean()
    if is_through_engine:
        first.backward(loss)
    else:
        loss.backward()
    assert [first.seen, second.seen, third.seen] == [[value_of(loss)], [value_of(loss)], []]


def test_what_is_no_loss_or_of_unknown_size_is_not_seen(engine: Engine, loss: Tensor) -> None:
    outputs = engine(torch.ones(3, 2))
    outputs.backward(torch.ones(3, 1))
    nn.Linear(2, 1)(torch.ones(2)).backward()
    (engine.scale(loss) + 1).backward()
    assert engine.seen == []
    engine(torch.ones(1, 2)).backward()
    assert len(engine.seen) == 1


def test_torch_is_let_go_with_the_last_engine() -> None:
    gc.collect()
    before = torch.autograd.backward
    engines = [Engine(), Engine()]
    watched: Any = torch.autograd.backward
    assert watched is not before
    del engines[0]
    gc.collect()
    assert torch.autograd.backward is watched
    engines.clear()
    gc.collect()
    assert torch.autograd.backward is before
