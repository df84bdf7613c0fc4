"""Plain torch: fp32 parameters that a torch optimizer updates in place, whole (one process, DDP) or FSDP2's shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.layout import Layout
from sidecast.trainer.partitions.layouts.replicated import ReplicatedLayout
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters, TrainedNames, held_by, tensors_now

# By name, so that nothing of torch.distributed is imported for a script that does not use it.
_SHARDING_MODULES = ("FullyShardedDataParallel",)
_SHARDED_TENSORS = ("FlatParameter",)
_PLACED_TENSOR = "DTensor"
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
    groups are, so that a single process uploads the parameter vector itself. If they are DTensors, each rank holds
    its slabs of them.

    Args:
        module: The model, without DDP's wrapper, whose prefix would be part of the names.
        optimizer: What trains it.
        rank: This rank.
        world_size: Number of ranks, each with a replica, or with slabs.
        names: What the run trains; kept from one mapping to the next.

    Raises:
        ConfigError: The optimizer or a parameter is not one that can be nowcasted; one line says why.
        StalePartitionError: FSDP2 has gathered parameters, and will shard them again.
    """
    names = names or TrainedNames()
    _require_unsharded(module, optimizer)
    if is_placed(module, optimizer):
        # Imported here: other scripts have no use for it.
        from sidecast.trainer.partitions.fsdp import fsdp_layout

        return fsdp_layout(module, optimizer, world_size=world_size, names=names)
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


def is_placed(module: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters are DTensors: the model's, or, while FSDP2 has gathered those, the optimizer's."""
    return _PLACED_TENSOR in _kinds((*module.parameters(), *held_by(optimizer)))


def shard_again(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Lets go of what FSDP2 has gathered, as an evaluation leaves it, so that a model can be mapped; on every rank."""
    if is_placed(module, optimizer):
        from sidecast.trainer.partitions.fsdp import reshard

        reshard(module)


def _kinds(tensors: Iterable[Tensor]) -> set[str]:
    return {kind.__name__ for tensor in tensors for kind in type(tensor).__mro__}


def _require_unsharded(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {type(part).__name__ for part in module.modules()} | _kinds(module.parameters())
    for name in (*_SHARDING_MODULES, *_SHARDED_TENSORS):
        if name in names:
            raise ConfigError(
                f"the model is sharded ({name}); nowcasting supports whole parameters (one process or DDP), FSDP2 "
                "(fully_shard) and DeepSpeed's ZeRO stages 0 to 3"
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
