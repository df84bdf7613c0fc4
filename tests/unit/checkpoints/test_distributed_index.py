"""Distributed checkpoints of PyTorch: read box by box, and refused by name where they are damaged or run code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from sidecast.checkpoints.opening import holds_weights, open_checkpoint
from sidecast.errors import ConfigError

WIDE = torch.arange(24.0).reshape(6, 4)
DEEP = torch.arange(5, dtype=torch.bfloat16)
Boxes = Sequence[tuple[slice, ...]]
ROWS: Boxes = ((slice(0, 4), slice(0, 4)), (slice(4, 6), slice(0, 4)))
QUARTERS: Boxes = tuple((slice(r, r + 3), slice(c, c + 2)) for r in (0, 3) for c in (0, 2))


def write(
    folder: Path,
    tensors: Mapping[tuple[str, ...], tuple[Tensor, Boxes]],
    change: Callable[[torch_metadata.Metadata], None] = lambda index: None,
) -> Path:
    """A checkpoint as PyTorch writes it, one file for each box of a tensor; then changed."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {"step": torch_metadata.BytesStorageMetadata()}
    places: dict[torch_metadata.MetadataIndex, _StorageInfo] = {}
    offsets = [0, 0, 0, 0]
    files = [(folder / f"__{rank}_0.distcp").open("wb") for rank in range(len(offsets))]
    for parts, (tensor, boxes) in tensors.items():
        key = ".".join(parts)
        chunks = []
        for rank, box in enumerate(boxes):
            piece = tensor[box].clone()
            start = files[rank].tell()
            torch.save(piece, files[rank])
            at = torch.Size([each.start for each in box])
            places[torch_metadata.MetadataIndex(key, at, rank)] = _StorageInfo(
                f"__{rank}_0.distcp", start, files[rank].tell() - start
            )
            chunks.append(torch_metadata.ChunkStorageMetadata(at, piece.shape))
        properties = torch_metadata.TensorProperties.create_from_tensor(tensor)
        described[key] = torch_metadata.TensorStorageMetadata(properties, tensor.shape, chunks)
    for file in files:
        file.close()
    index = torch_metadata.Metadata(
        described,
        planner_data={"step": ("step",), **{".".join(parts): parts for parts in tensors}},
        storage_data=places,
        storage_meta=torch_metadata.StorageMeta(checkpoint_id=folder),
    )
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def model(boxes: Boxes = ROWS) -> dict[tuple[str, ...], tuple[Tensor, Boxes]]:
    return {
        ("optim", "state", "wide", "exp_avg"): (WIDE * 2, ROWS),
        ("model", "wide"): (WIDE, boxes),
        ("model", "sub.deep"): (DEEP, [(slice(0, 5),)]),
        ("model", "sub.running_mean"): (DEEP.float(), [(slice(0, 5),)]),
    }


@pytest.mark.parametrize("boxes", [ROWS, ROWS[::-1], QUARTERS, [(slice(0, 6), slice(0, 4))]])
def test_a_tensor_is_put_together_from_its_boxes(tmp_path: Path, boxes: Boxes) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "step-30", model(boxes)))
    assert {name: tensor.trainable for name, tensor in checkpoint.tensors.items()} == {
        "wide": True,
        "sub.deep": True,
        "sub.running_mean": False,
    }
    for name, expected in (("wide", WIDE), ("sub.deep", DEEP)):
        read = checkpoint.tensors[name].read()
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected)
    assert checkpoint.description == "PyTorch distributed checkpoint"


def test_models_lie_under_their_key_or_on_the_first_level(tmp_path: Path) -> None:
    whole: Boxes = [(slice(0, 6), slice(0, 4))]
    for name, tensors in {
        "nested": {("app", "model", "w"): (WIDE, whole), ("app", "optim", "w"): (WIDE, whole)},
        "flat": {("w",): (WIDE, whole), ("optimizer", "state.w.exp_avg"): (WIDE, whole)},
    }.items():
        assert list(open_checkpoint(write(tmp_path / name, tensors)).tensors) == ["w"]

    def without_plan(index: torch_metadata.Metadata) -> None:
        index.planner_data = None

    assert list(open_checkpoint(write(tmp_path / "unplanned", {("w",): (WIDE, whole)}, without_plan)).tensors) == ["w"]
    two = {("model", "w"): (WIDE, whole), ("average", "model", "w"): (WIDE, whole)}
    with pytest.raises(ConfigError, match=r"holds more than one model \('average.model', 'model'\)"):
        open_checkpoint(write(tmp_path / "two", two))
    with pytest.raises(ConfigError, match=r"holds no model, but 'optimizer'; give the folder that the model was saved"):
        open_checkpoint(write(tmp_path / "none", {("optimizer", "w"): (WIDE, whole)}))


