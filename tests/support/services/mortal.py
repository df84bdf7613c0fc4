"""A real service in a process of its own, all of it but Ray, that ends with kill -9 at a point which a test chooses.

Its engine is a thread of the same process, and dies with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sidecast import atomic_files
from sidecast.nowcaster_service import pushing
from sidecast.nowcaster_service.keeping import kept_runs
from sidecast.nowcaster_service.keeping.run_folder import Recorder
from sidecast.nowcaster_service.nowcasting import (
    LocalRunner,
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.pushing import PushRequest
from sidecast.nowcaster_service.read_outs import folding
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.snapshots import Snapshot
from sidecast.nowcaster_service.vector_store import RECORD_NAME
from sidecast.policies import push
from tests.support.limits import HANG_S
from tests.support.programs.forking import forking_context
from tests.support.services.harness import RunningService, SteadyEngines


class ThreadEngines(SteadyEngines):
    """Runs the real predictors in threads of this process."""

    def __init__(self) -> None:
        self._nowcasting = Nowcasting(None)

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        return await asyncio.to_thread(self._nowcasting.check, request)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return await asyncio.to_thread(self._nowcasting.predict, request)

    async def push(self, request: PushRequest) -> NowcastAnswer:
        return await asyncio.to_thread(self._nowcasting.push, request)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def before(is_due: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Any]:
    """Dies instead of a call."""

    def wrap(call: Any) -> Any:
        def dying(*args: Any, **kwargs: Any) -> Any:
            if is_due(*args, **kwargs):
                die()
            return call(*args, **kwargs)

        return dying

    return wrap


def after(is_due: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Any]:
    """Dies when a call is done."""

    def wrap(call: Any) -> Any:
        def dying(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if is_due(*args, **kwargs):
                die()
            return result

        return dying

    return wrap


class Nth:
    """True when it is asked for the n-th time."""

    def __init__(self, number: int) -> None:
        self._left = number

    def __call__(self, *_: Any, **__: Any) -> bool:
        self._left -= 1
        return self._left == 0


def half_of_the_delta(is_due: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Any]:
    def wrap(predict: Any) -> Any:
        def dying(self: Any, predictor: Any, files: Any, horizon_intervals: int, delta_path: Path) -> None:
            if is_due():
                with delta_path.open("r+b") as file:
                    file.write(b"\x11" * (delta_path.stat().st_size // 2))
                die()
            predict(self, predictor, files, horizon_intervals, delta_path)

        return dying

    return wrap


def half_of_the_push(is_due: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Any]:
    def wrap(mul: Any) -> Any:
        def dying(carry_P: torch.Tensor, factor: float, out: torch.Tensor) -> torch.Tensor:
            if is_due():
                out[: len(out) // 2] = mul(carry_P[: len(out) // 2], factor)
                die()
            return mul(carry_P, factor, out=out)

        return dying

    return wrap


def half_of_the_average(step: int) -> Callable[[Any], Any]:
    """Of a run with two read-outs and a snapshot at every tenth step: in the second one, which begins after step 30."""
    is_due = Nth(step // 5 - 3)

    def wrap(fold: Any) -> Any:
        def dying(before_P: torch.Tensor, state_P: torch.Tensor, share: float, out_P: torch.Tensor) -> bool:
            if is_due():
                out_P[: len(out_P) // 2] = state_P[: len(out_P) // 2]
                die()
            return bool(fold(before_P, state_P, share, out_P))

        return dying

    return wrap


def _second_piece(step: int) -> None:
    push._PIECE_ELEMENTS = 1 << 13
    pieces = Nth(2)
    averaged = {"step": 0}

    def wrap(average: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            averaged["step"] = kwargs["step"]
            return average(*args, **kwargs)

        return noting

    replaced(pushing, "average_interval_", wrap)
    replaced(push, "fold_", before(lambda *_: averaged["step"] == step and pieces()))


def _states_end_with(step: int) -> Callable[..., bool]:
    return lambda recorder, record: record is not None and bool(record.states) and record.states[-1].step == step


def _replacing(step: int) -> None:
    """Dies when the record is written, and has not yet taken the place of the one before."""
    is_there = threading.Event()

    def wrap(write: Any) -> Any:
        def noting(recorder: Any, record: Any) -> None:
            if _states_end_with(step)(recorder, record):
                is_there.set()
            write(recorder, record)

        return noting

    replaced(Recorder, "write", wrap)
    replaced(atomic_files.os, "replace", before(lambda *_: is_there.is_set()))


class NthEvent:
    """True from when it is asked for the n-th time, but not while a nowcast is made that an earlier service has begun.

    One that two services have died over is given up, and a run is then given less.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self._is_making_again = False

    def __call__(self, *_: Any, **__: Any) -> bool:
        self._left -= 1
        return self._left <= 0 and not self._is_making_again

    def restoring(self, restore: Any) -> Any:
        """Notes that ``Session.restore`` begins a nowcast again."""

        def noting(session: Session, kept: Any) -> Any:
            self._is_making_again = True
            task = restore(session, kept)
            self._is_making_again = task is not None
            return task

        return noting

    def finishing(self, finish: Any) -> Any:
        """Notes that ``Session.finish`` ends it."""

        def noting(*args: Any, **kwargs: Any) -> None:
            finish(*args, **kwargs)
            self._is_making_again = False

        return noting


