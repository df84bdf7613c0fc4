"""Runs the groups of a farm in this process or in several, each with threads of its own, and keeps what they find."""

from __future__ import annotations

import multiprocessing
import os
import platform
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sidecast.evaluation.corpora import Corpus, load_corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.gradients import Engine, Gradients
from sidecast.evaluation.grid import groups
from sidecast.evaluation.native.llama_gradients import native_gradients
from sidecast.evaluation.read_outs import HALF_LIVES
from sidecast.evaluation.results import Finished, ResultStore
from sidecast.evaluation.settings import MemberSettings
from sidecast.evaluation.tasks import Task, find_task

SLICE_STEPS = 25
"""Steps between two signs of life."""
STATE_INTERVAL_STEPS = 200
"""Steps between two saved states of a group: what a killed farm repeats."""

Progress = Callable[[int], None]
"""Called with the number of steps, over all members, that have been taken since the last call."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How a farm uses a machine.

    Attributes:
        engine: How the arithmetic is done.
        num_processes: Groups that are trained at the same time.
        num_threads: Threads of each.
        max_members: Members of one group.
    """

    engine: Engine
    num_processes: int = 1
    num_threads: int = 1
    max_members: int = 8


def member_keys(members: Sequence[MemberSettings], corpora: Path, engine: Engine) -> list[str]:
    """The name of each member's result; reads the texts."""
    digests = {}
    for name in {member.task for member in members}:
        task = find_task(name)
        digests[name] = f"{task.digest([corpus.digest for corpus in corpora_of(task, corpora)])} {engine.precision}"
    return [member.key(digests[member.task]) for member in members]


@dataclass(frozen=True)
class Job:
    """One group and the names of its results."""

    members: Sequence[MemberSettings]
    keys: Sequence[str]


def open_jobs(members: Sequence[MemberSettings], store: ResultStore, workers: Workers) -> list[Job]:
    """Groups of all members that have no result yet, each member once."""
    finished = store.read()
    keys = member_keys(members, store.corpora, workers.engine)
    missing = {key: member for key, member in zip(keys, members, strict=True) if key not in finished}
    names = {id(member): key for key, member in missing.items()}
    return [
        Job(group, [names[id(member)] for member in group]) for group in groups(missing.values(), workers.max_members)
    ]


def run_jobs(jobs: Sequence[Job], store: ResultStore, workers: Workers, progress: Progress) -> None:
    """Trains groups and stores their results as they come.

    What is interrupted goes on from its last saved state at the next call.
    """
    if workers.num_processes == 1:
        torch.set_num_threads(workers.num_threads)
        for job in jobs:
            store.add(run_job(job, store, workers.engine, progress))
            store.drop_state(job.keys)
        return
    for job, finished in _in_processes(jobs, store, workers, progress):
        store.add(finished)
        store.drop_state(job.keys)


def run_job(job: Job, store: ResultStore, engine: Engine, progress: Progress) -> list[Finished]:
    """Trains one group."""
    task = find_task(job.members[0].task)
    # Time of the processor, not of the wall, on machines that are shared.
    clock = time.process_time if engine.device == "cpu" else time.perf_counter
    gradients = compiled_gradients(task, engine, store.folder / "native")
    run = GroupRun(task, corpora_of(task, store.corpora), job.members, engine, clock=clock, gradients=gradients)
    saved = store.load_state(job.keys)
    # A group that an older version began without today's read-outs begins anew.
    if saved is not None and saved["read_outs"].keys() == HALF_LIVES.keys():
        run.load(saved)
        progress(run.step * len(job.members))
    saved_step = run.step
    while not run.is_done:
        before = run.step
        run.advance(SLICE_STEPS)
        progress((run.step - before) * len(job.members))
        if run.step - saved_step >= STATE_INTERVAL_STEPS and not run.is_done:
            store.save_state(job.keys, run.state())
            saved_step = run.step
    conditions = conditions_of(engine, len(job.members), "torch" if gradients is None else "native")
    return [
        Finished(key=key, settings=member, result=result, conditions=conditions)
        for key, member, result in zip(job.keys, job.members, run.results(), strict=True)
    ]


def corpora_of(task: Task, cache: Path) -> list[Corpus]:
    """A task's texts, in the order in which they are read."""
    return [_corpus(name, cache) for name in task.corpora]


@lru_cache(maxsize=4)
def _corpus(name: str, cache: Path) -> Corpus:
    return load_corpus(name, cache)


def compiled_gradients(task: Task, engine: Engine, folder: Path) -> Gradients | None:
    """The compiled arithmetic where there is one; results differ in round-off only."""
    if engine.device != "cpu" or engine.precision != "fp32" or not engine.is_native:
        return None
    return native_gradients(task.model.build(), task.sequence_length, folder)


def conditions_of(engine: Engine, num_members: int, arithmetic: str) -> Mapping[str, Any]:
    """Versions and hardware, for people."""
    return {
        "arithmetic": arithmetic,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": engine.device,
        "precision": engine.precision,
        "num_threads": torch.get_num_threads(),
        "num_members": num_members,
    }


_steps_taken: Any = None
"""In a worker: the queue that progress goes to."""


def _start_worker(steps_taken: Any, num_threads: int) -> None:
    global _steps_taken
    _steps_taken = steps_taken
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(num_threads)


def _work(job: Job, folder: Path, engine: Engine) -> list[Finished]:
    return run_job(job, ResultStore(folder), engine, _steps_taken.put)


def _in_processes(
    jobs: Sequence[Job], store: ResultStore, workers: Workers, progress: Progress
) -> Iterator[tuple[Job, list[Finished]]]:
    context = multiprocessing.get_context("spawn")
    steps_taken: Any = context.Queue()
    # Torch reads it once, when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(workers.num_threads))
    pool = ProcessPoolExecutor(workers.num_processes, context, _start_worker, (steps_taken, workers.num_threads))
    try:
        running: dict[Future[list[Finished]], Job] = {
            pool.submit(_work, job, store.folder, workers.engine): job for job in jobs
        }
        while running:
            done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            _drain(steps_taken, progress)
            for future in done:
                yield running.pop(future), future.result()
    except BaseException:
        pool.terminate_workers() if hasattr(pool, "terminate_workers") else _terminate(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _terminate(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()


def _drain(steps_taken: Any, progress: Progress) -> None:
    while True:
        try:
            progress(steps_taken.get_nowait())
        except queue.Empty:
            return
