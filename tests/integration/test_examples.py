"""The examples, run as a user would run them, beside a service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService
from tests.support.services.process import free_port

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def run(name: str, *arguments: str, launcher: bool = False, num_ranks: int = 0) -> str:
    """Runs an example in an environment without a GPU, alone or under a launcher; returns what it prints."""
    command = [sys.executable]
    if launcher:
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", f"{free_port()}"]
    if num_ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    ended = subprocess.run(
        [*command, str(EXAMPLES / name), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout


def num_applied(output: str) -> int:
    """What the example said of its nowcasts."""
    found = re.findall(r"(\d+) nowcasts applied", output)
    assert found, output
    return sum(map(int, found))


def test_optimizer() -> None:
    output = run("nowcast_optimizer.py", "--predictors", "linear", "--max-steps", "300", "--period-steps", "50")
    assert num_applied(output) >= 1
    assert "plain: loss" in output
    # From the snapshots of 200, 220, ... 300.
    assert "6 pushes applied" in output


def beside(service: RunningService) -> list[str]:
    """Arguments of a short run."""
    return ["--endpoint", service.endpoint, "--max-steps", "100"]


def test_lightning(service: RunningService) -> None:
    pytest.importorskip("lightning")
    assert num_applied(run("lightning_module.py", *beside(service))) >= 1


def test_huggingface(service: RunningService, tmp_path: Path) -> None:
    assert num_applied(run("huggingface_trainer.py", *beside(service), "--output-dir", str(tmp_path))) >= 1


def test_fsdp2(service: RunningService, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    arguments = beside(service)
    assert num_applied(run("fsdp2_script.py", *arguments, "--save-to", checkpoint, num_ranks=2)) >= 1
    resumed = run("fsdp2_script.py", *arguments, "--resume-from", checkpoint, num_ranks=2)
    assert num_applied(resumed) >= 1
    assert "begins anew" not in resumed


def test_deepspeed(service: RunningService) -> None:
    assert num_applied(run("deepspeed_script.py", *beside(service), launcher=True)) >= 1


def test_huggingface_with_deepspeed(service: RunningService, tmp_path: Path) -> None:
    arguments = [*beside(service), "--deepspeed", "--output-dir", str(tmp_path)]
    assert num_applied(run("huggingface_trainer.py", *arguments, launcher=True)) >= 1
