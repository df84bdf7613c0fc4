"""What may be the history of a nowcast: known steps in order, each state once, whole and in full precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidecast.checkpoints.chain_order import in_chain_order
from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.series import check_series, with_shared_aliases
from sidecast.checkpoints.staging import manifest_of, stage_history
from sidecast.checkpoints.steps import Step
from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec


def folder(path: Path, value: float, tensors: Mapping[str, Tensor] | None = None, **files: Any) -> Path:
    """A model folder with further JSON files, named without their ending."""
    path.mkdir(parents=True)
    save_file(dict(tensors or {"w.weight": torch.full((2, 3), float(value))}), path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def checked(*paths: Path, steps: list[int] | None = None) -> list[Step | None]:
    return check_series(with_shared_aliases([open_checkpoint(path) for path in paths]), steps)


def numbers(tmp_path: Path, *names: str, file: str = "") -> list[int | None]:
    paths = [folder(tmp_path / str(index) / name, index) for index, name in enumerate(names)]
    return [None if step is None else step.number for step in checked(*(path / file for path in paths))]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (("checkpoint-100", "checkpoint-200"), [100, 200]),
        (("step-50k", "step-100k", "step-150K"), [50_000, 100_000, 150_000]),
        (("step-1.5k", "step-3k"), [1500, 3000]),
        (("step-1T", "step-2T", "step-3T"), [10**12, 2 * 10**12, 3 * 10**12]),
        (("step1000-tokens4B", "step2000-tokens8B"), [1000, 2000]),
        (("epoch=0-step=100.ckpt", "epoch=1-step=200.ckpt"), [100, 200]),
        (("epoch_1", "epoch_2"), [1, 2]),
        (("ep0-ba10", "ep0-ba20"), [10, 20]),
        (("iter_0000100", "iter_0000200"), [100, 200]),
        (("checkpoint-100-merged", "checkpoint-200-merged"), [100, 200]),
        (("100", "200", "final"), [100, 200, None]),
        (("100", "middle", "300"), [100, None, 300]),
        (("checkpoint-100", "checkpoint-200", "final-7"), [100, 200, None]),
        (("loss-2.31", "loss-2.17"), [None, None]),
        (("final-v1", "final-v3"), [None, None]),
        (("607a30d783dfa663caf39e06633721c8d4cfcd71", "abcdefabcdefabcdefabcdefabcdefabcdefabc3"), [None, None]),
        (("2024-05-31", "2024-06-01"), [None, None]),
        (("run_20240531-120000", "run_20240601-110000"), [None, None]),
    ],
)
def test_steps_are_known_by_names(tmp_path: Path, names: tuple[str, ...], steps: list[int | None]) -> None:
    assert numbers(tmp_path, *names) == steps
    assert numbers(tmp_path / "files", *names, file="model.safetensors") == steps


def test_steps_are_known_by_the_folder_above_or_the_target_of_a_link(tmp_path: Path) -> None:
    paths = [folder(tmp_path / f"checkpoint-{step}" / "hf", step) for step in (100, 200)]
    last = folder(tmp_path / "checkpoint-300", 300)
    (tmp_path / "latest").symlink_to(last)
    steps = checked(*paths, tmp_path / "latest")
    assert [step and step.number for step in steps] == [100, 200, 300]
    shared = [folder(tmp_path / "step-7" / name, value) for value, name in enumerate(("early", "late"))]
    assert checked(*shared) == [None, None]


def test_the_trainers_record_counts_more_than_digits(tmp_path: Path) -> None:
    paths = [
        folder(tmp_path / f"run-{7 - index}" / "best", step, trainer_state={"global_step": step})
        for index, step in enumerate((100, 200, 300))
    ]
    for given in (paths, [path / "model.safetensors" for path in paths]):
        assert [(step.number, step.source) for step in checked(*given) if step] == [
            (step, "trainer_state.json") for step in (100, 200, 300)
        ]
    with pytest.raises(ConfigError, match="steps are 100, 300, 200; give them oldest first"):
        checked(paths[0], paths[2], paths[1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("checkpoint-1000", "checkpoint-1500", "checkpoint-500"), "steps are 1000, 1500, 500; give them oldest first"),
        (("200", "100", "final"), "steps are 200, 100, unknown; give them oldest first"),
        (("final", "200", "100"), "steps are unknown, 200, 100; give them oldest first"),
        (("100", "middle", "200", "400"), "must be equally spaced"),
        (("100", "middle", "201"), "must be equally spaced"),
        (("step-50k", "step-100k", "step-200k"), "must be equally spaced"),
        (("epoch-1", "epoch-1"), "epochs are 1, 1; give them oldest first, each epoch once"),
    ],
)
def test_order_and_spacing_are_checked_however_steps_are_spelt(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*--steps"):
        numbers(tmp_path, *names)
    with pytest.raises(ConfigError, match=f"{message}.*--steps"):
        numbers(tmp_path / "files", *names, file="model.safetensors")


def test_records_that_contradict_each_other_are_refused_and_overruled_by_the_user(tmp_path: Path) -> None:
    one = folder(tmp_path / "checkpoint-100", 1.0, trainer_state={"global_step": 100})
    two = folder(tmp_path / "checkpoint-200", 2.0, trainer_state={"global_step": 700})
    message = r"step 700 by trainer_state.json, but of step 200 by the name 'checkpoint-200'.*--steps"
    with pytest.raises(ConfigError, match=message):
        checked(one, two)
    assert [step and step.number for step in checked(one, two, steps=[1, 2])] == [1, 2]
    with pytest.raises(ConfigError, match="--steps names 3 steps for 2 checkpoints"):
        checked(one, two, steps=[1, 2, 3])
    with pytest.raises(ConfigError, match="steps are 2, 2; give them oldest first"):
        checked(one, two, steps=[2, 2])


def test_a_checkpoint_counts_once_under_all_its_names(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "a", 1.0), folder(tmp_path / "b", 2.0)
    (tmp_path / "link").symlink_to(one)
    for again in (one, tmp_path / "link", tmp_path / "b" / ".." / "a"):
        with pytest.raises(ConfigError, match="are one checkpoint; give each once"):
            checked(one, two, again)
    copies = [open_checkpoint(path) for path in (one, two, folder(tmp_path / "c", 1.0))]
    check_series(copies)
    with pytest.raises(ConfigError, match=r"/a and .*/c hold the same weights"):
        stage_history(copies, manifest_of(copies[-1], None), tmp_path)


INTEGERS = torch.ones(4, 4, dtype=torch.int32)
BYTES = torch.ones(4, 4, dtype=torch.uint8)
NOT_NUMBERS: dict[str, dict[str, Tensor]] = {
    "fp8": {"q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    "fp8 with scales": {"q.weight": torch.ones(4, 4).to(torch.float8_e5m2), "q.weight_scale_inv": torch.ones(1, 1)},
    "GPTQ": {"q.qweight": INTEGERS, "q.qzeros": INTEGERS.clone(), "q.scales": torch.ones(4)},
    "bitsandbytes": {"q.weight": BYTES, "q.weight.absmax": torch.ones(4)},
    "int8": {"q.weight": torch.ones(4, 4, dtype=torch.int8), "q.SCB": torch.ones(4)},
    "MXFP4": {"experts.gate_up_proj_blocks": BYTES, "experts.gate_up_proj_scales": BYTES.clone()},
    "compressed": {"q.weight_packed": INTEGERS, "q.weight_scale": torch.ones(4)},
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    plain = {"norm.weight": torch.ones(3)}
    paths = [folder(tmp_path / str(step), step, {**plain, **NOT_NUMBERS[kind]}) for step in (1, 2)]
    message = r"tensor '.*' of .* is (float8|u?int).*; a nowcast needs 16-bit or wider weights: dequantise first"
    with pytest.raises(ConfigError, match=message):
        checked(*paths)
    with pytest.raises(ConfigError, match=message):
        manifest_of(open_checkpoint(paths[0]), None)


def test_a_configuration_of_quantised_weights_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    paths = [folder(tmp_path / str(step), step, config=config) for step in (1, 2)]
    with pytest.raises(ConfigError, match=r"config.json of .* has a quantization_config \('fp8'\); .* dequantise"):
        checked(*paths)


def test_integers_that_are_no_codes_are_left_alone(tmp_path: Path) -> None:
    others = {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "embeddings.position_ids": torch.arange(4).view(1, 4),
        "relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "mask": torch.ones(4, dtype=torch.bool),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    paths = [folder(tmp_path / str(step), step, {"w": torch.full((2,), step), **others}) for step in (1.0, 2.0)]
    checked(*paths)
    assert [spec.fqn for spec in manifest_of(open_checkpoint(paths[0]), None).parameters] == ["w"]


def test_empty_placeholders_are_refused_with_what_holds_the_weights(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(0), "b.weight": torch.zeros(0), "norm.weight": torch.ones(3)}
    paths = [folder(tmp_path / f"checkpoint-{step}", step, tensors) for step in (1, 2)]
    with pytest.raises(ConfigError, match=r"2 of 3 tensors of .* are empty placeholders.*gather_16bit_weights"):
        checked(*paths)
    for step in (9, 10):
        (paths[0] / f"global_step{step}").mkdir()
        (paths[0] / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(ConfigError, match=r"give .*checkpoint-1/global_step10, which holds them"):
        checked(*paths)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"w.weight": torch.ones(2, 3, dtype=torch.int64)},
            r"tensor 'w.weight' is float32 in .* but int64 in .*; all need floating elements",
        ),
        ({"w.weight": torch.ones(2, 3), "more": torch.ones(1)}, "tensor 'more' is in .* but not in"),
    ],
)
def test_other_tensors_are_another_model(tmp_path: Path, other: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(folder(tmp_path / "a", 1.0, other), folder(tmp_path / "b", 2.0))


def test_settings_that_shapes_do_not_show_are_compared(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", 1.0, config={"model_type": "llama", "num_attention_heads": 4, "use_cache": True})
    two = folder(tmp_path / "b", 2.0, config={"model_type": "llama", "num_attention_heads": 4, "use_cache": False})
    checked(one, two)
    three = folder(tmp_path / "c", 3.0, config={"model_type": "llama", "num_attention_heads": 8})
    with pytest.raises(
        ConfigError, match=r"config.json says num_attention_heads=8 for .*/c but 4 for .*/a; .* one model"
    ):
        checked(one, three)


def test_a_head_that_equals_its_table_in_one_checkpoint_only_is_a_tensor_in_all(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}

    def saved(name: str, table: float, head: float) -> Path:
        tensors = {"embed_tokens.weight": torch.full((2, 3), table), "lm_head.weight": torch.full((2, 3), head)}
        return folder(tmp_path / name, 0.0, tensors, config=config)

    one, two, three = saved("a", 1.0, 1.0), saved("b", 2.0, 3.0), saved("c", 4.0, 4.0)
    assert open_checkpoint(one).aliases == {"lm_head.weight": "embed_tokens.weight"}
    opened = with_shared_aliases([open_checkpoint(path) for path in (one, two, three)])
    check_series(opened)
    assert all("lm_head.weight" in checkpoint.tensors and not checkpoint.aliases for checkpoint in opened)
    only_tied = with_shared_aliases([open_checkpoint(path) for path in (one, three)])
    assert all(checkpoint.aliases for checkpoint in only_tied)


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [({"model_type": "gpt2"}, True), ({"model_type": "llama"}, False), ({"tie_word_embeddings": False}, False)],
)
def test_what_a_silent_configuration_ties(tmp_path: Path, config: dict[str, Any], is_tied: bool) -> None:
    tensors = {"wte.weight": torch.ones(2, 3), "lm_head.weight": torch.ones(2, 3)}
    path = folder(tmp_path / "a", 0.0, tensors, config=config)
    for given in (path, path / "model.safetensors"):
        assert bool(open_checkpoint(given).aliases) is is_tied


def shapes(*names: str) -> list[ParameterSpec]:
    return [ParameterSpec(name, (2,) if name.endswith("bias") or "norm" in name else (2, 2)) for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["0.weight", "0.bias", "2.weight", "2.bias", "10.weight", "10.bias"],
        ["net.0.weight", "net.1.weight", "net.1.bias", "net.11.weight"],
        ["fc1.weight", "fc1.bias", "fc2.weight", "fc10.weight"],
        ["0.0.weight", "0.1.weight", "0.10.weight", "1.0.weight"],
        ["weight", "bias"],
    ],
)
def test_a_chain_is_in_the_order_of_its_numbers(names: list[str]) -> None:
    assert [spec.fqn for spec in in_chain_order(shapes(*sorted(names)))] == names


@pytest.mark.parametrize(
    "names",
    [["features.0.weight", "classifier.0.weight"], ["conv.weight", "fc.weight"], ["0.a.weight", "0.weight"]],
)
def test_a_chain_whose_order_names_do_not_tell_is_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="in the chain is not told by their names; number its modules"):
        in_chain_order(shapes(*names))


def test_the_manifest_of_a_chain_follows_its_layers(tmp_path: Path) -> None:
    names = [f"{layer}.{kind}" for layer in range(12) for kind in ("weight", "bias")]
    tensors = {spec.fqn: torch.ones(spec.shape) for spec in shapes(*names)}
    path = folder(tmp_path / "a", 0.0, tensors, config={"model_type": "sequential"})
    assert [spec.fqn for spec in manifest_of(open_checkpoint(path), None).parameters] == names
    assert sorted(
        spec.fqn for spec in manifest_of(open_checkpoint(path), {"model_type": "llama"}).parameters
    ) == sorted(names)
