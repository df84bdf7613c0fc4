"""Everything of the optimizer that a rollback must put back, besides its place in the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.group_entries import own_group_entries
from sidecast.trainer.partitions.rollback import RollbackCopy, RollbackError, packed_bytes
from sidecast.trainer.partitions.step_hooks import uncompiled

# What Adam keeps; assumed before the first step, when there is no state to measure yet.
_ASSUMED_MOMENTS = 2
_ASSUMED_STEP_BYTES = 4
_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")
_STEP_KEY = "step"
# What is zero before the first step, in the state of whichever optimizer keeps it.
_ZERO_AT_FIRST = frozenset(
    (_STEP_KEY, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta")
) | {"momentum_buffer"}
# Averages of their steps and of weights, or sums of gradients that the weights are made of anew: their next steps take
# a jump back. By what their names have in common.
_KEEP_SECOND_WEIGHTS = (
    *("ScheduleFree", "ASGD", "Lookahead", "Ranger", "AccSGD", "A2Grad", "SRMM", "TRAC"),
    *("MADGRAD", "FTRL", "DAdaptAdaGrad", "DAdaptSGD"),
)
_GROUP = "group."
_SHARED = "shared."
# Between an entry's key and the part of it, where the entry is a tensor made of others.
_PART = "@"
_GRAD_SCALER = "grad_scaler"
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
        loss_scaler: The object that holds DeepSpeed's fp16 loss scale, or torch's GradScaler, if any.
        local_of: The memory that this rank holds of a tensor in the state, where that is no plain tensor.
        are_parameters: Whether the masters are the model's own parameters, and nobody but the optimizer refers to its
            state.

    Raises:
        ConfigError: An optimizer keeps a second copy of the weights, which a jump would not move, or leaves its steps
            to an optimizer of its own.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        loss_scaler: Any | None,
        local_of: Callable[[Tensor], Tensor] = _as_it_is,
        *,
        are_parameters: bool = False,
    ) -> None:
        for optimizer in optimizers:
            _require_single_weights(optimizer)
            _require_own_state(optimizer)
        self._group_entries = [own_group_entries(optimizer) for optimizer in optimizers]
        self._are_parameters = are_parameters
        self._optimizers = optimizers
        self._loss_scaler = loss_scaler
        self._local_of = local_of
        self._waiting: list[tuple[list[Callable[[], None]], RemovableHandle]] = []

    def num_bytes(self, masters: Sequence[Master]) -> int:
        """Size of a rollback copy of these masters with their state."""
        sizes_bytes: list[int] = []
        for master in masters:
            sizes_bytes.append(master.local.nbytes)
            entries = self._entries(master)
            sizes_bytes += (
                [part.nbytes for part in self._tensors(entries).values()]
                if entries
                else [master.local.nbytes] * _ASSUMED_MOMENTS + [_ASSUMED_STEP_BYTES]
            )
        own = [value for _, value in (*self._own_entries(), *self._shared_entries())]
        sizes_bytes += [value.nbytes for value in own if isinstance(value, Tensor)]
        return packed_bytes(sizes_bytes)

    def learning_rates(self) -> tuple[float, ...]:
        """Of every parameter group, now; nan where there is none that is a number."""
        return tuple(_rate_of(group) for group in self._optimizers[0].param_groups)

    def before_next_step(self, callback: Callable[[], None]) -> None:
        """Calls back once, just before the masters are updated next."""
        # None can be removed while torch goes through them.
        for waiting, handle in self._waiting:
            if not waiting:
                handle.remove()
        self._waiting = [each for each in self._waiting if each[0]]
        waiting = [callback]

        def call_once(*_: Any) -> None:
            while waiting:
                waiting.pop()()

        hook = uncompiled(call_once)

        for optimizer in self._optimizers:
            self._waiting.append((waiting, optimizer.register_step_pre_hook(hook)))

    def scale_momentum(self, masters: Sequence[Master], factor: float) -> None:
        """Multiplies the first moments of these masters."""
        for master in masters:
            for key, value in self._entries(master).items():
                if key in _MOMENTUM_KEYS and isinstance(value, Tensor):
                    value.mul_(factor)

    def require_scalable(self, masters: Sequence[Master]) -> None:
        """Refuses what ``scale_momentum`` cannot multiply.

        Raises:
            RollbackError: A first moment is quantized; naming the entry.
        """
        for master in masters:
            for key, value in self._entries(master).items():
                if key in _MOMENTUM_KEYS and isinstance(value, Tensor) and _parts_of(self._local_of(value)):
                    raise RollbackError(f"moments: scale cannot scale {key!r}, which is a {type(value).__name__}")

    def require_resettable(self, masters: Sequence[Master]) -> None:
        """Refuses what ``reset_moments`` could not bring back to where it was before the first step.

        Raises:
            RollbackError: What the state begins with is not known; naming an entry.
        """
        for name, _ in self._own_entries():
            name = name.split(".", 2)[2]
            raise RollbackError(f"moments: reset cannot reset {name!r}, which the optimizer keeps in its groups")
        for name, _ in self._shared_entries():
            name = name.split(".", 2)[2]
            raise RollbackError(f"moments: reset cannot reset {name!r}, which the optimizer keeps for all parameters")
        for master in masters:
            optimizer = self._optimizer_of(master)
            if self._is_made_anew(optimizer):
                continue
            for key, value in self._entries(master).items():
                is_quantized = isinstance(value, Tensor) and bool(_parts_of(self._local_of(value)))
                if is_quantized or _first_value(optimizer, master, key) is None:
                    raise RollbackError(
                        f"moments: reset does not know what {key!r} of the optimizer's state begins with"
                    )

    def reset_moments(self, masters: Sequence[Master]) -> None:
        """Brings the state of these masters back to where it was before the first step."""
        for master in masters:
            optimizer, entries = self._optimizer_of(master), self._entries(master)
            first = {key: _first_value(optimizer, master, key) for key in entries}
            if None in first.values() and self._is_made_anew(optimizer):
                optimizer.state.pop(master.key, None)
                continue
            # In place: DeepSpeed refers to these tensors, too, and a distributed checkpoint asks for all of them.
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    self._local_of(value).fill_(first[key] or 0.0)
                elif key == _STEP_KEY:
                    entries[key] = 0

    def _is_made_anew(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer makes its state at the first step that finds none, as torch's do, all but one."""
        is_of_torch = type(optimizer).__module__.partition(".")[0] == "torch"
        return self._are_parameters and is_of_torch and not isinstance(optimizer, torch.optim.Adagrad)

    def capture(self, masters: Sequence[Master], copy: RollbackCopy) -> None:
        """Fills the copy with masters, state and loss scale.

        Raises:
            RollbackError: The optimizer keeps something for all parameters that could not be brought back; naming it.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for index, master in enumerate(masters):
            tensors[f"{index}"] = master.local
            entries = self._entries(master)
            tensors |= {f"{index}.{key}": part for key, part in self._tensors(entries).items()}
            values |= {f"{index}.{key}": value for key, value in entries.items() if not isinstance(value, Tensor)}
        for name, value in (*self._own_entries(), *self._shared_entries()):
            (tensors if isinstance(value, Tensor) else values)[name] = value
        if isinstance(self._loss_scaler, torch.amp.GradScaler):
            values[_GRAD_SCALER] = self._loss_scaler.state_dict()
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
        for name, saved in copy.tensors().items():
            if _PART not in name:
                continue
            index, key = name.split(".", 1)
            now = self._tensors(self._entries(masters[int(index)])).get(key)
            if now is None or (now.shape, now.dtype) != (saved.shape, saved.dtype):
                raise RollbackError(f"{key.partition(_PART)[0]!r} of the optimizer's state is not what was captured")

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
        places_of: dict[str, Sequence[MutableMapping[Any, Any]]] = {
            _GROUP: [group for optimizer in self._optimizers for group in optimizer.param_groups],
            _SHARED: [optimizer.state for optimizer in self._optimizers],
        }
        for name, saved in (*tensors.items(), *values.items()):
            for prefix, places in places_of.items():
                if name.startswith(prefix):
                    number, key = name.removeprefix(prefix).split(".", 1)
                    _put_back(places, int(number), key, saved)
        if isinstance(self._loss_scaler, torch.amp.GradScaler) and values.get(_GRAD_SCALER):
            self._loss_scaler.load_state_dict(values[_GRAD_SCALER])
        for field in _LOSS_SCALE_FIELDS:
            if field in values:
                setattr(self._loss_scaler, field, values[field])

    def _restore_entries(self, master: Master, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        state = self._state_of(master)
        if not tensors and not values:
            state.pop(master.key, None)
            return
        entries = state.setdefault(master.key, {})
        kept = {key.partition(_PART)[0] for key in tensors} | values.keys()
        for key in [key for key in entries if key not in kept]:
            del entries[key]
        held = self._tensors(entries)
        for key, saved in tensors.items():
            now = held.get(key)
            if now is None or now.shape != saved.shape or now.dtype != saved.dtype:
                # Torch's step counters stay on the CPU; what has the master's shape lives beside the master.
                is_like_master = saved.shape == master.local.shape
                made = torch.empty_like(master.key if is_like_master else saved, dtype=saved.dtype)
                entries[key], now = made, self._local_of(made)
            now.copy_(saved)
        entries.update(values)

    def _own_entries(self) -> Iterator[tuple[str, Any]]:
        """What the optimizers' own steps change in their groups, under the group's number among all and its key."""
        number = 0
        for optimizer, own in zip(self._optimizers, self._group_entries, strict=True):
            for group in optimizer.param_groups:
                for key in sorted(own.keys & group.keys()):
                    yield f"{_GROUP}{number}.{key}", group[key]
                number += 1

    def _shared_entries(self) -> Iterator[tuple[str, Any]]:
        """What the optimizers keep in their state for no parameter alone, under the optimizer's number and its key."""
        for number, optimizer in enumerate(self._optimizers):
            for key, value in optimizer.state.items():
                if isinstance(key, str) and isinstance(value, Tensor | int | float):
                    yield f"{_SHARED}{number}.{key}", value
                elif isinstance(key, str) and value and not isinstance(value, str):
                    raise RollbackError(
                        f"{key!r}, which the optimizer keeps for all parameters, is a {type(value).__name__}; a "
                        "rollback brings back tensors and numbers"
                    )

    def _tensors(self, entries: Mapping[str, Any]) -> dict[str, Tensor]:
        """The memory that this rank holds of those entries that are tensors, also of those made of others."""
        found: dict[str, Tensor] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                local = self._local_of(value)
                parts = _parts_of(local)
                found |= {f"{key}{_PART}{name}": part for name, part in parts.items()} if parts else {key: local}
        return found

    def _entries(self, master: Master) -> dict[str, Any]:
        return self._state_of(master).get(master.key, {})

    def _state_of(self, master: Master) -> MutableMapping[Tensor, Any]:
        return self._optimizer_of(master).state

    def _optimizer_of(self, master: Master) -> torch.optim.Optimizer:
        optimizers = self._optimizers
        return next((optimizer for optimizer in optimizers if master.key in optimizer.state), optimizers[0])


