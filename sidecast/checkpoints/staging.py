"""Lays checkpoints out as the memory-mapped history that predictors read.

Predictors want every state as one vector, and checkpoints store tensors in any order, dtype and partition: so the
states are copied once into scratch files, tensor by tensor, and no more than two tensors are ever in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.chain_order import in_chain_order
from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat
from sidecast.checkpoints.trainable import check_trainable
from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest, ParameterSpec
from sidecast.mapped_memory import map_new_file
from sidecast.predictors.base import History

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StagedHistory:
    """A history in scratch files, and room for the change that a predictor writes.

    Attributes:
        history: The states.
        delta: P elements, fp32, to be overwritten.
        unchanged: Parameters that are the same in all states: frozen ones, in formats that do not say so.
    """

    history: History
    delta: Tensor
    unchanged: frozenset[str]

    def change_of(self, name: str) -> Tensor | None:
        """The predicted change of a tensor, in its shape; None for what a nowcast leaves as it is."""
        if name in self.unchanged or name not in self.history.manifest.by_name:
            return None
        spec = self.history.manifest.spec(name)
        start = self.history.manifest.offsets[name]
        return self.delta[start : start + spec.numel].view(spec.shape)


def manifest_of(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> ModelManifest:
    """The trainable tensors of a checkpoint, in its order; those of a plain chain in the order of its layers.

    Args:
        checkpoint: The newest one.
        config: The model's configuration, in place of the one stored with the checkpoint.

    Raises:
        ConfigError: Its parameters are quantised or empty, or the names of a chain do not tell their order.
    """
    check_trainable(checkpoint)
    parameters = tuple(ParameterSpec(name, t.shape) for name, t in checkpoint.tensors.items() if t.trainable)
    known = config if config is not None else checkpoint.config
    if (known or {}).get("model_type") == "sequential" and checkpoint.format is not CheckpointFormat.DEEPSPEED:
        # Files list their tensors by the alphabet.
        parameters = in_chain_order(parameters)
    return ModelManifest(parameters, dict(known or {}), dict(checkpoint.aliases))


def stage_history(checkpoints: Sequence[Checkpoint], manifest: ModelManifest, scratch: Path) -> StagedHistory:
    """Copies the trainable tensors of all checkpoints into memory-mapped files.

    Args:
        checkpoints: Oldest first; already checked to have the same tensors.
        manifest: The newest one's manifest.
        scratch: An existing folder for the files; the caller removes it.

    Raises:
        ConfigError: The folder has not enough room, a tensor holds a value that is not finite, or two checkpoints hold
            the same weights.
        NoRoomError: The folder lost its room to others meanwhile.
    """
    dtypes = [_widest_dtype(checkpoint, manifest) for checkpoint in checkpoints]
    _check_room(manifest, dtypes, scratch)
    states = [
        _mapped(scratch / f"state_{index}.bin", manifest.num_elements, dtype) for index, dtype in enumerate(dtypes)
    ]
    unchanged = set()
    alike = list(combinations(range(len(states)), 2))
    for spec in manifest.parameters:
        start = manifest.offsets[spec.fqn]
        newest = checkpoints[-1].tensors[spec.fqn].read()
        same = True
        for checkpoint, state in zip(checkpoints, states, strict=True):
            tensor = newest if checkpoint is checkpoints[-1] else checkpoint.tensors[spec.fqn].read()
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"tensor {spec.fqn!r} of {checkpoint.path} holds NaN or infinity; all must be finite")
            state[start : start + spec.numel] = tensor.reshape(-1)
            same = same and torch.equal(tensor, newest)
        if same:
            unchanged.add(spec.fqn)
            continue
        stop = start + spec.numel
        alike = [
            (one, other)
            for one, other in alike
            if torch.equal(states[one][start:stop].float(), states[other][start:stop].float())
        ]
    if alike:
        one, other = (checkpoints[index] for index in alike[0])
        raise ConfigError(
            f"{one.path} and {other.path} hold the same weights; a nowcast needs states of different steps, each once"
        )
    return StagedHistory(
        history=History(manifest, states),
        delta=_mapped(scratch / "delta.bin", manifest.num_elements, torch.float32),
        unchanged=frozenset(unchanged),
    )


def _widest_dtype(checkpoint: Checkpoint, manifest: ModelManifest) -> torch.dtype:
    """The dtype that holds every parameter of a checkpoint exactly, up to the fp32 that predictors compute with."""
    dtypes = {checkpoint.tensors[spec.fqn].dtype for spec in manifest.parameters}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else torch.float32


def _check_room(manifest: ModelManifest, dtypes: Sequence[torch.dtype], scratch: Path) -> None:
    needed_bytes = manifest.num_elements * (sum(dtype.itemsize for dtype in dtypes) + torch.float32.itemsize)
    free_bytes = shutil.disk_usage(scratch).free
    if needed_bytes > free_bytes:
        raise ConfigError(
            f"the history of {len(dtypes)} states needs {needed_bytes / _GIB:.2f} GiB of scratch space; "
            f"{scratch.parent} has {free_bytes / _GIB:.2f} GiB free (choose another folder with --scratch)"
        )


def _mapped(path: Path, num_elements: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(map_new_file(path, num_elements * dtype.itemsize), dtype=dtype)
