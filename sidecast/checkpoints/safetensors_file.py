"""Safetensors files: read lazily, written tensor by tensor.

The safetensors library writes from tensors that are all in memory; a nowcast of a large model must not need that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidecast.checkpoints.checkpoint import StoredTensor
from sidecast.checkpoints.trainable import looks_trainable
from sidecast.errors import ConfigError, shown

_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_HEADER_ALIGNMENT_BYTES = 8
_MAX_REASON_CHARACTERS = 200


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, each read from the memory-mapped file when asked for."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                header = file.get_slice(name)
                dtype_name, shape = header.get_dtype(), tuple(header.get_shape())
                if dtype_name not in _DTYPES:
                    raise ConfigError(
                        f"{path}: tensor {shown(name)} has dtype {shown(dtype_name)[1:-1]}; "
                        f"supported are {', '.join(sorted(_DTYPES))}"
                    )
                dtype = _DTYPES[dtype_name]
                tensors[name] = StoredTensor(
                    shape=shape,
                    dtype=dtype,
                    trainable=looks_trainable(name, shape, dtype),
                    read=_reader(path, name),
                )
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is not a readable safetensors file: {str(error)[:_MAX_REASON_CHARACTERS]}"
        ) from error
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form strings in a file's header."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened per tensor, because the library's handle keeps every page that it ever touched mapped.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file while holding one tensor at a time.

    Args:
        path: The file, created or overwritten.
        layout: Dtype and shape of every tensor.
        tensor_of: Makes the tensor of a name; called once per name.
        metadata: Free-form strings for the header.
    """
    # Wide elements first keeps every tensor aligned to its own element size.
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name in names:
        dtype, shape = layout[name]
        size_bytes = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size_bytes],
        }
        position += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = tensor_of(name)
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
