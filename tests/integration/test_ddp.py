"""The callbacks under DDP: all replicas jump at the same step to the same weights, and resume there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.workers.huggingface_runs import NUM_STEPS, PERIOD_STEPS, SAVE_STEP
from tests.support.programs.program import run_ranks
from tests.support.services.harness import RunningService
from tests.support.services.process import free_port

RUNS = Path(__file__).with_name("workers") / "ddp_runs.py"
NUM_RANKS = 2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def run(kind: str, folder: Path, endpoint: str) -> list[dict[str, Any]]:
    """Trains on all ranks; what each of them saw."""
    # As torchrun sets it.
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "LOCAL_WORLD_SIZE": f"{NUM_RANKS}"}
    environment |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "forked"}
    statuses, logs = run_ranks(RUNS, [kind, folder, endpoint], NUM_RANKS, folder, environment=environment)
    assert statuses == [0] * NUM_RANKS, logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def decisions(seen: dict[str, Any]) -> list[list[Any]]:
    return [event for event in seen["events"] if event[0] in ("applied", "accepted", "rolled_back")]


@pytest.mark.parametrize("kind", ["huggingface", "lightning"])
def test_replicas_jump_together_and_resume_bit_for_bit(kind: str, service: RunningService, tmp_path: Path) -> None:
    first, other = run(kind, tmp_path, service.endpoint)
    for name in ("plain", "straight", "resumed"):
        assert first[name]["weights"] == other[name]["weights"]
        assert decisions(first[name]) == decisions(other[name])
    straight, resumed = first["straight"], first["resumed"]
    assert [step for event, step in straight["events"] if event == "applied"] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    assert straight["weights"] != first["plain"]["weights"]
    if kind == "huggingface":
        # The Trainer logs every step, and the whole at the end, on the first rank alone.
        jumps = [step for event, step in straight["events"] if event == "applied"]
        logged = [*range(1, NUM_STEPS + 1), NUM_STEPS]
        assert straight["shown"] == [sum(step <= at for step in jumps) for at in logged]
        assert other["straight"]["shown"] == []
    assert decisions(resumed) == [event for event in decisions(straight) if event[1] > SAVE_STEP]
    assert resumed["weights"] == straight["weights"]
