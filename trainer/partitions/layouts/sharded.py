"""Stage 3: every parameter is split evenly among the ranks, padded at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment
from sidecast.trainer.partitions.layout import require_loaded
from sidecast.trainer.partitions.trainable import TrainableParameters


class ShardedLayout:
    """Masters that hold this rank's split of many parameters, one after another, with the padding.

    Args:
        trainable: What is trained.
        optimizer: The stage 3 optimizer.
    """

    def __init__(self, trainable: TrainableParameters, optimizer: Any) -> None:
        self._optimizer = optimizer
        owned: list[Fragment] = []
        for index, sub_group in enumerate(optimizer.fp16_groups):
            offset = 0
            for parameter in sub_group:
                numel = parameter.partition_numel()
                start = dist.get_rank(parameter.ds_process_group) * numel
                stop = min(start + numel, parameter.ds_numel)
                position = trainable.index_of.get(id(parameter))
                if position is not None and start < stop:
                    owned.append(Fragment(ShardSpec(position, start, stop), index, offset))
                offset += numel
        self.owned = tuple(owned)
        self.upload = self.owned

    def masters(self) -> Sequence[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def placement(self) -> object:
        require_loaded(self._optimizer)
        return None

    @torch.no_grad()
    def publish(self) -> None:
        optimizer = self._optimizer
        # A parameter that happens to be gathered would otherwise keep its old weights.
        optimizer._partition_all_parameters()
        for index in range(len(self.masters())):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
