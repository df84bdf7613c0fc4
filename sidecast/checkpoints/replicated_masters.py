"""DeepSpeed checkpoints of stage 0, where every rank holds the whole model.

In fp32 training the module's weights are the masters. In 16-bit training the fp32 masters lie in the optimizer's state
without names: flat per parameter group (FP16_Optimizer) or one tensor each (FP16_UnfusedOptimizer). They are told
apart by what they must be: rounded to 16 bit, a master is its parameter's stored weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import StoredTensor, looks_trainable
from sidecast.errors import ConfigError

# Enough to tell parameters apart without reading a large model twice.
_NUM_COMPARED_ELEMENTS = 4096


def replicated_tensors(file: Path, state: Mapping[str, Any]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a stage-0 checkpoint in fp32, and its aliases (tied tensors share their storage).

    Args:
        file: The model file, for messages.
        state: What it holds.

    Raises:
        ConfigError: Masters and parameters do not fit together.
    """
    buffers = frozenset(state.get("buffer_names") or ())
    module, aliases = _without_aliases(state["module"])
    candidates = {
        name: tensor
        for name, tensor in module.items()
        if name not in buffers and looks_trainable(name, tuple(tensor.shape), tensor.dtype)
    }
    groups = _master_groups(state.get("optimizer"))
    masters = candidates if groups is None else _match(file, candidates, groups)
    tensors = {}
    for name, tensor in module.items():
        found = masters.get(name, tensor)
        tensors[name] = StoredTensor(
            shape=tuple(tensor.shape),
            dtype=found.dtype,
            trainable=name in masters,
            read=lambda found=found: found,  # type: ignore[misc]
        )
    return tensors, aliases


def _without_aliases(module: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    names: dict[tuple[int, torch.Size], str] = {}
    aliases = {}
    for name, tensor in module.items():
        if tensor.numel():
            first = names.setdefault((tensor.data_ptr(), tensor.shape), name)
            if first != name:
                aliases[name] = first
    return {name: tensor for name, tensor in module.items() if name not in aliases}, aliases


def _master_groups(optimizer: Any) -> list[Tensor] | None:
    """One flat vector per parameter group; None if the module's weights are the masters."""
    state = optimizer if isinstance(optimizer, dict) else {}
    if "fp32_groups_flat" in state:
        return [flat.detach().reshape(-1) for flat in state["fp32_groups_flat"]]
    if "fp32_groups" in state:
        return [torch.cat([master.detach().reshape(-1) for master in group]) for group in state["fp32_groups"]]
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
