"""Everything of the optimizer that a rollback must put back, besides its place in the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sidecast.trainer.partitions.rollback import RollbackCopy, RollbackError, packed_bytes

# What Adam keeps; assumed before the first step, when there is no state to measure yet.
_ASSUMED_MOMENTS = 2
_ASSUMED_STEP_BYTES = 4
_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")
_STEP_KEY = "step"
# The moving parts of DeepSpeed's loss scalers; their settings (window, factor, floor) never change.
_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, slots=True)
class Master:
    """One tensor that the inner optimizer updates, of which this rank holds a part.

    Attributes:
        key: What the optimizer files its state under.
        local: The memory of it that this rank holds, contiguous; ``key`` itself where that is all on this rank.
    """

    key: Tensor
    local: Tensor


def whole_masters(tensors: Iterable[Tensor]) -> list[Master]:
    """Masters of which each lies on this rank as a plain tensor."""
    return [Master(tensor, tensor) for tensor in tensors]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class OptimizerState:
    """Moments and step counters of each master, and the loss scale.

    Args:
        optimizers: Every inner optimizer; its ``state`` is keyed by the masters' keys.
        loss_scaler: The object that holds DeepSpeed's fp16 loss scale, if any.
        local_of: The memory that this rank holds of a tensor in the state, where that is no plain tensor.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        loss_scaler: Any | None,
        local_of: Callable[[Tensor], Tensor] = _as_it_is,
    ) -> None:
        self._optimizers = optimizers
        self._loss_scaler = loss_scaler
        self._local_of = local_of

    def num_bytes(self, masters: Sequence[Master]) -> int:
        """Size of a rollback copy of these masters with their state."""
        sizes_bytes: list[int] = []
        for master in masters:
            sizes_bytes.append(master.local.nbytes)
            entries = self._entries(master)
            sizes_bytes += (
                [self._local_of(value).nbytes for value in entries.values() if isinstance(value, Tensor)]
                if entries
                else [master.local.nbytes] * _ASSUMED_MOMENTS + [_ASSUMED_STEP_BYTES]
            )
        return packed_bytes(sizes_bytes)

    def learning_rates(self) -> tuple[float, ...]:
        """Of every parameter group, now."""
        return tuple(float(group["lr"]) for group in self._optimizers[0].param_groups)

    def before_next_step(self, callback: Callable[[], None]) -> None:
        """Calls back once, just before the masters are updated next."""
        handles: list[RemovableHandle] = []

        def call_once(*_: Any) -> None:
            for handle in handles:
                handle.remove()
            callback()

        handles.extend(optimizer.register_step_pre_hook(call_once) for optimizer in self._optimizers)

    def scale_momentum(self, masters: Sequence[Master], factor: float) -> None:
        """Multiplies the first moments of these masters."""
        for master in masters:
            for key, value in self._entries(master).items():
                if key in _MOMENTUM_KEYS and isinstance(value, Tensor):
                    value.mul_(factor)

    def reset_moments(self, masters: Sequence[Master]) -> None:
        """Zeroes the moments and step counters of these masters, where they are."""
        for master in masters:
            entries = self._entries(master)
            for key, value in entries.items():
                if isinstance(value, Tensor) and (value.shape == master.key.shape or key == _STEP_KEY):
                    value.zero_()
                elif key == _STEP_KEY:
                    entries[key] = 0

    def capture(self, masters: Sequence[Master], copy: RollbackCopy) -> None:
        """Fills the copy with masters, state and loss scale."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for index, master in enumerate(masters):
            tensors[f"{index}"] = master.local
            for key, value in self._entries(master).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = self._local_of(value)
                else:
                    values[f"{index}.{key}"] = value
        for field in _LOSS_SCALE_FIELDS:
            if hasattr(self._loss_scaler, field):
                values[field] = getattr(self._loss_scaler, field)
        copy.save(tensors, values)

    def require_restorable(self, masters: Sequence[Master], copy: RollbackCopy) -> None:
        """Refuses a copy that is empty, was captured from other tensors or cannot be read.

        Raises:
            RollbackError: It is such.
        """
        self._require_captured_here(masters, copy)
        copy.require_readable()

    def _require_captured_here(self, masters: Sequence[Master], copy: RollbackCopy) -> None:
        tensors = copy.tensors()
        held = [(name, tensors[name].shape) for name in tensors if "." not in name]
        if held != [(f"{index}", master.local.shape) for index, master in enumerate(masters)]:
            raise RollbackError("the rollback copy is empty or was captured from other tensors; nothing was restored")

    def restore(self, masters: Sequence[Master], copy: RollbackCopy) -> None:
        """Puts masters, state and loss scale back, in place wherever a tensor still exists."""
        self._require_captured_here(masters, copy)
        tensors, values = copy.tensors(), copy.values()
        for index, master in enumerate(masters):
            master.local.detach().copy_(tensors[f"{index}"])
            self._restore_entries(master, _without_prefix(tensors, f"{index}."), _without_prefix(values, f"{index}."))
        for field in _LOSS_SCALE_FIELDS:
            if field in values:
                setattr(self._loss_scaler, field, values[field])

    def _restore_entries(self, master: Master, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        state = self._state_of(master)
        if not tensors and not values:
            state.pop(master.key, None)
            return
        entries = state.setdefault(master.key, {})
        for key in [key for key in entries if key not in tensors and key not in values]:
            del entries[key]
        for key, saved in tensors.items():
            now = entries.get(key)
            if not isinstance(now, Tensor) or self._local_of(now).shape != saved.shape or now.dtype != saved.dtype:
                # Torch's step counters stay on the CPU; what has the master's shape lives beside the master.
                is_like_master = saved.shape == master.local.shape
                now = torch.empty_like(master.key if is_like_master else saved, dtype=saved.dtype)
                entries[key] = now
            self._local_of(now).copy_(saved)
        entries.update(values)

    def _entries(self, master: Master) -> dict[str, Any]:
        return self._state_of(master).get(master.key, {})

    def _state_of(self, master: Master) -> MutableMapping[Tensor, Any]:
        states = [optimizer.state for optimizer in self._optimizers]
        return next((state for state in states if master.key in state), states[0])


def _without_prefix(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
