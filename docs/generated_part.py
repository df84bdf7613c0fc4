"""The part of a page that is made from something else, between two marks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


def write_or_check(page: Path, text: str, purpose: str | None) -> int:
    """Puts the generated part into its page, or with ``--check`` only says whether it is current.

    Args:
        page: A Markdown file that has both marks.
        text: What belongs between them, whole lines.
        purpose: What the script does, for ``--help``.

    Returns:
        The script's exit status: 1 if the page was to be checked and is stale, else 0.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the page is stale")
    is_check = parser.parse_args().check
    written = page.read_text()
    before, begin, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.stderr.write(f"{page} has no part between {BEGIN.strip()} and {END.strip()}\n")
        return 1
    current = f"{before}{BEGIN}{text}{END}{after}"
    if is_check and current != written:
        sys.stderr.write(f"{page} is stale; run `make docs`\n")
        return 1
    if not is_check:
        page.write_text(current)
    return 0
