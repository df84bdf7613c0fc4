"""Holds training back until what it has set going has ended, so that no test depends on how fast anything is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.hook.slots import SlotState

# How long one rank listens to its courier before it asks the others whether they still wait.
LISTEN_S = 0.02
# After these no prediction comes, of the window that was sent last, that could be applied.
LOSSES = ("dropped", "failed", "rejected", "disconnected")


class Pacer:
    """Waits, after a training step, for uploads and for the nowcast of a base step.

    A rank waits while a snapshot is on its way to the service, and from a base step on until it holds the prediction,
    or has been told that there will be none; but never without a service. No rank goes on before all others can, or
    one of them knows that nothing will come.

    Args:
        nowcaster: The rank's hook.
        all_ranks: Reduces a tensor of integers to the largest ones of all ranks; None where ranks train alone.
    """

    def __init__(self, nowcaster: NowcastHook, all_ranks: Callable[[torch.Tensor], Any] | None = None) -> None:
        self._hook = nowcaster
        self._all_ranks = all_ranks
        self._is_due = False
        self._is_lost = False
        nowcaster.add_listener(self._on_event)

    @classmethod
    def of_group(cls, nowcaster: NowcastHook) -> Pacer:
        """For one of the ranks of the default process group."""
        return cls(nowcaster, lambda flags: dist.all_reduce(flags, dist.ReduceOp.MAX))

    def _on_event(self, event: NowcastEvent) -> None:
        if event.kind == "staged":
            self._is_due = event.step % self._hook.config.period_steps == 0
            self._is_lost = False
        elif event.kind == "applied":
            self._is_due = False
        elif event.kind in LOSSES:
            self._is_lost = True

    def wait(self) -> None:
        """Returns once the next step may be made."""
        courier, inbox = self._hook._courier, self._hook._inbox
        assert isinstance(courier, CourierHandle)
        while True:
            is_sending = any(slot.state is not SlotState.FREE for slot in courier.slots)
            awaits = self._is_due and inbox.held is None
            flags = torch.tensor([is_sending, awaits, self._is_lost, not inbox.is_linked], dtype=torch.int32)
            if self._all_ranks is not None:
                self._all_ranks(flags)
            any_sends, any_awaits, any_lost, any_unlinked = flags.tolist()
            if any_unlinked or not (any_sends or (any_awaits and not any_lost)):
                return
            inbox.poll(LISTEN_S)
