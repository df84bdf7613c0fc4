"""What the rest of the hook may ask of a rank's part of the model, whatever optimizer holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.rollback import RollbackCopy

MergeMode = Literal["add", "replace"]


class Partition(Protocol):
    """One rank's part of the model being trained, in full precision.

    Valid between optimizer steps. ``apply``, ``write`` and ``restore`` are collective: every rank calls them, in the
    same order, also a rank that owns nothing.

    Attributes:
        parameters: Every parameter that the optimizer trains, with full shapes, in the order of
            ``model.named_parameters()``; the same on every rank.
        aliases: Further names of tied parameters, ``{alias: fqn}``.
        upload_shards: What this rank uploads; all ranks together cover every element exactly once.
        owned_shards: What this rank applies: everything where the optimizer is replicated (stage 0), otherwise
            the same as ``upload_shards``.
        master_dtype: Precision of the weights that the optimizer updates, normally ``torch.float32``.
        device: Where those weights are; the device if only some are on one.
    """

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]: ...

    @property
    def aliases(self) -> Mapping[str, str]: ...

    @property
    def upload_shards(self) -> tuple[ShardSpec, ...]: ...

    @property
    def owned_shards(self) -> tuple[ShardSpec, ...]: ...

    @property
    def master_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def require_current(self) -> None:
        """Refuses to go on with tensors that are not the optimizer's any more; local.

        Raises:
            StalePartitionError: As for ``read``.
        """

    def read(self, out: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        """Copies the upload shards, in their order.

        Args:
            out: Flat CPU float32 tensor of ``total_elements(upload_shards)`` elements.
            stream: Only enqueue the copies, on this stream: ``out`` is complete once the stream has got there. What
                overwrites the source next (optimizer step, ``apply``, ``write``, ``restore``) waits on the device.
                None: blocks.

        Raises:
            StalePartitionError: The optimizer's tensors are no longer the ones this partition was made from.
            ValueError: ``out`` is of another dtype, device, layout or size.
        """

    def read_owned(self, out: Tensor) -> None:
        """Copies the owned elements, in their order; blocks.

        Args:
            out: Flat CPU float32 tensor of ``total_elements(owned_shards)`` elements.

        Raises:
            StalePartitionError: As for ``read``.
            ValueError: ``out`` is of another dtype, device, layout or size.
        """

    def learning_rates(self) -> tuple[float, ...]:
        """The optimizer's learning rates now, one per parameter group."""

    def scale_momentum(self, factor: float) -> None:
        """Multiplies the first moments; the second moments and step counters stay.

        What the optimizers in use call them: ``exp_avg`` (the Adam family, LAMB, Lion) and ``momentum_buffer`` (SGD).

        Raises:
            StalePartitionError: As for ``read``.
        """

    def reset_moments(self) -> None:
        """Sets moments and step counters to 0, as before the first step.

        Raises:
            StalePartitionError: As for ``read``.
        """

    def apply(self, delta: Tensor, weight: float, *, mode: MergeMode = "add", base: Tensor | None = None) -> None:
        """Merges a prediction into the owned elements, then publishes them to the model on every rank.

        Args:
            delta: Prediction minus the snapshot it was made from; flat CPU float32, owned elements in order.
            weight: Factor on ``delta``.
            mode: ``add`` keeps what training did since (``now + weight * delta``); ``replace`` drops it
                (``base + weight * delta``).
            base: The snapshot the prediction was made from, like ``delta``; for ``replace`` only.

        Raises:
            StalePartitionError: As for ``read``.
            ValueError: A tensor does not fit, or ``mode`` and ``base`` do not.
        """

    def write(self, values: Tensor) -> None:
        """Sets the owned elements, then publishes them to the model on every rank.

        Args:
            values: Flat CPU float32, owned elements in order.

        Raises:
            StalePartitionError: As for ``read``.
            ValueError: ``values`` does not fit.
        """

    def capture(self, copy: RollbackCopy) -> None:
        """Keeps masters, optimizer state and loss scale as they are now, bit for bit.

        Raises:
            StalePartitionError: As for ``read``.
            RollbackError: ``copy`` is too small; the message says by how much.
        """

    def require_restorable(self, copy: RollbackCopy) -> None:
        """Refuses what ``restore`` would refuse; local, so that ranks can agree before any weight is touched.

        Raises:
            StalePartitionError: As for ``read``.
            RollbackError: As for ``restore``.
        """

    def restore(self, copy: RollbackCopy) -> None:
        """Puts back what ``capture`` kept, then publishes it to the model on every rank.

        Raises:
            StalePartitionError: As for ``read``.
            RollbackError: ``copy`` holds nothing, or was captured from other tensors.
        """

    def rollback_bytes(self) -> int:
        """How large a ``RollbackCopy`` must be: 12 bytes per owned parameter with Adam.

        Before the first optimizer step there is no state to measure; two moments per parameter are assumed then.
        """
