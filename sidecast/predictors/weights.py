"""Reads the weights files of trained predictors; nothing executable is ever loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidecast.errors import ConfigError, one_line


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Loads the fp32 tensors of a weights file of any network, and the metadata of a safetensors file.

    Raises:
        ConfigError: The file is missing, unreadable or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"weights file {path} does not exist; expected a .pt, .pth or .safetensors file")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    elif path.suffix in {".pt", ".pth"}:
        tensors = _read_pickle(path)
    else:
        raise ConfigError(f"weights file {path} ends in {path.suffix!r}; allowed: .pt, .pth, .safetensors")
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"weights file {path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a file that is no pickle can fail anywhere in the unpickler
        raise ConfigError(f"weights file {path} cannot be loaded as plain tensors: {one_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"weights file {path} holds {found}; expected a dictionary of tensors, or one under 'state_dict'"
        )
    return content
