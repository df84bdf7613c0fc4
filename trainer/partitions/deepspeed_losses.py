"""The losses that a DeepSpeed engine is trained by, however their backward pass is begun.

``engine.backward(loss)`` is not the only way: DeepSpeed also lets scripts call ``loss.backward()``, for one loss of two
engines too. The engine's own hooks then tell that a backward pass has reached it, but not from which tensor; so torch's
one entrance for backward passes is looked at while an engine is watched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sidecast.trainer.partitions.backward_passes import being_given, look_at_backward


class LossWatch:
    """Tells of every loss that reaches an engine, unscaled and once; wraps the engine's methods in place.

    It lives as long as the engine does.

    Args:
        engine: What ``deepspeed.initialize`` returned.
        observe: Is given each loss, a scalar tensor.
    """

    def __init__(self, engine: Any, observe: Callable[[Tensor], None]) -> None:
        self._observe = observe
        self._is_in_engine = False
        self._scaled: tuple[weakref.ref[Tensor], Tensor] | None = None
        self.num_passes = 0
        engine.backward = self._around_backward(engine.backward)
        if hasattr(engine, "scale"):
            engine.scale = self._around_scale(engine.scale)
        if hasattr(engine, "_backward_prologue"):
            engine._backward_prologue = self._around_prologue(engine._backward_prologue)
        look_at_backward(self)

    @property
    def is_waiting(self) -> bool:
        """Whether a backward pass that begins now would be seen by nobody else."""
        return not self._is_in_engine

    def found(self, root: Tensor) -> None:
        """Takes note of the tensor that a backward pass through this engine began at."""
        scaled, self._scaled = self._scaled, None
        if scaled is None:
            self._observe(root.detach())
        elif scaled[0]() is root:
            self._observe(scaled[1])
        # Otherwise it was made from what engine.scale gave: how large the loss itself is nobody knows.

    def _around_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def observe_and_backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_tensor(loss):
                return backward(loss, *args, **kwargs)
            self._observe(loss.detach())
            self._is_in_engine = True
            try:
                with being_given(loss):
                    return backward(loss, *args, **kwargs)
            finally:
                self._is_in_engine = False

        return observe_and_backward

    def _around_scale(self, scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def scale_and_remember(loss: Tensor) -> Tensor:
            scaled = scale(loss)
            self._scaled = None if scaled is loss else (weakref.ref(scaled), loss.detach())
            return scaled

        return scale_and_remember

    def _around_prologue(self, prologue: Callable[[], Any]) -> Callable[[], Any]:
        def count_and_prepare() -> Any:
            self.num_passes += 1
            return prologue()

        return count_and_prepare
