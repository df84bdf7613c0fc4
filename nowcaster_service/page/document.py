"""The page as one document, which loads nothing else and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

STYLE_PLACE, SCRIPT_PLACE, TOKEN_PLACE = "/* page.css */", "/* page.js */", "needs-token-unknown"


@dataclass(frozen=True)
class Document:
    """The page.

    Attributes:
        body: HTML, in UTF-8.
        policy: What a browser is to let it do: the value of ``Content-Security-Policy``.
    """

    body: bytes
    policy: str


@cache
def document(*, needs_token: bool) -> Document:
    """Puts the page together, once.

    Args:
        needs_token: Whether it asks for a token before it asks for anything else.
    """
    html, style, script = ((files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    body = html.replace(STYLE_PLACE, style).replace(SCRIPT_PLACE, script)
    body = body.replace(TOKEN_PLACE, "needs-token" if needs_token else "open")
    policy = (
        "default-src 'none'; "
        f"script-src {_source(script)}; style-src {_source(style)}; "
        # The icon is written in the page.
        "img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Document(body.encode(), policy)


def _source(text: str) -> str:
    """Names a script or style by what it says: no other is run, whoever gets it into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
