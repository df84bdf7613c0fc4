"""Writes the list of decision records in adr/README.md, or checks that it is current."""

from __future__ import annotations

from pathlib import Path

from generated_part import write_or_check

RECORDS = Path(__file__).resolve().parent / "adr"


def index() -> str:
    """One line for each record, by number, in Markdown."""
    lines = []
    for path in sorted(RECORDS.glob("[0-9]*.md")):
        number, _, title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        lines.append(f"| {number} | [{title}]({path.name}) |\n")
    return "| | decision |\n| --- | --- |\n" + "".join(lines)


if __name__ == "__main__":
    raise SystemExit(write_or_check(RECORDS / "README.md", index(), __doc__))
