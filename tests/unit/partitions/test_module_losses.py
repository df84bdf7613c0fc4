"""Which losses of a module are seen, and how large."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidecast.trainer.partitions.module_losses import ModuleLossWatch


class Watched:
    """A module, its watch, and the losses that were seen."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(2, 1)
        self.seen: list[float] = []
        self.watch: Any = ModuleLossWatch(self.module, lambda loss: self.seen.append(float(loss)))

    def loss(self) -> Tensor:
        loss: Tensor = self.module(torch.ones(3, 2)).square().mean() + 1
        return loss


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.mark.parametrize("way", ["tensor", "torch", "scaled"])
def test_a_loss_is_seen_once_and_without_a_scalers_factor(watched: Watched, way: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ways: dict[str, Any] = {
        "tensor": lambda loss: loss.backward(),
        "torch": torch.autograd.backward,
        "scaled": lambda loss: scaler.scale(loss).backward(),
    }
    losses = [watched.loss() for _ in range(2)]
    for loss in losses:
        ways[way](loss)
    assert watched.seen == [pytest.approx(float(loss.detach())) for loss in losses]


def test_what_is_made_of_scaled_losses_is_not_taken_for_one(watched: Watched) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(watched.loss()) / 2).backward()
    first, second = scaler.scale([watched.loss(), watched.loss()])  # type: ignore[call-overload]
    (first + second).backward()
    assert watched.seen == []
    del scaler
    gc.collect()
    watched.loss().backward()
    assert len(watched.seen) == 1


def test_the_loss_may_be_an_output_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self) -> dict[str, Any]:
            return {"loss": self.weight.square().sum(), "logits": self.weight * 2}

    model, seen = Model(), []
    watch = ModuleLossWatch(model, seen.append)
    model()["loss"].backward()
    assert [float(loss) for loss in seen] == [2.0]
    assert not any(loss.requires_grad for loss in seen)
    assert watch.num_passes == 1


def test_backward_passes_that_do_not_reach_the_module_are_not_its_losses(watched: Watched) -> None:
    other = nn.Linear(2, 1)
    other(torch.ones(2)).backward()
    # A gradient that is given says nothing of a loss.
    watched.module(torch.ones(1, 2)).backward(torch.ones(1, 1))
    with torch.no_grad():
        watched.loss()
    assert watched.seen == []


def test_a_module_that_was_compiled_in_place_trains_on_and_is_not_seen(watched: Watched) -> None:
    watched.module.compile(backend="eager", fullgraph=True)
    watched.loss().backward()
    assert watched.module.weight.grad is not None
    assert watched.seen == []


def test_copies_of_the_module_tell_nothing(watched: Watched) -> None:
    for module in (copy.deepcopy(watched.module), pickle.loads(pickle.dumps(watched.module))):  # noqa: S301
        module(torch.ones(3, 2)).mean().backward()
    assert watched.seen == []
    watched.loss().backward()
    assert len(watched.seen) == 1


def test_a_watch_that_is_dropped_leaves_the_module_as_it_was(watched: Watched) -> None:
    loss = watched.loss()
    watched.watch = None
    gc.collect()
    assert not watched.module._forward_hooks
    loss.backward()
    assert watched.seen == []
