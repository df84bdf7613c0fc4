"""What every checkpoint reader returns: names, shapes and tensors that are read when asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError

TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Formats without a list of buffers store them among the weights under these last name parts.
_BUFFER_NAMES = frozenset({"running_mean", "running_var", "inv_freq", "masked_bias"})


class CheckpointFormat(Enum):
    """What kind of file or folder a checkpoint is."""

    SAFETENSORS = "safetensors file"
    HUGGING_FACE = "Hugging Face directory"
    DEEPSPEED = "DeepSpeed checkpoint"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        shape: Full (unpartitioned) shape.
        dtype: As ``read`` returns it.
        trainable: False for what a nowcast leaves alone: frozen parameters, buffers, integers, empty tensors.
        read: Reads it; may return a view of a memory-mapped file, which is not to be written to.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's tensors at one step.

    Attributes:
        path: The file or folder that the user gave.
        format: What kind of checkpoint it is.
        description: The format in a few words, with what is particular to this one.
        tensors: Every tensor once, in the checkpoint's own order.
        aliases: Further names of tied tensors, ``{alias: name}``.
        step: Optimizer step at which it was saved; None if unknown.
        config: The model's configuration, where a ``config.json`` lies with the weights.
        metadata: Free-form strings stored in the file.
        companions: Files that a user needs next to the weights: configuration, generation settings, tokenizer.
    """

    path: Path
    format: CheckpointFormat
    description: str
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()


def looks_trainable(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor of that name is a parameter, for formats that do not say so."""
    return dtype in TRAINABLE_DTYPES and 0 not in shape and name.rpartition(".")[2] not in _BUFFER_NAMES


def step_of_name(path: Path) -> int | None:
    """The step in a name such as ``checkpoint-200`` or ``step_200.safetensors``; None without trailing digits.

    The digits after a decimal point are none: ``loss-2.31`` names no step.
    """
    name = path.name.removesuffix(".safetensors")
    match = re.search(r"(?:^|[^0-9.])([0-9]+)$", name)
    return int(match[1]) if match else None


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        ConfigError: It cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
