"""The examples, run as a user would run them, beside a service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.limits import HANG_S
from tests.support.programs.forking import QUIET
from tests.support.programs.program import run_ranks
from tests.support.programs.scripts import alone, run_script
from tests.support.services.harness import RunningService
from tests.support.services.process import free_port

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def launch(launcher: Sequence[str], name: str, *arguments: str) -> str:
    """Runs an example as users do, by a launcher; returns what it prints."""
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, str(EXAMPLES / name), *arguments],
        env={**os.environ, **QUIET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout


def run(name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs an example alone; returns what it prints."""
    return run_script(EXAMPLES / name, *arguments, environment=environment)


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
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert num_applied(launch(torchrun, "fsdp2_script.py", *arguments, "--save-to", checkpoint)) >= 1
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    arguments += ["--resume-from", checkpoint]
    statuses, resumed = run_ranks(EXAMPLES / "fsdp2_script.py", arguments, 2, tmp_path, environment=environment)
    assert statuses == [0, 0], resumed
    assert num_applied(resumed) >= 1
    assert "begins anew" not in resumed


def test_deepspeed(service: RunningService) -> None:
    deepspeed = ["deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", f"{free_port()}"]
    assert num_applied(launch(deepspeed, "deepspeed_script.py", *beside(service))) >= 1


def test_huggingface_with_deepspeed(service: RunningService, tmp_path: Path) -> None:
    arguments = [*beside(service), "--deepspeed", "--output-dir", str(tmp_path)]
    assert num_applied(run("huggingface_trainer.py", *arguments, environment=alone())) >= 1
