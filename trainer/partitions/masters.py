"""The partition that every kind of optimizer shares: copies between flat buffers and master tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec, total_elements
from sidecast.trainer.partitions.contract import MergeMode
from sidecast.trainer.partitions.fragments import Run, runs_of
from sidecast.trainer.partitions.host_copy import copy_to_host
from sidecast.trainer.partitions.layout import Layout, StalePartitionError
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.rollback import RollbackCopy
from sidecast.trainer.partitions.trainable import TrainableParameters

# Large enough to hide the cost of a call, small enough to stay in a core's cache.
_SCRATCH_ELEMENTS = 1 << 18


class MasterPartition:
    """A rank's part of the model, as the optimizer's master tensors; implements ``Partition``.

    Args:
        trainable: What is trained.
        layout: Where the masters are and how they are published.
        state: What else the optimizer would have to get back in a rollback.
    """

    def __init__(
        self,
        trainable: TrainableParameters,
        layout: Layout,
        state: OptimizerState,
    ) -> None:
        self.parameters: tuple[ParameterSpec, ...] = trainable.specs
        self.aliases: Mapping[str, str] = trainable.aliases
        self.upload_shards: tuple[ShardSpec, ...] = tuple(fragment.shard for fragment in layout.upload)
        self.owned_shards: tuple[ShardSpec, ...] = tuple(fragment.shard for fragment in layout.owned)
        self._layout = layout
        self._state = state
        self._copies: torch.cuda.Stream | None = None
        self._upload_runs = runs_of(layout.upload)
        self._owned_runs = runs_of(layout.owned)
        self._num_upload = total_elements(self.upload_shards)
        self._num_owned = total_elements(self.owned_shards)
        self._known_masters = tuple(layout.masters())
        self._known_placement = layout.placement()
        self._scratch: dict[torch.device, Tensor] = {}
        self.master_dtype: torch.dtype = self._known_masters[0].dtype
        devices = [master.device for master in self._known_masters]
        self.device: torch.device = next((device for device in devices if device.type != "cpu"), devices[0])

    def require_current(self) -> None:
        self._current_masters()

    @torch.no_grad()
    def read(self, out: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        flats = self._current_masters()
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
        self._state.before_next_step(self._await_copies)

    @torch.no_grad()
    def read_owned(self, out: Tensor) -> None:
        flats = self._current_masters()
        _require_flat("out", out, self._num_owned)
        for run in self._owned_runs:
            copy_to_host(out[run.buffer], flats[run.master][run.source])

    def learning_rates(self) -> tuple[float, ...]:
        return self._state.learning_rates()

    @torch.no_grad()
    def scale_momentum(self, factor: float) -> None:
        self._current_masters()
        self._state.scale_momentum(self._known_masters, factor)

    @torch.no_grad()
    def reset_moments(self) -> None:
        self._current_masters()
        self._state.reset_moments(self._known_masters)

    @torch.no_grad()
    def apply(self, delta: Tensor, weight: float, *, mode: MergeMode = "add", base: Tensor | None = None) -> None:
        if mode not in ("add", "replace"):
            raise ValueError(f"merge mode is {mode!r}; it must be 'add' or 'replace'")
        if (mode == "replace") != (base is not None):
            raise ValueError("base is given with mode 'replace', and only then")
        flats = self._current_masters()
        self._await_copies()
        _require_flat("delta", delta, self._num_owned)
        if base is not None:
            _require_flat("base", base, self._num_owned)
        for piece in _pieces(self._owned_runs, _SCRATCH_ELEMENTS):
            master = flats[piece.master][piece.source]
            # Product and sum are rounded one after the other, never fused: replicas on unequal processors must agree.
            step = self._scratch_of(master.device)[: piece.numel]
            step.copy_(delta[piece.buffer])
            step.mul_(weight)
            if base is None:
                master.add_(step)
            else:
                step.add_(base[piece.buffer].to(step.device))
                master.copy_(step)
        self._layout.publish()

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        flats = self._current_masters()
        self._await_copies()
        _require_flat("values", values, self._num_owned)
        for run in self._owned_runs:
            flats[run.master][run.source].copy_(values[run.buffer])
        self._layout.publish()

    @torch.no_grad()
    def capture(self, copy: RollbackCopy) -> None:
        self._current_masters()
        self._state.capture(self._known_masters, copy)

    def require_restorable(self, copy: RollbackCopy) -> None:
        self._current_masters()
        self._state.require_restorable(self._known_masters, copy)

    @torch.no_grad()
    def restore(self, copy: RollbackCopy) -> None:
        self._current_masters()
        self._await_copies()
        self._state.restore(self._known_masters, copy)
        self._layout.publish()

    def rollback_bytes(self) -> int:
        return self._state.num_bytes(self._known_masters)

    def _current_masters(self) -> Sequence[Tensor]:
        """Flat views of the masters, made anew because offloading moves their memory."""
        masters = self._layout.masters()
        if (
            len(masters) != len(self._known_masters)
            or any(now is not known for now, known in zip(masters, self._known_masters, strict=True))
            or self._layout.placement() != self._known_placement
        ):
            raise StalePartitionError(
                "the optimizer's tensors moved since this partition was made; call partition_of(engine) again "
                "after load_checkpoint and reload_states, and not while states are offloaded"
            )
        return [master.detach().view(-1) for master in masters]

    def _scratch_of(self, device: torch.device) -> Tensor:
        if device not in self._scratch:
            self._scratch[device] = torch.empty(_SCRATCH_ELEMENTS, dtype=torch.float32, device=device)
        return self._scratch[device]

    def _await_copies(self) -> None:
        """Makes what the device does next wait for the copies of ``read``; the host goes on."""
        if self._copies is not None:
            torch.cuda.current_stream(self._copies.device).wait_stream(self._copies)
            self._copies = None


def _pieces(runs: Sequence[Run], limit: int) -> Iterator[Run]:
    for run in runs:
        for done in range(0, run.numel, limit):
            yield Run(run.start + done, run.master, run.offset + done, min(limit, run.numel - done))


def _require_flat(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != (numel,):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
            f"it must be float32 of shape ({numel},) on the CPU"
        )
