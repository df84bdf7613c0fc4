"""Which stored tensors a nowcast may work on: parameters as numbers, and neither buffers nor codes for weights."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from sidecast.checkpoints.checkpoint import TRAINABLE_DTYPES, Checkpoint, StoredTensor
from sidecast.errors import ConfigError

# Formats without a list of buffers store them among the weights under these last name parts.
_BUFFER_NAMES = frozenset(
    {
        *("running_mean", "running_var", "num_batches_tracked", "cluster_size", "embed_avg", "weight_u"),
        *("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "masked_bias", "position_ids"),
    }
)
_MASK_NAMES = re.compile(r"(?:^|\.)(?:attn|attention|self_attn)\.bias$")
# What the last part of a parameter's name is, or ends in, when integers there are codes for its values.
_CODES = re.compile(r"(?:^|[._])(?:weight|qweight|qzeros|packed|weight_packed|blocks|codes)$")
_SCALES = ("_scale", "_scale_inv", "_scales", ".absmax", ".scales", ".SCB", ".quant_map")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
_WAY_OUT = "a nowcast needs 16-bit or wider weights: dequantise first, and save the model anew"


def looks_trainable(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor of that name is a parameter, for formats that do not say so."""
    return dtype in TRAINABLE_DTYPES and 0 not in shape and not is_buffer(name, shape)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is known by its name not to be a parameter: statistics, tables, and masks of attention."""
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and _MASK_NAMES.search(name) is not None
    return is_mask or name.rpartition(".")[2] in _BUFFER_NAMES


def check_trainable(checkpoint: Checkpoint) -> None:
    """Checks that the parameters of a checkpoint are there, and are numbers that a nowcast can add to.

    Raises:
        ConfigError: They are quantised, or empty placeholders.
    """
    _check_not_quantised(checkpoint)
    _check_no_placeholders(checkpoint)


def _check_not_quantised(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if not tensor.frozen and _holds_codes(name, tensor, checkpoint.tensors.keys()):
            raise ConfigError(f"tensor {name!r} of {checkpoint.path} is {str(tensor.dtype)[6:]}; {_WAY_OUT}")
    quantisation = (checkpoint.config or {}).get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        kind = f" ({str(method)[:40]!r})" if method else ""
        raise ConfigError(f"the config.json of {checkpoint.path} has a quantization_config{kind}; {_WAY_OUT}")


def _holds_codes(name: str, tensor: StoredTensor, names: Collection[str]) -> bool:
    if tensor.dtype.is_floating_point:
        return tensor.dtype not in TRAINABLE_DTYPES
    if tensor.dtype not in _INTEGERS or is_buffer(name, tensor.shape):
        return False
    stem = name.rpartition(".")[0]
    return _CODES.search(name) is not None or any(
        base + suffix in names for base in {name, stem} - {""} for suffix in _SCALES
    )


def _check_no_placeholders(checkpoint: Checkpoint) -> None:
    empty = [
        name
        for name, tensor in checkpoint.tensors.items()
        if tensor.shape == (0,) and tensor.dtype.is_floating_point and not tensor.frozen
    ]
    if not any(name.rpartition(".")[2] in ("weight", "bias") for name in empty) and len(empty) < 2:
        return
    problem = (
        f"{len(empty)} of {len(checkpoint.tensors)} tensors of {checkpoint.path} are empty placeholders, "
        f"as {empty[0]!r}, whose parameters ZeRO stage 3 kept elsewhere"
    )
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = sorted(
        {file.parent for file in folder.glob("*/*_model_states.pt")}, key=lambda step: (len(step.name), step.name)
    )
    if beside:
        raise ConfigError(f"{problem}; give {beside[-1]}, which holds them")
    raise ConfigError(
        f"{problem}; save with stage3_gather_16bit_weights_on_model_save, or give DeepSpeed's own folder (global_stepN)"
    )
