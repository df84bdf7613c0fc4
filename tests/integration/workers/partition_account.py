"""What an engine holds by DeepSpeed's own account: looks into it independently of the code under test."""

from __future__ import annotations

import copy
import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor
from torch import distributed as dist

from tests.integration.workers.partition_cases import Case

MASTER_LISTS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
    "fp32_groups",
)


def masters_of(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    for name in MASTER_LISTS:
        if hasattr(optimizer, name):
            found = getattr(optimizer, name)
            return list(chain.from_iterable(found)) if name == "fp32_groups" else list(found)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def optimizer_state_of(engine: Any) -> list[dict[str, Any]]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [copy.deepcopy(dict(inner.state.get(master, {}))) for master in masters_of(engine)]


def module_weights(engine: Any) -> dict[str, Tensor]:
    """Full low-precision weights of the model as this rank sees them."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return {
            name: parameter.detach().clone()
            for name, parameter in engine.module.named_parameters(remove_duplicate=False)
        }


def reference_snapshot(engine: Any, case: Case, folder: Path) -> dict[str, Tensor]:
    """The full-precision weights by DeepSpeed's own account."""
    trained = {name for name, p in engine.module.named_parameters(remove_duplicate=False) if p.requires_grad}
    if hasattr(engine.optimizer, "bf16_groups"):
        # zero_to_fp32 does not read the checkpoints of BF16_Optimizer.
        named = engine.module.named_parameters(remove_duplicate=False)
        reference = {name: safe_get_full_fp32_param(parameter) for name, parameter in named if name in trained}
    elif case.stage > 0:
        engine.save_checkpoint(str(folder))
        dist.barrier()
        reference = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    elif case.dtype == "fp32":
        reference = module_weights(engine)
    else:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        lows = list(chain.from_iterable(engine.optimizer.fp16_groups))
        highs = chain.from_iterable(
            torch._utils._unflatten_dense_tensors(flat, group) if case.fused else flat
            for flat, group in zip(
                engine.optimizer.fp32_groups_flat if case.fused else engine.optimizer.fp32_groups,
                engine.optimizer.fp16_groups,
                strict=True,
            )
        )
        by_name = {names[id(low)]: high.detach() for low, high in zip(lows, highs, strict=True)}
        aliases = {name: names[id(p)] for name, p in engine.module.named_parameters(remove_duplicate=False)}
        reference = {name: by_name[first] for name, first in aliases.items() if first in by_name}
    return {name: tensor.float() for name, tensor in reference.items() if name in trained}


def same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.blake2b()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
