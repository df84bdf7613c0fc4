"""DeepSpeed checkpoint folders of ZeRO stages 0 to 3 and BF16_Optimizer, read without DeepSpeed.

Where the fp32 masters lie (DeepSpeed 0.15 to 0.19):

- Stages 1, 2 and BF16_Optimizer: per parameter group, the ranks' partitions in rank order form one flat vector, in
  which the group's parameters follow each other in the order of ``param_shapes``, each with its alignment padding.
- Stage 3: every parameter is split evenly over the ranks, the last piece padded; a rank's pieces, in the order of
  ``param_shapes``, are its sub-groups one after the other.
- Stage 0: in the module's own weights, or in 16-bit training in the optimizer's (see ``replicated_masters.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import (
    TRAINABLE_DTYPES,
    Checkpoint,
    CheckpointFormat,
    StoredTensor,
    read_json_object,
)
from sidecast.checkpoints.inert_pickle import StandIn, load_inert
from sidecast.checkpoints.replicated_masters import replicated_tensors
from sidecast.errors import ConfigError

_MODEL_FILES = "*_model_states.pt"
_OPTIMIZER_FILES = "*_optim_states.pt"
_EXPERT_LAYER_KEYS = ("ds_autoep_layers", "autoep_layers")


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder holds one step saved by DeepSpeed."""
    return any(path.glob(_MODEL_FILES))


def open_deepspeed(path: Path) -> Checkpoint:
    """Opens the folder of one step, such as ``global_step200``.

    Raises:
        ConfigError: It is incomplete or damaged, its pickles name code, or the model was split by tensor, pipeline or
            expert parallelism.
    """
    model_files = _ranked(path, _MODEL_FILES)
    state = _load_dict(model_files[0])
    if "module" not in state or any(key in state for key in _EXPERT_LAYER_KEYS):
        raise ConfigError(f"{model_files[0]} holds no complete module; expert parallelism is not supported")
    aliases = dict(state.get("shared_params") or {})
    if state.get("param_shapes") is None:
        tensors, aliases = replicated_tensors(model_files[0], state)
        description = "stage 0"
    else:
        tensors, description = _partitioned_tensors(path, model_files, state, aliases)
    step = state.get("global_steps")
    return Checkpoint(
        path=path,
        format=CheckpointFormat.DEEPSPEED,
        description=f"{CheckpointFormat.DEEPSPEED.value}, {description}",
        tensors=tensors,
        aliases={alias: name for alias, name in aliases.items() if name in tensors},
        step=step if isinstance(step, int) else None,
        config=_config_beside(path),
    )


def _partitioned_tensors(
    path: Path, model_files: Sequence[Path], state: Mapping[str, Any], aliases: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], str]:
    files = _ranked(path, _OPTIMIZER_FILES)
    partitions = [_optimizer_state(file) for file in files]
    _check_num_ranks(path, files, partitions[0].get("partition_count"))
    group_shapes = [
        {name: tuple(shape) for name, shape in group.items()} for group in _as_list(path, state, "param_shapes")
    ]
    if "fp32_flat_groups" in partitions[0]:
        masters = _evenly_split(path, group_shapes, [_as_list(path, part, "fp32_flat_groups") for part in partitions])
        frozen = _frozen_fragments(model_files, state)
        stage = "ZeRO stage 3"
    else:
        flat = [_as_list(path, part, "single_partition_of_fp32_groups") for part in partitions]
        masters = _concatenated(path, group_shapes, flat, partitions[0].get("param_alignment_paddings"))
        frozen = {}
        stage = _stage_name(partitions[0])
    buffers = frozenset(state.get("buffer_names") or ())
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state["module"].items():
        if name in masters:
            tensors[name] = masters[name]
        elif name in frozen:
            tensors[name] = frozen[name]
        elif name not in aliases and (name in buffers or "fp32_flat_groups" not in partitions[0]):
            # At stage 3 the module's other entries are empty placeholders of partitioned parameters.
            tensors[name] = _untrained(tensor)
    missing = [name for name in masters if name not in tensors]
    tensors |= {name: masters[name] for name in missing}
    return tensors, f"{stage}, {len(files)} ranks"


def _concatenated(
    path: Path,
    group_shapes: Sequence[Mapping[str, tuple[int, ...]]],
    flat_groups_of_ranks: Sequence[Sequence[Tensor]],
    paddings_of_groups: Sequence[Sequence[int]] | None,
) -> dict[str, StoredTensor]:
    """Stages 1, 2 and BF16_Optimizer: one flat vector per group, cut into the ranks' partitions."""
    masters = {}
    for group, shapes in enumerate(group_shapes):
        vector = _Concatenation([_at(path, flat_groups, group) for flat_groups in flat_groups_of_ranks])
        paddings = paddings_of_groups[group] if paddings_of_groups is not None else [0] * len(shapes)
        start = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            stop = start + prod(shape)
            vector.check_holds(path, name, stop)
            masters[name] = _master(shape, vector.dtype, partial(vector.read, start, stop))
            start = stop + padding
    return masters


