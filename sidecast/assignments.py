"""``KEY=VALUE``, as commands take settings."""

from __future__ import annotations

import json
from typing import Any


def parse_assignment(text: str) -> tuple[str, Any] | None:
    """The key and the value of an assignment; the value is JSON, or else the text itself.

    Returns:
        None if the text is no assignment: it has no ``=``, or nothing before it.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        return None
    try:
        return key, json.loads(value)
    # Brackets that are nested too deep are no JSON either.
    except (ValueError, RecursionError):
        return key, value
