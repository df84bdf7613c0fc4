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

from sidecast.checkpoints.checkpoint import TRAINABLE_DTYPES, Checkpoint, CheckpointFormat, read_json_object, resolved
from sidecast.checkpoints.huggingface import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    SHARD,
    WEIGHTS_FILE,
)
from sidecast.checkpoints.safetensors_file import write_safetensors
from sidecast.errors import ConfigError

_LOADED = frozenset(
    {
        *(WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE),
        *("pytorch_model.bin", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack", "generation_config.json"),
    }
)


def check_output(out: Path, inputs: list[Path], force: bool) -> None:
    """Raises ConfigError if writing to ``out`` would overwrite something that was not given up."""
    for path in inputs:
        if resolved(out) in (resolved(path), resolved(path.parent)):
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

    The files appear in ``out`` only when all are complete, and what loaders would take for another part of this
    checkpoint, or read in its place, is removed: the weights, shards, index and configurations of an earlier one.

    Args:
        newest: The base.
        change_of: The change of a tensor (fp32, in its shape), or None to copy the tensor.
        out: The folder; created if it does not exist.
        weight: Fraction of the change that is applied.
        dtype: Of all floating tensors; None keeps the base's (for DeepSpeed checkpoints: fp32).
        config: Written as ``config.json`` in place of the base's; not for adapters, which have none.

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
        known = newest.config if config is None and dtype is not None else config
        if known is not None and newest.format is not CheckpointFormat.ADAPTER:
            named = _with_dtype(known, dtype) if dtype is not None else dict(known)
            (partial / CONFIG_FILE).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        write_safetensors(partial / newest.weights_file, layout, tensor_of, newest.metadata)
        out.mkdir(exist_ok=True)
        for stale in _of_loaders(out):
            stale.unlink()
        for file in partial.iterdir():
            file.replace(out / file.name)
    return out / newest.weights_file


def missing_config(newest: Checkpoint, config: Mapping[str, Any] | None) -> str | None:
    """The configuration that a nowcast lacks because none lay with the base; None if it is complete."""
    if newest.format is CheckpointFormat.ADAPTER:
        return ADAPTER_CONFIG_FILE if newest.adapter_config is None else None
    return CONFIG_FILE if newest.config is None and config is None else None


def _of_loaders(folder: Path) -> list[Path]:
    """The files of a folder that loaders look for by their names: weights, shards, their indexes, configurations."""
    named: set[str] = set()
    for index in folder.glob("*.index.json"):
        try:
            weight_map = read_json_object(index).get("weight_map")
        except ConfigError:
            # It goes too.
            weight_map = None
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        named.update(name for name in names if isinstance(name, str) and name.endswith((".safetensors", ".bin")))
    return [
        file
        for file in folder.iterdir()
        if (file.is_file() or file.is_symlink())
        and (file.name in named or file.name in _LOADED or file.match("*.index.json") or _is_shard(file.name))
    ]


def _is_shard(name: str) -> bool:
    match = SHARD.match(name)
    return match is not None and match["stem"] in ("model", "pytorch_model")


def _dtype(newest: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = newest.tensors[name].dtype
    return dtype if dtype is not None and stored in TRAINABLE_DTYPES else stored


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Loaders take the dtype from the configuration, so it has to say what the file holds."""
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: name}
