"""Gathering losses between votes."""

from __future__ import annotations

import torch

from sidecast.trainer.hook.losses import LossMeter


def test_sums_scalars_and_tensors_and_starts_anew() -> None:
    meter = LossMeter()
    meter.observe(1.5)
    meter.observe(torch.tensor([2.0], requires_grad=True))
    meter.observe(torch.tensor(0.25, dtype=torch.bfloat16))
    assert meter.drain() == (3.75, 3)
    assert meter.drain() == (0.0, 0)
