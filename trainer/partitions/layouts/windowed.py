"""Stages 1 and 2 and BF16_Optimizer: each rank holds one window of a flat tensor of all parameters of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment
from sidecast.trainer.partitions.layout import StalePartitionError
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState, whole_masters
from sidecast.trainer.partitions.trainable import TrainableParameters


@dataclass(frozen=True, slots=True)
class Window:
    """What a rank holds of one group of parameters.

    Attributes:
        parameters: The model's own, views of the flat tensor.
        flat: All of the group, in the precision of the model, padded; the same on every rank.
        master: This rank's window of it, in full precision.
        rank: This rank's position among those that share the flat tensor.
    """

    parameters: Sequence[nn.Parameter]
    flat: Tensor
    master: Tensor
    rank: int

    def offsets(self) -> list[int]:
        """Where each parameter begins in the flat tensor, in elements."""
        begin, itemsize = self.flat.data_ptr(), self.flat.element_size()
        return [(parameter.data_ptr() - begin) // itemsize for parameter in self.parameters]


class WindowedLayout:
    """Masters that are one window each of the flat low-precision weights; implements ``Layout``.

    A parameter's place in the flat tensor is read off its address. That stays right under round-robin order,
    alignment padding between parameters and offloaded masters, where DeepSpeed's own mapping does not always.

    Args:
        trainable: What is trained.
        state: Of the optimizer.
        windows: Looks up what this rank holds of each group.
        publish: Derives the model's weights from the masters; collective.

    Raises:
        StalePartitionError: A parameter is not in its flat tensor now, or ``windows`` raises it.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        state: OptimizerState,
        windows: Callable[[], Sequence[Window]],
        publish: Callable[[], None],
    ) -> None:
        self.trainable = trainable
        self.state = state
        self._windows = windows
        self.publish = publish
        owned: list[Fragment] = []
        for index, window in enumerate(windows()):
            window_numel = window.master.numel()
            begin = window.rank * window_numel
            pieces: list[Fragment] = []
            for parameter, offset in zip(window.parameters, window.offsets(), strict=True):
                if not 0 <= offset <= window.flat.numel() - parameter.numel():
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
        self.owned = self.upload = tuple(owned)

    def masters(self) -> Sequence[Master]:
        return whole_masters(window.master for window in self._windows())

    def placement(self) -> object:
        return [window.offsets() for window in self._windows()]
