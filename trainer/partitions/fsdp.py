"""FSDP2: models whose parameters ``fully_shard`` has made DTensors, each of which is its own fp32 master.

Each refusal is one line that says what is allowed instead. What is tensor, pipeline or expert parallel is told by where
its parameters lie, and named by the dimensions of its mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.layout import Layout, StalePartitionError
from sidecast.trainer.partitions.layouts.placed import Place, PlacedLayout
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.trainable import TrainedNames, held_by, tensors_now

_SUPPORTED = "nowcasting supports FSDP2's data parallelism (one sharded dimension, others of replicas) over all ranks"


def fsdp_layout(module: nn.Module, optimizer: torch.optim.Optimizer, *, world_size: int, names: TrainedNames) -> Layout:
    """Maps what this rank holds of a model that ``fully_shard`` has sharded; local.

    Args:
        module: The model, on which ``fully_shard`` was called.
        optimizer: What trains it, made after ``fully_shard``.
        world_size: Number of ranks.
        names: What the run trains; kept from one mapping to the next.

    Raises:
        ConfigError: A parameter is not a slab of fp32 that ``fully_shard`` has cut over all ranks; one line says why.
        StalePartitionError: The model's parameters are gathered now, as between a forward and a backward pass.
    """
    _require_sharded_now(module, optimizer)
    if not any(isinstance(item, DTensor) for item in held_by(optimizer)):
        raise ConfigError("the optimizer holds none of the model's sharded parameters; make it after fully_shard")
    trainable = names.select(module, held_by(optimizer))
    if not trainable.specs:
        raise ConfigError("the optimizer trains no parameter of the model; nowcasting needs at least one")
    if not any(isinstance(part, FSDPModule) for part in module.modules()):
        raise ConfigError(
            f"the model's parameters are DTensors that fully_shard has not made (tensor parallelism?); {_SUPPORTED}"
        )
    places = [
        _place_of(spec.fqn, parameter, world_size)
        for spec, parameter in zip(trainable.specs, trainable.tensors, strict=True)
    ]

    def masters() -> Sequence[Tensor]:
        names.note_others(trainable, held_by(optimizer))
        found = tensors_now(module, trainable, optimizer)
        if len(found) < len(trainable.tensors):
            _require_sharded_now(module, optimizer)
        return found

    state = OptimizerState([optimizer], None, _local_of, are_parameters=True)
    return PlacedLayout(trainable, state, places, masters, _local_of)


def reshard(module: nn.Module) -> None:
    """Frees gathered parameters, so that the next forward pass gathers them anew from what ranks hold; on every rank.

    Where only some ranks did it, their next forward pass would wait for the others.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _local_of(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if not torch.is_grad_enabled():
        return tensor.to_local()
    # Without a record for autograd, the memory itself.
    with torch.no_grad():
        return tensor.to_local()


def _require_sharded_now(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    registered = {id(parameter) for parameter in module.parameters()}
    missing = any(isinstance(item, DTensor) and id(item) not in registered for item in held_by(optimizer))
    if missing and any(not isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise StalePartitionError(
            "the model's parameters are gathered now, not sharded; its next backward pass, or reshard(), shards them"
        )


def _place_of(fqn: str, parameter: Tensor, world_size: int) -> Place:
    if not isinstance(parameter, DTensor):
        raise ConfigError(
            f"parameter {fqn!r} is trained, but fully_shard has left it out (ignored_params, or not called on the "
            "whole model), and nobody keeps ranks equal; nowcasting needs fully_shard on all that is trained"
        )
    if parameter.dtype != torch.float32:
        raise ConfigError(
            f"parameter {fqn!r} is {parameter.dtype} and has no fp32 master; nowcasting needs torch.float32 "
            "parameters: load the model in fp32, and compute in bf16 by MixedPrecisionPolicy(param_dtype=...)"
        )
    mesh = parameter.device_mesh
    if mesh.size() != world_size:
        raise ConfigError(
            f"parameter {fqn!r} lies on {mesh.size()} of {world_size} ranks, on {_named(mesh)}: tensor, pipeline or "
            f"expert parallelism; {_SUPPORTED}"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "the mesh has all ranks"
    dim: int | None = None
    index, num_slabs, replica, num_replicas = 0, 1, 0, 1
    for position, size, placement in zip(coordinate, mesh.shape, parameter.placements, strict=True):
        if size == 1:
            continue
        if type(placement) is Replicate:
            replica, num_replicas = replica * size + position, num_replicas * size
        elif type(placement) is Shard and dim is None:
            dim, index, num_slabs = placement.dim, position, size
        else:
            raise ConfigError(
                f"parameter {fqn!r} is placed as {parameter.placements} on {_named(mesh)}: tensor or expert "
                f"parallelism; {_SUPPORTED}"
            )
    return Place(dim, index, num_slabs, replica, num_replicas)


def _named(mesh: Any) -> str:
    """A mesh by its dimensions, and the one that it was cut from."""
    own = _dimensions(mesh)
    root = _dimensions(mesh._get_root_mesh()) if hasattr(mesh, "_get_root_mesh") else own
    return f"mesh {own}" if root == own else f"mesh {own} of {root}"


def _dimensions(mesh: Any) -> str:
    names = mesh.mesh_dim_names or [f"dimension {index}" for index in range(mesh.ndim)]
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True)) + ")"
