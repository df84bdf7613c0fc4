"""Writes a nowcast as a checkpoint that the user's own tools load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import TRAINABLE_DTYPES, Checkpoint, CheckpointFormat
from sidecast.checkpoints.huggingface import CONFIG_FILE, WEIGHTS_FILE
from sidecast.checkpoints.safetensors_file import write_safetensors
from sidecast.errors import ConfigError


def check_output(out: Path, inputs: list[Path], force: bool) -> None:
    """Raises ConfigError if writing to ``out`` would overwrite something that was not given up."""
    for path in inputs:
        if out.resolve() in (path.resolve(), path.parent.resolve()):
            raise ConfigError(f"--out {out} is where checkpoint {path} lies; choose a new folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; a folder is needed")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(f"--out {out} exists and is not empty; choose a new folder, or overwrite with --force")


def write_nowcast(
    newest: Checkpoint,
    change_of: Callable[[str], Tensor | None],
    out: Path,
    *,
    weight: float = 1.0,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes newest + weight * change, with everything else as it is in the newest checkpoint.

    The files appear in ``out`` only when all are complete.

    Args:
        newest: The base.
        change_of: The change of a tensor (fp32, in its shape), or None to copy the tensor.
        out: The folder; created if it does not exist.
        weight: Fraction of the change that is applied.
        dtype: Of all floating tensors; None keeps the base's (for DeepSpeed checkpoints: fp32).
        config: Written as ``config.json`` in place of the base's.

    Returns:
        The file with the weights.

    Raises:
        ConfigError: A nowcasted tensor is not finite in its dtype.
    """
    if dtype is None and newest.format is CheckpointFormat.DEEPSPEED:
        dtype = torch.float32
    targets = {name: name for name in newest.tensors} | dict(newest.aliases)
    layout = {name: (_dtype(newest, source, dtype), newest.tensors[source].shape) for name, source in targets.items()}

    def tensor_of(name: str) -> Tensor:
        source = targets[name]
        base = newest.tensors[source].read().detach()
        change = change_of(source)
        if change is None:
            return base.to(layout[name][0])
        computed = base.to(torch.promote_types(base.dtype, torch.float32)) + weight * change
        written = computed.to(layout[name][0])
        if not bool(torch.isfinite(written).all()):
            raise ConfigError(
                f"the nowcast of tensor {source!r} holds NaN or infinity in {str(layout[name][0])[6:]}; "
                f"use a shorter horizon, a smaller weight or another dtype"
            )
        return written

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial_name:
        partial = Path(partial_name)
        for companion in newest.companions:
            shutil.copyfile(companion, partial / companion.name)
        config = config if config is not None else _adapted_config(newest, dtype)
        if config is not None:
            named = _with_dtype(config, dtype) if dtype is not None else dict(config)
            (partial / CONFIG_FILE).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        write_safetensors(partial / WEIGHTS_FILE, layout, tensor_of, newest.metadata)
        out.mkdir(exist_ok=True)
        for file in partial.iterdir():
            file.replace(out / file.name)
    return out / WEIGHTS_FILE


def _dtype(newest: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = newest.tensors[name].dtype
    return dtype if dtype is not None and stored in TRAINABLE_DTYPES else stored


def _adapted_config(newest: Checkpoint, dtype: torch.dtype | None) -> Mapping[str, Any] | None:
    """A model directory's own configuration, if the new dtype has to be written into it."""
    if newest.format is CheckpointFormat.HUGGING_FACE and dtype is not None:
        return newest.config
    return None


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loaders take the dtype from the configuration, so it has to say what the file holds."""
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: name}