def test_a_folder_of_the_trainer_and_its_tied_head(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-20"
    table: Boxes = [(slice(0, 6), slice(0, 4))]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    write(folder / "pytorch_model_fsdp_0", {("model", name): (WIDE, table) for name in names})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    checkpoint = open_checkpoint(folder)
    assert holds_weights(folder)
    assert (list(checkpoint.tensors), checkpoint.aliases) == ([names[0]], {names[1]: names[0]})
    assert [file.name for file in checkpoint.companions] == ["config.json"]


class Exploit:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_an_index_that_names_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def plant(index: torch_metadata.Metadata) -> None:
        index.storage_meta = Exploit(trace)  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"metadata is refused: its pickle names '\w+\.mkdir', which could run code"):
        open_checkpoint(write(tmp_path / "d", model(), plant))
    assert not trace.exists()


def _place(index: torch_metadata.Metadata, **values: Any) -> None:
    for at, where in index.storage_data.items():
        if at.fqn == "model.wide" and at.offset[0] == 4:
            index.storage_data[at] = replace(where, **values)


def _drop_place(index: torch_metadata.Metadata) -> None:
    index.storage_data = {at: where for at, where in index.storage_data.items() if at.offset != torch.Size([4, 0])}


def _cut(offsets: list[int], sizes: list[int]) -> Callable[[torch_metadata.Metadata], None]:
    def change(index: torch_metadata.Metadata) -> None:
        wide = index.state_dict_metadata["model.wide"]
        wide.chunks[1] = torch_metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))  # type: ignore[union-attr]
        for at, where in list(index.storage_data.items()):
            if at.fqn == "model.wide" and at.offset[0] == 4:
                index.storage_data[torch_metadata.MetadataIndex("model.wide", offsets)] = where

    return change


def _grow(index: torch_metadata.Metadata) -> None:
    index.state_dict_metadata["model.wide"].size = torch.Size([7, 4])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: _place(index, relative_path="../x"), r"is '../x'; a file of that folder is needed"),
        (lambda index: _place(index, relative_path="gone"), r"lacks gone, which its index names; copy the files of"),
        (lambda index: _place(index, length=10**6), r"__1_0.distcp has \d+ bytes, .*; the file is cut short"),
        (lambda index: _place(index, length=8), r"a part of at most the 8 bytes of its place is needed"),
        (lambda index: _place(index, offset=-1), r"\['offset'\] is -1; an integer of at least 0 is needed"),
        (lambda index: _place(index, transform_descriptors=["zstd"]), r"without compression or other transforms"),
        (_drop_place, r"a part that the index has a place for is needed"),
        (_cut([3, 0], [2, 4]), r"'model.wide' of shape \[6, 4\] has two parts that overlap, at \[0, 0\] and \[3, 0\]"),
        (_cut([4, 0], [2, 3]), r"has parts of 22 elements only; the checkpoint is incomplete"),
        (_cut([5, 0], [2, 4]), r"has a part at \[5, 0\] of shape \[2, 4\], which lies outside it"),
        (_grow, r"of shape \[7, 4\] has parts of 24 elements only"),
        (lambda index: setattr(index, "storage_data", None), r"'storage_data' is None; a dict is needed"),
        (lambda index: index.state_dict_metadata.update(x=3), r"\['x'\] is 3; a TensorStorageMetadata of PyTorch is"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    folder = write(tmp_path / "d", model(), change)
    with pytest.raises(ConfigError, match=message) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_a_part_that_is_not_what_the_index_says_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {("model", "wide"): (WIDE, ROWS)})
    (folder / "__1_0.distcp").write_bytes(b"x" * (folder / "__1_0.distcp").stat().st_size)
    with pytest.raises(ConfigError, match=r"__1_0.distcp: a part of 'model.wide' cannot be read: "):
        open_checkpoint(folder).tensors["wide"].read()
    other = write(tmp_path / "e", {("model", "wide"): (WIDE.bfloat16(), ROWS)})
    (folder / "__1_0.distcp").write_bytes((other / "__1_0.distcp").read_bytes().ljust(4096, b"\0"))
    with pytest.raises(ConfigError, match=r"a part of 'model.wide' "):
        open_checkpoint(folder).tensors["wide"].read()


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), is_cut=st.booleans())
def test_no_damage_of_the_index_is_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, where: float, byte: int, is_cut: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write(folder, model())
        (folder / ".metadata").rename(folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    position = int(where * len(content))
    content[position] = byte
    (folder / ".metadata").write_bytes(content[:position] if is_cut else content)
    refusal = ""
    try:
        for tensor in open_checkpoint(folder).tensors.values():
            tensor.read()
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
