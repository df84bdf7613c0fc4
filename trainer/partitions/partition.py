"""A rank's part of the model: copies between flat host buffers and the optimizer's master tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec, total_elements
from sidecast.trainer.partitions.fragments import Fragment, Run, runs_of
from sidecast.trainer.partitions.host_copy import copy_to_host
from sidecast.trainer.partitions.layout import Layout, StalePartitionError
from sidecast.trainer.partitions.optimizer_state import Master
from sidecast.trainer.partitions.rollback import RollbackCopy

# Large enough to hide the cost of a call, small enough to stay in a core's cache.
_SCRATCH_ELEMENTS = 1 << 18
_BITS_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Partition:
    """One rank's part of the model being trained, in full precision.

    Valid between optimizer steps. ``apply`` and ``restore`` are collective: every rank calls them, in the same order,
    also a rank that owns nothing. Each use compares the optimizer's tensors with those that were mapped; if they have
    moved, they are mapped anew, and what is refused then is only what cannot be mapped or has other ranges.

    Args:
        map_layout: Finds out what this rank holds as it lies now; local, never a collective.

    Attributes:
        parameters: Every parameter that the optimizer trains, with full shapes, in the order of
            ``model.named_parameters()``; the same on every rank.
        aliases: Further names of tied parameters, ``{alias: fqn}``.
        upload_shards: What this rank uploads; all ranks together cover every element exactly once.
        owned_shards: What this rank applies: everything where the optimizer is replicated (stage 0), otherwise
            the same as ``upload_shards``.
        master_dtype: Precision of the weights that the optimizer updates, normally ``torch.float32``.
        device: Where those weights are; the device if only some are on one.

    Raises:
        ConfigError: What this rank holds is not something that can be nowcasted.
        StalePartitionError: The optimizer's tensors are away now, and may come back.
    """

    def __init__(self, map_layout: Callable[[], Layout]) -> None:
        self._map_layout = map_layout
        self._scratch: dict[torch.device, Tensor] = {}
        self._copies: torch.cuda.Stream | None = None
        layout = map_layout()
        self.parameters: tuple[ParameterSpec, ...] = layout.trainable.specs
        self.aliases: Mapping[str, str] = layout.trainable.aliases
        self.upload_shards = _shards(layout.upload)
        self.owned_shards = _shards(layout.owned)
        self.master_dtype: torch.dtype = layout.masters()[0].local.dtype
        self._num_upload = total_elements(self.upload_shards)
        self._num_owned = total_elements(self.owned_shards)
        self._use(layout)

    @property
    def has_replicas(self) -> bool:
        """Whether other ranks hold what this one holds, so that it uploads a part of that only."""
        return self.upload_shards != self.owned_shards

    def map_anew(self) -> None:
        """Finds out again where everything lies, as when a checkpoint was loaded; local.

        Raises:
            StalePartitionError: What this rank holds cannot be mapped any more, or is not what it was: the service and
                the buffers know the ranges of before.
        """
        try:
            layout = self._map_layout()
        except ConfigError as error:
            raise StalePartitionError(f"the optimizer's tensors moved and cannot be mapped anew: {error}") from error
        for what, now, before in (
            ("parameters", layout.trainable.specs, self.parameters),
            ("upload_shards", _shards(layout.upload), self.upload_shards),
            ("owned_shards", _shards(layout.owned), self.owned_shards),
            ("master_dtype", layout.masters()[0].local.dtype, self.master_dtype),
        ):
            if now != before:
                raise StalePartitionError(f"the optimizer was rebuilt with other {what}; nowcasting needs a new attach")
        self._use(layout)

    def require_current(self) -> None:
        """Refuses to go on with tensors that are not the optimizer's any more; local.

        Raises:
            StalePartitionError: The optimizer's tensors moved, and ``map_anew`` refuses what they are now.
        """
        self._current_masters()

    @torch.no_grad()
    def read(self, out: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """Copies the upload shards, in their order.

        Args:
            out: Flat CPU float32 tensor of ``total_elements(upload_shards)`` elements.
            stream: Only enqueue the copies, on this stream: ``out`` is complete once the stream has got there. What
                overwrites the source next (optimizer step, ``apply``, ``restore``) waits on the device. None: blocks.

        Raises:
            StalePartitionError: As for ``require_current``.
            ValueError: ``out`` is of another dtype, device, layout or size.
        """
        flats = self._current_flats()
        _require_flat("out", out, self._num_upload)
        if stream is None:
            for run in self._upload_runs:
                copy_to_host(out[run.buffer], flats[run.master][run.source])
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for run in self._upload_runs:
                out[run.buffer].copy_(flats[run.master][run.source], non_blocking=True)
        self._copies = stream
        self._layout.state.before_next_step(self._await_copies)

    @torch.no_grad()
    def read_owned(self, out: Tensor) -> None:
        """Copies the owned elements, in their order; blocks.

        Args:
            out: Flat CPU float32 tensor of ``total_elements(owned_shards)`` elements.

        Raises:
            StalePartitionError: As for ``require_current``.
            ValueError: ``out`` is of another dtype, device, layout or size.
        """
        flats = self._current_flats()
        _require_flat("out", out, self._num_owned)
        for run in self._owned_runs:
            copy_to_host(out[run.buffer], flats[run.master][run.source])

    @torch.no_grad()
    def checksums(self, first: int = 0, every: int = 1) -> list[int]:
        """Sums up the bits of what this rank owns of parameters, as integers; local, and blocks.

        Equal elements have equal sums, whatever device they are on.

        Args:
            first: Index of the first parameter that is summed up.
            every: Of it and those after it, each so-manieth is.

        Returns:
            One sum for each of ``parameters``; 0 for those that are left out.

        Raises:
            StalePartitionError: As for ``require_current``.
        """
        flats = self._current_flats()
        sums = torch.zeros(len(self.parameters), dtype=torch.int64, device=self.device)
        for parameter, fragments in groupby(self._layout.owned, key=lambda fragment: fragment.shard.parameter):
            if parameter not in range(first, len(self.parameters), every):
                continue
            # In pieces: torch sums integers up in a copy of twice their size.
            for piece in _pieces(runs_of(fragments), _SCRATCH_ELEMENTS):
                sums[parameter] += _sum_of_bits(flats[piece.master][piece.source]).to(sums.device)
        found: list[int] = sums.tolist()
        return found

    def learning_rates(self) -> tuple[float, ...]:
        """The optimizer's learning rates now, one per parameter group; nan where a group has none that is a number."""
        return self._layout.state.learning_rates()

    @torch.no_grad()
    def scale_momentum(self, factor: float) -> None:
        """Multiplies the first moments; the second moments and step counters stay.

        What the optimizers in use call them: ``exp_avg`` (the Adam family, LAMB, Lion) and ``momentum_buffer`` (SGD).

        Raises:
            StalePartitionError: As for ``require_current``.
        """
        masters = self._current_masters()
        self._layout.state.scale_momentum(masters, factor)

    def require_scalable(self) -> None:
        """Refuses what ``scale_momentum`` cannot multiply; local.

        Raises:
            StalePartitionError: As for ``require_current``.
            RollbackError: A first moment is quantized.
        """
        masters = self._current_masters()
        self._layout.state.require_scalable(masters)

    def require_resettable(self) -> None:
        """Refuses what ``reset_moments`` would have to guess; local.

        Raises:
            StalePartitionError: As for ``require_current``.
            RollbackError: Nobody knows what an entry of the optimizer's state begins with.
        """
        masters = self._current_masters()
        self._layout.state.require_resettable(masters)

    @torch.no_grad()
    def reset_moments(self) -> None:
        """Brings moments and step counters back to where they were before the first step.

        Raises:
            StalePartitionError: As for ``require_current``.
        """
        masters = self._current_masters()
        self._layout.state.reset_moments(masters)

    @torch.no_grad()
    def apply(self, delta: Tensor, weight: float, *, base: Tensor | None = None) -> None:
        """Merges a prediction into the owned elements, then publishes them to the model on every rank; collective.

        Args:
            delta: Prediction minus the snapshot it was made from; flat CPU float32, owned elements in order.
            weight: Factor on ``delta``.
            base: The snapshot that the prediction was made from, like ``delta``, to drop what training did since
                (``base + weight * delta``). None: that is kept (``now + weight * delta``).

        Raises:
            StalePartitionError: As for ``require_current``.
            ValueError: A tensor does not fit.
        """
        flats = self._current_flats()
        self._await_copies()
        _require_flat("delta", delta, self._num_owned)
        if base is not None:
            _require_flat("base", base, self._num_owned)
        frozen = self._frozen_masters()
        for piece in _pieces(self._owned_runs, _SCRATCH_ELEMENTS):
            if piece.master in frozen:
                continue
            master = flats[piece.master][piece.source]
            # Product and sum are rounded one after the other, never fused: replicas on unequal processors must agree.
            step = self._product(delta[piece.buffer], weight, master.device)
            if base is None:
                master.add_(step)
            else:
                master.copy_(step + base[piece.buffer].to(step.device))
        self._layout.publish()

    @torch.no_grad()
    def capture(self, copy: RollbackCopy) -> None:
        """Keeps masters, optimizer state and loss scale as they are now, bit for bit.

        Raises:
            StalePartitionError: As for ``require_current``.
            RollbackError: ``copy`` is too small; the message says by how much.
        """
        masters = self._current_masters()
        self._layout.state.capture(masters, copy)

    def require_restorable(self, copy: RollbackCopy) -> None:
        """Refuses what ``restore`` would refuse; local, so that ranks can agree before any weight is touched.

        Raises:
            StalePartitionError: As for ``require_current``.
            RollbackError: As for ``restore``.
        """
        masters = self._current_masters()
        self._layout.state.require_restorable(masters, copy)

    @torch.no_grad()
    def restore(self, copy: RollbackCopy) -> None:
        """Puts back what ``capture`` kept, then publishes it to the model on every rank; collective.

        Raises:
            StalePartitionError: As for ``require_current``.
            RollbackError: ``copy`` holds nothing, or was captured from other tensors.
        """
        masters = self._current_masters()
        self._await_copies()
        self._layout.state.restore(masters, copy)
        self._layout.publish()

    def rollback_bytes(self) -> int:
        """How large a ``RollbackCopy`` must be: 12 bytes per owned parameter with Adam.

        Before the first optimizer step there is no state to measure; two moments per parameter are assumed then.
        """
        return self._layout.state.num_bytes(self._known_masters)

    def _use(self, layout: Layout) -> None:
        self._layout = layout
        self._known_masters = tuple(layout.masters())
        self._known_placement = layout.placement()
        self._upload_runs = runs_of(layout.upload)
        self._owned_runs = runs_of(layout.owned)
        devices = [master.local.device for master in self._known_masters]
        self.device: torch.device = next((device for device in devices if device.type != "cpu"), devices[0])

    def _is_current(self) -> bool:
        try:
            masters = self._layout.masters()
            return (
                len(masters) == len(self._known_masters)
                and all(now.key is known.key for now, known in zip(masters, self._known_masters, strict=True))
                and self._layout.placement() == self._known_placement
            )
        except StalePartitionError:
            return False

    def _current_masters(self) -> Sequence[Master]:
        """The masters, looked up anew at each use because offloading moves the memory of the same tensors."""
        if not self._is_current():
            self.map_anew()
        return self._layout.masters()

    def _current_flats(self) -> Sequence[Tensor]:
        return [master.local.detach().view(-1) for master in self._current_masters()]

    def _frozen_masters(self) -> set[int]:
        """The masters that are parameters of the model itself, and whose script wants them to stay as they are now."""
        parameters = self._layout.trainable.index_of
        return {
            index
            for index, master in enumerate(self._layout.masters())
            if id(master.key) in parameters and not master.key.requires_grad
        }

    def _product(self, values: Tensor, weight: float, device: torch.device) -> Tensor:
        """Values of host memory times a factor, on a device; valid until the next call."""
        if device.type == "cpu" and weight == 1.0:
            # As of most pushes: then they are added in one pass over memory.
            return values
        scratch = self._scratch_of(device)[: values.numel()]
        if device.type == "cpu":
            return torch.mul(values, weight, out=scratch)
        return scratch.copy_(values).mul_(weight)

    def _scratch_of(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = torch.empty(_SCRATCH_ELEMENTS, dtype=torch.float32, device=device)
        return self._scratch[device]

    def _await_copies(self) -> None:
        """Makes what the device does next wait for the copies of ``read``; the host goes on."""
        if self._copies is not None:
            torch.cuda.current_stream(self._copies.device).wait_stream(self._copies)
            self._copies = None


def _shards(fragments: Iterable[Fragment]) -> tuple[ShardSpec, ...]:
    return tuple(fragment.shard for fragment in fragments)


def _pieces(runs: Sequence[Run], limit: int) -> Iterator[Run]:
    for run in runs:
        for done in range(0, run.numel, limit):
            yield Run(run.start + done, run.master, run.offset + done, min(limit, run.numel - done))


def _sum_of_bits(flat: Tensor) -> Tensor:
    return flat.view(_BITS_OF_BYTES[flat.itemsize]).sum(dtype=torch.int64)


def _require_flat(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != (numel,):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
            f"it must be float32 of shape ({numel},) on the CPU"
        )
