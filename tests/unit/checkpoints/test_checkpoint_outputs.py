"""What a nowcast's folder holds: all that loaders look for, and nothing that is left over."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.staging import manifest_of
from sidecast.commands import predict
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology
from tests.support.symmetric_models import SMALL_MODELS


def nowcast(paths: list[Path], out: Path, *options: str) -> Path:
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers(required=True))
    arguments = ["predict", *map(str, paths), "--horizon", "1", "--out", str(out), *options]
    assert predict.run(parser.parse_args(arguments)) == 0
    return out


def deepspeed_steps(folder: Path) -> list[Path]:
    paths = []
    for step in (1, 2):
        path = folder / f"checkpoint-{step}" / f"global_step{step}"
        path.mkdir(parents=True)
        state = {"module": {"w": torch.full((2, 3), float(step))}, "buffer_names": [], "global_steps": step}
        torch.save(state, path / "mp_rank_00_model_states.pt")
        (path.parent / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16", "hidden_size": 3}')
        (path.parent / "tokenizer.json").write_text("{}")
        (path.parent / "trainer_state.json").write_text("{}")
        paths.append(path)
    return paths


ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def adapter_steps(folder: Path, *, alphas: tuple[int, int] = (8, 8)) -> list[Path]:
    paths = []
    for step, alpha in zip((1, 2), alphas, strict=True):
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        tensors = {ADAPTER.format(side): torch.full((2, 3), float(step)) for side in "AB"}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "lora_alpha": alpha, "base_model_name_or_path": str(folder / "base")}
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_nowcast_of_deepspeeds_has_the_configuration_that_lies_with_it(tmp_path: Path) -> None:
    out = nowcast(deepspeed_steps(tmp_path), tmp_path / "out")
    assert names(out) == {"config.json", "tokenizer.json", "model.safetensors"}
    # The masters are fp32, and loaders take the dtype from the configuration.
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": 3,
    }


def test_a_nowcast_of_files_has_what_lies_beside_them(tmp_path: Path) -> None:
    paths = []
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer.json").write_text("{}")
        paths.append(folder / "model.safetensors")
    assert names(nowcast(paths, tmp_path / "out")) == {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.mark.parametrize("is_file", [True, False])
def test_a_nowcast_of_adapters_is_an_adapter(tmp_path: Path, is_file: bool, capsys: pytest.CaptureFixture[str]) -> None:
    paths = adapter_steps(tmp_path)
    given = [path / "adapter_model.safetensors" for path in paths] if is_file else paths
    out = nowcast(given, tmp_path / "out")
    assert names(out) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (out / "adapter_config.json").read_bytes() == (paths[-1] / "adapter_config.json").read_bytes()
    predicted = load_file(out / "adapter_model.safetensors")
    assert {name: tensor.unique().item() for name, tensor in predicted.items()} == {
        ADAPTER.format("A"): 3.0,
        ADAPTER.format("B"): 3.0,
    }
    assert "PEFT adapter, step 2 by the name 'checkpoint-2'" in capsys.readouterr().out


def test_adapters_of_other_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config.json says lora_alpha=16 for .*-2 but 8 for .*-1"):
        nowcast(adapter_steps(tmp_path, alphas=(8, 16)), tmp_path / "out")


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = adapter_steps(tmp_path)
    for path in paths:
        (path / "adapter_config.json").unlink()
    nowcast(paths, tmp_path / "out")
    assert "without adapter_config.json, which no loader does without" in capsys.readouterr().out


def test_a_saved_adapter_has_a_graph(tmp_path: Path) -> None:
    model = SMALL_MODELS["llama"]()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(dict(model.manifest.config), default=str))
    spec = model.manifest.spec("model.layers.0.self_attn.q_proj.weight")
    (path, _) = adapter_steps(tmp_path)
    tensors = {ADAPTER.format("A"): torch.ones(2, spec.shape[1]), ADAPTER.format("B"): torch.ones(spec.shape[0], 2)}
    save_file(tensors, path / "adapter_model.safetensors")
    topology = build_topology(manifest_of(open_checkpoint(path), None))
    assert {block.view.fqn for block in topology.blocks if block.view is not None} == set(tensors)


@pytest.mark.parametrize("kind", ["shards", "adapter", "pickle"])
def test_force_leaves_nothing_that_loaders_would_read_instead(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stale: dict[str, Any] = {
        "shards": ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "part.safetensors"],
        "adapter": ["adapter_model.safetensors", "adapter_config.json"],
        "pickle": ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
    }[kind]
    for name in stale:
        (out / name).write_bytes(b"old")
    for index, shard in (
        ("model.safetensors.index.json", "part.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
    ):
        if (out / index).exists():
            (out / index).write_text(json.dumps({"weight_map": {"a": shard, "b": "../checkpoint-1", "c": 3}}))
    (out / "notes.txt").write_text("mine")
    (out / "step_7.safetensors").write_bytes(b"mine")
    (out / "sub").mkdir()
    nowcast(deepspeed_steps(tmp_path), out, "--force")
    assert names(out) == {
        *("config.json", "tokenizer.json", "model.safetensors"),
        *("notes.txt", "step_7.safetensors", "sub"),
    }


def shard(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)


def test_folders_of_which_a_part_would_be_read_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    shard(tmp_path / "model-00001-of-00002.safetensors", {"a": torch.ones(2), "b": torch.ones(2)})
    shard(tmp_path / "model-00002-of-00002.safetensors", {"c": torch.ones(2)})
    whole = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}

    def refused(weight_map: dict[str, str], message: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path)

    refused({"a": whole["a"]}, r"holds tensor 'b', which .* does not list; the index lists 1 tensors")
    refused(whole, r"lists no tensor of model-00002-of-00002.safetensors")
    whole["c"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": whole}))
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}
    for file in ("..", "", ".", "a\x00b", "\ud800", "x" * 300):
        refused({**whole, "d": file}, "a file of that folder is needed")
    with pytest.raises(ConfigError, match=r"is one of 2 shards of a model; give the folder"):
        open_checkpoint(tmp_path / "model-00001-of-00002.safetensors")
    shard(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    with pytest.raises(ConfigError, match=r"holds both model.safetensors and model.safetensors.index.json.*left over"):
        open_checkpoint(tmp_path)
    assert set(open_checkpoint(tmp_path / "model.safetensors").tensors) == {"a"}


def test_names_from_files_cannot_move_the_terminals_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save_file({"w\x1b[2J": torch.full((2,), float(step))}, tmp_path / f"step-{step}.safetensors")
    nowcast([tmp_path / f"step-{step}.safetensors" for step in (1, 2)], tmp_path / "out")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert r"w\x1b[2J" in printed
