"""DeepSpeed's engines: which are refused, which layout fits the optimizer, and facts that are not their weights.

A layout is decided by what the optimizer has, not by the stage in its settings. Each refusal is one line that says what
is allowed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.layout import Layout, StalePartitionError
from sidecast.trainer.partitions.layouts.replicated import ReplicatedLayout
from sidecast.trainer.partitions.layouts.sharded import ShardedLayout, Split
from sidecast.trainer.partitions.layouts.windowed import Window, WindowedLayout
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.trainable import TrainableParameters, trainable_parameters

_NEEDED_STATES = ("hp_params", "lp_params", "optim_states")


def layout_of(engine: Any) -> Layout:
    """Maps what this rank holds of the model as it lies now; local.

    Args:
        engine: What ``deepspeed.initialize`` returned, with ZeRO stage 0 to 3.

    Raises:
        ConfigError: The engine uses what is not supported (tensor, pipeline or expert parallelism, NVMe offload,
            ...); one line names it and what is allowed.
        StalePartitionError: ``engine.offload_states()`` has taken tensors away.
    """
    require_supported(engine)
    layout = _layout_of(engine.module, engine.optimizer)
    if not layout.trainable.specs:
        raise ConfigError("the optimizer trains no parameter of the model; nowcasting needs at least one")
    return layout


def _layout_of(module: nn.Module, optimizer: Any) -> Layout:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _sharded(module, optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _windowed(module, optimizer, "bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups")
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _windowed(module, optimizer, "bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition")
    if hasattr(optimizer, "fp32_groups_flat"):
        return _replicated(module, optimizer, optimizer.fp16_groups, lambda: optimizer.fp32_groups_flat)
    if hasattr(optimizer, "fp32_groups"):
        groups = [[parameter] for parameter in chain.from_iterable(optimizer.fp16_groups)]
        return _replicated(module, optimizer, groups, lambda: list(chain.from_iterable(optimizer.fp32_groups)))
    if isinstance(optimizer, torch.optim.Optimizer):

        def parameters() -> list[nn.Parameter]:
            held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            return [parameter for parameter in held if parameter.requires_grad and parameter.numel() > 0]

        return _replicated(module, optimizer, [[parameter] for parameter in parameters()], parameters)
    raise ConfigError(
        f"the engine's optimizer is a {type(optimizer).__name__}; nowcasting supports DeepSpeed's optimizers "
        "of ZeRO stages 0 to 3, FP16_Optimizer, FP16_UnfusedOptimizer, BF16_Optimizer and torch.optim.Optimizer"
    )


def _sharded(module: nn.Module, optimizer: Any) -> Layout:
    require_whole_world(optimizer.dp_process_group)
    sub_groups = [
        [Split(each, each.partition_numel(), dist.get_rank(each.ds_process_group)) for each in sub_group]
        for sub_group in optimizer.fp16_groups
    ]

    def masters() -> Sequence[Tensor]:
        _require_loaded(optimizer)
        return optimizer.fp32_partitioned_groups_flat

    @torch.no_grad()
    def publish() -> None:
        # A parameter that happens to be gathered would otherwise keep its old weights.
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    return ShardedLayout(_named(module, optimizer.fp16_groups), _state_of(optimizer), sub_groups, masters, publish)


def _windowed(module: nn.Module, optimizer: Any, groups: str, flats: str, masters: str) -> Layout:
    for process_group in optimizer.real_dp_process_group:
        require_whole_world(process_group)
    ranks = [dist.get_rank(process_group) for process_group in optimizer.real_dp_process_group]

    def windows() -> list[Window]:
        _require_loaded(optimizer)
        held = (getattr(optimizer, name) for name in (groups, flats, masters))
        return [Window(*each) for each in zip(*held, ranks, strict=True)]

    trainable = _named(module, getattr(optimizer, groups))
    return WindowedLayout(trainable, _state_of(optimizer), windows, optimizer.update_lp_params)


def _replicated(module: nn.Module, optimizer: Any, groups: Any, masters: Callable[[], Sequence[Tensor]]) -> Layout:
    return ReplicatedLayout(
        _named(module, groups),
        _state_of(optimizer),
        groups,
        masters,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def _named(module: nn.Module, groups: Any) -> TrainableParameters:
    return trainable_parameters(module, list(chain.from_iterable(groups)))


def _state_of(optimizer: Any) -> OptimizerState:
    inner = [getattr(optimizer, "optimizer", optimizer)]
    # Stage 3 with partial offload steps the sub-groups that stay on the device with a second optimizer.
    if getattr(optimizer, "backup_optimizer", None) is not None:
        inner.append(optimizer.backup_optimizer)
    loss_scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    return OptimizerState(inner, loss_scaler)


def _require_loaded(optimizer: Any) -> None:
    """Refuses an optimizer whose tensors ``engine.offload_states()`` has taken away.

    Raises:
        StalePartitionError: Naming what is away.
    """
    away = {state.name for state in getattr(optimizer, "offloaded_states", ())}.intersection(_NEEDED_STATES)
    if away:
        raise StalePartitionError(
            f"engine.offload_states() took away {', '.join(sorted(away))}; engine.reload_states() brings them back"
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
