"""What every hook on an optimizer's steps has to know of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_OPTIMIZER_MODULE = torch.optim.Optimizer.__module__


def uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook on steps or backward passes that ``torch.compile`` calls as it is, and does not look into.

    Scripts compile their optimizer's step, with all of its hooks; what copies memory and talks to other processes
    cannot become part of a graph, and trying to ends the script.
    """
    wrapped: Callable[..., Any] = torch.compiler.disable(hook, reason="sidecast is not part of what is computed")
    return wrapped


def is_within_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that a hook is called for is part of another one of the same optimizer.

    Torch tells of the step of a subclass, and once more of its parent's where that is called by ``super().step()``; of
    the parent's only if there has been an optimizer of that class itself.

    Args:
        optimizer: As the hook was given it; it is the hook that asks.
    """
    # Torch puts one and the same function around the steps of all classes.
    around_step = sys._getframe(1)
    while around_step.f_globals.get("__name__") != _OPTIMIZER_MODULE:
        if around_step.f_back is None:
            return False
        around_step = around_step.f_back
    frame = around_step.f_back
    while frame is not None:
        if frame.f_code is around_step.f_code and frame.f_locals["args"][0] is optimizer:
            return True
        frame = frame.f_back
    return False
