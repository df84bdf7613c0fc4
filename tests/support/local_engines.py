"""Engines that predict and push as a service's do, on threads of this process instead of Ray's actors."""

from __future__ import annotations

import asyncio
import threading

from sidecast.nowcaster_service.nowcasting import (
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.pushing import PushRequest
from tests.support.services.harness import SteadyEngines


class LocalEngines(SteadyEngines):
    """Real predictors and pushes.

    Attributes:
        may_finish: Of no use: nothing here waits for a test.
    """

    def __init__(self) -> None:
        self.may_finish = threading.Event()
        self._nowcasting = Nowcasting(None)

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        return await asyncio.to_thread(self._nowcasting.check, request)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return await asyncio.to_thread(self._nowcasting.predict, request)

    async def push(self, request: PushRequest) -> NowcastAnswer:
        return await asyncio.to_thread(self._nowcasting.push, request)
