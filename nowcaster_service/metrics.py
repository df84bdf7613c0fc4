"""The service's Prometheus series. Labels never hold a step, a version or a parameter name.

``run_id`` is the identity that a run keeps over resumes; the trainer's ``sidecast_trainer_run_info`` gives its name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidecast.nowcaster_service.session_events import (
    Event,
    FailureEvent,
    FoldEvent,
    Prediction,
    ProbeEvent,
    SnapshotEvent,
)

log = logging.getLogger(__name__)

RUN_LABEL = "run_id"
NOWCAST_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)
SNAPSHOT_STATES = ("committed", "aborted")
FOLD_RESULTS = ("averaged", "left_out")
PROBE_RESULTS = ("evaluated", "failed")
PREDICTION_RESULTS = ("published", "failed")
JUMP_OUTCOMES = ("applied", "accepted", "rolled_back", "rejected")


class ServiceMetrics:
    """All series of one service process.

    Args:
        registry: Where they are registered; one per process, a fresh one per test.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.sessions = Gauge("sidecast_service_sessions", "Open sessions", registry=registry)
        self.ranks = Gauge("sidecast_service_ranks", "Ranks that have joined", [RUN_LABEL], registry=registry)
        self.history_bytes = Gauge("sidecast_service_history_bytes", "Bytes of history in use", registry=registry)
        self.history_budget_bytes = Gauge(
            "sidecast_service_history_budget_bytes", "Bytes of history allowed", registry=registry
        )
        self.received_bytes = Counter(
            "sidecast_service_received_bytes", "Snapshot bytes received", [RUN_LABEL], registry=registry
        )
        self.sent_bytes = Counter(
            "sidecast_service_sent_bytes", "Prediction bytes sent", [RUN_LABEL], registry=registry
        )
        self.snapshots = Counter(
            "sidecast_service_snapshots",
            "Snapshots by how they ended: committed, aborted",
            [RUN_LABEL, "state"],
            registry=registry,
        )
        self.predictions = Counter(
            "sidecast_service_predictions",
            "Nowcasts by result: published, failed",
            [RUN_LABEL, "result"],
            registry=registry,
        )
        self.jumps = Counter(
            "sidecast_service_jumps",
            "What runs did with predictions: applied, accepted, rolled_back, rejected",
            [RUN_LABEL, "outcome"],
            registry=registry,
        )
        self.nowcast_seconds = Histogram(
            "sidecast_service_nowcast_seconds",
            "An engine's time for one prediction and its checks",
            [RUN_LABEL, "predictor"],
            buckets=NOWCAST_BUCKETS_S,
            registry=registry,
        )
        self.relative_norm = Gauge(
            "sidecast_service_jump_relative_norm",
            "Norm of the newest jump relative to the parameters'",
            [RUN_LABEL],
            registry=registry,
        )
        self.snapshot_step = Gauge(
            "sidecast_service_snapshot_step", "Step of the newest committed snapshot", [RUN_LABEL], registry=registry
        )
        self.paused = Gauge(
            "sidecast_service_paused", "1 while the run is asked to apply nothing", [RUN_LABEL], registry=registry
        )
        self.folds = Counter(
            "sidecast_service_read_out_states",
            "States by whether they went into a read-out: averaged, left_out",
            ["run_id", "result"],
            registry=registry,
        )
        self.read_out_step = Gauge(
            "sidecast_service_read_out_step",
            "Step of the newest state in a read-out",
            ["run_id", "read_out"],
            registry=registry,
        )
        self.probes = Counter(
            "sidecast_service_probes",
            "Steps by whether their read-outs were evaluated on the probe: evaluated, failed",
            ["run_id", "result"],
            registry=registry,
        )
        self.probe_loss = Gauge(
            "sidecast_service_probe_loss",
            "Newest loss on the probe, of a read-out or of the run's own weights (raw)",
            ["run_id", "read_out"],
            registry=registry,
        )
        self.probe_step = Gauge(
            "sidecast_service_probe_step", "Step of the newest losses on the probe", [RUN_LABEL], registry=registry
        )
        self.refused = Counter(
            "sidecast_service_refused", "Refused calls by gRPC status", ["status"], registry=registry
        )
        self._of_a_run = (
            self.ranks,
            self.received_bytes,
            self.sent_bytes,
            self.snapshots,
            self.predictions,
            self.jumps,
            self.nowcast_seconds,
            self.relative_norm,
            self.snapshot_step,
            self.paused,
            self.folds,
            self.read_out_step,
            self.probes,
            self.probe_loss,
            self.probe_step,
        )

    def begin_run(self, run_id: str, *, is_paused: bool = False) -> None:
        """Shows a run's counters from zero on: Prometheus sees no increase in a series that begins at one."""
        for counter in (self.received_bytes, self.sent_bytes):
            counter.labels(run_id)
        for counter, values in (
            (self.snapshots, SNAPSHOT_STATES),
            (self.folds, FOLD_RESULTS),
            (self.probes, PROBE_RESULTS),
            (self.predictions, PREDICTION_RESULTS),
            (self.jumps, JUMP_OUTCOMES),
        ):
            for value in values:
                counter.labels(run_id, value)
        self.paused.labels(run_id).set(is_paused)

    def note(self, run_id: str, predictor: str, event: Event) -> None:
        """Counts an event of a run's session, and says in the log what went wrong."""
        match event:
            case SnapshotEvent(reason=""):
                self.snapshots.labels(run_id, "committed").inc()
                self.snapshot_step.labels(run_id).set(event.step)
            case SnapshotEvent():
                self.snapshots.labels(run_id, "aborted").inc()
                log.warning("snapshot of step %d aborted: %s", event.step, event.reason)
            case Prediction():
                self.predictions.labels(run_id, "published").inc()
                self.nowcast_seconds.labels(run_id, predictor).observe(event.nowcast_s)
                self.relative_norm.labels(run_id).set(event.relative_norm)
            case FailureEvent():
                self.predictions.labels(run_id, "failed").inc()
                log.warning("no nowcast at step %d: %s", event.base_step, event.reason)
            case FoldEvent(reason=""):
                self.folds.labels(run_id, "averaged").inc()
                self.read_out_step.labels(run_id, event.name).set(event.step)
            case FoldEvent():
                self.folds.labels(run_id, "left_out").inc()
            case ProbeEvent():
                self._note_probe(run_id, event.step, event.losses)

    def _note_probe(self, run_id: str, step: int, losses: Mapping[str, float]) -> None:
        # Nothing older is shown: a loss that is missing is not finite.
        self.probes.labels(run_id, "evaluated" if losses else "failed").inc()
        if losses:
            self.probe_loss.remove_by_labels({RUN_LABEL: run_id})
            self.probe_step.labels(run_id).set(step)
        for name, loss in losses.items():
            self.probe_loss.labels(run_id, name).set(loss)

    def forget_run(self, run_id: str) -> None:
        """Drops the series of a run that is over, so that a long-lived service does not collect them."""
        for metric in self._of_a_run:
            metric.remove_by_labels({RUN_LABEL: run_id})
