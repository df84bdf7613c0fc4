"""What every hook on an optimizer's steps has to know of torch."""

from __future__ import annotations

import sys

import torch


def is_within_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that a hook is called for is part of another one of the same optimizer.

    Torch tells of the step of a subclass, and once more of its parent's where that is called by ``super().step()``; of
    the parent's only if there has been an optimizer of that class itself.

    Args:
        optimizer: As the hook was given it; it is the hook itself that asks.
    """
    # Torch puts one and the same function around the steps of all classes.
    around_step = sys._getframe(2)
    frame = around_step.f_back
    while frame is not None:
        if frame.f_code is around_step.f_code and frame.f_locals["args"][0] is optimizer:
            return True
        frame = frame.f_back
    return False
