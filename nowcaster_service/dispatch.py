"""Hands nowcasts that are due to an engine, and their results back to the session."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from sidecast.nowcaster_service.engines.turns import Turns
from sidecast.nowcaster_service.errors import EngineGoneError
from sidecast.nowcaster_service.keeping.run_folder import Note
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest, PredictorRequest
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest
from sidecast.nowcaster_service.probing.losses import ProbeTask
from sidecast.nowcaster_service.pushing import PushRequest
from sidecast.nowcaster_service.read_outs.averages import FoldTask
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings

log = logging.getLogger(__name__)

# What changes nothing but its own file can be made again if its engine dies.
MAX_ATTEMPTS = 2


class Predictions(Protocol):
    """Whoever runs predictors: an actor pool in the service, the test's own process in tests."""

    async def predict(self, request: NowcastRequest) -> NowcastAnswer: ...

    async def push(self, request: PushRequest) -> NowcastAnswer: ...

    async def fold(self, request: FoldRequest) -> FoldAnswer: ...

    async def evaluate(self, request: ProbeRequest) -> ProbeAnswer: ...

    async def replace_probe(self) -> None:
        """The same as ``replace`` for what evaluates, which may be gone only later."""
        ...

    async def ready(self) -> None:
        """Returns once an engine can begin."""
        ...

    async def replace(self) -> None:
        """Ends an engine that may never answer; what it was doing raises EngineGoneError. Returns once it is gone."""
        ...


