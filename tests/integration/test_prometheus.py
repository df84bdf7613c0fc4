"""A real Prometheus on the shipped configuration, beside a running service and a run of two ranks that it nowcasts."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import HANG_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WORKER = Path(__file__).with_name("workers") / "train_nowcasted.py"
POLL_INTERVAL_S = 0.2
# Reached only when something is wrong: Ray alone can take a minute to start on a busy machine.

WORLD_SIZE = 2
# In sync mode without probation every step is decided: snapshots at 2, 4, ... 14, nowcasts applied at 4, 8 and 12.
NUM_STEPS = 15
LAST_SNAPSHOT_STEP = 14
NUM_SNAPSHOTS = 7
NUM_JUMPS = 3
NUM_PARAMETERS = 6 * 5 + 5 + 5 * 3 + 3
VECTOR_BYTES = 4 * NUM_PARAMETERS
SECTION = {
    "mode": "sync",
    "context_len": 2,
    "period_steps": 4,
    "vote_lag_steps": 0,
    "probation_steps": 0,
    "max_relative_norm": 1e6,
    "run_name": "tiny",
    "metrics_port": 0,
    "require": True,
}


@dataclass(frozen=True)
class Process:
    """A started process whose output goes to a file."""

    popen: subprocess.Popen[bytes]
    log: Path

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the output so far; fails if the process has ended without it."""
        has_ended = self.popen.poll() is not None
        match = re.search(pattern, self.log.read_text())
        if match is None and has_ended:
            pytest.fail(f"{self.log.name} ended with {self.popen.returncode}:\n{self.log.read_text()[-3000:]}")
        return None if match is None else match[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Starts processes, and ends them in reverse order."""
    folder = tmp_path_factory.mktemp("logs")
    started: list[subprocess.Popen[bytes]] = []

    def start_one(name: str, command: Sequence[str | Path], **environment: str) -> Process:
        log = folder / name
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        started.append(popen)
        return Process(popen, log)

    yield start_one
    for popen in reversed(started):
        assert popen.stdin is not None
        popen.stdin.close()
        popen.terminate()
    for popen in reversed(started):
        try:
            popen.wait(timeout=HANG_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Polls until the condition holds; other processes give no event to wait on."""
    pause = threading.Event()
    deadline_s = time.monotonic() + HANG_S
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what}: not within {HANG_S:g} s")
        pause.wait(POLL_INTERVAL_S)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def prometheus(
    start: Callable[..., Process], find_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """URL of a Prometheus that scrapes a service and two ranks, which have trained and are still there."""
    binary = find_tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    service_port = free_port()
    address_file = folder / "address"
    serve = ["serve", "--port", "0", "--port-file", address_file, "--metrics-port", str(service_port)]
    service = start("service", [sys.executable, "-m", "sidecast.commands", *serve])
    wait_for("the service", lambda: address_file.exists() or service.find("(?!)"))
    section = json.dumps({**SECTION, "endpoint": address_file.read_text()})
    ranks = [
        start(
            f"rank{rank}",
            [sys.executable, WORKER, folder, str(NUM_STEPS), section],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(WORLD_SIZE),
            LOCAL_SIZE=str(WORLD_SIZE),
            # Read by DeepSpeed, but the ranks meet through a file.
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",
            DS_ACCELERATOR="cpu",
        )
        for rank in range(WORLD_SIZE)
    ]
    targets = {"service:9464": service_port}
    for rank, process in enumerate(ranks):
        port = wait_for(f"rank {rank}", lambda process=process: process.find(r"serves metrics on port (\d+)"))
        targets[f"trainer:{9500 + rank}"] = int(port)
    configuration = (DEPLOY / "prometheus.yml").read_text()
    for shipped, port in targets.items():
        assert f'"{shipped}"' in configuration
        configuration = configuration.replace(f'"{shipped}"', f'"127.0.0.1:{port}"')
    (folder / "prometheus.yml").write_text(configuration)
    shutil.copy(DEPLOY / "alerts.yml", folder)
    process = start(
        "prometheus",
        [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ],
    )
    address = wait_for("Prometheus", lambda: process.find(r'msg="Listening on" address=(\S+)'))
    url = f"http://{address}"
    wait_for("Prometheus", lambda: "Server is ready" in process.log.read_text() or process.find("(?!)"))
    # Each the last thing that its process does with the last snapshot.
    last = {
        "sidecast_trainer_step": LAST_SNAPSHOT_STEP,
        'sidecast_trainer_snapshots_total{state="committed"}': NUM_SNAPSHOTS,
        "sidecast_trainer_upload_seconds_count": NUM_SNAPSHOTS,
    }
    for expression, value in last.items():
        expected = {str(rank): float(value) for rank in range(WORLD_SIZE)}
        wait_for(
            f"{expression} = {value} at every rank",
            lambda expression=expression, expected=expected: query(url, expression, "rank") == expected,
        )
    wait_for(
        "the service's scrape after the last snapshot",
        lambda: query(url, "sidecast_service_snapshot_step") == {"": LAST_SNAPSHOT_STEP},
    )
    return url


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=10) as reply:
        return json.load(reply)["data"]


