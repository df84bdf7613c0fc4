"""Hugging Face folders: a model in one safetensors file or in several with an index, or an adapter of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, StoredTensor, read_json_object
from sidecast.checkpoints.fields import Field
from sidecast.checkpoints.safetensors_file import read_metadata, stored_tensors
from sidecast.errors import ConfigError, shown

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors$")
_ADAPTER_PREFIX = "base_model.model."
# Which tables output heads are tied to, in transformers.
_TIED = (
    (re.compile(r"(?:^|\.)lm_head\.weight$"), re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings)\.weight$")),
    (re.compile(r"^cls\.predictions\.decoder\.weight$"), re.compile(r"\.word_embeddings\.weight$")),
    (re.compile(r"^cls\.predictions\.decoder\.bias$"), re.compile(r"^cls\.predictions\.bias$")),
)
_TIED_BY_DEFAULT = ("gpt2", "bert")
_COMPANION_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"})
_TRAINING_STATE = frozenset({"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"})


def is_huggingface_directory(path: Path) -> bool:
    """Whether a folder holds weights in the layout of ``save_pretrained``, of a model or an adapter."""
    return any((path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE, ADAPTER_FILE))


def open_huggingface(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a folder that ``save_pretrained`` wrote. Of a model that lies with an adapter, the model is opened.

    Args:
        path: The folder.
        config: The model's configuration, in place of the one that lies there.

    Raises:
        ConfigError: The index names a file that is missing or outside the folder, or does not fit its files; there is
            an index beside a whole model; or a file is damaged.
    """
    if not (path / INDEX_FILE).is_file():
        name = WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else ADAPTER_FILE
        return _opened(path, [path / name], stored_tensors(path / name), config)
    if (path / WEIGHTS_FILE).is_file():
        raise ConfigError(
            f"{path} holds both {WEIGHTS_FILE} and {INDEX_FILE}, of which one may be left over from another model; "
            f"remove that, or give the file {WEIGHTS_FILE} itself"
        )
    return _opened(path, *_sharded_tensors(path), config)


def open_file(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a single safetensors file; what lies next to it belongs to it if a configuration does.

    Args:
        path: The file.
        config: The model's configuration, in place of the one that lies there.

    Raises:
        ConfigError: It is not a safetensors file, or one shard of several.
    """
    match = SHARD.match(path.name)
    if match is not None and int(match["total"]) > 1:
        raise ConfigError(
            f"{path} is one of {int(match['total'])} shards of a model; give the folder, with {INDEX_FILE} in it"
        )
    return _opened(path, [path], stored_tensors(path), config)


def config_folder(path: Path) -> Path | None:
    """Where the configuration of a model lies whose weights are in another format.

    Next to its files or, as Hugging Face's Trainer saves, one folder up; None where there is none of a model.
    """
    for folder in (path, path.parent):
        if (folder / CONFIG_FILE).is_file():
            return folder if "model_type" in read_json_object(folder / CONFIG_FILE) else None
    return None


def companions_in(folder: Path) -> tuple[Path, ...]:
    """Files beside a model's configuration that its users need: generation settings, tokenizer, code."""
    return tuple(sorted(file for file in folder.iterdir() if _is_companion(file)))


def _opened(
    path: Path, files: list[Path], tensors: Mapping[str, StoredTensor], given: Mapping[str, Any] | None
) -> Checkpoint:
    folder = path if path.is_dir() else path.parent
    config = _json_in(folder, CONFIG_FILE) if given is None else given
    adapter_config = None
    is_adapter = files[0].name == ADAPTER_FILE or _is_adapter(tensors)
    if is_adapter:
        adapter_config = _json_in(folder, ADAPTER_CONFIG_FILE)
        config = config or _config_of_base(adapter_config or {})
    kind = CheckpointFormat.SAFETENSORS if path is files[0] else CheckpointFormat.HUGGING_FACE
    if is_adapter:
        kind = CheckpointFormat.ADAPTER
    aliases = {} if is_adapter else tied_heads(tensors, config or {})
    has_companions = path.is_dir() or config is not None or adapter_config is not None
    return Checkpoint(
        path=path,
        format=kind,
        description=f"{kind.value}, {len(files)} shards" if len(files) > 1 else kind.value,
        tensors={name: tensor for name, tensor in tensors.items() if name not in aliases},
        aliases=aliases,
        config=config,
        adapter_config=adapter_config,
        metadata=read_metadata(files[0]),
        companions=companions_in(folder) if has_companions else (),
        weights_file=ADAPTER_FILE if is_adapter else WEIGHTS_FILE,
    )


def _sharded_tensors(path: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    index = path / INDEX_FILE
    weight_map = Field(index, "", read_json_object(index)).get("weight_map")
    if not isinstance(weight_map.value, dict) or not weight_map.value:
        raise ConfigError(f"{index} has no 'weight_map'; an object {{tensor: file}} is needed")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, field in weight_map.entries().items():
        file_name = field.value
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ConfigError(f"{index} puts {shown(name)} into {shown(file_name)}; a file of that folder is needed")
        if file_name not in shards:
            shards[file_name] = stored_tensors(path / file_name)
        if name not in shards[file_name]:
            raise ConfigError(f"{path / file_name} has no tensor {shown(name)}, which {INDEX_FILE} puts there")
        tensors[name] = shards[file_name][name]
    _check_complete(path, shards, tensors)
    return [path / name for name in shards], tensors


def _check_complete(
    path: Path, shards: Mapping[str, Mapping[str, StoredTensor]], tensors: Mapping[str, StoredTensor]
) -> None:
    for file_name, stored in shards.items():
        unlisted = [name for name in stored if name not in tensors]
        if unlisted:
            raise ConfigError(
                f"{path / file_name} holds tensor {shown(unlisted[0])}, which {INDEX_FILE} does not list; "
                f"the index lists {len(tensors)} tensors and may be another model's: save the model anew"
            )
        match = SHARD.match(file_name)
        for number in range(1, int(match["total"]) + 1) if match is not None and int(match["total"]) < 10**4 else ():
            assert match is not None
            needed = f"{match['stem']}-{number:05d}-of-{match['total']}.safetensors"
            if needed not in shards:
                raise ConfigError(f"{path / INDEX_FILE} lists no tensor of {needed}; save the model anew")


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name and name.isprintable() and len(name) < 256


def _is_adapter(names: Collection[str]) -> bool:
    return bool(names) and all(name.startswith(_ADAPTER_PREFIX) for name in names)


def _json_in(folder: Path, name: str) -> dict[str, Any] | None:
    return read_json_object(folder / name) if (folder / name).is_file() else None


def _config_of_base(adapter_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the model that an adapter adapts, where it is named by its folder."""
    name = adapter_config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.isprintable() or not name or len(name) > 1024:
        return None
    config = Path(name) / CONFIG_FILE
    return read_json_object(config) if config.is_file() else None


def tied_heads(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Output heads that some exporters store although the configuration ties them to the embedding."""
    if config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT) is not True:
        return {}
    aliases = {}
    for head_pattern, table_pattern in _TIED:
        for head in (name for name in tensors if head_pattern.search(name)):
            for name, tensor in tensors.items():
                if name != head and table_pattern.search(name) and tensor.shape == tensors[head].shape:
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
