"""Folders that ``torch.distributed.checkpoint`` wrote (DCP): of FSDP2, accelerate, torchtitan and others.

A folder holds an index, ``.metadata``, and a file or more of each rank. The index says of each tensor into which boxes
it was cut, and of each box where its bytes lie; each box is a tensor that ``torch.save`` wrote (PyTorch 2.13).
Shape legend: D dimensions.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, StoredTensor, read_json_object
from sidecast.checkpoints.fields import Field
from sidecast.checkpoints.huggingface import CONFIG_FILE, companions_in, config_folder, tied_heads
from sidecast.checkpoints.inert_pickle import Record, load_records
from sidecast.checkpoints.trainable import looks_trainable
from sidecast.errors import ConfigError, one_line, shown

INDEX_FILE = ".metadata"
MODEL_FOLDER = "pytorch_model_fsdp_0"
"""Where accelerate, and so Hugging Face's Trainer, puts the model of a checkpoint."""
_PACKAGE = "torch.distributed.checkpoint."
_MODEL_KEY = "model"


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        offsets: Where it begins, D integers.
        sizes: Its shape.
        file: Where its bytes lie.
        start: The first of them.
        num_bytes: How many those are.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


def distributed_folder(path: Path) -> Path | None:
    """The folder of the index: the given one, or the model's in one that accelerate saved; None if there is none."""
    return next((folder for folder in (path, path / MODEL_FOLDER) if (folder / INDEX_FILE).is_file()), None)


def open_distributed(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Opens a distributed checkpoint; its optimizer's state, if it is there, is left alone.

    The model's tensors are those under the key ``model``, on whatever level that lies; or, where there is no such key,
    those that lie on the first one.

    Args:
        path: The folder with the index, or one that accelerate saved.
        config: The model's configuration, in place of the one that lies there or one folder up.

    Raises:
        ConfigError: The index is damaged or names code, a file is missing or cut short, parts of a tensor are missing
            or overlap, or the checkpoint holds no model, or more than one.
    """
    folder = distributed_folder(path)
    assert folder is not None
    index = _state(Field(folder / INDEX_FILE, "", load_records(folder / INDEX_FILE)), "metadata.Metadata")
    described = {
        key: _state(entry, "metadata.TensorStorageMetadata")
        for key, entry in index.get("state_dict_metadata").entries().items()
        if not _is_of(entry, "metadata.BytesStorageMetadata")
    }
    names = _model_names(folder, list(described), index.get("planner_data"))
    places = _places(folder, index.get("storage_data"), names)
    tensors = {name: _stored(described[key], key, name, places) for key, name in names.items()}
    found = config_folder(path)
    known = config if config is not None or found is None else read_json_object(found / CONFIG_FILE)
    # A model's state has tied parameters under all of their names.
    aliases = tied_heads(tensors, known or {})
    return Checkpoint(
        path=path,
        format=CheckpointFormat.DISTRIBUTED,
        description=CheckpointFormat.DISTRIBUTED.value,
        tensors={name: tensor for name, tensor in tensors.items() if name not in aliases},
        aliases=aliases,
        config=known,
        companions=() if found is None else companions_in(found),
    )


def _is_of(field: Field, kind: str) -> bool:
    return isinstance(field.value, Record) and field.value.kind == _PACKAGE + kind


def _state(field: Field, kind: str) -> Field:
    """What a record of some kind holds."""
    if not _is_of(field, kind):
        raise field.refused(f"a {kind.rpartition('.')[2]} of PyTorch")
    return Field(field.file, field.name, field.value.state)


def _model_names(folder: Path, keys: Sequence[str], planned: Field) -> dict[str, str]:
    """The model's tensors by their keys in the index: their names in the model."""
    paths = {}
    for key in keys:
        path = Field(planned.file, "", None) if planned.is_absent else planned.get(key)
        # Without a plan nothing was nested.
        parts = (key,) if path.is_absent else tuple(f"{part.value}" for part in path.items())
        if not parts:
            raise path.refused("a list of at least one part")
        paths[key] = parts
    roots = {parts[: parts.index(_MODEL_KEY) + 1] for parts in paths.values() if _MODEL_KEY in parts[:-1]}
    if len(roots) > 1:
        first, second, *_ = sorted(".".join(root) for root in roots)
        raise ConfigError(f"{folder} holds more than one model ({shown(first)}, {shown(second)}); one is needed")
    root = next(iter(roots), ())
    names = {
        key: ".".join(parts[len(root) :])
        for key, parts in paths.items()
        if parts[: len(root)] == root and (root or len(parts) == 1)
    }
    if not names:
        held = ", ".join(map(shown, sorted({parts[0] for parts in paths.values()})[:3])) or "no tensor"
        raise ConfigError(f"{folder} holds no model, but {held}; give the folder that the model was saved in")
    return names


Places = Mapping[tuple[str, tuple[int, ...]], tuple[Path, int, int]]


def _places(folder: Path, stored: Field, names: Mapping[str, str]) -> Places:
    """Where boxes lie, by key and offsets: file, first byte, number of bytes."""
    if not isinstance(stored.value, dict):
        raise stored.refused("a dict")
    places = {}
    lengths: dict[str, int] = {}
    for item, info in stored.value.items():
        at = _state(Field(stored.file, f"a key of {stored.name}", item), "metadata.MetadataIndex")
        key = at.get("fqn").text()
        if key not in names:
            continue
        where = _state(Field(stored.file, f"{stored.name}[{key!r}]", info), "filesystem._StorageInfo")
        if where.get("transform_descriptors").value:
            raise where.get("transform_descriptors").refused("a checkpoint without compression or other transforms")
        name = where.get("relative_path").text()
        if Path(name).name != name or not name.isprintable():
            raise where.get("relative_path").refused("a file of that folder")
        if name not in lengths:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} lacks {name}, which its index names; copy the files of all ranks")
            lengths[name] = (folder / name).stat().st_size
        start, num_bytes = where.get("offset").count(), where.get("length").count()
        if start + num_bytes > lengths[name]:
            raise ConfigError(
                f"{folder / name} has {lengths[name]} bytes, and its index puts a part of {shown(key)} up to "
                f"{start + num_bytes}; the file is cut short"
            )
        places[key, at.get("offset").shape()] = (folder / name, start, num_bytes)
    return places


