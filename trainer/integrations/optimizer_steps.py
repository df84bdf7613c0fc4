"""The steps of a run, as the optimizer's own hooks tell of them: each once, and before anybody else is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from sidecast.trainer.partitions.step_hooks import is_within_a_step, uncompiled

_DCP_STATE_MODULE = "torch.distributed.checkpoint.state_dict"


class OptimizerSteps:
    """Calls back after every step that an optimizer makes and that is one of the run.

    It is the first of the optimizer's hooks: what others derive from the weights after a step (an event for FSDP2 to
    wait on, scales, averages), they derive from what a jump has made of them.

    Args:
        optimizer: The torch optimizer itself.
        applied: Called after a step that was made.
        skipped: Called after a step that a GradScaler has kept a fused optimizer from making.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, applied: Callable[[], None], skipped: Callable[[], None]
    ) -> None:
        self._applied = applied
        self._skipped = skipped
        self._is_making_state = False
        self._before = optimizer.register_step_pre_hook(uncompiled(self._before_step))
        self._after = optimizer.register_step_post_hook(uncompiled(self._after_step))
        # Torch lets hooks of modules be put first, and has no public way for those of optimizers.
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(self._after.id, last=False)

    def remove(self) -> None:
        """Calls back no more."""
        self._before.remove()
        self._after.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_within_a_step(optimizer):
            # Distributed checkpoints make an optimizer's state by a step without gradients and rate.
            self._is_making_state = not optimizer.state and _is_called_by(_DCP_STATE_MODULE)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_making_state or is_within_a_step(optimizer):
            return
        # A GradScaler lets a fused optimizer find out by itself that there is nothing to do.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._skipped()
        else:
            self._applied()


def _is_called_by(module_name: str) -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == module_name:
            return True
    return False
