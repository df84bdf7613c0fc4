"""Which tensors backward passes begin at: torch's one entrance for them is looked at while anybody wants to know."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class PassWatch(Protocol):
    """Who wants to know of the backward passes that reach a model.

    Attributes:
        num_passes: How often one has reached it so far.
    """

    num_passes: int

    @property
    def is_waiting(self) -> bool:
        """Whether a backward pass that begins now would be seen by nobody else."""

    def found(self, root: Tensor) -> None:
        """Is told of the scalar that a backward pass which reached the model began at."""


_watches: weakref.WeakSet[Any] = weakref.WeakSet()
# What is given to the ``backward`` of engines now, the innermost last.
_given: list[Tensor] = []
_original: dict[str, Callable[..., Any]] = {}


def look_at_backward(watch: PassWatch) -> None:
    """Lets a watch know of backward passes for as long as it lives."""
    _watches.add(watch)
    # Once: whoever has wrapped it since calls this one.
    if not _original:
        _original["backward"] = torch.autograd.backward
        setattr(torch.autograd, "backward", _backward_and_tell)  # noqa: B010  mypy takes a function for constant
    weakref.finalize(watch, _look_away).atexit = False


@contextlib.contextmanager
def being_given(loss: Tensor) -> Iterator[None]:
    """Inside, the loss of every backward pass is this one, whatever an engine makes of it."""
    _given.append(loss)
    try:
        yield
    finally:
        _given.pop()


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


def _look_away() -> None:
    # A watch that ends is still counted while it says so.
    if next(iter(_watches), None) is None and torch.autograd.backward is _backward_and_tell:
        setattr(torch.autograd, "backward", _original.pop("backward"))  # noqa: B010
