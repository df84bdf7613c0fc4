"""DeepSpeed checkpoint folders of ZeRO stages 0 to 3 and BF16_Optimizer, read without DeepSpeed.

Where the fp32 masters lie (DeepSpeed 0.15 to 0.19):

- Stages 1, 2 and BF16_Optimizer: per parameter group, the ranks' partitions in rank order form one flat vector, in
  which the group's parameters follow each other in the order of ``param_shapes``, each with its alignment padding.
- Stage 3: every parameter is split evenly over the ranks, the last piece padded; a rank's pieces, in the order of
  ``param_shapes``, are its sub-groups one after the other.
- Stage 0: in the module's own weights, or in 16-bit training in the optimizer's (see ``replicated_masters.py``).
- Universal checkpoints, which ``ds_to_universal`` makes of any of these: whole, a file for each parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, StoredTensor, read_json_object
from sidecast.checkpoints.deepspeed_files import (
    MODEL_FILES,
    OPTIMIZER_FILES,
    check_ranks,
    load_file,
    ranked_files,
)
from sidecast.checkpoints.fields import Field
from sidecast.checkpoints.flat_partitions import (
    NUM_COMPARED_ELEMENTS,
    Concatenation,
    check_masters,
    concatenated,
    evenly_split,
)
from sidecast.checkpoints.huggingface import CONFIG_FILE, companions_in, config_folder
from sidecast.checkpoints.inert_pickle import StandIn, load_inert
from sidecast.checkpoints.replicated_masters import replicated_tensors
from sidecast.errors import ConfigError

_EXPERT_LAYER_KEYS = ("ds_autoep_layers", "autoep_layers")
_UNIVERSAL_FOLDER = "zero"
_UNIVERSAL_FILE = "fp32.pt"


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder holds one step saved by DeepSpeed."""
    return any(path.glob(MODEL_FILES))


