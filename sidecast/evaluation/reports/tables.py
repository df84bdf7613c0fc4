"""The comparisons of a farm's results as tables of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sidecast.evaluation.analysis import Interval, Results, Row, Setting
from sidecast.evaluation.grid import BASELINE
from sidecast.evaluation.read_outs import HALF_LIVES, RAW

READ_OUTS = (RAW, *HALF_LIVES)


@dataclass(frozen=True)
class Table:
    """A table with a title.

    Attributes:
        title: What it compares.
        note: What has to be known to read it.
        head: Names of the columns.
        body: Cells, row by row.
    """

    title: str
    note: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


def comparison_tables(results: Results) -> list[Table]:
    """Every arm against the baseline: under its own schedule, read out alike; then every read-out against its raw end.

    Args:
        results: Of a farm.
    """
    tables = [_arms_table(results, setting) for setting in results.settings()]
    tables += [_read_out_table(results, setting) for setting in results.settings()]
    tables += _length_tables(results)
    return [table for table in tables if table.body]


def _arms_table(results: Results, setting: Setting) -> Table:
    rows = []
    for arm in results.arms(setting):
        row = results.compare(setting, arm, RAW, BASELINE, RAW, setting.schedule)
        if row is not None:
            rows.append(_cells(row))
    head = ("arm", "lr, b1", "loss", "- adamw", "better", "steps saved", "worst spike", "overhead")
    note = (
        "Final validation loss of the raw weights. lr and b1 are chosen for each seed by the other seeds, from the "
        "points of the grid that an arm shares with the baseline (* marks a choice at the grid's edge). Intervals: "
        "95 %, Student's t over seeds, paired."
    )
    gaps = results.gaps(setting, BASELINE)
    if gaps:
        note += f" What is lacking: {'. '.join(gaps)}."
    return Table(_title(setting), note, head, rows)


def _read_out_table(results: Results, setting: Setting) -> Table:
    # What a tuned decay reaches is the yardstick for every read-out, those of constant rates above all.
    yardstick = (
        "cosine" if Setting(setting.task, "cosine", setting.num_steps) in results.settings() else setting.schedule
    )
    rows = []
    for arm in results.arms(setting):
        for read_out in READ_OUTS:
            row = results.compare(setting, arm, read_out, BASELINE, RAW, yardstick)
            if row is not None:
                cells = _cells(row)
                rows.append([cells[0], read_out, *cells[1:6]])
    head = ("arm", "read-out", "lr, b1", "loss", f"- adamw, {yardstick}", "better", "steps saved")
    note = f"Read-outs at the end, against the raw weights of tuned {BASELINE} under {yardstick}."
    return Table(_title(setting) + ": read-outs", note, head, rows)


def _length_tables(results: Results) -> list[Table]:
    tables = []
    for task, schedule in sorted({(setting.task, setting.schedule) for setting in results.settings()}):
        rows = []
        for setting in results.settings():
            runs = results.runs(setting, BASELINE, RAW)
            if (setting.task, setting.schedule) != (task, schedule) or runs is None:
                continue
            losses = list(runs.tuned().values())
            best = runs.best()
            mean = sum(losses) / len(losses)
            rows.append([f"{setting.num_steps:,}", f"{best[0]:g}, {best[1]:g}", f"{mean:.4f}", str(len(losses))])
        if len(rows) > 1:
            note = (
                "What equivalent steps are read from: every length is a run of its own, with its own decay and tuning."
            )
            head = ("steps", "lr, b1", "loss", "seeds")
            tables.append(Table(f"{task}, {schedule}: {BASELINE} by length", note, head, rows))
    return tables


def _title(setting: Setting) -> str:
    return f"{setting.task}, {setting.schedule}, {setting.num_steps:,} steps"


def _cells(row: Row) -> list[str]:
    is_itself = row.difference.mean == 0 and row.difference.low in (0, -math.inf)
    saved = "-"
    if row.saved is not None:
        # An interval of values that are cut would be too narrow.
        side = "over" if row.difference.mean < 0 else "under"
        saved = f"{side} {100 * row.saved.mean:.1f} % (cut)" if row.is_saved_bounded else _percent(row.saved)
    return [
        row.arm,
        f"{row.best[0]:g}, {row.best[1]:g}" + (" *" if row.is_edge else ""),
        f"{row.loss.mean:.4f}",
        "" if is_itself else _signed(row.difference),
        "" if is_itself else f"{row.num_better} of {row.difference.num}",
        "" if is_itself else saved,
        f"{row.worst_spike:.3f}",
        f"{100 * row.overhead:.1f} %",
    ]


def _signed(value: Interval) -> str:
    text = f"{value.mean:+.4f}"
    return text if math.isinf(value.low) else f"{text} [{value.low:+.4f}, {value.high:+.4f}]"


def _percent(value: Interval) -> str:
    text = f"{100 * value.mean:.1f} %"
    return text if math.isinf(value.low) else f"{text} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
