"""Checkpoints that FSDP2 saved on two ranks, read in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidecast.checkpoints.opening import open_checkpoint
from sidecast.commands.__main__ import main
from tests.support.limits import HANG_S

WORKER = Path(__file__).parent.with_name("workers") / "save_distributed_checkpoints.py"
STEPS = (10, 20, 30)
BUFFERS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``step-N`` and ``expected-N.safetensors``."""
    out = tmp_path_factory.mktemp("dcp")
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": f"{rank}", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        with (out / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, str(WORKER), str(out)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = [rank.wait(timeout=HANG_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert statuses == [0, 0], "\n".join((out / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    return out


def test_equals_the_gathered_weights_bit_for_bit(saved: Path) -> None:
    for step in STEPS:
        checkpoint = open_checkpoint(saved / f"step-{step}")
        expected = load_file(saved / f"expected-{step}.safetensors")
        assert checkpoint.tensors.keys() == expected.keys()
        assert {name for name, tensor in checkpoint.tensors.items() if not tensor.trainable} == BUFFERS
        for name, tensor in checkpoint.tensors.items():
            read = tensor.read()
            assert read.dtype == expected[name].dtype
            assert torch.equal(read, expected[name]), name


def test_a_nowcast_of_three_of_them(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(saved / f"step-{step}") for step in STEPS]
    assert main(["predict", *folders, "--predictor", "linear", "--horizon", "4", "--out", str(tmp_path / "out")]) == 0
    assert "PyTorch distributed checkpoint" in capsys.readouterr().out
    newest, predicted = load_file(saved / "expected-30.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert predicted.keys() == newest.keys()
    for name, values in predicted.items():
        expected = newest[name] if name in BUFFERS else newest[name].float() + 4 * 0.125
        # 16-bit weights are rounded once when they are stepped, and once more when they are written.
        torch.testing.assert_close(
            values.float(), expected.float(), rtol=2**-6 if values.itemsize == 2 else 1e-5, atol=0
        )
