"""Readers on small and on damaged or malicious files."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidecast.checkpoints.inert_pickle import load_inert
from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.safetensors_file import write_safetensors
from sidecast.errors import ConfigError


class Exploit:
    """Pickles to a call of a function that leaves a trace when it runs."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def deepspeed_folder(path: Path, **model_state: Any) -> Path:
    path.mkdir()
    weights = {"module": {"w": torch.ones(2)}, "global_steps": 5, **model_state}
    torch.save(weights, path / "mp_rank_00_model_states.pt")
    return path


@pytest.mark.parametrize("function", [os.mkdir, eval, exec, __import__, Path.touch])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, function: Any) -> None:
    trace = tmp_path / "trace"
    argument = {os.mkdir: str(trace), Path.touch: trace}.get(function, f"__import__('os').mkdir({str(trace)!r})")
    folder = deepspeed_folder(tmp_path / "global_step5", client=Exploit(function, argument))
    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states.pt is refused: its pickle names '") as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)
    assert not trace.exists()


def test_what_trainers_store_beside_the_weights_becomes_inert(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"w": torch.ones(2), "args": Namespace(lr=1.0), "rng": np.random.RandomState(0).get_state()}, path)
    assert torch.equal(load_inert(path)["w"], torch.ones(2))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 torn"])
def test_a_damaged_pickle_is_one_line(tmp_path: Path, content: bytes) -> None:
    folder = deepspeed_folder(tmp_path / "global_step5")
    (folder / "mp_rank_00_model_states.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states.pt cannot be read") as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_flat_masters_of_stage_0_find_their_parameters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3, 2, generator=generator) for name in ("a", "b", "c", "frozen")}
    groups = [torch.cat([weights["a"].flatten(), weights["c"].flatten()]), weights["b"].flatten()]
    module = {name: weights[name].bfloat16() for name in ("a", "frozen", "b", "c")}
    optimizer = {"fp32_groups_flat": groups}
    tensors = open_checkpoint(deepspeed_folder(tmp_path / "s", module=module, optimizer=optimizer)).tensors
    for name in ("a", "b", "c"):
        assert torch.equal(tensors[name].read(), weights[name])
    assert not tensors["frozen"].trainable
    module["c"] = module["c"] + 1
    with pytest.raises(ConfigError, match="6 elements of the fp32 masters fit no parameter"):
        open_checkpoint(deepspeed_folder(tmp_path / "t", module=module, optimizer=optimizer))


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"])
def test_refuses_models_split_otherwise(tmp_path: Path, name: str) -> None:
    folder = deepspeed_folder(tmp_path / "global_step5")
    torch.save({}, folder / name)
    with pytest.raises(ConfigError, match=rf"tensor, pipeline or expert parallelism \({name}\)"):
        open_checkpoint(folder)


def test_reads_a_sharded_directory_and_refuses_a_broken_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    checkpoint = open_checkpoint(tmp_path)
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {"a": (2,), "b": (3,)}
    for file, message in (
        ("gone.safetensors", "gone.safetensors is not a readable safetensors file"),
        ("two.safetensors", "two.safetensors has no tensor 'a'"),
        ("../one.safetensors", "a file of that folder is needed"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "missing does not exist"),
        ("model.ckpt", b"", "is no checkpoint that can be read; of files only"),
        ("a.safetensors", b"torn", "a.safetensors is not a readable safetensors file"),
        ("d/notes.txt", b"", "d holds neither model.safetensors .* nor"),
        ("d/pytorch_model.bin", b"", "d holds pickled weights"),
        ("d/latest", b"../../elsewhere", "latest names '../../elsewhere', which is no DeepSpeed checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path.parent if name.startswith("d/") else path)


def test_the_streaming_writer_meets_the_format(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "flag": torch.tensor([True]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "strided": torch.arange(6.0).view(2, 3).T,
        "scalar": torch.tensor(4, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "double": torch.ones(1, dtype=torch.float64),
    }
    path = tmp_path / "x.safetensors"
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.__getitem__, {"note": "ü"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
