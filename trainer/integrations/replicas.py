"""Training runs without an engine: one process, DDP's replicas, or FSDP2's shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from sidecast.trainer.hook.training_run import TrainingRun, model_config_of
from sidecast.trainer.partitions.plain import is_placed, plain_layout, shard_again
from sidecast.trainer.partitions.trainable import TrainedNames


def replica_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, applied_steps: Callable[[], int], local_rank: int
) -> TrainingRun:
    """This rank's replica of a model, or what FSDP2 has left it; called on every rank.

    Args:
        model: The module itself, without wrappers.
        optimizer: The torch optimizer itself, without wrappers.
        applied_steps: Optimizer steps applied so far.
        local_rank: This rank's number on its host.
    """
    is_alone = not (dist.is_available() and dist.is_initialized())
    rank, world_size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    names = TrainedNames()
    shard_again(model, optimizer)
    return TrainingRun(
        map_layout=lambda: plain_layout(model, optimizer, rank=rank, world_size=world_size, names=names),
        applied_steps=applied_steps,
        model_config=model_config_of(model),
        local_rank=local_rank,
        stage="fsdp2" if is_placed(model, optimizer) else "none",
    )
