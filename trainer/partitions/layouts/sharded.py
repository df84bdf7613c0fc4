"""Stage 3: every parameter is split evenly among the ranks, padded at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState, whole_masters
from sidecast.trainer.partitions.trainable import TrainableParameters


@dataclass(frozen=True, slots=True)
class Split:
    """One parameter's even split among ranks.

    Attributes:
        parameter: The model's own, which may be empty now.
        numel: Elements of each rank's piece, with the padding.
        rank: Whose piece this rank holds.
    """

    parameter: nn.Parameter
    numel: int
    rank: int


class ShardedLayout:
    """Masters that hold this rank's split of many parameters, one after another; implements ``Layout``.

    Args:
        trainable: What is trained.
        state: Of the optimizer.
        sub_groups: Per master, the splits that it holds, with the padding.
        masters: Looks the masters up in the optimizer.
        publish: Derives the model's weights from the masters; collective.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        state: OptimizerState,
        sub_groups: Sequence[Sequence[Split]],
        masters: Callable[[], Sequence[Tensor]],
        publish: Callable[[], None],
    ) -> None:
        self.trainable = trainable
        self.state = state
        self._masters = masters
        self.publish = publish
        owned: list[Fragment] = []
        for index, sub_group in enumerate(sub_groups):
            offset = 0
            for split in sub_group:
                position = trainable.index_of.get(id(split.parameter))
                if position is not None:
                    start = split.rank * split.numel
                    stop = min(start + split.numel, trainable.specs[position].numel)
                    if start < stop:
                        owned.append(Fragment(ShardSpec(position, start, stop), index, offset))
                offset += split.numel
        self.owned = self.upload = tuple(owned)

    def masters(self) -> Sequence[Master]:
        return whole_masters(self._masters())

    def placement(self) -> object:
        return None
