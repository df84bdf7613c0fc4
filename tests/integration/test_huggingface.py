"""The Hugging Face callback: harmless while nothing is applied, and resumed bit for bit, with DeepSpeed and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from tests.integration.workers.huggingface_runs import PERIOD_STEPS, SAVE_STEP, section, straight_and_resumed, train
from tests.support.service_harness import RunningService
from tests.support.service_process import free_port

RUNS = Path(__file__).with_name("workers") / "huggingface_runs.py"
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def steps_of(result: dict[str, Any], kind: str) -> list[int]:
    return [step for event, step in result["events"] if event == kind]


def assert_resumed(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert steps_of(straight, "applied") == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    assert steps_of(resumed, "applied") == [2 * PERIOD_STEPS]
    for kind in ("accepted", "rolled_back"):
        assert steps_of(resumed, kind) == [step for step in steps_of(straight, kind) if step > SAVE_STEP]
    assert steps_of(straight, "accepted") + steps_of(straight, "rolled_back") != []
    assert resumed["losses"] == straight["losses"]
    assert resumed["weights"] == straight["weights"]


def test_nothing_applied_changes_nothing(service: RunningService, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", None)
    # The service has no prediction for it: snapshots go out, and refusals come back.
    service.engines.answer = NowcastAnswer(refusal="not today")
    try:
        nowcasted = train(tmp_path / "nowcasted", section(service.endpoint))
    finally:
        service.engines.answer = None
    assert len(steps_of(nowcasted, "staged")) == 11
    assert steps_of(nowcasted, "failed") == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    assert nowcasted["losses"] == plain["losses"]
    assert nowcasted["weights"] == plain["weights"]


def test_a_resumed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    assert_resumed(*straight_and_resumed(tmp_path, service.endpoint, None))


def test_a_resumed_deepspeed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **alone, "MASTER_PORT": f"{free_port()}", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        [sys.executable, str(RUNS), str(tmp_path), service.endpoint],
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert_resumed(*json.loads((tmp_path / "results.json").read_text()))
