"""The losses that a DeepSpeed engine is trained by, however their backward pass is begun.

``engine.backward(loss)`` is not the only way: DeepSpeed also lets scripts call ``loss.backward()``, for one loss of two
engines too. The engine's own hooks then tell that a backward pass has reached it, but not from which tensor; so torch's
one entrance for backward passes is looked at while an engine is watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_watches: weakref.WeakSet[LossWatch] = weakref.WeakSet()
# What is given to the ``backward`` of engines now, the innermost last.
_given: list[Tensor] = []
_original: dict[str, Callable[..., Any]] = {}


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
        _watches.add(self)
        _look_at_torch()
        weakref.finalize(self, _look_away).atexit = False

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
            _given.append(loss)
            self._is_in_engine = True
            try:
                return backward(loss, *args, **kwargs)
            finally:
                self._is_in_engine = False
                _given.pop()

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


@functools.wraps(torch.autograd.backward)
def _backward_and_tell(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    waiting = [(watch, watch.num_passes) for watch in _watches if watch.is_waiting]
    result = _original["backward"](tensors, grad_tensors, *args, **kwargs)
    # Gradients of outputs are no loss, and nobody can tell the values of several roots apart.
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if grad_tensors is None and len(roots) == 1 and roots[0].numel() == 1:
        for watch, num_passes in waiting:
            if watch.num_passes > num_passes:
                watch.found(_given[-1] if _given else roots[0])
    return result


def _look_at_torch() -> None:
    # Once: whoever has wrapped it since calls this one.
    if not _original:
        _original["backward"] = torch.autograd.backward
        setattr(torch.autograd, "backward", _backward_and_tell)  # noqa: B010  mypy takes a function for constant


def _look_away() -> None:
    # A watch that ends is still counted while it says so.
    if next(iter(_watches), None) is None and torch.autograd.backward is _backward_and_tell:
        setattr(torch.autograd, "backward", _original.pop("backward"))  # noqa: B010