def _nth_event(number: int) -> None:
    """Dies at one of the moments in which something is half done, or done and not yet known to others.

    Not before an average is noted to be whole, which costs the interval: what a run is given is then not the same.
    """
    is_due = NthEvent(number)
    replaced(Session, "restore", is_due.restoring)
    replaced(Session, "finish", is_due.finishing)
    replaced(Snapshot, "take", after(is_due))
    replaced(Session, "commit", before(is_due))
    replaced(Recorder, "write", before(is_due))
    replaced(Recorder, "write", after(is_due))
    replaced(atomic_files.os, "replace", before(lambda _, path: Path(path).name == RECORD_NAME and is_due()))
    replaced(LocalRunner, "predict", half_of_the_delta(is_due))
    replaced(torch, "mul", half_of_the_push(is_due))
    replaced(Session, "finish", before(is_due))
    replaced(Session, "finish", after(is_due))
    replaced(kept_runs, "examine", before(is_due))
    replaced(Session, "restore", before(is_due))


DEATHS: dict[str, Callable[[int], None]] = {
    "in an upload": lambda step: replaced(
        Snapshot, "take", after(lambda self, frame, *_: frame.key.id == step and frame.offset_bytes > 0)
    ),
    "between two ranks' commits": lambda step: replaced(
        Session, "commit", before(lambda self, request: (request.step, request.rank) == (step, 1))
    ),
    "before the record of a commit": lambda step: replaced(Recorder, "write", before(_states_end_with(step))),
    "in the record of a commit": _replacing,
    "after the record of a commit": lambda step: replaced(Recorder, "write", after(_states_end_with(step))),
    "in the nowcast": lambda step: replaced(LocalRunner, "predict", half_of_the_delta()),
    "before publication": lambda step: replaced(
        Session, "finish", before(lambda self, task, *_, **__: task.base_step == step)
    ),
    "after publication": lambda step: replaced(
        Session, "finish", after(lambda self, task, *_, **__: task.base_step == step)
    ),
    "in the average": _second_piece,
    "in a read-out": lambda step: replaced(folding, "fold", half_of_the_average(step)),
    "before a read-out is known": lambda step: replaced(
        Session, "finish_fold", before(lambda self, task, *_: task.snapshot.step == step)
    ),
    "after a read-out is known": lambda step: replaced(
        Session, "finish_fold", after(lambda self, task, *_: task.snapshot.step == step)
    ),
    "in the push": lambda step: replaced(torch, "mul", half_of_the_push()),
    "while it looks at what is left": lambda step: replaced(kept_runs, "examine", before()),
    "when it goes on with what is left": lambda step: replaced(Session, "restore", before()),
    "at an event": _nth_event,
}


def serve(link: Connection, folder: Path, port: int, death: str, step: int) -> None:
    """Serves until it dies, or the test goes away."""
    # Threads that wait for one another are slow on a busy machine, and there is little to do.
    torch.set_num_threads(1)
    if death:
        DEATHS[death](step)
    service = RunningService(folder, port, engines=ThreadEngines())
    service.__enter__()
    link.send(service.port)
    try:
        link.recv()
    except EOFError:
        os._exit(0)


class MortalService:
    """Starts one service after another at one port and in one folder.

    Attributes:
        num_deaths: How many have died.
    """

    def __init__(self) -> None:
        self._context = forking_context()
        self._folder = Path(tempfile.mkdtemp(prefix="mortal-"))
        self._process: Any = None
        self.port = 0
        self.num_deaths = 0

    @property
    def history(self) -> Path:
        """The folder of all services' histories."""
        return self._folder / "vectors"

    def start(self, death: str = "", step: int = 0) -> None:
        """Starts one that will die as it is told: at that step, or that event, where one is meant."""
        self._link, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=serve, args=(theirs, self._folder, self.port, death, step), daemon=True
        )
        self._process.start()
        theirs.close()
        assert self._link.poll(HANG_S)
        self.port = self._link.recv()

    def await_death(self) -> None:
        """Returns once it has died, by no other hand than its own."""
        self._process.join(HANG_S)
        assert self._process.exitcode == -signal.SIGKILL
        self.num_deaths += 1

    def kill(self) -> None:
        self._process.kill()
        self._process.join(HANG_S)
