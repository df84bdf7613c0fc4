"""A real Prometheus on the shipped configuration, beside a running service and a run of two ranks that it nowcasts."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.monitoring.prometheus import (
    Start,
    evaluated_rules,
    free_port,
    query,
    start_prometheus,
    started_processes,
    wait_for,
)

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
RULES = ("recording_rules.yml", "alerts.yml")
WORKER = Path(__file__).with_name("workers") / "train_nowcasted.py"

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


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with started_processes(tmp_path_factory.mktemp("logs")) as start:
        yield start


@pytest.fixture(scope="module")
def prometheus(start: Start, find_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
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
    for name in RULES:
        shutil.copy(DEPLOY / name, folder)
    url = start_prometheus(start, binary, folder / "prometheus.yml", folder / "data")
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
    rules = evaluated_rules(prometheus)
    shipped = "".join((DEPLOY / name).read_text() for name in RULES)
    assert len(rules) == len(re.findall("- (?:alert|record):", shipped))
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    # In sync mode the ranks do wait for the service; that alert is pending, as it says it would be.
    active = {rule["name"] for rule in rules if rule.get("alerts")}
    assert active <= {"SidecastTrainingBlocked"}
