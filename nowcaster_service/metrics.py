"""The service's Prometheus series. Labels never hold a step, a version or a parameter name."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

NOWCAST_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300)


class ServiceMetrics:
    """All series of one service process.

    Args:
        registry: Where they are registered; one per process, a fresh one per test.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.sessions = Gauge("sidecast_service_sessions", "Open sessions", registry=registry)
        self.ranks = Gauge("sidecast_service_ranks", "Ranks that have joined", ["run"], registry=registry)
        self.history_bytes = Gauge("sidecast_service_history_bytes", "Bytes of history in use", registry=registry)
        self.history_budget_bytes = Gauge(
            "sidecast_service_history_budget_bytes", "Bytes of history allowed", registry=registry
        )
        self.received_bytes = Counter(
            "sidecast_service_received_bytes", "Snapshot bytes received", ["run"], registry=registry
        )
        self.sent_bytes = Counter("sidecast_service_sent_bytes", "Prediction bytes sent", ["run"], registry=registry)
        self.snapshots = Counter(
            "sidecast_service_snapshots", "Snapshots by how they ended", ["run", "state"], registry=registry
        )
        self.predictions = Counter(
            "sidecast_service_predictions", "Nowcasts by result", ["run", "result"], registry=registry
        )
        self.jumps = Counter(
            "sidecast_service_jumps", "What trainers did with predictions", ["run", "outcome"], registry=registry
        )
        self.nowcast_seconds = Histogram(
            "sidecast_service_nowcast_seconds",
            "From a complete window to a published prediction",
            ["run", "predictor"],
            buckets=NOWCAST_BUCKETS_S,
            registry=registry,
        )
        self.relative_norm = Gauge(
            "sidecast_service_jump_relative_norm", "||delta|| / ||base|| of the newest", ["run"], registry=registry
        )
        self.snapshot_step = Gauge(
            "sidecast_service_snapshot_step", "Step of the newest committed snapshot", ["run"], registry=registry
        )
        self.refused = Counter("sidecast_service_refused", "Refused calls by status", ["status"], registry=registry)
