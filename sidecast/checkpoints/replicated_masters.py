"""DeepSpeed checkpoints of stage 0, where every rank holds the whole model.

In fp32 training the module's weights are the masters. In 16-bit training the fp32 masters lie in the optimizer's state
without names: flat per parameter group (FP16_Optimizer) or one tensor each (FP16_UnfusedOptimizer). They are told
apart by what they must be: rounded to 16 bit, a master is its parameter's stored weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import StoredTensor
from sidecast.checkpoints.fields import Field
from sidecast.checkpoints.trainable import looks_trainable
from sidecast.errors import ConfigError

# Enough to tell parameters apart without reading a large model twice.
_NUM_COMPARED_ELEMENTS = 4096
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def replicated_tensors(state: Field) -> tuple[dict[str, StoredTensor], dict[str, str], str]:
    """The tensors of a stage-0 checkpoint in fp32, its aliases (tied tensors share their storage), and what it is.

    Args:
        state: What the model file holds.

    Raises:
        ConfigError: The file is malformed, or masters and parameters do not fit together.
    """
    buffers = frozenset(() if state.get("buffer_names").is_absent else state.get("buffer_names").names())
    module, aliases = _without_aliases({name: entry.tensor() for name, entry in state.get("module").entries().items()})
    candidates = {
        name: tensor
        for name, tensor in module.items()
        if name not in buffers and looks_trainable(name, tuple(tensor.shape), tensor.dtype)
    }
    groups = _master_groups(state.get("optimizer"))
    masters = candidates if groups is None else _match(state.file, candidates, groups)
    tensors = {}
    for name, tensor in module.items():
        found = masters.get(name, tensor)
        tensors[name] = StoredTensor(
            shape=tuple(tensor.shape),
            dtype=found.dtype,
            trainable=name in masters,
            read=lambda found=found: found,  # type: ignore[misc]
            frozen=name in buffers,
        )
    is_rounded = groups is None and any(tensor.dtype in _SIXTEEN_BIT for tensor in candidates.values())
    return tensors, aliases, "stage 0, 16-bit weights without fp32 masters" if is_rounded else "stage 0"


def _without_aliases(module: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    names: dict[tuple[int, torch.Size, torch.dtype, tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in module.items():
        if tensor.numel():
            # A transposed view has the same address and, if it is square, the same shape.
            key = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride())
            first = names.setdefault(key, name)
            if first != name:
                aliases[name] = first
    return {name: tensor for name, tensor in module.items() if name not in aliases}, aliases


def _master_groups(optimizer: Field) -> list[Tensor] | None:
    """One flat vector per parameter group; None if the module's weights are the masters."""
    if optimizer.is_absent:
        return None
    flat, separate = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    if not flat.is_absent:
        return [group.floating().reshape(-1) for group in flat.items()]
    if not separate.is_absent:
        groups = [[master.floating().reshape(-1) for master in group.items()] for group in separate.items()]
        return [torch.cat(group) for group in groups if group]
    return None


def _match(file: Path, candidates: Mapping[str, Tensor], groups: list[Tensor]) -> dict[str, Tensor]:
    """Finds each parameter's master: groups keep the module's order, frozen parameters are in none."""
    masters = {}
    positions = [0] * len(groups)
    for name, tensor in candidates.items():
        for group, flat in enumerate(groups):
            master = flat[positions[group] : positions[group] + tensor.numel()]
            if master.numel() == tensor.numel() and _rounds_to(master, tensor):
                masters[name] = master.view(tensor.shape)
                positions[group] += tensor.numel()
                break
    left = sum(flat.numel() - position for flat, position in zip(groups, positions, strict=True))
    if left:
        raise ConfigError(
            f"{file}: {left} elements of the fp32 masters fit no parameter of the module in the module's order; "
            f"save with ZeRO stage 1 or higher, which stores names"
        )
    return masters


def _rounds_to(master: Tensor, tensor: Tensor) -> bool:
    head, tail = slice(None, _NUM_COMPARED_ELEMENTS), slice(-_NUM_COMPARED_ELEMENTS, None)
    flat = tensor.reshape(-1)
    return all(torch.equal(master[part].to(tensor.dtype), flat[part]) for part in (head, tail))
