"""Brings parts of a history to where they are worked on, wherever the history lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidecast.predictors.passes import Part, PartContext


class StateReader:
    """Reads the states of parts.

    Args:
        device: Where they are needed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._staging: PinnedStaging | None = None

    def read(self, part: Part, context: PartContext) -> list[Tensor]:
        """The C states of a part's parameter, equally shaped: views of the history if it is on this device."""
        assert part.fqn is not None
        states = part.read(context.states, context.manifest.offsets[part.fqn])
        if states[0].device == self.device:
            return states
        if self.device.type != "cuda":
            return [state.to(self.device) for state in states]
        if self._staging is None:
            self._staging = PinnedStaging(self.device)
        return self._staging.copy(states)


class PinnedStaging:
    """Copies host tensors to a GPU through pinned memory, on a stream of its own.

    There are two buffers: one is filled while the other one's copy and the work on earlier tensors go on.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of equally shaped tensors, which the device's current stream may use at once."""
        turn, self._next = self._next, 1 - self._next
        before = self._copied[turn]
        if before is not None:
            before.synchronize()
        pinned = self._buffer(turn, len(tensors) * tensors[0].nbytes).view(tensors[0].dtype)
        pinned = pinned.view(len(tensors), *tensors[0].shape)
        for place, tensor in zip(pinned, tensors, strict=True):
            place.copy_(tensor)
        with torch.cuda.stream(self._stream):
            moved = pinned.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._copied[turn] = copied
        compute = torch.cuda.current_stream(self._device)
        compute.wait_event(copied)
        # Its memory belongs to the copying stream, which must not reuse it before the work is done.
        moved.record_stream(compute)
        return list(moved)

    def _buffer(self, turn: int, num_bytes: int) -> Tensor:
        if self._buffers[turn].numel() < num_bytes:
            self._buffers[turn] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._buffers[turn][:num_bytes]
