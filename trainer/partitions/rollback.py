"""A copy of tensors in one buffer that is allocated once and reused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from math import prod
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.trainer.partitions.host_copy import copy_to_host

# A multiple of every element size, so that each tensor can be viewed in place; also a cache line.
_ALIGNMENT_BYTES = 64


class RollbackError(SidecastError):
    """A rollback copy does not fit, is empty, or belongs to other tensors."""


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def packed_bytes(sizes_bytes: Iterable[int]) -> int:
    """How large a buffer must be to hold tensors of these sizes."""
    return sum(_aligned(size) for size in sizes_bytes)


class RollbackCopy:
    """Named tensors and small values, kept bit for bit in memory given up front.

    Args:
        buffer: Flat CPU uint8 tensor; pinned, mapped from a file, or plain.

    Raises:
        ValueError: ``buffer`` is of another dtype, device or layout.
    """

    def __init__(self, buffer: Tensor) -> None:
        if buffer.dtype != torch.uint8 or buffer.device.type != "cpu" or buffer.dim() != 1 or buffer.stride(0) != 1:
            raise ValueError(f"rollback buffer is {buffer.dtype} on {buffer.device}; it must be flat uint8 on the CPU")
        self._buffer = buffer
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._values: dict[str, Any] = {}

    @classmethod
    def allocate(cls, num_bytes: int, *, pin_memory: bool = False) -> RollbackCopy:
        """Makes a copy in fresh host memory.

        Args:
            num_bytes: From ``Partition.rollback_bytes()``.
            pin_memory: Page-locks it, for faster copies from a CUDA device.
        """
        return cls(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin_memory))

    @property
    def num_bytes(self) -> int:
        """How much it can hold."""
        return self._buffer.numel()

    def touch(self) -> None:
        """Makes the kernel back every page now, rather than at the first jump, when there may be no memory left."""
        self._buffer.zero_()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to restore."""
        return not self._places

    def clear(self) -> None:
        """Forgets what was captured; the memory stays."""
        self._places = {}
        self._values = {}

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Replaces what is held.

        Args:
            tensors: Of any dtype, shape and device.
            values: Plain Python values.

        Raises:
            RollbackError: The buffer is too small, or its pages cannot be had.
        """
        needed_bytes = packed_bytes(tensor.nbytes for tensor in tensors.values())
        if needed_bytes > self._buffer.numel():
            raise RollbackError(f"the rollback copy needs {needed_bytes} bytes; it was given {self._buffer.numel()}")
        self.clear()
        places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        offset = 0
        for name, tensor in tensors.items():
            places[name] = (offset, tensor.dtype, tuple(tensor.shape))
            self._require_pages(offset, tensor.nbytes, for_writing=True)
            copy_to_host(self._view(*places[name]), tensor.detach())
            offset += _aligned(tensor.nbytes)
        # Some optimizers keep lists and update them in place.
        self._places, self._values = places, deepcopy(dict(values))

    def tensors(self) -> dict[str, Tensor]:
        """Views of the tensors held, valid until the next ``save``."""
        return {name: self._view(*place) for name, place in self._places.items()}

    def require_readable(self) -> None:
        """Makes sure that what is held can be read.

        Raises:
            RollbackError: It cannot.
        """
        used = [offset + _num_bytes(dtype, shape) for offset, dtype, shape in self._places.values()]
        self._require_pages(0, max(used, default=0), for_writing=False)

    def values(self) -> dict[str, Any]:
        """Copies of the values held."""
        return deepcopy(self._values)

    def state_dict(self) -> dict[str, Any]:
        """The memory itself and plain values, for a checkpoint that ``torch.load(weights_only=True)`` reads.

        Raises:
            RollbackError: It cannot be read.
        """
        # A checkpoint takes the buffer whole, with what is unused.
        self._require_pages(0, self.num_bytes, for_writing=False)
        places = {name: (offset, str(dtype), shape) for name, (offset, dtype, shape) in self._places.items()}
        return {"buffer": self._buffer, "places": places, "values": self.values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what another copy's ``state_dict`` held.

        Raises:
            RollbackError: The buffer is too small, or its pages cannot be had.
        """
        saved = state["buffer"]
        if saved.numel() > self._buffer.numel():
            raise RollbackError(f"the rollback copy needs {saved.numel()} bytes; it was given {self._buffer.numel()}")
        self._require_pages(0, saved.numel(), for_writing=True)
        self._buffer[: saved.numel()].copy_(saved)
        self._places = {
            name: (offset, getattr(torch, dtype.removeprefix("torch.")), tuple(shape))
            for name, (offset, dtype, shape) in state["places"].items()
        }
        self._values = dict(state["values"])

    def _require_pages(self, offset: int, num_bytes: int, *, for_writing: bool) -> None:
        """Raises RollbackError if a part of the buffer cannot be accessed; memory always can."""

    def _view(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return self._buffer[offset : offset + _num_bytes(dtype, shape)].view(dtype).view(shape)


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtype.itemsize
