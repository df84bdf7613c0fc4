"""The service's actors as the servicer sees them, with stand-ins for Ray's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from sidecast.nowcaster_service.engines import ray_engines
from sidecast.nowcaster_service.engines.ray_engines import RayEngines
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest


class StartingActor:
    """An actor that Ray is starting again: calls fail at once, the first few times.

    Attributes:
        num_failures: Calls that will fail.
        num_evaluated: Evaluations that were asked for.
    """

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.num_evaluated = 0

    def __getattr__(self, name: str) -> Any:
        async def remote(*_: object) -> Any:
            self.num_evaluated += name == "evaluate"
            if self.num_failures:
                self.num_failures -= 1
                raise ray.exceptions.ActorUnavailableError("it restarts", None)
            return ProbeAnswer(loss=1.5) if name == "evaluate" else True

        return SimpleNamespace(remote=remote)


def test_an_evaluation_waits_for_a_probe_that_is_being_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run's model may have ended it, which must not cost this one its probes."""
    monkeypatch.setattr(ray_engines, "FIRST_BACKOFF_S", 0.0)
    probe = StartingActor(num_failures=4)
    engines = RayEngines(None, probe)
    request = ProbeRequest(manifest_json="{}", vector_path=Path("vector"))
    assert asyncio.run(engines.evaluate(request)).loss == 1.5
    assert probe.num_evaluated == 1