def _evenly_split(
    path: Path,
    group_shapes: Sequence[Mapping[str, tuple[int, ...]]],
    flat_groups_of_ranks: Sequence[Sequence[Tensor]],
) -> dict[str, StoredTensor]:
    """Stage 3: a piece of every parameter on every rank."""
    vectors = [_Concatenation(flat_groups) for flat_groups in flat_groups_of_ranks]
    masters = {}
    start = 0
    for name, shape in ((name, shape) for shapes in group_shapes for name, shape in shapes.items()):
        numel = prod(shape)
        stop = start + ceil(numel / len(vectors))
        for vector in vectors:
            vector.check_holds(path, name, stop)

        def read(start: int = start, stop: int = stop, numel: int = numel) -> Tensor:
            return torch.cat([vector.read(start, stop) for vector in vectors])[:numel]

        masters[name] = _master(shape, vectors[0].dtype, read)
        start = stop
    return masters


def _frozen_fragments(model_files: Sequence[Path], state: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Stage 3: frozen parameters, a piece in every rank's model file."""
    shapes = state.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    fragments = [state["frozen_param_fragments"]]
    fragments += [_load_dict(file)["frozen_param_fragments"] for file in model_files[1:]]
    frozen = {}
    for name, size in shapes.items():
        pieces = [of_rank[name] for of_rank in fragments]
        shape = tuple(size)

        def read(pieces: Sequence[Tensor] = pieces, shape: tuple[int, ...] = shape) -> Tensor:
            return torch.cat([piece.reshape(-1) for piece in pieces])[: prod(shape)].view(shape)

        frozen[name] = StoredTensor(shape=shape, dtype=pieces[0].dtype, trainable=False, read=read)
    return frozen


def _master(shape: tuple[int, ...], dtype: torch.dtype, read_flat: Callable[[], Tensor]) -> StoredTensor:
    return StoredTensor(
        shape=shape,
        dtype=dtype,
        trainable=dtype in TRAINABLE_DTYPES and 0 not in shape,
        read=lambda: read_flat().view(shape),
    )


def _untrained(tensor: Tensor) -> StoredTensor:
    return StoredTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, trainable=False, read=lambda: tensor)


class _Concatenation:
    """Flat tensors one after the other, read by element range without joining them all."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part.detach().reshape(-1) for part in parts]
        self._bounds = [0]
        for part in self._parts:
            self._bounds.append(self._bounds[-1] + part.numel())

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].dtype

    def check_holds(self, path: Path, name: str, stop: int) -> None:
        if stop > self._bounds[-1]:
            raise ConfigError(
                f"{path}: the optimizer files hold {self._bounds[-1]} elements where parameter {name!r} ends at {stop}"
            )

    def read(self, start: int, stop: int) -> Tensor:
        pieces = [
            part[max(start - low, 0) : stop - low]
            for part, (low, high) in zip(self._parts, pairwise(self._bounds), strict=True)
            if low < stop and high > start
        ]
        return torch.cat(pieces) if pieces else self._parts[0][:0]


def _ranked(path: Path, pattern: str) -> list[Path]:
    """The files of a kind, by data-parallel rank."""
    ranked = []
    for file in path.glob(pattern):
        match = re.search(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_", file.name)
        if match is None or int(match[2]) != 0 or "expert" in file.name or file.name.startswith("expp"):
            raise ConfigError(
                f"{path} was saved with tensor, pipeline or expert parallelism ({file.name}); "
                f"only data-parallel checkpoints are supported"
            )
        ranked.append((int(match[1] or 0), file))
    if not ranked:
        raise ConfigError(f"{path} has no {pattern} file; every rank of the run saves one")
    return [file for _, file in sorted(ranked)]


def _check_num_ranks(path: Path, files: Sequence[Path], partition_count: Any) -> None:
    counts = set(partition_count if isinstance(partition_count, list) else [partition_count])
    if counts != {len(files)}:
        wanted = ", ".join(str(count) for count in sorted(counts, key=str))
        raise ConfigError(f"{path} has {len(files)} {_OPTIMIZER_FILES} files; its parameters are split over {wanted}")


def _optimizer_state(file: Path) -> Mapping[str, Any]:
    state = _load_dict(file).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise ConfigError(f"{file} has no 'optimizer_state_dict'; a DeepSpeed ZeRO file is needed")
    return state


def _load_dict(file: Path) -> dict[str, Any]:
    state = load_inert(file)
    if not isinstance(state, dict):
        raise ConfigError(f"{file} holds a {type(state).__name__}; a DeepSpeed checkpoint file holds a dict")
    return state


def _as_list(path: Path, state: Mapping[str, Any], key: str) -> list[Any]:
    value = state.get(key)
    if not isinstance(value, list):
        raise ConfigError(f"{path} has no list {key!r}; DeepSpeed 0.15 to 0.19 saves one")
    return value


def _at(path: Path, flat_groups: Sequence[Tensor], group: int) -> Tensor:
    if group >= len(flat_groups):
        raise ConfigError(f"{path} has {len(flat_groups)} partitioned parameter groups; group {group} is missing")
    return flat_groups[group]


def _stage_name(optimizer_state: Mapping[str, Any]) -> str:
    stage = optimizer_state.get("zero_stage")
    if isinstance(stage, StandIn) and len(stage.arguments) == 1:
        stage = stage.arguments[0]
    return f"ZeRO stage {stage}" if isinstance(stage, int) else "BF16_Optimizer"


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The model's configuration: next to the files or, as Hugging Face's Trainer saves, one folder up."""
    for folder in (path, path.parent):
        if (folder / "config.json").is_file():
            config = read_json_object(folder / "config.json")
            return config if "model_type" in config else None
    return None
