"""Whose nowcast an engine makes next, when its time begins, and what becomes of those that it never ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sidecast.nowcaster_service.dispatch import Dispatcher
from sidecast.nowcaster_service.engines.turns import Turns
from sidecast.nowcaster_service.errors import EngineGoneError
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest
from sidecast.nowcaster_service.session_events import NowcastTask
from tests.support.services.harness import MANIFEST, FakeClock, SteadyEngines

GOOD = NowcastAnswer(digest=1)


async def settle() -> None:
    """Lets everything happen that needs no more than the event loop."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_who_had_least_of_the_engine_is_next() -> None:
    clock, order = FakeClock(), list[str]()

    async def work(turns: Turns, run: str, seconds: float) -> None:
        async with turns.turn(run):
            clock.now_s += seconds
            order.append(run)
            await settle()

    async def both() -> None:
        turns = Turns(clock=clock)
        await work(turns, "large", 100.0)
        await work(turns, "small", 1.0)
        order.clear()
        # All come while somebody is at it, the large one first.
        waves = [("other", 1.0), ("large", 100.0), ("small", 1.0), ("new", 1.0), ("small", 1.0)]
        await asyncio.gather(*(work(turns, *wave) for wave in waves))

    asyncio.run(both())
    assert order == ["other", "new", "small", "small", "large"]


def test_a_run_that_comes_back_is_owed_nothing() -> None:
    clock, order = FakeClock(), list[str]()

    async def work(turns: Turns, run: str) -> None:
        async with turns.turn(run):
            clock.now_s += 10.0
            order.append(run)
            await settle()

    async def all_of_them() -> None:
        turns = Turns(clock=clock)
        # Two runs have taken turns for long.
        await asyncio.gather(*(work(turns, run) for _ in range(5) for run in ("a", "b")))
        order.clear()
        await asyncio.gather(*(work(turns, run) for run in ("a", *["new"] * 5, "a")))

    asyncio.run(all_of_them())
    # The new one does not catch up with what the others had before it came.
    assert order[-1] == "new"
    assert "a" in order[1:]


def test_who_goes_away_in_the_queue_leaves_the_turn_to_the_next() -> None:
    async def scene() -> list[str]:
        turns, order, may_end = Turns(), list[str](), asyncio.Event()

        async def work(run: str) -> None:
            async with turns.turn(run):
                order.append(run)
                await may_end.wait()

        tasks = [asyncio.create_task(work(run)) for run in "abcd"]
        await settle()
        tasks[1].cancel()
        await settle()
        tasks[0].cancel()
        # c was called in this moment, and goes away before it could begin.
        while not tasks[0].done():
            await asyncio.sleep(0)
        tasks[2].cancel()
        await settle()
        may_end.set()
        await tasks[3]
        async with asyncio.timeout(10), turns.turn("e"):
            order.append("e")
        return order

    assert asyncio.run(scene())[-2:] == ["d", "e"]


class Engines(SteadyEngines):
    """One engine; a test says what becomes of each nowcast by its base step."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ends: dict[int, list[Any]] = {}
        self.is_ready = asyncio.Event()
        self.is_ready.set()

    async def ready(self) -> None:
        await self.is_ready.wait()

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        step = int(request.delta_path.name)
        self.begun.append(step)
        end = self.ends.get(step, [GOOD]).pop(0)
        if isinstance(end, asyncio.Event):
            await end.wait()
            return GOOD
        if isinstance(end, Exception):
            raise end
        return NowcastAnswer(**vars(end))

    async def push(self, request: object) -> NowcastAnswer:
        raise NotImplementedError

    async def check(self, request: object) -> Any:
        raise NotImplementedError


class Run(SimpleNamespace):
    """A session that notes how its nowcasts end."""

    def __init__(self, run_id: str) -> None:
        super().__init__(ended=[])
        self.settings: Any = SimpleNamespace(
            run_id=run_id,
            predictor="fake",
            predictor_options={},
            manifest=MANIFEST,
            context_len=2,
            max_relative_norm=1.0,
            rounds_to_bf16=False,
        )

    def finish(self, task: NowcastTask, prediction: object, reason: str, *, carry_digest: int) -> None:
        self.ended.append(reason or "published")


def task(step: int) -> NowcastTask:
    delta: Any = SimpleNamespace(path=Path(f"/{step}"))
    return NowcastTask(version=1, base_step=step, epoch=0, horizon_intervals=1, states=(), delta=delta)


def test_a_nowcast_that_hangs_costs_its_engine_and_nobody_elses_nowcast() -> None:
    async def scene() -> tuple[Run, Run, Engines]:
        engines = Engines()
        hung, other = Run("hung"), Run("other")
        engines.ends[10] = [asyncio.Event()]
        dispatcher = Dispatcher(engines, 0.05)
        dispatcher.start(hung, task(10))  # type: ignore[arg-type]
        dispatcher.start(other, task(20))  # type: ignore[arg-type]
        await asyncio.gather(*dispatcher._tasks)
        return hung, other, engines

    hung, other, engines = asyncio.run(scene())
    assert hung.ended == ["the nowcast took longer than 0.05 s"]
    # Its own time began when the engine was free.
    assert other.ended == ["published"]
    assert (engines.begun, engines.num_replaced) == ([10, 20], 1)


def test_no_time_passes_for_a_nowcast_while_there_is_no_engine() -> None:
    async def scene() -> Run:
        engines, run = Engines(), Run("r")
        engines.is_ready.clear()
        dispatcher = Dispatcher(engines, 0.01)
        dispatcher.start(run, task(10))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        assert run.ended == []
        engines.is_ready.set()
        await asyncio.gather(*dispatcher._tasks)
        return run

    assert asyncio.run(scene()).ended == ["published"]


def test_a_nowcast_whose_engine_dies_is_made_once_more() -> None:
    async def scene() -> tuple[Run, Engines]:
        engines, run = Engines(), Run("r")
        gone = EngineGoneError("the engine is gone")
        engines.ends = {10: [gone, GOOD], 20: [gone, gone]}
        dispatcher = Dispatcher(engines, 10.0)
        for step in (10, 20):
            dispatcher.start(run, task(step))  # type: ignore[arg-type]
        await asyncio.gather(*dispatcher._tasks)
        return run, engines

    run, engines = asyncio.run(scene())
    assert engines.begun == [10, 10, 20, 20]
    assert run.ended == ["published", "the engine ended in the middle of it"]
