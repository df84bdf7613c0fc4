"""Which entries of its parameter groups an optimizer changes itself, and which are the schedule's or the script's.

Most optimizers keep all that they know in their state. Some count and average in their groups, beside the settings:
what must go back with a rollback there, and what must not, is told apart by who changes it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from sidecast.trainer.partitions.step_hooks import is_within_a_step, uncompiled

# Never an optimizer's own: a schedule is further on after a rollback, too.
_OF_SCHEDULES = ("params", "lr", "initial_lr")

_known: weakref.WeakKeyDictionary[torch.optim.Optimizer, OwnGroupEntries] = weakref.WeakKeyDictionary()


class OwnGroupEntries:
    """Watches an optimizer's steps, for as long as there is the optimizer.

    Args:
        optimizer: To be watched.

    Attributes:
        keys: Of the entries that a step has changed so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.keys: set[str] = set()
        self._before: list[dict[str, Any]] = []
        optimizer.register_step_pre_hook(uncompiled(self._begin))
        optimizer.register_step_post_hook(uncompiled(self._end))

    def _begin(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_within_a_step(optimizer):
            self._before = [_marks(group) for group in optimizer.param_groups]

    def _end(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for before, group in zip(self._before, optimizer.param_groups, strict=False):
            now = _marks(group)
            self.keys.update(key for key in now if key not in before or before[key] != now[key])


def own_group_entries(optimizer: torch.optim.Optimizer) -> OwnGroupEntries:
    """What is known of an optimizer; it is watched from the first call on."""
    if optimizer not in _known:
        _known[optimizer] = OwnGroupEntries(optimizer)
    return _known[optimizer]


def _marks(group: dict[str, Any]) -> dict[str, Any]:
    """Something comparable for each entry, which differs once it was changed."""
    return {key: _mark(value) for key, value in group.items() if key not in _OF_SCHEDULES}


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version
    # Lists are changed in place; what else there may be need not compare to a truth value.
    return value if isinstance(value, int | float | str | None) else repr(value)
