"""The service's actors as the servicer sees them: calls that may be awaited, and what becomes of those that die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NoReturn

import ray

from sidecast.errors import one_line
from sidecast.nowcaster_service.errors import EngineGoneError
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest, PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest
from sidecast.nowcaster_service.pushing import PushRequest
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest

# How often somebody asks whether the engines, and the ingress, are there; and after which silence they count as gone.
WATCH_INTERVAL_S = 2.0
SILENCE_S = 15.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0


class RayEngines:
    """The engine actor as the servicer sees it. Ray starts it again whenever it dies.

    Args:
        actor: The engine.
        probe: What evaluates read-outs; None where nothing does.
    """

    def __init__(self, actor: Any, probe: Any | None = None) -> None:
        self._actor = actor
        self._probe = probe
        self._life = ""
        self._answered_s = time.monotonic()

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        await self.ready()
        return await self._call(self._actor.check, request)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return await self._call(self._actor.predict, request)

    async def push(self, request: PushRequest) -> NowcastAnswer:
        return await self._call(self._actor.push, request)

    async def fold(self, request: FoldRequest) -> FoldAnswer:
        return await self._call(self._actor.fold, request)

    async def evaluate(self, request: ProbeRequest) -> ProbeAnswer:
        assert self._probe is not None, "without a probe no session has one"
        await self._await_probe(self._probe)
        return await self._call(self._probe.evaluate, request)

    async def _await_probe(self, probe: Any) -> None:
        # Calls to an actor that Ray is starting again fail at once, whoever's model has ended the one before.
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._call(probe.__ray_ready__)
                return
            except EngineGoneError:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def replace_probe(self) -> None:
        if self._probe is not None:
            # Ray starts another one.
            ray.kill(self._probe, no_restart=False)

    async def ready(self) -> None:
        await self._await_life(lambda life: True)

    async def replace(self) -> None:
        ended = self._life
        # Ray starts another one.
        ray.kill(self._actor, no_restart=False)
        await self._await_life(lambda life: life != ended)

    def fault(self) -> str:
        silent_s = time.monotonic() - self._answered_s
        return f"no engine has answered for {silent_s:.0f} s" if silent_s > SILENCE_S else ""

    async def watch(self) -> NoReturn:
        """Asks the engine for a sign of life for ever."""
        while True:
            await self.ready()
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _await_life(self, is_wanted: Callable[[str], bool]) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                life = await self._call(self._actor.life)
            except EngineGoneError:
                life = ""
            if life and is_wanted(life):
                self._life, self._answered_s = life, time.monotonic()
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _call(self, method: Any, *args: Any) -> Any:
        try:
            return await method.remote(*args)
        except ray.exceptions.RayTaskError:
            # Of the call itself, not of the engine.
            raise
        except ray.exceptions.RayError as error:
            raise EngineGoneError(f"the engine is gone: {one_line(error)}") from error
