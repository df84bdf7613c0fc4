"""The job as users start it: through DeepSpeed's launcher, on two ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidecast.trainer.job.run_log import METRICS_NAME, read_records
from tests.support.programs.program import run_ranks
from tests.support.services.process import free_port

NUM_STEPS, SAVED_STEP = 6, 3
SETTINGS = [
    "training.log_interval_steps=1",
    "training.validation_interval_steps=3",
    "training.model.hidden_size=16",
    "training.model.intermediate_size=32",
    "training.model.num_hidden_layers=2",
    "training.data.sequence_length=16",
    "training.data.validation_sequences=8",
    "gradient_accumulation_steps=2",
    'training.schedule={"kind": "cosine", "warmup_steps": 2}',
]


def options(run_dir: Path, corpus: Path, *more: str) -> list[str]:
    """Of one run of the job."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    sizes = ["--steps", str(NUM_STEPS), "--micro-batch-size", "2"]
    return ["--run-dir", str(run_dir), "--corpus", str(corpus), *sizes, *settings, *more]


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the job as users do."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", f"{free_port()}"]
    command += ["--module", "sidecast.trainer.main", *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def resume(arguments: list[str], folder: Path) -> tuple[list[int], str]:
    """Runs the job on two ranks of an environment as the launcher's; exit statuses and logs."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    return run_ranks("sidecast.trainer.main", arguments, 2, folder, environment=meeting)


def numbers(run_dir: Path, after_step: int) -> list[tuple[Any, ...]]:
    """What must not depend on when the run was interrupted: everything but times."""
    return [
        (record["kind"], record["step"], record["loss"], record.get("lr"), record.get("grad_norm"))
        for record in read_records(run_dir / METRICS_NAME)
        if record["kind"] in ("train", "validation") and record["step"] > after_step
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(Path(subprocess.__file__).read_bytes())
    return path


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    done = launch(options(run_dir, corpus, "--checkpoint-interval-steps", str(SAVED_STEP)))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_logs_every_step_and_validates(whole_run: Path) -> None:
    records = list(read_records(whole_run / METRICS_NAME))
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in records if record["kind"] == "validation"] == [3, 6]
    assert records[0]["kind"] == "run"
    assert records[0]["num_ranks"] == 2
    assert records[-1]["kind"] == "summary"
    assert records[-2]["perplexity"] < 256


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole_run: Path, corpus: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(whole_run / "checkpoints", checkpoints)
    (checkpoints / "latest").write_text(f"step_{SAVED_STEP:08d}")
    statuses, logs = resume(options(tmp_path / "run", corpus, "--resume", str(checkpoints)), tmp_path)
    assert statuses == [0, 0], logs
    assert numbers(tmp_path / "run", 0) == numbers(whole_run, SAVED_STEP)


def test_another_seed_cannot_resume(whole_run: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = options(tmp_path / "run", corpus, "--resume", str(whole_run / "checkpoints"), "--seed", "1")
    statuses, logs = resume(arguments, tmp_path)
    assert statuses == [2, 2]
    refusals = [line for line in logs.splitlines() if line.startswith("sidecast: error:")]
    assert len(refusals) == 1
    assert "seed is 1, but it was 0" in refusals[0]
