"""A rank's Prometheus series, served by its courier. Labels never hold a step, a version or a parameter name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from sidecast.trainer.courier.unserved_metrics import SnapshotEnd, TransferDirection
from sidecast.trainer.pipe.messages import Stats

TRANSFER_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120)
_LABELS = ("run", "rank", "stage")


class CourierMetrics:
    """All series of one rank.

    Args:
        run_name: Value of the ``run`` label.
        rank: Value of the ``rank`` label.
        stage: ZeRO stage, or what else holds the weights; value of the ``stage`` label.
    """

    def __init__(self, run_name: str, rank: int, stage: str) -> None:
        self.labels = (run_name, str(rank), stage)
        self.registry = CollectorRegistry()
        self.snapshots = self._counter("snapshots", "Snapshots by how they ended: committed, aborted, unsent", "state")
        self.uploaded_bytes = self._counter("uploaded_bytes", "Snapshot bytes sent and committed")
        self.fetched_bytes = self._counter("fetched_bytes", "Prediction bytes received")
        self.upload_seconds = self._histogram("upload_seconds", "One rank's upload and commit of one snapshot")
        self.fetch_seconds = self._histogram("fetch_seconds", "One rank's download of one prediction")
        self.resumed = self._counter("transfers_resumed", "Transfers that went on after an interruption", "direction")
        self._connected = self._gauge("connected", "1 while joined to the service").labels(*self.labels)
        # Prometheus sees no increase in a series that begins at one: all begin at zero.
        for state in get_args(SnapshotEnd):
            self.snapshots.labels(*self.labels, state)
        for direction in get_args(TransferDirection):
            self.resumed.labels(*self.labels, direction)
        for metric in (self.uploaded_bytes, self.fetched_bytes, self.upload_seconds, self.fetch_seconds):
            metric.labels(*self.labels)
        self._run = Info(
            "sidecast_trainer_run", "The run's identity in the service's series", _LABELS, registry=self.registry
        ).labels(*self.labels)
        # By their names in Stats and its Totals; what has no series here is not exposed.
        self._totals = {
            "blocked_s": self._counter("blocked_seconds", "Time the training loop spent in the hook"),
            "staging_s": self._counter("staging_seconds", "Of it, copying snapshots"),
            "train_s": self._counter("train_seconds", "Wall time since the hook was attached"),
            "num_dropped": self._counter("snapshots_dropped", "Snapshots not staged, not sent or aborted"),
            "num_applied": self._counter("jumps_applied", "Nowcasts applied"),
            "num_accepted": self._counter("jumps_accepted", "Nowcasts that passed probation"),
            "num_rolled_back": self._counter("jumps_rolled_back", "Nowcasts undone"),
            "num_rejected": self._counter("jumps_rejected", "Predictions not applied"),
            "num_skipped": self._counter("steps_skipped", "Steps skipped for gradients that are not finite"),
            "num_losses": self._counter("losses", "Losses of micro-batches seen, on all ranks"),
            "num_verdict_losses": self._counter("verdict_losses", "Votes' losses that verdicts on jumps saw"),
            "num_courier_deaths": self._counter("courier_deaths", "Couriers that had to be replaced"),
        }
        self._seen = dict.fromkeys(self._totals, 0.0)
        self._levels = {
            "step": self._gauge("step", "Optimizer steps applied"),
            "loss": self._gauge("loss", "Mean training loss between the last two votes, over all ranks"),
            "suspended": self._gauge("suspended", "1 once jumps are suspended"),
            "paused": self._gauge("paused", "1 while nothing is applied, as somebody has asked for"),
        }

    def follow_link(self, is_connected: Callable[[], bool]) -> None:
        """Asks at every scrape whether the session is joined."""
        self._connected.set_function(lambda: float(is_connected()))

    def begin_session(self, run_id: str) -> None:
        """Names the run as the service knows it; a resume may change that."""
        self._run.info({"run_id": run_id})

    def update(self, stats: Stats) -> None:
        """Takes over what the hook has counted since it was attached, and its levels."""
        for name, value in {**asdict(stats.totals), **asdict(stats)}.items():
            if name in self._totals:
                self._totals[name].labels(*self.labels).inc(max(0.0, value - self._seen[name]))
                self._seen[name] = value
            elif name in self._levels and value is not None:
                self._levels[name].labels(*self.labels).set(value)

    def count_snapshot(self, end: SnapshotEnd) -> None:
        """Counts a snapshot by how it ended."""
        self.snapshots.labels(*self.labels, end).inc()

    def count_upload(self, num_bytes: int, seconds: float) -> None:
        """Counts a part that the service has: its bytes, and how long upload and commit took."""
        self.uploaded_bytes.labels(*self.labels).inc(num_bytes)
        self.upload_seconds.labels(*self.labels).observe(seconds)

    def count_fetch(self, num_bytes: int, seconds: float) -> None:
        """Counts a prediction that is here: its bytes, and how long the download took."""
        self.fetched_bytes.labels(*self.labels).inc(num_bytes)
        self.fetch_seconds.labels(*self.labels).observe(seconds)

    def count_resumed(self, direction: TransferDirection) -> None:
        """Counts a transfer that goes on after an interruption."""
        self.resumed.labels(*self.labels, direction).inc()

    def serve(self, port: int | None) -> int | None:
        """Serves the series over HTTP; port 0 picks a free one.

        Returns:
            The port, or None if there is to be none.
        """
        if port is None:
            return None
        server, _ = start_http_server(port, registry=self.registry)
        return int(server.server_port)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return Counter(f"sidecast_trainer_{name}", text, [*_LABELS, *more], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sidecast_trainer_{name}", text, _LABELS, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"sidecast_trainer_{name}", text, _LABELS, buckets=TRANSFER_BUCKETS_S, registry=self.registry)
