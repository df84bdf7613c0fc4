"""Plain torch: whole fp32 parameters that a torch optimizer updates in place, in one process or as DDP's replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.layout import Layout
from sidecast.trainer.partitions.layouts.replicated import ReplicatedLayout
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters, TrainedNames, held_by, tensors_now

# By name, so that nothing of torch.distributed is imported for a script that does not use it.
_SHARDING_MODULES = ("FullyShardedDataParallel",)
_SHARDED_TENSORS = ("DTensor", "FlatParameter")
_SHARDING_OPTIMIZERS = ("ZeroRedundancyOptimizer",)


def plain_layout(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int = 0,
    world_size: int = 1,
    names: TrainedNames | None = None,
) -> Layout:
    """Maps what a rank holds of a model that no engine shards.

    The parameters are their own masters, in the order of ``module.named_parameters()`` whatever the optimizer's
    groups are, so that a single process uploads the parameter vector itself.

    Args:
        module: The model, without DDP's wrapper, whose prefix would be part of the names.
        optimizer: What trains it.
        rank: This rank.
        world_size: Number of ranks, each with a replica.
        names: What the run trains; kept from one mapping to the next.

    Raises:
        ConfigError: The optimizer or a parameter is not one that can be nowcasted; one line says why.
    """
    _require_unsharded(module, optimizer)
    names = names or TrainedNames()
    trainable = names.select(module, held_by(optimizer))
    if not trainable.specs:
        raise ConfigError("the optimizer trains no parameter of the model; nowcasting needs at least one")
    _require_masters(trainable)

    def masters() -> Sequence[Tensor]:
        names.note_others(trainable, held_by(optimizer))
        return tensors_now(module, trainable, optimizer)

    return ReplicatedLayout(
        trainable,
        OptimizerState([optimizer], None, are_parameters=True),
        [[parameter] for parameter in trainable.tensors],
        masters,
        rank=rank,
        world_size=world_size,
    )


def _require_unsharded(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = [type(part).__name__ for part in module.modules()]
    names += [kind.__name__ for parameter in module.parameters() for kind in type(parameter).__mro__]
    for name in (*_SHARDING_MODULES, *_SHARDED_TENSORS):
        if name in names:
            raise ConfigError(
                f"the model is sharded ({name}); nowcasting supports whole parameters (one process or DDP) and "
                "DeepSpeed's ZeRO stages 0 to 3"
            )
    if type(optimizer).__name__ in _SHARDING_OPTIMIZERS:
        raise ConfigError(
            f"the optimizer is a {type(optimizer).__name__}, which shards its state; nowcasting supports whole "
            "optimizers and DeepSpeed's"
        )


def _require_masters(trainable: TrainableParameters) -> None:
    for spec, tensor in zip(trainable.specs, trainable.tensors, strict=True):
        if tensor.dtype != torch.float32:
            raise ConfigError(
                f"parameter {spec.fqn!r} is {tensor.dtype} and has no fp32 master; nowcasting needs torch.float32 "
                "parameters: train them under autocast (bf16 or fp16), or with DeepSpeed, which keeps fp32 masters"
            )
        if not tensor.is_contiguous():
            raise ConfigError(
                f"parameter {spec.fqn!r} is not contiguous in memory (channels_last?); nowcasting needs contiguous ones"
            )
