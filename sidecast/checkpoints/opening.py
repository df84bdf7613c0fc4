"""Opens a checkpoint of any supported format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecast.checkpoints import deepspeed_zero, huggingface
from sidecast.checkpoints.checkpoint import Checkpoint
from sidecast.checkpoints.distributed import distributed_folder, open_distributed
from sidecast.checkpoints.refusals import why_no_file, why_no_folder
from sidecast.errors import ConfigError, one_line, shown

_LATEST_FILE = "latest"
_MAX_NAME_BYTES = 255


def holds_weights(path: Path) -> bool:
    """Whether a file or folder has weights in it that ``open_checkpoint`` reads, or says why it does not.

    A folder with a configuration alone has none, nor has one whose weights are in other formats.
    """
    if path.is_file():
        return path.suffix == ".safetensors"
    is_deepspeed = deepspeed_zero.is_deepspeed_folder(path) or (path / _LATEST_FILE).is_file()
    is_distributed = distributed_folder(path) is not None
    return (
        is_deepspeed or is_distributed or huggingface.is_huggingface_directory(path) or any(path.glob("*.safetensors"))
    )


def open_checkpoint(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a safetensors file, a Hugging Face folder (of a model or an adapter), or one of DeepSpeed or PyTorch's DCP.

    Of a DeepSpeed save folder, the one that holds a folder per step, the step that its ``latest`` file names is
    opened. A folder with both Hugging Face weights and DeepSpeed steps is a Hugging Face directory.

    Args:
        path: The file or folder.
        config: The model's configuration, in place of the one that lies there.

    Returns:
        Names and shapes; tensors are read when asked for.

    Raises:
        ConfigError: Nothing is there, the format is not one of these, or the checkpoint is damaged.
    """
    try:
        return _opened(path, config)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error


def _opened(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(why_no_file(path))
        return huggingface.open_file(path, config)
    if not path.is_dir():
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to {path.readlink()}, which does not exist")
        raise ConfigError(f"{path} does not exist; give a safetensors file or a checkpoint folder")
    if huggingface.is_huggingface_directory(path):
        return huggingface.open_huggingface(path, config)
    if deepspeed_zero.is_deepspeed_folder(path):
        return deepspeed_zero.open_deepspeed(path, config)
    if distributed_folder(path) is not None:
        return open_distributed(path, config)
    latest = path / _LATEST_FILE
    if latest.is_file():
        with latest.open("rb") as file:
            tag = file.read(_MAX_NAME_BYTES + 2).decode("utf-8", errors="replace").strip()
        is_name = tag.isprintable() and len(tag.encode()) <= _MAX_NAME_BYTES and Path(tag).name == tag
        if is_name and deepspeed_zero.is_deepspeed_folder(path / tag):
            return deepspeed_zero.open_deepspeed(path / tag, config)
        raise ConfigError(f"{latest} names {shown(tag)}, which is no DeepSpeed checkpoint in that folder")
    raise ConfigError(why_no_folder(path))
