"""A partition that maps itself anew when the optimizer's tensors have moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.contract import MergeMode, Partition
from sidecast.trainer.partitions.layout import StalePartitionError
from sidecast.trainer.partitions.rollback import RollbackCopy


class RemappingPartition:
    """Implements ``Partition`` over the newest mapping; raises ``StalePartitionError`` only where that fails, too.

    Args:
        remap: Maps what this rank holds as it lies now; local, never a collective.
    """

    def __init__(self, remap: Callable[[], Partition]) -> None:
        self._remap = remap
        self._mapped = remap()

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        return self._mapped.parameters

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._mapped.aliases

    @property
    def upload_shards(self) -> tuple[ShardSpec, ...]:
        return self._mapped.upload_shards

    @property
    def owned_shards(self) -> tuple[ShardSpec, ...]:
        return self._mapped.owned_shards

    @property
    def master_dtype(self) -> torch.dtype:
        return self._mapped.master_dtype

    @property
    def device(self) -> torch.device:
        return self._mapped.device

    def require_current(self) -> None:
        self._current()

    def read(self, out: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        self._current().read(out, stream)

    def read_owned(self, out: Tensor) -> None:
        self._current().read_owned(out)

    def learning_rates(self) -> tuple[float, ...]:
        return self._mapped.learning_rates()

    def scale_momentum(self, factor: float) -> None:
        self._current().scale_momentum(factor)

    def reset_moments(self) -> None:
        self._current().reset_moments()

    def apply(self, delta: Tensor, weight: float, *, mode: MergeMode = "add", base: Tensor | None = None) -> None:
        self._current().apply(delta, weight, mode=mode, base=base)

    def write(self, values: Tensor) -> None:
        self._current().write(values)

    def capture(self, copy: RollbackCopy) -> None:
        self._current().capture(copy)

    def require_restorable(self, copy: RollbackCopy) -> None:
        self._current().require_restorable(copy)

    def restore(self, copy: RollbackCopy) -> None:
        self._current().restore(copy)

    def rollback_bytes(self) -> int:
        return self._mapped.rollback_bytes()

    def _current(self) -> Partition:
        try:
            self._mapped.require_current()
        except StalePartitionError:
            self._mapped = self._mapped_anew()
        return self._mapped

    def _mapped_anew(self) -> Partition:
        known = self._mapped
        try:
            mapped = self._remap()
        except ConfigError as error:
            raise StalePartitionError(f"the optimizer's tensors moved and cannot be mapped anew: {error}") from error
        # The service and the buffers know the old ranges.
        for what in ("parameters", "upload_shards", "owned_shards", "master_dtype"):
            if getattr(mapped, what) != getattr(known, what):
                raise StalePartitionError(f"the optimizer was rebuilt with other {what}; nowcasting needs a new attach")
        return mapped
