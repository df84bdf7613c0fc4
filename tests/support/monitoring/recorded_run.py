"""An hour of a run of two ranks as Prometheus would have scraped it, from the registries of the product itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.session_events import FoldEvent
from sidecast.trainer.courier.metrics import CourierMetrics
from sidecast.trainer.pipe.messages import Stats, Totals

RUN_NAME, RUN_ID = "llama", "1b6c"
NUM_RANKS = 2
SCRAPE_INTERVAL_S = 15
DURATION_S = 3600
STEPS_PER_SCRAPE = 10
SNAPSHOT_BYTES = 40_000_000
NOWCAST_SCRAPES = 12
# One of each thing that goes wrong in the life of a healthy run, by the scrape that shows it first.
LOST_SNAPSHOT, FAILED_NOWCAST, UNDONE_JUMP, REFUSED_CALL = 200, 132, 180, 225


class RecordedRun:
    """Both sides' registries, and what happens to them between two scrapes."""

    def __init__(self) -> None:
        self._service = ServiceMetrics(CollectorRegistry())
        self._couriers = [CourierMetrics(RUN_NAME, rank, "2") for rank in range(NUM_RANKS)]
        self._totals = [Totals() for _ in range(NUM_RANKS)]
        self._service.begin_run(RUN_ID)
        self._service.sessions.set(1)
        self._service.history_budget_bytes.set(16 * 2**30)
        self._service.ranks.labels(RUN_ID).set(NUM_RANKS)
        for courier in self._couriers:
            courier.begin_session(RUN_ID)
            courier.follow_link(lambda: True)

    def open_metrics(self, end_s: float) -> str:
        """The hour as OpenMetrics text with timestamps, as ``promtool tsdb create-blocks-from openmetrics`` reads it.

        Args:
            end_s: Unix time of the last scrape.
        """
        families: dict[str, list[str]] = {}
        num_scrapes = DURATION_S // SCRAPE_INTERVAL_S
        for scrape in range(num_scrapes + 1):
            self._advance(scrape)
            time_s = end_s - (num_scrapes - scrape) * SCRAPE_INTERVAL_S
            for name, line in self._samples():
                families.setdefault(name, []).append(f"{line} {time_s:.3f}")
        return (
            "".join(f"# TYPE {name} unknown\n" + "\n".join(lines) + "\n" for name, lines in families.items())
            + "# EOF\n"
        )

    def _advance(self, scrape: int) -> None:
        step = scrape * STEPS_PER_SCRAPE
        is_lost = scrape == LOST_SNAPSHOT
        for courier, totals in zip(self._couriers, self._totals, strict=True):
            totals.blocked_s += 0.004 * SCRAPE_INTERVAL_S
            totals.staging_s += 0.003 * SCRAPE_INTERVAL_S
            totals.num_losses += NUM_RANKS * STEPS_PER_SCRAPE
            totals.num_dropped += is_lost
            if not is_lost:
                courier.count_snapshot("committed")
                courier.count_upload(SNAPSHOT_BYTES, 0.2)
        self._service.snapshots.labels(RUN_ID, "aborted" if is_lost else "committed").inc()
        self._service.received_bytes.labels(RUN_ID).inc(NUM_RANKS * SNAPSHOT_BYTES)
        self._service.history_bytes.set(min(step, 100) * NUM_RANKS * SNAPSHOT_BYTES / 10)
        self._service.snapshot_step.labels(RUN_ID).set(step)
        self._service.note(RUN_ID, "linear", FoldEvent("ema5", step))
        if scrape == REFUSED_CALL:
            self._service.refused.labels("UNAUTHENTICATED").inc()
        # A status that has been refused once is shown from then on; before, it is not there.
        self._service.refused.labels("RESOURCE_EXHAUSTED")
        if scrape % NOWCAST_SCRAPES == 0 and scrape:
            self._nowcast(scrape)
        for courier, totals in zip(self._couriers, self._totals, strict=True):
            courier.update(
                Stats(
                    totals=totals,
                    step=step,
                    loss=2 + 3 * math.exp(-step / 800),
                    suspended=False,
                    train_s=scrape * SCRAPE_INTERVAL_S,
                    num_courier_deaths=0,
                )
            )

    def _nowcast(self, scrape: int) -> None:
        if scrape == FAILED_NOWCAST:
            self._service.predictions.labels(RUN_ID, "failed").inc()
            return
        self._service.predictions.labels(RUN_ID, "published").inc()
        self._service.nowcast_seconds.labels(RUN_ID, "linear").observe(0.4)
        self._service.sent_bytes.labels(RUN_ID).inc(NUM_RANKS * SNAPSHOT_BYTES)
        self._service.relative_norm.labels(RUN_ID).set(0.01)
        verdict = "rolled_back" if scrape == UNDONE_JUMP else "accepted"
        for outcome in ("applied", verdict):
            self._service.jumps.labels(RUN_ID, outcome).inc()
        for courier, totals in zip(self._couriers, self._totals, strict=True):
            courier.count_fetch(SNAPSHOT_BYTES, 0.3)
            totals.num_applied += 1
            totals.num_accepted += verdict == "accepted"
            totals.num_rolled_back += verdict == "rolled_back"

    def _samples(self) -> Iterator[tuple[str, str]]:
        """Family and line of each sample, with the labels that a scrape adds."""
        targets = {"service:9464": ("sidecast-service", self._service.registry)}
        for rank, courier in enumerate(self._couriers):
            targets[f"trainer:{9500 + rank}"] = ("sidecast-trainer", courier.registry)
        for instance, (job, registry) in targets.items():
            scraped = {"job": job, "instance": instance}
            yield "up", _line("up", scraped, 1)
            for family in registry.collect():
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        yield family.name, _line(sample.name, {**sample.labels, **scraped}, sample.value)


def _line(name: str, labels: dict[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"{name}{{{pairs}}} {value!r}"