class Dispatcher:
    """Runs nowcasts as tasks of the event loop.

    Args:
        engines: Who makes them.
        timeout_s: One that an engine takes longer for is given up, and so is the engine.
        clock: Monotonic seconds.
    """

    def __init__(self, engines: Predictions, timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engines
        self._timeout_s = timeout_s
        self._tasks: set[asyncio.Task[None]] = set()
        # A push is worth little after a few steps: it waits for other pushes only.
        self._nowcasts, self._pushes, self._folds = Turns(clock=clock), Turns(clock=clock), Turns(clock=clock)
        self._probes = Turns(clock=clock)

    @property
    def queues(self) -> Mapping[str, Turns]:
        """Who works and who waits, by the kind of work."""
        return {"nowcasts": self._nowcasts, "pushes": self._pushes, "read-outs": self._folds}

    def start(self, session: Session, task: NowcastTask) -> None:
        """Begins a nowcast, whose end the session will be told."""
        self._spawn(self._nowcast(session, task))

    def fold(self, session: Session) -> None:
        """Begins to average a snapshot into the session's read-outs, if one is due and nobody does it yet."""
        if session.read_outs.claim():
            self._spawn(self._fold(session))

    async def _fold(self, session: Session) -> None:
        while (task := await self._next_fold(session)) is not None:
            try:
                async with self._folds.turn(session.settings.run_id):
                    answer = await self._folded(session, task)
            except Exception:
                log.exception("the read-out %s could not be averaged", task.read_out.name)
                answer = FoldAnswer(refusal="the engine failed; the service's log says how")
            session.finish_fold(task, answer)
        if (probe := session.read_outs.probe.claim()) is not None:
            self._spawn(self._probe(session, probe))

    async def _next_fold(self, session: Session) -> FoldTask | None:
        while session.read_outs.needs_vector and await session.prepare():
            pass
        return session.read_outs.next()

    async def _folded(self, session: Session, task: FoldTask) -> FoldAnswer:
        request = fold_request(session.settings, task)
        for _ in range(MAX_ATTEMPTS):
            await self._engines.ready()
            try:
                return await asyncio.wait_for(self._engines.fold(request), self._timeout_s)
            except TimeoutError:
                log.warning("the read-out %s takes too long: its engine is replaced", task.read_out.name)
                await self._engines.replace()
                # The next one would take as long, and cost others their engine again.
                session.read_outs.give_up()
                return FoldAnswer(refusal=f"it took longer than {self._timeout_s:g} s; this run has no more of them")
            except EngineGoneError as error:
                log.warning("the read-out %s was not averaged: %s", task.read_out.name, error)
        return FoldAnswer(refusal="the engine ended in the middle of it")

    async def _probe(self, session: Session, task: ProbeTask) -> None:
        losses: dict[str, float] = {}
        fault, is_hopeless = "", False
        try:
            # All of a step in one turn: the next run's is another model.
            async with self._probes.turn(session.settings.run_id):
                for name, average in task.averages.items():
                    answer = await self._evaluated(session.settings, average.vector.path)
                    if answer.is_hopeless:
                        fault, is_hopeless = answer.refusal, True
                        break
                    if answer.refusal:
                        fault = f"{name}: {answer.refusal}"
                    else:
                        losses[name] = answer.loss
        except Exception:
            log.exception("the probe of step %d failed", task.step)
            fault, is_hopeless = "the engine failed; the service's log says how", True
        session.finish_probe(task, losses, fault, is_hopeless=is_hopeless)
        self.fold(session)

    async def _evaluated(self, settings: SessionSettings, path: Path) -> ProbeAnswer:
        request = ProbeRequest(manifest_json=settings.manifest.to_json(), vector_path=path)
        for _ in range(MAX_ATTEMPTS):
            try:
                return await asyncio.wait_for(self._engines.evaluate(request), self._timeout_s)
            except TimeoutError:
                await self._engines.replace_probe()
                # The next one would take as long.
                refusal = f"it took longer than {self._timeout_s:g} s; this run has no more probes"
                return ProbeAnswer(refusal=refusal, is_hopeless=True)
            except EngineGoneError as error:
                log.warning("a loss was not evaluated: %s", error)
        # As when a model does not fit into memory.
        return ProbeAnswer(refusal="the engine ended in the middle of it", is_hopeless=True)

    async def _nowcast(self, session: Session, task: NowcastTask) -> None:
        try:
            turns = self._pushes if isinstance(task, PushTask) else self._nowcasts
            async with turns.turn(session.settings.run_id):
                answer = await self._made(session, task)
        except Exception:
            log.exception("the nowcast of step %d failed", task.base_step)
            answer = NowcastAnswer(refusal="the predictor failed; the service's log says how")
        prediction = None
        if not answer.refusal and not answer.is_empty:
            prediction = Prediction(task, answer.digest, answer.relative_norm, answer.nowcast_s)
        session.finish(task, prediction, answer.refusal, carry_digest=answer.carry_digest)

    async def _made(self, session: Session, task: NowcastTask) -> NowcastAnswer:
        # A nowcast can be made again from the same states if its engine dies, a push not: it goes into the average.
        for _ in range(1 if isinstance(task, PushTask) else MAX_ATTEMPTS):
            await self._engines.ready()
            try:
                # From when the engine has nothing else to do: waiting is nobody's fault.
                return await asyncio.wait_for(self._ask(session, task), self._timeout_s)
            except TimeoutError:
                log.warning("the nowcast of step %d takes too long: its engine is replaced", task.base_step)
                # Before anybody else's turn, and before files are let go that it may still write to.
                await self._engines.replace()
                return NowcastAnswer(refusal=f"the nowcast took longer than {self._timeout_s:g} s")
            except EngineGoneError as error:
                log.warning("the nowcast of step %d was not made: %s", task.base_step, error)
        return NowcastAnswer(refusal="the engine ended in the middle of it")

    async def _ask(self, session: Session, task: NowcastTask) -> NowcastAnswer:
        settings = session.settings
        if isinstance(task, PushTask):
            return await self._engines.push(push_request(settings, task, session.note(task)))
        return await self._engines.predict(
            NowcastRequest(
                predictor=PredictorRequest(
                    predictor=settings.predictor,
                    options=settings.predictor_options,
                    manifest_json=settings.manifest.to_json(),
                    context_len=settings.context_len,
                ),
                state_paths=tuple(vector.path for vector in task.states),
                delta_path=task.delta.path,
                horizon_intervals=task.horizon_intervals,
                max_relative_norm=settings.max_relative_norm,
                rounds_to_bf16=settings.rounds_to_bf16,
            )
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop holds tasks weakly; an unreferenced one may vanish half-way.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def push_request(settings: SessionSettings, task: PushTask, note: Note | None = None) -> PushRequest:
    """What an engine is told of a push to be made.

    Args:
        settings: Of the session.
        task: What is to be made.
        note: Where to note that the new average is whole; None: nowhere.
    """
    assert settings.push is not None, "the session has made a push of it"
    return PushRequest(
        manifest_json=settings.manifest.to_json(),
        push=settings.push,
        step=task.base_step,
        num_steps=task.num_steps,
        learning_rate_sum=task.learning_rate_sum,
        state_path=task.states[-1].path,
        before_path=task.before.vector.path,
        begins=task.begins,
        applied_path=None if task.applied is None else task.applied.path,
        applied_weight=task.applied_weight,
        delta_path=task.delta.path,
        max_relative_norm=settings.max_relative_norm,
        rounds_to_bf16=settings.rounds_to_bf16,
        note=note,
        factor=task.factor,
    )


def fold_request(settings: SessionSettings, task: FoldTask) -> FoldRequest:
    """What an engine is told of a state to be averaged."""
    return FoldRequest(
        manifest_json=settings.manifest.to_json(),
        state_path=task.snapshot.vector.path,
        before_path=None if task.before is None else task.before.vector.path,
        out_path=task.out.path,
        share=task.share,
    )
