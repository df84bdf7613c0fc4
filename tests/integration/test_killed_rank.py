"""A rank that dies while it votes takes its job along, and nothing else: the job is resumed, and nowcasted again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecast.protos import nowcast_pb2 as pb
from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService
from tests.support.services.process import launch

WORKER = Path(__file__).with_name("workers") / "killed_rank_worker.py"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def train(service: RunningService, folder: Path, mode: str) -> tuple[int, str]:
    """Runs a job with DeepSpeed's launcher; returns its status, and the end of its log."""
    log = folder / f"{mode}.log"
    job = launch(WORKER, service.endpoint, str(folder), mode, log=log)
    try:
        return job.wait(HANG_S), log.read_text()[-4000:]
    finally:
        job.kill()
        job.wait()


def courier_has_ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        courier = psutil.Process(pid)
        if "sidecast.trainer.courier" not in courier.cmdline():
            return True
        with contextlib.suppress(psutil.TimeoutExpired):
            courier.wait(HANG_S)
            return True
        return False
    return True


def session_of(service: RunningService, run_id: str) -> pb.SessionStatus:
    sessions = service.stub.Status(pb.StatusRequest()).sessions
    # A job that resumes has begun a run of its own before it loads a checkpoint.
    (session,) = [session for session in sessions if session.run_id == run_id]
    return session


@pytest.fixture(scope="module")
def killed(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of which rank 1 died during its vote on a prediction that it held."""
    folder = tmp_path_factory.mktemp("killed")
    status, log = train(service, folder, "killed")
    assert (folder / "killed.json").exists(), log
    assert status != 0
    return folder


@pytest.fixture(scope="module")
def left(service: RunningService, killed: Path) -> pb.SessionStatus:
    """What the service then knew of the run."""
    (session,) = service.stub.Status(pb.StatusRequest()).sessions
    return session


def test_the_couriers_of_all_ranks_end_with_the_job(killed: Path) -> None:
    for rank in range(2):
        assert courier_has_ended(int((killed / f"killed-courier{rank}").read_text()))
        # Neither the dead rank nor the one that waited for its vote came to an end of their own.
        assert not (killed / f"killed{rank}.json").exists()


def test_the_session_stays_as_it_was(left: pb.SessionStatus, killed: Path) -> None:
    vote: dict[str, Any] = json.loads((killed / "killed.json").read_text())
    assert left.num_joined == 2
    # What was voted on, and the jump before it.
    assert (left.num_published, left.num_applied) == (2, 1)
    assert left.epoch == vote["epoch"]
    assert list(left.history_steps) != []


def test_the_job_resumes_from_its_checkpoint_and_is_nowcasted(
    service: RunningService, left: pb.SessionStatus, killed: Path
) -> None:
    status, log = train(service, killed, "resumed")
    assert status == 0, log
    first, second = [json.loads((killed / f"resumed{rank}.json").read_text()) for rank in range(2)]
    saved_step = int((killed / "saved0").read_text())
    assert (first["first_step"], first["run_id"]) == (saved_step, left.run_id)
    (jump,) = first["jumps"]
    assert jump["base_step"] >= saved_step
    assert first["jumps"] == second["jumps"]
    session = session_of(service, left.run_id)
    # A protected session's id is shown to its run alone: it is looked up here, and a new one.
    assert service.servicer.sessions.get(first["session_id"]).settings.run_id == left.run_id
    assert (left.session_id, session.session_id) == ("", "")
    assert session.num_published > left.num_published