def _stored(described: Field, key: str, name: str, places: Places) -> StoredTensor:
    shape = described.get("size").shape()
    properties = _state(described.get("properties"), "metadata.TensorProperties")
    dtype = properties.items()[0].value if isinstance(properties.value, tuple) and properties.value else None
    if not isinstance(dtype, torch.dtype):
        raise properties.refused("a dtype and further properties")
    boxes = []
    for chunk in described.get("chunks").items():
        cut = _state(chunk, "metadata.ChunkStorageMetadata")
        offsets, sizes = cut.get("offsets").shape(), cut.get("sizes").shape()
        if prod(sizes) == 0:
            continue
        if (key, offsets) not in places:
            raise cut.refused("a part that the index has a place for")
        box = Box(offsets, sizes, *places[key, offsets])
        if box.num_bytes < prod(sizes) * dtype.itemsize:
            raise cut.refused(f"a part of at most the {box.num_bytes} bytes of its place")
        boxes.append(box)
    problem = tiling_error(shape, boxes)
    if problem:
        raise ConfigError(f"{described.file}: tensor {shown(key)} of shape {list(shape)} {problem}")
    return StoredTensor(
        shape=shape,
        dtype=dtype,
        trainable=looks_trainable(name, shape, dtype),
        read=partial(_read, key, shape, dtype, boxes),
    )


def tiling_error(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """Why boxes do not cover a tensor exactly once, for a message; empty if they do.

    Args:
        shape: Of the tensor, D sizes.
        boxes: Its parts, none of them empty.
    """
    for box in boxes:
        ends = [offset + size for offset, size in zip(box.offsets, box.sizes, strict=False)]
        if not len(shape) == len(box.offsets) == len(box.sizes) or any(
            end > size for end, size in zip(ends, shape, strict=True)
        ):
            return f"has a part at {list(box.offsets)} of shape {list(box.sizes)}, which lies outside it"
    ordered = sorted(boxes, key=lambda box: box.offsets)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if shape and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if all(
                here < there + size and there < here + own
                for here, own, there, size in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True)
            ):
                return f"has two parts that overlap, at {list(box.offsets)} and {list(other.offsets)}"
    covered = sum(prod(box.sizes) for box in boxes)
    return "" if covered == prod(shape) else f"has parts of {covered} elements only; the checkpoint is incomplete"


def _read(key: str, shape: tuple[int, ...], dtype: torch.dtype, boxes: Sequence[Box]) -> Tensor:
    whole = torch.empty(shape, dtype=dtype)
    for box in boxes:
        part = _part(key, box)
        if part.dtype != dtype or tuple(part.shape) != box.sizes:
            raise ConfigError(
                f"{box.file} holds a part of {shown(key)} that is {part.dtype} of shape {list(part.shape)}; "
                f"the index says {dtype} of shape {list(box.sizes)}"
            )
        slices = tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))
        whole[slices].copy_(part)
    return whole


def _part(key: str, box: Box) -> Tensor:
    try:
        with box.file.open("rb") as file:
            file.seek(box.start)
            written = io.BytesIO(file.read(box.num_bytes))
        part = torch.load(written, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that torch.save has not written can fail anywhere in the unpickler
        raise ConfigError(f"{box.file}: a part of {shown(key)} cannot be read: {one_line(error)}") from error
    return Field(box.file, f"a part of {shown(key)}", part).tensor()
