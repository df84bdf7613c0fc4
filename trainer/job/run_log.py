"""A run's metrics as JSON lines: what the loop writes, and what reports and the demo read.

Every record has a ``kind`` and, except ``run`` and ``summary``, a ``step`` (optimizer steps done so far):
``run`` (settings, versions), ``train``, ``validation``, ``nowcast`` and ``summary``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_NAME = "metrics.jsonl"

Record = Mapping[str, Any]
Sink = Callable[[Record], None]


class RunLog:
    """Appends records to a run's metrics file, each flushed, so that a reader can follow a running job.

    Args:
        run_dir: The run's directory; it is created.
        resume_step: None starts the file anew; a number keeps the records up to that step and goes on behind them.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        path = run_dir / METRICS_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        kept: list[Record] = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_records(path) if _happened_by(record, resume_step)]
        self._file = path.open("w", encoding="utf-8")
        for record in kept:
            self(record)

    def __call__(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[Record]:
    """The complete records of a metrics file; a line that is still being written is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def is_pushed(run: Record) -> bool:
    """Whether a ``run`` record is of a run with pushes."""
    policy = run.get("deepspeed", {}).get("nowcaster", {}).get("policy")
    return bool(policy == "push")


def _happened_by(record: Record, step: int) -> bool:
    return record["kind"] != "summary" and record.get("step", 0) <= step
