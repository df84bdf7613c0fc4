"""The one limit on what a test waits for."""

from __future__ import annotations

HANG_S = 600.0
"""Ends what hangs, and nothing else: a machine may be as slow, and as busy with other work, as it likes. Nothing that a
test is about waits for it, so that it costs no time."""
