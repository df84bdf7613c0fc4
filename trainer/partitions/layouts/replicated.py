"""Stage 0: every rank holds all masters, so ranks share the upload but each applies everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment, even_share
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState, whole_masters
from sidecast.trainer.partitions.trainable import TrainableParameters


class ReplicatedLayout:
    """Masters that hold whole parameters, one or many each; implements ``Layout``.

    Args:
        trainable: What is trained.
        state: Of the optimizer.
        groups: Per master, the model's parameters that it holds one after another.
        masters: Looks the masters up in the optimizer.
        rank: This rank.
        world_size: Number of ranks that share the upload.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        state: OptimizerState,
        groups: Sequence[Sequence[nn.Parameter]],
        masters: Callable[[], Sequence[Tensor]],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.trainable = trainable
        self.state = state
        self._groups = groups
        self._masters = masters
        owned: list[Fragment] = []
        for index, group in enumerate(groups):
            offset = 0
            for parameter in group:
                position = trainable.index_of.get(id(parameter))
                if position is not None:
                    owned.append(Fragment(ShardSpec(position, 0, parameter.numel()), index, offset))
                offset += parameter.numel()
        self.owned = tuple(owned)
        self.upload = even_share(self.owned, rank, world_size)

    def masters(self) -> Sequence[Master]:
        return whole_masters(self._masters())

    def placement(self) -> object:
        return None

    @torch.no_grad()
    def publish(self) -> None:
        for group, master in zip(self._groups, self._masters(), strict=True):
            offset = 0
            for parameter in group:
                if parameter is not master:
                    source = master.detach().view(-1)[offset : offset + parameter.numel()]
                    parameter.data.copy_(source.view(parameter.shape))
                offset += parameter.numel()
