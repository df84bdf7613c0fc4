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
from sidecast.trainer.partitions.trainable import TrainableParameters, TrainedNames, held_by, tensors_now

_NEEDED_STATES = ("hp_params", "lp_params", "optim_states")


def layout_of(engine: Any, names: TrainedNames | None = None) -> Layout:
    """Maps what this rank holds of the model as it lies now; local.

    Args:
        engine: What ``deepspeed.initialize`` returned, with ZeRO stage 0 to 3.
        names: What the run trains; kept from one mapping to the next.

    Raises:
        ConfigError: The engine uses what is not supported (tensor, pipeline or expert parallelism, NVMe offload,
            ...); one line names it and what is allowed.
        StalePartitionError: ``engine.offload_states()`` has taken tensors away.
    """
    require_supported(engine)
    layout = _layout_of(engine.module, engine.optimizer, names or TrainedNames())
    if not layout.trainable.specs:
        raise ConfigError("the optimizer trains no parameter of the model; nowcasting needs at least one")
    return layout


def _layout_of(module: nn.Module, optimizer: Any, names: TrainedNames) -> Layout:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _sharded(module, optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        of_groups = ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups")
        return _windowed(module, optimizer, names, *of_groups)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        of_groups = ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition")
        return _windowed(module, optimizer, names, *of_groups)
    if hasattr(optimizer, "fp32_groups_flat"):
        groups = optimizer.fp16_groups
        trainable = _named(module, groups, names)
        return _replicated(trainable, optimizer, groups, lambda: optimizer.fp32_groups_flat)
    if hasattr(optimizer, "fp32_groups"):
        groups = [[parameter] for parameter in chain.from_iterable(optimizer.fp16_groups)]
        trainable = _named(module, groups, names)
        return _replicated(trainable, optimizer, groups, lambda: list(chain.from_iterable(optimizer.fp32_groups)))
    if isinstance(optimizer, torch.optim.Optimizer):
        trainable = names.select(module, held_by(optimizer))
        names.note_others(trainable, held_by(optimizer))
        groups = [[parameter] for parameter in trainable.tensors]
        return _replicated(trainable, optimizer, groups, lambda: tensors_now(module, trainable, optimizer))
    raise ConfigError(
        f"the engine's optimizer is a {type(optimizer).__name__}; nowcasting supports DeepSpeed's optimizers "
        "of ZeRO stages 0 to 3, FP16_Optimizer, FP16_UnfusedOptimizer, BF16_Optimizer and torch.optim.Optimizer"
    )


def _sharded(module: nn.Module, optimizer: Any, names: TrainedNames) -> Layout:
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
        # A parameter that happens to be gathered would otherwise keep its old weights. Between steps only small ones
        # are, and to walk through all modules for them took ten times as long as everything else here.
        persistent = optimizer.persistent_parameters
        if any(_is_gathered(each) and not each.ds_persist for each in chain.from_iterable(optimizer.fp16_groups)):
            optimizer._partition_all_parameters()
        elif persistent:
            persistent[0].partition(persistent)
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if persistent:
            persistent[0].all_gather(persistent)
        optimizer.invalidate_secondary_tensor()

    trainable = _named(module, optimizer.fp16_groups, names)
    return ShardedLayout(trainable, _state_of(optimizer), sub_groups, masters, publish)


def _is_gathered(parameter: Any) -> bool:
    """Whether a parameter of stage 3 is whole now, or on its way to be."""
    return bool(parameter.ds_status.name != "NOT_AVAILABLE")


def _windowed(module: nn.Module, optimizer: Any, names: TrainedNames, groups: str, flats: str, masters: str) -> Layout:
    for process_group in optimizer.real_dp_process_group:
        require_whole_world(process_group)
    ranks = [dist.get_rank(process_group) for process_group in optimizer.real_dp_process_group]

    def windows() -> list[Window]:
        _require_loaded(optimizer)
        held = (getattr(optimizer, name) for name in (groups, flats, masters))
        return [Window(*each) for each in zip(*held, ranks, strict=True)]

    trainable = _named(module, getattr(optimizer, groups), names)
    return WindowedLayout(trainable, _state_of(optimizer), windows, optimizer.update_lp_params)


def _replicated(
    trainable: TrainableParameters, optimizer: Any, groups: Any, masters: Callable[[], Sequence[Tensor]]
) -> Layout:
    return ReplicatedLayout(
        trainable,
        _state_of(optimizer),
        groups,
        masters,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def _named(module: nn.Module, groups: Any, names: TrainedNames) -> TrainableParameters:
    return names.select(module, list(chain.from_iterable(groups)))


def _state_of(optimizer: Any) -> OptimizerState:
    inner = [getattr(optimizer, "optimizer", optimizer)]
    # Stage 3 with partial offload steps the sub-groups that stay on the device with a second optimizer.
    if getattr(optimizer, "backup_optimizer", None) is not None:
        inner.append(optimizer.backup_optimizer)
    names = ("torch_autocast_gradscaler", "loss_scaler", "loss_scale_config")
    scalers = (getattr(optimizer, name, None) for name in names)
    return OptimizerState(inner, next((scaler for scaler in scalers if scaler is not None), None))


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
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        raise ConfigError(
            "torch_autocast.dtype is float16 at ZeRO stage 0, where DeepSpeed does not tell which steps its GradScaler "
            "skips; nowcasting supports bfloat16 there, and float16 at stages 1 to 3"
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
    """The ds_config's top-level ``"nowcaster"`` section, from whatever form the configuration was given in.

    Raises:
        ConfigError: There is no such engine.
    """
    # engine.config is what the user passed (a dict, a path, base64 or None); only this holds it parsed.
    parsed = getattr(getattr(engine, "_config", None), "_param_dict", None)
    if parsed is None:
        raise ConfigError(
            f"{type(engine).__name__} is no DeepSpeed engine; pass what deepspeed.initialize returned, or a module "
            "with its optimizer: sidecast.attach(model, optimizer)"
        )
    return parsed.get("nowcaster")


def applied_steps(engine: Any) -> int:
    """Optimizer steps that changed the weights: fp16 overflows are not among them."""
    return int(engine.global_steps) - skipped_steps(engine)


def skipped_steps(engine: Any) -> int:
    """Optimizer steps that moved nothing, for their gradients were not finite."""
    return int(engine.skipped_steps)


def zero_stage(engine: Any) -> int:
    """The ZeRO stage, 0 to 3."""
    return int(engine.zero_optimization_stage())
