"""Opens a checkpoint of any supported format."""

from __future__ import annotations

from pathlib import Path

from sidecast.checkpoints import deepspeed_zero, huggingface
from sidecast.checkpoints.checkpoint import Checkpoint
from sidecast.checkpoints.safetensors_file import open_safetensors
from sidecast.errors import ConfigError

_LATEST_FILE = "latest"


def holds_weights(path: Path) -> bool:
    """Whether a file or folder has weights in it that ``open_checkpoint`` reads, or says why it does not.

    A folder with a configuration alone has none, nor has one whose weights are in other formats.
    """
    if path.is_file():
        return path.suffix == ".safetensors"
    is_deepspeed = deepspeed_zero.is_deepspeed_folder(path) or (path / _LATEST_FILE).is_file()
    return is_deepspeed or huggingface.is_huggingface_directory(path) or any(path.glob("*.safetensors"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a safetensors file, a Hugging Face directory or a DeepSpeed checkpoint folder.

    Of a DeepSpeed save folder, the one that holds a folder per step, the step that its ``latest`` file names is
    opened. A folder with both Hugging Face weights and DeepSpeed steps is a Hugging Face directory.

    Args:
        path: The file or folder.

    Returns:
        Names and shapes; tensors are read when asked for.

    Raises:
        ConfigError: Nothing is there, the format is not one of these, or the checkpoint is damaged.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(f"{path} is no checkpoint that can be read; of files only *.safetensors are")
        return open_safetensors(path)
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; give a safetensors file or a checkpoint folder")
    if huggingface.is_huggingface_directory(path):
        return huggingface.open_huggingface(path)
    if deepspeed_zero.is_deepspeed_folder(path):
        return deepspeed_zero.open_deepspeed(path)
    latest = path / _LATEST_FILE
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(tag).name == tag and deepspeed_zero.is_deepspeed_folder(path / tag):
            return deepspeed_zero.open_deepspeed(path / tag)
        raise ConfigError(f"{latest} names {tag!r}, which is no DeepSpeed checkpoint in that folder")
    raise ConfigError(
        huggingface.refusal(path)
        or f"{path} holds neither model.safetensors (Hugging Face) nor *_model_states.pt (DeepSpeed)"
    )
