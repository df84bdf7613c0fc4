"""Writes the tables of metrics.md from the series that both sides register, or checks that they are current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generated_part import write_or_check
from prometheus_client import CollectorRegistry

from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.trainer.courier.metrics import CourierMetrics

PAGE = Path(__file__).resolve().parent / "metrics.md"
# As the text format of Prometheus names and types them.
SUFFIXES = {"counter": "_total", "info": "_info"}
TYPES = {"info": "gauge"}
UNITS = ("seconds", "bytes")


def tables() -> str:
    """Both tables, in Markdown."""
    trainer = CourierMetrics("run", rank=0, stage="2")
    service = ServiceMetrics(CollectorRegistry())
    return _table("Series of the service", service.registry) + "\n" + _table("Series of each rank", trainer.registry)


def _table(title: str, registry: CollectorRegistry) -> str:
    lines = [f"### {title}", "", "| series | type | labels | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    # The public way to a registry's series leaves out those without a value yet, and all labels.
    lines += [_row(collector) for collector in registry._collector_to_names]
    return "\n".join(lines) + "\n"


def _row(collector: Any) -> str:
    (family,) = collector.describe()
    name = family.name + SUFFIXES.get(family.type, "")
    labels = ", ".join(f"`{label}`" for label in _labels(collector, family.type))
    unit = next((unit for unit in UNITS if unit in family.name.split("_")), "")
    kind = TYPES.get(family.type, family.type)
    meaning = family.documentation.replace("|", "\\|")
    return f"| `{name}` | {kind} | {labels} | {unit} | {meaning} |"


def _labels(collector: Any, kind: str) -> tuple[str, ...]:
    # What an info says is labels, too; the run's is its identity.
    return (*collector._labelnames, "run_id") if kind == "info" else collector._labelnames


if __name__ == "__main__":
    raise SystemExit(write_or_check(PAGE, tables(), __doc__))
