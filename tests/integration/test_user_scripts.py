"""What users' DeepSpeed scripts do besides training by the book: judged all the same, and freed when they are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService
from tests.support.services.process import free_port

RUNS = Path(__file__).with_name("workers") / "script_runs.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scripts")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **alone, "MASTER_PORT": f"{free_port()}", "DS_ACCELERATOR": "cpu"}
    # Somebody's modules in the working directory are not what a courier imports.
    (folder / "queue.py").write_text("raise SystemExit('not mine')\n")
    with RunningService(folder / "service") as service:
        ended = subprocess.run(
            [sys.executable, str(RUNS), str(folder), service.endpoint],
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG_S,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert "courier died" not in ended.stdout
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_a_harmful_jump_is_undone_whatever_begins_the_backward_pass(seen: dict[str, Any]) -> None:
    run = seen["torch_style"]
    assert ["applied", 20] in run["events"]
    assert ["rolled_back", 30] in run["events"]
    # The last one's vote is not read any more.
    assert run["num_losses"] == run["num_steps"] - 1


def test_what_was_attached_and_dropped_leaves_nothing(seen: dict[str, Any]) -> None:
    first, *later = seen["ends"]
    assert first["is_gone"] == [True, True]
    assert later == [first] * len(later)
