"""The losses that a module is trained by where no engine knows of them: plain loops, FSDP2 and DDP among them.

A hook on the module's outputs tells that a backward pass has reached it; torch's entrance for backward passes, from
which tensor.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sidecast.trainer.partitions.backward_passes import look_at_backward

# Of which loss a GradScaler has made which tensor, the newest of each scaler; None: of several.
_scaled: weakref.WeakKeyDictionary[torch.amp.GradScaler, tuple[weakref.ref[Tensor], Tensor] | None]
_scaled = weakref.WeakKeyDictionary()
_original: dict[str, Callable[..., Any]] = {}


class ModuleLossWatch:
    """Tells of every loss whose backward pass reaches a module's outputs, once and without a GradScaler's factor.

    It must be kept for as long as it is to tell.

    Args:
        module: What the loop calls, with its wrappers.
        observe: Is given each loss, a scalar tensor.

    Attributes:
        num_passes: How often a backward pass has reached the module so far.
    """

    is_waiting = True

    def __init__(self, module: nn.Module, observe: Callable[[Tensor], None]) -> None:
        self._observe = observe
        self.num_passes = 0
        mark = _OutputMark(self)
        handle = module.register_forward_hook(mark)
        weakref.finalize(self, handle.remove).atexit = False
        look_at_backward(self)
        _look_at_scalers()

    def found(self, root: Tensor) -> None:
        """Takes note of the tensor that a backward pass through the module began at."""
        for made in _scaled.values():
            if made is not None and made[0]() is root:
                self._observe(made[1])
                return
        if _scaled:
            # A sum or a part of what a GradScaler has made, of which nobody knows the factor.
            return
        self._observe(root.detach())


class _OutputMark:
    """Asks the outputs of a forward pass to say when a backward pass reaches them.

    Copies of a module, and pickled ones, have one that does nothing.
    """

    def __init__(self, watch: ModuleLossWatch | None = None) -> None:
        self._watch = None if watch is None else weakref.ref(watch)

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        # Of a module that was compiled in place this becomes part of its graph, where no hook can be put.
        if torch.compiler.is_compiling() or self._watch is None or not torch.is_grad_enabled():
            return
        passed = functools.partial(_note_pass, self._watch)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                output.register_hook(passed)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OutputMark, ()


def _note_pass(watch: weakref.ref[ModuleLossWatch], gradient: Tensor) -> None:
    told = watch()
    if told is not None:
        told.num_passes += 1


def _look_at_scalers() -> None:
    """What a GradScaler makes of a loss says nothing of the loss once its factor has changed."""
    if _original:
        return
    _original["scale"] = scale = torch.amp.GradScaler.scale

    @functools.wraps(scale)
    def scale_and_remember(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        if scaled is not outputs:
            # Of several losses none is known: a pass may begin at any sum of them.
            is_one = isinstance(outputs, Tensor)
            _scaled[scaler] = (weakref.ref(scaled), outputs.detach()) if is_one else None
        return scaled

    setattr(torch.amp.GradScaler, "scale", scale_and_remember)  # noqa: B010
