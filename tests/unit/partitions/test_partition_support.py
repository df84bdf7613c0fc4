"""What kinds of engine are refused, and how."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.deepspeed import require_supported


def engine(zero: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """An engine of one rank with nothing unusual, except for what is given."""
    parameter = torch.nn.Parameter(torch.ones(1))
    settings = {"offload_optimizer": None, "offload_param": None, **(zero or {})}
    usual = {
        "module": torch.nn.Linear(1, 1),
        "optimizer": torch.optim.SGD([parameter]),
        "pipeline_parallelism": False,
        "autotp_size": lambda: 0,
        "mp_world_size": 1,
        "has_moe_layers": False,
        "_config": SimpleNamespace(zero_config=SimpleNamespace(**settings)),
    }
    return SimpleNamespace(**{**usual, **attributes})


def test_a_usual_engine_passes() -> None:
    require_supported(engine({"offload_optimizer": SimpleNamespace(device="cpu")}))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (object(), "object is no DeepSpeed engine"),
        (engine(optimizer=None), "has no optimizer"),
        (engine(torch_autocast_z0_gradscaler=object()), "torch_autocast.dtype is float16 at ZeRO stage 0"),
        (engine(pipeline_parallelism=True), "pipeline parallelism is on"),
        (engine(autotp_size=lambda: 4), "tensor parallel size is 4"),
        (engine(mp_world_size=2), "tensor parallel size is 2"),
        (engine(has_moe_layers=True), "mixture-of-experts"),
        (engine({"offload_optimizer": SimpleNamespace(device="OffloadDeviceEnum.nvme")}), "offload_optimizer.device"),
        (engine({"offload_param": SimpleNamespace(device="nvme")}), "offload_param.device"),
        (engine({"mics_shard_size": 8}), "mics_shard_size is 8"),
        (engine({"zero_hpz_partition_size": 8}), "zero_hpz_partition_size is 8"),
        (engine({"zero_quantized_weights": True}), "zero_quantized_weights is True"),
        (engine({"zenflow": SimpleNamespace()}), "zenflow"),
        (engine({"offload_optimizer": SimpleNamespace(device="cpu", super_offload=True)}), "super_offload"),
    ],
)
def test_what_is_not_supported_is_named(refused: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        require_supported(refused)
    assert "\n" not in str(refusal.value)
