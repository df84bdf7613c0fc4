"""What is no checkpoint is named, with the way out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sidecast.checkpoints.inert_pickle import load_inert
from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.staging import manifest_of
from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology
from sidecast.manifest import ModelManifest
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.weights import load_tensors
from tests.support.symmetric_models import SMALL_MODELS


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["__0_0.distcp"], r"holds __0_0.distcp but no .metadata, .* the save was not finished"),
        (["sharded/.metadata"], r"holds sharded, a distributed checkpoint; give that folder$"),
        (["pytorch_model_fsdp.bin"], r"pickled weights \(pytorch_model_fsdp.bin\); load it and save it with"),
        (["adapter_model.bin"], r"pickled weights \(adapter_model.bin\)"),
        (["consolidated.00.pth"], r"pickled weights \(consolidated.00.pth\)"),
        (["model_index.json", "unet/x"], r"pipeline of diffusers; give a part's file, such as unet/"),
        (["model.fp16.safetensors"], r"holds model.fp16.safetensors but no model.safetensors; give that file itself"),
        (["checkpoint-90/x", "checkpoint-100/x"], r"holds 2 checkpoints .* up to the newest, checkpoint-100$"),
        (["refs/main", "snapshots/abc/x"], r"Hugging Face cache of a model; give the folders below snapshots/"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], r"but no \*_model_states.pt"),
        (["model.gguf"], r"holds model.gguf, which is quantised"),
        (["checkpoints.txt"], r"holds neither model.safetensors"),
    ],
)
def test_folders_of_other_formats(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / "d" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / file).touch()
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "GGUF is quantised"),
        ("weights.pt", "pickles can run code: load it and save it with"),
        ("__0_0.distcp", "one rank's part of a distributed checkpoint; give the folder, "),
    ],
)
def test_files_of_other_formats(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path / name)


def test_links_that_lead_nowhere_are_followed_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="gone is a link to nowhere, which does not exist"):
        open_checkpoint(tmp_path / "gone")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "model.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(ConfigError, match=r"a link model.safetensors to ../blobs/abc, which does not exist"):
        open_checkpoint(tmp_path / "d")


def deepspeed(path: Path, **optimizer_state: Any) -> Path:
    """Two ranks of ZeRO stage 2."""
    path.mkdir()
    module = {"w": torch.arange(6.0).view(2, 3)}
    state = {"module": module, "param_shapes": [{"w": torch.Size([2, 3])}], "global_steps": 5, "buffer_names": []}
    torch.save(state, path / "mp_rank_00_model_states.pt")
    for rank, part in enumerate((torch.arange(4.0), torch.tensor([4.0, 5.0, 0.0, 0.0]))):
        optimizer = {"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [part]}
        saved = {"optimizer_state_dict": {**optimizer, **optimizer_state}}
        torch.save(saved, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def changed_model(path: Path, **fields: Any) -> Path:
    file = path / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file), **fields}, file)
    return path


def test_masters_are_read_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(deepspeed(tmp_path / "global_step5"))
    assert torch.equal(checkpoint.tensors["w"].read(), torch.arange(6.0).view(2, 3))


def test_deepspeed_files_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = changed_model(deepspeed(tmp_path / "a"), param_shapes=None)
    with pytest.raises(ConfigError, match=r"has no 'param_shapes', without which the fp32 masters .* have no names"):
        open_checkpoint(folder)
    folder = changed_model(deepspeed(tmp_path / "b"), param_shapes=[{"w": torch.Size([3, 2])}])
    with pytest.raises(ConfigError, match=r"'w' has shape \(3, 2\) in 'param_shapes', but \(2, 3\) in the module"):
        open_checkpoint(folder)
    folder = changed_model(deepspeed(tmp_path / "c"), module={"w": torch.full((2, 3), 7.0)})
    with pytest.raises(ConfigError, match=r"masters of parameter 'w' differ from its weights in the module by \d+%"):
        open_checkpoint(folder)
    folder = changed_model(deepspeed(tmp_path / "d"), param_shapes=[{"w": torch.Size([1, 3])}])
    with pytest.raises(ConfigError, match="hold 8 elements, of which the 1 parameters of 'param_shapes' take 3"):
        open_checkpoint(folder)
    folder = changed_model(deepspeed(tmp_path / "e"), shared_params={"head": "gone"})
    with pytest.raises(ConfigError, match="ties 'head' to 'gone', which it does not hold"):
        open_checkpoint(folder)


def test_ranks_that_are_missing_or_there_twice(tmp_path: Path) -> None:
    folder = deepspeed(tmp_path / "a")
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.rename(folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(ConfigError, match=r"optim_states.pt file of rank 1, but zero_pp_rank_2"):
        open_checkpoint(folder)
    (folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt").rename(
        folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(ConfigError, match=r"holds two files of rank 0, bf16_zero.*; remove the one that is left over"):
        open_checkpoint(folder)


def test_sixteen_bit_weights_without_masters_are_called_so(tmp_path: Path) -> None:
    tmp_path.joinpath("s").mkdir()
    torch.save({"module": {"w": torch.ones(2).bfloat16()}}, tmp_path / "s" / "mp_rank_00_model_states.pt")
    assert "16-bit weights without fp32 masters" in open_checkpoint(tmp_path / "s").description


class Call:
    def __reduce__(self) -> Any:
        return (os.getcwd, ())


def test_no_refusal_advises_to_run_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": Call()}, tmp_path / "w.pt")
    for read in (load_tensors, load_inert):
        with pytest.raises(ConfigError) as refusal:
            read(tmp_path / "w.pt")
        assert "weights_only" not in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "option", "value", "needed"),
    [
        ("average", "decay", "x", "'x'; a number is needed"),
        ("average", "decay", None, "None; a number is needed"),
        ("average", "decay", [1], "a list; a number is needed"),
        ("average", "decay", True, "True; a number is needed"),
        ("outer_nesterov", "momentum", "x", "'x'; a number is needed"),
        ("outer_nesterov", "momentum", 10**400, "an integer of 1329 bits; a number is needed"),
        ("nino", "num_threads", "x", "'x'; an integer or null is needed"),
        ("nino", "precision", [], r"\[\]; a string is needed"),
        ("nino", "layout", [], r"\[\]; a string or null is needed"),
        ("nino_plain", "trimmed", 1, "1; true or false is needed"),
        ("wnn", "upd_scale", {"*": "x"}, "a dict; a number or an object of numbers is needed"),
    ],
)
def test_options_of_other_types(name: str, option: str, value: object, needed: str) -> None:
    weights = Path("w.pt") if name in ("nino", "nino_plain", "wnn") else None
    with pytest.raises(ConfigError, match=f"option '{option}' of predictor '{name}' is {needed}"):
        create_predictor(name, weights=weights, options={option: value})


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_arguments_that_no_file_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save_file({"w": torch.full((2,), float(step))}, tmp_path / f"step-{step}.safetensors")
    given = ["predict", tmp_path / "step-1.safetensors", tmp_path / "step-2.safetensors"]
    (tmp_path / "loop").symlink_to("loop")
    assert "leads nowhere" in refusal_of(capsys, "predict", tmp_path / "loop", "--out", tmp_path / "o")
    assert "leads nowhere" in refusal_of(capsys, *given, "--out", tmp_path / "loop")
    long = tmp_path / ("a" * 5000)
    assert "File name too long" in refusal_of(capsys, "predict", long, long, "--out", tmp_path / "o")
    assert "File name too long" in refusal_of(capsys, *given, "--out", long)
    assert "File name too long" in refusal_of(capsys, *given, "--out", tmp_path / "o", "--scratch", long)
    assert "File name too long" in refusal_of(capsys, "graph", long, "--out", tmp_path / "o.html")
    out = ("--out", tmp_path / "o")
    assert "--horizon is an integer of 1329 bits; it must be at least 1" in refusal_of(
        capsys, *given, *out, "--horizon", 10**400
    )
    assert "--steps is '1,x'; it must be integers" in refusal_of(capsys, *given, *out, "--steps", "1,x")
    assert "a\\nb does not exist" in refusal_of(capsys, "predict", tmp_path / "a\nb", *out)


def test_bert_as_it_was_published_has_the_graph_that_it_has_today() -> None:
    manifest = SMALL_MODELS["bert_mlm"]().manifest

    def published(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    shapes = [(published(spec.fqn), spec.shape) for spec in manifest.parameters]
    topology = build_topology(ModelManifest.from_shapes(shapes, manifest.config), None)
    plain = build_topology(manifest, None)
    assert "bert.embeddings.LayerNorm.gamma" in {spec.fqn for spec in topology.parameters}
    assert not topology.absent
    assert [(b.source, b.target, b.view and published(b.view.fqn)) for b in plain.blocks] == [
        (b.source, b.target, b.view and b.view.fqn) for b in topology.blocks
    ]


def test_gpt2_as_it_was_published_has_a_graph(tmp_path: Path) -> None:
    model = SMALL_MODELS["gpt2"]()
    manifest = model.manifest
    tensors = {spec.fqn: torch.randn(spec.shape) for spec in manifest.parameters}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {key: value for key, value in manifest.config.items() if key != "tie_word_embeddings"}
    found = manifest_of(open_checkpoint(tmp_path, config), None)
    assert {spec.fqn for spec in found.parameters} == {spec.fqn for spec in manifest.parameters}
    assert found.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert not build_topology(found, "symmetric").absent
