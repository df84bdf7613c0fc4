"""What a courier loads at its start: every rank pays for it, and once more for each courier that dies."""

from __future__ import annotations

import subprocess
import sys

# Of a rank whose metrics nobody asks for, and of every rank.
NOT_UNSERVED = {"prometheus_client", "http.server", "wsgiref"}
NEVER = {"torch", "deepspeed", "transformers", "ray", "scipy", "safetensors", "pydantic"}


def test_a_courier_loads_no_more_than_it_needs() -> None:
    program = "import sys, sidecast.trainer.courier.__main__; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert "sidecast.trainer.courier.process" in loaded
    assert loaded & (NOT_UNSERVED | NEVER) == set()
