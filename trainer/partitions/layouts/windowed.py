"""Stages 1 and 2 and BF16_Optimizer: each rank holds one window of a flat tensor of all parameters of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment
from sidecast.trainer.partitions.layout import StalePartitionError, require_loaded
from sidecast.trainer.partitions.trainable import TrainableParameters


class WindowedLayout:
    """Masters that are one window each of the flat low-precision weights.

    A parameter's place in the flat tensor is read off its address. That stays right under round-robin order,
    alignment padding between parameters and offloaded masters, where DeepSpeed's own mapping does not always.

    Args:
        trainable: What is trained.
        optimizer: The ZeRO or BF16 optimizer.
        groups: Per group, the model's parameters.
        flats: Per group, the flat tensor that those parameters are views of; looked up in the optimizer.
        masters: Per group, this rank's window in full precision; looked up in the optimizer.
        ranks: Per group, this rank's position among those that share the flat tensor.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        optimizer: Any,
        groups: Sequence[Sequence[nn.Parameter]],
        flats: Callable[[], Sequence[Tensor]],
        masters: Callable[[], Sequence[Tensor]],
        ranks: Sequence[int],
    ) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._flats = flats
        self.masters = masters
        owned: list[Fragment] = []
        for index, (group, offsets) in enumerate(zip(groups, self._offsets(), strict=True)):
            window_numel = masters()[index].numel()
            begin = ranks[index] * window_numel
            pieces: list[Fragment] = []
            for parameter, offset in zip(group, offsets, strict=True):
                if not 0 <= offset <= flats()[index].numel() - parameter.numel():
                    raise StalePartitionError(
                        f"a parameter of shape {tuple(parameter.shape)} lies outside its group's flat tensor; "
                        "its weights must be on the device, between optimizer steps"
                    )
                position = trainable.index_of.get(id(parameter))
                start = max(begin - offset, 0)
                stop = min(begin + window_numel - offset, parameter.numel())
                if position is not None and start < stop:
                    pieces.append(Fragment(ShardSpec(position, start, stop), index, offset + start - begin))
            owned.extend(sorted(pieces, key=lambda piece: piece.offset))
        self.owned = tuple(owned)
        self.upload = self.owned

    def _offsets(self) -> list[list[int]]:
        require_loaded(self._optimizer)
        offsets = []
        for group, flat in zip(self._groups, self._flats(), strict=True):
            begin, itemsize = flat.data_ptr(), flat.element_size()
            offsets.append([(parameter.data_ptr() - begin) // itemsize for parameter in group])
        return offsets

    def placement(self) -> object:
        return self._offsets()

    def publish(self) -> None:
        self._optimizer.update_lp_params()
