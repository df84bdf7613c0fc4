"""DeepSpeed checkpoints of every stage, saved by two ranks and read without DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidecast.checkpoints.opening import open_checkpoint
from sidecast.errors import ConfigError
from tests.support.limits import HANG_S
from tests.support.programs.program import run_ranks

CASES = (
    "stage0_fp32",
    "stage0_bf16",
    "stage1_fp32",
    "stage1_bf16_optimizer",
    "stage2_round_robin",
    "stage3_bf16",
)
WORKER = Path(__file__).parent.with_name("workers") / "save_zero_checkpoints.py"
FROZEN_AND_BUFFERS = {"frozen.weight", "frozen.bias", "scale", "count"}

PREDICT_WITHOUT_DEEPSPEED = """
import argparse, sys
sys.modules["deepspeed"] = None  # importing it now raises
from sidecast.commands import predict
parser = argparse.ArgumentParser()
predict.add_parser(parser.add_subparsers(required=True))
for arguments in sys.stdin.read().splitlines():
    assert predict.run(parser.parse_args(arguments.split("|"))) == 0
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<case>/global_step{1,2,3}`` and ``<case>/expected_{1,2,3}.safetensors``."""
    out = tmp_path_factory.mktemp("zero")
    # Read by DeepSpeed, but the ranks meet through a file.
    statuses, logs = run_ranks(WORKER, [out], 2, out, environment={"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    assert statuses == [0, 0], logs
    return out


@pytest.mark.parametrize("case", CASES)
def test_equals_deepspeeds_own_weights_bit_for_bit(saved: Path, case: str) -> None:
    for step in (1, 2, 3):
        checkpoint = open_checkpoint(saved / case / f"global_step{step}")
        expected = load_file(saved / case / f"expected_{step}.safetensors")
        names = {name: name for name in checkpoint.tensors} | dict(checkpoint.aliases)
        assert names.keys() == expected.keys()
        for alias, name in names.items():
            stored = checkpoint.tensors[name]
            tensor = stored.read()
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
            assert torch.equal(tensor.float(), expected[alias].float()), alias
        assert checkpoint.step == step
        assert checkpoint.aliases == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("case", CASES)
def test_tells_parameters_from_frozen_ones_and_buffers(saved: Path, case: str) -> None:
    tensors = open_checkpoint(saved / case / "global_step1").tensors
    untrained = {name for name, tensor in tensors.items() if not tensor.trainable}
    # In fp32, stage 0 stores nothing that tells a frozen parameter; predict sees that it does not change.
    assert untrained == ({"scale", "count"} if case == "stage0_fp32" else FROZEN_AND_BUFFERS)


@pytest.mark.parametrize("case", ["stage1_bf16_optimizer", "stage2_round_robin", "stage3_bf16"])
def test_reads_universal_checkpoints_that_hold_what_they_were_made_from(saved: Path, case: str, tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(saved / case / "global_step2"), "--output_folder", str(folder)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert result.returncode == 0, result.stderr
    if case == "stage2_round_robin":
        # DeepSpeed's converter exchanges two parameters of one group.
        with pytest.raises(ConfigError, match=r"the fp32 masters of parameter 'norm.bias' differ from its weights"):
            open_checkpoint(folder)
        return
    checkpoint = open_checkpoint(folder)
    expected = load_file(saved / case / "expected_2.safetensors")
    names = {name: name for name in checkpoint.tensors} | dict(checkpoint.aliases)
    assert names.keys() == expected.keys()
    for alias, name in names.items():
        assert torch.equal(checkpoint.tensors[name].read().float(), expected[alias].float()), alias
    untrained = {name for name, tensor in checkpoint.tensors.items() if not tensor.trainable}
    assert untrained == FROZEN_AND_BUFFERS
    assert (checkpoint.step, checkpoint.description) == (2, "DeepSpeed checkpoint, universal")


def test_the_save_folder_opens_at_its_latest_step(saved: Path) -> None:
    assert open_checkpoint(saved / "stage3_bf16").step == 3


def test_predicts_without_deepspeed(saved: Path, tmp_path: Path) -> None:
    commands = []
    for case in CASES:
        steps = [str(saved / case / f"global_step{step}") for step in (1, 2, 3)]
        commands.append(
            "|".join(["predict", *steps, "--horizon", "4", "--weight", "0.5", "--out", f"{tmp_path}/{case}"])
        )
    script = [sys.executable, "-c", PREDICT_WITHOUT_DEEPSPEED]
    result = subprocess.run(
        script, input="\n".join(commands), capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "ZeRO stage 3, 2 ranks, step 3" in result.stdout
    for case in CASES:
        first, _, last = (load_file(saved / case / f"expected_{step}.safetensors") for step in (1, 2, 3))
        predicted = load_file(tmp_path / case / "model.safetensors")
        assert predicted.keys() == last.keys()
        for name, tensor in predicted.items():
            if name in FROZEN_AND_BUFFERS:
                assert torch.equal(tensor, last[name].to(tensor.dtype)), name
                continue
            assert tensor.dtype == torch.float32
            # With three states the least-squares slope is half the difference of the outer two.
            assert not torch.equal(tensor, last[name]), name
            torch.testing.assert_close(tensor, last[name] + 0.5 * 4 * (last[name] - first[name]) / 2)


def test_refuses_a_checkpoint_that_lacks_a_ranks_file(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    for file in (saved / "stage2_round_robin" / "global_step1").iterdir():
        if "rank_1" not in file.name:
            (folder / file.name).symlink_to(file)
    with pytest.raises(ConfigError, match=r"has 1 \*_optim_states.pt files; its parameters are split over 2"):
        open_checkpoint(folder)
