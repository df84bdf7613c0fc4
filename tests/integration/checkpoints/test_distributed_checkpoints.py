"""Checkpoints that FSDP2 saved on two ranks, read in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidecast.checkpoints.opening import open_checkpoint
from sidecast.commands.__main__ import main
from tests.support.programs.program import run_ranks

WORKER = Path(__file__).parent.with_name("workers") / "save_distributed_checkpoints.py"
STEPS = (10, 20, 30)
BUFFERS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``step-N`` and ``expected-N.safetensors``."""
    out = tmp_path_factory.mktemp("dcp")
    statuses, logs = run_ranks(WORKER, [out], 2, out)
    assert statuses == [0, 0], logs
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
