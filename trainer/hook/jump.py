"""One jump, as the settings want it merged: the same arithmetic in a run and in its replay."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sidecast.trainer.partitions import Partition


def merge(
    partition: Partition,
    delta: Tensor,
    weight: float,
    *,
    base: Tensor | None,
    moments: Literal["keep", "reset", "scale"],
) -> None:
    """Moves the weights, and does to the optimizer's moments what is to be done; collective.

    Args:
        partition: What this rank holds.
        delta: Prediction minus base, owned elements in order.
        weight: Factor on ``delta``.
        base: What the jump starts from if it replaces the weights of now; None: it is added to them.
        moments: ``keep``, ``reset``, or ``scale`` the first ones by ``1 - weight``.
    """
    if base is None:
        partition.apply(delta, weight)
    else:
        partition.apply(delta, weight, mode="replace", base=base)
    if moments == "reset":
        partition.reset_moments()
    elif moments == "scale":
        partition.scale_momentum(1.0 - weight)
