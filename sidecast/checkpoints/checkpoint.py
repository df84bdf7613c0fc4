"""What every checkpoint reader returns: names, shapes and tensors that are read when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError, one_line

TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointFormat(Enum):
    """What kind of file or folder a checkpoint is."""

    SAFETENSORS = "safetensors file"
    HUGGING_FACE = "Hugging Face directory"
    ADAPTER = "PEFT adapter"
    DEEPSPEED = "DeepSpeed checkpoint"
    DISTRIBUTED = "PyTorch distributed checkpoint"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        shape: Full (unpartitioned) shape.
        dtype: As ``read`` returns it.
        trainable: False for what a nowcast leaves alone: frozen parameters, buffers, integers, empty tensors.
        read: Reads it; may return a view of a memory-mapped file, which is not to be written to.
        frozen: True where the format itself says that it is not trained.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    read: Callable[[], Tensor]
    frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's tensors at one step.

    Attributes:
        path: The file or folder that the user gave.
        format: What kind of checkpoint it is.
        description: The format in a few words, with what is particular to this one.
        tensors: Every tensor once, in the checkpoint's own order.
        aliases: Further names of tied tensors, ``{alias: name}``.
        step: Optimizer step that the weights' own files record; None if they record none.
        config: The model's configuration, where a ``config.json`` lies with the weights; an adapter's is that of the
            model that it adapts, where that lies in a folder.
        adapter_config: An adapter's configuration, where an ``adapter_config.json`` lies with it.
        metadata: Free-form strings stored in the file.
        companions: Files that a user needs next to the weights: configuration, generation settings, tokenizer.
        weights_file: What loaders of this kind call the file with the weights.
    """

    path: Path
    format: CheckpointFormat
    description: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    config: Mapping[str, Any] | None = None
    adapter_config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()
    weights_file: str = "model.safetensors"


def resolved(path: Path) -> Path:
    """A path without links.

    Raises:
        ConfigError: Its links lead in a circle, or it is too long.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} leads nowhere: {one_line(error)}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        ConfigError: It cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
