"""The whole loop as users run it: ``sidecast serve``, the deepspeed launcher, two ranks, and what must always hold."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.workers.outage_worker import PERIOD_STEPS
from tests.integration.workers.push_runs import INTERVAL_STEPS, NUM_STEPS, START_STEP
from tests.integration.workers.snapshot_cases import CASES, SNAPSHOT_STEP
from tests.support.limits import HANG_S
from tests.support.services.process import ServiceProcess, launch

WORKERS = Path(__file__).resolve().with_name("workers")
LOOK_S = 0.05


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path_factory.mktemp("service"))
    process.start()
    yield process
    assert process.stop() == 0


@dataclass(frozen=True)
class Attached:
    """What ranks with a service that stays have left.

    Attributes:
        folder: With their results.
        vectors: All that the service then holds of their sessions.
    """

    folder: Path
    vectors: list[bytes]


@pytest.fixture(scope="module")
def attached(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Attached:
    folder = tmp_path_factory.mktemp("attached")
    worker = launch(WORKERS / "attached_worker.py", service.address, str(folder), log=folder / "worker.log")
    assert worker.wait(HANG_S) == 0, (folder / "worker.log").read_text()[-4000:]
    return Attached(folder, [path.read_bytes() for path in service.history.rglob("*.f32")])


@pytest.mark.parametrize("case", CASES)
def test_assembled_snapshot_equals_deepspeeds_own_state(case: str, attached: Attached) -> None:
    result = json.loads((attached.folder / f"{case}.json").read_text())
    reference = torch.load(attached.folder / f"{case}.pt", weights_only=True)
    assert SNAPSHOT_STEP in result["committed"]
    expected = np.concatenate([reference[name].float().reshape(-1).numpy() for name in result["parameters"]])
    # The service's files have no telling names; every case has a seed of its own, so that no two states are equal.
    assert attached.vectors.count(expected.tobytes()) == 1


def test_history_schedule_and_probation_survive_a_resume(attached: Attached) -> None:
    result = json.loads((attached.folder / "resume.json").read_text())

    def decisions(name: str) -> list[tuple[Any, ...]]:
        kinds = ("applied", "accepted", "rolled_back")
        keys = ("kind", "step", "version", "digest", "horizon_intervals", "weight")
        return [tuple(event.get(key) for key in keys) for event in result["events"][name] if event["kind"] in kinds]

    straight = decisions("straight")
    # A jump, its judgement after the restart, and a second jump whose window began before the restart.
    assert [item[0] for item in straight[:3]] in (["applied", "accepted", "applied"], ["applied", "rolled_back"])
    assert decisions("restarted") == straight
    assert result["losses"]["restarted"] == result["losses"]["straight"]


@pytest.fixture(scope="module")
def outage(service: ServiceProcess, attached: Attached, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose service is killed after its first jump and started again, and the replay of that run."""
    # Nothing is left of others' sessions when it comes back, so they are first.
    assert attached.vectors
    folder = tmp_path_factory.mktemp("outage")
    port = service.port
    worker = launch(WORKERS / "outage_worker.py", service.address, str(folder), log=folder / "worker.log")
    wait_for(folder, worker, "applied")
    service.kill()
    wait_for(folder, worker, "disconnected")
    service.start(port)
    (folder / "restarted").touch()
    assert worker.wait(HANG_S) == 0, (folder / "worker.log").read_text()[-4000:]
    return folder


def wait_for(folder: Path, worker: subprocess.Popen[bytes], kind: str) -> None:
    """Blocks until the worker has told of an event of this kind."""
    path = folder / "live-events0.jsonl"
    while not any(event["kind"] == kind for event in events(path)):
        # Looking without a pause would take one of the cores that the ranks train on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {worker.wait(LOOK_S)}: {(folder / 'worker.log').read_text()[-4000:]}")


def events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_killed_service_costs_nothing_and_the_replay_is_bit_identical(outage: Path) -> None:
    live = json.loads((outage / "live-losses.json").read_text())
    replay = json.loads((outage / "replay-losses.json").read_text())
    assert any(event["kind"] == "dropped" for event in events(outage / "live-events0.jsonl"))
    assert live == replay
    jumps = [
        [(event["step"], event["version"], event["digest"]) for event in events(path) if event["kind"] == "applied"]
        for path in (outage / "live-events0.jsonl", outage / "live-events1.jsonl", outage / "replay-events0.jsonl")
    ]
    assert jumps[0] == jumps[1] == jumps[2] != []


def test_restarted_service_nowcasts_within_one_window(outage: Path) -> None:
    connected_steps, jumps = [], []
    for rank in range(2):
        seen = events(outage / f"live-events{rank}.jsonl")
        lost = next(index for index, event in enumerate(seen) if event["kind"] == "disconnected")
        connected_steps.append(next(event["step"] for event in seen[lost:] if event["kind"] == "connected"))
        jumps = [event for event in seen if event["kind"] == "applied" and event["step"] > max(connected_steps)]
    # The window under way when the last rank is back is lost; the next one is whole.
    assert jumps[0]["base_step"] <= (max(connected_steps) // PERIOD_STEPS + 2) * PERIOD_STEPS


@pytest.mark.parametrize("rank", [0, 1])
def test_a_services_pushes_are_the_evaluations_bit_for_bit(attached: Attached, rank: int) -> None:
    """What ``sidecast evaluate`` measures is what a job does: same losses, same weights."""
    pushed, evaluated, plain = (
        json.loads((attached.folder / f"{name}-{rank}.json").read_text()) for name in ("pushed", "evaluated", "plain")
    )
    applied = [event for event in pushed["told"] if event["kind"] == "applied"]
    assert [event["step"] for event in applied] == list(range(START_STEP, NUM_STEPS, INTERVAL_STEPS))
    assert {event["weight"] for event in applied} == {1.0}
    assert pushed["losses"] == evaluated["losses"] != plain["losses"]
    weights = [torch.load(attached.folder / f"{name}-{rank}.pt") for name in ("pushed", "evaluated")]
    assert torch.equal(*weights)


@pytest.mark.parametrize("rank", [0, 1])
def test_pushes_with_a_gain_of_0_change_nothing(attached: Attached, rank: int) -> None:
    zero, plain = (json.loads((attached.folder / f"{name}-{rank}.json").read_text()) for name in ("gain-0", "plain"))
    assert zero["losses"] == plain["losses"]
    weights = [torch.load(attached.folder / f"{name}-{rank}.pt") for name in ("gain-0", "plain")]
    assert torch.equal(*weights)