def open_deepspeed(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens the folder of one step, such as ``global_step200``.

    Args:
        path: The folder.
        config: The model's configuration, in place of the one that lies there or one folder up.

    Raises:
        ConfigError: It is incomplete, damaged or malformed, its pickles name code, or the model was split by tensor,
            pipeline or expert parallelism.
    """
    model_files = ranked_files(path, MODEL_FILES)
    state = load_file(model_files[0])
    if state.get("module").is_absent or any(key in state.value for key in _EXPERT_LAYER_KEYS):
        raise ConfigError(f"{model_files[0]} holds no complete module; expert parallelism is not supported")
    shared = state.get("shared_params")
    aliases = {} if shared.is_absent else {alias: name.text() for alias, name in shared.entries().items()}
    if (path / _UNIVERSAL_FOLDER).is_dir():
        tensors, description = _universal_tensors(path, model_files, state, aliases), "universal"
    elif state.get("param_shapes").is_absent:
        if any(path.glob(OPTIMIZER_FILES)):
            raise ConfigError(
                f"{model_files[0]} has no 'param_shapes', without which the fp32 masters of the {OPTIMIZER_FILES} "
                f"files have no names; DeepSpeed 0.15 to 0.19 saves them"
            )
        tensors, aliases, description = replicated_tensors(state)
    else:
        tensors, description = _partitioned_tensors(path, model_files, state, aliases)
    lost = [alias for alias, name in aliases.items() if alias not in tensors and name not in tensors]
    if lost:
        raise ConfigError(f"{model_files[0]} ties {lost[0]!r} to {aliases[lost[0]]!r}, which it does not hold")
    step = state.get("global_steps")
    folder = config_folder(path)
    return Checkpoint(
        path=path,
        format=CheckpointFormat.DEEPSPEED,
        description=f"{CheckpointFormat.DEEPSPEED.value}, {description}",
        tensors=tensors,
        aliases={alias: name for alias, name in aliases.items() if alias not in tensors},
        step=None if step.is_absent else step.count(),
        config=config if config is not None or folder is None else read_json_object(folder / CONFIG_FILE),
        companions=() if folder is None else companions_in(folder),
    )


def _partitioned_tensors(
    path: Path, model_files: list[Path], state: Field, aliases: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], str]:
    files = ranked_files(path, OPTIMIZER_FILES)
    partitions = [_optimizer_state(file) for file in files]
    check_ranks(path, files, OPTIMIZER_FILES, _world_size(partitions[0]))
    group_shapes = _group_shapes(state)
    is_stage_3 = not partitions[0].get("fp32_flat_groups").is_absent
    key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
    flat = [[group.floating() for group in _list(part, key)] for part in partitions]
    for part, groups in zip(partitions, flat, strict=True):
        if len({group.dtype for group in [*flat[0], *groups]}) > 1 or not groups:
            raise ConfigError(f"{part.file}: {key!r} holds {len(groups)} tensors; some of one dtype are needed")
    if is_stage_3:
        shapes = {name: shape for group in group_shapes for name, shape in group.items()}
        masters = evenly_split(path, shapes, [Concatenation(groups) for groups in flat])
        frozen = _frozen_fragments(path, model_files, state)
        stage = "ZeRO stage 3"
    else:
        masters = {}
        module = {name: entry.tensor() for name, entry in state.get("module").entries().items()}
        for number, shapes in enumerate(group_shapes):
            if any(number >= len(groups) for groups in flat):
                raise ConfigError(
                    f"{path} has {min(map(len, flat))} partitioned parameter groups; group {number} is missing"
                )
            paddings = _paddings(partitions[0], number, len(shapes))
            masters |= concatenated(path, shapes, [groups[number] for groups in flat], paddings, module)
        frozen = {}
        stage = _stage_name(partitions[0])
    tensors = _with_untrained(state, masters, frozen, aliases, has_placeholders=is_stage_3)
    return tensors, f"{stage}, {len(files)} ranks"


def _with_untrained(
    state: Field,
    masters: Mapping[str, StoredTensor],
    frozen: Mapping[str, StoredTensor],
    aliases: Mapping[str, str],
    *,
    has_placeholders: bool,
) -> dict[str, StoredTensor]:
    """Masters, frozen parameters and buffers, in the order of the module as far as it lists them.

    At stage 3 the module's other entries are empty placeholders of partitioned parameters.
    """
    names = state.get("buffer_names")
    buffers = frozenset(() if names.is_absent else names.names())
    tensors: dict[str, StoredTensor] = {}
    for name, entry in state.get("module").entries().items():
        if name in masters:
            if not has_placeholders and tuple(entry.tensor().shape) != masters[name].shape:
                raise ConfigError(
                    f"{state.file}: parameter {name!r} has shape {masters[name].shape} in 'param_shapes', but "
                    f"{tuple(entry.tensor().shape)} in the module"
                )
            tensors[name] = masters[name]
        elif name in frozen:
            tensors[name] = frozen[name]
        elif name not in aliases and (name in buffers or not has_placeholders):
            tensors[name] = _untrained(entry.tensor())
    return tensors | {name: master for name, master in masters.items() if name not in tensors}


def _universal_tensors(
    path: Path, model_files: list[Path], state: Field, aliases: Mapping[str, str]
) -> dict[str, StoredTensor]:
    group_shapes = [] if state.get("param_shapes").is_absent else _group_shapes(state)
    masters = {}
    for name, shape in ((name, shape) for group in group_shapes for name, shape in group.items()):
        folder = path / _UNIVERSAL_FOLDER / name
        if name in aliases and not folder.is_dir():
            continue
        stored = _universal_tensor(folder / _UNIVERSAL_FILE)
        if stored.numel() != prod(shape):
            raise ConfigError(
                f"{folder / _UNIVERSAL_FILE} holds {stored.numel()} elements; parameter {name!r} has shape {shape}"
            )
        read = partial(_whole, folder / _UNIVERSAL_FILE, shape)
        masters[name] = StoredTensor(shape=shape, dtype=stored.dtype, trainable=0 not in shape, read=read)
    if not masters:
        raise ConfigError(f"{state.file} names no parameter in 'param_shapes', but {path / _UNIVERSAL_FOLDER} has some")
    module = {name: entry.tensor() for name, entry in state.get("module").entries().items() if name in masters}
    placeholders = any(tensor.numel() != prod(masters[name].shape) for name, tensor in module.items())
    for name, tensor in () if placeholders else module.items():
        first = masters[name].read().reshape(-1)[:NUM_COMPARED_ELEMENTS]
        check_masters(path, name, first, tensor)
    frozen = _frozen_fragments(path, model_files, state) if placeholders else {}
    return _with_untrained(state, masters, frozen, aliases, has_placeholders=placeholders)


def _universal_tensor(file: Path) -> Tensor:
    """A parameter's master: of stage 3 as it is, of others in a dictionary that says how it was put together."""
    content = Field(file, "", load_inert(file))
    return (content.get("param") if isinstance(content.value, dict) else content).floating()


def _whole(file: Path, shape: tuple[int, ...]) -> Tensor:
    return _universal_tensor(file).reshape(shape)


def _group_shapes(state: Field) -> list[dict[str, tuple[int, ...]]]:
    groups = [
        {name: shape.shape() for name, shape in group.entries().items()} for group in _list(state, "param_shapes")
    ]
    seen: set[str] = set()
    for name in (name for group in groups for name in group):
        if name in seen:
            raise ConfigError(f"{state.file}: parameter {name!r} is in two groups of 'param_shapes'")
        seen.add(name)
    return groups


def _frozen_fragments(path: Path, model_files: list[Path], state: Field) -> dict[str, StoredTensor]:
    """Stage 3: frozen parameters, a piece in every rank's model file."""
    shapes = state.get("frozen_param_shapes")
    if shapes.is_absent or not shapes.entries():
        return {}
    fragments = [state.get("frozen_param_fragments")]
    fragments += [load_file(file).get("frozen_param_fragments") for file in model_files[1:]]
    frozen = {}
    for name, size in shapes.entries().items():
        pieces = [of_rank.get(name).tensor() for of_rank in fragments]
        shape = size.shape()
        numel = sum(piece.numel() for piece in pieces)
        if not prod(shape) <= numel < prod(shape) + max(len(pieces), 2) * max(len(pieces), 1):
            raise ConfigError(
                f"{path}: the model files hold {numel} elements of frozen parameter {name!r}, whose shape is {shape}"
            )

        def read(pieces: Sequence[Tensor] = pieces, shape: tuple[int, ...] = shape) -> Tensor:
            return torch.cat([piece.reshape(-1) for piece in pieces])[: prod(shape)].view(shape)

        frozen[name] = StoredTensor(shape=shape, dtype=pieces[0].dtype, trainable=False, read=read, frozen=True)
    return frozen


def _untrained(tensor: Tensor) -> StoredTensor:
    return StoredTensor(
        shape=tuple(tensor.shape), dtype=tensor.dtype, trainable=False, read=lambda: tensor, frozen=True
    )


def _paddings(optimizer_state: Field, group: int, num_parameters: int) -> list[int]:
    paddings = optimizer_state.get("param_alignment_paddings")
    if paddings.is_absent:
        return [0] * num_parameters
    of_groups = paddings.items()
    counts = [padding.count() for padding in of_groups[group].items()] if group < len(of_groups) else []
    if len(counts) != num_parameters:
        raise ConfigError(
            f"{optimizer_state.file}: 'param_alignment_paddings' names {len(counts)} paddings for group {group}, which "
            f"has {num_parameters} parameters"
        )
    return counts


def _world_size(optimizer_state: Field) -> int:
    counts = optimizer_state.get("partition_count")
    numbers = {count.count() for count in counts.items()} if isinstance(counts.value, list) else {counts.count()}
    if len(numbers) != 1:
        raise counts.refused("one number of ranks for all groups")
    return numbers.pop()


def _optimizer_state(file: Path) -> Field:
    state = load_file(file).get("optimizer_state_dict")
    if not isinstance(state.value, dict):
        raise ConfigError(f"{file} has no 'optimizer_state_dict'; a DeepSpeed ZeRO file is needed")
    return state


def _list(state: Field, key: str) -> list[Field]:
    field = state.get(key)
    if field.is_absent:
        raise ConfigError(f"{state.file} has no list {key!r}; DeepSpeed 0.15 to 0.19 saves one")
    return field.items()


def _stage_name(optimizer_state: Field) -> str:
    stage = optimizer_state.get("zero_stage").value
    if isinstance(stage, StandIn) and len(stage.arguments) == 1:
        stage = stage.arguments[0]
    return f"ZeRO stage {stage}" if isinstance(stage, int) and 0 <= stage <= 3 else "BF16_Optimizer"
