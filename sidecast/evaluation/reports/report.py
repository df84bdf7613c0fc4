"""A farm's results as Markdown and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from sidecast.evaluation.analysis import Results
from sidecast.evaluation.reports.charts import loss_chart
from sidecast.evaluation.reports.tables import Table, comparison_tables

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:right}th:first-child,td:first-child{text-align:left}p.note{color:#555}"
)


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown."""
    parts = []
    for table in tables:
        lines = [f"## {table.title}", "", table.note, "", _line(table.head), _line(["---"] * len(table.head))]
        parts.append("\n".join([*lines, *(_line(row) for row in table.body)]))
    return "\n\n".join(parts) + "\n"


def html_page(results: Results, conditions: str) -> str:
    """Charts and tables as a self-contained page.

    Args:
        results: Of a farm.
        conditions: One line about versions and hardware.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>sidecast evaluate</title>",
        f"<style>{_STYLE}</style><h1>What it is worth</h1><p>{html.escape(conditions)}</p>",
    ]
    parts += [loss_chart(results, setting) for setting in results.settings()]
    parts += [_html_table(table) for table in comparison_tables(results)]
    return "\n".join(parts) + "</html>\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.body)
    title, note = html.escape(table.title), html.escape(table.note)
    return f"<h2>{title}</h2><p class=note>{note}</p><table><tr>{head}</tr>{body}</table>"
