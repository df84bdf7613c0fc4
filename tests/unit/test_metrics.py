"""What both sides expose, and that configuration and documentation speak of nothing else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.session_events import FoldEvent, ProbeEvent
from sidecast.trainer.courier.metrics import CourierMetrics
from sidecast.trainer.pipe.messages import Stats, Totals

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTATION = REPOSITORY / "docs" / "metrics.md"
USERS = (
    *sorted((REPOSITORY / "deploy").glob("*.yml")),
    *sorted((REPOSITORY / "deploy").glob("**/*.json")),
    *sorted((REPOSITORY / "docs").glob("**/*.md")),
)
# Not those that recording rules make, whose names begin with a level and a colon.
SERIES = re.compile(r"(?<![\w:])sidecast_(?:service|trainer)_\w+")
UNITS = ("seconds", "bytes")


def stats(**values: float) -> Stats:
    """What the hook sends with a snapshot, each number as given or 1."""
    found: dict[str, Any] = {item.name: values.get(item.name, 1.0) for item in fields(Stats)}
    return Stats(**found | {"totals": Totals(**{item.name: values.get(item.name, 1) for item in fields(Totals)})})


def service_registry() -> CollectorRegistry:
    metrics = ServiceMetrics(CollectorRegistry())
    metrics.begin_run("a-run")
    metrics.ranks.labels("a-run").set(2)
    metrics.nowcast_seconds.labels("a-run", "linear").observe(0.2)
    metrics.relative_norm.labels("a-run").set(0.01)
    metrics.snapshot_step.labels("a-run").set(200)
    metrics.note("a-run", "nino", FoldEvent("ema5", 200))
    metrics.note("a-run", "nino", ProbeEvent(200, {"ema5": 1.25}))
    metrics.refused.labels("UNAUTHENTICATED").inc()
    return metrics.registry


def trainer_registry() -> CollectorRegistry:
    metrics = CourierMetrics("demo", rank=1, stage="2")
    metrics.begin_session("a-run")
    metrics.update(stats())
    return metrics.registry


def families(registry: CollectorRegistry) -> Iterator[Metric]:
    for family in registry.collect():
        assert family.samples, f"{family.name} has no sample; exercise it above"
        yield family


def exposed_name(family: Metric) -> str:
    suffixes = {"counter": "_total", "info": "_info"}
    return family.name + suffixes.get(family.type, "")


def documented_rows(heading: str) -> list[str]:
    section = DOCUMENTATION.read_text().partition(f"### {heading}\n")[2].partition("\n#")[0]
    return [line for line in section.splitlines() if line.startswith("| `")]


def expected_rows(registry: CollectorRegistry) -> list[str]:
    rows = []
    for family in families(registry):
        sample = next(sample for sample in family.samples if not sample.name.endswith("_created"))
        labels = ", ".join(f"`{name}`" for name in sample.labels if name != "le")
        unit = next((unit for unit in UNITS if re.search(rf"_{unit}\b", family.name)), "")
        kind = "gauge" if family.type == "info" else family.type
        rows.append(f"| `{exposed_name(family)}` | {kind} | {labels} | {unit} | {family.documentation} |")
    return rows


@pytest.mark.parametrize(
    ("heading", "registry"),
    [("Series of the service", service_registry()), ("Series of each rank", trainer_registry())],
    ids=["service", "trainer"],
)
def test_the_documentation_lists_exactly_what_is_exposed(heading: str, registry: CollectorRegistry) -> None:
    assert documented_rows(heading) == expected_rows(registry)


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.name)
def test_every_series_that_is_used_exists(path: Path) -> None:
    exposed = set()
    for registry in (service_registry(), trainer_registry()):
        for family in families(registry):
            exposed.add(exposed_name(family))
            exposed.update(sample.name for sample in family.samples if not sample.name.endswith("_created"))
    used = set(SERIES.findall(path.read_text()))
    assert used <= exposed
    assert used or path.name not in (
        "alerts.yml",
        "alerts_test.yml",
        "recording_rules.yml",
        "training.json",
        "service.json",
    )


@pytest.mark.parametrize("registry", [service_registry(), trainer_registry()], ids=["service", "trainer"])
def test_promtool_has_no_complaint_about_names_and_units(
    find_tool: Callable[[str], str], registry: CollectorRegistry
) -> None:
    command = [find_tool("promtool"), "check", "metrics"]
    result = subprocess.run(command, input=generate_latest(registry), capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_labels_hold_nothing_that_grows_with_the_run() -> None:
    allowed = {"run", "run_id", "rank", "stage", "state", "result", "outcome", "predictor", "status", "direction", "le"}
    # Of those a run has eight at most.
    allowed |= {"read_out"}
    for registry in (service_registry(), trainer_registry()):
        for family in families(registry):
            for sample in family.samples:
                assert set(sample.labels) <= allowed, sample


def test_counters_are_there_before_they_count() -> None:
    service = ServiceMetrics(CollectorRegistry())
    service.begin_run("a-run")
    trainer = CourierMetrics("demo", rank=1, stage="2")
    of_rank = {"run": "demo", "rank": "1", "stage": "2"}
    for registry, name, labels in (
        (service.registry, "sidecast_service_snapshots_total", {"run_id": "a-run", "state": "aborted"}),
        (service.registry, "sidecast_service_predictions_total", {"run_id": "a-run", "result": "failed"}),
        (service.registry, "sidecast_service_jumps_total", {"run_id": "a-run", "outcome": "rolled_back"}),
        (service.registry, "sidecast_service_received_bytes_total", {"run_id": "a-run"}),
        (trainer.registry, "sidecast_trainer_snapshots_total", {**of_rank, "state": "unsent"}),
        (trainer.registry, "sidecast_trainer_uploaded_bytes_total", of_rank),
        (trainer.registry, "sidecast_trainer_fetch_seconds_count", of_rank),
    ):
        assert registry.get_sample_value(name, labels) == 0, name


def test_beginning_a_run_again_keeps_its_counts() -> None:
    metrics = ServiceMetrics(CollectorRegistry())
    metrics.begin_run("a-run")
    metrics.snapshots.labels("a-run", "committed").inc(3)
    metrics.begin_run("a-run")
    labels = {"run_id": "a-run", "state": "committed"}
    assert metrics.registry.get_sample_value("sidecast_service_snapshots_total", labels) == 3


def test_a_forgotten_run_leaves_no_series_and_others_stay() -> None:
    registry = CollectorRegistry()
    metrics = ServiceMetrics(registry)
    for run_id in ("gone", "here"):
        metrics.begin_run(run_id)
        metrics.ranks.labels(run_id).set(2)
        metrics.nowcast_seconds.labels(run_id, "linear").observe(0.2)
        metrics.relative_norm.labels(run_id).set(0.01)
        metrics.snapshot_step.labels(run_id).set(200)
    metrics.forget_run("gone")
    run_ids = {sample.labels.get("run_id") for family in registry.collect() for sample in family.samples}
    assert run_ids == {None, "here"}
    assert registry.get_sample_value("sidecast_service_ranks", {"run_id": "here"}) == 2


def test_totals_of_the_trainer_survive_a_new_courier() -> None:
    labels = {"run": "demo", "rank": "0", "stage": "2"}
    for _ in range(2):
        metrics = CourierMetrics("demo", rank=0, stage="2")
        metrics.update(stats(num_applied=3, step=10))
        metrics.update(stats(num_applied=5, step=20))
        assert metrics.registry.get_sample_value("sidecast_trainer_jumps_applied_total", labels) == 5
        assert metrics.registry.get_sample_value("sidecast_trainer_step", labels) == 20


@dataclass(kw_only=True)
class LaterTotals(Totals):
    """As they may be one day."""

    num_unheard_of: int = 5


def test_a_total_without_a_series_is_left_out_and_the_others_are_taken_over() -> None:
    metrics = CourierMetrics("demo", rank=0, stage="2")
    metrics.update(replace(stats(), totals=LaterTotals(num_applied=3)))
    labels = {"run": "demo", "rank": "0", "stage": "2"}
    assert metrics.registry.get_sample_value("sidecast_trainer_jumps_applied_total", labels) == 3
    assert b"unheard" not in generate_latest(metrics.registry)


def test_a_run_without_losses_has_no_loss() -> None:
    metrics = CourierMetrics("demo", rank=0, stage="2")
    metrics.update(replace(stats(), loss=None))
    labels = {"run": "demo", "rank": "0", "stage": "2"}
    assert metrics.registry.get_sample_value("sidecast_trainer_loss", labels) is None
    assert metrics.registry.get_sample_value("sidecast_trainer_step", labels) == 1


def test_every_series_of_a_rank_is_of_something_that_the_hook_sends() -> None:
    metrics = CourierMetrics("demo", rank=0, stage="2")
    sent = {item.name for kind in (Stats, Totals) for item in fields(kind)}
    assert {*metrics._totals, *metrics._levels} <= sent
