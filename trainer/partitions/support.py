"""Which engines are refused, each with one line that says what is allowed instead."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist

from sidecast.errors import ConfigError


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
