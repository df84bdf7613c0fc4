"""DeepSpeed's engines: which are refused, which layout fits the optimizer, and facts that are not their weights.

A layout is decided by what the optimizer has, not by the stage in its settings. Each refusal is one line that says what
is allowed instead.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.contract import Partition
from sidecast.trainer.partitions.layout import Layout
from sidecast.trainer.partitions.layouts.replicated import ReplicatedLayout
from sidecast.trainer.partitions.layouts.sharded import ShardedLayout
from sidecast.trainer.partitions.layouts.windowed import WindowedLayout
from sidecast.trainer.partitions.masters import MasterPartition
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters, trainable_parameters


def partition_of(engine: Any) -> Partition:
    """Maps what this rank holds of the model.

    Call it again after ``engine.load_checkpoint``; a partition that no longer fits raises instead of reading on.

    Args:
        engine: What ``deepspeed.initialize`` returned, with ZeRO stage 0 to 3.

    Raises:
        ConfigError: The engine uses what is not supported (tensor, pipeline or expert parallelism, NVMe offload,
            ...); one line names it and what is allowed.
    """
    require_supported(engine)
    optimizer = engine.optimizer
    trainable, layout = _layout_of(engine.module, optimizer)
    if not trainable.specs:
        raise ConfigError("the optimizer trains no parameter of the model; nowcasting needs at least one")
    inner = [getattr(optimizer, "optimizer", optimizer)]
    # Stage 3 with partial offload steps the sub-groups that stay on the device with a second optimizer.
    if getattr(optimizer, "backup_optimizer", None) is not None:
        inner.append(optimizer.backup_optimizer)
    loss_scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    state = OptimizerState(inner, loss_scaler)
    return MasterPartition(trainable, layout, state)


def _layout_of(module: nn.Module, optimizer: Any) -> tuple[TrainableParameters, Layout]:
    def named(groups: Any) -> TrainableParameters:
        return trainable_parameters(module, list(chain.from_iterable(groups)))

    def windowed(groups: Any, flats: str, masters: str) -> tuple[TrainableParameters, Layout]:
        for group in optimizer.real_dp_process_group:
            require_whole_world(group)
        ranks = [dist.get_rank(group) for group in optimizer.real_dp_process_group]
        trainable = named(groups)
        return trainable, WindowedLayout(
            trainable, optimizer, groups, lambda: getattr(optimizer, flats), lambda: getattr(optimizer, masters), ranks
        )

    def replicated(groups: Any, masters: Any) -> tuple[TrainableParameters, Layout]:
        trainable = named(groups)
        return trainable, ReplicatedLayout(
            trainable, groups, masters, rank=dist.get_rank(), world_size=dist.get_world_size()
        )

    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        require_whole_world(optimizer.dp_process_group)
        trainable = named(optimizer.fp16_groups)
        return trainable, ShardedLayout(trainable, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return windowed(optimizer.bit16_groups, "bit16_groups_flat", "single_partition_of_fp32_groups")
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return windowed(optimizer.bf16_groups, "bf16_groups_flat", "fp32_groups_flat_partition")
    if hasattr(optimizer, "fp32_groups_flat"):
        return replicated(optimizer.fp16_groups, lambda: optimizer.fp32_groups_flat)
    if hasattr(optimizer, "fp32_groups"):
        return replicated(
            [[parameter] for parameter in chain.from_iterable(optimizer.fp16_groups)],
            lambda: list(chain.from_iterable(optimizer.fp32_groups)),
        )
    if isinstance(optimizer, torch.optim.Optimizer):

        def parameters() -> list[nn.Parameter]:
            held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            return [parameter for parameter in held if parameter.requires_grad and parameter.numel() > 0]

        return replicated([[parameter] for parameter in parameters()], parameters)
    raise ConfigError(
        f"the engine's optimizer is a {type(optimizer).__name__}; nowcasting supports DeepSpeed's optimizers "
        "of ZeRO stages 0 to 3, FP16_Optimizer, FP16_UnfusedOptimizer, BF16_Optimizer and torch.optim.Optimizer"
    )


def require_supported(engine: Any) -> None:
    """Refuses engines whose parameters cannot be read or written rank by rank.

    Args:
        engine: A DeepSpeed engine.

    Raises:
        ConfigError: Naming the feature, its value and what is allowed.
    """
    if not hasattr(engine, "optimizer") or not hasattr(engine, "module"):
        raise ConfigError(f"{type(engine).__name__} is no DeepSpeed engine; pass what deepspeed.initialize returned")
    optimizer = engine.optimizer
    if optimizer is None or type(getattr(optimizer, "optimizer", optimizer)).__name__ == "DummyOptim":
        raise ConfigError("the engine has no optimizer; nowcasting needs a training engine with one")
    if getattr(engine, "pipeline_parallelism", False):
        raise ConfigError("pipeline parallelism is on; nowcasting supports data parallelism (ZeRO stages 0 to 3) only")
    tensor_parallel_size = max(engine.autotp_size(), getattr(engine, "mp_world_size", 1))
    if tensor_parallel_size > 1:
        raise ConfigError(f"tensor parallel size is {tensor_parallel_size}; nowcasting supports 1 only")
    if getattr(engine, "has_moe_layers", False):
        raise ConfigError(
            "the model has DeepSpeed mixture-of-experts layers; nowcasting supports dense parallelism only"
        )
    zero = engine._config.zero_config
    for name in ("offload_optimizer", "offload_param"):
        device = str(getattr(getattr(zero, name), "device", "none"))
        if device.rpartition(".")[2] == "nvme":
            raise ConfigError(f"zero_optimization.{name}.device is 'nvme'; nowcasting supports 'none' and 'cpu'")
    for name, allowed in (
        ("mics_shard_size", (-1, 0)),
        ("zero_hpz_partition_size", (1,)),
        ("zero_quantized_weights", (False,)),
        ("zenflow", (None,)),
    ):
        value = getattr(zero, name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"zero_optimization.{name} is {value}; nowcasting supports {allowed[0]} only")
    if getattr(zero.offload_optimizer, "super_offload", False):
        raise ConfigError("zero_optimization.offload_optimizer.super_offload is true; nowcasting supports false only")


def require_whole_world(group: Any) -> None:
    """Refuses optimizers that are partitioned over only some of the ranks.

    Raises:
        ConfigError: Naming both sizes.
    """
    size = dist.get_world_size(group)
    if size != dist.get_world_size():
        raise ConfigError(
            f"the optimizer is partitioned over {size} of {dist.get_world_size()} ranks; "
            "nowcasting supports all ranks only"
        )


def nowcaster_section(engine: Any) -> Any:
    """The ds_config's top-level ``"nowcaster"`` section, from whatever form the configuration was given in."""
    # engine.config is what the user passed (a dict, a path, base64 or None); only this holds it parsed.
    return engine._config._param_dict.get("nowcaster")


def applied_steps(engine: Any) -> int:
    """Optimizer steps that changed the weights: fp16 overflows are not among them."""
    return int(engine.global_steps) - int(engine.skipped_steps)


def zero_stage(engine: Any) -> int:
    """The ZeRO stage, 0 to 3."""
    return int(engine.zero_optimization_stage())
