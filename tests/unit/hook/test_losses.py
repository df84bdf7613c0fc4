"""Gathering losses between votes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sidecast.trainer.hook.losses import LossMeter


def test_sums_scalars_and_tensors_and_starts_anew() -> None:
    meter = LossMeter()
    meter.observe(1.5)
    meter.observe(torch.tensor([2.0], requires_grad=True))
    meter.observe(torch.tensor(0.25, dtype=torch.bfloat16))
    assert meter.drain() == (3.75, 3)
    assert meter.drain() == (0.0, 0)


def test_a_loop_that_runs_ahead_of_its_device_loses_no_loss() -> None:
    meter = LossMeter()
    arrived = [True, True, False]
    for index, is_there in enumerate(arrived):
        event: Any = SimpleNamespace(query=lambda is_there=is_there: is_there)
        meter._copies.append((torch.tensor(1.0 + index), event, 2))
    assert meter.drain() == (3.0, 4)
    assert meter.drain() == (0.0, 0)
    meter._copies[0][1].query = lambda: True  # type: ignore[method-assign]
    assert meter.drain() == (3.0, 2)
