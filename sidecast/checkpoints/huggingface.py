"""Hugging Face model directories: one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, StoredTensor, read_json_object, step_of_name
from sidecast.checkpoints.safetensors_file import read_metadata, stored_tensors
from sidecast.errors import ConfigError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_FILE = "adapter_model.safetensors"

_COMPANION_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"})
_TRAINING_STATE = frozenset({"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"})


def is_huggingface_directory(path: Path) -> bool:
    """Whether a folder holds weights in the layout of ``save_pretrained``."""
    return (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()


def refusal(path: Path) -> str | None:
    """Why a folder that resembles a model directory cannot be read; None if it does not resemble one."""
    if any((path / name).is_file() for name in _PICKLED_WEIGHTS):
        return f"{path} holds pickled weights (pytorch_model.bin); save them as safetensors"
    if (path / _ADAPTER_FILE).is_file():
        return f"{path} holds an adapter ({_ADAPTER_FILE}), not a model; merge it, or give the adapter's file itself"
    return None


def open_huggingface(path: Path) -> Checkpoint:
    """Opens a directory that ``save_pretrained`` wrote.

    Raises:
        ConfigError: The index names a file that is missing or outside the directory, or a file is damaged.
    """
    if (path / WEIGHTS_FILE).is_file():
        files, tensors = [path / WEIGHTS_FILE], stored_tensors(path / WEIGHTS_FILE)
    else:
        files, tensors = _sharded_tensors(path)
    config = read_json_object(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else None
    aliases = _tied_heads(tensors, config or {})
    shards = f", {len(files)} shards" if len(files) > 1 else ""
    return Checkpoint(
        path=path,
        format=CheckpointFormat.HUGGING_FACE,
        description=f"{CheckpointFormat.HUGGING_FACE.value}{shards}",
        tensors={name: tensor for name, tensor in tensors.items() if name not in aliases},
        aliases=aliases,
        step=step_of_name(path),
        config=config,
        metadata=read_metadata(files[0]),
        companions=tuple(sorted(file for file in path.iterdir() if _is_companion(file))),
    )


def _sharded_tensors(path: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    weight_map = read_json_object(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path / INDEX_FILE} has no 'weight_map'; an object {{tensor: file}} is needed")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise ConfigError(f"{path / INDEX_FILE} puts {name!r} into {file_name!r}; a file of that folder is needed")
        if file_name not in shards:
            shards[file_name] = stored_tensors(path / file_name)
        if name not in shards[file_name]:
            raise ConfigError(f"{path / file_name} has no tensor {name!r}, which {INDEX_FILE} puts there")
        tensors[name] = shards[file_name][name]
    return [path / name for name in shards], tensors


def _tied_heads(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Output heads that some exporters store although the configuration ties them to the embedding."""
    if config.get("tie_word_embeddings") is not True:
        return {}
    aliases = {}
    for head in (name for name in tensors if name.endswith("lm_head.weight")):
        for name, tensor in tensors.items():
            if name.endswith(("embed_tokens.weight", "wte.weight")) and tensor.shape == tensors[head].shape:
                # A file may contradict its configuration: only equal bytes are one tensor.
                if torch.equal(tensor.read(), tensors[head].read()):
                    aliases[head] = name
                break
    return aliases


def _is_companion(file: Path) -> bool:
    return (
        file.is_file()
        and file.suffix in _COMPANION_SUFFIXES
        and file.name not in _TRAINING_STATE
        and not file.name.endswith(".index.json")
    )
