"""grpc.health.v1 in the few bytes that it takes: what an orchestrator asks before it sends anybody, or restarts us.

Without a token: it says whether the service is of use, and nothing about who uses it.
"""

from __future__ import annotations

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# HealthCheckResponse: field 1, an enum.
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def asks_for(request: bytes, service_name: str) -> bool:
    """Whether a HealthCheckRequest is about the whole server, or this service of it."""
    name = service_name.encode()
    # Field 1, a string; names are short.
    return request in (b"", b"\x0a\x00", b"\x0a" + bytes((len(name),)) + name)
