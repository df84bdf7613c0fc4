"""FSDP2: of every parameter each rank holds a slab, cut along one dimension, or a replica of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.fragments import Fragment, even_share
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters


@dataclass(frozen=True, slots=True)
class Place:
    """Which slab of one parameter a rank holds, and who else holds the same.

    Attributes:
        dim: The dimension that is cut into slabs; None: nothing is cut.
        index: Which slab, from 0.
        num_slabs: Into how many the dimension is cut, all but the last ones of one size, as ``torch.chunk`` does.
        replica: Which of the ranks that hold this slab, from 0.
        num_replicas: How many ranks hold it.
    """

    dim: int | None
    index: int
    num_slabs: int
    replica: int
    num_replicas: int

    def ranges(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Where the slab's elements lie in the whole parameter, row-major, in the order of the slab's own memory.

        Args:
            shape: Of the whole parameter.

        Returns:
            (start, stop) pairs in elements; none if the slab is empty.
        """
        if self.dim is None:
            return [(0, prod(shape))]
        size = shape[self.dim]
        thickness = -(-size // self.num_slabs)
        begin, end = min(self.index * thickness, size), min((self.index + 1) * thickness, size)
        inner = prod(shape[self.dim + 1 :])
        if begin == end or inner == 0:
            return []
        outer = range(prod(shape[: self.dim]))
        # A dimension that is held whole is cut nowhere.
        if end - begin == size:
            return [(0, len(outer) * size * inner)]
        return [((row * size + begin) * inner, (row * size + end) * inner) for row in outer]


class PlacedLayout:
    """Masters that are the parameters themselves, of each a slab on this rank; implements ``Layout``.

    Args:
        trainable: What is trained.
        state: Of the optimizer, whose keys are the parameters.
        places: Of every parameter of ``trainable``, in its order.
        masters: Looks the parameters up in the optimizer, in that order.
        local_of: The memory that this rank holds of a parameter.

    Raises:
        ConfigError: A parameter's memory is not the slab that its place says, or not contiguous.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        state: OptimizerState,
        places: Sequence[Place],
        masters: Callable[[], Sequence[Tensor]],
        local_of: Callable[[Tensor], Tensor],
    ) -> None:
        self.trainable = trainable
        self.state = state
        self._masters = masters
        self._local_of = local_of
        owned: list[Fragment] = []
        upload: list[Fragment] = []
        for index, (spec, parameter, place) in enumerate(zip(trainable.specs, trainable.tensors, places, strict=True)):
            pieces = _fragments(index, spec, place)
            _require_slab(spec, local_of(parameter), sum(piece.shard.numel for piece in pieces))
            owned += pieces
            upload += even_share(pieces, place.replica, place.num_replicas)
        self.owned, self.upload = tuple(owned), tuple(upload)

    @torch.no_grad()
    def masters(self) -> Sequence[Master]:
        # Without gradients for all of them at once: to switch them off for each takes longer than all the rest.
        return [Master(parameter, self._local_of(parameter)) for parameter in self._masters()]

    def placement(self) -> object:
        # Parameters are their own masters, and cannot move relative to them.
        return None

    def publish(self) -> None:
        """Nothing to do: the next forward pass gathers what the masters have become."""


def _fragments(index: int, spec: ParameterSpec, place: Place) -> list[Fragment]:
    fragments: list[Fragment] = []
    offset = 0
    for start, stop in place.ranges(spec.shape):
        fragments.append(Fragment(ShardSpec(index, start, stop), index, offset))
        offset += stop - start
    return fragments


def _require_slab(spec: ParameterSpec, local: Tensor, numel: int) -> None:
    if local.numel() != numel:
        raise ConfigError(
            f"parameter {spec.fqn!r} has {local.numel()} elements on this rank, where its placements say {numel}; "
            "nowcasting supports DTensors that are cut as fully_shard cuts them"
        )
    if not local.is_contiguous():
        raise ConfigError(f"parameter {spec.fqn!r} is not contiguous in memory; nowcasting needs contiguous ones")