def query(url: str, expression: str, label: str = "") -> dict[str, float]:
    """The value of each series of an instant query, by one label; an empty name stands for the only series."""
    rows = get(url, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")["result"]
    values = {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}
    assert len(values) == len(rows), f"{expression} has several series per {label!r}: {rows}"
    return values


def test_every_target_is_up(prometheus: str) -> None:
    assert query(prometheus, "count by (job) (up == 1)", "job") == {"sidecast-service": 1, "sidecast-trainer": 2}


@pytest.mark.parametrize(
    ("expression", "label", "expected"),
    [
        ("sidecast_service_sessions", "", {"": 1}),
        ("sidecast_service_ranks", "", {"": WORLD_SIZE}),
        ("sidecast_service_snapshot_step", "", {"": LAST_SNAPSHOT_STEP}),
        ("sidecast_service_snapshots_total", "state", {"committed": NUM_SNAPSHOTS, "aborted": 0}),
        ("sidecast_service_received_bytes_total", "", {"": NUM_SNAPSHOTS * VECTOR_BYTES}),
        ("sidecast_service_sent_bytes_total", "", {"": NUM_JUMPS * VECTOR_BYTES}),
        ("sidecast_service_predictions_total", "result", {"published": NUM_JUMPS, "failed": 0}),
        ("sidecast_service_nowcast_seconds_count", "predictor", {"linear": NUM_JUMPS}),
        (
            "sidecast_service_jumps_total",
            "outcome",
            {"applied": NUM_JUMPS, "accepted": 0, "rolled_back": 0, "rejected": 0},
        ),
        ("sidecast_service_history_budget_bytes", "", {"": 16 * 2**30}),
    ],
)
def test_the_services_series_are_right(
    prometheus: str, expression: str, label: str, expected: dict[str, float]
) -> None:
    assert query(prometheus, expression, label) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("sidecast_trainer_step", LAST_SNAPSHOT_STEP),
        ("sidecast_trainer_connected", 1),
        ('sidecast_trainer_snapshots_total{state="committed"}', NUM_SNAPSHOTS),
        ('sidecast_trainer_snapshots_total{state!="committed"} > 0', None),
        ("sidecast_trainer_snapshots_dropped_total", 0),
        ("sidecast_trainer_upload_seconds_count", NUM_SNAPSHOTS),
        ("sidecast_trainer_fetch_seconds_count", NUM_JUMPS),
        ("sidecast_trainer_jumps_applied_total", NUM_JUMPS),
        ("sidecast_trainer_jumps_rolled_back_total", 0),
        ("sidecast_trainer_courier_deaths_total", 0),
        ("sidecast_trainer_suspended", 0),
        (
            "0 < sidecast_trainer_staging_seconds_total < sidecast_trainer_blocked_seconds_total"
            " < sidecast_trainer_train_seconds_total >bool 0",
            1,
        ),
    ],
)
def test_every_ranks_series_are_right(prometheus: str, expression: str, expected: float | None) -> None:
    each_rank = {} if expected is None else {"0": expected, "1": expected}
    assert query(prometheus, expression, "rank") == each_rank


def test_both_sides_count_the_same(prometheus: str) -> None:
    for trainer, service in (
        ("sum(sidecast_trainer_uploaded_bytes_total)", "sidecast_service_received_bytes_total"),
        ("sum(sidecast_trainer_fetched_bytes_total)", "sidecast_service_sent_bytes_total"),
        (
            'sidecast_trainer_snapshots_total{state="committed", rank="0"}',
            'sidecast_service_snapshots_total{state="committed"}',
        ),
        (
            'sidecast_trainer_jumps_applied_total{rank="0"}',
            'sidecast_service_jumps_total{outcome="applied"}',
        ),
    ):
        assert query(prometheus, trainer) == query(prometheus, service) != {}


def test_a_query_can_bring_both_sides_together(prometheus: str) -> None:
    names = 'max by (run, run_id) (sidecast_trainer_run_info{rank="0"})'
    joined = f"sidecast_service_snapshot_step * on (run_id) group_left (run) {names}"
    assert query(prometheus, joined, "run") == {"tiny": LAST_SNAPSHOT_STEP}


def test_the_shipped_rules_are_loaded_and_silent(prometheus: str) -> None:
    groups = wait_for(
        "the first evaluation",
        lambda: [
            group
            for group in get(prometheus, "/api/v1/rules")["groups"]
            if all(rule["health"] != "unknown" for rule in group["rules"])
        ],
    )
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == (DEPLOY / "alerts.yml").read_text().count("- alert:")
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    # In sync mode the ranks do wait for the service; that alert is pending, as it says it would be.
    active = {rule["name"] for rule in rules if rule["alerts"]}
    assert active <= {"SidecastTrainingBlocked"}
