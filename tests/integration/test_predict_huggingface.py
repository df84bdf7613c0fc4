"""``sidecast predict`` on directories that transformers saved: the result loads there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from sidecast.commands import predict


def save_steps(
    folder: Path, *, tied: bool, dtype: torch.dtype, max_shard_size: str = "1GB", num_steps: int = 3
) -> list[Path]:
    """Saves steps of a tiny model, with a file of its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    paths = []
    for step in range(100, 100 * num_steps + 1, 100):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        path = folder / f"checkpoint-{step}"
        model.save_pretrained(path, max_shard_size=max_shard_size)
        (path / "tokenizer_config.json").write_text('{"model_max_length": 99}')
        (path / "trainer_state.json").write_text("{}")
        paths.append(path)
    return paths


def run(paths: list[Path], out: Path, *options: str) -> None:
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers(required=True))
    arguments = ["predict", *map(str, paths), "--horizon", "3", "--weight", "0.5", "--out", str(out), *options]
    assert predict.run(parser.parse_args(arguments)) == 0


def expected(paths: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Newest + half of three least-squares slopes, under every name of the loaded model."""
    first, _, last = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    return {
        name: (last[name].float() + 0.5 * 3 * (last[name].float() - first[name].float()) / 2).to(dtype) for name in last
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "max_shard_size"), [(torch.float32, "1GB"), (torch.bfloat16, "1GB"), (torch.float32, "4KB")]
)
def test_the_result_loads_in_transformers(tmp_path: Path, tied: bool, dtype: torch.dtype, max_shard_size: str) -> None:
    paths = save_steps(tmp_path, tied=tied, dtype=dtype, max_shard_size=max_shard_size)
    assert (paths[0] / "model.safetensors").exists() == (max_shard_size == "1GB")
    run(paths, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert model.generation_config.max_new_tokens == 7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, tensor in expected(paths, dtype).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (paths[-1] / "config.json").read_bytes()


def test_another_dtype_is_what_transformers_loads(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, tied=True, dtype=torch.bfloat16)
    run(paths, tmp_path / "out", "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    for name, tensor in expected(paths, torch.float32).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


def test_a_stored_tied_head_stays_equal_to_its_embedding(tmp_path: Path) -> None:
    paths = save_steps(tmp_path, tied=True, dtype=torch.float32)
    for path in paths:
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    run(paths, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_nino_reads_the_models_configuration(tmp_path: Path, nino_data: Path) -> None:
    paths = save_steps(tmp_path, tied=True, dtype=torch.float32, num_steps=5)
    run(paths, tmp_path / "out", "--predictor", "nino_plain", "--weights", str(nino_data / "nino_no_posw.pt"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    newest = load_file(paths[-1] / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert all(not torch.equal(written[name], newest[name]) for name in newest)
