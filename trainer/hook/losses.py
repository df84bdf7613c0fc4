"""The training loss between votes, gathered without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class LossMeter:
    """Sums a rank's micro-batch losses between two votes.

    On a CUDA device the sum stays there; ``drain`` starts a copy to the host and returns those that have arrived since
    the time before, so that the loop never waits for the device, and loses nothing where it runs ahead of it.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._copies: deque[tuple[Tensor, torch.cuda.Event, int]] = deque()

    def observe(self, loss: Tensor | float) -> None:
        """Adds one micro-batch's mean loss (a scalar)."""
        value = torch.as_tensor(loss).detach().reshape(()).double()
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1

    def drain(self) -> tuple[float, int]:
        """Returns (sum of losses, number of them) since the time before, and starts anew."""
        total, count = self._sum, self._count
        self._sum, self._count = None, 0
        if total is None:
            return self._arrived()
        if total.device.type == "cpu":
            return float(total), count
        earlier = self._arrived()
        host = torch.empty((), dtype=total.dtype, pin_memory=True)
        host.copy_(total, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copies.append((host, event, count))
        return earlier

    def _arrived(self) -> tuple[float, int]:
        total, num_losses = 0.0, 0
        while self._copies and self._copies[0][1].query():
            host, _, count = self._copies.popleft()
            total, num_losses = total + float(host), num_losses + count
        return total, num_losses