def _rate_of(group: Mapping[str, Any]) -> float:
    try:
        return float(group.get("lr", math.nan))
    except (TypeError, ValueError):
        return math.nan


def _first_value(optimizer: torch.optim.Optimizer, master: Master, key: str) -> float | None:
    """What all elements of an entry begin with; None where that is not one number, or not known."""
    groups = optimizer.param_groups
    group = next((group for group in groups if any(item is master.key for item in group["params"])), groups[0])
    match key:
        case "sum" if isinstance(optimizer, torch.optim.Adagrad):
            return float(group["initial_accumulator_value"])
        case "mu_product" if isinstance(optimizer, torch.optim.NAdam):
            return 1.0
        case "step_size" if isinstance(optimizer, torch.optim.Rprop):
            return float(group["lr"])
        case "prev" if isinstance(optimizer, torch.optim.Rprop):
            return 0.0
        case "momentum_buffer" if group.get("dampening", 0):
            # It begins as the first gradient, all of it.
            return None
    return 0.0 if key in _ZERO_AT_FIRST else None


def _parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor is made of that has no memory of its own, such as codes and scales; empty for all others."""
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def _put_back(places: Sequence[MutableMapping[Any, Any]], number: int, key: str, saved: Any) -> None:
    if number >= len(places):
        return
    place = places[number]
    now = place.get(key)
    if isinstance(saved, Tensor) and isinstance(now, Tensor) and now.shape == saved.shape:
        now.copy_(saved)
    else:
        place[key] = saved.clone() if isinstance(saved, Tensor) else saved


def _require_own_state(optimizer: torch.optim.Optimizer) -> None:
    held = vars(optimizer).values()
    lists = (each for each in held if isinstance(each, list | tuple))
    within = chain(held, *lists, *(each.values() for each in held if isinstance(each, Mapping)))
    for inner in within:
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
            raise ConfigError(
                f"the optimizer is a {type(optimizer).__name__}, which leaves its steps to a {type(inner).__name__} of "
                "its own, whose state a rollback would not reach; give that one to sidecast"
            )


def _require_single_weights(optimizer: torch.optim.Optimizer) -> None:
    for kind in type(optimizer).__mro__:
        if any(name in kind.__name__ for name in _KEEP_SECOND_WEIGHTS):
            raise ConfigError(
                f"the optimizer is a {kind.__name__}, which keeps a second copy of the weights, or what they are made "
                "of, and a jump would not move that; nowcasting supports optimizers that keep one"
            )


def _without_prefix(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
