"""Trajectories that no training made, for tests of what is learned from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sidecast.metatraining.presets import PRESETS
from sidecast.metatraining.sources import Source
from sidecast.metatraining.trajectories import Trajectory

SOURCE: Source = replace(PRESETS["ci"].sources[0], num_steps=40)


def drifting(noise: float = 0.0) -> Trajectory:
    """Every parameter moves along a line of its own; exact in 16 bits without noise."""
    generator = torch.Generator().manual_seed(0)
    num_elements = SOURCE.task.model.build().manifest.num_elements
    start_P = torch.randint(-64, 64, (num_elements,), generator=generator) / 64
    slope_P = torch.randint(-4, 5, (num_elements,), generator=generator) / 256
    states_NP = start_P + torch.arange(SOURCE.num_snapshots)[:, None] * slope_P
    states_NP += noise * torch.randn(states_NP.shape, generator=generator)
    return Trajectory(SOURCE, 4e-3, states_NP.half())
